"""What a run has left is told, and what another has that goes on beside is not."""

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import traces
from tests.rig.netns import needs_root, veth
from tests.rig.waiting import until

LEAVES = "import os, sys; open(f'/tmp/xdpn{os.getpid()}left', 'w').close(); print(flush=True); sys.stdin.read()"


@contextmanager
def leaving(*words: str) -> Iterator[tuple[int, str]]:
    """A process that has left a file, and the name of that; `words` show in its command."""
    command = [sys.executable, "-c", LEAVES, *words]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        path = Path(f"/tmp/xdpn{process.pid}left")
        try:
            yield process.pid, f"file {path}"
        finally:
            process.kill()
            path.unlink()


def test_what_another_run_has_is_not_ours_while_it_goes_on() -> None:
    with leaving() as (own, ours), leaving("pytest") as (other, theirs):
        assert ours in traces.take(own)
        assert theirs not in traces.take(own)
        assert theirs in traces.take(other)
        assert theirs in traces.take(), "nor what our own processes have is another's"


def test_what_a_run_has_left_that_is_over_is_told() -> None:
    with leaving() as (own, _), leaving("pytest") as (other, theirs):
        subprocess.run(["kill", str(other)], check=True)
        until(lambda: theirs in traces.take(own))


@needs_root
@pytest.mark.net
def test_an_interface_and_a_namespace_are_told() -> None:
    before = traces.take()
    with veth() as pair:
        added = traces.take() - before
        assert added >= {f"interface {pair.ifname}", f"file /run/netns/{pair.namespace.name}"}
