"""The limit of memory that control groups set, as files say it and as a real group has it."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import needs
from xdpnet.cgroup import memory_limit


def limit(directory: Path, groups: str, files: dict[str, str]) -> int | None:
    """Of these lines of /proc/self/cgroup, and these files below /sys/fs/cgroup beside those of before."""
    (directory / "groups").write_text(groups)
    for name, text in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_text(text)
    return memory_limit(directory / "groups", directory)


def test_the_tightest_limit_of_a_group_and_those_around_it_counts(tmp_path: Path) -> None:
    unit, own, around = "0::/a.slice/b.service\n", "a.slice/b.service/memory.max", "a.slice/memory.max"
    assert limit(tmp_path, unit, {}) is None
    assert limit(tmp_path, unit, {"c.slice/memory.max": "1\n"}) is None
    assert limit(tmp_path, unit, {own: "max\n"}) is None
    assert limit(tmp_path, unit, {around: "4096\n"}) == 4096
    assert limit(tmp_path, unit, {own: "8192\n"}) == 4096
    assert limit(tmp_path, unit, {around: "16384\n"}) == 8192


@pytest.mark.parametrize("groups", ["4:memory:/a\n0::/\n", "4:cpu,memory:/a\n", "1:name=systemd:/b:c\n4:memory:/a\n"])
def test_groups_of_version_1_have_their_own_file(tmp_path: Path, groups: str) -> None:
    own, around = "memory/a/memory.limit_in_bytes", "memory/memory.limit_in_bytes"
    assert limit(tmp_path, groups, {own: "9223372036854771712\n"}) is None
    assert limit(tmp_path, groups, {own: "4096\n"}) == 4096
    assert limit(tmp_path, groups, {around: "2048\n"}) == 2048


def test_without_control_groups_there_is_no_limit(tmp_path: Path) -> None:
    assert memory_limit(tmp_path / "nothing", tmp_path) is None
    assert limit(tmp_path, "0::/\n", {}) is None


@pytest.fixture
def group() -> Iterator[Path]:
    """A real group of 300 MiB below ours."""
    lines = Path("/proc/self/cgroup").read_text().splitlines()
    own = {controllers: path.strip("/") for _, controllers, path in (line.split(":", 2) for line in lines)}
    first = "memory" in own
    made = Path("/sys/fs/cgroup", "memory" if first else "", own["memory" if first else ""], f"xdpn{os.getpid()}")
    file = made / ("memory.limit_in_bytes" if first else "memory.max")
    try:
        made.mkdir()
    except OSError as error:
        pytest.skip(f"no control group can be made: {error}")
    try:
        if not file.exists():
            pytest.skip("the memory controller is not passed on to groups below ours")
        file.write_text(str(300 << 20))
        yield made
    finally:
        made.rmdir()


INSIDE = """
import sys
from pathlib import Path
from xdpnet import config
from xdpnet.cgroup import memory_limit
from xdpnet.daemon import Daemon
Path(sys.argv[1], "cgroup.procs").write_text("0")
guests = [{"name": name, "socket": f"/{name}"} for name in "ab"]
Daemon(config.parse({"max_memory": sys.argv[2], "guest": guests}))._advise()
print(memory_limit())
"""


@needs.root
@pytest.mark.parametrize(("size", "said"), [("150MiB", False), ("151MiB", True)])
def test_13_a_limit_that_guests_can_exceed_is_said(group: Path, size: str, said: bool) -> None:
    words = (sys.executable, "-c", INSIDE, str(group), size)
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert done.stdout == f"{300 << 20}\n"
    assert ("300 MiB of memory are" in done.stderr and "all guests is 302 MiB" in done.stderr) is said
