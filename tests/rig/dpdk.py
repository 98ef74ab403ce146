"""DPDK's testpmd as a peer: a virtio-user port is a vhost-user frontend that nobody here wrote.

With huge pages it is fast, as the benchmark wants it; without, its memory is one memfd and needs no preparation. Its
runtime files go to a directory of ours.
"""

import fcntl
import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.rig.waiting import PATIENCE_S
from xdpnet.demo import process

TESTPMD = "dpdk-testpmd"
HUGE_PAGE_BYTES = 2 << 20
SEGMENT = 1800  # of a frame, at most, in one of its buffers
NR_HUGE_PAGES = Path("/proc/sys/vm/nr_hugepages")


def missing() -> str | None:
    """Why testpmd cannot run here, or None."""
    if shutil.which(TESTPMD) is None:
        return f"{TESTPMD}: not found (Debian's dpdk-dev)"
    return None


def frames(length: int) -> list[str]:
    """Options that make testpmd send frames of this length, long ones in several buffers, and take them so."""
    segments = -(-length // SEGMENT)
    sizes = [length // segments + (number < length % segments) for number in range(segments)]
    long = ["--enable-scatter", f"--max-pkt-len={length + 18}"] if segments > 1 else []
    return [f"--txpkts={','.join(map(str, sizes))}", *long]


@contextmanager
def huge_pages(mib: int, directory: Path) -> Iterator[Path]:
    """A hugetlbfs mount of our own with `mib` MiB behind it; afterwards the pool is as it was.

    One at a time on the machine: tests that run side by side count the pool's pages.
    """
    with NR_HUGE_PAGES.open() as pool:
        fcntl.flock(pool, fcntl.LOCK_EX)
        yield from _huge_pages(mib, directory)


def _huge_pages(mib: int, directory: Path) -> Iterator[Path]:
    before = int(NR_HUGE_PAGES.read_text())
    free = int(re.findall(r"HugePages_Free:\s+(\d+)", Path("/proc/meminfo").read_text())[0])
    wanted = mib * (1 << 20) // HUGE_PAGE_BYTES
    mount = directory / "xdpn-huge"
    mount.mkdir()
    if wanted > free:
        NR_HUGE_PAGES.write_text(str(before + wanted - free))
    try:
        subprocess.run(["mount", "-t", "hugetlbfs", "none", str(mount)], check=True)
        try:
            yield mount
        finally:
            subprocess.run(["umount", str(mount)], check=True)
    finally:
        NR_HUGE_PAGES.write_text(str(before))
        mount.rmdir()


@dataclass(frozen=True)
class PortStats:
    rx_packets: int
    rx_bytes: int
    tx_packets: int
    tx_bytes: int


class Pmd:
    """A testpmd process at its prompt; use it as a context manager."""

    def __init__(
        self,
        name: str,
        directory: Path,
        vdevs: Sequence[str],
        options: Sequence[str] = (),
        drivers: Sequence[str] = ("net_virtio",),
        cpu: int = 1,
        huge: Path | None = None,
        enter: Sequence[str] = (),
        eal: Sequence[str] = (),
    ) -> None:
        self.name = f"xdpn-{name}"
        self.log = directory / f"{self.name}.log"
        memory = ["--huge-dir", str(huge), "--single-file-segments"] if huge else ["--no-huge"]
        shared = ["--lcores", f"0@{cpu},1@{cpu}", "-m", "256", "--file-prefix", self.name, "--no-pci", "--no-telemetry"]
        for driver in (*drivers, "mempool_ring"):
            shared += ["-d", f"librte_{driver}.so"]
        for vdev in vdevs:
            shared += ["--vdev", vdev]
        application = ["-i", "--total-num-mbufs=16384", *options]
        # By lines: its prompt goes around stdio's buffer and would overtake what was said before.
        self._command = [*enter, "stdbuf", "-oL", TESTPMD, *shared, *eal, *memory, "--", *application]
        self._environment = os.environ | {"RUNTIME_DIRECTORY": str(directory)}
        self._read = 0

    def __enter__(self) -> "Pmd":
        with self.log.open("wb") as output:
            self._process = subprocess.Popen(
                process.tethered(self._command),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=subprocess.STDOUT,
                env=self._environment,
            )
        try:
            self._until("testpmd> ", PATIENCE_S)
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_exception: object) -> None:
        self.close()

    @property
    def pid(self) -> int:
        return self._process.pid

    def command(self, line: str, timeout: float = PATIENCE_S) -> str:
        """Type a line; what testpmd says until its next prompt."""
        assert self._process.stdin is not None
        self._process.stdin.write(line.encode() + b"\n")
        self._process.stdin.flush()
        return self._until("testpmd> ", timeout)

    def stats(self, port: int = 0) -> PortStats:
        said = self.command(f"show port stats {port}")
        numbers = {key: int(value) for key, value in re.findall(r"([RT]X-(?:packets|bytes)):\s+(\d+)", said)}
        return PortStats(numbers["RX-packets"], numbers["RX-bytes"], numbers["TX-packets"], numbers["TX-bytes"])

    def await_link(self, port: int = 0, timeout: float = PATIENCE_S) -> None:
        deadline = time.monotonic() + timeout
        while "Link status: up" not in (said := self.command(f"show port info {port}")):
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: port {port} has no link\n{said}")
            time.sleep(0.1)

    def _until(self, mark: str, timeout: float) -> str:
        deadline = time.monotonic() + timeout
        while True:
            said = self.log.read_bytes()[self._read :].decode(errors="replace")
            if (found := said.find(mark)) >= 0:
                self._read += len(said[: found + len(mark)].encode())
                return said[:found]
            if self._process.poll() is not None:
                raise ChildProcessError(f"{self.name} ended with status {self._process.returncode}\n{said[-2000:]}")
            if time.monotonic() > deadline:
                raise TimeoutError(f"{self.name}: no {mark!r} within {timeout} s\n{said[-2000:]}")
            time.sleep(0.02)

    def close(self) -> None:
        if self._process.poll() is None and self._process.stdin is not None:
            try:
                self._process.stdin.write(b"quit\n")
                self._process.stdin.close()
                self._process.wait(10)
            except (BrokenPipeError, subprocess.TimeoutExpired):
                process.end(self._process, patience=2)
        elif self._process.stdin is not None:
            self._process.stdin.close()
