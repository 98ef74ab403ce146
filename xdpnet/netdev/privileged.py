"""The closed list of what takes a capability to serve an interface. All else, here and in the core, can do without.

    load()          CAP_BPF, CAP_PERFMON    the XDP program and its maps; to look up and update these takes none
    prepare()       CAP_IPC_LOCK, or room   pages of a UMEM, locked
    open_queue()    CAP_NET_RAW, as well    an AF_XDP socket; to receive, send and wake up takes none
    open_group()    CAP_NET_RAW             the AF_PACKET socket and its filters; its buffer: CAP_NET_ADMIN
    attach()        CAP_NET_ADMIN           the bpf_link, which ends with its descriptor
    set_features()  CAP_NET_ADMIN           what the interface does to frames before we see them

Nobody else calls what these call. Errors are told as what was tried on which interface, with the remedy.
Reference: capabilities(7).
"""

import errno
from contextlib import closing
from functools import partial

from pyroute2.ethtool.ioctl import IoctlEthtool, NoSuchDevice, NotSupportedError

from xdpnet import core
from xdpnet.bpf import loader
from xdpnet.bpf.loader import Program
from xdpnet.errors import SetupError
from xdpnet.netdev.fitness import (
    ETH_OVERHEAD,
    PLAIN_MTU,
    BusyError,
    joins,
    needs_frags,
    occupied,
    setup_error,
)
from xdpnet.netdev.group import GroupSocket
from xdpnet.netdev.link import Link, features, require_link

__all__ = ["attach", "load", "open_group", "open_queue", "prepare", "set_features"]

XDP_FLAGS: dict[str, int] = {"native": 4, "generic": 2}  # XDP_FLAGS_DRV_MODE, XDP_FLAGS_SKB_MODE
# Drivers that get a copy of each frame as it is sent. Without zero copy most do, but some get the pages themselves
# (IFF_TX_SKB_NO_LINEAR), and there is no way to ask: where it was not tried, the frame's end is waited for.
COPYING = frozenset({"veth"})
# The same make the checksums that AF_XDP leaves to them, if they have this feature on; with the pages themselves older
# kernels do not look at what is asked.
MAKES_CSUM = "tx-checksum-ip-generic"


class NotLinkedError(SetupError):
    """The kernel does not attach the program in this mode; it may in another."""


load = loader.load


def prepare(port: core.Netdev, link: Link, mode: str, zerocopy: core.ZeroCopy) -> None:
    """What a new socket's memory takes, before the old one is closed; OSError."""
    port.prepare(link.mtu + ETH_OVERHEAD, zerocopy, joins(mode))


def open_queue(
    port: core.Netdev, queue: int, link: Link, mode: str, zerocopy: core.ZeroCopy, copy: bool, tells: bool
) -> str:
    """An AF_XDP socket, of the core; what went wrong if it could be had only without guest memory, or nothing.

    copy: the driver has no zero copy. tells: the program says what is several frames in one. Generic mode sees what the
    kernel has joined (GRO), or not cut yet (TSO at the peer of a veth).
    """
    what = f"interface {link.name}: AF_XDP socket of queue {queue}"
    copies = link.kind in COPYING
    makes_csum = copies and features(link.name).get(MAKES_CSUM, False)
    opens = partial(port.open_queue, queue, link.index, link.mtu + ETH_OVERHEAD)
    opens = partial(opens, makes_csum=makes_csum, joined=joins(mode), copy=copy, tells=tells)
    try:
        opens(zerocopy=zerocopy, copies_at_once=copies)
    except OSError as error:
        if error.errno == errno.EBUSY:
            remedy = "end the other AF_XDP program: ss --xdp -a -p names it"
            raise BusyError(f"{what}: in use", remedy) from error
        if error.errno == errno.EINVAL and link.mtu > PLAIN_MTU:
            raise needs_frags(link) from error
        failure = setup_error(what, error)
        try:
            opens(zerocopy="off")
        except OSError:
            raise failure from error
        return failure.message
    return ""


def open_group(link: Link) -> GroupSocket:
    try:
        return GroupSocket(link.name, link.index)
    except OSError as error:
        raise setup_error(f"interface {link.name}: AF_PACKET socket", error) from error


def attach(program: Program, link: Link, mode: str, tells: bool) -> int:
    """The descriptor of a bpf_link; BusyError if another program is there, NotLinkedError if it does not go so."""
    try:
        return _link(program, link, mode, tells)
    except OSError as error:
        failure = setup_error(f"interface {link.name}: attach in {mode} mode", error)
        if error.errno in (errno.EBUSY, errno.EEXIST):
            raise occupied(require_link(link.name)) from error
        if error.errno == errno.EPERM:
            raise failure from error
        raise NotLinkedError(failure.message, failure.remedy) from error


def _link(program: Program, link: Link, mode: str, tells: bool) -> int:
    flags = XDP_FLAGS[mode]
    if mode == "generic" and tells:
        return core.bpf_xdp_link(program.tells_fd, link.index, flags)
    if link.mtu > PLAIN_MTU:
        return core.bpf_xdp_link(program.frags_fd, link.index, flags)
    try:
        return core.bpf_xdp_link(program.prog_fd, link.index, flags)
    except OSError as error:
        # Somewhat below our limit drivers have theirs, and veth minds the MTU of its peer.
        if error.errno not in (errno.ERANGE, errno.EINVAL) or program.frags_fd < 0:
            raise
    return core.bpf_xdp_link(program.frags_fd, link.index, flags)


def set_features(ifname: str, wanted: dict[str, bool]) -> None:
    """ethtool -K; OSError. Drivers may refuse without a word: look again."""
    try:
        with closing(IoctlEthtool(ifname)) as ethtool:
            have = ethtool.get_features()
            for name, on in wanted.items():
                have[name] = on
            ethtool.set_features(have)
    except NotSupportedError as error:
        raise OSError(errno.EOPNOTSUPP, f"set features of {ifname}") from error
    except NoSuchDevice as error:
        raise OSError(errno.ENODEV, f"set features of {ifname}") from error
