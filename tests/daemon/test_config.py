"""The configuration: limits in pairs, every fault at once, flags over the file."""

import contextlib
import ipaddress
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from xdpnet import config
from xdpnet.errors import ConfigError
from xdpnet.origin import Origin

DEPLOY = Path(__file__).parents[2] / "deploy"


def raw(**settings: Any) -> dict[str, Any]:
    return {"guest": [{"name": "web", "socket": "/run/web.sock"}], **settings}


def guest(**keys: Any) -> dict[str, Any]:
    return {"guest": [{"name": "web", "socket": "/run/web.sock", **keys}]}


def faults(tables: dict[str, Any]) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        config.parse(tables)
    assert str(caught.value) == "\n".join(caught.value.faults)
    assert all(fault.isprintable() for fault in caught.value.faults)
    return caught.value.faults


def test_a_guest_with_a_socket_is_enough() -> None:
    made = config.parse(raw())
    assert made.worker_count == 1
    assert made.control == "/run/xdpnet/control.sock"
    assert (made.spin_us, made.ageing_s, made.frames_per_queue, made.max_macs) == (50, 300, 4096, 64)
    assert (made.netdevs, made.metrics) == ((), None)
    (guest,) = made.guests
    assert (guest.queues, guest.client, guest.checks_source) == (1, False, False)


@pytest.mark.parametrize(
    ("wishes", "most"),
    [([], "off"), (["off"], "off"), (["off", "auto"], "auto"), (["auto", "on", "off"], "on"), ([None], "auto")],
)
def test_memory_is_prepared_for_the_interface_that_wants_most_of_it(wishes: list[str | None], most: str) -> None:
    netdevs = [{"interface": f"eth{at}", **({"zerocopy": wish} if wish else {})} for at, wish in enumerate(wishes)]
    assert config.parse(raw(netdev=netdevs)).zerocopy == most


def test_a_file_and_the_same_flags_make_the_same_configuration(tmp_path: Path) -> None:
    file = tmp_path / "xdpnet.toml"
    file.write_text("""
        workers = 2
        cpus = "0,2"
        metrics = "[::1]:9100"
        [[netdev]]
        interface = "eth1"
        queues = 4
        mode = "native"
        zerocopy = "on"
        [[guest]]
        name = "web"
        socket = "/run/web.sock"
        mac = "52:54:00:00:00:01"
        queues = 2
        client = true
    """)
    wrong: list[str] = []
    flags = {
        "workers": "2",
        "cpus": "0,2",
        "metrics": "[::1]:9100",
        "netdev": [config.parse_flag("eth1,queues=4,mode=native,zerocopy=on", "interface", wrong)],
        "guest": [
            config.parse_flag("web,socket=/run/web.sock,mac=52:54:00:00:00:01,queues=2,client=true", "name", wrong)
        ],
    }
    assert not wrong
    assert Origin(str(file)).read() == config.parse(flags)


def test_every_fault_is_reported_at_once_with_key_and_value() -> None:
    found = faults(
        {
            "workers": 0,
            "wrokers": 2,
            "metrics": "9100",
            "frames_per_queue": 1000,
            "guest": [
                {"name": "web", "socket": "/run/a", "queues": 17, "mac": "01:00:5e:00:00:01"},
                {"name": "db", "socket": "/run/a", "mtu": 67, "quues": 3},
                {"socket": "/run/c", "check_source": True},
            ],
            "netdev": [{"interface": "eth0/1"}, {"interface": "eth1", "mode": "hw", "zerocopy": True}],
        }
    )
    assert found == [
        "workers = 0: must be 1..16",
        "frames_per_queue = 1000: must be a power of two, 256..65536",
        'metrics = "9100": must be HOST:PORT, as 127.0.0.1:9100 or [::1]:9100',
        'guest "web": mac = "01:00:5e:00:00:01": must be a unicast address: this is a group address',
        'guest "web": queues = 17: must be 1..16',
        'guest "db": mtu = 67: must be 68..65535',
        'guest "db": quues = 3: unknown key, did you mean "queues"?',
        "guest 3: name: is missing",
        'netdev "eth0/1": interface = "eth0/1": must be the name of an interface, 1..127 characters',
        'netdev "eth1": mode = "hw": must be "auto", "native" or "generic"',
        'netdev "eth1": zerocopy = true: must be "auto", "on" or "off"',
        'wrokers = 2: unknown key, did you mean "workers"?',
        "guest 3: check_source = true: needs mac",
        'guest "db": socket = "/run/a": is also that of guest "web"',
    ]


@pytest.mark.parametrize(
    ("key", "last", "first"),
    [
        ("workers", 16, 17),
        ("workers", 1, 0),
        ("spin_us", 0, -1),
        ("spin_us", 1_000_000, 1_000_001),
        ("frames_per_queue", 256, 128),
        ("frames_per_queue", 65536, 131072),
        ("max_macs", 1, 0),
        ("workers", 1, True),
        ("workers", "16", "17"),
        ("metrics", "127.0.0.1:65535", "127.0.0.1:65536"),
        ("metrics", "[::1]:9100", "[::1:9100"),
        ("metrics", "[::1]:9100", "[::g]:9100"),
        ("metrics", "localhost:0", ":0"),
        ("control", "/" + "c" * 106, "/" + "c" * 107),
        ("cpus", "0", ""),
        ("cpus", "4095", "4096"),
        ("cpus", "2-3", "3-2"),
        ("cpus", "0,1", "0,0"),
        ("cpus", "0-15", "0-16"),
        ("cpus", [1, 2], [1, -2]),
    ],
)
def test_the_last_legal_setting_is_taken_and_the_next_is_refused(key: str, last: object, first: object) -> None:
    config.parse(raw(**{key: last}))
    (fault,) = faults(raw(**{key: first}))
    assert fault.startswith(f"{key} = ")


@pytest.mark.parametrize(
    ("key", "last", "first"),
    [
        ("queues", 1, 0),
        ("queues", 16, 17),
        ("mtu", 68, 67),
        ("mtu", 65535, 65536),
        ("name", "a" * 32, "a" * 33),
        ("name", "A-z_0.9", "a b"),
        ("name", "x", ""),
        ("name", "x", 'x"y'),
        ("name", "x", "x\ny"),
        ("socket", "/" + "s" * 106, "/" + "s" * 107),
        ("socket", "/" + "é" * 53, "/" + "é" * 54),
        ("socket", "s", ""),
        ("socket", "s", "s\0"),
        ("mac", "00:00:00:00:00:01", "00:00:00:00:00:00"),
        ("mac", "fe:ff:ff:ff:ff:ff", "ff:ff:ff:ff:ff:ff"),
        ("mac", "52:54:00:00:00:01", "52:54:00:00:00"),
        ("mac", "52:54:00:00:00:01", "52:54:00:00:00:01:02"),
        ("mac", "52:54:00:00:00:01", 525400000001),
        ("client", "true", "maybe"),
    ],
)
def test_the_last_legal_guest_key_is_taken_and_the_next_is_refused(key: str, last: object, first: object) -> None:
    config.parse(guest(**{key: last}))
    (fault,) = faults(guest(**{key: first}))
    assert f"{key} = " in fault


@pytest.mark.parametrize("name", ["eth0", "a" * 127, "br-lan.7"])
def test_an_interface_name_of_the_kernel_is_taken(name: str) -> None:
    assert config.parse(raw(netdev=[{"interface": name}])).netdevs[0].interface == name


@pytest.mark.parametrize("name", ["", "a" * 128, "a b", "a/b", ".", "..", "a:1", 'a"', "é"])
def test_what_the_kernel_refuses_as_an_interface_name_is_refused(name: str) -> None:
    (fault,) = faults(raw(netdev=[{"interface": name}]))
    assert "interface = " in fault


@pytest.mark.parametrize(
    ("second", "key"),
    [
        ({"name": "web", "socket": "/b"}, "name"),
        ({"name": "b", "socket": "/a"}, "socket"),
        ({"name": "b", "socket": "/b", "mac": "52:54:00:00:00:0A"}, "mac"),
    ],
)
def test_two_guests_share_no_name_socket_or_address(second: dict[str, str], key: str) -> None:
    (fault,) = faults({"guest": [{"name": "web", "socket": "/a", "mac": "52:54:00:00:00:0a"}, second]})
    assert f"{key} = " in fault
    assert 'is also that of guest "web"' in fault


def test_36_a_guest_may_have_several_addresses_in_the_file_and_in_a_flag() -> None:
    wrong: list[str] = []
    flag = config.parse_flag("web,socket=/a,mac=52:54:00:00:00:01+52:54:00:00:00:02", "name", wrong)
    file = {"name": "web", "socket": "/a", "mac": ["52:54:00:00:00:01", "52:54:00:00:00:02"]}
    made = config.parse({"guest": [flag]})
    assert made == config.parse({"guest": [file]})
    assert made.guests[0].macs == (b"\x52\x54\0\0\0\1", b"\x52\x54\0\0\0\2")
    assert made.guests[0].checks_source
    assert not wrong
    most = [f"52:54:00:00:00:{number:02x}" for number in range(17)]
    config.parse(guest(mac=most[:16]))
    for macs, reason in (
        (most, "must be 1..16 addresses"),
        ([], "must be 1..16 addresses"),
        ([most[0], "x"], "must be six bytes"),
        ([most[0], most[0]], "names an address twice"),
        (f"{most[0]}+", "must be six bytes"),
    ):
        found = faults(guest(mac=macs))
        assert reason in found[0]
    others = [{"name": "web", "socket": "/a", "mac": most[:3]}, {"name": "db", "socket": "/b", "mac": most[2].upper()}]
    assert faults({"guest": others}) == [f'guest "db": mac = "{most[2]}": is also that of guest "web"']


def test_a_guest_and_an_interface_share_no_name_for_both_are_ports() -> None:
    (fault,) = faults(raw(netdev=[{"interface": "web"}]))
    assert fault == 'netdev "web": name = "web": is also that of guest "web"'


def test_an_interface_is_given_once() -> None:
    (fault,) = faults(raw(netdev=[{"interface": "eth1"}, {"interface": "eth1"}]))
    assert "is also that of" in fault


def test_no_guest_at_all_names_the_remedy() -> None:
    (fault,) = faults({})
    assert "--guest NAME,socket=PATH" in fault


def test_a_guest_has_a_socket_or_a_descriptor_but_not_both() -> None:
    config.parse({"guest": [{"name": "web", "fd": 3}]})
    assert faults({"guest": [{"name": "web"}]}) == ['guest "web": socket: is missing']
    assert faults(guest(fd=3)) == ['guest "web": fd = 3: excludes socket']


def test_128_ports_are_possible_and_129_are_not() -> None:
    guests = [{"name": f"g{i}", "socket": f"/run/{i}"} for i in range(129)]
    config.parse({"guest": guests[:128]})
    assert faults({"guest": guests}) == ["guest, netdev: 129 ports: at most 128 are possible"]


def test_each_worker_has_a_cpu_or_none_has() -> None:
    assert config.parse(raw(cpus="1,3")).worker_count == 2
    assert config.parse(raw(cpus="1,3", workers=2)).cpus == (1, 3)
    assert faults(raw(cpus="1,3", workers=1)) == ['cpus = "1,3": names 2 CPUs for 1 workers; each worker needs one']


def test_the_source_address_is_checked_wherever_it_is_known() -> None:
    assert config.parse(guest(mac="52:54:00:00:00:01")).guests[0].checks_source
    assert not config.parse(guest(mac="52:54:00:00:00:01", check_source=False)).guests[0].checks_source


def test_addresses_of_a_guest_are_the_same_in_a_file_and_a_flag() -> None:
    wrong: list[str] = []
    flag = config.parse_flag("web,socket=/a,mac=52:54:00:00:00:01,ips=10.0.0.5+fd00::5", "name", wrong)
    made = [config.parse({"guest": [each]}).guests[0].ips for each in (flag, {**flag, "ips": ["10.0.0.5", "fd00::5"]})]
    assert made[0] == made[1] == (ipaddress.ip_address("10.0.0.5"), ipaddress.ip_address("fd00::5"))
    assert config.parse(guest()).guests[0].ips == ()


@pytest.mark.parametrize(
    ("ips", "fault"),
    [
        ("10.0.0", "must be at most 16"),
        ("10.0.0.5+", "must be at most 16"),
        ("fe80::1%eth0", "must be at most 16"),
        ([10], "must be at most 16"),
        (5, "must be at most 16"),
        (["10.0.0.1"] * 17, "must be at most 16"),
        ("224.0.0.1", "224.0.0.1 is not"),
        ("::", ":: is not"),
    ],
    ids=str,
)
def test_what_is_no_address_of_a_guest(ips: object, fault: str) -> None:
    (line,) = faults(guest(mac="52:54:00:00:00:01", ips=ips))
    assert fault in line
    config.parse(guest(mac="52:54:00:00:00:01", ips=["10.0.0.1"] * 16))


@pytest.mark.parametrize("more", [{}, {"mac": "52:54:00:00:00:01", "check_source": False}], ids=str)
def test_addresses_of_a_guest_need_its_mac_and_its_check(more: dict[str, object]) -> None:
    (line,) = faults(guest(ips="10.0.0.5", **more))
    assert line == 'guest "web": ips = "10.0.0.5": needs mac, and its check'


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1MiB", 1 << 20),
        (1 << 20, 1 << 20),
        ("1048576", 1 << 20),
        ("1024KiB", 1 << 20),
        ("64GiB", 64 << 30),
        ("8TiB", 8 << 40),
    ],
    ids=str,
)
def test_13_the_memory_of_a_guest_is_a_size(size: object, expected: int) -> None:
    made = config.parse({"max_memory": size, "guest": [{"name": "a", "socket": "/a", "max_memory": size}]})
    assert (made.max_memory, made.guests[0].max_memory) == (expected, expected)


@pytest.mark.parametrize(
    "size",
    ["1023KiB", (1 << 20) - 1, "8193GiB", (8 << 40) + 1, "64G", "64 GiB", "-1", "", "GiB", True, 1.5, None, []],
    ids=str,
)
def test_13_what_is_no_size_is_a_fault(size: object) -> None:
    for raw_, where in ((guest() | {"max_memory": size}, ""), (guest(max_memory=size), 'guest "web": ')):
        if size is not None or not where:
            (line,) = faults(raw_)
            assert line.startswith(f"{where}max_memory = ")
            assert 'must be 1MiB..8TiB, as "64GiB"' in line


def test_13_all_guests_memory_fits_into_our_address_space() -> None:
    """15 frontends of 8 TiB had it all."""
    assert config.parse(guest()).max_memory == 256 << 30
    config.parse({"guest": [{"name": f"g{n}", "socket": f"/{n}"} for n in range(128)]})
    many = [{"name": f"g{n}", "socket": f"/{n}", "max_memory": "8TiB"} for n in range(7)]
    config.parse({"max_memory": "4TiB", "guest": [*many, {"name": "a", "socket": "/a"}, {"name": "b", "socket": "/b"}]})
    more = {"name": "c", "socket": "/c", "max_memory": "1MiB"}
    full = [*many, {"name": "a", "socket": "/a", "max_memory": "8TiB"}]
    config.parse({"guest": full})
    assert faults({"guest": [*full, more]}) == [
        "max_memory: 65536 GiB for all guests together: at most 65536 GiB are possible"
    ]


@pytest.mark.parametrize(
    ("key", "value", "made"),
    [
        ("user", "libvirt-qemu", "libvirt-qemu"),
        ("user", "64055", 64055),
        ("user", 0, 0),
        ("user", (1 << 32) - 2, (1 << 32) - 2),
        ("group", "domain$", "domain$"),
        ("mode", "0600", 0o600),
        ("mode", "777", 0o777),
    ],
)
def test_who_may_use_a_socket_is_given_by_name_or_number(key: str, value: object, made: object) -> None:
    assert getattr(config.parse(guest(**{key: value})).guests[0], key) == made


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("user", ""),
        ("user", -1),
        ("user", (1 << 32) - 1),
        ("user", True),
        ("user", "a:b"),
        ("group", "x" * 34),
        ("mode", 600),
        ("mode", "0800"),
        ("mode", "1777"),
        ("mode", "rw"),
    ],
)
def test_what_names_no_user_and_no_permissions_is_refused(key: str, value: object) -> None:
    (line,) = faults(guest(**{key: value}))
    assert line.startswith(f'guest "web": {key} = ')


@pytest.mark.parametrize("where", [{"client": True}, {"client": "on"}, {"socket": None, "fd": 3}], ids=str)
def test_group_and_permissions_are_those_of_a_socket_that_we_make(where: dict[str, object]) -> None:
    assert config.parse(guest(user="kvm", **where)).guests[0].user == "kvm"
    wrong = [line.partition(": needs")[0] for line in faults(guest(group="kvm", mode="0660", **where))]
    assert wrong == ['guest "web": group = "kvm"', 'guest "web": mode = "0660"']


def test_a_flag_changes_the_guest_of_the_file_and_adds_an_unknown_one() -> None:
    file = {"workers": 1, "guest": [{"name": "web", "socket": "/a", "queues": 2}]}
    flags = {"workers": "2", "guest": [{"name": "web", "queues": "4"}, {"name": "db", "socket": "/b"}]}
    made = config.parse(config.merge(file, flags))
    assert made.workers == 2
    assert [(g.name, g.socket, g.queues) for g in made.guests] == [("web", "/a", 4), ("db", "/b", 1)]


def test_a_name_in_the_file_that_is_no_word_is_a_fault_with_flags_too() -> None:
    file = {"guest": [{"name": {"a": 1}, "socket": "/a"}, {"name": ["web"], "socket": "/b"}]}
    with pytest.raises(ConfigError) as caught:
        config.parse(config.merge(file, {"guest": [{"name": "web", "socket": "/c"}]}))
    assert [line.partition(" = ")[0] for line in caught.value.faults] == ["guest 1: name", "guest 2: name"]


def test_a_flag_that_is_not_key_value_is_a_fault_beside_the_others() -> None:
    wrong: list[str] = []
    table = config.parse_flag("web,socket=/a,client,queues=99,queues=1", "name", wrong)
    with pytest.raises(ConfigError) as caught:
        config.parse({"guest": [table]}, wrong)
    assert caught.value.faults == [
        "guest \"web,socket=/a,client,queues=99,queues=1\": 'client': must be KEY=VALUE",
        'guest "web,socket=/a,client,queues=99,queues=1": queues: given twice',
        'guest "web": queues = "99": must be 1..16',
    ]


@pytest.mark.parametrize(
    "text", [b"workers = ", b"\xff\xfe", b"x = " + b"[" * 5000, b"#" * (1 << 20) + b"\n", b"guest = 7", b"guest = [3]"]
)
def test_a_file_that_is_no_configuration_is_named_and_nothing_else_happens(tmp_path: Path, text: bytes) -> None:
    file = tmp_path / "bad.toml"
    file.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        Origin(str(file)).read()
    assert caught.value.faults
    assert all(fault.startswith(f"{file}:") for fault in caught.value.faults)


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"^/nonexistent/x\.toml: No such file"):
        config.read_file("/nonexistent/x.toml")


def keys(model: type[BaseModel]) -> set[str]:
    return {field.alias or name for name, field in model.model_fields.items()} - {"fd"}  # a flag alone


def test_each_key_has_its_row_in_the_manual_and_its_line_in_the_example() -> None:
    every = keys(config.Config) | keys(config.GuestConfig) | keys(config.NetdevConfig)
    manual, example = ((DEPLOY / file).read_text() for file in ("README.md", "xdpnet.toml"))
    (table,) = re.findall(r"^\| key \|.*\n\|[-|]+\|\n((?:\|.*\n)+)", manual, re.MULTILINE)
    rows = {key for row in table.splitlines() for key in re.findall(r"`(?:\[\[)?(\w+)(?:\]\])?`", row.split("|")[1])}
    assert rows == every
    assert set(re.findall(r"^(?:# )?(?:\[\[)?(\w+)(?:\]\]$| = )", example, re.MULTILINE)) == every


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8) | st.floats(),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "socket", "mac", "queues", "x"]), inner, max_size=3)
    ),
    max_leaves=8,
)


@settings(max_examples=150, deadline=None)
@given(st.dictionaries(st.sampled_from(["guest", "netdev", "workers", "cpus", "metrics", "control", "y"]), VALUES))
def test_no_table_of_any_shape_raises_anything_but_a_config_error(tables: dict[str, Any]) -> None:
    with contextlib.suppress(ConfigError):
        config.parse(tables)


@settings(max_examples=100, deadline=None)
@given(st.text(max_size=40))
def test_no_flag_of_any_shape_raises_anything_but_a_config_error(flag: str) -> None:
    wrong: list[str] = []
    with contextlib.suppress(ConfigError):
        config.parse({"guest": [config.parse_flag(flag, "name", wrong)]}, wrong)
