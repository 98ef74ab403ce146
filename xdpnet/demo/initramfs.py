"""The guest's kernel and initramfs: Debian's cloud kernel, static busybox, a few programs with their libraries.

The archive is cpio's "newc" format (Linux, Documentation/driver-api/early-userspace/buffer-format.rst), written here so
that no tool is needed. Its /init loads the virtio drivers and then serves commands on the second serial port: see qemu.
"""

import gzip
import io
import lzma
import re
import shutil
import stat
import subprocess
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from xdpnet.errors import SetupError

INSTALL = "deploy/bootstrap.sh demo installs it"
KERNEL_PATTERN = "vmlinuz-*-cloud-amd64"
# In the order in which they are loaded.
MODULES = (
    "virtio_ring",
    "virtio",
    "virtio_pci_modern_dev",
    "virtio_pci_legacy_dev",
    "virtio_pci",
    "failover",
    "net_failover",
    "virtio_net",
)
PROGRAMS = ("ethtool", "iperf3")

# A command arrives as "<id> <base64 of a shell script>" on one line; its output leaves as base64 between two marks.
INIT = """#!/bin/busybox sh
/bin/busybox mkdir -p /proc /sys /dev /tmp /run /root /usr/bin /usr/sbin /sbin
/bin/busybox --install -s
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
mkdir -p /dev/pts /dev/shm
mount -t tmpfs tmpfs /tmp
echo 1 >/proc/sys/net/ipv6/conf/default/disable_ipv6
for module in MODULES; do insmod /modules/$module.ko; done
ifconfig lo up
stty -F /dev/ttyS1 raw -echo
exec 3<>/dev/ttyS1
echo "ready $(uname -r)" >&3
# In a process of its own: the end of any orphan is a signal to the first one, and would cut short what it reads.
(while read -r id script <&3; do
    echo "$script" | base64 -d >/tmp/.script
    sh /tmp/.script >/tmp/.output 2>&1 </dev/null 3>&-
    status=$?
    { echo "begin $id"; base64 </tmp/.output; echo "end $id $status"; } >&3
done)
exit
"""


@dataclass(frozen=True)
class Kernel:
    image: Path
    modules: Path

    @property
    def release(self) -> str:
        return self.image.name.removeprefix("vmlinuz-")


def find_kernel(*roots: Path) -> Kernel:
    """The newest cloud kernel below `roots`; by default one that is installed or that bootstrap.sh has unpacked."""
    unpacked = Path(__file__).parents[2] / "build" / "guest-kernel"
    kernels = [
        Kernel(image, modules)
        for root in roots or (Path("/"), unpacked)
        for image in (root / "boot").glob(KERNEL_PATTERN)
        for lib in ("lib", "usr/lib")  # the latter since Debian 13
        if (modules := root / lib / "modules" / image.name.removeprefix("vmlinuz-")).is_dir()
    ]
    if not kernels:
        raise SetupError("no guest kernel: no linux-image-*-cloud-amd64 in /boot", INSTALL)
    return max(kernels, key=lambda kernel: [int(number) for number in re.findall(r"\d+", kernel.release)])


def build(kernel: Kernel, target: Path, programs: Iterable[str] = PROGRAMS, modules: Iterable[str] = MODULES) -> Path:
    """Write the initramfs for `kernel` to `target`, with these programs, by name or by path, in /usr/bin, and with what
    of these modules is not built in."""
    modules = [name for name in modules if not is_built_in(kernel, name)]
    archive = Archive()
    archive.device("dev/console", 5, 1)
    archive.file("init", INIT.replace("MODULES", " ".join(modules)).encode(), 0o755)
    archive.file("bin/busybox", Path(program("busybox")).read_bytes(), 0o755)
    paths = [program(name) for name in programs]
    for path in paths:
        archive.file(f"usr/bin/{Path(path).name}", Path(path).read_bytes(), 0o755)
    for library in sorted({library for path in paths for library in libraries(path)}):
        archive.file(library.lstrip("/"), Path(library).read_bytes(), 0o755)
    for name in modules:
        archive.file(f"modules/{name}.ko", module(kernel, name))
    target.write_bytes(gzip.compress(archive.finish(), compresslevel=1))
    return target


def program(name: str) -> str:
    path = shutil.which(name, path="/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin")
    if path is None:
        raise SetupError(f"{name}: not found", INSTALL)
    return path


def libraries(path: str) -> Iterable[str]:
    """What the program's dynamic loader would map."""
    listing = subprocess.run(["ldd", path], check=True, capture_output=True, text=True).stdout
    return re.findall(r"(/\S+) \(0x", listing)


def is_built_in(kernel: Kernel, name: str) -> bool:
    return any(Path(line).stem == name for line in (kernel.modules / "modules.builtin").read_text().splitlines())


def module(kernel: Kernel, name: str) -> bytes:
    for path in kernel.modules.rglob(f"{name}.ko*"):
        content = path.read_bytes()
        return lzma.decompress(content) if path.suffix == ".xz" else content
    raise SetupError(f"guest kernel {kernel.release}: no module {name}", "use Debian's linux-image-cloud-amd64")


class Archive:
    """A cpio archive in the newc format."""

    def __init__(self) -> None:
        self._bytes = io.BytesIO()
        self._inode = 0
        self._directories: set[str] = set()

    def file(self, name: str, content: bytes, mode: int = 0o644) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFREG | mode, content)

    def device(self, name: str, major: int, minor: int) -> None:
        self._parents(name)
        self._entry(name, stat.S_IFCHR | 0o600, b"", (major, minor))

    def finish(self) -> bytes:
        self._entry("TRAILER!!!", 0, b"")
        return self._bytes.getvalue()

    def _parents(self, name: str) -> None:
        for parent in reversed(Path(name).parents[:-1]):
            if str(parent) not in self._directories:
                self._directories.add(str(parent))
                self._entry(str(parent), stat.S_IFDIR | 0o755, b"")

    def _entry(self, name: str, mode: int, content: bytes, device: tuple[int, int] = (0, 0)) -> None:
        self._inode += 1
        # ino mode uid gid nlink mtime filesize devmajor devminor rdevmajor rdevminor namesize check
        fields = (self._inode, mode, 0, 0, 1, 0, len(content), 0, 0, *device, len(name) + 1, 0)
        self._padded(b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0")
        self._padded(content)

    def _padded(self, content: bytes) -> None:
        self._bytes.write(content + b"\0" * (-len(content) % 4))
