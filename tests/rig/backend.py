"""A backend inside the test's own process: a real core, a real control loop on a thread of its own, real sockets."""

import asyncio
import socket
import threading
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from tests.rig.frontend import Frontend
from tests.rig.waiting import PATIENCE_S
from xdpnet.core import Bridge
from xdpnet.sockets import Access
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.server import GuestSocket

T = TypeVar("T")


class ControlThread:
    """Runs an event loop, so that a test may block like any frontend."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="control", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout=PATIENCE_S)

    def call(self, function: Callable[[], T]) -> T:
        """Calls a plain function on the control thread, the only one that may touch the bridge."""

        async def work() -> T:
            return function()

        return self.run(work())

    @contextmanager
    def bridge(self, make: Callable[[], Bridge] = lambda: Bridge(workers=1)) -> Iterator[Bridge]:
        """A running bridge of this thread's."""
        made = self.call(make)
        try:
            self.call(made.start)
            yield made
        finally:
            self.call(made.close)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class Backend:
    """One guest port of its own bridge, behind as many sockets as the test opens, one after another."""

    def __init__(self, control: ControlThread, bridge: Bridge, pairs: int, mtu: int | None) -> None:
        self.control = control
        self.bridge = bridge
        self.port = control.call(lambda: bridge.add_guest(pairs))
        self.device = GuestDevice(bridge, "guest", self.port, pairs, mtu)
        self.sockets: list[GuestSocket] = []
        self.frontends: list[Frontend] = []

    def open(
        self, path: str | None, client: bool = False, fd: int | None = None, access: Access | None = None
    ) -> GuestSocket:
        guest = GuestSocket(self.device, path, client, fd, access or Access())
        self.control.run(guest.start())
        self.sockets.append(guest)
        return guest

    def connect(self) -> tuple[Frontend, GuestSocket]:
        """A frontend on one end of a socket pair, the backend on the other."""
        ours, theirs = socket.socketpair()
        guest = self.open(None, fd=theirs.detach())
        frontend = Frontend(ours)
        self.frontends.append(frontend)
        return frontend, guest

    def settle(self) -> None:
        """Returns when the control thread has done all that its sockets have to do now."""
        for _ in range(4):
            self.control.run(asyncio.sleep(0.01))

    def started(self, ring: int) -> bool:
        return bool(self.control.call(lambda: self.port.ring_state(ring)).started)

    def enabled(self, ring: int) -> bool:
        return bool(self.control.call(lambda: self.port.ring_state(ring)).enabled)

    def close(self) -> None:
        for frontend in self.frontends:
            frontend.close()
        for guest in self.sockets:
            self.control.run(guest.stop())
        self.control.call(self.port.remove)


class MakeBackend(Protocol):
    """The fixture make_backend: another guest port."""

    def __call__(self, pairs: int = 1, mtu: int | None = None) -> Backend: ...
