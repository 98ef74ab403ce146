"""A guest of a daemon: rings in its memory as tests/rig/driver.py has them, and the frontend that hands them over."""

from collections.abc import Sequence
from pathlib import Path
from typing import Self

from tests.rig.driver import QueuePair
from tests.rig.frontend import Frontend
from tests.rig.rings import ONE_REGION, VERSION_1, GuestMemory, Ring, Span
from xdpnet.virtq.features import VirtioFeature, mask
from xdpnet.virtq.message import MemoryRegion, MemoryTable, Payload, Request, VringAddr, VringFile, VringState

PROTOCOL = mask(VirtioFeature.VHOST_USER_F_PROTOCOL_FEATURES)


class RefusedError(Exception):
    """The daemon answered a request with an error."""


class RemoteGuest:
    """Connected and negotiated; start() hands over memory and rings. Close it, or use it as a context manager."""

    def __init__(
        self,
        path: str | Path,
        features: int = VERSION_1,
        num: int = 256,
        pairs: int = 1,
        spans: Sequence[Span] = ONE_REGION,
        memfd_flags: int = 0,
    ) -> None:
        self.frontend = Frontend.connect(str(path))
        self.memory = GuestMemory(spans, memfd_flags)
        self.pairs = [QueuePair(self.memory, features, num) for _ in range(pairs)]
        try:
            self.frontend.negotiate(features | PROTOCOL)
        except OSError:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        self.frontend.close()
        for pair in self.pairs:
            pair.close()
        self.memory.close()

    @property
    def pair(self) -> QueuePair:
        return self.pairs[0]

    def rings(self) -> list[Ring]:
        """By ring index."""
        return [ring for pair in self.pairs for ring in (pair.rx, pair.tx)]

    def table(self) -> tuple[MemoryTable, list[int]]:
        """The payload of SET_MEM_TABLE and its descriptors."""
        regions = (MemoryRegion(span.guest_addr, span.size, span.user_addr, span.offset) for span in self.memory.spans)
        return MemoryTable(tuple(regions)), [self.memory.fd] * len(self.memory.spans)

    def tell(self, request: Request, payload: Payload | bytes = b"", fds: Sequence[int] = ()) -> None:
        if self.frontend.tell(request, payload, fds):
            raise RefusedError(request.name)

    def start(self, base: int | None = None) -> Self:
        """`base`: what the daemon is told of where the rings stand; by default the truth."""
        self.tell(Request.SET_MEM_TABLE, *self.table())
        for index, ring in enumerate(self.rings()):
            at = ring.config()
            address = VringAddr(index=index, flags=0, desc=at.desc_addr, used=at.used_addr, avail=at.avail_addr, log=0)
            self.tell(Request.SET_VRING_NUM, VringState(index, at.num))
            self.tell(Request.SET_VRING_BASE, VringState(index, at.base if base is None else base))
            self.tell(Request.SET_VRING_ADDR, address)
            self.tell(Request.SET_VRING_CALL, VringFile(index, nofd=False), [ring.call_fd])
            self.tell(Request.SET_VRING_ERR, VringFile(index, nofd=False), [ring.err_fd])
            self.tell(Request.SET_VRING_KICK, VringFile(index, nofd=False), [ring.kick_fd])
            self.tell(Request.SET_VRING_ENABLE, VringState(index, 1))
        return self
