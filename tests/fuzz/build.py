"""Build the fuzz targets that are C: the real core under clang's libFuzzer, AddressSanitizer and UBSan."""

from __future__ import annotations

import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests" / "fuzz"
OUT = ROOT / "build" / "fuzz"
CORE = ROOT / "c"
# By name: the target's own source, and what it is compiled with.
TARGETS = {"guests": ("guests.c", ()), "oracle": ("guests.c", ("-DORACLE",)), "offload": ("offload.c", ())}

# What the core asks of the kernel that a target answers itself (kernel.c).
KERNEL = ["bind", "close", "getrandom", "getsockopt", "mmap", "mremap", "munmap"]
KERNEL += ["recvfrom", "recvmmsg", "sendto", "setsockopt", "socket", "syscall", "usleep"]
SANITIZE = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined"]
FLAGS = ["-std=gnu11", "-g", "-O1", "-fno-strict-aliasing", "-fno-omit-frame-pointer", "-DXN_ORACLE", f"-I{HERE}"]
FLAGS += ["-Wall", "-Wextra", "-Werror", "-Wshadow", *SANITIZE, "-fsanitize=fuzzer-no-link"]
# The grammar knows what is compared with what; to be told costs a quarter of the speed.
FLAGS += ["-fno-sanitize-coverage=trace-cmp"]
COVERAGE = ["-fprofile-instr-generate", "-fcoverage-mapping"]


class BuildError(Exception):
    """The compiler's complaint."""


def clang(*arguments: str) -> None:
    if not shutil.which("clang"):
        raise BuildError("clang is not installed; `deploy/bootstrap.sh fuzz` installs it")
    done = subprocess.run(["clang", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise BuildError(done.stderr or done.stdout)


def is_as_it_was(path: Path, core: Path) -> bool:
    return path.read_bytes() == (CORE / path.relative_to(core)).read_bytes()


def build(
    core: Path = CORE,
    out: Path = OUT,
    targets: tuple[str, ...] = (*TARGETS,),
    coverage: bool = False,
    unchanged: Path | None = None,
) -> None:
    """Compile the core in `core` and the named targets into `out`. Raises BuildError.

    unchanged: where what is the same as in c/ has been compiled already; the rest may have variables that nobody uses.
    """
    out.mkdir(parents=True, exist_ok=True)
    flags = [*FLAGS, f"-I{core}", *(COVERAGE if coverage else []), *(["-Wno-error"] if unchanged else [])]
    units: dict[Path, tuple[Path, tuple[str, ...]]] = {
        out / f"{path.stem}.o": (path, ()) for path in sorted(core.rglob("*.c"))
    }
    units |= {out / f"{name}.o": (HERE / f"{name}.c", ()) for name in ("kernel", "packets")}
    shared = [str(unit) for unit in units]
    units |= {out / f"target-{name}.o": (HERE / TARGETS[name][0], TARGETS[name][1]) for name in targets}
    if unchanged and all(is_as_it_was(path, core) for path in core.rglob("*.h")):
        for unit, (path, _) in list(units.items()):
            if not path.is_relative_to(core) or is_as_it_was(path, core):
                unit.symlink_to(unchanged / unit.name)
                del units[unit]
    shared_sources = [*core.rglob("*.h"), *HERE.glob("*.h"), Path(__file__)]
    newest = max(path.stat().st_mtime for path in shared_sources)
    with ThreadPoolExecutor(2) as pool:
        jobs = [
            pool.submit(clang, *flags, *extra, "-c", str(path), "-o", str(unit))
            for unit, (path, extra) in units.items()
            if not unit.exists() or unit.stat().st_mtime < max(newest, path.stat().st_mtime)
        ]
        for job in jobs:
            job.result()
    wrapped = [f"-Wl,--wrap={name}" for name in KERNEL]
    for name in targets:
        link = ["-fsanitize=fuzzer", *SANITIZE, *(COVERAGE if coverage else []), *wrapped, "-pthread"]
        clang(*link, *shared, str(out / f"target-{name}.o"), "-o", str(out / name))
