"""Faults as people make them: `xdpnet stats` names guest, cause and remedy, and so do the log, once, and the metric."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig.daemon import Daemon, daemon, guest
from tests.rig.frontend import Frontend
from tests.rig.guests import BROADCAST, frame, mac
from tests.rig.remote import RemoteGuest
from xdpnet.virtq.message import Request, VringAddr, VringFile, VringState

pytestmark = pytest.mark.core


@pytest.fixture
def running(tmp_path: Path) -> Iterator[Daemon]:
    words = ["--guest", guest(tmp_path), "--guest", guest(tmp_path, "db", f",mac={mac(2).hex(':')}")]
    with daemon(tmp_path, *words, "--metrics", "127.0.0.1:0") as made:
        yield made.ready()


def path(tmp_path: Path, name: str = "web") -> str:
    return str(tmp_path / f"{name}.sock")


def stats(served: Daemon) -> str:
    """As somebody on call sees it."""
    words = [sys.executable, "-m", "xdpnet", "stats", "--port", "web", "--control", served.control]
    return " ".join(subprocess.run(words, capture_output=True, text=True, check=True).stdout.split())


def is_seen(served: Daemon, kind: str, words: str, said: int = 1) -> None:
    """In all three places; so often in the log."""
    found = served.until(lambda: (port := served.port("web").guest) and port.state.kind == kind and port.state, kind)
    assert str(found).startswith(words)
    assert words in stats(served)
    assert f'xdpnet_guest_state{{port="web",state="{kind}"}} 1.0' in served.get("/metrics")[1]
    if said:
        served.until_said(f": web: {words}", said)


def test_a_guest_without_a_frontend_and_then_without_a_driver_waits_for_them(running: Daemon, tmp_path: Path) -> None:
    is_seen(running, "no_frontend", "waiting for a frontend", 0)
    with Frontend.connect(path(tmp_path)) as frontend:
        frontend.negotiate()
        is_seen(running, "no_driver", "waiting for a driver")
    is_seen(running, "no_frontend", "waiting for a frontend")


def test_a_guest_whose_memory_is_not_shared_is_named_with_the_remedy(running: Daemon, tmp_path: Path) -> None:
    """QEMU sets the rings up, and hands over no region."""
    with RemoteGuest(path(tmp_path)) as web:
        for index, ring in enumerate(web.rings()):
            web.tell(Request.SET_VRING_NUM, VringState(index, ring.config().num))
            at = ring.config()
            rings = VringAddr(index=index, flags=0, desc=at.desc_addr, used=at.used_addr, avail=at.avail_addr, log=0)
            web.tell(Request.SET_VRING_ADDR, rings)
            web.tell(Request.SET_VRING_KICK, VringFile(index, nofd=False), [ring.kick_fd])
        is_seen(running, "no_memory", "memory is not shared (share=on); give its QEMU -object memory-backend-memfd")


def test_a_card_with_more_queues_than_there_are_is_named_once_and_first(running: Daemon, tmp_path: Path) -> None:
    """QEMU asks for their number, leaves, and comes again without a pause: lines of these would be thousands."""
    for _ in range(6):
        with Frontend.connect(path(tmp_path)) as frontend:
            frontend.negotiate()
            frontend.ask_u64(Request.GET_QUEUE_NUM)
    is_seen(running, "too_few_queues", "asks for more than the 1 queue pair that it has; `queues` of its network card")
    lines = [line for line in running.log.splitlines() if " web: " in line]
    assert len(lines) == 1, running.log


def test_a_frontend_that_is_refused_again_and_again_is_named_with_the_reason(running: Daemon, tmp_path: Path) -> None:
    for _ in range(20):
        with Frontend.connect(path(tmp_path)) as frontend:
            frontend.send(Request.SET_FEATURES, (1 << 57).to_bytes(8, "little"))
            assert frontend.is_disconnected()
    is_seen(running, "refused", "refused: features not offered: ", 0)
    lines = [line for line in running.log.splitlines() if " web: " in line]
    assert "web: the frontend is disconnected: features not offered: " in lines[0]
    assert len(lines) <= 4, running.log


def test_a_guest_that_gives_no_receive_buffers_is_stalled_until_it_does(running: Daemon, tmp_path: Path) -> None:
    with RemoteGuest(path(tmp_path)) as web, RemoteGuest(path(tmp_path, "db")) as db:
        web.start()
        db.start()
        is_seen(running, "up", "up")
        db.pair.send(frame(BROADCAST, mac(2)))
        is_seen(running, "stalled", "stalled: no receive buffer for ", 0)
        running.until_said(": web: stalled: no receive buffer for ")
        web.pair.post(8)
        is_seen(running, "up", "up", 2)


def test_a_ring_that_broke_is_named_with_its_reason(running: Daemon, tmp_path: Path) -> None:
    with RemoteGuest(path(tmp_path)) as web:
        web.start()
        web.pair.tx.raw((0, 64, 0))  # outside of its memory
        web.pair.tx.kick(always=True)
        is_seen(running, "broken", "broken: tx ring 0, addr; a reset of its driver revives it", 0)
        running.until_said("guest web: tx ring 0 broke: addr; a reset of its driver revives it")


def test_who_sends_from_anothers_address_is_shown_with_it(running: Daemon, tmp_path: Path) -> None:
    with RemoteGuest(path(tmp_path)) as web:
        web.start()
        web.pair.send_all([frame(BROADCAST, mac(2))])
        running.until(lambda: (port := running.port("web").guest) and port.offences, "an offence")
        assert f"last spoof: from {mac(2).hex(':')}, 0 min" in stats(running)
        assert "spoof 1" in stats(running)
        running.until_said(f"guest web: frames from {mac(2).hex(':')} are dropped (spoof)")
