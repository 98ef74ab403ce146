"""The parts of the core that join and cut frames, called directly: bursts of a test's choice, without workers."""

import ctypes
import os
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cffi import FFI

from tests.native import SOURCES

CORE = SOURCES.parent.parent / "c"
PARTS = ("csum", "gro", "gso", "packet", "partial", "tunnel", "vnet")
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
MOST_OUT, BYTES_OUT, BURST = 8192, 1 << 20, 64

CDEF = f"""
struct out {{ uint32_t n; uint32_t lengths[{MOST_OUT}]; uint8_t headers[{MOST_OUT}][12];
              uint32_t used; uint8_t bytes[{BYTES_OUT}]; }};
uint32_t offload_join(const uint8_t *frames, const uint32_t *lengths, uint32_t n, uint32_t piece, uint8_t takes,
                      struct out *joined, struct out *cut, uint8_t *which);
"""


@dataclass(frozen=True)
class Joined:
    """What a burst became: frames with their virtio_net_hdr, the index of each's first, all of them cut again."""

    frames: list[tuple[bytes, bytes]]
    firsts: list[int]
    cut: list[bytes]
    verified: int


class Offload:
    def __init__(self, into: Path) -> None:
        """Compiled with sanitizers where they are part of the process already, and counting for tests.coverage."""
        sanitized = hasattr(ctypes.CDLL(None), "__asan_init")
        counts = os.environ.get("XDPNET_COUNTS")
        library = into / "offload.so"
        subprocess.run(
            ["gcc", "-std=gnu11", "-O1", "-g", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden"]
            + (SANITIZE if sanitized else [])
            + (["--coverage", "-O0", "-DXN_COUNTED", "-dumpdir", f"{counts}/"] if counts else [])
            + [f"-I{CORE}", "-o", str(library), str(SOURCES / "offload.c")]
            + [str(path) for path in sorted(CORE.rglob("*.c")) if path.stem in PARTS],
            check=True,
            timeout=60,
        )
        self._ffi = FFI()
        self._ffi.cdef(CDEF)
        self._lib: Any = self._ffi.dlopen(str(library))
        self._joined, self._cut = (self._ffi.new("struct out *") for _ in range(2))

    def join(self, frames: Sequence[bytes], takes: int, piece: int = 0) -> Joined:
        """Each frame in one piece; or the first 256 bytes, and others of `piece`."""
        which = self._ffi.new(f"uint8_t[{BURST}]")
        lengths = [len(each) for each in frames]
        verified = self._lib.offload_join(
            b"".join(frames), lengths, len(frames), piece, takes, self._joined, self._cut, which
        )
        joined = self._read(self._joined)
        return Joined(joined, list(which[0 : len(joined)]), [each for _, each in self._read(self._cut)], verified)

    def _read(self, out: Any) -> list[tuple[bytes, bytes]]:
        made = []
        at = 0
        whole = bytes(self._ffi.buffer(out.bytes, out.used))
        for i in range(out.n):
            made.append((bytes(self._ffi.buffer(out.headers[i])), whole[at : at + out.lengths[i]]))
            at += out.lengths[i]
        return made
