"""One guest port: the rings and memory that a frontend has configured, and their way into the core.

Survives its frontends; release() takes everything back from one that is gone. Invariant: what is refused leaves the
state as it was; `running` of a ring is true exactly while the core polls it.

Reference: QEMU docs/interop/vhost-user.rst, "Ring states"; c/xdpnet.h, "guest ports".
"""

import errno
import logging
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial

from xdpnet import limits
from xdpnet.closer import Closer
from xdpnet.core import MAX_REGIONS, MAX_RING, Bridge, Guest, Region, Staged
from xdpnet.ration import Ration, RationedLog
from xdpnet.virtq import features
from xdpnet.virtq.allowance import Allowance
from xdpnet.virtq.fd import Fd, number_of
from xdpnet.virtq.filling import MemoryChange
from xdpnet.virtq.memory import (
    REMEDY,
    File,
    check_file,
    check_log,
    check_log_size,
    check_ring,
    check_table,
    check_total,
    is_whole,
)
from xdpnet.virtq.message import Log, MemoryRegion, ProtocolError, Reason, VringAddr
from xdpnet.virtq.virtqueue import Virtqueue

log = logging.getLogger(__name__)

# QEMU announces five times in half a second after a migration, more often where it is told to.
ANNOUNCE_AT_ONCE, ANNOUNCE_EVERY_S = 16, 0.1


class GuestDevice:
    """What a session drives."""

    def __init__(
        self,
        bridge: Bridge,
        name: str,
        port: Guest,
        pairs: int,
        mtu: int | None = None,
        poll: bool = False,
        max_memory: int = limits.MEMORY[1],
        guest_offloads: bool = True,
    ) -> None:
        self.name = name
        self.log = RationedLog(log, name, about="guest")  # for all that its frontends, or the guest, can provoke
        self.closer = Closer()  # of all that its frontends send
        self.port = port
        self.pairs = pairs
        self.mtu = mtu
        self.max_memory = max_memory  # bytes of all regions together
        self.poll = poll  # rings without a kick descriptor are served, which keeps a worker awake
        self.offered = features.offered(pairs, mtu, guest_offloads)
        self.multiqueue = True  # of the last frontend: DPDK's asks what is offered once, and says what it has then only
        self.features = 0  # as negotiated, VHOST_USER_F_PROTOCOL_FEATURES included
        self.guest_mtu: int | None = None  # what the frontend announced with NET_SET_MTU
        self.rings = [Virtqueue(index) for index in range(2 * pairs)]
        self.memory: list[MemoryRegion] = []
        # Kept while the core has a region mapped, or unmapping it would be what frees the memory, on our thread.
        self._files: dict[MemoryRegion, File] = {}
        self.announcements = Ration(ANNOUNCE_AT_ONCE, 1 / ANNOUNCE_EVERY_S)  # it outlives the frontend
        self.allowance = Allowance(bridge)  # for what its frontends ask; it outlives them
        self.door = Allowance(bridge)  # for meeting them, and others who come
        self._bridge = bridge
        self._log: Log | None = None
        self._log_call: Fd | None = None
        self._said_sparse = False

    # ---- features ----

    @property
    def packed(self) -> bool:
        """Whether the packed ring layout was negotiated."""
        return bool(self.features & features.RING_PACKED)

    def set_features(self, bits: int) -> None:
        if unknown := bits & ~self.offered:
            raise ProtocolError("features", f"features not offered: {', '.join(features.names(unknown))}")
        if (modern := features.modern_only(bits)) and not bits & features.VERSION_1:
            raise ProtocolError("features", f"{', '.join(features.names(modern))} without VIRTIO_F_VERSION_1")
        bits = features.effective(bits)
        changed = (bits ^ self.features) & ~features.CHANGEABLE_LIVE
        if changed and any(ring.running for ring in self.rings):
            raise ProtocolError("features", f"{', '.join(features.names(changed))} cannot change while rings run")
        self._check_log_size(self._files, bits)
        with _refusing("features", "set features"):
            self.port.set_features(bits & ~features.PROTOCOL_FEATURES)
        self.features = bits
        if not bits & features.PROTOCOL_FEATURES:
            # Such a frontend knows no SET_VRING_ENABLE.
            for ring in self.rings:
                self.enable(ring, True)

    def set_mtu(self, mtu: int) -> None:
        least, most = limits.MTU
        most = self.mtu or most
        if not least <= mtu <= most:
            raise ProtocolError("mtu", f"MTU {mtu}, possible are {least} to {most}")
        self.guest_mtu = mtu

    @property
    def told_mtu(self) -> int:
        """What the guest was told that it may send, as far as we know; 0: nothing."""
        return self.guest_mtu or self.mtu or 0

    def announce(self, mac: bytes) -> bool:
        """SEND_RARP: the network learns that this address is here; False if it was told too often lately.

        QEMU asks for it before it starts the guest on its new host, so the rings need not run. Beyond that nothing is
        announced: after a restart of the daemon or of the frontend, switches still know this host's port.
        """
        if mac[0] & 1 or not any(mac):
            raise ProtocolError("rarp", f"{mac.hex(':')} is no address of a guest")
        if self.announcements.wait_s(1):
            return False
        self.announcements.spend(1)
        with _refusing("rarp", "announce the guest"):
            self.port.announce(mac)
        return True

    @property
    def lacks_memory(self) -> bool:
        """The driver has its rings ready, and they cannot run: of its memory the frontend has handed over none."""
        return not self._files and any(ring.config() for ring in self.rings)

    # ---- memory: a change takes the descriptors over, and is to be applied, once it is filled ----

    def new_table(self, regions: Sequence[MemoryRegion], fds: Sequence[Fd]) -> MemoryChange:
        """SET_MEM_TABLE."""
        check_table(regions)
        files: dict[MemoryRegion, File] = {}
        foreign: dict[MemoryRegion, ProtocolError] = {}
        for region, fd in zip(regions, fds, strict=True):
            try:
                files[region] = check_file(region, fd)
            except ProtocolError as error:
                if error.reason != "mem_fd":
                    raise
                foreign[region] = error
        if not files:
            raise next(iter(foreign.values()))
        check_total(files.values(), self.max_memory)
        self._check_log_size(files, self.features)
        table = [_core_region(region, file.fd) for region, file in files.items()]
        table += [_core_region(region, None, left_out=True) for region in foreign]

        def apply(staged: dict[Region, Staged]) -> int:
            with _refusing("mem", "map the memory table"):
                self.port.set_memory(table, staged)
            for region in foreign.keys() - set(self._left_out()):
                self._say_left_out(foreign[region])
            self.memory = list(regions)
            self._keep_files(files)
            self._say_sparse([file.fd for file in files.values()])
            self._follow_memory()
            for fd in set(fds) - {file.fd for file in files.values()}:
                fd.close()
            return sum(not file.sealed for file in files.values())

        return MemoryChange(fds, self._stage(table), apply)

    def new_region(self, region: MemoryRegion, fd: Fd) -> MemoryChange:
        """ADD_MEM_REG."""
        if 0 < self.memory.count(region) < len(self.rings) // 2:
            # QEMU before 8.0 adds each region once for each queue pair, and removes it as often.
            return MemoryChange([fd], {}, lambda _: self._add_unmapped(region, fd))
        if len(set(self.memory)) >= MAX_REGIONS:
            raise ProtocolError("mem_limit", f"all {MAX_REGIONS} memory slots are in use")
        check_table([*set(self.memory), region])
        try:
            file = check_file(region, fd)
        except ProtocolError as error:
            if error.reason != "mem_fd" or not self._files:
                raise
            return MemoryChange([fd], {}, partial(self._add_left_out, region, fd, error))
        check_total([*self._files.values(), file], self.max_memory)
        self._check_log_size([region], self.features)
        added = _core_region(region, fd)

        def apply(staged: dict[Region, Staged]) -> int:
            with _refusing("mem", "map the region"):
                self.port.add_region(added, staged.get(added))
            self.memory.append(region)
            self._keep_files(self._files | {region: file})
            self._say_sparse([fd])
            self._follow_memory()
            return int(not file.sealed)

        return MemoryChange([fd], self._stage([added]), apply)

    def _add_unmapped(self, region: MemoryRegion, fd: Fd) -> int:
        self.memory.append(region)
        fd.close()
        return 0

    def _add_left_out(self, region: MemoryRegion, fd: Fd, error: ProtocolError, _staged: dict[Region, Staged]) -> int:
        with _refusing("mem", "leave the region out"):
            self.port.add_region(_core_region(region, None, left_out=True))
        self._say_left_out(error)
        return self._add_unmapped(region, fd)

    def _left_out(self) -> list[MemoryRegion]:
        return [region for region in self.memory if region not in self._files]

    def _stage(self, table: Sequence[Region]) -> dict[Region, Staged]:
        """What may be lent of it."""
        staged: dict[Region, Staged] = {}
        try:
            with _refusing("mem", "map guest memory"):
                for region in table:
                    if self.port.stages(region):
                        staged[region] = Staged(region)
        except ProtocolError:
            for pages in staged.values():
                pages.close()
            raise
        return staged

    def remove_region(self, region: MemoryRegion) -> None:
        """Identified by its guest address, user address and size alone."""
        known = next((have for have in self.memory if _identity(have) == _identity(region)), None)
        if known is None:
            raise ProtocolError("mem", f"no region at {region.guest_addr:#x} of {region.size:#x} bytes")
        if self.memory.count(known) == 1:
            with _refusing("mem", "unmap the region"):
                self.port.remove_region(_core_region(known, None))
        self.memory.remove(known)
        self._keep_files({region: file for region, file in self._files.items() if region in self.memory})
        self._follow_memory()

    def _keep_files(self, files: dict[MemoryRegion, File]) -> None:
        """These, and no others: of what was unmapped the memory is freed now, if we had it last."""
        old, self._files = self._files, files
        for fd in {file.fd for file in old.values()} - {file.fd for file in files.values()}:
            fd.close()

    def _say_left_out(self, error: ProtocolError) -> None:
        """In an NVDIMM no driver has its buffers; in a DIMM it may."""
        self.log.warning("%s: left out, and frames and buffers there are handed back unused; %s", error, REMEDY)

    def _say_sparse(self, fds: Sequence[Fd]) -> None:
        """Once: how often it comes to this is the frontend's choice."""
        if self._bridge.zerocopy == "on" and not self._said_sparse and not all(map(is_whole, fds)):
            self._said_sparse = True
            log.info(
                "%s: copied from, for not all of its memory is allocated; QEMU does that by prealloc=on", self.name
            )

    def _follow_memory(self) -> None:
        """Rings that the core stopped for want of memory wait; rings that waited for it start."""
        for ring in self.rings:
            if ring.running and not self.port.ring_state(ring.index).started:
                self._halt(ring)
            try:
                self._start_if_complete(ring)
            except ProtocolError as error:
                self.log.info("ring %d waits for its memory: %s", ring.index, error)

    # ---- the dirty log ----

    def set_log(self, log: Log, fd: Fd) -> None:
        """SET_LOG_BASE. What is written is marked there from now on, as far as features and rings ask for it."""
        check_log(log, fd, self._files, self._files.values())
        with _refusing("log", "map the dirty log"):
            self.port.set_log(fd.fileno(), log.offset, log.size)
        self._log = log

    def set_log_call(self, fd: Fd) -> None:
        """SET_LOG_FD: takes the descriptor over, which is signalled when there is something in the log."""
        with _refusing("event_fd", "set the log descriptor"):
            self.port.set_log_fd(fd.fileno())
        if self._log_call is not None:
            self._log_call.close()
        self._log_call = fd

    def _check_log_size(self, regions: Iterable[MemoryRegion], bits: int) -> None:
        logs = bits & features.LOG_ALL or any(ring.addr and ring.addr.logged for ring in self.rings)
        if self._log is not None and logs:
            check_log_size(self._log, regions)

    def _drop_log(self) -> None:
        if self._log is not None:
            self.port.set_log(-1)
        if self._log_call is not None:
            self.port.set_log_fd(-1)
            self._log_call.close()
        self._log = self._log_call = None

    # ---- rings ----

    def set_num(self, ring: Virtqueue, num: int) -> None:
        self._require_halted(ring, "size")
        if not 1 <= num <= MAX_RING or (num & (num - 1) and not self.packed):
            possible = f"1 to {MAX_RING}" if self.packed else f"powers of 2 to {MAX_RING}"
            raise ProtocolError("vring_num", f"ring {ring.index}: size {num}, possible are {possible}")
        old, ring.num = ring.num, num
        try:
            self._start_if_complete(ring)
        except ProtocolError:
            ring.num = old
            raise

    def set_addr(self, ring: Virtqueue, addr: VringAddr) -> None:
        align = 4 if self.packed else 2
        if addr.desc % 16 or addr.avail % align or addr.used % 4:
            raise ProtocolError("ring_addr", f"ring {ring.index}: not aligned to 16, {align} and 4 bytes")
        if addr == ring.addr:
            return
        if ring.running and ring.addr is not None and addr.place == ring.addr.place:
            with _refusing("log", f"log ring {ring.index}"):
                self.port.ring_set_log(ring.index, addr.logged, addr.log)
            ring.addr = addr
            return
        self._require_halted(ring, "addresses")
        old, ring.addr = ring.addr, addr
        try:
            self._start_if_complete(ring)
        except ProtocolError:
            ring.addr = old
            raise

    def set_base(self, ring: Virtqueue, base: int) -> None:
        self._require_halted(ring, "base")
        if self.packed:  # index and wrap counter; the upper half, of the used ring, is the same at every stop
            if (base & 0x7FFF) >= (ring.num or MAX_RING):
                raise ProtocolError("vring_base", f"ring {ring.index}: base {base & 0x7FFF} of {ring.num} entries")
        elif base > 0xFFFF:
            raise ProtocolError("vring_base", f"ring {ring.index}: base {base:#x} is wider than 16 bits")
        ring.base = base

    def start(self, ring: Virtqueue, kick: Fd | None) -> None:
        """SET_VRING_KICK. A running ring goes on where it is with the new descriptor."""
        if kick is None and not self.poll:
            fault = "without a kick descriptor a CPU would poll it all the time; poll = true of the guest allows that"
            raise ProtocolError("event_fd", f"ring {ring.index}: {fault}")
        self._halt(ring)
        ring.start(kick)
        try:
            self._start_if_complete(ring)
        except ProtocolError:
            ring.stop()
            raise

    def stop(self, ring: Virtqueue) -> int:
        """GET_VRING_BASE: once this returns nothing touches the ring; the index at which to go on."""
        self._halt(ring)
        ring.stop()
        return ring.base

    def enable(self, ring: Virtqueue, on: bool) -> None:
        self.port.ring_enable(ring.index, on)
        ring.enabled = on

    def set_call(self, ring: Virtqueue, fd: Fd | None) -> None:
        if ring.running and (fd or ring.call):
            with _refusing("event_fd", "set the call descriptor"):
                self.port.ring_set_call(ring.index, number_of(fd))
        ring.set_call(fd)

    def set_err(self, ring: Virtqueue, fd: Fd | None) -> None:
        if ring.running and (fd or ring.err):
            with _refusing("event_fd", "set the err descriptor"):
                self.port.ring_set_err(ring.index, number_of(fd))
        ring.set_err(fd)

    def _start_if_complete(self, ring: Virtqueue) -> None:
        config = ring.config()
        if ring.running or config is None or ring.addr is None or not self._files:
            return
        check_ring(ring.addr, self._left_out())
        with _refusing("ring_addr", f"start ring {ring.index}"):
            self.port.ring_start(ring.index, config)
        ring.running = True

    def _require_halted(self, ring: Virtqueue, what: str) -> None:
        """One that is disabled is stopped: user-mode Linux sets rings up anew without GET_VRING_BASE before."""
        if ring.running and ring.enabled:
            raise ProtocolError("state", f"ring {ring.index} runs: its {what} cannot change")
        if ring.running:
            self.stop(ring)

    def _halt(self, ring: Virtqueue) -> None:
        if ring.running:
            ring.base = self.port.ring_stop(ring.index)
            ring.running = False

    # ---- resets ----

    def driver_reset(self) -> None:
        """SET_STATUS 0: all rings stop. The rest stays: QEMU asks for the bases afterwards, and sends no slot twice."""
        for ring in self.rings:
            self.stop(ring)

    def reset(self) -> None:
        """RESET_DEVICE: all rings as in the beginning; the memory stays, as it is the frontend's, not the device's."""
        for ring in self.rings:
            self.stop(ring)
            self.enable(ring, False)
            ring.forget()
        self.features = 0
        self.guest_mtu = None
        self.port.set_features(0)

    def release(self) -> None:
        """The frontend is gone: no ring runs, nothing of its memory stays mapped, no descriptor of it stays open."""
        self.reset()
        if self.memory:
            self.port.set_memory([])
        self.memory = []
        self._keep_files({})
        self._drop_log()


@contextmanager
def _refusing(reason: Reason, verb: str) -> Iterator[None]:
    """What the core refuses is refused to the frontend."""
    try:
        yield
    except OSError as error:
        name = errno.errorcode.get(error.errno or 0, "error")
        raise ProtocolError(reason, f"{verb}: {name}: {error}") from error


def _core_region(region: MemoryRegion, fd: Fd | None, left_out: bool = False) -> Region:
    return Region(
        guest_addr=region.guest_addr,
        size=region.size,
        user_addr=region.user_addr,
        offset=region.offset,
        fd=number_of(fd),
        left_out=left_out,
    )


def _identity(region: MemoryRegion) -> tuple[int, int, int]:
    return region.guest_addr, region.user_addr, region.size
