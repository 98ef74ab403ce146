"""The files of deploy/ as people use them."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests import needs
from tests.test_daemon import daemon, guest
from xdpnet.demo import initramfs, process

DEPLOY = Path(__file__).parent.parent / "deploy"
MAC = "52:54:00:00:00:01"


@needs.guest
@pytest.mark.guest
def test_a_guest_of_the_script_comes_up_where_qemu_has_to_emulate(tmp_path: Path) -> None:
    kernel = initramfs.find_kernel()
    initrd = initramfs.build(kernel, tmp_path / "initramfs", programs=())
    with daemon(tmp_path, "--guest", guest(tmp_path, more=f",mac={MAC}")) as running:
        running.ready()
        boot = ("-kernel", str(kernel.image), "-initrd", str(initrd), "-append", "console=ttyS0 panic=-1 quiet")
        script = [DEPLOY / "qemu.sh", tmp_path / "web.sock", MAC, "-display", "none", *boot]
        with (tmp_path / "qemu").open("w") as log:
            qemu = subprocess.Popen(
                ["setpriv", "--pdeathsig", "KILL", *map(str, script)],
                stdin=subprocess.DEVNULL, stdout=log, stderr=log, env=os.environ | {"ACCEL": "tcg", "MEMORY": "256M"},
            )  # fmt: skip
        try:

            def is_up() -> bool:
                assert qemu.poll() is None, process.tail(tmp_path / "qemu")
                ring = running.port("web").queues[0].rx_ring
                return ring is not None and ring.started and ring.enabled

            running.until(is_up, "its driver's rings")
        finally:
            qemu.kill()
            qemu.wait()
        assert running.end() == 0


@pytest.mark.parametrize("path", sorted(DEPLOY.glob("*.xml")), ids=lambda path: path.name)
def test_what_libvirt_is_given_is_well_formed(path: Path) -> None:
    ElementTree.parse(path)


def test_the_domain_shares_its_memory_and_its_card_is_the_configurations() -> None:
    domain = ElementTree.parse(DEPLOY / "libvirt-domain.xml").getroot()
    access = domain.find("memoryBacking/access")
    source = domain.find("devices/interface[@type='vhostuser']/source")
    mac = domain.find("devices/interface/mac")
    assert access is not None
    assert source is not None
    assert mac is not None
    assert access.get("mode") == "shared"
    configured = (DEPLOY / "xdpnet.toml").read_text()
    assert f'socket = "{source.get("path")}"' in configured
    assert f'mac = "{mac.get("address")}"' in configured
