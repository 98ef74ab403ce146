"""What an interface has to be to carry guests' frames, and what is not as somebody may expect; with the remedies.

Nothing here changes an interface.
"""

import errno
import os
from collections.abc import Collection
from pathlib import Path

from xdpnet import core
from xdpnet.errors import SetupError
from xdpnet.netdev.link import Link, features, find_link, kernel_version

ETH_OVERHEAD = 14 + 4  # header and one VLAN tag, neither counted in the MTU
PLAIN_MTU = core.MAX_PLAIN_FRAME - ETH_OVERHEAD  # above, frames are in several buffers (c/xdpnet.h)
MAX_MTU = core.MAX_MTU
FRAGS_KERNEL = (6, 6)  # AF_XDP for frames in several buffers
# AF_XDP loses a VLAN tag that comes beside the frame: an interface with these features takes it out of the frame ...
VLAN_STRIPPING = ("rx-vlan-hw-parse", "rx-vlan-stag-hw-parse")
# ... but one of these has it as the peer has sent it, whatever its own features say.
STRIPPED_BY_PEER = frozenset({"veth"})
# What no frame of a guest comes from, or goes to.
UNFIT = {
    "loopback": "its frames come from this host and go to it (a veth pair does that for guests)",
    "ifb": "it sends frames on only that were redirected to it, and has none for guests",
    "dummy": "it has no other end: what is sent there is gone",
    "vrf": "it is a table of routes, and its frames are those of the interfaces in it",
}
# Of what children of an interface get; a macvlan or macvtap of mode passthru gets all.
CHILDREN = {
    "bridge": "for its own address alone",
    "private": "for its own address alone",
    "vepa": "for its own address alone",
    "source": "from the addresses on its list alone",
}
SHARING = frozenset({"ipvlan", "ipvtap"})  # one address with the interface below: frames are told apart by IP
AGGREGATES = frozenset({"bond", "team"})
SYSFS = Path("/sys/class/net")
# By these the peer of a veth hands over packets in tunnels uncut. Native mode has the kernel cut them.
TUNNEL_SEGMENTATION = (
    *("tx-udp_tnl-segmentation", "tx-udp_tnl-csum-segmentation", "tx-gre-segmentation", "tx-gre-csum-segmentation"),
    *("tx-ipxip4-segmentation", "tx-ipxip6-segmentation"),
)

REMEDIES = {
    errno.EPERM: "run as root, or with CAP_NET_ADMIN, CAP_NET_RAW, CAP_BPF (CAP_SYS_ADMIN before Linux 5.8)",
    errno.ENOBUFS: "raise the limit of locked memory: ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
    errno.ENOMEM: "free memory, or open fewer queues",
    errno.EAFNOSUPPORT: "use a kernel with CONFIG_XDP_SOCKETS",
    errno.ERANGE: "lower the MTU: native XDP takes at most about 3500 here (on veth: of the peer), or mode=generic",
    errno.EOPNOTSUPP: "use mode=generic: this driver has no native XDP",
}


class BusyError(SetupError):
    """Another process has the queue or the XDP hook; a process that just ended may still seem to."""


def reserve_queues(link: Link, wanted: int) -> int:
    """How many AF_XDP sockets to have room for: a socket gets the frames of its own queue only, and queues may come."""
    if wanted > link.max_rx_queues:
        raise SetupError(
            f"interface {link.name}: {wanted} queues asked for, it can have {link.max_rx_queues}",
            f"queues={link.max_rx_queues} (or less)",
        )
    if (wanted or link.rx_queues) > core.MAX_NETDEV_QUEUES:
        raise SetupError(
            f"interface {link.name}: {wanted or link.rx_queues} queues, at most {core.MAX_NETDEV_QUEUES} are possible",
            f"ethtool -L {link.name} combined {core.MAX_NETDEV_QUEUES} (veth: rx {core.MAX_NETDEV_QUEUES})",
        )
    return wanted or min(link.max_rx_queues, core.MAX_NETDEV_QUEUES)


def check_link(link: Link) -> None:
    """SetupError unless AF_XDP sockets and a program can be put on it now."""
    if len(link.address) != 6:
        raise SetupError(f"interface {link.name}: not an Ethernet device", "choose one with a MAC address")
    if link.kind in UNFIT:
        raise SetupError(f"interface {link.name}: {UNFIT[link.kind]}", "choose another")
    if link.mode in CHILDREN:
        raise SetupError(
            f"interface {link.name}: a {link.kind} in {link.mode} mode gets frames {CHILDREN[link.mode]}",
            f"make it with mode passthru, or take the interface that it is on ({link.peer or 'ip -d link'})",
        )
    if link.kind in SHARING:
        raise SetupError(
            f"interface {link.name}: an {link.kind} has one address with the interface that it is on, and no guest's",
            f"a macvlan of mode passthru, or take the interface that it is on ({link.peer or 'ip -d link'})",
        )
    if (SYSFS / link.name / "dsa").exists():
        raise SetupError(
            f"interface {link.name}: its frames have the tags of the switch behind it (DSA)",
            "take one of the switch's ports, which are interfaces, or their bridge",
        )
    if link.xdp_id:
        raise occupied(link)
    if not link.up:
        raise SetupError(f"interface {link.name}: down", f"ip link set dev {link.name} up")
    if link.mtu > MAX_MTU:
        raise SetupError(
            f"interface {link.name}: MTU {link.mtu} is above {MAX_MTU}, the most that is supported",
            f"ip link set dev {link.name} mtu {MAX_MTU} (or less)",
        )


def advise(link: Link, mode: str, strips: Collection[str], tells: bool = True) -> list[str]:
    """What works, but not as somebody may expect; with the remedy.

    strips: of VLAN_STRIPPING, what stays on; tells: in generic mode it is known which frames are several in one.
    """
    name, advice = link.name, []
    master = find_link(link.master) if link.master else None
    if master and master.kind in AGGREGATES:
        advice.append(
            f"interface {name}: it is a port of {master.kind} {master.name}, and guests' frames may come by any other "
            f"of its ports; take {master.name}"
        )
    if (SYSFS / name / "phy80211").exists():
        advice.append(
            f"interface {name}: a wireless station has its own address alone in the air, and guests' frames are lost; "
            f"another interface, unless it is an access point or has 4addr on"
        )
    if link.kind in STRIPPED_BY_PEER:
        if not link.peer or features(link.peer).get("tx-vlan-hw-insert"):
            advice.append(
                f"interface {name}: VLAN tags that its peer sends beside the frame are lost by AF_XDP; "
                f"ethtool -K {link.peer or 'PEER'} txvlan off, unless nobody uses tags"
            )
    elif strips:
        off = " ".join(f"{feature} off" for feature in strips)
        advice.append(
            f"interface {name}: it takes VLAN tags out of received frames, and AF_XDP loses them; "
            f"ethtool -K {name} {off}, or another interface, unless nobody uses tags"
        )
    if mode == "generic":
        advice += advise_joined(link, tells)
    return advice


def advise_joined(link: Link, tells: bool) -> list[str]:
    """Of frames that generic mode sees: joined by the kernel (GRO), or not cut by the peer of a veth (TSO)."""
    name, peer = link.name, link.peer or "PEER"
    veth, joins = link.kind in STRIPPED_BY_PEER, features(name).get("rx-gro", False)
    uncut = not link.peer or any(features(peer).get(each) for each in TUNNEL_SEGMENTATION)
    drops = "those in tunnels are dropped" if has_frags() else "AF_XDP drops them"
    advice = []
    if joins:
        advice.append(
            f"interface {name}: generic mode sees the large frames that GRO makes, and {drops}; "
            f"ethtool -K {name} gro off"
        )
    if veth and uncut:
        off = " ".join(f"{each} off" for each in TUNNEL_SEGMENTATION)
        advice.append(
            f"interface {name}: generic mode sees the large frames that its peer does not cut, and {drops}; "
            f"mode=native, or, if anybody uses tunnels, ethtool -K {peer} {off}"
        )
    if not tells:
        remedy = f"ethtool -K {peer} tx-udp-segmentation off" if veth else "mode=native"
        advice.append(
            f"interface {name}: this kernel does not let generic mode know which datagrams are several in one "
            f"(UDP_SEGMENT, rx-udp-gro-forwarding): they reach guests as one, or are dropped; CAP_PERFMON and BTF "
            f"(/sys/kernel/btf/vmlinux), or {remedy}"
        )
    return advice


def stripping(ifname: str) -> list[str]:
    """Features, turned on now, by which the interface takes VLAN tags out of received frames."""
    have = features(ifname)
    return [name for name in VLAN_STRIPPING if have.get(name)]


def has_frags() -> bool:
    """Whether this kernel's AF_XDP has frames in several buffers."""
    return kernel_version() >= FRAGS_KERNEL


def joins(mode: str) -> bool:
    """Whether sockets may get several frames in one, as the kernel has joined them."""
    return mode == "generic" and has_frags()


def needs_frags(link: Link) -> SetupError:
    """The kernel, or the driver, has no frames in several buffers."""
    return SetupError(
        f"interface {link.name}: MTU {link.mtu}, and no AF_XDP for frames above {core.MAX_PLAIN_FRAME} bytes",
        f"ip link set dev {link.name} mtu {PLAIN_MTU} (or less), or boot Linux 6.6 or later",
    )


def occupied(link: Link) -> BusyError:
    return BusyError(
        f"interface {link.name}: XDP program {link.xdp_id} ({link.xdp_mode or 'just gone'}) is attached already",
        f"if nobody needs it, end its owner (bpftool link show names it), or, where it was attached by ip, "
        f"ip link set dev {link.name} {link.xdp_mode or 'xdp'} off",
    )


def setup_error(what: str, error: OSError) -> SetupError:
    number = error.errno or 0
    return SetupError(f"{what}: {os.strerror(number) if number else error}", REMEDIES.get(number, ""))
