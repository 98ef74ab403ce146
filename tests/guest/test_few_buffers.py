"""Guests with few receive buffers, as a tap would serve them: nothing of a burst is lost that it would keep.

An old card without mergeable buffers has thirteen in its ring of 256, of 64 KiB each; iPXE has eight.
"""

import http.server
import socket
import struct
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import ClassVar

import pytest

from tests.rig import needs
from tests.rig.netns import call_in
from tests.rig.waiting import until
from xdpnet.counters import Traffic
from xdpnet.demo import initramfs, process, topology
from xdpnet.demo.backend import Backend, balanced
from xdpnet.demo.guest import Card, Guest, best_accelerator

pytestmark = [pytest.mark.net, pytest.mark.guest, needs.root, needs.guest, pytest.mark.timeout(300)]

MAC = "52:54:00:78:64:07"
ADDRESS = topology.GUEST_ADDRESSES[0]
ROM = Path("/usr/lib/ipxe/qemu/efi-virtio.rom")  # both firmwares' in one
LEGACY = "disable-legacy=off,disable-modern=on,mrg_rxbuf=off,indirect_desc=off"


@contextmanager
def serving(net: topology.Topology, directory: Path) -> Iterator[Backend]:
    guest = f"one,socket={directory}/socket,mac={MAC}"
    backend = Backend(net.host, directory, ["--netdev", topology.HOST_IF, "--guest", guest]).start()
    try:
        yield backend
        snapshot = backend.settled()
        assert balanced(snapshot), snapshot.totals
    finally:
        backend.stop()


def received(backend: Backend) -> Traffic:
    return backend.port("one").queues[0].rx


def lost(backend: Backend) -> dict[str, int]:
    return {reason: n for reason, n in received(backend).drops.items() if n}


@pytest.fixture
def linux(net: topology.Topology, tmp_path: Path) -> Iterator[tuple[Backend, Guest]]:
    """A Linux guest with the old card."""
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs")
    accel = best_accelerator(kernel, initrd, tmp_path)
    card = Card(tmp_path / "socket", MAC, options=LEGACY)
    with (
        serving(net, tmp_path) as backend,
        closing(Guest(tmp_path, kernel, initrd, [card], accel=accel).start()) as guest,
    ):
        guest.configure(ADDRESS, topology.PREFIX)
        backend.await_guest("one")
        yield backend, guest


def test_a_legacy_card_without_mergeable_buffers_answers_pings_of_65000_bytes(
    net: topology.Topology, linux: tuple[Backend, Guest]
) -> None:
    """Each is a burst of 45 fragments, three times as many as the ring has buffers."""
    backend, _ = linux
    said = net.far.run("busybox", "ping", "-c", "20", "-s", "65000", ADDRESS)
    assert " 0% packet loss" in said, said
    assert lost(backend) == {}
    assert received(backend).waited > 0


def test_datagrams_sent_at_once_to_a_legacy_card_all_arrive(
    net: topology.Topology, linux: tuple[Backend, Guest]
) -> None:
    backend, guest = linux
    guest.check(f"ping -c 1 {topology.FAR_ADDRESS}")
    before = received(backend)

    def send() -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            sender.bind((topology.FAR_ADDRESS, 0))
            for _ in range(800):
                sender.sendto(bytes(100), (ADDRESS, 9))

    call_in(net.far.path, send)
    until(lambda: received(backend).packets >= before.packets + 800)
    assert lost(backend) == {}
    assert received(backend).waited > before.waited


SITE = f"http://{topology.FAR_ADDRESS}:8000"
FILE = bytes(4 << 20)
PAGES = {
    "/script": f"#!ipxe\nimgfetch {SITE}/file\nimgfetch {SITE}/done\nshell\n".encode(),
    "/file": FILE,
    "/done": b"well",
}


class Site(http.server.BaseHTTPRequestHandler):
    """What iPXE is to do: fetch a file, and say so."""

    asked: ClassVar[list[str]] = []

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", str(len(PAGES[self.path])))
        self.end_headers()
        self.wfile.write(PAGES[self.path])
        self.asked.append(self.path)

    def log_message(self, *_: object) -> None:
        """Nothing is said."""


def dhcp_answer(question: bytes) -> bytes:
    """An offer, or an acknowledgement, with an address and a script to boot: RFC 2131."""
    request = b"\x35\x01\x03" in question
    options = b"\x63\x82\x53\x63\x35\x01" + (b"\x05" if request else b"\x02")
    options += b"\x36\x04" + socket.inet_aton(topology.FAR_ADDRESS) + b"\x01\x04\xff\xff\xff\0"
    options += b"\x33\x04" + struct.pack(">I", 3600)
    fixed = b"\x02\x01\x06\0" + question[4:12] + bytes(4) + socket.inet_aton(ADDRESS)
    fixed += (
        socket.inet_aton(topology.FAR_ADDRESS)
        + bytes(4)
        + question[28:44]
        + bytes(64)
        + f"{SITE}/script".encode().ljust(128, b"\0")
    )
    return (fixed + options + b"\xff").ljust(300, b"\0")


@contextmanager
def site(net: topology.Topology) -> Iterator[list[str]]:
    """An HTTP server at the far end, and one for DHCP that tells of it; what was asked of the first."""

    def listen() -> tuple[http.server.HTTPServer, socket.socket]:
        dhcp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
        dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        dhcp.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, topology.FAR_IF.encode())
        dhcp.bind(("", 67))
        return http.server.HTTPServer((topology.FAR_ADDRESS, 8000), Site), dhcp

    def answer() -> None:
        with dhcp:
            while question := dhcp.recv(2048):
                dhcp.sendto(dhcp_answer(question), ("255.255.255.255", 68))

    Site.asked.clear()
    server, dhcp = call_in(net.far.path, listen)
    with ThreadPoolExecutor(2) as pool, server:
        pool.submit(server.serve_forever)
        pool.submit(answer)
        try:
            yield Site.asked
        finally:
            server.shutdown()
            with suppress(OSError):  # it is not connected, and wakes up all the same
                dhcp.shutdown(socket.SHUT_RD)


@pytest.mark.skipif(not ROM.exists(), reason=f"needs iPXE in QEMU's card ({ROM}, Debian's ipxe-qemu)")
def test_ipxe_boots_over_http_and_no_frame_is_lost(net: topology.Topology, tmp_path: Path) -> None:
    command = ["qemu-system-x86_64", "-nodefaults", "-display", "none", "-M", "q35,accel=tcg", "-m", "256M"]
    command += ["-object", "memory-backend-memfd,id=memory,size=256M,share=on", "-numa", "node,memdev=memory"]
    command += ["-chardev", f"socket,id=backend,path={tmp_path}/socket", "-netdev", "vhost-user,id=net,chardev=backend"]
    command += ["-device", f"virtio-net-pci,netdev=net,mac={MAC},vectors=0,bootindex=1"]
    with serving(net, tmp_path) as backend, site(net) as asked:
        qemu = process.spawn(command, tmp_path / "qemu.log")
        try:
            until(lambda: "/done" in asked, patience=240)
            assert asked == ["/script", "/file", "/done"]
            assert received(backend).bytes > len(FILE)
            assert lost(backend) == {}
        finally:
            process.end(qemu)
