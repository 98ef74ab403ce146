"""Many guests on one worker, and what one more costs. Idle ones are scripted frontends with started, empty rings."""

import socket
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from tests.bench.lab import BACKENDS, MAC, Contender, Lab, Row, Served, Values, xdpnet
from tests.bench.throughput import UNITS, guest_to_guest
from tests.rig.frontend import Frontend, RingMemory
from xdpnet.demo import process, topology

IDLE = (0, 1, 4, 16, 64)
MANY = 64
KIB = 1 << 10
SETTLE_S = 0.5


def idle_mac(number: int) -> str:
    return f"52:54:00:00:01:{number:02x}"


@contextmanager
def connected(path: Path) -> Iterator[None]:
    """An idle guest, for as long as the block runs."""
    with RingMemory() as memory, Frontend.connect(str(path)) as frontend:
        frontend.negotiate()
        if frontend.set_memory(memory):
            raise ValueError(f"{path}: the memory table was refused")
        for ring in range(2):
            frontend.start_ring(ring, memory)
        yield


@contextmanager
def crowded(net: topology.Topology, lab: Lab, macs: Sequence[str], netdev: bool, idle: int = 0) -> Iterator[Served]:
    """xdpnet with so many idle guests more."""
    with ExitStack() as stack:
        everyone = [*macs, *(idle_mac(number) for number in range(idle))]
        served = stack.enter_context(xdpnet(net, lab, everyone, netdev))
        for path in served.sockets[len(macs) :]:
            stack.enter_context(connected(path))
        yield Served(served.sockets[: len(macs)], served.pid, served.work)


def beside(idle: int) -> Callable[[Lab], Values]:
    @contextmanager
    def contender(net: topology.Topology, lab: Lab, macs: Sequence[str], netdev: bool) -> Iterator[Served]:
        with crowded(net, lab, macs, netdev, idle) as served:
            yield served

    return guest_to_guest(contender, 64)


def memory_per_guest(lab: Lab) -> Values:
    """Resident memory of the daemon with many guests, less that with one, for each."""

    def resident(guests: int) -> int:
        directory = lab.directory / str(guests)
        directory.mkdir()
        with (
            topology.topology() as net,
            crowded(net, Lab(directory, lab.huge, lab.seconds), [], False, guests) as served,
        ):
            time.sleep(SETTLE_S)
            return process.resident_bytes(served.pid, but="/memfd:guest")

    return {"memory": (resident(1 + MANY) - resident(1)) / MANY / KIB}


def start(contender: Contender) -> Callable[[Lab], Values]:
    """From the command to an interface and a guest's socket that takes a connection."""

    def measure(lab: Lab) -> Values:
        with topology.topology() as net:
            started = time.monotonic()
            with contender(net, lab, [MAC], True) as served:
                with socket.socket(socket.AF_UNIX) as probe:
                    probe.connect(str(served.sockets[0]))
                return {"time": time.monotonic() - started}

    return measure


ROWS = [
    *(
        Row(
            f"beside-{idle}-idle",
            f"guest to guest each way, 64 B, beside {idle} idle guests",
            UNITS,
            {"xdpnet": beside(idle)},
        )
        for idle in IDLE
    ),
    Row(
        "memory-per-guest",
        f"daemon's memory for each of {MANY} guests",
        {"memory": "KiB"},
        {"xdpnet": memory_per_guest},
    ),
    Row("start", "start to a served socket", {"time": "s"}, {name: start(one) for name, one in BACKENDS.items()}),
]
