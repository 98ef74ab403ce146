"""A core dump of the daemon holds nothing of what guests keep or send, but for the headers of frames."""

import re
import secrets
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.rig import dpdk
from tests.rig.daemon import daemon, guest
from tests.rig.guests import BROADCAST, mac
from tests.rig.netns import Veth, needs_root
from tests.rig.remote import RemoteGuest
from tests.rig.rings import MODERN, Span
from tests.rig.waiting import until
from xdpnet.virtq.message import Request

SECRET_AT = 512  # in a frame: behind all that is ever looked at
UNIT = Path("deploy/xdpnet.service")
HUGE = 2 << 20
HUGE_SPAN = (Span(0x4000_0000, 4 * HUGE, 0x7F12_0000_0000, 0),)
MFD_HUGETLB = 4


def dumped(pid: int) -> Iterator[tuple[str, bytes]]:
    """Every mapping that is not advised against (`dd`), with its first line in smaps; proc(5), core(5)."""
    mappings = re.split(r"\n(?=[0-9a-f]+-[0-9a-f]+ )", Path(f"/proc/{pid}/smaps").read_text())
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for mapping in mappings:
            head, *fields = mapping.splitlines()
            flags = next(line for line in fields if line.startswith("VmFlags:")).split()
            start, end = (int(word, 16) for word in head.split()[0].split("-"))
            if "dd" in flags or "rd" not in flags:
                continue
            try:
                memory.seek(start)
                yield head, memory.read(end - start)
            except (OSError, OverflowError):
                continue  # of the kernel's own


def holding(pid: int, secret: bytes) -> list[str]:
    return [head for head, content in dumped(pid) if secret in content]


def exchange(sender: RemoteGuest, taker: RemoteGuest, to: bytes, secret: bytes) -> None:
    """A guest that has it in its memory, and sends it; and one that receives it."""
    frame = (to + mac(1) + b"\x88\xb5").ljust(SECRET_AT, b"\0") + secret
    for _ in range(8):
        sender.pair.send(frame.ljust(1400, b"\0"))
    assert sender.pair.wait_sent()
    assert len(taker.pair.frames(8)) == 8


def test_d40_what_guests_hold_and_send_each_other_is_in_no_dump(tmp_path: Path) -> None:
    secret = secrets.token_bytes(64)
    words = ("--guest", guest(tmp_path), "--guest", guest(tmp_path, "db"))
    with daemon(tmp_path, *words) as running:
        running.ready()
        with (
            RemoteGuest(tmp_path / "web.sock", MODERN).start() as one,
            RemoteGuest(tmp_path / "db.sock", MODERN).start() as two,
        ):
            two.pair.fill()
            exchange(one, two, BROADCAST, secret)
            one.memory.write(one.memory.reserve(64), secret)
            assert holding(running.process.pid, secret) == []
            # The memory table is replaced: the new mappings are as the old ones.
            one.tell(Request.SET_MEM_TABLE, *one.table())
            assert holding(running.process.pid, secret) == []
            assert "/memfd:guest" in Path(f"/proc/{running.process.pid}/maps").read_text()


@needs_root
@pytest.mark.net
@pytest.mark.parametrize("zerocopy", ["off", "on"])
def test_d40_what_guests_send_to_an_interface_is_in_no_dump(tmp_path: Path, wire: Veth, zerocopy: str) -> None:
    """Copied, it is in frames of the socket; in place, the guest's memory is part of the socket's."""
    secret = secrets.token_bytes(64)
    words = ("--guest", guest(tmp_path), "--guest", guest(tmp_path, "db"))
    with daemon(tmp_path, *words, "--netdev", f"{wire.ifname},zerocopy={zerocopy}") as running:
        running.ready()
        with (
            RemoteGuest(tmp_path / "web.sock", MODERN) as one,
            RemoteGuest(tmp_path / "db.sock", MODERN) as two,
        ):
            for each in one, two:
                each.memory.map[:] = bytes(each.memory.size)  # what is not there is not pinned
                each.start()
            if zerocopy == "on":
                until(lambda: running.port(wire.ifname).queues[0].xsk.umem > 24 << 20)  # type: ignore[union-attr]
            two.pair.fill()
            exchange(one, two, BROADCAST, secret)
            until(lambda: running.port(wire.ifname).queues[0].tx.packets >= 8)
            assert (running.port(wire.ifname).queues[0].tx.in_place >= 8) == (zerocopy == "on")
            assert holding(running.process.pid, secret) == []


@needs_root
@pytest.mark.net
def test_d40_huge_pages_of_a_guest_are_in_no_dump(tmp_path: Path, wire: Veth) -> None:
    secret = secrets.token_bytes(64)
    words = ("--guest", guest(tmp_path), "--guest", guest(tmp_path, "db"), "--netdev", wire.ifname)
    with dpdk.huge_pages(16, tmp_path), daemon(tmp_path, *words) as running:
        running.ready()
        with (
            RemoteGuest(tmp_path / "web.sock", MODERN, spans=HUGE_SPAN, memfd_flags=MFD_HUGETLB).start() as one,
            RemoteGuest(tmp_path / "db.sock", MODERN).start() as two,
        ):
            two.pair.fill()
            exchange(one, two, BROADCAST, secret)
            assert holding(running.process.pid, secret) == []


def test_d40_the_service_writes_no_dump_at_all() -> None:
    assert "LimitCORE=0" in UNIT.read_text().splitlines()
