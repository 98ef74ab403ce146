"""What a hostile guest leaves of a worker to a neighbour: python -m tests.bench.neighbours [--seconds S] [SCENE...]

A neighbour sends 64-byte frames to a guest that takes them all, first alone, then beside guests that make one worker's
life hard, or a frontend that makes the control thread's. Of half the load that it had alone, which leaves time for the
others, it should keep 95 % or more; offering all that it can it should have 80 % or more of half its rate alone, its
share of the time. Also the longest time without a frame at half the load (10 ms), and the longest control call (20 ms).

Frames come and go in one thread of neighbours.c, from rings that are written once: so a guest costs its CPU next to
nothing, and what is measured is the worker. As rows of the benchmark they take their turns; run alone, for trying out.
"""

import argparse
import ctypes
import fnmatch
import functools
import os
import resource
import select
import socket
import statistics
import struct
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self

from tests.bench.lab import BACKEND_CPU, CLIENT_CPU, Lab, Row, Values, xdpnet
from tests.rig.driver import Driver, QueuePair
from tests.rig.frontend import DisconnectedError
from tests.rig.remote import RemoteGuest
from tests.rig.rings import (
    INDIRECT,
    INDIRECT_DESC,
    MERGEABLE,
    MIB,
    NEXT,
    VERSION_1,
    WRITE,
    GuestMemory,
    Span,
    SplitRing,
)
from xdpnet import core
from xdpnet.demo import process, topology
from xdpnet.virtq.features import VirtioFeature, mask
from xdpnet.virtq.message import Payload, Request, VringFile, VringState

UNITS = {
    "kept": "% of half its load, kept",
    "share": "% of a fair half",
    "gap": "ms, longest gap",
    "call": "ms, longest control call",
}
DRIVER = Path(__file__).with_name("neighbours.c")
SETTLE_S = 0.05
CALL_EVERY_S = 0.02
RECEIVERS = 40
WATCHERS = 18_000
MESSAGES = 10_000  # a second
RAM = 0x4000_0000
BROADCAST = b"\xff" * 6
OFFLOADS = VERSION_1 | mask(VirtioFeature.VIRTIO_NET_F_CSUM, VirtioFeature.VIRTIO_NET_F_HOST_TSO4)
TABLES = VERSION_1 | INDIRECT_DESC


class DrivenRing(ctypes.Structure):
    """struct ring of neighbours.c."""

    _fields_ = (
        ("avail", ctypes.c_void_p),
        ("used", ctypes.c_void_p),
        ("num", ctypes.c_uint32),
        ("kick", ctypes.c_int32),
        ("rate", ctypes.c_double),
        ("back", ctypes.c_uint64),
        ("gap_ns", ctypes.c_uint64),
    )


@functools.cache
def library() -> ctypes.CDLL:
    with tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-") as name:
        path = Path(name) / "neighbours.so"
        subprocess.run(["gcc", "-O2", "-shared", "-fPIC", "-o", str(path), str(DRIVER)], check=True)
        loaded = ctypes.CDLL(str(path))
    loaded.drive.restype = ctypes.c_double
    return loaded


def mac(number: int) -> bytes:
    return bytes.fromhex("525400000000")[:5] + bytes([number])


def spans(mib: int) -> tuple[Span, ...]:
    return (Span(RAM, mib * MIB, 0x7F12_0000_0000, 0x1000),)


def regions(count: int) -> tuple[Span, ...]:
    """Small ones, and one of 4 MiB behind them."""
    apart, small = 0x100_0000, 0x1_0000
    return tuple(
        Span(RAM + i * apart, small if i < count - 1 else 4 * MIB, 0x7F12_0000_0000 + i * apart, 0x1000 + i * small)
        for i in range(count)
    )


# ---- guests ----


class Guest(Protocol):
    """Of a bridge in this process, or of a daemon."""

    memory: GuestMemory
    pairs: list[QueuePair]


def offer(ring: SplitRing) -> None:
    """Every descriptor is the head of a chain, in their order, as often as the ring goes round."""
    for i in range(ring.num):
        ring.memory.store16(ring.avail + 4 + 2 * i, i)


def take_all(guest: Guest, pair: int = 0, size: int = 2048) -> SplitRing:
    """Receive buffers, up to 256 of them; the content is nobody's concern."""
    ring = guest.pairs[pair].rx
    assert isinstance(ring, SplitRing)
    count = min(ring.num, 256)
    at = guest.memory.reserve(size * count)
    for i in range(ring.num):
        ring.write_descriptor(ring.desc, i, at + size * (i % count), size, WRITE)
    offer(ring)
    return ring


def send(guest: Guest, frame: bytes, pair: int = 0, header: bytes = bytes(12)) -> SplitRing:
    """The same frame in every descriptor."""
    ring = guest.pairs[pair].tx
    assert isinstance(ring, SplitRing)
    at = guest.memory.reserve(len(header + frame))
    guest.memory.write(at, header + frame)
    for i in range(ring.num):
        ring.write_descriptor(ring.desc, i, at, len(header + frame))
    offer(ring)
    return ring


def empties(
    guest: Guest, ring: SplitRing, entries: int, odd: int = 0, region: int = 0, takes: bool = False
) -> SplitRing:
    """In every descriptor the same indirect table: a chain of nothing, to receive of one byte and nothing else."""
    memory = guest.memory
    table = memory.reserve(16 * entries + 16, 16, region) + odd
    byte = memory.reserve(64)
    kind = WRITE if takes else 0
    last = entries - 1
    memory.write(
        table,
        b"".join(
            struct.pack("<QIHH", byte, int(takes and not i), kind | NEXT * (i < last), i + 1 if i < last else 0)
            for i in range(entries)
        ),
    )
    for i in range(ring.num):
        ring.write_descriptor(ring.desc, i, table, 16 * entries, INDIRECT)
    offer(ring)
    return ring


def driven(ring: SplitRing, rate: float = 0) -> DrivenRing:
    start = ctypes.addressof(ctypes.c_char.from_buffer(ring.memory.map))
    avail, used = (start + ring.memory.offset(at) for at in (ring.avail, ring.used))
    return DrivenRing(avail=avail, used=used, num=ring.num, kick=ring.kick_fd, rate=rate)


# ---- measuring ----


@dataclass(frozen=True)
class Seen:
    """Frames a second that arrived, the longest time without one and the longest control call, in milliseconds."""

    rate: float
    gap: float
    call: float


def drive(rings: Sequence[DrivenRing], seconds: float, call: Callable[[], object]) -> Seen:
    """Drives the rings; the second one is where the neighbour's frames arrive. Calls now and then meanwhile."""
    array = (DrivenRing * len(rings))(*rings)
    took = 0.0

    def run() -> None:
        nonlocal took
        os.sched_setaffinity(0, {CLIENT_CPU})
        took = library().drive(array, len(rings), ctypes.c_double(seconds))

    thread = threading.Thread(target=run)
    thread.start()
    longest = 0.0
    while thread.is_alive():
        thread.join(CALL_EVERY_S)
        started = time.monotonic()
        call()
        longest = max(longest, time.monotonic() - started)
    return Seen(array[1].back / took, array[1].gap_ns / 1e6, longest * 1e3)


@dataclass(frozen=True)
class Play:
    """A scene that is set: the neighbour's rings, everybody else's, and a control call of somebody who has no part."""

    neighbour: SplitRing
    sink: SplitRing
    others: Sequence[DrivenRing]
    call: Callable[[], object]

    def measure(self, seconds: float, beside: Callable[[], "Background"] | None = None) -> Values:
        def seen(rate: float, others: Sequence[DrivenRing]) -> Seen:
            time.sleep(SETTLE_S)
            return drive([driven(self.neighbour, rate), driven(self.sink), *others], seconds, self.call)

        alone = seen(0, [])
        with beside() if beside else ExitStack():
            full = seen(0, self.others)
            half = seen(alone.rate / 2, self.others)
        return {
            "kept": min(100.0, 200 * half.rate / alone.rate),
            "share": min(200.0, 200 * full.rate / alone.rate),
            "gap": half.gap,
            "call": max(full.call, half.call),
        }


class Background(Protocol):
    def __enter__(self) -> object: ...

    def __exit__(self, *_: object) -> object: ...


# ---- scenes of one bridge ----


class Stage:
    """A bridge of one worker with the neighbour, the guest that it sends to, and an idle one."""

    def __init__(self, bridge: core.Bridge) -> None:
        self.bridge = bridge
        self.guests: list[Driver] = []
        neighbour, sink = self.add(1, num=1024), self.add(2, num=1024)
        self.idle = self.add(3, num=16, mib=1)
        self.neighbour = send(neighbour, mac(2) + mac(1) + b"\x88\xb5" + bytes(46))
        self.sink = take_all(sink)
        self._enabled = True

    def add(
        self, number: int, features: int = VERSION_1, num: int = 256, mib: int = 8, pairs: int = 1,
        where: Sequence[Span] | None = None,
    ) -> Driver:  # fmt: skip
        made = Driver(self.bridge, features, num, pairs, where or spans(mib))
        made.port.set_mac(mac(number), False)
        self.guests.append(made)
        return made

    def audience(self) -> list[DrivenRing]:
        """Guests that take whatever is sent to all."""
        return [driven(take_all(self.add(40 + i, VERSION_1 | MERGEABLE, mib=2), size=4096)) for i in range(RECEIVERS)]

    def control(self) -> None:
        """What changes something in the core each time, at a guest that does nothing."""
        self._enabled = not self._enabled
        self.idle.port.ring_enable(0, self._enabled)


Others = Callable[[Stage], list[DrivenRing]]


def on_a_bridge(others: Others) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with ExitStack() as stack:
            bridge = stack.enter_context(core.Bridge(workers=1, cpus=[BACKEND_CPU]))
            stage = Stage(bridge)
            play = Play(stage.neighbour, stage.sink, others(stage), stage.control)
            for guest in stage.guests:
                stack.callback(guest.close)
                guest.start()
            bridge.start()
            return play.measure(lab.seconds)

    return measure


def nobody(_: Stage) -> list[DrivenRing]:
    return []


def flood(frame: bytes, header: bytes = bytes(12), pairs: int = 1, audience: bool = False) -> Others:
    """Frames without end: to one guest that takes them, or to many."""

    def others(stage: Stage) -> list[DrivenRing]:
        bad = stage.add(4, OFFLOADS, pairs=pairs, mib=4 + pairs)
        takers = stage.audience() if audience else [driven(take_all(stage.add(5, VERSION_1 | MERGEABLE), size=4096))]
        return [*takers, *(driven(send(bad, frame, pair, header)) for pair in range(pairs))]

    return others


def plain(to: bytes, length: int) -> bytes:
    return (to + mac(4) + b"\x88\xb5").ljust(length, b"\0")


def tcp(to: bytes, payload: int) -> bytes:
    ip = struct.pack(">BBHHHBBH", 0x45, 0, 40 + payload, 1, 0x4000, 64, 6, 0) + bytes([10, 0, 0, 1, 10, 0, 0, 2])
    return (
        to + mac(4) + b"\x08\x00" + ip + struct.pack(">HHIIBBHHH", 1, 2, 3, 4, 0x50, 0x10, 100, 0, 0) + bytes(payload)
    )


def offload(gso_size: int = 0) -> bytes:
    """A virtio_net_hdr: the checksum of tcp(), and segments of this size."""
    return struct.pack("<BBHHHHH", 1, 1 if gso_size else 0, 54, gso_size, 34, 16, 0)


def sends_empties(num: int, entries: int, odd: int = 0, spread: int = 1) -> Others:
    """Chains of empty descriptors: a ring of `num` tables, at an odd address or behind so many regions."""

    def others(stage: Stage) -> list[DrivenRing]:
        bad = stage.add(4, TABLES, num, where=regions(spread) if spread > 1 else None)
        tx = bad.pair.tx
        assert isinstance(tx, SplitRing)
        return [driven(empties(bad, tx, entries, odd, spread - 1))]

    return others


def posts_empties(num: int, entries: int, odd: int = 0) -> Others:
    """The same as receive buffers of one byte each, which somebody else's broadcasts do not fit into, two at a time."""

    def others(stage: Stage) -> list[DrivenRing]:
        bad = stage.add(4, TABLES | MERGEABLE, num)
        rx = bad.pair.rx
        assert isinstance(rx, SplitRing)
        return [
            driven(empties(bad, rx, entries, odd, takes=True)),
            driven(send(stage.add(5, num=2, mib=1), plain(BROADCAST, 60).replace(mac(4), mac(5))), rate=1000),
        ]

    return others


# ---- scenes of a daemon ----


@contextmanager
def daemon(lab: Lab) -> Iterator[tuple[Play, RemoteGuest]]:
    """A neighbour, its sink, an idle guest, and one whose frontend does the harm."""
    with topology.topology() as net, ExitStack() as stack:
        macs = [mac(number).hex(":") for number in range(1, 5)]
        served = stack.enter_context(xdpnet(net, lab, macs, False, guest_options=",queues=16"))
        guests = [
            stack.enter_context(RemoteGuest(path, num=1024, pairs=pairs))
            for path, pairs in zip(served.sockets, (1, 1, 1, 4), strict=True)
        ]
        neighbour, sink, idle, bad = guests
        rings = send(neighbour, mac(2) + mac(1) + b"\x88\xb5" + bytes(46)), take_all(sink)
        others = [driven(send(bad, mac(2) + mac(4) + b"\x88\xb5" + bytes(46)), rate=1000)]
        for guest in guests:
            guest.start()

        def call() -> None:
            idle.tell(Request.SET_VRING_ENABLE, VringState(1, 1))

        yield Play(*rings, others, call), bad


def watched(lab: Lab) -> Values:
    """Everybody who polls an eventfd is woken by a write to it: a frontend can make many of those."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard < WATCHERS + 1000:
        raise ChildProcessError(f"at most {hard} open files are allowed here, and {WATCHERS + 1000} are needed")
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with daemon(lab) as (play, bad), ExitStack() as stack:
        stack.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        for _ in range(WATCHERS):
            watcher = select.epoll()
            stack.callback(watcher.close)
            watcher.register(bad.pairs[0].tx.call_fd, select.EPOLLIN)
        return play.measure(lab.seconds)


Message = tuple[Request, Payload | bytes, list[int]]


class Flood:
    """Sends these messages in turn, so many a second, until the block ends or the daemon has had enough."""

    def __init__(self, guest: RemoteGuest, messages: Sequence[Message], rate: int) -> None:
        self._frontend, self._messages, self._rate = guest.frontend, messages, rate
        self._thread = threading.Thread(target=self._run)
        self._end = threading.Event()

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._frontend.socket.shutdown(socket.SHUT_RDWR)
        self._thread.join()

    def _run(self) -> None:
        started, sent = time.monotonic(), 0
        while not self._end.wait(0.001):
            due = int((time.monotonic() - started) * self._rate)
            try:
                for number in range(sent, due):
                    request, payload, fds = self._messages[number % len(self._messages)]
                    self._frontend.send(request, payload, fds)
            except (DisconnectedError, TimeoutError):
                return
            sent = max(sent, due)


def told(messages: Callable[[RemoteGuest], list[Message]], rate: int = MESSAGES) -> Callable[[Lab], Values]:
    def measure(lab: Lab) -> Values:
        with daemon(lab) as (play, bad):
            play = Play(play.neighbour, play.sink, [], play.call)
            return play.measure(lab.seconds, lambda: Flood(bad, messages(bad), rate))

    return measure


def enables(_: RemoteGuest) -> list[Message]:
    return [(Request.SET_VRING_ENABLE, VringState(0, on), []) for on in (0, 1)]


def kicks(guest: RemoteGuest) -> list[Message]:
    return [(Request.SET_VRING_KICK, VringFile(1, nofd=False), [guest.pairs[0].tx.kick_fd])]


def resets(_: RemoteGuest) -> list[Message]:
    return [(Request.RESET_DEVICE, b"", [])]


def tables(guest: RemoteGuest) -> list[Message]:
    return [(Request.SET_MEM_TABLE, *guest.table())]


TO_ONE = mac(5)
SCENES: dict[str, tuple[str, Callable[[Lab], Values]]] = {
    name: (title, on_a_bridge(others))
    for name, title, others in (
        ("nobody", "nobody", nobody),
        ("64", "frames of 64 B", flood(plain(TO_ONE, 60))),
        ("64-pairs", "frames of 64 B on 16 pairs", flood(plain(TO_ONE, 60), pairs=16)),
        ("1500", "frames of 1500 B", flood(plain(TO_ONE, 1500))),
        ("tso-512", "TSO of 64 KiB in pieces of 512 B", flood(tcp(TO_ONE, 65000), offload(512))),
        ("tso-8", "TSO of 1 KiB in pieces of 8 B", flood(tcp(TO_ONE, 1024), offload(8))),
        ("checksum", "checksums of 64 KiB", flood(tcp(TO_ONE, 65000), offload())),
        ("broadcast-64", "broadcasts of 64 B to 40", flood(plain(BROADCAST, 60), audience=True)),
        ("broadcast-1500", "broadcasts of 1500 B to 40", flood(plain(BROADCAST, 1500), audience=True)),
        ("broadcast-60k", "broadcasts of 60 KiB to 40", flood(plain(BROADCAST, 60 << 10), audience=True)),
        ("broadcast-tso", "TSO of 64 KiB to 40", flood(tcp(BROADCAST, 65000), offload(512), audience=True)),
        ("empty-256", "tables of 256 empty descriptors", sends_empties(256, 256)),
        ("empty-4096", "tables of 4096 empty descriptors", sends_empties(256, 4096)),
        ("empty-16384", "tables of 16384 empty descriptors", sends_empties(1024, 16384)),
        ("empty-65536", "tables of 65536 empty descriptors", sends_empties(4096, 65536)),
        ("empty-odd", "tables of 65536, odd", sends_empties(4096, 65536, odd=4)),
        ("empty-regions", "tables of 16384, odd, in the last of 64 regions", sends_empties(1024, 16384, 4, 64)),
        ("receive-4096", "receive chains of 4096 empty descriptors", posts_empties(256, 4096)),
        ("receive-16384", "receive chains of 16384 empty descriptors", posts_empties(1024, 16384)),
        ("receive-65536", "receive chains of 65536, odd", posts_empties(4096, 65536, odd=4)),
    )
} | {
    "watchers": (f"{WATCHERS} watchers of a call eventfd", watched),
    "enables": (f"{MESSAGES} SET_VRING_ENABLE a second", told(enables)),
    "kicks": (f"{MESSAGES} SET_VRING_KICK a second", told(kicks)),
    "resets": (f"{MESSAGES} RESET_DEVICE a second", told(resets)),
    "tables": (f"{MESSAGES // 10} SET_MEM_TABLE a second", told(tables, MESSAGES // 10)),
}  # fmt: skip
ROWS = [
    Row(f"neighbour-{name}", title, UNITS, {"xdpnet": measure}, table="A neighbour beside", near=False)
    for name, (title, measure) in SCENES.items()
]


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.neighbours", description=__doc__.splitlines()[0])
    parser.add_argument("scenes", nargs="*", metavar="SCENE", default=["*"], help=f"of {', '.join(SCENES)}; patterns")
    parser.add_argument("--runs", type=int, default=1, help="of each (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.5, help="of each measurement (%(default)s)")
    options = parser.parse_args()
    process.raise_on_signals()
    print(f"| | {' | '.join(UNITS.values())} |\n|---|{'---:|' * len(UNITS)}")
    for name, (title, measure) in SCENES.items():
        if not any(fnmatch.fnmatch(name, pattern) for pattern in options.scenes):
            continue
        runs = []
        for _ in range(options.runs):
            with tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-") as directory:
                runs.append(measure(Lab(Path(directory), Path(directory), options.seconds)))
        said = [f"{statistics.median(run[metric] for run in runs):.3g}" for metric in UNITS]
        print(f"| {name}: {title} | {' | '.join(said)} |", flush=True)


if __name__ == "__main__":
    main()
