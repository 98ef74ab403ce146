"""The files of deploy/ as people use them."""

import os
import subprocess
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.daemon import daemon, guest
from xdpnet.demo import initramfs, process

DEPLOY = Path(__file__).parents[2] / "deploy"
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


def test_the_unit_serves_qemu_that_listens() -> None:
    """tests/deploy/ tries it: QEMU makes the socket, and makes it for itself alone."""
    unit = (DEPLOY / "xdpnet.service").read_text()
    assert "\nExecStartPre=install -d -m 1770 /run/xdpnet/client\n" in unit
    assert "CAP_DAC_OVERRIDE" in unit.partition("\nCapabilityBoundingSet=")[2].partition("\n")[0]
    assert "\nRuntimeDirectoryPreserve=yes\n" in unit
    for file in "libvirt-domain.xml", "xdpnet.toml":
        assert "/run/xdpnet/client" in (DEPLOY / file).read_text()


# ---- bootstrap.sh ----


def bootstrap(*words: str, cwd: Path, path: str = "", script: str = str(DEPLOY / "bootstrap.sh")) -> tuple[int, str]:
    """Its exit status and all that it said."""
    done = subprocess.run(
        [script, *words],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, cwd=cwd,
        env=os.environ | {"PATH": path + os.environ["PATH"], "TMPDIR": str(cwd)},
    )  # fmt: skip
    return done.returncode, done.stdout


def test_bootstrap_explains_itself_wherever_it_is_called_from(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(DEPLOY / "bootstrap.sh")
    called = (str(DEPLOY / "bootstrap.sh"), tmp_path), ("./bootstrap.sh", DEPLOY), ("./link", tmp_path)
    said = {bootstrap("--help", cwd=cwd, script=script) for script, cwd in called}
    assert len(said) == 1
    ((status, text),) = said
    assert status == 0
    assert "deploy/bootstrap.sh demo" in text


def test_each_command_of_bootstrap_has_its_line_of_help(tmp_path: Path) -> None:
    _, refused = bootstrap("nonsense", cwd=tmp_path)
    _, text = bootstrap("--help", cwd=tmp_path)
    install, *commands = refused.partition("one of: ")[2].strip().split(", ")
    explained = [line.split()[1] for line in text.splitlines() if line.lstrip().startswith("deploy/bootstrap.sh ")]
    assert explained == [f"{install};", *commands]  # to install takes no word


@needs.root
def test_a_bootstrap_that_fails_keeps_its_log_and_names_it_without_escape_codes(tmp_path: Path) -> None:
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, said in ("dpkg-query", ""), ("apt-get", "E: nothing\nE: goes\nE: today\nE: at all"):
        (programs / name).write_text(f"#!/bin/sh\necho '{said}'\nexit 100\n")
        (programs / name).chmod(0o755)
    status, text = bootstrap("install", cwd=tmp_path, path=f"{programs}:")
    assert status == 1
    assert "\033" not in text
    log = Path(text.splitlines()[-1].removeprefix("log: "))
    assert log.read_text() == "E: nothing\nE: goes\nE: today\nE: at all\n"
    assert log.parent == tmp_path
    status, text = bootstrap("nonsense", cwd=tmp_path)
    assert status == 1
    assert "log:" not in text
