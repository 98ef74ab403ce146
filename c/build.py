"""Build the C core with cffi in API mode.

`c/xdpnet.h` is the one text of the API: cffi's cdef reads it whole, the C sources include it. Every source below `c/`
is compiled into one extension module, `xdpnet._core`; warnings are errors. `--sanitize` builds it with ASan and UBSan,
`--coverage` counts lines and branches for gcov, in OUT_DIR/coverage: python -m tests.coverage does, and prints them.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import tempfile
from pathlib import Path

from cffi import FFI

HERE = Path(__file__).resolve().parent
MODULE = "xdpnet._core"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-Wshadow", "-Wstrict-prototypes", "-Wpointer-arith"]
# cffi's own generated code passes function pointers around in ways that these two warn of.
GENERATED = ["-Wno-unused-parameter", "-Wno-missing-field-initializers"]
COVERAGE = ["--coverage", "-fprofile-update=atomic", "-DXN_COUNTED"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]


def build(out_dir: Path, sanitize: bool = False, coverage: bool = False) -> Path:
    """Compile the core into `out_dir/xdpnet/_core*.so` and return that path."""
    ffi = FFI()
    ffi.cdef((HERE / "xdpnet.h").read_text())
    extra = SANITIZE if sanitize else COVERAGE if coverage else []
    flags = ["-std=gnu11", "-g", "-fno-strict-aliasing", "-fvisibility=hidden", *WARNINGS, *GENERATED, *extra]
    # Optimised, lines and branches are not those of the source.
    flags += ["-O0"] if coverage else ["-O1"] if sanitize else ["-O2"]
    ffi.set_source(
        MODULE,
        '#include "base.h"',
        sources=[str(path) for path in sorted(HERE.rglob("*.c"))],
        include_dirs=[str(HERE)],
        extra_compile_args=flags,
        extra_link_args=["-pthread", *extra],
        py_limited_api=True,
    )
    with contextlib.ExitStack() as stack:
        # What is counted is written beside the objects.
        if coverage:
            scratch = str(out_dir / "coverage")
        else:
            scratch = stack.enter_context(tempfile.TemporaryDirectory(prefix=f"xdpnet-build-{os.getpid()}-"))
        built = Path(ffi.compile(tmpdir=scratch))
        target = out_dir / "xdpnet" / built.name
        target.parent.mkdir(parents=True, exist_ok=True)
        # A new file under the old name: a running daemon keeps the one that it has mapped.
        staged = target.with_name(f".{target.name}.new")
        staged.write_bytes(built.read_bytes())
        staged.chmod(0o755)
        staged.replace(target)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("out_dir", type=Path, nargs="?", default=HERE.parent, help="where xdpnet/_core*.so goes")
    parser.add_argument("--sanitize", action="store_true", help="build with ASan and UBSan")
    parser.add_argument("--coverage", action="store_true", help="build with counters for gcov")
    arguments = parser.parse_args()
    print(build(arguments.out_dir, arguments.sanitize, arguments.coverage))


if __name__ == "__main__":
    main()
