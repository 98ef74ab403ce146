"""What the kernel says about a network interface: rtnetlink, ethtool and netdev-genl questions, no privilege needed.

A Link is a snapshot. pyroute2's synchronous calls run an event loop of their own, so each question is put in a short
thread: callers may, but need not, be inside asyncio.
Reference: kernel Documentation/netlink/specs/rt-link.yaml and netdev.yaml.
"""

import errno
import os
import re
import socket
import struct
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pyroute2.ethtool.ioctl import IoctlEthtool, NoSuchDevice, NotSupportedError
from pyroute2.iproute.linux import IPRoute
from pyroute2.netlink import NLM_F_REQUEST, genlmsg
from pyroute2.netlink.exceptions import NetlinkError
from pyroute2.netlink.generic import GenericNetlinkSocket

from xdpnet import threads
from xdpnet.errors import SetupError

IFF_UP = 1
IFF_LOOPBACK = 8
IFF_RUNNING = 0x40
AF_BRIDGE = 7
RTM_NEWLINK, RTM_DELLINK = 16, 17
IFLA_LINK = 5
NETDEV_CMD_DEV_GET = 1
XDP_ACT_BASIC = 1  # enum netdev_xdp_act
XDP_ACT_REDIRECT = 2
XDP_ACT_RX_SG = 32


@dataclass(frozen=True)
class Link:
    """An interface as it was when asked."""

    name: str
    index: int
    address: bytes  # empty where the interface has no Ethernet address
    mtu: int
    up: bool
    running: bool  # up and with a carrier
    kind: str  # "veth", "tun"..., "loopback"; empty for hardware
    mode: str  # of a macvlan or macvtap: "bridge", "passthru"...; else empty
    rx_queues: int  # in use now
    max_rx_queues: int  # ethtool -L can make it so many
    peer: str  # of a veth, the other end if it is in this network namespace; else empty
    master: int  # index of the bridge or bond that it is a port of; 0: none
    xdp_mode: str  # "", "xdp", "xdpgeneric", "xdpoffload", "xdpmulti"
    xdp_id: int


class _NetdevMessage(genlmsg):  # type: ignore[misc]  # pyroute2 is untyped
    """The netdev family, which pyroute2 does not have."""

    nla_map = (
        ("NETDEV_A_DEV_PAD0", "none"),
        ("NETDEV_A_DEV_IFINDEX", "uint32"),
        ("NETDEV_A_DEV_PAD", "none"),
        ("NETDEV_A_DEV_XDP_FEATURES", "uint64"),
    )


def link_names() -> list[str]:
    def question() -> list[str]:
        with IPRoute() as netlink:
            return [message.get("ifname") for message in netlink.get_links()]

    return threads.answer(question)


def kernel_version() -> tuple[int, ...]:
    """Of the running kernel, its first two numbers."""
    return tuple(int(number) for number in re.findall(r"\d+", os.uname().release)[:2])


def find_link(wanted: str | int) -> Link | None:
    """By a name, which may be an alternative one, or by index; None if this network namespace has no such interface."""

    def question() -> list[Any]:
        with IPRoute() as netlink:
            return list(netlink.link("get", **({"index": wanted} if isinstance(wanted, int) else {"altname": wanted})))

    try:
        message = threads.answer(question)[0]
    except NetlinkError as error:
        if error.code in (errno.ENODEV, errno.ENOENT, errno.ERANGE, errno.EINVAL):
            return None  # ERANGE, EINVAL: not even a name
        raise SetupError(f"interface {wanted}: the kernel did not answer: {error}") from error
    xdp = message.get("xdp")
    info = message.get("linkinfo")
    kind = "loopback" if message["flags"] & IFF_LOOPBACK else (info.get_attr("IFLA_INFO_KIND") if info else None) or ""
    name = message.get("ifname")
    queues, most = _rx_queues(name)
    queues = queues or message.get("num_rx_queues") or 1
    return Link(
        name=name,
        index=message["index"],
        address=bytes.fromhex((message.get("address") or "").replace(":", "")),
        mtu=message.get("mtu"),
        up=bool(message["flags"] & IFF_UP),
        running=bool(message["flags"] & IFF_RUNNING),
        kind=kind,
        mode=_mode(kind, info),
        rx_queues=queues,
        max_rx_queues=max(queues, most or message.get("num_rx_queues") or 1),
        peer=_peer(message),
        master=message.get("master") or 0,
        xdp_mode=(xdp.get_attr("IFLA_XDP_ATTACHED") if xdp else None) or "",
        xdp_id=(xdp.get_attr("IFLA_XDP_PROG_ID") if xdp else None) or 0,
    )


def host_addresses(link: Link) -> frozenset[bytes]:
    """Unicast addresses that the host has on the interface: its own, its master's, and what it was told to receive.

    The last are those of all that is stacked on it and up (macvlan, macvtap, VLAN devices), in other network namespaces
    too, and what others ask for by packet(7): our own receive filters as well.
    """

    def question() -> list[str | None]:
        with IPRoute() as netlink:
            found = [entry.get("lladdr") for entry in netlink.get_neighbours(family=AF_BRIDGE, ifindex=link.index)]
            found += [each.get("address") for each in (netlink.get_links(link.master) if link.master else ())]
            return found

    try:
        answer = threads.answer(question)
    except NetlinkError as error:
        raise SetupError(f"interface {link.name}: the kernel did not tell its addresses: {error}") from error
    addresses = {bytes.fromhex((address or "").replace(":", "")) for address in answer} | {link.address}
    return frozenset(address for address in addresses if len(address) == 6 and not address[0] & 1 and any(address))


def concerns(events: bytes, index: int) -> bool:
    """Whether one of these rtnetlink messages is about the interface, or one that is stacked on it."""
    at = 0
    while at + 32 <= len(events):  # struct nlmsghdr, struct ifinfomsg
        length, kind = struct.unpack_from("=IH", events, at)
        end = min(at + max(length, 16), len(events))
        if kind in (RTM_NEWLINK, RTM_DELLINK):
            if struct.unpack_from("=i", events, at + 20)[0] == index:
                return True
            attribute = at + 32
            while attribute + 8 <= end:
                size, name = struct.unpack_from("=HH", events, attribute)
                if name == IFLA_LINK and struct.unpack_from("=i", events, attribute + 4)[0] == index:
                    return True
                attribute += max(size + 3 & ~3, 4)
        at = end + 3 & ~3
    return False


def require_link(ifname: str) -> Link:
    """SetupError names the interfaces that do exist."""
    link = find_link(ifname)
    if link is None:
        raise SetupError(
            f"interface {ifname}: there is none of this name in this network namespace",
            f"there are: {', '.join(link_names())}",
        )
    return link


def _peer(message: Any) -> str:
    if message.get("link") is None or message.get("link_netnsid") is not None:
        return ""
    try:
        return socket.if_indextoname(message.get("link"))
    except OSError:
        return ""


def _mode(kind: str, info: Any) -> str:
    data = info.get_attr("IFLA_INFO_DATA") if kind in ("macvlan", "macvtap") else None
    return (data.get_attr(f"IFLA_{kind.upper()}_MODE") if data else None) or ""


def _rx_queues(ifname: str) -> tuple[int, int]:
    """Queues in use now, and the most that there can be; 0 if the driver does not say."""
    try:
        with closing(IoctlEthtool(ifname)) as ethtool:
            channels = ethtool.get_channels()
            now = int(channels["combined_count"]) + int(channels["rx_count"])
            return now, max(int(channels["max_combined"]), int(channels["max_rx"]))
    except (NotSupportedError, NoSuchDevice):
        return len(list(Path("/sys/class/net", ifname, "queues").glob("rx-*"))), 0


def features(ifname: str) -> dict[str, bool]:
    """ethtool -k: feature by name; empty if the driver does not say."""
    try:
        with closing(IoctlEthtool(ifname)) as ethtool:
            return {name: bool(value) for name, value, *_ in ethtool.get_features()}
    except (NotSupportedError, NoSuchDevice):
        return {}


def fixed_features(ifname: str) -> frozenset[str]:
    """Those of features() that nobody can change."""
    try:
        with closing(IoctlEthtool(ifname)) as ethtool:
            have = ethtool.get_features()
            return frozenset(name for name in have.keys() if not have.is_available(name) or have.is_never_changed(name))  # noqa: SIM118
    except (NotSupportedError, NoSuchDevice):
        return frozenset()


def xdp_features(ifindex: int) -> int | None:
    """Bits of enum netdev_xdp_act; None where the kernel (before 6.3) does not say."""

    def question() -> int | None:
        with GenericNetlinkSocket() as netlink:
            netlink.bind("netdev", _NetdevMessage)
            message = _NetdevMessage()
            message["cmd"] = NETDEV_CMD_DEV_GET
            message["version"] = 1
            message["attrs"].append(("NETDEV_A_DEV_IFINDEX", ifindex))
            answer = netlink.nlm_request(message, msg_type=netlink.prid, msg_flags=NLM_F_REQUEST)
            value = next(iter(answer)).get("NETDEV_A_DEV_XDP_FEATURES")
            return None if value is None else int(value)

    try:
        return threads.answer(question)
    except NetlinkError:
        return None
