"""A daemon, or a frontend, that does not get to run for a while: nobody else is hurt, and what is lost is counted."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.netns import needs_root
from tests.rig.remote import RemoteGuest
from tests.rig.rings import MODERN
from tests.rig.waiting import eventually, until, until_equal
from xdpnet.demo import process

CPU = min(os.sched_getaffinity(0))
FRAMES = 2000
WINDOW = 200  # frames on their way; a ring has room for more
CPU_GROUPS = Path("/sys/fs/cgroup/cpu")  # of version 1
FRONTEND = """if True:
    import sys, time
    from tests.rig.remote import RemoteGuest
    from tests.rig.rings import MODERN
    with RemoteGuest(sys.argv[1], MODERN) as guest:
        guest.start()
        guest.pair.fill()
        print("running", flush=True)
        for line in sys.stdin:
            print(guest.frontend.ask_u64(1), flush=True)
    """


@contextmanager
def stopped(pid: int) -> Iterator[None]:
    """Stopped by SIGSTOP, for as long as the block runs."""
    os.kill(pid, signal.SIGSTOP)
    try:
        until(lambda: Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "T")
        yield
    finally:
        os.kill(pid, signal.SIGCONT)


class Talk:
    """Two guests of a daemon with one worker on one CPU; one sends numbered frames, the other takes what comes."""

    def __init__(self, running: Daemon, one: RemoteGuest, two: RemoteGuest) -> None:
        self.daemon, self.one, self.two = running, one, two
        self.sent = 0
        self.got: list[bytes] = []

    def send(self, count: int) -> None:
        """As many as there is room for now, in the one's ring and in the other's, at most."""
        self.one.pair.reap()
        for _ in range(min(count, self.one.pair.tx.room, WINDOW - (self.sent - len(self.got)))):
            self.one.pair.queue(frame(mac(2), mac(1), mark=self.sent.to_bytes(4, "big")))
            self.sent += 1
        self.one.pair.tx.kick()
        self.take()

    def take(self) -> int:
        """How many have come until now."""
        self.got += [packet.frame[14:18] for packet in self.two.pair.packets()]
        self.two.pair.fill()
        return len(self.got)

    def lost(self) -> int:
        return sum(self.daemon.port("two").queues[0].rx.drops.values())

    def every_frame_arrives_in_order_or_is_counted(self) -> None:
        assert self.one.pair.wait_sent(30)
        assert eventually(lambda: self.take() + self.lost() == self.sent, 30)
        assert self.got == sorted(set(self.got))
        totals = self.daemon.snapshot().totals
        assert totals.rest == 0


@pytest.fixture
def talk(tmp_path: Path) -> Iterator[Talk]:
    guests = [guest(tmp_path, name, f",mac={mac(number).hex(':')}") for number, name in ((1, "one"), (2, "two"))]
    words = [word for each in (*guests, guest(tmp_path, "idle")) for word in ("--guest", each)]
    with ExitStack() as stack:
        running = stack.enter_context(daemon(tmp_path, *words, "--cpus", str(CPU))).ready()
        one, two = (stack.enter_context(RemoteGuest(tmp_path / f"{name}.sock", MODERN)) for name in ("one", "two"))
        one.start()
        two.start()
        two.pair.fill()
        yield Talk(running, one, two)
        assert running.end() == 0


def test_d2_a_frontend_that_is_stopped_costs_the_others_nothing(talk: Talk, tmp_path: Path) -> None:
    command = [sys.executable, "-c", FRONTEND, str(tmp_path / "idle.sock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as frontend:
        assert frontend.stdin is not None
        assert frontend.stdout is not None
        assert frontend.stdout.readline() == "running\n"
        with stopped(frontend.pid):
            flood(talk)
            before = process.resident_bytes(talk.daemon.process.pid, but="/memfd:guest")
            for _ in range(4):
                flood(talk)
            grown = process.resident_bytes(talk.daemon.process.pid, but="/memfd:guest") - before
            talk.every_frame_arrives_in_order_or_is_counted()
            idle = talk.daemon.port("idle").queues[0].rx
            assert idle.drops["no_buffer"] > FRAMES  # it took what it had room for
        assert grown < 1 << 20
        frontend.stdin.write("are you there\n")
        frontend.stdin.flush()
        assert int(frontend.stdout.readline())
        frontend.stdin.close()


def flood(talk: Talk) -> None:
    """Frames to all, and to the other one."""
    end = talk.sent + FRAMES
    while talk.sent < end:
        talk.one.pair.reap()
        if talk.one.pair.tx.room:
            talk.one.pair.send(frame(BROADCAST, mac(1), mark=talk.sent.to_bytes(4, "big")))
            talk.sent += 1
        talk.take()


def test_d27_a_daemon_that_is_stopped_goes_on_where_it_was(talk: Talk) -> None:
    for _ in range(3):
        talk.send(100)
        with stopped(talk.daemon.process.pid):
            talk.send(WINDOW)
            time.sleep(0.3)  # so long nobody serves it
        until_equal(talk.take, talk.sent)
    assert talk.sent > 3 * 100
    talk.every_frame_arrives_in_order_or_is_counted()
    assert talk.lost() == 0


@pytest.mark.parametrize(
    "greed",
    [
        pytest.param("os.nice(-20)", id="nice"),
        pytest.param("os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(50))", id="real time"),
    ],
)
@needs_root
def test_d27_beside_a_hog_on_its_cpu_every_frame_is_accounted_for(talk: Talk, greed: str) -> None:
    """It ends by itself after a second, and so does all that it keeps."""
    hog = f"import os, time; os.sched_setaffinity(0, {{{CPU}}}); {greed}; print(flush=True); end = time.monotonic() + 1"
    command = [sys.executable, "-c", hog + "\nwhile time.monotonic() < end: pass"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True) as child:
        assert child.stdout is not None
        if not child.stdout.readline():
            pytest.skip("needs the right to be greedy")
        while child.poll() is None:
            talk.send(20)
    talk.send(20)
    talk.every_frame_arrives_in_order_or_is_counted()


@needs_root
def test_d27_with_a_twentieth_of_a_cpu_every_frame_is_accounted_for(talk: Talk) -> None:
    group = CPU_GROUPS / f"xdpn{os.getpid()}"
    try:
        group.mkdir()
        (group / "cpu.cfs_quota_us").write_text("5000")
    except OSError:
        pytest.skip("needs control groups of version 1 that may be made")
    try:
        (group / "cgroup.procs").write_text(str(talk.daemon.process.pid))
        for _ in range(50):
            talk.send(20)
        talk.every_frame_arrives_in_order_or_is_counted()
    finally:
        (CPU_GROUPS / "cgroup.procs").write_text(str(talk.daemon.process.pid))
        group.rmdir()
