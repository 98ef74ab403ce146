"""A QEMU and a Linux newer than Debian 12's; `deploy/bootstrap.sh test` unpacks them into build/ if it can get them."""

import subprocess
from pathlib import Path

from xdpnet.demo import initramfs
from xdpnet.demo.guest import Qemu
from xdpnet.errors import SetupError

ROOT = Path(__file__).parents[2] / "build" / "newer-guest"
LIBRARIES = ROOT / "usr/lib/x86_64-linux-gnu"
# A virtio device of any kind, with all features that the backend offers; QEMU 10.2 and later.
ANY_DEVICE = "vhost-user-test-device-pci"


def qemu() -> Qemu:
    """With the libraries that came with it, the C library among them."""
    command: tuple[str, ...] = ("env", f"QEMU_MODULE_DIR={LIBRARIES}/qemu", f"{LIBRARIES}/ld-linux-x86-64.so.2")
    command += ("--library-path", str(LIBRARIES), f"{ROOT}/usr/bin/qemu-system-x86_64")
    command += ("-L", f"{ROOT}/usr/share/qemu", "-L", f"{ROOT}/usr/share/seabios")
    return Qemu(command, msix_under_tcg=True, reconnect="reconnect-ms=1000")


def kernel() -> initramfs.Kernel:
    return initramfs.find_kernel(ROOT)


def missing() -> str | None:
    """What keeps it from running here."""
    if not (ROOT / ".complete").exists():
        return "no newer guest: deploy/bootstrap.sh test unpacks it, if Debian's archive has it and can be reached"
    try:
        subprocess.run([*qemu().command, "-device", f"{ANY_DEVICE},help"], check=True, capture_output=True, timeout=30)
        kernel()
    except (OSError, subprocess.SubprocessError, SetupError) as error:
        return f"no newer guest: {error}"
    return None
