"""A Linux guest that loads a native XDP program: it takes back what it had agreed to take, where nobody listens.

far (transfer serve) -- far0 === xdpn0 -- xdpnet -- "agreed"   eth0 of one guest
                                                 |- "asked"    eth1, guest_offloads=false
                                                 |- "qemu"     eth2, the same by QEMU's properties
                                                 `- "bound"    eth3, ctrl_guest_offloads=off
"""

import re
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass

import pytest

from tests.native import compile_program
from tests.rig import needs, newer
from tests.rig.waiting import until
from xdpnet.demo import await_listener, initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, Qemu, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

PORT = 5000
SIZE = 1 << 20
OFF = "guest_csum=off,guest_tso4=off,guest_tso6=off,guest_ecn=off,guest_ufo=off"
# Options of the daemon's and of QEMU's.
CARDS = {
    "agreed": ("", ""),
    "asked": (",guest_offloads=no", ""),
    "qemu": ("", OFF),
    "bound": ("", "ctrl_guest_offloads=off"),
}


def address(name: str, end: int) -> str:
    """Each card has a subnet of its own, so that frames take the way that they should."""
    return f"10.{80 + list(CARDS).index(name)}.0.{end}"


@dataclass
class Stage:
    backend: Backend
    guest: Guest

    def interface(self, name: str) -> str:
        return f"eth{list(CARDS).index(name)}"

    def exchange(self, name: str) -> None:
        said = self.guest.check(f"transfer with {address(name, 1)} {PORT} {SIZE} {SIZE // 16} 1,1000,1472", timeout=120)
        sums = re.findall(r": (\d+) bytes, (\w+) here, (\w+) there", said)
        assert [int(count) for count, _, _ in sums] == [SIZE] * 2, said
        assert all(here == there for _, here, there in sums), said

    def refused(self, name: str) -> int:
        """Frames that the guest's driver has dropped, or its TCP has found wrong: older and newer kernels."""
        statistics = f"/sys/class/net/{self.interface(name)}/statistics/rx"
        said = self.guest.check(f"grep ^Tcp: /proc/net/snmp; cat {statistics}_dropped {statistics}_errors")
        names, values, *dropped = said.splitlines()
        return int(values.split()[names.split().index("InCsumErrors")]) + sum(map(int, dropped))

    @contextmanager
    def program(self, name: str, mode: str = "") -> Iterator[str]:
        """With an XDP program on the card; what its loader says."""
        self.guest.check(f"xdp_pass {self.interface(name)} {mode} >/tmp/said 2>&1 & echo $! >/tmp/loader")
        until(lambda: self.guest.run("grep -q . /tmp/said")[0] == 0)
        yield self.guest.check("cat /tmp/said")
        self.guest.run("kill $(cat /tmp/loader)")


@pytest.fixture(
    scope="module",
    params=[
        pytest.param((initramfs.find_kernel, Qemu), id="debian"),
        pytest.param((newer.kernel, newer.qemu), id="newer", marks=needs.newer_guest),
    ],
)
def stage(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stage]:
    directory = tmp_path_factory.mktemp("xdpn")
    kernel, qemu = (make() for make in request.param)
    programs = [str(compile_program(name, directory)) for name in ("transfer", "xdp_pass")]
    initrd = initramfs.build(kernel, directory / "initramfs", (*initramfs.PROGRAMS, *programs))
    with ExitStack() as stack:
        net = stack.enter_context(topology.topology())
        arguments, cards = ["--netdev", topology.HOST_IF], []
        for number, (name, (ours, qemus)) in enumerate(CARDS.items()):
            mac = f"52:54:00:78:67:{number:02x}"
            arguments += ["--guest", f"{name},socket={directory}/{name}.socket,mac={mac}{ours}"]
            cards.append(Card(directory / f"{name}.socket", mac, options=qemus))
            net.far.run("ip", "address", "add", f"{address(name, 1)}/24", "dev", topology.FAR_IF)
        backend = Backend(net.host, directory, arguments).start()
        stack.callback(backend.stop)
        server = net.far.spawn([programs[0], "serve", str(PORT)], directory / "far.log")
        stack.callback(process.end, server)
        await_listener(net.far, PORT)
        accel = best_accelerator(kernel, initrd, directory)
        guest = Guest(directory, kernel, initrd, cards, accel, qemu=qemu)
        made = Stage(backend, stack.enter_context(closing(guest.start())))
        for name in CARDS:
            guest.configure(address(name, 2), 24, made.interface(name))
            backend.await_guest(name)
        yield made
        assert backend.stop() == 0, process.tail(backend.log)


@pytest.mark.parametrize("name", ["asked", "qemu"])
def test_a_guest_that_takes_nothing_undone_runs_native_xdp(stage: Stage, name: str) -> None:
    port = stage.backend.port(name).guest
    assert port
    assert not [
        feature for feature in port.features if feature.startswith("VIRTIO_NET_F_GUEST_") and "ANN" not in feature
    ]
    before = stage.refused(name)
    with stage.program(name) as said:
        assert said == "attached\n"
        stage.exchange(name)
    stage.exchange(name)
    assert stage.refused(name) == before
    assert balanced(stage.backend.settled())


def test_a_guest_that_agreed_loses_its_tcp_to_native_xdp_as_the_readme_says(stage: Stage) -> None:
    """And not the day when QEMU tells of it."""
    name = "agreed"
    stage.exchange(name)
    before = stage.refused(name)
    with stage.program(name) as said:
        assert said == "attached\n"
        stage.guest.check(f"transfer with {address(name, 1)} {PORT} {SIZE} 0 1 >/dev/null 2>&1 &")
        until(lambda: stage.refused(name) > before)
    stage.exchange(name)


@pytest.mark.parametrize("name", ["bound", "agreed"])
def test_generic_xdp_works_whatever_a_guest_has_agreed_to(stage: Stage, name: str) -> None:
    with stage.program(name, "generic") as said:
        assert said == "attached\n"
        stage.exchange(name)
    stage.exchange(name)


def test_a_guest_that_cannot_go_back_on_it_is_refused_native_xdp(stage: Stage) -> None:
    with stage.program("bound") as said:
        assert said == "attach: Operation not supported\n"
        stage.exchange("bound")
