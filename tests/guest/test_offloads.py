"""A Linux guest whose offloads are toggled one by one: whatever it leaves to us, what arrives is what was sent.

      far (transfer serve) -- far0 === xdpn0 -- xdpnet -- "split", "packed": two cards of one guest
                                                       `- cards of another guest, which negotiate less

TCP up and down and echoed UDP datagrams (tests/native/transfer.c), over IPv4 and IPv6, with the MTUs 1500 and 9000,
zero copy on and off. After each: nobody has counted an error, and the daemon's books balance. Each card has subnets of
its own, so that frames take the way that they should. --transfer says how many bytes each of the transfers has.
"""

import itertools
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import pytest

from tests.native import compile_program
from tests.rig import clsact, needs
from tests.rig.netns import call_in
from tests.rig.waiting import until
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator
from xdpnet.metrics.snapshot import Queue, Snapshot

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(1800)]

PORT = 5000
MIB = 1 << 20
GUEST_MIB = 256
LAYOUTS = ("split", "packed")

# All that a guest of ours may change, and what it changes it to; a test holds the list against the guest's own.
OFF = {
    "tx-checksum-ip-generic": "off",
    "tx-scatter-gather": "off",
    "tx-tcp-segmentation": "off",
    "tx-tcp6-segmentation": "off",
    "tx-tcp-ecn-segmentation": "off",
    "generic-segmentation-offload": "off",
    "generic-receive-offload": "off",
    "rx-gro-hw": "off",
}
ON = {
    "tx-tcp-mangleid-segmentation": "on",
    "tx-nocache-copy": "on",
    "rx-gro-list": "on",
    "rx-udp-gro-forwarding": "on",
}
TOGGLES: dict[str, dict[str, str]] = {
    "as it is": {},
    **{name: {name: state} for name, state in (OFF | ON).items()},
    "all off": OFF,
}
# What ethtool shows of several together.
GROUPS = {"tx-checksumming", "scatter-gather", "tcp-segmentation-offload"}
# Of the far end of the veth pair. What XDP at our end forbids it, such as TSO, is not its to change.
FAR_TOGGLES = {
    "rx-checksumming": "off",
    "tx-checksum-ip-generic": "off",
    "tx-scatter-gather": "off",
    "generic-segmentation-offload": "off",
    "generic-receive-offload": "on",
}

# What cards may do without, by QEMU's properties.
NO_GUEST_TSO = "guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
NEGOTIATED = {
    "neither checksum": "csum=off,guest_csum=off",
    "no checksum of ours": "csum=off",
    "no checksum of its": "guest_csum=off",
    "no TSO over IPv4": "host_tso4=off,guest_tso4=off",
    "no TSO over IPv6": "host_tso6=off,guest_tso6=off",
    "no ECN": "host_ecn=off,guest_ecn=off",
    "no TSO to it": NO_GUEST_TSO,
    "no mergeable buffers": "mrg_rxbuf=off",
    "small buffers": f"mrg_rxbuf=off,{NO_GUEST_TSO}",
    "plain rings": "indirect_desc=off,event_idx=off",
}

# Frames that find no room when both ends are busy are TCP's to send again; every other drop is a fault.
BUSY = {"no_buffer", "no_frame"}


@dataclass(frozen=True)
class Setting:
    mtu: int
    zerocopy: str

    def __str__(self) -> str:
        return f"mtu{self.mtu}-zerocopy-{self.zerocopy}"


SETTINGS = [Setting(mtu, zerocopy) for mtu in (1500, 9000) for zerocopy in ("off", "on")]

FAR, OWN, PEER = 1, 10, 11  # hosts of each card's subnets: the far end, its guest, and the other guest


def addresses(subnet: int, host: int) -> tuple[str, str]:
    return f"10.77.{subnet}.{host}", f"fd77:{subnet}::{host}"


def mac(subnet: int) -> str:
    return f"52:54:00:78:65:{subnet:02x}"


def seen_errors(text: str) -> Counter[str]:
    """What /proc/net/snmp and snmp6 count of what arrived wrong."""
    counts: Counter[str] = Counter()
    lines = [line.split() for line in text.splitlines()]
    for names, values in itertools.pairwise(lines):
        if names[0].endswith(":") and names[0] == values[0] and names[1].isalpha():
            counts.update({names[0] + name: int(value) for name, value in zip(names[1:], values[1:], strict=True)})
    counts.update({line[0]: int(line[1]) for line in lines if len(line) == 2})
    frames = {line[0]: 1 for line in lines if line[0].startswith("/sys/")}
    return Counter({name: counts[name] for name in ERRORS} | frames)


ERRORS = (
    "Ip:InHdrErrors", "Ip:ReasmFails", "Tcp:InErrs", "Tcp:InCsumErrors", "Udp:InErrors",
    "Ip6InHdrErrors", "Ip6InTruncatedPkts", "Ip6ReasmFails", "Udp6InErrors", "Icmp6InErrors",
)  # fmt: skip
# No more than that: each byte takes its time through an emulated serial port.
SAY_ERRORS = "grep -hE '^(Ip|Tcp|Udp):|(Hdr|Reasm|In).*(Errors|Fails|Truncated)' /proc/net/snmp /proc/net/snmp6"
# Of frames whose virtio_net_hdr a driver could make nothing of.
SAY_BAD_FRAMES = "grep -Hv '^0$' /sys/class/net/net*/statistics/rx_*errors; true"


def lost(snapshot: Snapshot) -> Counter[str]:
    """Drops by reason."""
    drops: Counter[str] = Counter()
    for port in snapshot.ports:
        for queue in port.queues:
            drops.update(queue.rx.drops)
            drops.update(queue.tx.drops)
    return drops


@dataclass
class Stage:
    net: topology.Topology
    backend: Backend
    setting: Setting
    directory: Path
    size: int
    boot: Callable[[str, list[Card]], Guest]
    guest: Guest = field(init=False)
    errors: dict[str, Counter[str]] = field(default_factory=dict)  # of each end, when it was asked last

    def socket(self, subnet: int) -> Path:
        return self.directory / f"{subnet}.socket"

    def card(self, subnet: int, layout: str, options: str = "") -> Card:
        return Card(self.socket(subnet), mac(subnet), packed=layout == "packed", mtu=self.setting.mtu, options=options)

    def start(self, name: str, cards: dict[int, Card]) -> Guest:
        """A guest with a card in each of these subnets, named net<subnet>."""
        guest = self.boot(name, list(cards.values()))
        script = ["cd /proc/sys/net/ipv4; echo 1 >conf/all/arp_ignore; echo 1 >tcp_ecn"]
        for number, subnet in enumerate(cards):
            script += [f"ip link set eth{number} name net{subnet}", take_addresses(f"net{subnet}", subnet, OWN)]
        guest.check("\n".join([*script, f"transfer serve {PORT} >/dev/null 2>&1 &"]))
        for subnet in cards:
            self.backend.await_guest(str(subnet))
        return guest

    def exchange(self, guest: Guest, address: str) -> None:
        """Every kind of transfer between a guest and whoever has the address; what is left to do for us is done."""
        mtu = self.setting.mtu
        sizes = 1, 2, 17, 18, 255, 256, mtu - 49, mtu - 48, mtu - 47, mtu - 28, mtu - 27, 8001, 40_000, 65_507
        datagrams = self.size // 4
        said = guest.check(
            f"transfer with {address} {PORT} {self.size} {datagrams} {','.join(map(str, sizes))}",
            timeout=60 + self.size / (MIB / 2),
        )
        sums = re.findall(r": (\d+) bytes, (\w+) here, (\w+) there", said)
        assert [int(count) for count, _, _ in sums] == [self.size] * 2, said
        assert all(here == there for _, here, there in sums), said
        assert int(re.findall(r"(\d+) bytes both ways", said)[0]) >= datagrams, said

    def far_says(self, script: str) -> str:
        return self.net.far.run("busybox", "sh", "-c", script)

    @contextmanager
    def counted(self) -> Iterator[Counter[str]]:
        """What was done to frames meanwhile."""
        before = work(self.backend.snapshot())
        done: Counter[str] = Counter()
        yield done
        done.update(work(self.backend.snapshot()) - before)

    @contextmanager
    def unharmed(self, *guests: Guest) -> Iterator[None]:
        """What is done meanwhile costs no frame but for want of room, and nobody sees a wrong one."""
        drops = lost(self.backend.snapshot())
        yield
        snapshot = self.backend.settled()
        assert balanced(snapshot), snapshot.totals
        new = lost(snapshot) - drops
        assert not set(new) - BUSY, new
        errors = {"far": seen_errors(self.far_says(SAY_ERRORS))}
        errors |= {guest.name: seen_errors(guest.check(f"{SAY_ERRORS}; {SAY_BAD_FRAMES}")) for guest in guests}
        before, self.errors = self.errors, self.errors | errors
        for name, seen in errors.items():
            assert not seen - before.get(name, Counter()), name
        statistics = wire(snapshot).xsk.statistics  # type: ignore[union-attr]
        assert statistics.tx_invalid_descs == statistics.rx_invalid_descs == 0


def work(snapshot: Snapshot) -> Counter[str]:
    """What was done to frames for whoever got them; it is counted where they came from, but for what was sent.

    csum_made: by us, or by the interface for us.
    """
    done: Counter[str] = Counter()
    for port in snapshot.ports:
        for queue in port.queues:
            source = queue.tx if port.guest else queue.rx
            for name in ("cut", "joined", "csum_completed", "csum_verified"):
                done[name] += getattr(source, name)
            if port.netdev:
                done.update(csum_made=queue.tx.csum_computed + queue.tx.csum_partial, in_place=queue.tx.in_place)
    return done


def wire(snapshot: Snapshot) -> Queue:
    (queue,) = (queue for port in snapshot.ports if port.netdev for queue in port.queues)
    return queue


def take_addresses(interface: str, subnet: int, host: int) -> str:
    """A script that brings the interface up with both addresses."""
    four, six = addresses(subnet, host)
    return (
        f"ip link set {interface} up; ip address add {four}/24 dev {interface};"
        f" cd /proc/sys/net/ipv6/conf/{interface}; echo 0 >accept_dad; echo 0 >disable_ipv6;"
        f" ip -6 address add {six}/64 dev {interface}"
    )


@pytest.fixture(scope="module", params=SETTINGS, ids=str)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    setting: Setting = request.param
    directory = tmp_path_factory.mktemp("xdpn")
    transfer = compile_program("transfer", directory)
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, directory / "initramfs", (*initramfs.PROGRAMS, str(transfer)))
    accel = best_accelerator(kernel, initrd, directory)
    subnets = len(LAYOUTS) * (1 + len(NEGOTIATED))
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology(mtu=setting.mtu))
        arguments = ["--netdev", f"{topology.HOST_IF},zerocopy={setting.zerocopy}"]
        for subnet in range(subnets):
            # A guest that is checked is always copied.
            arguments += ["--guest", f"{subnet},socket={directory}/{subnet}.socket,mac={mac(subnet)},check_source=no"]
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)

        def boot(name: str, cards: list[Card]) -> Guest:
            made = partial(Guest, directory, kernel, initrd, cards, accel=accel, memory_mib=GUEST_MIB)
            guest = made(name=f"xdpn-{name}", prealloc=setting.zerocopy == "on")
            return stack.enter_context(closing(guest.start()))

        made = Stage(net, backend, setting, directory, request.config.getoption("--transfer"), boot)
        net.far.run("sysctl", "-q", "-w", "net.ipv4.tcp_ecn=1")
        made.far_says("; ".join(take_addresses(topology.FAR_IF, subnet, FAR) for subnet in range(subnets)))
        server = net.far.spawn([str(transfer), "serve", str(PORT)], directory / "far.log")
        stack.callback(process.end, server)
        await_listener(net.far, PORT)
        made.guest = made.start("guest", {n: made.card(n, layout) for n, layout in enumerate(LAYOUTS)})
        if setting.zerocopy == "on":
            # Both cards' memory joins that of the socket, one after another.
            until(lambda: wire(backend.snapshot()).xsk.umem > len(LAYOUTS) * GUEST_MIB * MIB)  # type: ignore[union-attr]
        yield made
        assert backend.stop() == 0, process.tail(backend.log)


@contextmanager
def toggled(run: Callable[[str], str], interface: str, wanted: Mapping[str, str]) -> Iterator[None]:
    """An interface with these offloads, each of which is otherwise in the other state."""
    if not wanted:
        yield
        return
    other = {"on": "off", "off": "on"}
    try:
        now = features(run(f"ethtool -K {interface} {words(wanted)} && {say_features(interface)}"))
        assert wanted.items() <= now.items()
        yield
    finally:
        run(f"ethtool -K {interface} {words({name: other[state] for name, state in wanted.items()})}")


def words(states: Mapping[str, str]) -> str:
    return " ".join(f"{name} {state}" for name, state in states.items())


def say_features(interface: str) -> str:
    return f"ethtool -k {interface} | grep -v fixed"


def features(listing: str) -> dict[str, str]:
    """Of `ethtool -k`: what may be changed."""
    return dict(re.findall(r"^\s*([\w-]+): (on|off)(?: \[requested \w+\])?$", listing, re.MULTILINE))


def is_left_to_us(toggle: str, family: int) -> tuple[bool, bool]:
    """Whether a guest leaves checksums, and segmentation, to us."""
    off = TOGGLES[toggle].items() & OFF.items()
    checksums = ("tx-checksum-ip-generic", "off") not in off
    tso = {"tx-scatter-gather", "tx-tcp-segmentation" if family == 4 else "tx-tcp6-segmentation"}
    return checksums, checksums and not any((name, "off") in off for name in tso)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_offload_that_a_guest_may_change_is_toggled_here(stage: Stage, layout: str) -> None:
    may_change = features(stage.guest.check(say_features(f"net{LAYOUTS.index(layout)}")))
    assert set(may_change) - GROUPS == set(OFF | ON)
    for name, state in (OFF | ON).items():
        assert may_change[name] != state, name


@pytest.mark.parametrize("toggle", TOGGLES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_a_guest_leaves_to_us_is_done(stage: Stage, layout: str, toggle: str) -> None:
    subnet = LAYOUTS.index(layout)
    with stage.unharmed(stage.guest), toggled(stage.guest.check, f"net{subnet}", TOGGLES[toggle]):
        for family, address in zip((4, 6), addresses(subnet, FAR), strict=True):
            with stage.counted() as done:
                stage.exchange(stage.guest, address)
            checksums, segments = is_left_to_us(toggle, family)
            assert (done["csum_made"] > 0, done["cut"] > 0) == (checksums, segments)
            assert done["joined"] > 0
            # Fragments of datagrams need nothing done, whatever is on.
            assert (done["in_place"] > 0) == (stage.setting.zerocopy == "on")


@pytest.mark.parametrize("stage", [Setting(1500, "off"), Setting(9000, "on")], indirect=True, ids=str)
@pytest.mark.parametrize("toggle", FAR_TOGGLES)
def test_the_far_end_may_do_without_too(stage: Stage, toggle: str) -> None:
    with stage.unharmed(stage.guest), toggled(stage.far_says, topology.FAR_IF, {toggle: FAR_TOGGLES[toggle]}):
        for address in addresses(0, FAR):
            with stage.counted() as done:
                stage.exchange(stage.guest, address)
            # A checksum that the far end makes itself is verified where frames are joined.
            assert (done["csum_verified"] > 0) == (toggle == "tx-checksum-ip-generic")


@pytest.mark.parametrize("stage", [Setting(1500, "off"), Setting(9000, "on")], indirect=True, ids=str)
@pytest.mark.parametrize("toggle", ["as it is", "tx-tcp-ecn-segmentation"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_congestion_that_the_network_marks_is_answered(stage: Stage, layout: str, toggle: str) -> None:
    subnet = LAYOUTS.index(layout)
    with (
        stage.unharmed(stage.guest),
        toggled(stage.guest.check, f"net{subnet}", TOGGLES[toggle]),
        congested(stage.net.far),
    ):
        for address in addresses(subnet, FAR):
            ends = {"far": stage.far_says, "guest": stage.guest.check}
            before = {name: marked(end) for name, end in ends.items()}
            stage.exchange(stage.guest, address)
            assert all(marked(end) > before[name] for name, end in ends.items())


# One for each 64 KiB, whatever they are cut into when they pass here.
MARKER = b"""
#include <uapi/linux/bpf.h>
int mark(struct __sk_buff *skb)
{
        if (bpf_get_prandom_u32() % 65536 < skb->len)
                bpf_skb_ecn_set_ce(skb);
        return 0;
}
"""


@contextmanager
def congested(far: topology.Namespace) -> Iterator[None]:
    """The far end marks packets that may be marked, of both directions: who sent them slows down, and says so (CWR)."""
    there = partial(call_in, far.path)
    with clsact.loaded(MARKER, b"mark") as program:
        there(lambda: clsact.attach(program, topology.FAR_IF, clsact.INGRESS, clsact.EGRESS))
        try:
            yield
        finally:
            there(lambda: clsact.detach(topology.FAR_IF))


def marked(end: Callable[[str], str]) -> int:
    """How many marked packets an end has received."""
    names, values = (line.split() for line in end("grep ^IpExt /proc/net/netstat").splitlines())
    six = end("grep Ip6InCEPkts /proc/net/snmp6").split()
    return int(values[names.index("InCEPkts")]) + int(six[1])


@pytest.fixture(scope="module")
def frugal(stage: Stage) -> Guest:
    """A guest with cards of everything in NEGOTIATED, in both layouts; the other guest is in all of their subnets."""
    cards = {
        negotiated_subnet(what, layout): stage.card(negotiated_subnet(what, layout), layout, options)
        for what, options in NEGOTIATED.items()
        for layout in LAYOUTS
    }
    for subnet in cards:
        # Split rings talk to packed ones, and packed ones to split.
        stage.guest.check(take_addresses(f"net{1 - subnet % len(LAYOUTS)}", subnet, PEER))
    return stage.start("frugal", cards)


def negotiated_subnet(what: str, layout: str) -> int:
    return len(LAYOUTS) * (1 + list(NEGOTIATED).index(what)) + LAYOUTS.index(layout)


@pytest.mark.parametrize("stage", [Setting(1500, "off")], indirect=True, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("what", NEGOTIATED)
def test_guests_that_negotiate_less_get_what_they_take(stage: Stage, frugal: Guest, what: str, layout: str) -> None:
    subnet = negotiated_subnet(what, layout)
    port = stage.backend.port(str(subnet)).guest
    assert port
    has = {re.sub("VIRTIO_(NET|RING)_F_", "", name) for name in port.features}
    assert not has & {option.partition("=")[0].upper() for option in NEGOTIATED[what].split(",")}
    with stage.unharmed(stage.guest, frugal):
        for family, far, peer in zip((4, 6), addresses(subnet, FAR), addresses(subnet, PEER), strict=True):
            sends, takes = {"CSUM", f"HOST_TSO{family}"} <= has, {"GUEST_CSUM", f"GUEST_TSO{family}"} <= has
            with stage.counted() as done:
                stage.exchange(frugal, far)
            assert (done["csum_made"] > 0) == ("CSUM" in has)
            assert (done["csum_completed"] > 0) == ("GUEST_CSUM" not in has)
            assert (done["cut"] > 0, done["joined"] > 0) == (sends, takes)
            with stage.counted() as done:
                stage.exchange(frugal, peer)
            # The other guest sends all that there is, and takes it.
            assert (done["csum_completed"] > 0) == ("GUEST_CSUM" not in has)
            assert (done["cut"] > 0, done["joined"] > 0) == (not takes, False)
