"""Where in a file a fault is, and that flags have none."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from xdpnet.config import Raw
from xdpnet.errors import ConfigError
from xdpnet.origin import Origin

FILE = """# of a machine
workers = 0
[other]
name = "x"
[[guest]]
name = "web"
queues = 0
[[guest]]
name = 'd b'
"soket" = "/run/db.sock"
mac = "x"
ips = [
  "y",
]
mtu = 1
  [[ netdev ]]  # the second port
interface = "eth1"
mood = "native"
[[guest]]
socket = "/run/last.sock"
"""


def faults(path: Path, flags: Raw | None = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Origin(str(path), flags).read()
    return caught.value.faults


def lines(told: list[str], path: Path) -> list[int]:
    """Of those that have one."""
    found = [re.match(rf"{path}:(\d+): ", fault) for fault in told]
    return sorted(int(line[1]) for line in found if line)


def test_every_fault_is_told_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(FILE)
    told = faults(path)
    # A name, a socket that are missing: the line of the table.
    assert lines(told, path) == [2, 3, 5, 7, 8, 9, 10, 11, 12, 15, 18, 19], told
    assert len(told) == 12


@pytest.mark.parametrize(
    "text",
    [
        'guest = [{name = "web", socket = "/run/x", queues = 0}]',
        '[["guest"]]\nname = "web"\nsocket = "/run/x"\nqueues = 0',
        'note = """\n[[guest]]\nqueues = 7\n"""\n[[guest]]\nname = "web"\nsocket = "/run/x"\nqueues = 0',
    ],
)
def test_what_is_laid_out_in_another_way_has_no_line_rather_than_a_wrong_one(tmp_path: Path, text: str) -> None:
    path = tmp_path / "x.toml"
    path.write_text(text)
    assert f'{path}: guest "web": queues = 0: must be 1..16' in faults(path)


@pytest.mark.parametrize(
    ("content", "told"),
    [(b"workers = 1\nspin_us =\n", ":2: not TOML: Invalid value"), (b"workers = 1\n\xff\n", ":2: not TOML: not UTF-8"),
     (b"workers = 1\n\n[[guest]", ":3: not TOML: "), (b"# guests\n", ": guest: none given")],
)  # fmt: skip
def test_a_file_that_is_none_has_the_line_where_it_ends_to_be_one(tmp_path: Path, content: bytes, told: str) -> None:
    path = tmp_path / "x.toml"
    path.write_bytes(content)
    (fault,) = faults(path)
    assert fault.startswith(f"{path}{told}")


def test_what_a_flag_says_has_no_line_though_the_file_says_something_of_it(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text('workers = 2\n[[guest]]\nname = "web"\nsocket = "/run/x"\nqueues = 2\nmtu = 1\n')
    flags = {"workers": "0", "guest": [{"name": "web", "queues": "0"}, {"name": "db", "mtu": "1"}]}
    told = faults(path, flags)
    assert [fault for fault in told if str(path) in fault] == [
        f'{path}:6: guest "web": mtu = 1: must be 68..65535',
    ]  # fmt: skip
    assert len(told) == 5


def test_what_is_wrong_with_a_machine_is_told_with_the_line_that_asks_for_it(tmp_path: Path) -> None:
    path = tmp_path / "x.toml"
    path.write_text(
        'cpus = "7"\n[[guest]]\nname = "web"\nsocket = "/no/such"\nuser = "nobody-here"\n'
        '[[netdev]]\ninterface = "eth1"\n'
    )
    origin = Origin(str(path), {"netdev": [{"interface": "eth2"}]})
    origin.read()
    for fault, line in {
        "cpus: CPU 7 not usable here": ":1: ", 'guest web: user = "nobody-here": there is none': ":5: ",
        "guest web: socket /no/such: directory /no": ":4: ", "interface eth1: there is none of this name": ":6: ",
        "netdev eth1: mode: not here": ":6: ", "max_macs: takes a new start": ": ",
    }.items():  # fmt: skip
        (located,) = origin.locate([fault])
        assert located == f"{path}{line}{fault}"
        assert origin.locate([located]) == [located]
    assert origin.locate(["interface eth2: there is none"]) == ["interface eth2: there is none"]


@settings(deadline=None, max_examples=50)
@given(st.lists(st.sampled_from([*FILE.splitlines(), "guest = 3", "[guest]", "[[guest.x]]", '"""', "x = [", "]"])))
def test_a_file_in_any_order_is_a_configuration_or_has_faults(
    tmp_path_factory: pytest.TempPathFactory, made: list[str]
) -> None:
    path = tmp_path_factory.getbasetemp() / "any.toml"
    path.write_text("\n".join(made))
    assert all(fault.startswith(f"{path}:") for fault in faults(path))
