"""`xdpnet bugreport`: one archive, whatever of it can be had."""

import json
import stat
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

from tests.rig.daemon import daemon, guest
from xdpnet import bugreport
from xdpnet.errors import SetupError


def files(path: Path) -> dict[str, str]:
    with tarfile.open(path) as archive:
        found = {}
        for entry in archive:
            inside = archive.extractfile(entry)
            assert inside is not None
            found[entry.name.partition("/")[2]] = inside.read().decode()
    return found


def test_a_report_of_a_running_daemon_has_its_stats_twice_and_is_its_owners_alone(tmp_path: Path) -> None:
    config = tmp_path / "xdpnet.toml"
    config.write_text('workers = 1\napi_key = "hush"\n')
    path = tmp_path / "report.tar.gz"
    with daemon(tmp_path, "--guest", guest(tmp_path)) as served:
        served.ready()
        words = ["-o", str(path), "--config", str(config), "--log", str(tmp_path / "log"), "--control", served.control]
        done = subprocess.run(
            [sys.executable, "-m", "xdpnet", "bugreport", *words], capture_output=True, text=True, check=False
        )
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{path}\n", "")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    found = files(path)
    first, second = json.loads(found["stats-1.json"]), json.loads(found["stats-2.json"])
    assert second["time"] > first["time"]
    assert [port["name"] for port in first["ports"]] == ["web"]
    assert found["config.toml"] == 'workers = 1\napi_key = "(left out)"\n'
    assert "ready: guests 1" in found["log.txt"]
    assert found["versions.txt"].startswith("xdpnet ")
    assert "kernel" in found["check.txt"]
    assert "hush" not in "".join(found.values())


def test_what_cannot_be_had_says_why_in_its_place(tmp_path: Path) -> None:
    path = bugreport.write(
        str(tmp_path / "r.tar.gz"),
        str(tmp_path / "none"),
        str(tmp_path / "absent.toml"),
        str(tmp_path / "absent.log"),
        0,
    )
    found = files(Path(path))
    assert found["stats-1.json"].startswith("not to be had: no daemon at")
    assert "stats-2.json" not in found
    for name in "config.toml", "log.txt":
        assert found[name].startswith("not to be had: [Errno 2]")


def test_a_report_is_written_over_nothing_that_is_there(tmp_path: Path) -> None:
    path = tmp_path / "r.tar.gz"
    path.write_text("mine")
    with pytest.raises(SetupError, match="File exists; name another file with -o"):
        bugreport.write(str(path), "none", "none", None, 0)
    assert path.read_text() == "mine"


@pytest.mark.parametrize(
    ("line", "shown"),
    [
        ('token = "abc"', 'token = "(left out)"'),
        ('  "tls-private-key" = "/etc/key" # mine', '  "tls-private-key" = "(left out)"'),
        ('Password="x"', 'Password= "(left out)"'),
        ('mac = "52:54:00:00:00:01"', 'mac = "52:54:00:00:00:01"'),
        ('socket = "/run/xdpnet/token.sock"', 'socket = "/run/xdpnet/token.sock"'),
    ],
)
def test_values_that_may_be_secret_are_left_out_by_their_keys(line: str, shown: str) -> None:
    assert bugreport.without_secrets(f"workers = 1\n{line}\nspin_us = 5\n") == f"workers = 1\n{shown}\nspin_us = 5\n"
