"""`xdpnet demo`: a real Linux guest reaches a network through xdpnet, on one machine and with nothing left behind.

Two network namespaces (topology), the daemon (backend), a guest in QEMU (guest, initramfs); pings, TCP both ways, the
table of counters and whether they add up. Every process dies with us, and the interfaces with the processes.
"""

import json
import os
import re
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from rich.console import Console

from xdpnet.demo import initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.errors import SetupError, XdpnetError
from xdpnet.metrics.table import render

GUEST_MAC = "52:54:00:78:64:01"
GUEST_ADDRESS = topology.GUEST_ADDRESSES[0]
PINGS = 5
IDLE_SECONDS = 5.0
PIPE_COLUMNS = 132


class DemoError(XdpnetError):
    """Something was not as it should be."""


def run(seconds: int = 3) -> int:
    """The whole demonstration, with TCP for `seconds` each way; the exit status."""
    if os.geteuid() != 0:
        raise SetupError("the demo makes network namespaces and AF_XDP sockets", "run it as root")
    process.raise_on_signals()
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=PIPE_COLUMNS)
    with ExitStack() as stack:
        Demo(console, seconds).play(stack)
    return 0


class Demo:
    def __init__(self, console: Console, seconds: int) -> None:
        self._console = console
        self._seconds = seconds

    @contextmanager
    def _step(self, title: str) -> Iterator[list[str]]:
        """Say what is going on, then how it went; the block appends to what is said."""
        started = time.monotonic()
        result: list[str] = []
        with self._console.status(f"{title} ..."):
            yield result
        took = f"{time.monotonic() - started:.1f} s"
        self._console.print(f"[green]ok[/] {title}: {', '.join(result)} [dim]({took})[/]", soft_wrap=True)

    def play(self, stack: ExitStack) -> None:
        directory = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="xdpn-")))
        socket = directory / "demo.socket"
        with self._step("guest image") as result:
            kernel = initramfs.find_kernel()
            initrd = initramfs.build(kernel, directory / "initramfs")
            result.append(f"Linux {kernel.release} and an initramfs of {initrd.stat().st_size >> 20} MiB")
        with self._step("accelerator") as result:
            accel = best_accelerator(kernel, initrd, directory)
            result.append("KVM" if accel == "kvm" else "none that works, so QEMU emulates (TCG)")
        with self._step("network") as result:
            net = stack.enter_context(topology.topology())
            result.append(f"two namespaces, {topology.HOST_IF} joined to {topology.FAR_IF} {topology.FAR_ADDRESS}")
        with self._step("daemon") as result:
            guest_option = f"demo,socket={socket},mac={GUEST_MAC}"
            arguments = ["--netdev", topology.HOST_IF, "--guest", guest_option]
            backend = Backend(net.host, directory, arguments).start()
            stack.callback(backend.stop)
            netdev = backend.port(topology.HOST_IF).netdev
            result += [f"process {backend.pid}", f"XDP {netdev.mode if netdev else '?'}", f"socket {socket}"]
        with self._step("guest") as result:
            guest = Guest(directory, kernel, initrd, [Card(socket, GUEST_MAC)], accel=accel)
            stack.enter_context(closing(guest.start()))
            guest.configure(GUEST_ADDRESS, topology.PREFIX)
            backend.await_guest("demo")
            result.append(f"Linux {guest.release} is up as {GUEST_ADDRESS}")
        with self._step("ping from the guest") as result:
            result.append(lossless(guest.check(f"ping -c {PINGS} {topology.FAR_ADDRESS}")))
        with self._step("ping to the guest") as result:
            result.append(lossless(net.ping(GUEST_ADDRESS, PINGS)))
        for title, reverse in (("TCP from the guest", False), ("TCP to the guest", True)):
            with self._step(title) as result:
                result.append(f"{iperf(guest, net, directory, self._seconds, reverse) / 1e6:.0f} Mb/s")
        with self._step("idle daemon") as result:
            result += idle(backend.pid, IDLE_SECONDS)
        with self._step("counts") as result:
            snapshot = backend.settled()
            totals = snapshot.totals
            result.append(
                f"{totals.frames_in} frames in + {totals.copies} copies + {totals.segments} segments = "
                f"{totals.frames_out} out + {totals.joined} joined + {totals.drops} dropped"
            )
            if not balanced(snapshot):
                raise DemoError(f"the counts do not add up: {result[0]}")
        self._console.print(render(snapshot))
        with self._step("end") as result:
            guest.close()
            status = backend.stop()
            result.append(f"the daemon's exit status is {status}")
            if status != 0:
                raise DemoError(f"the daemon ended with status {status}: {process.tail(backend.log)}")


def lossless(said: str) -> str:
    """What ping says of loss and time; an error if anything was lost."""
    loss = re.search(r"[^,\n]*\b0% packet loss", said)
    if loss is None:
        raise DemoError(f"packets were lost: {said.strip()}")
    times = re.search(r"(?:round-trip|rtt) (.*)", said)
    return loss.group().strip() + (f", {times.group(1)}" if times else "")


def iperf(
    guest: Guest, net: topology.Topology, directory: Path, seconds: int, reverse: bool, streams: int = 1
) -> float:
    """TCP between the guest and the far end; bits per second at the receiver."""
    server = net.far.spawn(["iperf3", "-s", "-1", "-B", topology.FAR_ADDRESS], directory / "iperf3.log")
    try:
        await_listener(net.far, 5201)
        flags = f"-t {seconds} -P {streams}" + (" -R" if reverse else "")
        return float(iperf_client(guest, topology.FAR_ADDRESS, flags, seconds)["sum_received"]["bits_per_second"])
    finally:
        process.end(server)


def iperf_client(guest: Guest, server: str, flags: str, seconds: int) -> dict[str, Any]:
    """iperf3's own report of a run, what it says of the end."""
    status, said = guest.run(f"iperf3 -c {server} {flags} -J", timeout=seconds + 60)
    try:
        report = json.loads(said)
    except ValueError as error:
        raise DemoError(f"iperf3 did not report: {said}") from error
    if status != 0 or "error" in report:
        raise DemoError(f"iperf3: status {status}: {report.get('error', said)}")
    end: dict[str, Any] = report["end"]
    return end


def await_listener(where: topology.Namespace, port: int, patience: float = 20.0) -> None:
    """Until something in the namespace listens on this TCP port."""
    deadline = time.monotonic() + patience
    while not where.run("ss", "-Hltn", f"sport = :{port}").strip():
        if time.monotonic() > deadline:
            raise DemoError(f"nothing listens on port {port}")
        time.sleep(0.02)


def idle(pid: int, seconds: float) -> list[str]:
    """How much of a core and of memory a process takes while nothing happens."""
    before = process.cpu_seconds(pid)
    time.sleep(seconds)
    share = (process.cpu_seconds(pid) - before) / seconds
    return [f"{share:.2%} of a core over {seconds:.0f} s", f"{process.resident_bytes(pid) >> 20} MiB resident"]
