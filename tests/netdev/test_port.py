"""netdev/ on real veth pairs: steering, other programs, an interface that goes away."""

import asyncio
import contextlib
import dataclasses
import errno
import fcntl
import json
import os
import re
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.rig import clsact
from tests.rig.descriptors import open_files
from tests.rig.driver import Driver
from tests.rig.guests import rarp
from tests.rig.netns import Veth, Wire, add_veth, command, namespace, needs_root, remove, veth
from tests.rig.waiting import PATIENCE_S, eventually, until_equal
from xdpnet import core
from xdpnet.bpf import loader
from xdpnet.errors import SetupError
from xdpnet.netdev import fitness, group
from xdpnet.netdev.fitness import BusyError
from xdpnet.netdev.group import GroupSocket
from xdpnet.netdev.link import Link, concerns, find_link, require_link
from xdpnet.netdev.port import Mode, Netdev
from xdpnet.netdev.privileged import XDP_FLAGS
from xdpnet.netdev.watch import SETTLE_S, Watch
from xdpnet.virtq import features
from xdpnet.virtq.counters import Counters
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.message import U64, VERSION, Address, Header, Message, Request
from xdpnet.virtq.session import Session

pytestmark = [needs_root, pytest.mark.net]

GUEST = bytes.fromhex("525400000001")
SECOND = bytes.fromhex("525400000002")
THIRD = bytes.fromhex("525400000003")
STRANGER = bytes.fromhex("5254000000ff")
BROADCAST = b"\xff" * 6
MULTICAST = bytes.fromhex("01005e000001")
UNTOLD = bytes(10)  # a virtio_net_hdr that asks for nothing
PAYLOAD = b"\x88\xb5" + bytes(46)  # an EtherType for experiments


def frame(destination: bytes, source: bytes = STRANGER) -> bytes:
    return destination + source + PAYLOAD


@pytest.fixture
def bridge() -> Iterator[core.Bridge]:
    made = core.Bridge(netdev_queues=4, frames_per_queue=256)
    made.start()
    yield made
    made.stop()
    made.close()


@pytest.fixture
def opened(bridge: core.Bridge, pair: Veth) -> Iterator[Netdev]:
    made = Netdev(bridge, pair.ifname)
    made.open()
    yield made
    made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("xdpnet.netdev.port.PATIENCE_S", 0.1)


def verdict(port: Netdev, name: str, count: int) -> bool:
    """It gets there, and no further."""
    return eventually(lambda: port.verdicts()[name] >= count) and port.verdicts()[name] == count


def attached_program(ifname: str) -> int:
    return require_link(ifname).xdp_id


def free(ifname: str) -> bool:
    """The kernel removes the program of a closed link a moment later."""
    return eventually(lambda: attached_program(ifname) == 0)


# ---- opening ----


def test_veth_is_opened_in_native_mode_and_left_as_it_was(bridge: core.Bridge, pair: Veth) -> None:
    before = open_files()
    port = Netdev(bridge, pair.ifname)
    port.open()
    assert (port.mode, port.queues, port.state, port.alive) == ("native", 1, "up", True)
    assert require_link(pair.ifname).xdp_mode == "xdp"
    port.close()
    port.close()
    assert free(pair.ifname)
    assert not port.alive
    with pytest.raises(SetupError, match=f"{pair.ifname}: not open"):
        port.port.queue_stats(0, core.RX)
    assert open_files() == before


def test_a_port_can_be_opened_again_at_once(bridge: core.Bridge, pair: Veth) -> None:
    port = Netdev(bridge, pair.ifname)
    for _ in range(3):
        port.open()
        port.close()


@pytest.mark.parametrize(("sets", "lends"), [(0, [False, False]), (1, [True, False]), (2, [True, True])])
def test_a_port_that_the_arena_has_no_room_for_has_frames_of_its_own_and_lends_none(
    pair: Veth, sets: int, lends: list[bool]
) -> None:
    with veth() as second, core.Bridge(netdev_queues=sets, frames_per_queue=256, zerocopy="on") as bridge:
        bridge.start()
        for turn in range(2):  # what a port had goes back to whoever is next
            with contextlib.ExitStack() as stack:
                ports = [
                    stack.enter_context(contextlib.closing(Netdev(bridge, each.ifname))) for each in (pair, second)
                ]
                for port in ports:
                    asyncio.run(port.join())
                assert [port.port.lends for port in ports] == lends, turn
                wires = [stack.enter_context(each.wire()) for each in (pair, second)]
                driver = stack.enter_context(contextlib.closing(Driver(bridge)))
                driver.start()
                driver.port.set_mac(GUEST, True)
                driver.pair.fill()
                for port, wire in zip(ports, wires, strict=True):
                    port.sync_macs(frozenset({GUEST}))
                    for _ in range(3 * 256):  # more than there are frames
                        wire.send(frame(GUEST))
                        driver.pair.rx.sleep(time.monotonic() + PATIENCE_S)
                        assert [packet.frame for packet in driver.pair.packets()] == [frame(GUEST)]
                        driver.pair.fill()
                driver.pair.send(frame(BROADCAST, GUEST))
                assert driver.pair.wait_sent()
                for wire in wires:
                    assert wire.receive(lambda got: got == frame(BROADCAST, GUEST))


def test_generic_mode_on_request(bridge: core.Bridge, pair: Veth) -> None:
    with contextlib.closing(Netdev(bridge, pair.ifname, mode="generic")) as port:
        port.open()
        assert port.mode == "generic"
        assert require_link(pair.ifname).xdp_mode == "xdpgeneric"


@pytest.fixture
def no_native() -> Iterator[str]:
    """A kind of interface that has no native XDP."""
    name = f"xdpn{os.getpid()}v999"
    command("ip", "link", "add", name, "type", "bridge")
    command("ip", "link", "set", name, "up")
    yield name
    command("ip", "link", "del", name)


@pytest.mark.parametrize("tells", [True, False])
def test_generic_mode_says_what_is_lost_in_it(
    bridge: core.Bridge, pair: Veth, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, tells: bool
) -> None:
    monkeypatch.setattr(Netdev, "_tells", lambda _: tells)
    with contextlib.closing(Netdev(bridge, pair.ifname, mode="generic")) as port:
        port.open()
    assert "those in tunnels are dropped; mode=native, or, if anybody uses tunnels, ethtool -K PEER" in caplog.text
    untold = "which datagrams are several in one (UDP_SEGMENT, rx-udp-gro-forwarding)"
    assert (untold in caplog.text) == (not tells)


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_native_mode_alone_has_the_peer_of_a_veth_cut_its_tcp_as_the_readme_says(
    bridge: core.Bridge, pair: Veth, mode: Mode
) -> None:
    def cuts() -> bool:
        return "\ntcp-segmentation-offload: off" in pair.namespace.run("ethtool", "-k", pair.peer)

    assert not cuts()
    with contextlib.closing(Netdev(bridge, pair.ifname, mode=mode)) as port:
        port.open()
        assert cuts() == (mode == "native")
    assert eventually(lambda: not cuts())


def test_auto_falls_back_to_generic_and_says_so(
    bridge: core.Bridge, no_native: str, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Netdev(bridge, no_native)) as port:
        port.open()
        assert port.mode == "generic"
    assert "falling back to generic" in caplog.text


def test_native_on_request_never_falls_back(bridge: core.Bridge, no_native: str) -> None:
    before = open_files()
    with pytest.raises(SetupError, match="native") as failure:
        Netdev(bridge, no_native, mode="native").open()
    assert "mode=generic" in failure.value.remedy
    assert open_files() == before


@pytest.mark.parametrize("mtu", [3506, 3507, 65535])
def test_native_mode_does_with_any_mtu_of_the_peer(bridge: core.Bridge, pair: Veth, mtu: int) -> None:
    """Above 3506 veth takes only a program for frames in several buffers."""
    command("ip", "-n", pair.namespace.name, "link", "set", pair.peer, "mtu", str(mtu))
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        assert port.mode == "native"
        port.sync_macs([GUEST])
        assert steers(port, pair)


def test_the_largest_mtu_is_taken(bridge: core.Bridge, pair: Veth) -> None:
    command("ip", "link", "set", pair.ifname, "mtu", str(fitness.MAX_MTU))
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()


def test_one_byte_more_of_mtu_is_refused(bridge: core.Bridge, pair: Veth) -> None:
    command("ip", "link", "set", pair.ifname, "mtu", str(fitness.MAX_MTU + 1))
    with pytest.raises(SetupError, match=f"MTU {fitness.MAX_MTU + 1}") as failure:
        Netdev(bridge, pair.ifname).open()
    assert f"mtu {fitness.MAX_MTU}" in failure.value.remedy


@pytest.mark.parametrize("ifname", ["xdpn-no-such-if", "", "a-name-longer-than-the-kernel-takes"])
def test_a_missing_interface_is_named_with_those_that_exist(bridge: core.Bridge, ifname: str) -> None:
    with pytest.raises(SetupError, match="there is none of this name") as failure:
        Netdev(bridge, ifname).open()
    assert "lo" in failure.value.remedy


def test_an_interface_that_is_down_names_the_command(bridge: core.Bridge, pair: Veth) -> None:
    command("ip", "link", "set", pair.ifname, "down")
    before = open_files()
    with pytest.raises(SetupError, match="down") as failure:
        Netdev(bridge, pair.ifname).open()
    assert f"ip link set dev {pair.ifname} up" in failure.value.remedy
    assert open_files() == before


def test_every_receive_queue_gets_a_socket(bridge: core.Bridge) -> None:
    with veth(queues=2) as pair, contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        assert port.queues == 2
        assert [port.port.xsk_stats(queue).open for queue in (0, 1)] == [1, 1]


def test_fewer_queues_than_the_interface_has_are_warned_of(
    bridge: core.Bridge, caplog: pytest.LogCaptureFixture
) -> None:
    with veth(queues=2) as pair, contextlib.closing(Netdev(bridge, pair.ifname, queues=1)) as port:
        port.open()
        assert port.queues == 1
    assert "2 receive queues and 1 AF_XDP sockets" in caplog.text
    assert "ethtool -L" in caplog.text


def test_more_queues_than_the_interface_can_have_are_refused(bridge: core.Bridge, pair: Veth) -> None:
    with pytest.raises(SetupError, match="2 queues asked for, it can have 1"):
        Netdev(bridge, pair.ifname, queues=2).open()


def test_more_queues_than_a_port_has_name_the_command(pair: Veth) -> None:
    link = require_link(pair.ifname)
    most = core.MAX_NETDEV_QUEUES
    fit = Link(**{**vars(link), "rx_queues": most, "max_rx_queues": most + 1})
    many = Link(**{**vars(link), "rx_queues": most + 1, "max_rx_queues": most + 1})
    assert fitness.reserve_queues(fit, 0) == most
    with pytest.raises(SetupError, match=f"at most {most}") as failure:
        fitness.reserve_queues(many, 0)
    assert "ethtool -L" in failure.value.remedy


def test_without_privilege_the_error_names_the_capabilities(pair: Veth) -> None:
    script = f"""
import os
from xdpnet import core
from xdpnet.errors import SetupError
from xdpnet.netdev.port import Netdev
bridge = core.Bridge(netdev_queues=1, frames_per_queue=256)
os.setgroups([]); os.setgid(65534); os.setuid(65534)
try:
    Netdev(bridge, {pair.ifname!r}).open()
except SetupError as error:
    print("refused:", error)
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "CAP_BPF" in result.stdout


ROOT = Path(__file__).parents[2]


# ---- other people's programs ----


@pytest.fixture
def foreign(pair: Veth) -> Iterator[int]:
    """Somebody else's program on the interface: the id of it."""
    program = loader.load(1, 1)
    link = core.bpf_xdp_link(program.prog_fd, require_link(pair.ifname).index, XDP_FLAGS["native"])
    yield attached_program(pair.ifname)
    os.close(link)
    program.close()


@pytest.mark.parametrize("mode", ["auto", "native", "generic"])
@pytest.mark.usefixtures("impatient")
def test_a_program_of_somebody_else_is_left_alone(bridge: core.Bridge, pair: Veth, foreign: int, mode: Mode) -> None:
    before = open_files()
    with pytest.raises(BusyError, match=f"XDP program {foreign} ") as failure:
        Netdev(bridge, pair.ifname, mode=mode).open()
    assert f"ip link set dev {pair.ifname} xdp off" in failure.value.remedy
    assert attached_program(pair.ifname) == foreign
    assert open_files() == before


@pytest.mark.usefixtures("impatient")
def test_a_queue_in_use_by_another_process_is_named(bridge: core.Bridge, pair: Veth) -> None:
    other = core.Bridge(netdev_queues=1, frames_per_queue=256)
    port = other.add_netdev(1)
    port.open_queue(0, require_link(pair.ifname).index, 1518)
    try:
        with pytest.raises(BusyError, match="AF_XDP socket of queue 0: in use"):
            Netdev(bridge, pair.ifname).open()
    finally:
        other.close()


def test_a_program_on_its_way_out_is_waited_for(
    bridge: core.Bridge, pair: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("xdpnet.netdev.port.PATIENCE_S", PATIENCE_S)
    program = loader.load(1, 1)
    link = core.bpf_xdp_link(program.prog_fd, require_link(pair.ifname).index, XDP_FLAGS["native"])
    leaving = threading.Timer(0.8, os.close, (link,))
    leaving.start()
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        assert port.alive
    leaving.join()
    program.close()


def test_after_kill_the_program_is_gone_and_the_next_process_opens(bridge: core.Bridge, pair: Veth) -> None:
    script = f"""
import time
from xdpnet import core
from xdpnet.netdev.port import Netdev
bridge = core.Bridge(netdev_queues=1, frames_per_queue=256)
Netdev(bridge, {pair.ifname!r}).open()
print("open", flush=True)
time.sleep(60)
"""
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, cwd=ROOT) as child:
        try:
            assert child.stdout is not None
            assert child.stdout.readline() == "open\n"
            assert attached_program(pair.ifname)
        finally:
            child.send_signal(signal.SIGKILL)
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        assert port.alive


# ---- steering ----


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_frames_are_steered_by_destination_and_counted(bridge: core.Bridge, pair: Veth, mode: Mode) -> None:
    with (
        contextlib.closing(Netdev(bridge, pair.ifname, mode=mode)) as port,
        pair.wire() as wire,
        host_socket(pair.ifname) as host,
    ):
        port.open()
        port.sync_macs([GUEST])
        before = port.verdicts()
        for destination, count in ((GUEST, 5), (STRANGER, 4), (BROADCAST, 3), (MULTICAST, 2)):
            for _ in range(count):
                wire.send(frame(destination))
        assert verdict(port, "redirected", before["redirected"] + 5)
        assert verdict(port, "host", before["host"] + 4)
        assert verdict(port, "group", before["group"] + 5)
        assert verdict(port, "no_socket", 0)
        assert verdict(port, "runt", 0)
        seen = [host.recv(65536)[:6] for _ in range(9)]
        host.settimeout(0.1)
        with pytest.raises(TimeoutError):
            host.recv(65536)
        assert sorted(seen) == sorted([STRANGER] * 4 + [BROADCAST] * 3 + [MULTICAST] * 2)
        # The guests' frames reached the bridge: unicast through AF_XDP, the others through AF_PACKET.
        assert eventually(lambda: port.port.queue_stats(0, core.RX).packets == 10)


def host_socket(ifname: str) -> socket.socket:
    """What the host's own stack gets of the test's frames."""
    raw = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, 0)
    raw.setsockopt(263, 23, 1)  # PACKET_IGNORE_OUTGOING
    raw.bind((ifname, 0x88B5))
    raw.settimeout(PATIENCE_S)
    return raw


def flow(destination: bytes, port: int) -> bytes:
    """A UDP frame; interfaces spread them over their queues by port."""
    udp = struct.pack("!HHHH", port, 9, 8 + 18, 0) + bytes(18)
    ip = struct.pack("!BBHHHBBH4s4s", 0x45, 0, 20 + len(udp), 0, 0, 64, 17, 0, b"\x0a\x63\0\1", b"\x0a\x63\0\2")
    return destination + STRANGER + b"\x08\0" + ip + udp


@pytest.mark.parametrize("sockets", [1, 2])
def test_frames_of_a_queue_without_a_socket_go_to_the_host(bridge: core.Bridge, sockets: int) -> None:
    with veth(queues=2) as pair, contextlib.closing(Netdev(bridge, pair.ifname, queues=sockets)) as port:
        port.open()
        port.sync_macs([GUEST])
        with pair.wire() as wire:
            for number in range(64):
                wire.send(flow(GUEST, 1000 + number))
        assert eventually(lambda: sum(port.verdicts().values()) >= 64)
        seen = port.verdicts()
        assert eventually(lambda: seen["redirected"] == received_frames(bridge, port))
    assert seen["redirected"] + seen["no_socket"] == 64
    assert (seen["no_socket"] > 0) == (sockets == 1)
    assert seen["host"] == 0


def received_frames(bridge: core.Bridge, port: Netdev) -> int:
    return sum(port.port.queue_stats(queue, core.RX).packets for queue in range(port.queues))


def test_an_announced_guest_is_heard_at_the_far_end(opened: Netdev, pair: Veth, bridge: core.Bridge) -> None:
    device = GuestDevice(bridge, "guest", bridge.add_guest(1), 1)
    session = Session(device, Counters())
    for request, bits in ((Request.SET_PROTOCOL_FEATURES, features.offered_protocol()), (Request.SET_FEATURES, 0)):
        session.handle(Message(Header(request, VERSION, 8), U64(bits).pack()), [])
    with pair.wire() as wire:
        session.handle(Message(Header(Request.SEND_RARP, VERSION, 8), Address(GUEST).pack()), [])
        assert wire.receive() == rarp(GUEST)
        assert wire.receive(timeout=0.2) is None
    assert device.port.queue_stats(0, core.TX).packets == 1
    assert opened.port.queue_stats(0, core.TX).packets == 1
    session.close()


def test_c32_a_flood_of_addresses_from_the_wire_pushes_no_guest_out(
    opened: Netdev, pair: Veth, bridge: core.Bridge
) -> None:
    with contextlib.closing(Driver(bridge).start()) as guest, pair.wire() as wire:
        guest.port.set_mac(GUEST, True)
        opened.sync_macs([GUEST])
        guest.pair.fill()
        bridge.events()
        for number in range(16000):
            wire.send(frame(GUEST, b"\x02\0" + number.to_bytes(4, "big")))
            if number % 64 == 63:  # the socket has 128 frames
                until_equal(lambda: opened.port.queue_stats(0, core.RX).packets, number + 1)
        assert not bridge.events() & core.EVENT_FDB, "no address of a guest has changed"
        entries = bridge.fdb_dump()
        assert sum(entry.port == opened.port and not entry.is_static for entry in entries) == 16000
        assert [entry.mac for entry in entries if entry.port == guest.port] == [GUEST]
        while guest.pair.frames(timeout=0.2):  # some had waited for buffers
            guest.pair.fill()
        wire.send(frame(GUEST, SECOND))
        assert guest.pair.frames() == [frame(GUEST, SECOND)]
        guest.pair.send(frame(SECOND, GUEST))
        assert wire.receive() == frame(SECOND, GUEST)


def test_47_what_is_for_a_router_on_many_vlans_of_the_wire_reaches_no_other_guest(
    opened: Netdev, pair: Veth, bridge: core.Bridge
) -> None:
    def tagged(destination: bytes, source: bytes, vlan: int) -> bytes:
        return destination + source + b"\x81\0" + vlan.to_bytes(2, "big") + PAYLOAD

    with contextlib.closing(Driver(bridge).start()) as guest, pair.wire() as wire:
        other = Driver(bridge).start()
        guest.port.set_mac(GUEST, True)
        opened.sync_macs([GUEST])
        guest.pair.fill()
        other.pair.fill()
        for vlan in range(1, 33):
            wire.send(tagged(GUEST, STRANGER, vlan))
            assert guest.pair.frames() == [tagged(GUEST, STRANGER, vlan)]
            guest.pair.fill()
        for vlan in range(1, 33):
            guest.pair.send_all([tagged(STRANGER, GUEST, vlan)])
            assert opened.port.queue_stats(0, core.TX).packets == vlan
        assert guest.port.queue_stats(0, core.TX).copies == 0
        assert other.pair.packets() == []
        other.close()


@pytest.fixture
def held_bridge() -> Iterator[core.Bridge]:
    core.time_hold()
    made = core.Bridge(netdev_queues=1, frames_per_queue=256)
    made.start()
    yield made
    made.close()
    core.time_release()


def test_46_what_comes_back_from_the_wire_takes_no_address_and_a_station_there_does(
    held_bridge: core.Bridge, pair: Veth
) -> None:
    def port_of(address: bytes) -> int:
        return next(entry.port for entry in bridge.fdb_dump() if entry.mac == address)

    def from_wire(sent: bytes) -> None:
        before = port.port.queue_stats(0, core.RX).packets
        wire.send(sent)
        assert eventually(lambda: port.port.queue_stats(0, core.RX).packets == before + 1)

    bridge = held_bridge
    port = Netdev(bridge, pair.ifname)
    with contextlib.closing(port), contextlib.closing(Driver(bridge).start()) as guest, pair.wire() as wire:
        port.open()
        port.sync_macs([SECOND])
        with contextlib.closing(Driver(bridge).start()) as other:
            other.port.set_mac(SECOND, True)
            for moved in (frame(BROADCAST, GUEST), frame(SECOND, GUEST)):
                guest.pair.send_all([frame(BROADCAST, GUEST)])
                assert wire.receive() == frame(BROADCAST, GUEST)
                bridge.events()
                for _ in range(3):
                    from_wire(frame(BROADCAST, GUEST))
                    assert port_of(GUEST) == guest.port
                assert not bridge.events() & core.EVENT_FDB
                # A second later it may be somebody else, and what is for one station alone never comes back.
                if moved[0] & 1:
                    bridge.time_advance(1_000_000)
                    from_wire(moved)
                    assert port_of(GUEST) == guest.port
                    bridge.time_advance(1_000_000)
                from_wire(moved)
                assert port_of(GUEST) == port.port
                assert bridge.events() & core.EVENT_FDB
                guest.pair.send_all([frame(BROADCAST, GUEST)])
                assert wire.receive() == frame(BROADCAST, GUEST)
                assert port_of(GUEST) == guest.port
            # Of a guest that is not here anybody may have the address.
            guest.stop()
            from_wire(frame(BROADCAST, GUEST))
            assert port_of(GUEST) == port.port


def test_57_what_comes_back_of_a_guest_with_an_address_is_dropped_while_it_is_here(
    opened: Netdev, pair: Veth, bridge: core.Bridge
) -> None:
    with contextlib.closing(Driver(bridge).start()) as guest, pair.wire() as wire:
        other = Driver(bridge).start()
        guest.port.set_mac(GUEST, True)
        other.port.set_mac(SECOND, True)
        opened.sync_macs([GUEST, SECOND])
        guest.pair.fill()
        other.pair.fill()
        for destination in (BROADCAST, MULTICAST):
            guest.pair.send(frame(destination, GUEST))
            assert other.pair.frames() == [frame(destination, GUEST)]
            assert wire.receive() == frame(destination, GUEST)
            wire.send(frame(destination, GUEST))
            wire.send(frame(destination, STRANGER))
            assert other.pair.frames() == guest.pair.frames() == [frame(destination, STRANGER)]
        assert opened.port.queue_stats(0, core.RX).drops["reflected"] == 2
        # To one station nothing comes back; and one that has gone to another host is heard from there.
        wire.send(frame(SECOND, GUEST))
        assert other.pair.frames() == [frame(SECOND, GUEST)]
        guest.stop()
        wire.send(frame(BROADCAST, GUEST))
        assert other.pair.frames() == [frame(BROADCAST, GUEST)]
        assert opened.port.queue_stats(0, core.RX).drops["reflected"] == 2
        other.close()


def test_addresses_come_and_go(opened: Netdev, pair: Veth) -> None:
    with pair.wire() as wire:

        def redirected(macs: list[bytes]) -> int:
            opened.sync_macs(macs)
            before = opened.verdicts()
            for destination in (GUEST, SECOND, THIRD):
                wire.send(frame(destination))
            assert eventually(lambda: sum(opened.verdicts().values()) >= sum(before.values()) + 3)
            return opened.verdicts()["redirected"] - before["redirected"]

        assert redirected([]) == 0
        assert redirected([GUEST]) == 1
        assert redirected([GUEST, SECOND, THIRD]) == 3
        assert redirected([THIRD]) == 1
        assert redirected([]) == 0


def filters(ifname: str) -> str:
    return command("bridge", "fdb", "show", "dev", ifname)


def test_the_interface_accepts_the_guests_addresses_while_the_port_lives(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST, SECOND])
    assert GUEST.hex(":") in filters(pair.ifname)
    opened.sync_macs([SECOND])
    assert GUEST.hex(":") not in filters(pair.ifname)
    assert SECOND.hex(":") in filters(pair.ifname)
    assert "allmulti 1" in command("ip", "-d", "link", "show", pair.ifname)
    opened.close()
    assert SECOND.hex(":") not in filters(pair.ifname)
    assert "allmulti 0" in command("ip", "-d", "link", "show", pair.ifname)


def test_a_guest_cannot_take_the_hosts_own_address(
    opened: Netdev, pair: Veth, caplog: pytest.LogCaptureFixture
) -> None:
    opened.sync_macs([pair.mac, GUEST])
    before = opened.verdicts()
    with pair.wire() as wire:
        wire.send(frame(pair.mac))
        wire.send(frame(GUEST))
    assert verdict(opened, "host", before["host"] + 1)
    assert verdict(opened, "redirected", before["redirected"] + 1)
    assert "own address" in caplog.text


def test_c22_a_guest_cannot_send_from_the_interfaces_own_address(
    opened: Netdev, pair: Veth, bridge: core.Bridge
) -> None:
    with contextlib.closing(Driver(bridge).start()) as guest:
        for source in (pair.mac, GUEST):
            guest.pair.send(BROADCAST + source + PAYLOAD)
        assert guest.pair.wait_sent()
        assert guest.port.queue_stats(0, core.TX).drops["spoof"] == 1
        assert opened.port.queue_stats(0, core.TX).packets == 1
        assert pair.mac not in {entry.mac for entry in bridge.fdb_dump() if entry.port == guest.port}


@pytest.mark.parametrize("mac", [BROADCAST, MULTICAST, bytes(6), b"", GUEST[:5], GUEST + b"\0"])
def test_what_is_no_unicast_address_is_not_steered(opened: Netdev, mac: bytes) -> None:
    opened.sync_macs([mac])
    assert opened.addresses._macs == set()


def test_addresses_beyond_the_size_of_the_map_go_to_the_host(
    bridge: core.Bridge, pair: Veth, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("xdpnet.netdev.port.MAX_MACS", 2)
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        port.sync_macs([GUEST, SECOND])
        assert "more than" not in caplog.text
        port.sync_macs([GUEST, SECOND, THIRD])
        assert port.addresses._macs == {GUEST, SECOND}
        assert "1 guest addresses more" in caplog.text
        port.sync_macs([SECOND, THIRD])
        assert port.addresses._macs == {SECOND, THIRD}


def test_the_group_socket_gets_group_addressed_frames_of_others_only(pair: Veth) -> None:
    group = GroupSocket(pair.ifname, require_link(pair.ifname).index)
    with socket.socket(fileno=os.dup(group.fileno())) as received, pair.wire() as wire, host_socket(pair.ifname) as own:
        own.send(frame(BROADCAST))
        wire.send(frame(GUEST))
        wire.send(frame(pair.mac))
        wire.send(frame(MULTICAST))
        received.settimeout(5)
        assert received.recv(2048) == UNTOLD + frame(MULTICAST)
        received.settimeout(0.2)
        with pytest.raises(TimeoutError):
            received.recv(2048)
    group.close()


def test_group_addressed_frames_that_found_the_socket_full_are_counted(pair: Veth) -> None:
    opened = GroupSocket(pair.ifname, require_link(pair.ifname).index)
    with socket.socket(fileno=os.dup(opened.fileno())) as received, pair.wire() as wire:
        assert opened.lost() == 0
        received.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1)  # the kernel's least
        for _ in range(2):
            for _ in range(100):
                wire.send(frame(MULTICAST))
            lost = opened.lost()
        assert lost > 100
        received.settimeout(0.2)
        got = 0
        with contextlib.suppress(TimeoutError):
            while received.recv(2048) == UNTOLD + frame(MULTICAST):
                got += 1
        assert got + opened.lost() == 200
    opened.close()


def test_what_the_group_socket_lost_is_not_forgotten_when_the_interface_goes(
    bridge: core.Bridge, pair: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(group, "RECEIVE_BUFFER", 1)
    with contextlib.closing(Netdev(bridge, pair.ifname)) as port, pair.wire() as wire:
        port.open()
        bridge.stop()
        for _ in range(100):
            wire.send(frame(MULTICAST))
        assert eventually(lambda: port.group_lost > 50)
        lost = port.group_lost
        port.detach()
        assert port.group_lost >= lost


# ---- an interface that goes away ----


class Watched:
    """A port with its watch running in the background, as the daemon has it."""

    def __init__(self, port: Netdev) -> None:
        self.port = port
        self.states: list[str] = []

    async def __aenter__(self) -> "Watched":
        self._task = asyncio.create_task(Watch(self.port, lambda changed: self.states.append(changed.state)).run())
        await asyncio.sleep(0.1)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

    async def reach(self, *states: str) -> None:
        await self.until(lambda: self.states == list(states), lambda: f"{self.states}, not {states}")

    async def until(self, true: Callable[[], object], what: Callable[[], str] = lambda: "") -> None:
        deadline = time.monotonic() + PATIENCE_S
        while not true():
            if self._task.done():
                self._task.result()
            assert time.monotonic() < deadline, what()
            await asyncio.sleep(0.02)


def steers(port: Netdev, pair: Veth, guest: bytes = GUEST) -> bool:
    """One frame for the guest gets through."""
    before = port.verdicts()["redirected"]
    with pair.wire() as wire:
        wire.send(frame(guest))
    return eventually(lambda: port.verdicts()["redirected"] == before + 1)


@pytest.mark.parametrize("pause", [0.0, 0.5], ids=["at once", "after a while"])
def test_a_deleted_interface_is_opened_again_when_it_is_back(opened: Netdev, pair: Veth, pause: float) -> None:
    opened.sync_macs([GUEST])
    before, port = open_files(), opened.port

    async def story() -> None:
        async with Watched(opened) as watch:
            remove(pair.ifname)
            if pause:
                await watch.reach("gone")
                assert not opened.alive
                await asyncio.sleep(pause)
            add_veth(pair.ifname, pair.namespace)
            await watch.until(lambda: opened.alive and opened.state == "up")

    asyncio.run(story())
    assert steers(opened, pair)
    assert GUEST.hex(":") in filters(pair.ifname)
    assert opened.port == port
    assert len(open_files()) == len(before)


def test_addresses_learned_while_the_interface_is_away_are_steered_afterwards(opened: Netdev, pair: Veth) -> None:
    async def story() -> None:
        async with Watched(opened) as watch:
            remove(pair.ifname)
            await watch.reach("gone")
            opened.sync_macs([GUEST])
            add_veth(pair.ifname, pair.namespace)
            while not opened.alive:
                await asyncio.sleep(0.02)

    asyncio.run(story())
    assert steers(opened, pair)
    assert GUEST.hex(":") in filters(pair.ifname)


def test_an_interface_moved_to_another_namespace_is_let_go(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST])

    async def story() -> None:
        async with Watched(opened) as watch:
            command("ip", "link", "set", pair.ifname, "netns", pair.namespace.name)
            await watch.reach("gone")
            there = pair.namespace.run("ip", "link", "show", pair.ifname)
            assert "xdp" not in there.replace(pair.ifname, "")
            pair.namespace.run("ip", "link", "set", pair.ifname, "netns", str(os.getpid()))
            command("ip", "link", "set", pair.ifname, "up")
            while not opened.alive:
                await asyncio.sleep(0.02)

    asyncio.run(story())
    assert steers(opened, pair)


def test_a_renamed_interface_stays_the_same_and_one_that_comes_back_is_known_by_its_name(
    bridge: core.Bridge, guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    with veth(queues=2) as pair, contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        set_channels(pair, 2, 1)
        port.open()
        port.sync_macs([GUEST])
        link_fd, renamed = port._link_fd, f"xdpn{os.getpid()}v997"

        async def story() -> None:
            async with Watched(port) as watch:
                command("ip", "link", "set", pair.ifname, "down")
                await watch.reach("down")
                command("ip", "link", "set", pair.ifname, "name", renamed, "up")
                await watch.reach("down", "up")
                assert f"is called {renamed} now" in caplog.text
                assert port._link_fd == link_fd
                assert all_cross(guest, pair)
                # All that is asked of the kernel by name is asked by the new one.
                set_channels(dataclasses.replace(pair, ifname=renamed), 1, 2)
                await watch.until(lambda: port.queues == 2)
                command("ip", "link", "set", renamed, "mtu", "1400")
                await watch.until(lambda: port._link_fd not in (-1, link_fd))
                assert all_cross(guest, pair)
                remove(renamed)
                await watch.until(lambda: port.state == "gone")
                add_veth(pair.ifname, pair.namespace, 1)
                await watch.until(lambda: port.alive and port.state == "up")
                assert all_cross(guest, pair)

        with caplog.at_level("INFO"):
            asyncio.run(story())


@pytest.mark.parametrize("name", ["xdpnalias", "xdpn-a-name-that-is-longer-than-others"])
def test_an_interface_is_known_by_an_alternative_name(bridge: core.Bridge, guest: Driver, name: str) -> None:
    with veth(queues=2) as pair:
        set_channels(pair, 2, 1)
        command("ip", "link", "property", "add", "dev", pair.ifname, "altname", name)
        with contextlib.closing(Netdev(bridge, name)) as port:
            port.open()
            port.sync_macs([GUEST])

            async def story() -> None:
                async with Watched(port) as watch:
                    set_channels(pair, 1, 2)
                    await watch.until(lambda: port.queues == 2)

            asyncio.run(story())
            assert port.state == "up"
            assert all_cross(guest, pair)


def test_down_and_up_again_needs_no_new_sockets(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST])
    link_fd = opened._link_fd

    async def story() -> None:
        async with Watched(opened) as watch:
            command("ip", "link", "set", pair.ifname, "down")
            await watch.reach("down")
            command("ip", "link", "set", pair.ifname, "up")
            await watch.reach("down", "up")

    asyncio.run(story())
    assert opened._link_fd == link_fd
    assert steers(opened, pair)


def test_a_lost_carrier_is_told(opened: Netdev, pair: Veth) -> None:
    async def story() -> None:
        async with Watched(opened) as watch:
            command("ip", "-n", pair.namespace.name, "link", "set", pair.peer, "down")
            await watch.reach("down")
            command("ip", "-n", pair.namespace.name, "link", "set", pair.peer, "up")
            await watch.reach("down", "up")

    asyncio.run(story())


def test_another_mtu_means_new_sockets(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST])

    async def story() -> None:
        async with Watched(opened):
            command("ip", "link", "set", pair.ifname, "mtu", "1400")
            while opened._mtu != 1400 or not opened.alive:
                await asyncio.sleep(0.02)

    asyncio.run(story())
    assert steers(opened, pair)


def test_an_mtu_that_is_too_large_closes_the_port_until_it_is_lowered(
    opened: Netdev, pair: Veth, caplog: pytest.LogCaptureFixture
) -> None:
    async def story() -> None:
        async with Watched(opened) as watch:
            command("ip", "link", "set", pair.ifname, "mtu", "9217")
            await watch.reach("down")
            assert "MTU 9217 is above" in caplog.text
            command("ip", "link", "set", pair.ifname, "mtu", "1500")
            await watch.reach("down", "up")

    asyncio.run(story())


def link_id(port: Netdev) -> int:
    links = json.loads(command("bpftool", "-j", "link", "show"))
    return next(int(link["id"]) for link in links if link["prog_id"] == attached_program(port.name))


@pytest.mark.skipif(shutil.which("bpftool") is None, reason="needs bpftool: apt install bpftool")
def test_a_link_that_an_administrator_detached_is_noticed(
    opened: Netdev, pair: Veth, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("xdpnet.netdev.watch.PROBE_S", 0.2)
    opened.sync_macs([GUEST])

    async def story() -> None:
        async with Watched(opened):
            command("bpftool", "link", "detach", "id", str(link_id(opened)))
            while not opened.alive:
                await asyncio.sleep(0.02)

    asyncio.run(story())
    assert "detached by somebody else" in caplog.text
    assert steers(opened, pair)


def test_the_hosts_address_is_followed(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST])

    async def story() -> None:
        async with Watched(opened):
            command("ip", "link", "set", pair.ifname, "address", GUEST.hex(":"))
            while opened.addresses._macs:
                await asyncio.sleep(0.02)

    asyncio.run(story())


# ---- queues that come and go ----

FLOWS = 64
TUNSETIFF, IFF_TAP, IFF_MULTI_QUEUE, IFF_NO_PI = 0x400454CA, 2, 0x100, 0x1000


def set_channels(pair: Veth, now: int, wanted: int) -> None:
    """At both ends: frames arrive on the queue that they were sent from, and never on one that there is not."""
    words = "rx", str(wanted), "tx", str(wanted)
    ours, theirs = ("ethtool", "-L", pair.ifname, *words), ("ethtool", "-L", pair.peer, *words)
    if wanted > now:
        command(*ours)
        pair.namespace.run(*theirs)
    else:
        pair.namespace.run(*theirs)
        command(*ours)


@pytest.fixture
def four() -> Iterator[Veth]:
    """A pair that can have four queues, and has one."""
    with veth(queues=4) as made:
        set_channels(made, 4, 1)
        yield made


@pytest.fixture
def guest(bridge: core.Bridge) -> Iterator[Driver]:
    with contextlib.closing(Driver(bridge).start()) as made:
        made.port.set_mac(GUEST, True)
        yield made


def flows() -> list[bytes]:
    return [flow(GUEST, 1000 + number) for number in range(FLOWS)]


def all_arrive(guest: Driver, send: Callable[[int, bytes], object]) -> bool:
    """Every flow comes to the guest. Sent again until it does: while queues change, a veth is without carrier."""
    missing = dict(enumerate(flows()))

    def turn() -> bool:
        for number, each in missing.items():
            send(number, each)
        got = {packet.frame for packet in guest.pair.receive(len(missing), timeout=0.1, refill=2048)}
        for number in [number for number, each in missing.items() if each in got]:
            del missing[number]
        return not missing

    return eventually(turn)


def all_cross(guest: Driver, pair: Veth) -> bool:
    with pair.wire() as wire:
        return all_arrive(guest, lambda _, each: wire.send(each))


def sockets(port: Netdev) -> list[int]:
    return [queue for queue in range(port.room) if port.port.xsk_stats(queue).open]


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_d19_queues_that_come_under_traffic_get_sockets_and_every_flow_its_guest(
    bridge: core.Bridge, four: Veth, guest: Driver, mode: Mode
) -> None:
    with contextlib.closing(Netdev(bridge, four.ifname, mode=mode)) as port:
        port.open()
        port.sync_macs([GUEST])
        first = port.port.queue_fd(0)
        assert (port.room, port.queues, port.unserved, port.state) == (4, 1, 0, "up")
        assert all_cross(guest, four)

        async def story() -> None:
            async with Watched(port) as watch:
                with four.wire() as wire:
                    for each in flows():
                        wire.send(each)
                    set_channels(four, 1, 4)
                    for each in flows():
                        wire.send(each)
                await watch.until(lambda: port.queues == 4)
                await watch.until(lambda: port.state == "up")

        asyncio.run(story())
        assert sockets(port) == [0, 1, 2, 3]
        assert port.port.queue_fd(0) == first  # guests have sent meanwhile
        assert all_cross(guest, four)
        if mode == "native":  # else veth does not say where a frame came from
            assert all(port.port.queue_stats(queue, core.RX).packets for queue in range(4))


def test_d19_the_kernel_takes_away_no_queue_that_has_a_socket(bridge: core.Bridge, guest: Driver) -> None:
    with veth(queues=4) as pair, contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        port.sync_macs([GUEST])
        pair.namespace.run("ethtool", "-L", pair.peer, "tx", "1")
        with pytest.raises(RuntimeError, match="too low for existing"):
            command("ethtool", "-L", pair.ifname, "rx", "1", "tx", "1")
        pair.namespace.run("ethtool", "-L", pair.peer, "tx", "4")
        assert sockets(port) == [0, 1, 2, 3]
        assert all_cross(guest, pair)


class Tap:
    """A tap with several queues: it has one for each descriptor, whoever has a socket on it."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.queues: list[int] = []

    def grow(self, count: int) -> None:
        while len(self.queues) < count:
            fd = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
            self.queues.append(fd)
            flags = IFF_TAP | IFF_MULTI_QUEUE | IFF_NO_PI
            fcntl.ioctl(fd, TUNSETIFF, struct.pack("16sH22x", self.name.encode(), flags))

    def shrink(self, count: int) -> None:
        while len(self.queues) > count:
            os.close(self.queues.pop())

    def send(self, number: int, frame: bytes) -> None:
        os.write(self.queues[number % len(self.queues)], frame)


@pytest.fixture
def tap() -> Iterator[Tap]:
    made = Tap(f"xdpn{os.getpid()}v998")
    made.grow(4)
    Path(f"/proc/sys/net/ipv6/conf/{made.name}/disable_ipv6").write_text("1")
    command("ip", "link", "set", made.name, "up")
    yield made
    made.shrink(0)


@pytest.mark.skipif(not os.path.exists("/dev/net/tun"), reason="/dev/net/tun: not there (modprobe tun)")
def test_d19_sockets_of_vanished_queues_are_closed_and_come_again_with_them(
    bridge: core.Bridge, tap: Tap, guest: Driver
) -> None:
    with contextlib.closing(Netdev(bridge, tap.name, queues=4)) as port:
        port.open()
        port.sync_macs([GUEST])
        assert sockets(port) == [0, 1, 2, 3]
        assert all_arrive(guest, tap.send)
        sums = received_frames(bridge, port)

        async def story() -> None:
            async with Watched(port) as watch:
                tap.shrink(1)
                await watch.until(lambda: port.queues == 1)
                assert sockets(port) == [0]
                assert (port.state, port.unserved, port.queues_had) == ("up", 0, 4)
                assert not port.port.is_stale(port.zerocopy)
                assert all_arrive(guest, tap.send)
                # The books keep what the others had.
                assert sum(port.port.queue_stats(queue, core.RX).packets for queue in range(4)) > sums
                tap.grow(4)
                await watch.until(lambda: port.queues == 4)

        asyncio.run(story())
        assert sockets(port) == [0, 1, 2, 3]
        assert all_arrive(guest, tap.send)


def test_d19_an_interface_that_comes_back_with_other_queues_has_as_many_sockets(
    bridge: core.Bridge, guest: Driver
) -> None:
    with veth(queues=4) as pair, contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        port.sync_macs([GUEST])

        async def story() -> None:
            async with Watched(port) as watch:
                for queues in (1, 4):
                    remove(pair.ifname)
                    await watch.until(lambda: port.state == "gone")
                    add_veth(pair.ifname, pair.namespace, queues)
                    await watch.until(lambda: port.alive and port.state == "up")
                    assert sockets(port) == list(range(queues))
                    assert all_cross(guest, pair)

        asyncio.run(story())


def test_d19_more_queues_than_there_is_room_for_are_told_of_and_their_frames_counted(
    bridge: core.Bridge, four: Veth, guest: Driver, caplog: pytest.LogCaptureFixture
) -> None:
    with contextlib.closing(Netdev(bridge, four.ifname, queues=2)) as port:
        port.open()
        port.sync_macs([GUEST])
        assert "2 queues asked for, it has 1" in caplog.text

        def unserved(wire: Wire) -> int:
            for each in flows():
                wire.send(each)
            return port.verdicts()["no_socket"]

        async def story() -> None:
            async with Watched(port) as watch:
                set_channels(four, 1, 2)
                await watch.until(lambda: port.queues == 2)
                assert (port.state, port.unserved) == ("up", 0)
                set_channels(four, 2, 3)
                await watch.reach("partial")
                assert (port.queues, port.unserved) == (2, 1)
                with four.wire() as wire:
                    await watch.until(lambda: unserved(wire))
                # It is said once, with what can be done, and memory of guests is not followed for it.
                for _ in range(3):
                    port.poke()
                    await asyncio.sleep(2 * SETTLE_S)
                told = "3 receive queues and 2 AF_XDP sockets"
                assert [told in message for message in caplog.messages].count(True) == 1
                assert "or queues=3 and a restart" in caplog.text
                assert not port.port.is_stale(port.zerocopy)
                set_channels(four, 3, 2)
                await watch.reach("partial", "up")

        asyncio.run(story())
        assert port.unserved == 0
        assert all_cross(guest, four)


def test_d19_a_queue_that_somebody_else_has_is_told_of_and_taken_once_it_is_free(
    bridge: core.Bridge, four: Veth, guest: Driver, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr("xdpnet.netdev.watch.PROBE_S", 0.2)
    set_channels(four, 1, 2)
    other = core.Bridge(netdev_queues=1, frames_per_queue=256)
    other.add_netdev(2).open_queue(1, socket.if_nametoindex(four.ifname), 1518)
    # The kernel lets nobody take away the queue of a socket: the interface begins with both.
    link = require_link
    monkeypatch.setattr("xdpnet.netdev.port.require_link", lambda name: Link(**{**vars(link(name)), "rx_queues": 1}))
    with contextlib.closing(Netdev(bridge, four.ifname)) as port:
        port.open()
        port.sync_macs([GUEST])

        async def story() -> None:
            async with Watched(port) as watch:
                await watch.reach("partial")
                assert (port.queues, port.unserved) == (1, 1)
                assert "queue 1: in use" in caplog.text
                assert "guests' frames on 1 queues go to the host" in caplog.text
                other.close()
                await watch.reach("partial", "up")

        asyncio.run(story())
        assert sockets(port) == [0, 1]
        assert [("queue 1: in use" in message) for message in caplog.messages].count(True) == 1
        assert all_cross(guest, four)


def test_d19_queues_that_are_as_they_were_change_nothing(bridge: core.Bridge, caplog: pytest.LogCaptureFixture) -> None:
    with veth(queues=2) as pair, contextlib.closing(Netdev(bridge, pair.ifname)) as port:
        port.open()
        before = port._link_fd, [port.port.queue_fd(queue) for queue in (0, 1)]
        said = len(caplog.messages)

        async def story() -> None:
            async with Watched(port) as watch:
                pair.namespace.run("ethtool", "-L", pair.peer, "tx", "1")
                for _ in range(3):
                    port.poke()
                    await asyncio.sleep(2 * SETTLE_S)
                assert watch.states == []

        asyncio.run(story())
        assert (port._link_fd, [port.port.queue_fd(queue) for queue in (0, 1)]) == before
        assert len(caplog.messages) == said


# ---- the host's other addresses on the interface ----


@contextlib.contextmanager
def stacked(ifname: str, address: bytes, kind: str = "macvlan", space: str = "") -> Iterator[str]:
    """An interface on top of it, with this address, up; in a network namespace, if one is named."""
    name = f"xdpn{os.getpid()}v998"
    there = ("netns", space) if space else ()
    command(
        "ip",
        "link",
        "add",
        "link",
        ifname,
        "name",
        name,
        "address",
        address.hex(":"),
        *there,
        "type",
        kind,
        "mode",
        "bridge",
    )
    inside = ("ip", "-n", space) if space else ("ip",)
    try:
        command(*inside, "link", "set", name, "up")
        yield name
    finally:
        command(*inside, "link", "del", name)


def dropped(bridge: core.Bridge, guest: Driver, source: bytes) -> int:
    """How many of one frame with this source are refused to the guest."""
    before = guest.port.queue_stats(0, core.TX).drops["spoof"]
    guest.pair.send(BROADCAST + source + PAYLOAD)
    assert guest.pair.wait_sent()
    return guest.port.queue_stats(0, core.TX).drops["spoof"] - before


def learned(bridge: core.Bridge, guest: Driver) -> set[bytes]:
    return {entry.mac for entry in bridge.fdb_dump() if entry.port == guest.port}


@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
@pytest.mark.parametrize("elsewhere", [False, True], ids=["here", "in another namespace"])
def test_15_a_guest_cannot_take_a_second_address_of_the_host(
    bridge: core.Bridge, pair: Veth, kind: str, elsewhere: bool, caplog: pytest.LogCaptureFixture
) -> None:
    with (
        contextlib.ExitStack() as undo,
        contextlib.closing(Driver(bridge).start()) as guest,
        contextlib.closing(Netdev(bridge, pair.ifname)) as port,
        pair.wire() as wire,
    ):
        space = undo.enter_context(namespace()).name if elsewhere else ""
        undo.enter_context(stacked(pair.ifname, SECOND, kind, space))
        port.open()
        assert dropped(bridge, guest, SECOND) == 1
        assert dropped(bridge, guest, GUEST) == 0
        assert learned(bridge, guest) == {GUEST}
        port.sync_macs([GUEST, SECOND])
        assert f"a guest uses {SECOND.hex(':')}, the host's own address" in caplog.text
        before = port.verdicts()
        wire.send(frame(SECOND))
        wire.send(frame(GUEST))
        assert verdict(port, "host", before["host"] + 1)
        assert verdict(port, "redirected", before["redirected"] + 1)
        port.close()
        assert dropped(bridge, guest, SECOND) == 0


@pytest.mark.parametrize("first", [True, False], ids=["guest first", "host first"])
def test_15_an_address_of_the_host_that_comes_later_is_taken_back_and_given_up(
    bridge: core.Bridge, opened: Netdev, pair: Veth, first: bool
) -> None:
    """A guest can know it before: of VRRP, or as it was chosen by hand."""
    with contextlib.closing(Driver(bridge).start()) as guest:

        async def story() -> None:
            async with Watched(opened) as watch:
                with stacked(pair.ifname, SECOND):
                    await watch.until(lambda: SECOND in opened.addresses._guarded)
                    assert opened.addresses._macs == set()
                    assert learned(bridge, guest) == set()
                    assert dropped(bridge, guest, SECOND) == 1
                    # The filter that the interface had for the guest is not what is left of it.
                    assert SECOND.hex(":") in filters(pair.ifname)
                await watch.until(lambda: opened.addresses._guarded == {pair.mac})
            assert dropped(bridge, guest, SECOND) == 0

        if first:
            assert dropped(bridge, guest, SECOND) == 0
            opened.sync_macs(learned(bridge, guest))
            assert steers(opened, pair, SECOND)
        asyncio.run(story())


def test_15_an_address_of_the_host_in_another_namespace_is_found_by_the_next_look(
    opened: Netdev, pair: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No event tells of it."""
    monkeypatch.setattr("xdpnet.netdev.watch.PROBE_S", 0.05)

    async def story() -> None:
        with namespace() as space, stacked(pair.ifname, SECOND, space=space.name) as name:
            command("ip", "-n", space.name, "link", "set", name, "down")
            async with Watched(opened) as watch:
                await watch.until(lambda: opened.addresses._guarded == {pair.mac})
                monkeypatch.setattr(opened.wake, "set", lambda: None)
                command("ip", "-n", space.name, "link", "set", name, "up")
                await watch.until(lambda: opened.addresses._guarded == {pair.mac, SECOND})

    asyncio.run(story())


def test_15_a_bridges_own_address_is_the_hosts(opened: Netdev, pair: Veth, no_native: str) -> None:
    async def story() -> None:
        async with Watched(opened) as watch:
            command("ip", "link", "set", no_native, "address", SECOND.hex(":"))
            command("ip", "link", "set", pair.ifname, "master", no_native)
            await watch.until(lambda: opened.addresses._guarded == {pair.mac, SECOND})
            command("ip", "link", "set", pair.ifname, "nomaster")
            await watch.until(lambda: opened.addresses._guarded == {pair.mac})

    asyncio.run(story())


def test_15_what_the_interface_receives_for_guests_is_not_the_hosts(opened: Netdev, pair: Veth) -> None:
    opened.sync_macs([GUEST, SECOND])
    assert GUEST.hex(":") in filters(pair.ifname)
    for opened.addresses.stacked in False, True:
        assert opened.addresses._look(require_link(pair.ifname)) == {pair.mac}
        assert GUEST.hex(":") in filters(pair.ifname)
    with stacked(pair.ifname, SECOND):
        assert opened.addresses._look(require_link(pair.ifname)) == {pair.mac}
        opened.addresses.stacked = True
        assert opened.addresses._look(require_link(pair.ifname)) == {pair.mac, SECOND}
        assert not opened.addresses.stacked


def test_15_an_address_that_the_bridge_has_no_room_for_is_named_and_not_steered(
    bridge: core.Bridge, opened: Netdev, caplog: pytest.LogCaptureFixture
) -> None:
    many = [b"\x06" + number.to_bytes(5, "big") for number in range(core.MAX_GIVEN + 1)]
    left, errors = [], set()
    bridge.stop()  # no worker has to be waited for, many times over
    for each in many:
        try:
            opened.port.add_mac(each)
        except OSError as error:
            left.append(each)
            errors.add(error.errno)
    assert errors == {errno.ENOSPC}
    own = opened.addresses._own | {left[0], left[-1]}
    opened.addresses._claim(own)
    opened.addresses._claim(own)
    assert caplog.text.count("is not kept from guests") == 2
    assert left[0].hex(":") in caplog.text
    opened.sync_macs([left[0], GUEST])
    assert opened.addresses._macs == {GUEST}


def test_15_an_interface_with_the_address_of_another_says_nothing(
    bridge: core.Bridge, pair: Veth, opened: Netdev, caplog: pytest.LogCaptureFixture
) -> None:
    with veth() as other, contextlib.closing(Netdev(bridge, other.ifname)) as second:
        command("ip", "link", "set", other.ifname, "address", pair.mac.hex(":"))
        second.open()
        assert second.addresses._own == {pair.mac}
        assert not [
            record for record in caplog.records if record.levelname == "WARNING" and "address" in record.message
        ]
        # Once the first has it no more, it is the second's.
        opened.close()
        assert pair.mac not in {entry.mac for entry in bridge.fdb_dump()}
        second.follow_addresses(require_link(other.ifname))
        assert second.addresses._guarded == {pair.mac}


@pytest.mark.parametrize("length", [0, 1, 15, 16, 31, 32, 4096, 0xFFFFFFFF])
def test_events_with_lengths_that_are_none_are_read_to_their_end(length: int) -> None:
    for tail in b"", b"\0" * 5, bytes(64):
        assert not concerns(struct.pack("=IHHIIBxHiII", length, 16, 0, 0, 0, 0, 1, 7, 0, 0) + tail, 8)
        assert concerns(struct.pack("=IHHIIBxHiII", length, 16, 0, 0, 0, 0, 1, 7, 0, 0) + tail, 7)
    stacked_on = struct.pack("=HHiHHi", 5, 4, 9, 8, 5, 8)
    assert concerns(struct.pack("=IHHIIBxHiII", 32 + 16, 16, 0, 0, 0, 0, 1, 7, 0, 0) + stacked_on, 8)
    assert not concerns(struct.pack("=IHHIIBxHiII", 32 + 16, 20, 0, 0, 0, 0, 1, 7, 0, 0) + stacked_on, 8)


# ---- questions about an interface ----


def test_a_link_is_found_inside_and_outside_of_asyncio(pair: Veth) -> None:
    async def inside() -> Link | None:
        return find_link(pair.ifname)

    link = find_link(pair.ifname)
    assert link == asyncio.run(inside())
    assert link is not None
    assert (link.kind, link.address, link.mtu, link.up) == ("veth", pair.mac, 1500, True)


@contextlib.contextmanager
def child(pair: Veth, kind: str, mode: str) -> Iterator[str]:
    name = f"xdpn{os.getpid()}v995"
    command("ip", "link", "add", "link", pair.ifname, "name", name, "type", kind, "mode", mode)
    try:
        command("ip", "link", "set", name, "up")
        yield name
    finally:
        remove(name)


def test_a_device_without_a_mac_address_is_refused(pair: Veth) -> None:
    link = Link(**{**vars(require_link(pair.ifname)), "address": b""})
    with pytest.raises(SetupError, match="not an Ethernet device"):
        fitness.check_link(link)


@pytest.mark.parametrize("mode", ["bridge", "private", "vepa", "source"])
@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_a_child_that_gets_no_frames_of_guests_is_refused_with_what_works(
    bridge: core.Bridge, pair: Veth, kind: str, mode: str
) -> None:
    with child(pair, kind, mode) as name, pytest.raises(SetupError, match=f"a {kind} in {mode} mode") as failure:
        Netdev(bridge, name).open()
    assert "passthru" in failure.value.remedy
    assert pair.ifname in failure.value.remedy


def like(pair: Veth, **changes: Any) -> Link:
    """Of a kind that this kernel may not have."""
    return dataclasses.replace(require_link(pair.ifname), **changes)


@pytest.mark.parametrize("kind", ["ipvlan", "ipvtap"])
def test_35_a_child_that_has_its_parents_address_is_refused_with_what_works(pair: Veth, kind: str) -> None:
    with pytest.raises(SetupError, match=f"an {kind} has one address with") as failure:
        fitness.check_link(like(pair, kind=kind, peer="eth7"))
    assert "passthru" in failure.value.remedy
    assert "eth7" in failure.value.remedy


@pytest.mark.parametrize("kind", fitness.UNFIT)
def test_35_what_has_no_other_end_is_refused(pair: Veth, kind: str) -> None:
    with pytest.raises(SetupError, match=re.escape(fitness.UNFIT[kind])):
        fitness.check_link(like(pair, kind=kind))


@pytest.mark.parametrize("kind", ["lo", "ifb", "tun"])
def test_35_real_ones_without_frames_of_guests_are_refused(bridge: core.Bridge, kind: str) -> None:
    name = "lo" if kind == "lo" else f"xdpn{os.getpid()}v993"
    try:
        if kind == "ifb":
            command("ip", "link", "add", name, "type", kind)
        elif kind == "tun":
            command("ip", "tuntap", "add", name, "mode", kind)
        with pytest.raises(SetupError, match=r"its frames come from|were redirected|not an Ethernet"):
            Netdev(bridge, name).open()
    finally:
        if kind != "lo":
            remove(name)


def test_35_what_leads_to_a_switch_is_refused_and_what_is_in_the_air_is_told_of(
    pair: Veth, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = require_link(pair.ifname)
    monkeypatch.setattr(fitness, "SYSFS", tmp_path)
    assert not any("wireless" in line for line in fitness.advise(link, "native", []))
    (tmp_path / pair.ifname / "phy80211").mkdir(parents=True)
    assert any("a wireless station has its own address alone" in line for line in fitness.advise(link, "native", []))
    fitness.check_link(link)
    (tmp_path / pair.ifname / "dsa").mkdir()
    with pytest.raises(SetupError, match="tags of the switch"):
        fitness.check_link(link)


@pytest.mark.parametrize(("kind", "told"), [("bond", True), ("team", True), ("bridge", False)])
def test_35_a_port_of_a_bond_is_told_of_and_one_of_a_bridge_is_not(
    pair: Veth, monkeypatch: pytest.MonkeyPatch, kind: str, told: bool
) -> None:
    name = f"xdpn{os.getpid()}v993"
    command("ip", "link", "add", name, "type", "bridge")
    try:
        command("ip", "link", "set", pair.ifname, "master", name)
        monkeypatch.setattr(fitness, "find_link", lambda index: dataclasses.replace(require_link(index), kind=kind))
        advice = fitness.advise(require_link(pair.ifname), "native", [])
        assert any(f"a port of {kind} {name}" in line and f"take {name}" in line for line in advice) is told
    finally:
        remove(name)


@pytest.mark.parametrize("kind", ["macvlan", "macvtap"])
def test_a_child_that_gets_all_frames_serves_a_guest(bridge: core.Bridge, pair: Veth, guest: Driver, kind: str) -> None:
    with child(pair, kind, "passthru") as name, contextlib.closing(Netdev(bridge, name)) as port:
        port.open()
        port.sync_macs([GUEST])
        guest.pair.fill()
        with pair.wire() as wire:
            wire.send(frame(GUEST))
            assert guest.pair.frames() == [frame(GUEST)]
            guest.pair.send(frame(pair.peer_mac, GUEST))
            assert wire.receive(lambda got: got == frame(pair.peer_mac, GUEST)) is not None


def test_the_loopback_interface_is_refused_for_what_it_is(bridge: core.Bridge) -> None:
    with pytest.raises(SetupError, match="interface lo: its frames come from this host"):
        Netdev(bridge, "lo").open()


def test_an_ifb_is_refused(bridge: core.Bridge) -> None:
    name = f"xdpn{os.getpid()}v996"
    try:
        command("ip", "link", "add", name, "type", "ifb")
    except RuntimeError as error:
        pytest.skip(f"no ifb here: {error}")
    try:
        command("ip", "link", "set", name, "up")
        with pytest.raises(SetupError, match="it sends frames on only that were redirected to it"):
            Netdev(bridge, name).open()
    finally:
        remove(name)


# ---- VLAN tags ----


@pytest.fixture
def strips(monkeypatch: pytest.MonkeyPatch, pair: Veth) -> Veth:
    """As a NIC has it: its own features decide. On veth they can be switched, too, but the peer's do."""
    monkeypatch.setattr(fitness, "STRIPPED_BY_PEER", frozenset())
    return pair


def test_c30_vlan_stripping_is_off_while_the_port_is_open(bridge: core.Bridge, strips: Veth) -> None:
    port = Netdev(bridge, strips.ifname)
    port.open()
    assert fitness.stripping(strips.ifname) == []
    port.close()
    assert fitness.stripping(strips.ifname) == list(fitness.VLAN_STRIPPING)


def test_vlan_stripping_that_was_off_stays_off(bridge: core.Bridge, strips: Veth) -> None:
    command("ethtool", "-K", strips.ifname, "rxvlan", "off")
    with contextlib.closing(Netdev(bridge, strips.ifname)) as port:
        port.open()
    assert fitness.stripping(strips.ifname) == ["rx-vlan-stag-hw-parse"]


def test_vlan_stripping_is_put_back_if_the_port_does_not_open(
    bridge: core.Bridge, strips: Veth, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        assert fitness.stripping(strips.ifname) == []
        raise OSError(errno.EPERM, "refused")

    monkeypatch.setattr(core, "bpf_xdp_link", refuse)
    with pytest.raises(SetupError):
        Netdev(bridge, strips.ifname).open()
    assert fitness.stripping(strips.ifname) == list(fitness.VLAN_STRIPPING)


def test_vlan_stripping_is_off_again_when_the_interface_is_back(bridge: core.Bridge, strips: Veth) -> None:
    port = Netdev(bridge, strips.ifname)
    port.open()

    async def story() -> None:
        async with Watched(port) as watch:
            remove(strips.ifname)
            await watch.reach("gone")
            add_veth(strips.ifname, strips.namespace)
            assert fitness.stripping(strips.ifname) != []
            while not port.alive:
                await asyncio.sleep(0.02)

    asyncio.run(story())
    assert fitness.stripping(strips.ifname) == []
    port.close()
    assert fitness.stripping(strips.ifname) == list(fitness.VLAN_STRIPPING)


def test_vlan_stripping_is_put_back_under_another_name(bridge: core.Bridge, strips: Veth) -> None:
    name = f"xdpn{os.getpid()}v997"
    port = Netdev(bridge, strips.ifname)
    port.open()
    command("ip", "link", "set", strips.ifname, "name", name)
    try:
        port.close()
        assert fitness.stripping(name) == list(fitness.VLAN_STRIPPING)
    finally:
        command("ip", "link", "set", name, "name", strips.ifname)


def test_the_features_of_veth_are_left_alone(opened: Netdev, pair: Veth) -> None:
    assert opened.alive
    assert fitness.stripping(pair.ifname) == list(fitness.VLAN_STRIPPING)


TAGGER = b"""
#include <uapi/linux/bpf.h>
int tag(struct __sk_buff *skb) { bpf_skb_vlan_push(skb, __builtin_bswap16(0x8100), 100); return 0; }
"""


@contextlib.contextmanager
def tags_beside_frames(pair: Veth) -> Iterator[None]:
    """What the peer sends leaves its stack with a tag of VLAN 100, which its hardware is to put in."""
    with clsact.loaded(TAGGER, b"tag") as program:
        pair.namespace.call(lambda: clsact.attach(program, pair.peer, clsact.EGRESS))
        yield


@pytest.mark.parametrize("mode", ["native", "generic"])
def test_on_veth_the_peer_decides_whether_a_tag_arrives(bridge: core.Bridge, pair: Veth, mode: Mode) -> None:
    plain, tagged = frame(GUEST), GUEST + STRANGER + b"\x81\0\0\x64" + PAYLOAD
    with (
        tags_beside_frames(pair),
        contextlib.closing(Netdev(bridge, pair.ifname, mode=mode)) as port,
        contextlib.closing(Driver(bridge)) as guest,
        pair.wire() as wire,
    ):
        port.open()
        port.sync_macs([GUEST])
        guest.port.set_mac(GUEST, False)
        guest.start().pair.fill()
        for ours, peers, arrives in (("on", "on", plain), ("off", "on", plain), ("on", "off", tagged)):
            command("ethtool", "-K", pair.ifname, "rxvlan", ours)
            pair.namespace.run("ethtool", "-K", pair.peer, "txvlan", peers)
            wire.send(frame(GUEST))
            assert guest.pair.frames() == [arrives]
