"""Tunnels of Linux' own making, between two Linux guests and between a guest and this kernel: TCP both ways, and UDP.

      "far" -- QEMU's tap -- bridge -- far0 === xdpn0 -- xdpnet -- "near"

A guest leaves the innermost checksum to its card, whatever it has put around it, and QEMU's tap hands it on to this
kernel as what it is: partial. A guest has the tunnels that this kernel lacks.
"""

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass

import pytest

from tests.guest.test_offloads import lost
from tests.native import compile_program
from tests.rig import needs
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [
    pytest.mark.net,
    pytest.mark.guest,
    needs.root,
    needs.guest,
    needs.program("ip", "iproute2"),
    pytest.mark.timeout(900),
]

PORT = 5000
SIZE = 1 << 18
TAP = "xdpnt0"
NEAR, FAR, HERE = 1, 2, 3
MACS = {NEAR: "52:54:00:78:66:01", FAR: "52:54:00:78:66:02"}
# In the order in which they are loaded.
MODULES = (
    *initramfs.MODULES,
    *("llc", "stp", "garp", "mrp", "8021q", "udp_tunnel", "ip6_udp_tunnel", "ip_tunnel", "tunnel4", "tunnel6", "gre"),
    *("vxlan", "geneve", "ip_gre", "ip6_tunnel", "ip6_gre", "ipip", "sit", "fou", "mpls_router", "mpls_iptunnel"),
    *("l2tp_core", "l2tp_netlink", "l2tp_eth", "l2tp_ip"),
)


# Room for what is around it, and no frames of its own.
ADDRESSES = """
cd /proc/sys/net/ipv6/conf/tun0; echo 0 >accept_dad; echo 0 >disable_ipv6; $ip link set tun0 up mtu 1280
$ip address replace {}/24 dev tun0; $ip -6 address replace {}/64 dev tun0
"""


def address(end: int, version: int = 4, inner: bool = False) -> str:
    net = 88 if inner else 66
    return f"10.{net}.0.{end}" if version == 4 else f"fd{net}::{end}"


def linked(what: str, version: int = 4) -> Callable[[int, int], str]:
    """A tunnel device tun0, between addresses of this version."""

    def script(own: int, other: int) -> str:
        remote = f"remote {address(other, version)}"
        ends = what.replace("ENDS", f"local {address(own, version)} REMOTE").replace("REMOTE", remote)
        return f"$ip link add tun0 type {ends}"

    return script


def tagged(own: int, other: int) -> str:
    names = ["$dev", "tag1", "tag2", "tun0"]
    return "\n".join(
        f"$ip link add link {below} name {name} type vlan id {number} && $ip link set {name} up"
        for number, (below, name) in enumerate(itertools.pairwise(names), 5)
    )


def labelled(own: int, other: int) -> str:
    """No tunnel but routes: the device only has the addresses."""
    routes = [
        f"$ip -{version} route replace {address(other, version, True)} src {address(own, version, True)} "
        f" encap mpls {100 + other} via {address(other, version)} dev $dev"
        for version in (4, 6)
    ]
    return "\n".join(
        [
            "echo 1000 >/proc/sys/net/mpls/platform_labels; echo 1 >/proc/sys/net/mpls/conf/$dev/input",
            f"$ip -f mpls route add {100 + own} dev lo; $ip link add link $dev name tun0 type vlan id 9",
            f"{ADDRESSES.format(*(address(own, version, True) for version in (4, 6)))}",
            *routes,
        ]
    )


def l2tp(encapsulation: str) -> Callable[[int, int], str]:
    def script(own: int, other: int) -> str:
        ports = "udp_sport 1701 udp_dport 1701 udp_csum on" if encapsulation == "udp" else ""
        return f"""
            $ip l2tp add tunnel tunnel_id {own} peer_tunnel_id {other} encap {encapsulation} {ports} \\
                local {address(own)} remote {address(other)}
            $ip l2tp add session name tun0 tunnel_id {own} session_id 7 peer_session_id 7 \\
                cookie 01020304 peer_cookie 01020304
        """

    return script


def over_udp(what: str, protocol: str, header: str) -> Callable[[int, int], str]:
    def script(own: int, other: int) -> str:
        listen = "gue" if header == "gue" else f"ipproto {protocol}"
        encap = f"encap {header} encap-sport auto encap-dport 5555 encap-csum"
        return f"$ip fou add port 5555 {listen} && {linked(f'{what} ENDS {encap}')(own, other)}"

    return script


TUNNELS: dict[str, Callable[[int, int], str]] = {
    "vxlan on 8472": linked("vxlan id 7 ENDS dstport 8472"),
    "vxlan on 4789 with a sum": linked("vxlan id 7 ENDS dstport 4789 udpcsum"),
    "vxlan on 12345 over ipv6": linked("vxlan id 7 ENDS dstport 12345 udp6zerocsumtx udp6zerocsumrx", 6),
    "vxlan on 12345 over ipv6 with a sum": linked("vxlan id 7 ENDS dstport 12345", 6),
    "geneve": linked("geneve id 7 REMOTE"),
    "geneve over ipv6": linked("geneve id 7 REMOTE udpcsum", 6),
    "gre": linked("gre ENDS"),
    "gre with all fields": linked("gre ENDS key 5 seq csum"),
    "gretap": linked("gretap ENDS key 5"),
    "gre over ipv6": linked("ip6gre ENDS key 5 csum", 6),
    "gretap over ipv6": linked("ip6gretap ENDS", 6),
    "erspan": linked("erspan ENDS seq key 5 erspan_ver 1 erspan 9"),
    "erspan 2": linked("erspan ENDS seq key 5 erspan_ver 2 erspan_dir egress erspan_hwid 7"),
    "ip in ip": linked("ipip ENDS mode any"),
    "ipv6 in ipv4": linked("sit ENDS mode any"),
    "ip in ipv6": linked("ip6tnl ENDS mode any encaplimit none", 6),
    "ip in ipv6 with an option": linked("ip6tnl ENDS mode any", 6),
    "fou": over_udp("ipip", "4", "fou"),
    "gue": over_udp("ipip", "4", "gue"),
    "gre over fou": over_udp("gre", "47", "fou"),
    "three tags": tagged,
    "mpls": labelled,
    "l2tp": l2tp("ip"),
    "l2tp over udp": l2tp("udp"),
}
# What they do not carry.
ONLY = {"ipv6 in ipv4": (6,), "ip in ip": (4,), "fou": (4,), "gue": (4,)}


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    near: Guest
    far: Guest


@pytest.fixture(scope="module")
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    transfer = compile_program("transfer", directory)
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, directory / "initramfs", (*initramfs.PROGRAMS, "ip", str(transfer)), MODULES)
    accel = best_accelerator(kernel, initrd, directory)
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        net.far.run("ip", "link", "add", "bridge", "type", "bridge")
        net.far.run("ip", "tuntap", "add", TAP, "mode", "tap")
        for interface in TAP, topology.FAR_IF:
            net.far.run("ip", "link", "set", interface, "up", "master", "bridge")
        net.far.run("ip", "link", "set", "bridge", "up")
        net.far.run("ethtool", "-K", topology.FAR_IF, "txvlan", "off")  # AF_XDP loses a tag that is beside the frame
        net.far.run("ip", "address", "add", f"{address(HERE)}/24", "dev", "bridge")
        arguments = ["--netdev", f"{topology.HOST_IF},mode={request.param}"]
        arguments += ["--guest", f"near,socket={directory}/socket,mac={MACS[NEAR]}"]
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)
        server = net.far.spawn([str(transfer), "serve", str(PORT)], directory / "here.log")
        stack.callback(process.end, server)
        await_listener(net.far, PORT)
        near = Guest(directory, kernel, initrd, [Card(directory / "socket", MACS[NEAR])], accel, name="xdpn-near")
        tap = f"tap,id=tap,ifname={TAP},script=no,downscript=no,vhost=off"
        far = Guest(
            directory,
            kernel,
            initrd,
            [],
            accel,
            name="xdpn-far",
            options=("-netdev", tap, "-device", f"virtio-net-pci,netdev=tap,mac={MACS[FAR]},romfile=,vectors=0"),
        )
        far.qemu = type(far.qemu)(tuple(net.far.command(*far.qemu.command)))
        for guest, own in (near, NEAR), (far, FAR):
            stack.enter_context(closing(guest.start()))
            guest.check(
                "cd /proc/sys/net/ipv6/conf\n"
                "for at in default eth0; do echo 0 >$at/accept_dad; echo 0 >$at/disable_ipv6; done\n"
                f"ip link set eth0 up; ip address add {address(own)}/24 dev eth0\n"
                f"ip -6 address add {address(own, 6)}/64 dev eth0; transfer serve {PORT} >/dev/null 2>&1 &"
            )
        backend.await_guest("near")
        near.check(f"ping -c 1 -w 20 {address(FAR)}")
        yield Stage(net, backend, near, far)
        assert backend.stop() == 0, process.tail(backend.log)


def build(run: Callable[[str], str], name: str, own: int, other: int) -> None:
    addresses = ADDRESSES.format(*(address(own, version, True) for version in (4, 6)))
    run("\n".join(["set -e; ip=/usr/bin/ip; dev=eth0", TUNNELS[name](own, other), addresses]))


def exchange(end: Guest, there: str) -> None:
    """TCP up and down, and datagrams that are echoed."""
    said = end.check(f"transfer with {there} {PORT} {SIZE} {SIZE // 16} 1,2,17,255,1000,1200", timeout=120)
    sums = re.findall(r": (\d+) bytes, (\w+) here, (\w+) there", said)
    assert [int(count) for count, _, _ in sums] == [SIZE] * 2, said
    assert all(here == there for _, here, there in sums), said


REMOVE = """
ip=/usr/bin/ip; for name in tun0 tag2 tag1; do $ip link del $name; done
$ip l2tp del session tunnel_id 1 session_id 7; $ip l2tp del session tunnel_id 2 session_id 7
$ip l2tp del tunnel tunnel_id 1; $ip l2tp del tunnel tunnel_id 2
$ip fou del port 5555; $ip fou del port 5555 gue; $ip -f mpls route flush; true
"""


@pytest.mark.parametrize(
    ("stage", "name"),
    [("native", name) for name in TUNNELS] + [("generic", name) for name in ("vxlan on 8472", "gretap", "mpls")],
    indirect=["stage"],
)
def test_a_tunnel_between_two_guests_carries_tcp_both_ways(stage: Stage, name: str) -> None:
    try:
        build(stage.near.check, name, NEAR, FAR)
        build(stage.far.check, name, FAR, NEAR)
        versions = ONLY.get(name, (4, 6))
        exchange(stage.near, address(FAR, versions[0], True))
        exchange(stage.far, address(NEAR, versions[-1], True))
    finally:
        for guest in stage.near, stage.far:
            guest.run(REMOVE)
    assert balanced(stage.backend.settled())


@pytest.mark.parametrize("name", ["vxlan on 8472", "vxlan on 4789 with a sum"])
@pytest.mark.parametrize("stage", ["native", "generic"], indirect=True)
def test_a_tunnel_of_this_kernels_carries_tcp_both_ways(stage: Stage, name: str) -> None:
    def here(script: str) -> str:
        return stage.net.far.run("sh", "-c", script.replace("/usr/bin/ip", "ip").replace("dev=eth0", "dev=bridge"))

    try:
        build(stage.near.check, name, NEAR, HERE)
        build(here, name, HERE, NEAR)
        for version in 4, 6:
            exchange(stage.near, address(HERE, version, True))
    finally:
        stage.near.run(REMOVE)
        here("ip link del tun0")
    assert balanced(snapshot := stage.backend.settled())
    assert not lost(snapshot)["oversize"]
