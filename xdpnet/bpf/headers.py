"""Kernel headers for bcc: where distributions put them, and the compiler flags that each layout needs.

A tree is usable if it has linux/kconfig.h and the generated autoconf.h. Debian splits the two over a -common and a
-ARCH package. The program uses uapi types only, so headers of another version than the running kernel's will do; the
running kernel's own are preferred. Reference: bcc's src/cc/frontends/clang/kbuild_helper.cc and loader.cc.
"""

import os
import re
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from xdpnet.errors import SetupError

# The kernel's names of architectures where they differ from uname's machine.
ARCHITECTURES = {
    "x86_64": "x86",
    "i686": "x86",
    "aarch64": "arm64",
    "armv7l": "arm",
    "ppc64le": "powerpc",
    "riscv64": "riscv",
    "s390x": "s390",
}

REMEDY = (
    "install kernel headers: apt install linux-headers-amd64 (Debian), linux-headers-generic (Ubuntu), "
    "dnf install kernel-devel (Fedora), zypper install kernel-default-devel (openSUSE), "
    "or modprobe kheaders where the kernel has it"
)


@dataclass(frozen=True)
class Headers:
    """A tree for BCC_KERNEL_SOURCE and the flags beside it; or the kheaders archive, to be unpacked first."""

    source: Path
    cflags: tuple[str, ...] = ()

    @property
    def packed(self) -> bool:
        return self.source.name.endswith(".tar.xz")

    def unpack(self, directory: Path) -> "Headers":
        """The tree of a kheaders archive, unpacked into a directory of the caller's."""
        with tarfile.open(self.source) as archive:
            archive.extractall(directory)  # noqa: S202  # the kernel's own
        return Headers(directory)


def find_headers(root: Path = Path("/"), release: str = "", machine: str = "") -> Headers:
    """The best headers under root; SetupError names the package to install if there are none."""
    uname = os.uname()
    release = release or uname.release
    machine = machine or uname.machine
    arch = ARCHITECTURES.get(machine, machine)
    for candidate in _candidates(root, release):
        if headers := _usable(candidate, arch):
            return headers
    raise SetupError(f"no kernel headers for bcc under {root}lib/modules, {root}usr/src and {root}sys/kernel", REMEDY)


def _candidates(root: Path, release: str) -> Iterator[Path]:
    """The running kernel's own first, then those of other versions, newest first."""
    source = root / "usr/src"
    yield root / "lib/modules" / release / "build"
    yield source / f"linux-headers-{release}"
    yield source / "kernels" / release
    yield root / "sys/kernel/kheaders.tar.xz"
    others = {path.resolve() for path in (root / "lib/modules").glob("*/build")}
    others.update(source.glob("linux-headers-*"), source.glob("kernels/*"))
    yield from sorted(others, key=_version, reverse=True)


def _version(path: Path) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", path.name)]


def _usable(path: Path, arch: str) -> Headers | None:
    if path.name.endswith(".tar.xz"):
        return Headers(path) if path.is_file() else None
    if not ((path / "include/generated/autoconf.h").is_file() and (path / "arch" / arch / "include").is_dir()):
        return None
    if (path / "include/linux/kconfig.h").is_file():
        return Headers(path)
    build = path.resolve()
    # Debian: linux-headers-6.1.0-9-amd64 beside linux-headers-6.1.0-9-common
    for common in sorted(build.parent.glob("linux-headers-*-common")):
        stem = common.name.removesuffix("common")
        if build.name.startswith(stem) and (common / "include/linux/kconfig.h").is_file():
            generated = (
                f"arch/{arch}/include/generated",
                f"arch/{arch}/include/generated/uapi",
                "include",
                "include/generated/uapi",
            )
            return Headers(common, tuple(f"-I{build / directory}" for directory in generated))
    return None
