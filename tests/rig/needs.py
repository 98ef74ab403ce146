"""What a test needs of the machine; without it the test is skipped, and the skip says what is missing."""

import os
import shutil

import pytest

from tests.rig import dpdk, newer
from tests.rig import uml as user_mode
from xdpnet.demo import initramfs
from xdpnet.errors import SetupError
from xdpnet.netdev.link import kernel_version


def _missing_guest() -> str | None:
    try:
        initramfs.program("qemu-system-x86_64")
        initramfs.program("busybox")
        initramfs.find_kernel()
    except SetupError as error:
        return str(error)
    return None


def _skip(reason: str | None) -> pytest.MarkDecorator:
    return pytest.mark.skipif(reason is not None, reason=reason or "")


def _missing_tx_metadata() -> str | None:
    old = kernel_version() < (6, 11)
    return f"Linux {os.uname().release}: AF_XDP has metadata of sent frames from 6.11 on" if old else None


root = _skip(None if os.geteuid() == 0 else "needs root")
fuse = _skip(None if os.geteuid() == 0 and os.path.exists("/dev/fuse") else "needs root and /dev/fuse")
guest = _skip(_missing_guest())
newer_guest = _skip(_missing_guest() or newer.missing())
testpmd = _skip(dpdk.missing())
uml = _skip(user_mode.missing())
tx_metadata = _skip(_missing_tx_metadata())


def program(name: str, package: str) -> pytest.MarkDecorator:
    return _skip(None if shutil.which(name) else f"{name}: not found (Debian's {package})")
