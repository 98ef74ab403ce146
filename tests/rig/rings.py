"""The driver's side of a virtqueue, in Python on a memfd: guest memory, split and packed rings.

GuestMemory is RAM in one or several regions whose guest, user and file addresses all differ. SplitRing and PackedRing
have the same verbs: add, publish, kick, collect, and sleep, which waits on the call eventfd alone, so an interrupt that
the device owes and does not send fails the test. raw() posts what no driver would. virtio 1.3, 2.7 and 2.8.
"""

import abc
import ctypes
import mmap
import os
import random
import select
import struct
import threading
import time
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from tests.rig.waiting import PATIENCE_S
from xdpnet import core
from xdpnet.virtq.features import VirtioFeature, mask

NEXT, WRITE, INDIRECT = 1, 2, 4
NO_INTERRUPT = NO_NOTIFY = 1
AVAIL, USED = 1 << 7, 1 << 15
ENABLE, DISABLE, DESC = 0, 1, 2  # packed: event suppression
WRAP = 1 << 15  # packed: the wrap counter beside an index

VERSION_1 = mask(VirtioFeature.VIRTIO_F_VERSION_1)
MERGEABLE = mask(VirtioFeature.VIRTIO_NET_F_MRG_RXBUF)
EVENT_IDX = mask(VirtioFeature.VIRTIO_RING_F_EVENT_IDX)
INDIRECT_DESC = mask(VirtioFeature.VIRTIO_RING_F_INDIRECT_DESC)
RING_PACKED = mask(VirtioFeature.VIRTIO_F_RING_PACKED)
IN_ORDER = mask(VirtioFeature.VIRTIO_F_IN_ORDER)
LEGACY = 0
MODERN = VERSION_1 | MERGEABLE | EVENT_IDX | INDIRECT_DESC

MIB = 1 << 20
PUNCH_HOLE = 3  # FALLOC_FL_PUNCH_HOLE | FALLOC_FL_KEEP_SIZE
libc = ctypes.CDLL(None, use_errno=True)
_fence_lock = threading.Lock()


def fence() -> None:
    """A full memory barrier: taking a lock is one on every machine that Python runs on."""
    with _fence_lock:
        pass


@dataclass(frozen=True)
class Span:
    """Where a region of RAM lies."""

    guest_addr: int
    size: int
    user_addr: int
    offset: int


ONE_REGION = (Span(0x4000_0000, 8 * MIB, 0x7F12_0000_0000, 0x1000),)
# The first two touch in guest addresses and nowhere else; a hole follows.
SPLIT_REGIONS = (
    Span(0x4000_0000, 4 * MIB, 0x7F12_0000_0000, 4 * MIB),
    Span(0x4040_0000, 2 * MIB, 0x7E00_0000_0000, 0),
    Span(0x8000_0000, 2 * MIB, 0x7F13_0000_0000, 8 * MIB),
)
BORDER = SPLIT_REGIONS[1].guest_addr
HOLE = SPLIT_REGIONS[1].guest_addr + SPLIT_REGIONS[1].size


class GuestMemory:
    """RAM of a guest. Every address here is a guest physical one; `user` gives the frontend's."""

    def __init__(self, spans: Sequence[Span] = ONE_REGION, memfd_flags: int = 0, prealloc: bool = False) -> None:
        self.spans = tuple(spans)
        self.size = max(span.offset + span.size for span in spans)
        self.fd = os.memfd_create("guest", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | memfd_flags)
        os.ftruncate(self.fd, self.size)
        if prealloc:
            os.posix_fallocate(self.fd, 0, self.size)
        self.map = mmap.mmap(self.fd, self.size)
        # Views of native words: one store an index, where struct.pack would write byte after byte.
        self.words = memoryview(self.map).cast("B").cast("H")
        self._next = {span: span.guest_addr for span in spans}
        self._free: dict[int, list[int]] = {}
        self._known: bytearray | None = None
        self._lent: list[tuple[int, int]] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        self.words.release()
        self.map.close()
        os.close(self.fd)

    def regions(self) -> list[core.Region]:
        return [core.Region(s.guest_addr, s.size, s.user_addr, s.offset, self.fd) for s in self.spans]

    def _span(self, addr: int) -> Span:
        for span in self.spans:
            if 0 <= addr - span.guest_addr < span.size:
                return span
        raise ValueError(f"{addr:#x} is not guest memory")

    def user(self, addr: int) -> int:
        span = self._span(addr)
        return addr - span.guest_addr + span.user_addr

    def offset(self, addr: int) -> int:
        span = self._span(addr)
        return addr - span.guest_addr + span.offset

    def _pieces(self, addr: int, size: int) -> Iterable[tuple[int, int]]:
        while size:
            span = self._span(addr)
            part = min(size, span.guest_addr + span.size - addr)
            yield self.offset(addr), part
            addr += part
            size -= part

    def read(self, addr: int, size: int) -> bytes:
        return b"".join(self.map[at : at + part] for at, part in self._pieces(addr, size))

    def write(self, addr: int, data: bytes) -> None:
        done = 0
        for at, part in self._pieces(addr, len(data)):
            self.map[at : at + part] = data[done : done + part]
            if self._known is not None:
                self._known[at : at + part] = data[done : done + part]
            done += part

    def load16(self, addr: int) -> int:
        return self.words[self.offset(addr) // 2]

    def store16(self, addr: int, value: int) -> None:
        at = self.offset(addr)
        self.words[at // 2] = value & 0xFFFF
        if self._known is not None:
            self._known[at : at + 2] = (value & 0xFFFF).to_bytes(2, "little")

    def reserve(self, size: int, align: int = 64, region: int = 0) -> int:
        """Memory for good, as rings need it: in one region."""
        span = self.spans[region]
        addr = -(-self._next[span] // align) * align
        if addr + size > span.guest_addr + span.size:
            raise MemoryError(f"region {region} of the guest is full")
        self._next[span] = addr + size
        return addr

    def give_up(self, addr: int, size: int) -> None:
        """Whole pages, to the host, as a balloon does; touched again, they are others, and zero."""
        for at, part in self._pieces(addr, size):
            if libc.fallocate(self.fd, PUNCH_HOLE, ctypes.c_int64(at), ctypes.c_int64(part)):
                raise OSError(ctypes.get_errno(), f"punch {part} bytes at {at:#x}")

    def take(self, size: int) -> int:
        """A buffer, until it is given back with the same size; from the first region that has room."""
        room = 1 << max(size - 1, 63).bit_length()
        if free := self._free.get(room):
            return free.pop()
        for region in range(len(self.spans)):
            try:
                return self.reserve(room, region=region)
            except MemoryError:
                continue
        raise MemoryError("the guest's memory is full")

    def give(self, addr: int, size: int) -> None:
        self._free.setdefault(1 << max(size - 1, 63).bit_length(), []).append(addr)

    def snapshot(self) -> bytes:
        return self.map[:]

    def changes(self, before: bytes, allowed: Iterable[tuple[int, int]]) -> list[int]:
        """Offsets in the file that differ from a snapshot, outside the allowed (address, size) ranges."""
        now = bytearray(self.map[:])
        for addr, size in allowed:
            for at, part in self._pieces(addr, size):
                now[at : at + part] = before[at : at + part]
        if now == before:
            return []
        return [at for at in range(len(before)) if now[at] != before[at]]

    def watch(self) -> None:
        """From now on every store of the driver's is known, and so is every one of the device's."""
        self._known = bytearray(self.map)
        self._lent.clear()

    def copy_again(self, addr: int, size: int) -> None:
        """What is there now is known."""
        assert self._known is not None
        for at, part in self._pieces(addr, size):
            self._known[at : at + part] = self.map[at : at + part]

    def changed_pages(self, page: int) -> list[int]:
        """Guest addresses of those that differ from what is known of them."""
        assert self._known is not None
        now, known = memoryview(self.map), memoryview(self._known)
        return [
            span.guest_addr + at
            for span in self.spans
            for at in range(0, span.size, page)
            if now[span.offset + at : span.offset + at + page] != known[span.offset + at : span.offset + at + page]
        ]

    def lend(self, addr: int, size: int, flags: int) -> None:
        """A descriptor was written: the device may write there, if it says so."""
        if self._known is not None and flags & WRITE:
            self._lent.append((addr, size))

    def strange(self, device: Iterable[tuple[int, int]]) -> list[int]:
        """Offsets that the device has changed since watch() began, outside of its own areas and of all that it was
        ever given to write to."""
        assert self._known is not None
        allowed = list(device)
        for addr, size in self._lent:
            for span in self.spans:
                start, end = max(addr, span.guest_addr), min(addr + size, span.guest_addr + span.size)
                if start < end:
                    allowed.append((start, end - start))
        return self.changes(bytes(self._known), allowed)


@dataclass(frozen=True)
class Buffer:
    """What one descriptor refers to."""

    addr: int
    size: int


@dataclass
class Chain:
    """A chain that the device has: its buffers, its descriptors and the memory of its indirect table."""

    buffers: tuple[Buffer, ...]
    descriptors: tuple[int, ...]
    tables: tuple[Buffer, ...] = ()
    owned: bool = True  # the ring gives the buffers' memory back


class Ring(abc.ABC):
    """What both layouts have in common: posting chains of buffers, and taking back what the device is done with."""

    default_base = 0

    def __init__(self, memory: GuestMemory, num: int, features: int, base: int | None = None, region: int = 0) -> None:
        self.memory = memory
        self.num = num
        self.event_idx = bool(features & EVENT_IDX)
        self.in_order = bool(features & IN_ORDER)
        self.batch: deque[tuple[int, int]] = deque()  # of an element that was read, to be collected
        self.allocate(region)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.err_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self.kicks = 0
        self.free: deque[int] = deque()  # heads, or buffer ids
        self.chains: dict[int, Chain] = {}
        self.collected = 0
        self.reset(base)

    def close(self) -> None:
        for fd in (self.kick_fd, self.call_fd, self.err_fd):
            os.close(fd)

    # ---- what the layouts differ in ----

    @abc.abstractmethod
    def allocate(self, region: int) -> None:
        """Reserves the memory of the ring's three parts."""

    @abc.abstractmethod
    def reset(self, base: int | None = None) -> None:
        """As a driver starts: nothing posted, all indices at `base`, which is as SET_VRING_BASE has it."""

    @abc.abstractmethod
    def base(self) -> int:
        """Where a device that has handed everything back goes on, as GET_VRING_BASE has it."""

    @abc.abstractmethod
    def parts(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        """Address and size of the descriptors, the driver's area and the device's, as RingConfig has them."""

    @abc.abstractmethod
    def device_areas(self) -> list[tuple[int, int]]:
        """What the device may write of the ring."""

    @property
    @abc.abstractmethod
    def room(self) -> int:
        """Descriptors that are free."""

    @abc.abstractmethod
    def write_table(self, addr: int, entries: Sequence[tuple[int, int, int]]) -> None:
        """An indirect table of (address, size, flags) that are all one chain."""

    @abc.abstractmethod
    def add(self, buffers: Sequence[Buffer], writable: bool, direct: int | None = None, owned: bool = True) -> int:
        """Makes a chain and puts it into the ring; the first `direct` buffers (default: all) in descriptors of the
        ring, the others in an indirect table. Returns its head or buffer id; publish() shows it."""

    @abc.abstractmethod
    def raw(self, *entries: tuple[int, int, int]) -> None:
        """Puts descriptors (address, size, flags) into the ring, whatever they say; publish() shows them."""

    @abc.abstractmethod
    def publish(self) -> None:
        """Makes what was added available."""

    @abc.abstractmethod
    def wants_kick(self) -> bool:
        """Whether the device asks for a kick for what was published since the last time this was asked."""

    @abc.abstractmethod
    def waits(self) -> bool:
        """Whether the device asks for a kick at the very next chain."""

    @abc.abstractmethod
    def pending(self) -> int:
        """How many chains the device has handed back that were not collected."""

    @abc.abstractmethod
    def next_used(self) -> tuple[int, int, Chain] | None:
        """Takes the next of them, if there is one: head or buffer id, length, the chain."""

    @abc.abstractmethod
    def want_call(self, ahead: int = 0) -> None:
        """Asks for an interrupt at the next used buffer but `ahead`."""

    @abc.abstractmethod
    def want_no_call(self) -> None:
        """Asks for no interrupts."""

    # ---- what they do not ----

    def config(self, base: int | None = None, kick: bool = True, call: bool = True) -> core.RingConfig:
        desc, avail, used = (self.memory.user(addr) for addr, _ in self.parts())
        return core.RingConfig(
            num=self.num,
            base=self.base() if base is None else base,
            desc_addr=desc,
            avail_addr=avail,
            used_addr=used,
            kick_fd=self.kick_fd if kick else -1,
            call_fd=self.call_fd if call else -1,
            err_fd=self.err_fd,
        )

    def make_table(self, buffers: Sequence[Buffer], flags: int) -> Buffer:
        table = Buffer(self.memory.take(16 * len(buffers)), 16 * len(buffers))
        self.write_table(table.addr, [(b.addr, b.size, flags) for b in buffers])
        return table

    def kick(self, always: bool = False) -> bool:
        """Publishes what was added and kicks if the device asks for it; whether it did."""
        self.publish()
        fence()
        wanted = self.wants_kick() or always
        if wanted:
            os.eventfd_write(self.kick_fd, 1)
            self.kicks += 1
        return wanted

    def returned(self) -> int:
        """How many chains the device has handed back since the reset."""
        return self.collected + self.pending()

    def collect(self, limit: int | None = None) -> list[tuple[int, int, Chain]]:
        """What the device has handed back: head or buffer id, length written, the chain. Descriptors are free again;
        the caller gives the memory back."""
        found: list[tuple[int, int, Chain]] = []
        while (limit is None or len(found) < limit) and (entry := self.next_used()):
            found.append(entry)
            self.collected += 1
            for table in entry[2].tables:
                self.memory.give(table.addr, table.size)
        return found

    def batch_of(self, ident: int) -> list[int]:
        """The chains that an element is about: in order, all from the oldest to its own (2.7.9, 2.8.9)."""
        if not self.in_order:
            return [ident]
        posted = list(self.chains)
        return posted[: posted.index(ident) + 1]

    def sleep(self, deadline: float) -> bool:
        """Until the device has handed something back. False: no interrupt by the deadline."""
        while not self.pending():
            self.want_call()
            fence()
            if self.pending():
                break
            if not wait_readable(self.call_fd, deadline - time.monotonic()):
                return False
            os.eventfd_read(self.call_fd)
        return True

    def calls(self) -> int:
        """Interrupts since the last look."""
        try:
            return os.eventfd_read(self.call_fd)
        except BlockingIOError:
            return 0

    def is_in_error(self, timeout: float = PATIENCE_S) -> bool:
        """Whether the device has signalled err, by the deadline."""
        return wait_readable(self.err_fd, timeout)


class SplitRing(Ring):
    """2.7: a table of descriptors that refer to each other, and two rings of heads."""

    def allocate(self, region: int) -> None:
        self.desc = self.memory.reserve(16 * self.num, 16, region)
        self.avail = self.memory.reserve(6 + 2 * self.num, 2, region)
        self.used = self.memory.reserve(6 + 8 * self.num, 4, region)

    def parts(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (self.desc, 16 * self.num), (self.avail, 6 + 2 * self.num), (self.used, 6 + 8 * self.num)

    def device_areas(self) -> list[tuple[int, int]]:
        """The used ring with its event index."""
        return [(self.used, 6 + 8 * self.num)]

    def reset(self, base: int | None = None) -> None:
        base = self.default_base if base is None else base
        self.next_avail = self.last_used = self.kicked = base
        self.free = deque(range(self.num))
        self.chains = {}
        self.batch.clear()
        self.collected = 0
        for addr, size in self.parts():
            self.memory.write(addr, bytes(size))
        self.memory.store16(self.avail + 2, base)
        self.memory.store16(self.used + 2, base)
        if self.event_idx:
            self.memory.store16(self.used_event_at, base)

    def base(self) -> int:
        return self.last_used

    @property
    def used_event_at(self) -> int:
        return self.avail + 4 + 2 * self.num

    @property
    def avail_event_at(self) -> int:
        return self.used + 4 + 8 * self.num

    @property
    def room(self) -> int:
        return len(self.free)

    def write_descriptor(self, table: int, index: int, addr: int, size: int, flags: int = 0, then: int = 0) -> None:
        self.memory.write(table + 16 * index, struct.pack("<QIHH", addr, size, flags, then))
        self.memory.lend(addr, size, flags)

    def write_table(self, addr: int, entries: Sequence[tuple[int, int, int]]) -> None:
        last = len(entries) - 1
        for i, (at, size, flags) in enumerate(entries):
            self.write_descriptor(addr, i, at, size, flags if i == last else flags | NEXT, 0 if i == last else i + 1)

    def add(self, buffers: Sequence[Buffer], writable: bool, direct: int | None = None, owned: bool = True) -> int:
        direct = len(buffers) if direct is None else direct
        flags = WRITE if writable else 0
        inline, behind = buffers[:direct], buffers[direct:]
        needed = len(inline) + bool(behind)
        if needed > len(self.free):
            raise MemoryError("the ring has no free descriptors")
        own = [self.free.popleft() for _ in range(needed)]
        tables = (self.make_table(behind, flags),) if behind else ()
        entries = [(b.addr, b.size, flags) for b in inline] + [(t.addr, t.size, INDIRECT) for t in tables]
        for i, (addr, size, kind) in enumerate(entries):
            last = i == needed - 1
            self.write_descriptor(
                self.desc, own[i], addr, size, kind | (0 if last else NEXT), 0 if last else own[i + 1]
            )
        self.chains[own[0]] = Chain(tuple(buffers), tuple(own), tables, owned)
        self.put(own[0])
        return own[0]

    def raw(self, *entries: tuple[int, int, int]) -> None:
        """Each is followed by the next, and the last by the first, if it has the flag for it."""
        own = tuple(self.free.popleft() for _ in entries)
        for i, (addr, size, flags) in enumerate(entries):
            self.write_descriptor(self.desc, own[i], addr, size, flags, own[(i + 1) % len(own)])
        self.chains[own[0]] = Chain((), own, owned=False)
        self.put(own[0])

    def put(self, head: int) -> None:
        """The next entry of the available ring, whatever it says."""
        self.memory.store16(self.avail + 4 + 2 * (self.next_avail % self.num), head)
        self.next_avail = (self.next_avail + 1) & 0xFFFF

    def publish(self) -> None:
        self.memory.store16(self.avail + 2, self.next_avail)

    def wants_kick(self) -> bool:
        old, self.kicked = self.kicked, self.next_avail
        if not self.event_idx:
            return not self.memory.load16(self.used) & NO_NOTIFY
        event = self.memory.load16(self.avail_event_at)
        return (self.next_avail - event - 1) & 0xFFFF < (self.next_avail - old) & 0xFFFF

    def waits(self) -> bool:
        if not self.event_idx:
            return self.memory.load16(self.used) == 0
        return self.memory.load16(self.avail_event_at) == self.memory.load16(self.avail + 2)

    def used_idx(self) -> int:
        return self.memory.load16(self.used + 2)

    def pending(self) -> int:
        return (self.used_idx() - self.last_used) & 0xFFFF

    def next_used(self) -> tuple[int, int, Chain] | None:
        if self.used_idx() == self.last_used:
            return None
        if not self.batch:
            entry = self.memory.read(self.used + 4 + 8 * (self.last_used % self.num), 8)
            head, written = struct.unpack("<II", entry)
            self.batch.extend((each, written if each == head else 0) for each in self.batch_of(head))
        head, written = self.batch.popleft()
        chain = self.chains.pop(head)
        self.free.extend(chain.descriptors)
        self.last_used = (self.last_used + 1) & 0xFFFF
        return head, written, chain

    def want_call(self, ahead: int = 0) -> None:
        if self.event_idx:
            self.memory.store16(self.used_event_at, self.last_used + ahead)
        else:
            self.memory.store16(self.avail, 0)

    def want_no_call(self) -> None:
        """Without event index: a flag. With it: an index that has just passed."""
        if self.event_idx:
            self.memory.store16(self.used_event_at, self.last_used - 1)
        else:
            self.memory.store16(self.avail, NO_INTERRUPT)


class PackedRing(Ring):
    """2.8: one ring of descriptors that both sides write, of any size, and a word each to suppress events.

    Places are counted on a line without end: place n is descriptor n % num, in a lap whose wrap counter is 1 in even
    laps and 0 in odd ones. Buffer ids are handed out in no order.
    """

    default_base = WRAP

    def allocate(self, region: int) -> None:
        self.desc = self.memory.reserve(16 * self.num, 16, region)
        self.driver = self.memory.reserve(4, 4, region)
        self.device = self.memory.reserve(4, 4, region)

    def parts(self) -> tuple[tuple[int, int], tuple[int, int], tuple[int, int]]:
        return (self.desc, 16 * self.num), (self.driver, 4), (self.device, 4)

    def device_areas(self) -> list[tuple[int, int]]:
        """Of every descriptor all but the address, and the device's event suppression."""
        return [(self.device, 4), *((self.desc + 16 * i + 8, 8) for i in range(self.num))]

    def reset(self, base: int | None = None) -> None:
        base = (self.default_base if base is None else base) & 0xFFFF
        self.next_avail = self.last_used = self.kicked = (base & ~WRAP) + (0 if base & WRAP else self.num)
        self.free = deque(random.Random(self.num).sample(range(self.num), self.num))
        self.in_use = 0
        self.held: tuple[int, int] | None = None  # address and value of the flags that make a batch available
        self.chains = {}
        self.batch.clear()
        self.collected = 0
        self.memory.write(self.driver, bytes(4))
        self.memory.write(self.device, bytes(4))
        self.memory.write(self.desc, bytes(16 * self.num))
        # As if all laps before had been used.
        for n in range(self.next_avail - self.num, self.next_avail):
            pos, wrap = self.place(n)
            self.memory.store16(self.desc + 16 * pos + 14, (AVAIL | USED) * wrap)

    def place(self, n: int) -> tuple[int, int]:
        """Index and wrap counter."""
        return n % self.num, n // self.num & 1 ^ 1

    def off_wrap(self, n: int) -> int:
        pos, wrap = self.place(n)
        return pos | wrap << 15

    def base(self) -> int:
        return self.off_wrap(self.last_used) * 0x10001

    @property
    def room(self) -> int:
        return self.num - self.in_use

    def write_table(self, addr: int, entries: Sequence[tuple[int, int, int]]) -> None:
        self.memory.write(addr, b"".join(struct.pack("<QIHH", at, size, 0, flags) for at, size, flags in entries))
        for entry in entries:
            self.memory.lend(*entry)

    def add(self, buffers: Sequence[Buffer], writable: bool, direct: int | None = None, owned: bool = True) -> int:
        """A chain is all direct or one indirect descriptor: with one of them behind, all are (2.8.8)."""
        flags = WRITE if writable else 0
        indirect = direct is not None and direct < len(buffers)
        needed = 1 if indirect else len(buffers)
        if needed > self.room:
            raise MemoryError("the ring has no free descriptors")
        tables = (self.make_table(buffers, flags),) if indirect else ()
        entries = [(t.addr, t.size, INDIRECT) for t in tables] or [(b.addr, b.size, flags) for b in buffers]
        ident = self.free.popleft()
        own = self.post([(*entry, ident) for entry in entries], chained=True)
        self.chains[ident] = Chain(tuple(buffers), own, tables, owned)
        return ident

    def raw(self, *entries: tuple[int, int, int], ident: int | None = None) -> None:
        """All with this buffer id; by default one that is free."""
        ident = self.free.popleft() if ident is None else ident
        own = self.post([(*entry, ident) for entry in entries])
        self.chains[ident] = Chain((), own, owned=False)

    def post(self, entries: Sequence[tuple[int, int, int, int]], chained: bool = False) -> tuple[int, ...]:
        """Descriptors (address, size, flags, id) at the next places."""
        first = self.next_avail
        for addr, size, kind, ident in entries:
            self.memory.lend(addr, size, kind)
            last = self.next_avail == first + len(entries) - 1
            pos, wrap = self.place(self.next_avail)
            flags = kind | (AVAIL if wrap else USED) | (NEXT if chained and not last else 0)
            at = self.desc + 16 * pos
            # The first of a batch becomes available last, and so do all others.
            if self.held is None:
                self.held = at + 14, flags
                self.memory.write(at, struct.pack("<QIH", addr, size, ident))
            else:
                self.memory.write(at, struct.pack("<QIHH", addr, size, ident, flags))
            self.next_avail += 1
            self.in_use += 1
        return tuple(n % self.num for n in range(first, self.next_avail))

    def publish(self) -> None:
        if self.held is not None:
            self.memory.store16(*self.held)
            self.held = None

    def wants_kick(self) -> bool:
        old, self.kicked = self.kicked, self.next_avail
        off_wrap, flags = self.memory.load16(self.device), self.memory.load16(self.device + 2)
        if flags != DESC:
            return flags == ENABLE
        return old <= self._on_line(off_wrap, self.next_avail) < self.next_avail

    def _on_line(self, off_wrap: int, near: int) -> int:
        """The place that an index with its wrap counter means, in the lap of `near` or the one before."""
        lap = near // self.num
        event = lap * self.num + (off_wrap & ~WRAP)
        return event if off_wrap >> 15 == self.place(near)[1] else event - self.num

    def waits(self) -> bool:
        off_wrap, flags = self.memory.load16(self.device), self.memory.load16(self.device + 2)
        return flags == (DESC if self.event_idx else ENABLE) and off_wrap == self.off_wrap(self.next_avail)

    def pending(self) -> int:
        n, found = self.last_used, 0
        while self.is_used(n):
            batch = self.batch_of(self.memory.load16(self.desc + 16 * (n % self.num) + 12))
            batch = batch[found:] if self.in_order else batch
            n += sum(len(self.chains[ident].descriptors) for ident in batch)
            found += len(batch)
        return found

    def is_used(self, n: int) -> bool:
        pos, wrap = self.place(n)
        flags = self.memory.load16(self.desc + 16 * pos + 14)
        return n < self.next_avail and flags & (AVAIL | USED) == (AVAIL | USED) * wrap

    def next_used(self) -> tuple[int, int, Chain] | None:
        if not self.batch:
            if not self.is_used(self.last_used):
                return None
            at = self.desc + 16 * (self.last_used % self.num)
            written, ident, flags = struct.unpack("<IHH", self.memory.read(at + 8, 8))
            if bool(flags & WRITE) != bool(written):
                raise ValueError(f"a used descriptor of length {written} with flags {flags:#x}")
            self.batch.extend((each, written if each == ident else 0) for each in self.batch_of(ident))
        ident, written = self.batch.popleft()
        chain = self.chains.pop(ident)
        self.free.append(ident)
        self.in_use -= len(chain.descriptors)
        self.last_used += len(chain.descriptors)
        return ident, written, chain

    def want_call(self, ahead: int = 0) -> None:
        """With event index: at the descriptor that is used next, but `ahead`."""
        if self.event_idx:
            self.suppress(DESC, self.off_wrap(self.last_used + ahead))
        else:
            self.suppress(ENABLE)

    def want_no_call(self) -> None:
        self.suppress(DISABLE)

    def suppress(self, flags: int, off_wrap: int = 0) -> None:
        self.memory.store16(self.driver, off_wrap)
        self.memory.store16(self.driver + 2, flags)


def make_ring(memory: GuestMemory, num: int, features: int, base: int | None = None) -> Ring:
    return (PackedRing if features & RING_PACKED else SplitRing)(memory, num, features, base)


def wait_readable(fd: int, timeout: float) -> bool:
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    return bool(poll.poll(max(0.0, timeout) * 1000))
