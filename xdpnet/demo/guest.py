"""A Linux guest in QEMU whose network card is served over vhost-user, with a shell inside reachable from here.

Two serial ports: the first is the console, logged to a file; the second is a UNIX socket on which the guest's /init
(see initramfs) reads "<id> <base64 script>" and answers "begin <id>", base64 lines, "end <id> <status>".
"""

import base64
import contextlib
import os
import select
import shlex
import socket
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path

from xdpnet.demo import initramfs, process
from xdpnet.errors import XdpnetError

BOOT_PATIENCE = 90.0  # under emulation, on a machine that does other things
KVM_PATIENCE = 15.0


class GuestError(XdpnetError):
    """The guest did not boot, died, or did not answer."""


@dataclass(frozen=True)
class Card:
    """A virtio-net card and the vhost-user socket behind it."""

    socket: Path
    mac: str
    queues: int = 1
    server: bool = False  # QEMU listens and the backend connects
    level_interrupts: bool = False  # no MSI-X
    packed: bool = False  # packed rings, if the backend has them too
    mtu: int = 0  # what the guest is told; 0: it chooses
    options: str = ""  # others of QEMU's, such as "csum=off"


@dataclass(frozen=True)
class Qemu:
    """The program, with the options that it always needs; Debian 12's by default."""

    command: tuple[str, ...] = ("qemu-system-x86_64",)
    msix_under_tcg: bool = False  # QEMU 7.2 needs KVM's irqfds for MSI-X with vhost-user
    reconnect: str = "reconnect=1"  # QEMU 11 has reconnect-ms alone


@dataclass
class Guest:
    """One guest; start() boots it, close() ends it."""

    directory: Path
    kernel: initramfs.Kernel
    initrd: Path
    cards: Sequence[Card]
    accel: str = "tcg"
    memory_mib: int = 256
    cpus: int = 1
    name: str = "xdpn-guest"
    qemu: Qemu = Qemu()
    prealloc: bool = False  # all of its memory at once, as zero copy wants it
    options: Sequence[str] = ()  # more of QEMU's
    incoming: str = ""  # it does not boot, but is moved here from another QEMU: where that connects to, as QEMU has it
    release: str = field(default="", init=False)
    _next_id: int = field(default=0, init=False)
    _received: bytes = field(default=b"", init=False)

    @property
    def console(self) -> Path:
        return self.directory / f"{self.name}.console"

    @property
    def log(self) -> Path:
        return self.directory / f"{self.name}.log"

    def command(self) -> list[str]:
        memory = f"{self.memory_mib}M"
        command = [*self.qemu.command, "-name", self.name, "-nodefaults", "-display", "none"]
        command += ["-M", f"q35,accel={self.accel}", "-cpu", "host" if self.accel == "kvm" else "max"]
        command += ["-smp", str(self.cpus), "-m", memory, "-numa", "node,memdev=memory"]
        prealloc = ",prealloc=on" if self.prealloc else ""
        command += ["-object", f"memory-backend-memfd,id=memory,size={memory},share=on{prealloc}"]
        command += ["-kernel", str(self.kernel.image), "-initrd", str(self.initrd)]
        command += ["-append", "console=ttyS0 panic=-1 quiet"]
        command += ["-serial", f"file:{self.console}", "-serial", f"unix:{self._shell_path}"]
        for number, card in enumerate(self.cards):
            server = ",server=on" if card.server else f",{self.qemu.reconnect}"
            command += ["-chardev", f"socket,id=backend{number},path={card.socket}{server}"]
            command += ["-netdev", f"vhost-user,id=net{number},chardev=backend{number},queues={card.queues}"]
            device = f"virtio-net-pci,netdev=net{number},mac={card.mac},romfile="
            if card.queues > 1:
                device += ",mq=on"
            if card.mtu:
                device += f",host_mtu={card.mtu}"
            if card.packed:
                device += ",packed=on"
            if card.options:
                device += f",{card.options}"
            if card.level_interrupts or (self.accel == "tcg" and not self.qemu.msix_under_tcg):
                device += ",vectors=0"
            command += ["-device", device]
        if self.incoming:
            command += ["-incoming", self.incoming]
        return [*command, *self.options]

    @property
    def _shell_path(self) -> Path:
        return self.directory / f"{self.name}.shell"

    def start(self, patience: float = BOOT_PATIENCE) -> "Guest":
        with ExitStack() as failed:
            with socket.socket(socket.AF_UNIX) as listener:
                self._shell_path.unlink(missing_ok=True)
                listener.bind(str(self._shell_path))
                listener.listen(1)
                self._process = process.spawn(self.command(), self.log)
                failed.callback(process.end, self._process)
                deadline = time.monotonic() + patience
                self._shell = self._accept(listener, min(deadline, time.monotonic() + 30))
            failed.callback(self._shell.close)
            if not self.incoming:
                self._await_ready(deadline)
            failed.pop_all()
        return self

    def _accept(self, listener: socket.socket, deadline: float) -> socket.socket:
        listener.settimeout(0.1)
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(TimeoutError):
                return listener.accept()[0]
        raise GuestError(f"{self.name}: QEMU did not start: {process.tail(self.log)}")

    def _await_ready(self, deadline: float) -> None:
        for line in self._lines(deadline):
            # The port starts in the firmware's hands: other bytes may stand in front.
            if (found := line.find("ready ")) >= 0:
                self.release = line[found:].split()[1]
                return

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def run(self, script: str, timeout: float = 60.0) -> tuple[int, str]:
        """Run a shell script in the guest; its exit status and output."""
        self._next_id += 1
        mark = str(self._next_id)
        self._shell.sendall(f"{mark} {base64.b64encode(script.encode()).decode()}\n".encode())
        encoded: list[str] | None = None
        for line in self._lines(time.monotonic() + timeout, script):
            words = line.split()
            if words == ["begin", mark]:
                encoded = []
            elif encoded is not None and words[:2] == ["end", mark]:
                return int(words[2]), base64.b64decode("".join(encoded)).decode(errors="replace")
            elif encoded is not None:
                encoded.append(line.strip())
        raise AssertionError("unreachable: _lines ends by raising")

    def check(self, script: str, timeout: float = 60.0) -> str:
        """Run a shell script that has to succeed; its output."""
        status, output = self.run(script, timeout)
        if status != 0:
            raise GuestError(f"{self.name}: {script!r}: status {status}: {output.strip()}")
        return output

    def reboot(self, patience: float = BOOT_PATIENCE) -> None:
        """Reset the guest from inside and wait until it is back."""
        script = base64.b64encode(b"reboot -f").decode()
        self._shell.sendall(f"0 {script}\n".encode())
        self._await_ready(time.monotonic() + patience)

    def configure(self, address: str, prefix: int, interface: str = "eth0") -> None:
        where = shlex.quote(interface)
        self.check(f"ip link set {where} up && ip address add {address}/{prefix} dev {where}")

    def _lines(self, deadline: float, doing: str = "boot") -> Iterator[str]:
        """Lines from the guest's shell until the caller has seen enough; raises when the guest is late or gone."""
        while True:
            line, newline, rest = self._received.partition(b"\n")
            if newline:
                self._received = rest
                yield line.decode(errors="replace")
                continue
            readable, _, _ = select.select([self._shell], [], [], max(0.0, deadline - time.monotonic()))
            chunk = self._shell.recv(65536) if readable else b""
            if not chunk:
                what = "no answer in time" if not readable else f"QEMU ended with status {self._process.wait(5)}"
                seen = "\n".join(filter(None, (process.tail(self.log), process.tail(self.console))))
                raise GuestError(f"{self.name}: {doing!r}: {what}\n{seen}".rstrip())
            self._received += chunk

    def close(self) -> None:
        process.end(self._process)
        self._shell.close()
        self._shell_path.unlink(missing_ok=True)


def best_accelerator(kernel: initramfs.Kernel, initrd: Path, directory: Path, patience: float = KVM_PATIENCE) -> str:
    """KVM if a guest boots with it, else emulation: /dev/kvm may be there and yet not run a whole kernel."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "tcg"
    probe = Guest(directory, kernel, initrd, cards=(), accel="kvm", memory_mib=256, name="xdpn-probe")
    try:
        probe.start(patience)
    except GuestError:
        return "tcg"
    probe.close()
    return "kvm"
