"""User-mode Linux, a kernel that is a process: mainline's own vhost-user frontend (arch/um/drivers/virtio_uml.c).

Debian 12's needs two things: PTRACE_GETREGSET refused, see native/without_getregset.c, and programs that keep off the
wider registers, which it does not switch. Its memory is a file in TMPDIR, which has to be on tmpfs.
"""

import platform
import socket
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

from tests.native import compile_program
from xdpnet.demo import initramfs, process
from xdpnet.demo.guest import BOOT_PATIENCE, Guest
from xdpnet.errors import SetupError

MODULES = ("failover", "net_failover", "virtio_net")
TUNABLES = "GLIBC_TUNABLES=glibc.cpu.hwcaps=-AVX,-AVX2,-AVX512F,-AVX512VL,-XSAVE,-XSAVEC"
VIRTIO_NET = 1


def kernel() -> initramfs.Kernel:
    """Debian's."""
    for modules in sorted(Path("/usr/lib/uml/modules").glob("*")):
        return initramfs.Kernel(Path(initramfs.program("linux.uml")), modules)
    raise SetupError("no user-mode Linux: it is Debian's user-mode-linux", initramfs.INSTALL)


def missing() -> str | None:
    """What keeps it from running here."""
    try:
        kernel()
    except SetupError as error:
        return str(error)
    return None if platform.machine() == "x86_64" else "user-mode Linux is for x86"


def build(directory: Path) -> Path:
    return initramfs.build(kernel(), directory / "uml-initramfs", modules=MODULES)


@dataclass
class UserModeGuest(Guest):
    """Its first card alone is there, and of that the socket: the frontend knows no address, the guest draws one."""

    def command(self) -> list[str]:
        wrapper = str(compile_program("without_getregset", self.directory))
        command = ["env", "TMPDIR=/dev/shm", TUNABLES, wrapper, str(self.kernel.image), f"mem={self.memory_mib}M"]
        command += [f"initrd={self.initrd}", f"virtio_uml.device={self.cards[0].socket}:{VIRTIO_NET}", TUNABLES]
        command += [f"uml_dir={self.directory}/", f"umid={self.name}", "con=null", "con0=null,fd:1", "ssl=null"]
        return [*command, *self.options]

    def start(self, patience: float = BOOT_PATIENCE) -> "UserModeGuest":
        with ExitStack() as failed:
            self._shell, theirs = socket.socketpair()
            failed.callback(self._shell.close)
            with theirs:
                line = f"ssl1=fd:{theirs.fileno()}"
                self._process = process.spawn([*self.command(), line], self.log, [theirs.fileno()])
            failed.callback(process.end, self._process)
            self._await_ready(time.monotonic() + patience)
            failed.pop_all()
        return self
