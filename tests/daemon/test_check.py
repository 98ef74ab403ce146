"""check.py: each line says what is there, or what is missing and the remedy."""

import errno
import os
import re
import resource
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.daemon import daemon, guest
from tests.rig.netns import Veth, command, needs_root
from tests.rig.refuse import IO_SETUP
from tests.rig.waiting import until
from xdpnet import check, config, core, descriptors
from xdpnet.bpf import loader
from xdpnet.check import Check, run_checks
from xdpnet.errors import SetupError
from xdpnet.netdev import fitness
from xdpnet.netdev.link import xdp_features
from xdpnet.netdev.privileged import XDP_FLAGS

PEER = f"xdpn{os.getpid()}v998"


def by_name(checks: list[Check]) -> dict[str, Check]:
    return {line.name: line for line in checks}


@needs_root
def test_a_machine_that_can_run_xdpnet_passes_all_that_is_required() -> None:
    checks = run_checks()
    assert [line for line in checks if line.required and not line.ok] == []
    assert {"kernel", "AF_XDP", "capabilities", "bcc", "kernel headers", "locked memory", "interrupts"} <= by_name(
        checks
    ).keys()


def test_every_line_that_fails_names_its_remedy() -> None:
    for line in run_checks(["xdpn-no-such-if"]):
        assert line.ok or line.remedy, line


def test_nothing_is_left_open() -> None:
    run_checks()
    before = sorted(os.listdir("/proc/self/fd"))
    run_checks()
    assert sorted(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize(("release", "ok"), [("5.9.0", True), ("5.8.18-amd64", False), ("10.0.1-rc1", True)])
def test_the_kernel_must_have_xdp_links(monkeypatch: pytest.MonkeyPatch, release: str, ok: bool) -> None:
    uname = os.uname()
    monkeypatch.setattr(os, "uname", lambda: os.uname_result((uname[0], uname[1], release, uname[3], uname[4])))
    assert check._check("kernel", check._kernel).ok is ok


def test_a_kernel_without_af_xdp_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(check, "AF_XDP", 0xFFF)  # a family that no kernel has
    line = check._check("AF_XDP", check._af_xdp)
    assert not line.ok
    assert "CONFIG_XDP_SOCKETS" in line.remedy


@pytest.mark.skipif(IO_SETUP is None, reason="the number of io_setup is not known for this machine")
@pytest.mark.parametrize(
    ("error", "remedy"),
    [(errno.ENOSYS, "CONFIG_AIO"), (errno.EPERM, "sandbox"), (errno.EAGAIN, "fs.aio-max-nr")],
    ids=["not in the kernel", "forbidden", "used up"],
)
@pytest.mark.parametrize("words", [["check"], ["run", "--guest", "vm,socket=/nonexistent/s"]], ids=["check", "run"])
def test_a_machine_where_guests_cannot_be_interrupted_is_told_why(words: list[str], error: int, remedy: str) -> None:
    refused = [sys.executable, "-m", "tests.rig.refuse", str(IO_SETUP), str(error)]
    result = subprocess.run(
        [*refused, sys.executable, "-m", "xdpnet", *words], capture_output=True, text=True, check=False, timeout=60
    )
    assert result.returncode != 0
    assert remedy in result.stdout + result.stderr


@pytest.mark.parametrize(
    ("bits", "missing"),
    [
        ([12, 13, 14, 39], ""),
        ([12, 13, 14, 21], ""),
        ([13, 14, 39], "CAP_NET_ADMIN missing"),
        ([12, 14, 39], "CAP_NET_RAW missing"),
        ([12, 13, 39], "CAP_IPC_LOCK missing"),
        ([12, 13, 14], "CAP_BPF missing"),
        ([], "CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF, CAP_IPC_LOCK missing"),
    ],
)
def test_missing_capabilities_are_named(bits: list[int], missing: str) -> None:
    effective = sum(1 << bit for bit in bits)
    if not missing:
        assert "NET_ADMIN" in check._capabilities(effective)
        return
    with pytest.raises(SetupError) as failure:
        check._capabilities(effective)
    assert failure.value.message == missing


@pytest.mark.parametrize(("extra", "ok"), [(0, True), (-1, False)])
def test_locked_memory_must_do_for_one_queue(monkeypatch: pytest.MonkeyPatch, extra: int, ok: bool) -> None:
    monkeypatch.setattr(check, "_effective_capabilities", lambda: 0)
    monkeypatch.setattr(resource, "getrlimit", lambda _: (check.QUEUE_MEMORY + extra, resource.RLIM_INFINITY))
    line = check._check("locked memory", check._locked_memory)
    assert line.ok is ok
    assert ok or "LimitMEMLOCK" in line.remedy


def test_open_files_are_counted_in_guests(monkeypatch: pytest.MonkeyPatch) -> None:
    guests = [config.GuestConfig(name=f"g{n}", socket=f"/run/{n}", queues=16) for n in range(2)]
    made = config.Config(guest=tuple(guests), netdev=(config.NetdevConfig(interface="eth1"),))
    for guest_count, limit in (2, descriptors.needed(made)), (1, descriptors.needed(made) - 1), (0, 256):
        monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (1024, limit))
        line = check._check("open files", check._open_files, required=False)
        assert line.ok is (guest_count > 0)
        assert f"for {guest_count} guests" in line.detail or "LimitNOFILE" in line.remedy


def test_a_missing_interface_is_one_line_with_those_that_exist() -> None:
    lines = [line for line in run_checks(["xdpn-no-such-if"]) if line.name.startswith("xdpn-no-such-if")]
    assert len(lines) == 1
    assert not lines[0].ok
    assert "lo" in lines[0].remedy


def interface(wire: Veth) -> dict[str, Check]:
    lines = by_name(run_checks([wire.ifname]))
    return {name.removeprefix(wire.ifname).strip(): line for name, line in lines.items()}


@needs_root
@pytest.mark.net
def test_an_interface_that_is_ready(wire: Veth) -> None:
    lines = interface(wire)
    assert (lines["state"].ok, lines["queues"].ok, lines["native XDP"].ok) == (True, True, True)
    assert "MTU 1500" in lines["state"].detail
    assert lines["queues"].detail == "1 receive queue"


@needs_root
@pytest.mark.net
def test_an_interface_that_is_down(wire: Veth) -> None:
    command("ip", "link", "set", wire.ifname, "down")
    state = interface(wire)["state"]
    assert not state.ok
    assert state.remedy == f"ip link set dev {wire.ifname} up"


@needs_root
@pytest.mark.net
def test_an_mtu_of_large_frames_is_for_kernels_that_have_them(wire: Veth, monkeypatch: pytest.MonkeyPatch) -> None:
    command("ip", "link", "set", wire.ifname, "mtu", "9000")
    lines = interface(wire)
    assert (lines["state"].ok, lines["native XDP"].ok) == (True, True)
    monkeypatch.setattr(fitness, "FRAGS_KERNEL", (999, 0))
    state = interface(wire)["state"]
    assert not state.ok
    assert f"mtu {fitness.PLAIN_MTU}" in state.remedy
    command("ip", "link", "set", wire.ifname, "mtu", str(fitness.PLAIN_MTU))
    assert interface(wire)["state"].ok


@needs_root
@pytest.mark.net
def test_an_mtu_beyond_the_limit(wire: Veth) -> None:
    command("ip", "link", "set", wire.ifname, "mtu", str(fitness.MAX_MTU + 1))
    assert not interface(wire)["state"].ok


@needs_root
@pytest.mark.net
def test_vlan_tags_beside_the_frame_are_advice_that_names_the_peer(wire: Veth) -> None:
    offloads = interface(wire)["offloads"]
    assert (offloads.ok, offloads.required) == (False, False)
    assert "ethtool -K PEER txvlan off" in offloads.remedy
    command("ip", "-n", wire.namespace.name, "link", "set", wire.peer, "netns", str(os.getpid()), "name", PEER)
    assert f"ethtool -K {PEER} txvlan off" in interface(wire)["offloads"].remedy
    command("ethtool", "-K", PEER, "txvlan", "off")
    assert "offloads" not in interface(wire)


@needs_root
@pytest.mark.net
def test_vlan_tags_that_hardware_takes_out_are_no_trouble(wire: Veth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "STRIPPED_BY_PEER", frozenset())
    lines = interface(wire)
    assert lines["VLAN tags"].ok
    assert "offloads" not in lines
    assert fitness.stripping(wire.ifname) == list(fitness.VLAN_STRIPPING)
    for feature in fitness.VLAN_STRIPPING:
        command("ethtool", "-K", wire.ifname, feature, "off")
    assert "VLAN tags" not in interface(wire)


@needs_root
@pytest.mark.net
def test_vlan_tags_that_hardware_always_takes_out_are_an_obstacle(wire: Veth, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fitness, "STRIPPED_BY_PEER", frozenset())
    monkeypatch.setattr(check, "fixed_features", lambda _: frozenset(fitness.VLAN_STRIPPING))
    lines = interface(wire)
    assert "VLAN tags" not in lines
    assert "rx-vlan-hw-parse off" in lines["offloads"].remedy


@needs_root
@pytest.mark.net
def test_the_interface_of_a_running_daemon_is_in_good_hands(wire: Veth, tmp_path: Path) -> None:
    with daemon(tmp_path, "--guest", guest(tmp_path), "--netdev", wire.ifname) as running:
        running.ready()
        lines = interface(wire)
        assert [line for line in lines.values() if line.required and not line.ok] == []
        assert f"in the hands of xdpnet, process {running.process.pid} (" in lines["state"].detail


@needs_root
@pytest.mark.net
def test_an_interface_in_other_hands_is_named_with_what_frees_it(wire: Veth, tmp_path: Path) -> None:
    program = loader.load(1, 1)
    link = core.bpf_xdp_link(program.prog_fd, socket.if_nametoindex(wire.ifname), XDP_FLAGS["native"])
    state = interface(wire)["state"]
    assert not state.ok
    assert state.remedy.startswith(f"end process {os.getpid()} (")
    os.close(link)
    until(lambda: interface(wire)["state"].ok)
    program.close()


@needs_root
@needs.program("clang", "clang")
@pytest.mark.net
@pytest.mark.parametrize("mode", ["xdp", "xdpgeneric"])
def test_a_program_that_ip_attached_goes_by_the_command_that_is_proposed(wire: Veth, tmp_path: Path, mode: str) -> None:
    source = tmp_path / "pass.c"
    source.write_text('__attribute__((section("xdp"), used)) int pass(void *ctx) { return 2; }')
    subprocess.run(["clang", "-O2", "-target", "bpf", "-c", source, "-o", tmp_path / "pass.o"], check=True)
    command("ip", "link", "set", "dev", wire.ifname, mode, "obj", str(tmp_path / "pass.o"), "sec", "xdp")
    state = interface(wire)["state"]
    assert not state.ok
    found = re.search(r"ip link set dev \S+ \S+ off", state.remedy)
    assert found is not None
    command(*found[0].split())
    assert interface(wire)["state"].ok


@needs_root
@pytest.mark.net
def test_a_bridge_has_the_advice_that_run_gives(wire: Veth, monkeypatch: pytest.MonkeyPatch) -> None:
    bridge = f"xdpn{os.getpid()}br"
    command("ip", "link", "add", bridge, "up", "type", "bridge")
    try:
        command("ip", "link", "set", wire.ifname, "master", bridge)
        lines = by_name(run_checks([bridge]))
        assert lines[f"{bridge} state"].ok
        if lines[f"{bridge} native XDP"].ok:
            pytest.skip("this kernel does not tell that a bridge has no native XDP: netdev-genl came with Linux 6.3")
        assert "gro off" in lines[f"{bridge} offloads"].remedy
        with monkeypatch.context() as blind:
            blind.setattr(loader, "tells", dict)
            said = [line.detail for line in run_checks([bridge]) if line.name == f"{bridge} offloads"]
        assert any("which datagrams are several in one" in detail for detail in said)
        command("ethtool", "-K", bridge, "gro", "off")
        assert f"{bridge} offloads" not in by_name(run_checks([bridge]))
    finally:
        command("ip", "link", "del", bridge)


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (errno.EACCES, "usermod -aG kvm"),
        (errno.EPERM, "a container has to be given it"),
        (errno.ENOENT, "firmware"),
        (errno.ENOENT, "a container has to be given it"),
        (errno.ENODEV, "modprobe"),
    ],
)
def test_why_kvm_cannot_be_opened_is_what_its_remedy_is_about(error: int, remedy: str) -> None:
    assert remedy in check._kvm_remedy(OSError(error, os.strerror(error)))


def test_a_kvm_that_is_not_there_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(check, "KVM", str(tmp_path / "kvm"))
    line = check._check("KVM", check._kvm, required=False)
    assert (line.ok, line.required) == (False, False)
    assert "No such file" in line.detail
    assert "firmware" in line.remedy


@needs.guest
@pytest.mark.guest
def test_kvm_is_believed_when_a_guest_has_booted_with_it() -> None:
    line = by_name(run_checks())["KVM"]
    if not os.access(check.KVM, os.R_OK | os.W_OK):
        assert not line.ok
    else:
        assert "boots a guest" in line.detail if line.ok else "ACCEL=tcg" in line.remedy


def test_a_driver_without_native_xdp_is_told_before_it_is_tried() -> None:
    index = socket.if_nametoindex("lo")
    if xdp_features(index) is None:
        pytest.skip("this kernel does not tell: netdev-genl came with Linux 6.3")
    with pytest.raises(SetupError) as failure:
        check._native(index, 1500)
    assert "mode=generic" in failure.value.remedy
