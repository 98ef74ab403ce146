"""From one configuration to another: which steps, in which order. Nothing here runs."""

from typing import Any

import pytest

from xdpnet import config
from xdpnet.config import Config, parse
from xdpnet.control.plan import BridgeStep, GuestStep, NetdevStep, Plan, plan
from xdpnet.core import MAX_PORTS
from xdpnet.origin import Origin

A, B, C = (f"52:54:00:00:00:0{number}" for number in range(1, 4))


def of(*guests: dict[str, Any], netdevs: tuple[str, ...] = (), **keys: Any) -> Config:
    tables = [{"socket": f"/run/{guest['name']}.sock"} | guest for guest in guests]
    return parse({"guest": tables, "netdev": [{"interface": name} for name in netdevs], **keys})


def said(made: Plan) -> list[str]:
    return [str(step) for step in made.steps]


WEB, DB = {"name": "web", "mac": A}, {"name": "db", "mac": B}


def test_from_a_configuration_to_itself_there_is_no_step() -> None:
    both = of(WEB, DB, netdevs=("eth1",))
    assert plan(both, of(DB, WEB, netdevs=("eth1",))) == Plan([])


def test_what_is_changed_comes_before_what_is_added_and_that_before_what_is_removed() -> None:
    before = of(WEB, {"name": "old"}, netdevs=("eth1",))
    after = of(WEB | {"mtu": 9000}, DB, netdevs=("eth1", "eth2"), spin_us=1, metrics="127.0.0.1:9100")
    assert said(plan(before, after)) == [
        "bridge: spin_us, metrics", "guest web: mtu", "netdev eth2: added", "guest db: added", "guest old: removed",
    ]  # fmt: skip


@pytest.mark.parametrize("taken", [{"socket": "/run/old.sock"}, {"mac": C}], ids=["socket", "mac"])
def test_what_others_are_to_have_is_removed_first(taken: dict[str, str]) -> None:
    before = of(WEB, {"name": "old", "mac": C}, {"name": "other"})
    for after in of(WEB, DB | taken), of(WEB | taken):
        steps = said(plan(before, after))
        assert (steps[0], steps[-1]) == ("guest old: removed", "guest other: removed")


def test_an_interface_is_removed_before_one_comes_that_may_be_the_same() -> None:
    assert said(plan(of(WEB, netdevs=("eth1",)), of(WEB, netdevs=("lan",)))) == [
        "netdev eth1: removed", "netdev lan: added",
    ]  # fmt: skip


def test_with_as_many_ports_as_there_may_be_room_is_made_first() -> None:
    many = [{"name": f"g{number}"} for number in range(MAX_PORTS)]
    assert said(plan(of(*many[1:]), of(*many[2:], WEB)))[0] == "guest web: added"
    assert said(plan(of(*many), of(*many[1:], WEB)))[0] == "guest g0: removed"


def test_a_guest_finds_free_what_another_gives_up() -> None:
    names = "pqr"
    before = of(*({"name": name, "mac": mac} for name, mac in zip(names, (A, B, C), strict=True)))
    after = of({"name": "p", "mac": B}, {"name": "q", "mac": C}, {"name": "r"})
    assert said(plan(before, after)) == ["guest r: mac", "guest q: mac", "guest p: mac"]


def test_of_guests_that_exchange_addresses_one_is_taken_away_meanwhile() -> None:
    before, after = of(WEB, DB), of(WEB | {"mac": B}, DB | {"mac": A})
    assert said(plan(before, after)) == ["guest web: removed", "guest db: mac", "guest web: added"]


@pytest.mark.parametrize(("key", "value"), [("queues", 2), ("mtu", 9000), ("guest_offloads", False)])
def test_what_a_driver_has_negotiated_takes_a_new_connection(key: str, value: object) -> None:
    (step,) = plan(of(WEB), of(WEB | {key: value})).steps
    assert isinstance(step, GuestStep)
    assert step.rejoins == [key]


@pytest.mark.parametrize(
    "more",
    [{"mac": B}, {"socket": "/run/x"}, {"client": True}, {"check_source": False}, {"ips": ["10.0.0.1"]}, {"poll": True},
     {"max_memory": "1GiB"}, {"user": 7}, {"group": "kvm"}, {"mode": "0600"}],
    ids=str,
)  # fmt: skip
def test_every_other_key_of_a_guest_changes_while_it_is_connected(more: dict[str, Any]) -> None:
    (step,) = plan(of(WEB), of(WEB | more)).steps
    assert isinstance(step, GuestStep)
    assert (step.spelt_keys, step.rejoins) == ([*more], [])


@pytest.mark.parametrize(
    ("more", "key"),
    [({"workers": 2}, "workers"), ({"cpus": "0,1"}, "workers"), ({"frames_per_queue": 256}, "frames_per_queue"),
     ({"max_macs": 1}, "max_macs"), ({"control": "/run/c"}, "control")],
)  # fmt: skip
def test_what_takes_a_new_start_is_named_with_the_remedy(more: dict[str, Any], key: str) -> None:
    made = plan(of(WEB), of(WEB, **more))
    assert [fault.partition(":")[0] for fault in made.anew] == [key]
    assert "systemctl reload" in made.anew[0]


@pytest.mark.parametrize("more", [{"spin_us": 1}, {"ageing_s": 1}, {"cpus": "0"}, {"max_memory": "1GiB"},
                                  {"metrics": "[::1]:1"}], ids=str)  # fmt: skip
def test_every_other_key_of_the_bridge_changes_while_it_runs(more: dict[str, Any]) -> None:
    made = plan(of(WEB), of(WEB, **more))
    assert (said(made), made.anew) == ([f"bridge: {', '.join(more)}"], ())


def test_an_inherited_connection_neither_comes_nor_changes_but_it_may_go() -> None:
    inherited = parse({"guest": [{"name": "web", "fd": 3}]})
    other = parse({"guest": [{"name": "web", "fd": 4}]})
    both = parse({"guest": [{"name": "web", "fd": 3}, {"name": "db", "socket": "/run/db"}]})
    assert plan(of(WEB), inherited).never
    assert plan(inherited, of(WEB)).never
    assert plan(inherited, other).never
    assert plan(inherited, both).never == ()
    assert plan(both, of({"name": "db", "socket": "/run/db"})).never == ()


def test_a_step_that_is_turned_round_undoes_it() -> None:
    before, after = (
        of(WEB, {"name": "old"}, netdevs=("eth1",)),
        of(WEB | {"mtu": 1500}, DB, netdevs=("eth2",), spin_us=1),
    )
    turned = [step.turned_round for step in plan(before, after).steps]
    assert {str(step) for step in turned} == {str(step) for step in plan(after, before).steps}
    assert {type(step) for step in turned} == {GuestStep, NetdevStep, BridgeStep}


# ---- the configuration as a file ----

FULL: dict[str, Any] = {
    "cpus": "0,2-3", "spin_us": 0, "control": "", "metrics": "[::1]:9100", "max_memory": "64GiB",
    "netdev": [{"interface": "eth1", "queues": 2, "mode": "generic", "zerocopy": "off"}, {"interface": "lan"}],
    "guest": [
        {"name": "web", "socket": '/run/"w\\eb\x7f\x01é😀.sock', "mac": [A, B], "ips": ["10.0.0.5", "fd00::5"],
         "check_source": True, "mode": "0600", "user": "www", "group": 7, "mtu": 9000, "max_memory": "1GiB"},
        {"name": "db", "socket": "/run/db.sock", "mac": C, "client": True, "poll": True, "guest_offloads": False},
        {"name": "old", "fd": 3, "queues": 16},
    ],
}  # fmt: skip


@pytest.mark.parametrize(
    "raw", [FULL, {"guest": [{"name": "web", "socket": "/run/web"}]}], ids=["all keys", "one guest"]
)
def test_a_configuration_that_is_written_and_read_again_is_the_same(raw: dict[str, Any], tmp_path: Any) -> None:
    made = parse(raw)
    (tmp_path / "file").write_text(config.to_toml(made))
    assert Origin(str(tmp_path / "file")).read() == made
    assert parse(config.to_raw(made)) == made
