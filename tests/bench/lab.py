"""What every row is made of: a place to run in, contenders that serve guests, and a counter read twice.

Backends run on CPU 0, guests on CPU 1. Both contenders get the same client with the same command line, and both are
measured by the same witness: the client's counters, or the kernel's at the far end of the veth pair.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from tests.rig.dpdk import Pmd
from tests.rig.waiting import until
from xdpnet.demo import process, topology
from xdpnet.demo.backend import Backend

BACKEND_CPU, CLIENT_CPU = 0, 1
MAC, PEER_MAC = "52:54:00:00:00:01", "52:54:00:00:00:02"
WARM_UP_S = 1.0

Values = dict[str, float]  # metric -> number


@dataclass(frozen=True)
class Lab:
    """Where a run happens: a directory of its own, huge pages, seconds to measure."""

    directory: Path
    huge: Path
    seconds: float


@dataclass(frozen=True)
class Row:
    """Something to measure: metrics with their units, and contenders, each a function that runs once.

    Rows of the same metrics may have a table of their own, with this heading: a line each, a column for each metric.
    """

    name: str
    title: str
    units: Mapping[str, str]
    contenders: Mapping[str, Callable[[Lab], Values]]
    table: str = ""
    near: bool = True  # its numbers are those of two CPUs near each other; False: each run compares with itself


# ---- the two CPUs ----


class Cores:
    """Whether the backend's CPU and the client's share a cache.

    A host moves its guests' CPUs, and what two cores do together takes two to three times as long while theirs are on
    different parts of a processor.
    """

    NEAR_NS = 150.0  # to the other one and back; 55 to 90 within a cache, 330 to 360 without were seen
    PATIENCE_S = 30.0
    REPEATS = 4

    def __init__(self, directory: Path) -> None:
        self._program = directory / "distance"
        source = Path(__file__).with_name("distance.c")
        subprocess.run(["gcc", "-O2", "-pthread", "-o", str(self._program), str(source)], check=True)

    def are_near(self) -> bool:
        command = [str(self._program), str(BACKEND_CPU), str(CLIENT_CPU)]
        return float(subprocess.run(command, check=True, capture_output=True, timeout=60).stdout) < self.NEAR_NS

    def await_near(self) -> None:
        """Gives up after a while: on some machines they never are."""
        deadline = time.monotonic() + self.PATIENCE_S
        while not self.are_near() and time.monotonic() < deadline:
            time.sleep(0.5)

    def run(self, contend: Callable[[Lab], Values], lab: Lab) -> Values:
        """A run that had them near from its start to its end, if a few attempts bring one."""
        for _ in range(self.REPEATS):
            self.await_near()
            with tempfile.TemporaryDirectory(dir=lab.directory) as name:
                values = contend(Lab(Path(name), lab.huge, lab.seconds))
            if self.are_near():
                break
        return values


# ---- contenders ----


@dataclass(frozen=True)
class Served:
    """Sockets that a backend serves; work() is its busy cycles and its packets so far, if it counts them."""

    sockets: Sequence[Path]
    pid: int
    work: Callable[[], tuple[int, int]] | None = None


# Serves one socket per address, and the near end of the veth pair if the last argument says so, until the block ends.
Contender = Callable[[topology.Topology, Lab, Sequence[str], bool], AbstractContextManager[Served]]


@contextmanager
def xdpnet(
    net: topology.Topology,
    lab: Lab,
    macs: Sequence[str],
    netdev: bool,
    netdev_options: str = "",
    guest_options: str = "",
) -> Iterator[Served]:
    sockets = [lab.directory / f"guest{number}.socket" for number in range(len(macs))]
    arguments = ["--cpus", str(BACKEND_CPU)]
    for number, (path, mac) in enumerate(zip(sockets, macs, strict=True)):
        arguments += ["--guest", f"guest{number},socket={path},mac={mac}{guest_options}"]
    if netdev:
        arguments += ["--netdev", topology.HOST_IF + netdev_options]
    backend = Backend(net.host, lab.directory, arguments).start()

    def work() -> tuple[int, int]:
        (worker,) = backend.snapshot().workers
        return worker.busy_cycles, worker.packets

    try:
        yield Served(sockets, backend.pid, work)
    finally:
        backend.stop()


@contextmanager
def dpdk(net: topology.Topology, lab: Lab, macs: Sequence[str], netdev: bool) -> Iterator[Served]:
    sockets = [lab.directory / f"guest{number}.socket" for number in range(len(macs))]
    devices = [f"net_vhost{number},iface={path},queues=1" for number, path in enumerate(sockets)]
    if netdev:
        devices.append(f"net_af_xdp0,iface={topology.HOST_IF},start_queue=0,queue_count=1")
    with Pmd(
        "backend",
        lab.directory,
        devices,
        ["--auto-start", "--forward-mode=io", "--no-lsc-interrupt"],
        drivers=("net_vhost", "net_af_xdp"),
        cpu=BACKEND_CPU,
        huge=lab.huge,
        enter=net.host.command(),
    ) as backend:
        yield Served(sockets, backend.pid)


BACKENDS: dict[str, Contender] = {"xdpnet": xdpnet, "DPDK": dpdk}
# A guest whose source address is checked is copied in any case; so these are not, as DPDK's are not.
ZEROCOPY: dict[str, Contender] = {
    f"xdpnet zerocopy={mode}": partial(xdpnet, netdev_options=f",zerocopy={mode}", guest_options=",check_source=false")
    for mode in ("on", "off")
}
GENERIC: dict[str, Contender] = {"xdpnet mode=generic": partial(xdpnet, netdev_options=",mode=generic")}


# ---- the far end and the clock ----


@contextmanager
def reflector(net: topology.Topology, lab: Lab) -> Iterator[None]:
    """Sends back what reaches the far end. Without it the stack there drops it, which costs least: not its address."""
    program = net.far.spawn([sys.executable, "-m", "tests.bench.reflect", topology.FAR_IF], lab.directory / "far.log")
    try:
        until(lambda: '"xdp"' in net.far.run("ip", "-j", "link", "show", topology.FAR_IF))
        yield
    finally:
        process.end(program)


def rate(counter: Callable[[], int], lab: Lab, served: Served | None = None) -> Values:
    """Millions a second of what the counter counts; the backend's cycles per packet meanwhile, if it counts them."""
    time.sleep(WARM_UP_S)
    work = served.work if served else None
    worked = work() if work else (0, 0)
    first, started = counter(), time.monotonic()
    time.sleep(lab.seconds)
    last, ended = counter(), time.monotonic()
    if last == first:
        raise TimeoutError(f"no frame arrived in {lab.seconds} s")
    values = {"rate": (last - first) / (ended - started) / 1e6}
    if work:
        cycles, packets = (after - before for after, before in zip(work(), worked, strict=True))
        values["cycles"] = cycles / packets
    return values
