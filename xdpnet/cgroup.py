"""The memory that the control groups of this process leave it: MemoryMax= of its unit, or of a slice around it.

Reference: cgroups(7); kernel Documentation/admin-guide/cgroup-v2.rst, "Memory Interface Files".
"""

from collections.abc import Iterator
from pathlib import Path, PurePosixPath

NO_LIMIT = 1 << 60  # version 1 has a number for it, whole pages below 2^63
GROUPS = Path("/proc/self/cgroup")
MOUNT = Path("/sys/fs/cgroup")


def memory_limit(groups: Path = GROUPS, mount: Path = MOUNT) -> int | None:
    """Bytes; None: there is no limit, or none is known."""
    limits = [int(text) for text in _limits(groups, mount) if text.isascii() and text.isdigit()]
    return min((limit for limit in limits if limit < NO_LIMIT), default=None)


def _limits(groups: Path, mount: Path) -> Iterator[str]:
    try:
        lines = groups.read_text().splitlines()
    except OSError:  # a kernel without control groups
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if "memory" in controllers.split(","):
            files = [mount / "memory" / "memory.limit_in_bytes"]
        elif not controllers:
            files = [mount / "memory.max", mount / "unified" / "memory.max"]
        else:
            continue
        group = PurePosixPath(path.lstrip("/"))
        for file in files:
            for above in (group, *group.parents):
                limit = file.parent / above / file.name
                if limit.is_file():
                    yield limit.read_text().strip()
