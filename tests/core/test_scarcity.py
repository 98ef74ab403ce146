"""Too little of everything: each request of the core to the system fails once, and limits are reached.

What is tried is in rig/scarce.py, in a process of its own. An error of the core, or success with less (a copy instead
of zero copy), is right; a crash, a descriptor, a mapping or a block of memory left behind is not.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import native
from tests.rig.netns import Veth, needs_root, veth

pytestmark = [needs_root, pytest.mark.net]


@pytest.fixture
def wire() -> Iterator[Veth]:
    with veth() as made:
        yield made


def lives(*words: str, prefix: tuple[str, ...] = (), **env: str) -> list[str]:
    child = subprocess.run(
        [*prefix, sys.executable, "-X", "faulthandler", "-m", "tests.rig.scarce", *words],
        env={**os.environ, **env}, capture_output=True, text=True, check=False, timeout=110,
    )  # fmt: skip
    assert child.returncode == 0, child.stdout[-500:] + child.stderr
    return child.stdout.splitlines()


def test_d25_every_request_of_the_core_may_fail_and_nothing_is_left_behind(tmp_path: Path, wire: Veth) -> None:
    library = native.compile_program("scarcity", tmp_path, "-shared", "-fPIC")
    told = lives(wire.ifname, LD_PRELOAD=str(library))
    failed = [line for line in told if "Error" in line]
    # Of memory, of descriptors, of mappings, of a socket's buffers: each was refused somewhere.
    assert len(told) > 60
    assert len(failed) > 40
    for words in ("create bridge", "start workers", "map 1 memory regions", "start ring", "bind AF_XDP socket"):
        assert any(words in line for line in failed), words
    assert all(re.fullmatch(r"\d+ (well|\w+Error: \[Errno \d+\] .+|SetupError: .+)", line) for line in told)


@pytest.mark.parametrize("mib", [0, 1, 4, 12, 20, 30, 40, 60, 80, 160, 2 << 20])
def test_d25_an_address_space_that_is_too_small_is_an_error(wire: Veth, mib: int) -> None:
    """How much is enough is the matter of libraries as well; nothing is not, and 2 TiB is."""
    (told,) = lives(wire.ifname, f"as={mib}")
    assert told == "well" or re.match("(OSError|BlockingIOError|MemoryError|SetupError): ", told)
    assert told == "well" or mib < 160
    assert told != "well" or mib


@pytest.mark.skipif(not shutil.which("setpriv"), reason="setpriv: not found (Debian's util-linux)")
def test_d25_memory_that_may_not_be_locked_is_an_error(wire: Veth) -> None:
    """Locked are the frames of a socket; CAP_IPC_LOCK would make the limit void."""
    bare = ("setpriv", "--bounding-set=-ipc_lock", "--inh-caps=-ipc_lock")
    (told,) = lives(wire.ifname, "memlock=64", prefix=bare)
    assert re.match(r"OSError: .*bind AF_XDP socket", told)
