"""`xdpnet check`: looks at everything that a start needs, one line each, and changes nothing.

Each check is a function that returns the detail to show, or raises SetupError with the remedy.
"""

import errno
import os
import re
import resource
import socket
import tempfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from xdpnet import core, descriptors, limits
from xdpnet.bpf import loader
from xdpnet.bpf.headers import find_headers
from xdpnet.bpf.loader import check_bcc
from xdpnet.core import MAX_PAIRS, MAX_PORTS
from xdpnet.demo import initramfs
from xdpnet.demo.guest import best_accelerator
from xdpnet.errors import SetupError
from xdpnet.holder import find_holder
from xdpnet.netdev import fitness
from xdpnet.netdev.link import (
    XDP_ACT_BASIC,
    XDP_ACT_REDIRECT,
    XDP_ACT_RX_SG,
    fixed_features,
    kernel_version,
    require_link,
    xdp_features,
)

AF_XDP = 44
MIN_KERNEL = (5, 9)  # bpf_link for XDP
KVM = "/dev/kvm"
KVM_PATIENCE_S = 6.0  # a second or two is usual
EMULATES = "QEMU can but emulate, slowly"
QUEUE_MEMORY = limits.FRAMES_PER_QUEUE * core.FRAME_SIZE  # is locked

CAP_NET_ADMIN, CAP_NET_RAW, CAP_IPC_LOCK, CAP_SYS_ADMIN, CAP_PERFMON, CAP_BPF = 12, 13, 14, 21, 38, 39


@dataclass(frozen=True)
class Check:
    """One line of the answer. One that is not required may fail, and xdpnet still runs."""

    name: str
    ok: bool
    detail: str
    remedy: str = ""
    required: bool = True


def run_checks(netdevs: Iterable[str] = ()) -> list[Check]:
    """The machine, then each of these interfaces."""
    checks = [
        _check("kernel", _kernel),
        _check("AF_XDP", _af_xdp),
        _check("capabilities", _capabilities),
        _check("bcc", check_bcc),
        _check("kernel headers", _headers),
        _check("locked memory", _locked_memory),
        _check("open files", _open_files, required=False),
        _check("interrupts", _interrupts),
        _check("guest memory", _guest_memory, required=False),
        _check("KVM", _kvm, required=False),
    ]
    for ifname in netdevs:
        checks += _interface(ifname)
    return checks


def _check(name: str, question: Callable[[], str], required: bool = True) -> Check:
    try:
        return Check(name, True, question(), required=required)
    except SetupError as error:
        return Check(name, False, error.message, error.remedy, required)
    except OSError as error:
        return Check(name, False, str(error), required=required)


def _kernel() -> str:
    release = os.uname().release
    if kernel_version() < MIN_KERNEL:
        wanted = ".".join(map(str, MIN_KERNEL))
        raise SetupError(f"Linux {release}, at least {wanted} is needed", "boot a newer kernel")
    return f"Linux {release}"


def _af_xdp() -> str:
    try:
        socket.socket(AF_XDP, socket.SOCK_RAW).close()
    except PermissionError:
        return "in the kernel; opening a socket needs CAP_NET_RAW"
    except OSError as error:
        if error.errno != errno.EAFNOSUPPORT:
            raise
        raise SetupError("not in this kernel", "use a kernel with CONFIG_XDP_SOCKETS") from error
    return "socket opened"


def _effective_capabilities() -> int:
    found = re.search(r"^CapEff:\s*([0-9a-f]+)$", Path("/proc/self/status").read_text(), re.MULTILINE)
    return int(found[1], 16) if found else 0


def _capabilities(effective: int | None = None) -> str:
    have = _effective_capabilities() if effective is None else effective
    missing = [
        name
        for name, sufficient in (
            ("CAP_NET_ADMIN", (CAP_NET_ADMIN,)),
            ("CAP_NET_RAW", (CAP_NET_RAW,)),
            ("CAP_BPF", (CAP_BPF, CAP_SYS_ADMIN)),
            ("CAP_IPC_LOCK", (CAP_IPC_LOCK,)),
        )
        if not any(have >> bit & 1 for bit in sufficient)
    ]
    if missing:
        raise SetupError(
            f"{', '.join(missing)} missing", "run as root, or name them in AmbientCapabilities= of the unit"
        )
    return "NET_ADMIN, NET_RAW, BPF and IPC_LOCK"


def _headers() -> str:
    return str(find_headers().source)


def _locked_memory() -> str:
    soft, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if _effective_capabilities() >> CAP_IPC_LOCK & 1:
        return "no limit, by CAP_IPC_LOCK"
    if soft == resource.RLIM_INFINITY:
        return "no limit"
    if soft < QUEUE_MEMORY:
        raise SetupError(
            f"at most {soft >> 10} KiB, a queue of an interface needs {QUEUE_MEMORY >> 10}",
            "ulimit -l unlimited, or LimitMEMLOCK=infinity in the unit",
        )
    return f"at most {soft >> 20} MiB, for {soft // QUEUE_MEMORY} queues of interfaces"


def _open_files() -> str:
    """The hard limit: the daemon raises the soft one to it."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    guests = descriptors.guests_of(most, MAX_PAIRS)
    if guests == 0:
        raise SetupError(
            f"at most {most}: a guest that opens many hinders the others",
            "raise the hard limit: LimitNOFILE= of the unit, ulimit -Hn",
        )
    return f"at most {most}, for {min(guests, MAX_PORTS - 1)} guests of {MAX_PAIRS} queue pairs"


def _interrupts() -> str:
    core.check_calls()
    return "by asynchronous I/O"


def _guest_memory() -> str:
    """Guests' memory must be shareable: a memfd, /dev/shm or huge pages."""
    meminfo = dict(re.findall(r"^(\w+):\s*(\d+)", Path("/proc/meminfo").read_text(), re.MULTILINE))
    free, size = int(meminfo.get("HugePages_Free", 0)), int(meminfo.get("Hugepagesize", 0))
    available = int(meminfo.get("MemAvailable", 0))
    shm = os.statvfs("/dev/shm")  # noqa: S108  # looked at, not written to
    if available == 0 and free == 0:
        raise SetupError("no memory left", "free some")
    return (
        f"memfd: {available >> 10} MiB, /dev/shm: {shm.f_bavail * shm.f_frsize >> 20} MiB, "
        f"huge pages: {free} of {size >> 10} MiB"
    )


def _kvm() -> str:
    """Opened, and tried with a guest, for it may be there and yet not run a whole kernel."""
    try:
        os.close(os.open(KVM, os.O_RDWR | os.O_CLOEXEC))
    except OSError as error:
        raise SetupError(f"{KVM}: {error.strerror}; {EMULATES}", _kvm_remedy(error)) from error
    try:
        accelerator = _accelerator()
    except SetupError as error:
        return f"{KVM} opened; no guest was booted: {error}"
    if accelerator != "kvm":
        raise SetupError(
            f"{KVM} opened, but a guest does not boot with it in {KVM_PATIENCE_S:.0f} s; {EMULATES}",
            "run guests as deploy/qemu.sh does with ACCEL=tcg, or libvirt's with deploy/libvirt-emulated.xml",
        )
    return f"{KVM} boots a guest"


@cache
def _accelerator() -> str:
    """As demo finds it; tried once."""
    kernel = initramfs.find_kernel()
    with tempfile.TemporaryDirectory(prefix="xdpn-") as directory:
        initrd = initramfs.build(kernel, Path(directory) / "initramfs", programs=())
        return best_accelerator(kernel, initrd, Path(directory), KVM_PATIENCE_S)


def _kvm_remedy(error: OSError) -> str:
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"run QEMU as a member of the group of {KVM} (usermod -aG kvm USER); a container has to be given it"
    return "switch on virtualization in the firmware, or modprobe kvm_intel or kvm_amd; a container has to be given it"


def _interface(ifname: str) -> Iterator[Check]:
    """Nothing more to say about one that is not there."""
    exists = _check(ifname, lambda: require_link(ifname).kind or "present")
    yield exists
    if not exists.ok:
        return
    link = require_link(ifname)

    def fit() -> str:
        holder = find_holder(link.xdp_id) if link.xdp_id else None
        if holder and holder.is_xdpnet:
            return f"up, MTU {link.mtu}, in the hands of xdpnet, {holder}"
        if holder:
            raise SetupError(f"interface {ifname}: another's XDP program is attached", f"end {holder}")
        fitness.check_link(link)
        if link.mtu > fitness.PLAIN_MTU and not fitness.has_frags():
            raise fitness.needs_frags(link)
        return f"up, MTU {link.mtu}, no XDP program"

    def queues() -> str:
        fitness.reserve_queues(link, 0)
        count = link.rx_queues
        return f"{count} receive queue{'s' * (count != 1)}"

    yield _check(f"{ifname} state", fit)
    yield _check(f"{ifname} queues", queues)
    native = _check(f"{ifname} native XDP", lambda: _native(link.index, link.mtu), required=False)
    yield native
    strips, fixed = fitness.stripping(ifname), fixed_features(ifname)
    if link.kind not in fitness.STRIPPED_BY_PEER and set(strips) - fixed:
        yield Check(f"{ifname} VLAN tags", True, "left in frames while xdpnet runs", required=False)
    mode = "native" if native.ok else "generic"  # as mode=auto will have it
    for advice in fitness.advise(link, mode, [name for name in strips if name in fixed], _tells()):
        detail, _, remedy = advice.partition("; ")
        yield Check(f"{ifname} offloads", False, detail, remedy, required=False)


def _tells() -> bool:
    """Whether generic mode will know which frames are several in one."""
    may = _effective_capabilities() & (1 << CAP_PERFMON | 1 << CAP_SYS_ADMIN)
    return bool(may and loader.tells())


def _native(ifindex: int, mtu: int) -> str:
    bits = xdp_features(ifindex)
    if bits is None:
        return "this kernel does not tell; tried at start"
    if not bits & XDP_ACT_BASIC or not bits & XDP_ACT_REDIRECT:
        raise SetupError("the driver has none", "mode=auto and mode=generic work, slower")
    if mtu > fitness.PLAIN_MTU and not bits & XDP_ACT_RX_SG:
        raise SetupError(
            f"the driver has none for MTU {mtu}",
            f"mode=auto and mode=generic work, slower; or an MTU of {fitness.PLAIN_MTU} or less",
        )
    return "the driver has it"
