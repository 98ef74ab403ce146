"""The snapshot's three faces: JSON, table and Prometheus metrics; and the endpoint that serves them."""

import asyncio
import gzip
import http.client
import json
import os
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import replace
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console

from tests.rig.clock import Clock
from tests.rig.snapshots import exposition, guest_port, netdev_port, ring, snapshot, traffic, worker
from tests.rig.waiting import PATIENCE_S
from xdpnet import core
from xdpnet.core import MAX_PORTS
from xdpnet.counters import XdpStatistics, declared
from xdpnet.errors import SetupError
from xdpnet.metrics import table, take
from xdpnet.metrics.endpoint import CONNECTIONS, DEADLINE_S, PAGES, REQUEST_BYTES, REUSE, MetricsEndpoint, faults
from xdpnet.metrics.snapshot import Offence, Port, Queue, Snapshot, total
from xdpnet.states import NO_MEMORY


def page(now: Snapshot, before: Snapshot | None = None, width: int = 100, view: table.View | None = None) -> str:
    console = Console(width=width, record=True, file=open(os.devnull, "w"), force_terminal=False)  # noqa: SIM115
    with console.file:
        console.print(table.render(now, before, view or table.View()))
    return console.export_text()


# ---- the books ----


def test_frames_in_and_copies_are_frames_out_and_drops() -> None:
    totals = total([guest_port(), netdev_port()])
    assert totals.frames_in == 1_000 + 12_345_700
    assert totals.frames_out == 12_345_678 + 995
    assert totals.rest == 0


def test_a_drop_on_the_delivering_side_counts_like_one_on_the_sending_side() -> None:
    sender = Port("a", 0, (Queue(0, traffic(), traffic(10, {"spoof": 3})),), guest=guest_port().guest)
    receiver = Port("b", 1, (Queue(0, traffic(5, {"no_buffer": 2}), traffic()),), guest=guest_port().guest)
    totals = total([sender, receiver])
    assert (totals.frames_in, totals.frames_out, totals.drops) == (10, 5, 5)


# ---- JSON ----


def test_a_snapshot_survives_json() -> None:
    shown = snapshot()
    assert Snapshot.from_json(json.loads(shown.to_json())) == shown


def test_json_of_another_version_is_refused() -> None:
    document = json.loads(snapshot().to_json())
    del document["totals"]
    with pytest.raises(ValueError, match="totals"):
        Snapshot.from_json(document)


# ---- the table ----


@pytest.mark.parametrize("width", [80, 100, 140])
def test_the_table_shows_what_matters_without_cutting_a_heading(width: int) -> None:
    text = page(snapshot(), width=width)
    words = (
        *("web", "eth1", "XDP native", "copy mode", "MTU 1500", "MTU 9000", "guest 12.35M"),
        *("no_buffer 22", "spoof 10", "Drops by reason", "Drops"),
    )
    for word in words:
        assert word in " ".join(text.split())
    for word in "lost: group 6", "not learned: addresses 8":  # which may stand on two lines
        assert word in " ".join(text.split())
    books = "in 12,346,700 + copies 5 = out 12,346,673 + drops 32 every frame accounted for"
    assert books in " ".join(text.split())
    assert "…" not in text
    if width > 80:
        assert "790.1 MB" in text
        assert "99,000" in text


@pytest.mark.parametrize("width", [80, 100, 140, 200])
@pytest.mark.parametrize("rated", [False, True], ids=["in all", "with rates"])
def test_no_row_is_wider_than_the_terminal_and_drops_have_their_room_with_their_rate(width: int, rated: bool) -> None:
    drops = {"spoof": 123_456_789, "no_buffer": 10_000, "no_port": 999}
    many = traffic(12_345_678, drops, calls=10**12, calls_saved=10**12, kicks=10**12, kicks_saved=10**12)
    port = Port("a-long-name-01", 0, (Queue(11, many, many, ring(), ring()),), guest_port().guest)
    before = snapshot(Port("a-long-name-01", 0, (Queue(11, traffic(), traffic()),), guest_port().guest))
    now = snapshot(port, netdev_port(), time=1002.0)
    lines = page(now, before if rated else None, width).splitlines()
    assert max(len(line.rstrip()) for line in lines) <= width
    text = "\n".join(lines)
    for word in "spoof 123.5M", "no_buffer 10,000", "no_port 999":
        assert text.count(word) == 2
    if rated:
        assert text.count("Drops/s") == 2
        assert text.count("61.73M") >= 2  # of each direction
    assert "Drops by reason" in text


def test_where_there_is_no_room_what_matters_least_is_left_out_first() -> None:
    """Calls and kicks, those saved first; then the totals that have a rate beside them."""
    before = snapshot(time=999.0)
    widths = (80, 110, 140)
    seen = {width: page(snapshot(), before, width) for width in widths}
    for word, least in ("Drops/s", 80), ("Packets/s", 80), ("Bytes", 110), ("taken", 110), ("99,000", 140):
        assert [width for width, text in seen.items() if word in text] == [each for each in widths if each >= least], (
            word
        )


def loaded() -> tuple[Snapshot, Snapshot]:
    """Two seconds: db lost the most of late, web the most in all; mail had most of the workers' time."""
    totals = {"web": (5_000, 10, 100), "db": (700, 600, 200), "mail": (0, 0, 1_700)}

    def made(name: str, number: int, dropped: int, cycles: int) -> Port:
        queue = Queue(0, traffic(number, {"no_buffer": dropped}), traffic(), ring(), ring())
        return Port(name, number, (queue,), guest_port().guest, busy_cycles=cycles)

    before = [made(name, at, total - lately, 50) for at, (name, (total, lately, _)) in enumerate(totals.items())]
    now = [made(name, at, total, 50 + cycles) for at, (name, (total, _, cycles)) in enumerate(totals.items())]
    return (
        snapshot(*now, time=1002.0, workers=(worker(1, cpu_s=7.5),)),
        snapshot(*before, workers=(worker(1, cpu_s=6.5),)),
    )


def order(text: str) -> list[str]:
    """Of ports, in the first table."""
    return [line.split()[0] for line in text.splitlines() if line.split()[:1] in (["web"], ["db"], ["mail"])][:3]


def test_ports_are_sorted_by_what_they_lose_lately_or_in_all_and_by_what_they_cost() -> None:
    now, before = loaded()
    for sort, rated, expected in (
        (None, True, ["web", "db", "mail"]),
        ("name", True, ["db", "mail", "web"]),
        ("drops", True, ["db", "web", "mail"]),
        ("drops", False, ["web", "db", "mail"]),
        ("cpu", True, ["mail", "db", "web"]),
    ):
        view = table.View(sort)  # type: ignore[arg-type]
        assert order(page(now, before if rated else None, view=view)) == expected


def test_a_worker_has_its_part_of_a_processor_and_each_port_its_share_of_that() -> None:
    now, before = loaded()
    text = page(now, before)
    rows = [line.split() for line in text.splitlines()]
    assert next(row for row in rows if row[:2] == ["0", "any"])[2] == "50.0"  # one second of two
    shares = {row[0]: row[5] for row in reversed(rows) if len(row) > 6 and row[0] in ("web", "db", "mail")}
    assert shares == {"web": "2.5", "db": "5.0", "mail": "42.5"}
    assert 'xdpnet_worker_cpu_seconds_total{worker="0"} 7.5' in exposition(now)
    assert 'xdpnet_port_busy_cycles_total{port="mail"} 1750.0' in exposition(now)


def test_only_the_ports_that_are_asked_for_are_shown_and_the_books_stay_whole() -> None:
    text = page(snapshot(), view=table.View(ports=frozenset(["eth1"])))
    assert "web" not in text
    assert "eth1" in text
    assert "in 12,346,700" in text


def test_the_state_of_a_guest_stands_in_the_table_with_its_remedy_and_is_a_metric() -> None:
    shown = snapshot(guest_port(state=NO_MEMORY))
    assert "memory is not shared (share=on); give its QEMU -object" in " ".join(page(shown).split())
    assert 'xdpnet_guest_state{port="web",state="no_memory"} 1.0' in exposition(shown)
    assert 'xdpnet_guest_state{port="web",state="up"} 1.0' in exposition(snapshot())
    assert json.loads(shown.to_json())["ports"][0]["guest"]["state"]["words"] == "memory is not shared (share=on)"


@pytest.mark.parametrize(
    ("last", "words"),
    [
        (
            Offence("spoof", "52:54:00:00:00:09", "ff:ff:ff:ff:ff:ff", 0x806, "", 3.2),
            "last spoof: from 52:54:00:00:00:09",
        ),
        (
            Offence("policy", "52:54:00:00:00:01", "ff:ff:ff:ff:ff:ff", 0x806, "10.0.0.9", 3.2),
            "last policy: as 10.0.0.9",
        ),
        (
            Offence("policy", "52:54:00:00:00:01", "01:80:c2:00:00:0e", 0x88CC, "", 3.2),
            "last policy: to 01:80:c2:00:00:0e, EtherType 0x88cc",
        ),
    ],
)
def test_of_what_a_guest_may_not_send_the_last_is_shown_and_is_no_label(last: Offence, words: str) -> None:
    shown = snapshot(guest_port(offences=(last,)))
    assert f"{words}, 0 min 03 s ago" in " ".join(page(shown).split())
    assert Snapshot.from_json(json.loads(shown.to_json())) == shown
    assert last.ip not in exposition(shown) or not last.ip
    assert "52:54" not in exposition(shown)


def test_frames_on_their_way_are_named() -> None:
    assert "+5 on their way" in page(snapshot(Port("db", 0, (Queue(0, traffic(), traffic(5)),), guest_port().guest)))


def test_rates_come_from_the_difference_and_the_time_between() -> None:
    before = snapshot(Port("web", 0, (Queue(0, traffic(), traffic(1_000)),), guest_port().guest))
    now = snapshot(Port("web", 0, (Queue(0, traffic(), traffic(5_000)),), guest_port().guest), time=1002.0)
    (line,) = [line for line in page(now, before).splitlines() if " tx " in line and "web" in line][:1]
    assert "2,000" in line  # (5000 - 1000) / 2 s
    assert "1.0" in line  # 4000 * 64 * 8 / 2 s / 1e6


def test_a_restarted_daemon_gives_no_rates() -> None:
    assert "Packets/s" not in page(snapshot(time=2000.0, uptime_s=5.0), snapshot(time=1000.0))
    assert "Packets/s" not in page(snapshot(time=10.0, uptime_s=5.0), snapshot(time=1000.0))


@pytest.mark.parametrize(
    ("state", "word"),
    [
        (ring(started=False), "stopped"),
        (ring(enabled=False), "disabled"),
        (ring(broken="avail_jump"), "broken: avail_jump"),
        (ring(), "up"),
    ],
)
def test_the_state_of_a_ring_is_one_word(state: object, word: str) -> None:
    queue = replace(guest_port().queues[0], rx_ring=state)  # type: ignore[arg-type]
    assert word in page(snapshot(replace(guest_port(), queues=(queue,))))


def test_an_interface_that_is_gone_is_said_so() -> None:
    assert "interface gone" in page(snapshot(netdev_port(alive=False)))


@pytest.mark.parametrize(
    ("number", "shown"),
    [(0, "0"), (9_999_999, "9,999,999"), (10_000_000, "10M"), (12_345_678, "12.35M"), (2**64 - 1, "18.45E")],
)
def test_large_counts_are_shortened(number: int, shown: str) -> None:
    assert table.count(number) == shown


# ---- metrics ----


def test_every_queue_has_its_packets_bytes_and_drops_by_reason() -> None:
    text = exposition(snapshot())
    for line in (
        'xdpnet_queue_packets_total{direction="tx",port="web",queue="0"} 1000.0',
        'xdpnet_queue_bytes_total{direction="tx",port="web",queue="0"} 64000.0',
        'xdpnet_queue_drops_total{direction="rx",port="web",queue="0",reason="no_buffer"} 22.0',
        'xdpnet_queue_drops_total{direction="rx",port="web",queue="0",reason="spoof"} 0.0',
        'xdpnet_queue_kicks_total{direction="tx",port="web",queue="0"} 30.0',
        'xdpnet_queue_kicks_saved_total{direction="tx",port="web",queue="0"} 970.0',
        'xdpnet_queue_calls_total{direction="rx",port="web",queue="0"} 900.0',
        'xdpnet_queue_calls_saved_total{direction="rx",port="web",queue="0"} 99000.0',
        'xdpnet_ring_index{direction="rx",index="used_event",port="web",queue="0"} 990.0',
        'xdpnet_ring_up{direction="rx",port="web",queue="0"} 1.0',
        'xdpnet_xdp_info{interface="eth1",mode="native",policy="auto",zerocopy="false"} 1.0',
        'xdpnet_xdp_verdicts_total{interface="eth1",verdict="host"} 17.0',
        'xdpnet_netdev_group_frames_lost_total{interface="eth1"} 6.0',
        'xdpnet_netdev_unserved_queues{interface="eth1"} 2.0',
        'xdpnet_netdev_mtu{interface="eth1"} 1500.0',
        'xdpnet_guest_mtu{port="web"} 9000.0',
        'xdpnet_queue_unlearned_total{direction="tx",port="web",queue="0"} 8.0',
        'xdpnet_queue_waited_total{direction="rx",port="web",queue="0"} 41.0',
        'xdpnet_ring_waiting_frames{direction="rx",port="web",queue="0"} 0.0',
        'xdpnet_guest_connected{port="web"} 1.0',
        'xdpnet_guest_state{port="web",state="up"} 1.0',
        'xdpnet_vhost_user_errors_total{port="web",reason="order"} 2.0',
        'xdpnet_fdb_entries{port="web",type="learned"} 1.0',
        'xdpnet_build_info{version="1.2.3"} 1.0',
    ):
        assert line in sort_labels(text)


def sort_labels(text: str) -> str:
    lines = []
    for line in text.splitlines():
        name, brace, rest = line.partition("{")
        if brace and not line.startswith("#"):
            labels, _, value = rest.rpartition("}")
            line = f"{name}{{{','.join(sorted(labels.split(',')))}}}{value}"
        lines.append(line)
    return "\n".join(lines)


def test_all_six_xdp_statistics_are_metrics() -> None:
    families = {family.name: family for family in text_string_to_metric_families(exposition(snapshot()))}
    for at, name in enumerate(declared(XdpStatistics)):
        (sample,) = families[f"xdpnet_xsk_{name}"].samples
        assert sample.value == at


def test_the_metrics_of_no_port_at_all_are_legal() -> None:
    assert "xdpnet_build_info" in exposition(snapshot(ports=()))


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_finds_nothing_to_say() -> None:
    shown = snapshot(guest_port(), netdev_port(), Port("db", 2, (Queue(0, traffic(), traffic(), ring(broken="loop")),)))
    checked = subprocess.run(
        ["promtool", "check", "metrics"], input=exposition(shown), capture_output=True, text=True, check=False
    )
    assert (checked.returncode, checked.stdout, checked.stderr) == (0, "", "")


# ---- the endpoint ----


async def current() -> Snapshot:
    return snapshot(tid=threading.get_native_id())


@asynccontextmanager
async def endpoint(
    take: Callable[[], Awaitable[Snapshot]] = current,
    address: tuple[str, int] = ("127.0.0.1", 0),
    clock: Callable[[], float] = time.monotonic,
    spent: Callable[[], float] = time.thread_time,
) -> AsyncIterator[tuple[str, int]]:
    served = MetricsEndpoint(address, take, clock=clock, spent=spent)
    try:
        yield served.address
    finally:
        served.close()


Answer = tuple[int, dict[str, str], bytes]  # status, header fields, body


def get(address: tuple[str, int], path: str, method: str = "GET", headers: dict[str, str] | None = None) -> Answer:
    connection = http.client.HTTPConnection(*address, timeout=PATIENCE_S)
    try:
        connection.request(method, path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, dict(answer.getheaders()), answer.read()
    finally:
        connection.close()


def ask(
    path: str,
    method: str = "GET",
    take: Callable[[], Awaitable[Snapshot]] = current,
    headers: dict[str, str] | None = None,
) -> Answer:
    async def exchange() -> Answer:
        async with endpoint(take) as address:
            return await asyncio.to_thread(get, address, path, method, headers)

    return asyncio.run(exchange())


def test_metrics_are_served_in_the_text_format() -> None:
    status, headers, body = ask("/metrics")
    assert status == 200
    assert headers["Content-Type"].startswith("text/plain; version=")
    assert b"xdpnet_queue_packets_total" in body
    assert b"process_resident_memory_bytes" in body


def test_a_scraper_that_asks_for_openmetrics_gets_it_and_gzip() -> None:
    headers = {"Accept": "application/openmetrics-text; version=1.0.0", "Accept-Encoding": "gzip"}
    _, answer, body = ask("/metrics?name[]=x", headers=headers)
    assert answer["Content-Type"].startswith("application/openmetrics-text")
    assert gzip.decompress(body).endswith(b"# EOF\n")


def test_health_is_200_while_workers_run_and_interfaces_are_there() -> None:
    assert ask("/healthz")[::2] == (200, b"ok\n")


def test_health_is_503_with_every_reason() -> None:
    async def ill() -> Snapshot:
        return snapshot(netdev_port(alive=False), tid=0)

    assert ask("/healthz", take=ill)[::2] == (503, b"worker 0 does not run\ninterface eth1 is gone\n")


def test_a_thread_that_is_not_ours_is_no_running_worker() -> None:
    assert faults(snapshot(guest_port(), tid=1)) == ["worker 0 does not run"]


def test_a_worker_that_does_not_go_on_is_an_illness_and_the_page_says_where_it_is() -> None:
    stuck = worker(os.getpid(), stalled_s=2.04, stalled_at="at guest web's rx ring 0")
    assert faults(snapshot(workers=(stuck,))) == ["worker 0 has been at guest web's rx ring 0 for 2.0 s"]
    assert "worker 0 has been at guest web's rx ring 0 for 2.0 s" in page(snapshot(workers=(stuck,)))
    assert "has been at" not in page(snapshot())
    assert 'xdpnet_worker_stalled_seconds{worker="0"} 2.04' in exposition(snapshot(workers=(stuck,)))
    assert 'xdpnet_worker_stalled_seconds{worker="0"} 0.0' in exposition(snapshot())


def test_a_guest_that_is_absent_is_no_illness() -> None:
    assert faults(snapshot(guest_port(connected=False), tid=os.getpid())) == []


def test_a_snapshot_that_fails_is_a_500_and_the_next_scrape_works() -> None:
    calls = []

    async def flaky() -> Snapshot:
        calls.append(1)
        if len(calls) == 1:
            raise OSError("read counters: EIO")
        return snapshot()

    async def twice() -> tuple[int, int]:
        async with endpoint(flaky) as address:
            first = await asyncio.to_thread(get, address, "/metrics")
            second = await asyncio.to_thread(get, address, "/metrics")
            return first[0], second[0]

    assert asyncio.run(twice()) == (500, 200)


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [("/", "GET", 404), ("/metrics/", "GET", 404), ("/metrics", "POST", 405), ("/metrics", "HEAD", 200)],
)
def test_anything_else_is_refused_by_the_book(path: str, method: str, status: int) -> None:
    answer = ask(path, method)
    assert answer[0] == status
    if method == "HEAD":
        assert answer[2] == b""
        assert int(answer[1]["Content-Length"]) > 1000


def raw(address: tuple[str, int], request: bytes) -> bytes:
    with socket.create_connection(address, timeout=PATIENCE_S) as sock:
        sock.sendall(request)
        answer = b""
        while piece := sock.recv(65536):
            answer += piece
        return answer


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (b"\r\n\r\n", b"400"),
        (b"GET /metrics\r\n\r\n", b"400"),
        (b"GET /metrics SSH/2.0\r\n\r\n", b"400"),
        (b"\xff\xfe\x00 / HTTP/1.1\r\n\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: b\r\n" * 101 + b"\r\n", b"400"),
        (b"GET /metrics HTTP/1.1\r\n" + b"A: " + b"b" * REQUEST_BYTES + b"\r\n\r\n", b"431"),
    ],
)
def test_a_malformed_request_is_answered_and_the_next_one_served(request_: bytes, status: bytes) -> None:
    async def exchange() -> tuple[bytes, int]:
        async with endpoint() as address:
            answer = await asyncio.to_thread(raw, address, request_)
            return answer, (await asyncio.to_thread(get, address, "/healthz"))[0]

    answer, afterwards = asyncio.run(exchange())
    assert answer.split(b" ")[1] == status
    assert afterwards == 200


def test_eight_connections_are_served_at_once_and_the_ninth_when_one_of_them_has_gone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("xdpnet.metrics.endpoint.DEADLINE_S", PATIENCE_S)  # nobody makes room by being cut off

    async def exchange() -> list[int]:
        async with endpoint() as address:
            silent = [socket.create_connection(address) for _ in range(CONNECTIONS - 1)]
            try:
                eighth = (await asyncio.to_thread(get, address, "/healthz"))[0]
                silent.append(socket.create_connection(address))
                waiting = asyncio.create_task(asyncio.to_thread(get, address, "/healthz"))
                silent[0].close()
                return [eighth, (await waiting)[0]]
            finally:
                for sock in silent:
                    sock.close()

    assert asyncio.run(exchange()) == [200, 200]


class Second(Clock):
    """A second passes for whoever looks: a snapshot takes one, and so does a page."""

    def __call__(self) -> float:
        self.now += 1
        return self.now


def scrapes(count: int, clock: Clock, spent: Clock, pause_s: float, accept: Callable[[int], str]) -> tuple[int, int]:
    """How many snapshots were taken and formats made for so many scrapes."""
    taken, made = [], set()

    async def take() -> Snapshot:
        taken.append(1)
        return snapshot(guest_port(messages=len(taken)))

    async def scrape() -> None:
        async with endpoint(take, clock=clock, spent=spent) as address:
            for number in range(count):
                headers = {"Accept": accept(number)}
                status, answered, body = await asyncio.to_thread(get, address, "/metrics", "GET", headers)
                assert status == 200
                made.add((answered["Content-Type"], body))
                clock.now += pause_s

    asyncio.run(scrape())
    return len(taken), len(made)


def test_a_flood_of_scrapes_gets_the_same_page_for_a_while() -> None:
    assert REUSE == 4
    for pause_s, expected in ((0.0, (1, 1)), (3.9, (5, 5)), (4.0, (10, 10)), (60.0, (10, 10))):
        assert scrapes(10, Clock(), Second(), pause_s, lambda _: "") == expected


@pytest.fixture(scope="module")
def largest() -> Iterator[Snapshot]:
    """Of as many guests as there may be, with eight queue pairs each."""
    with core.Bridge(workers=1) as bridge:
        guest = guest_port().guest
        assert guest is not None
        sources = [take.GuestSource(f"guest{n}", bridge.add_guest(8), 8, guest) for n in range(MAX_PORTS)]
        bridge.start()
        yield take.take(bridge, 1, sources, {}, 0.0, {})


@pytest.mark.parametrize("zipped", [False, True])
@pytest.mark.parametrize("accept", ["", "application/openmetrics-text; version=1.0.0"])
def test_a_scrape_of_as_many_guests_as_there_may_be_is_whole(largest: Snapshot, zipped: bool, accept: str) -> None:
    async def take_largest() -> Snapshot:
        return largest

    headers = {"Accept": accept, "Accept-Encoding": "gzip" if zipped else ""}
    status, answered, body = ask("/metrics", take=take_largest, headers=headers)
    assert (status, int(answered["Content-Length"])) == (200, len(body))
    text = gzip.decompress(body) if zipped else body
    assert text.count(b"\nxdpnet_queue_packets_total{") == MAX_PORTS * 8 * 2
    assert text.endswith(b"# EOF\n" if accept else b"\n")


def test_what_a_page_takes_us_is_not_its_clients_time_and_health_is_told_meanwhile() -> None:
    go_on = threading.Event()

    class Slow(Clock):
        """In the thread that makes the page."""

        def __call__(self) -> float:
            if threading.current_thread().name.startswith("Dummy"):
                assert go_on.wait(PATIENCE_S)
            return self.now

    async def exchange() -> tuple[int, int]:
        async with endpoint(spent=Slow()) as address:
            scrape = asyncio.create_task(asyncio.to_thread(get, address, "/metrics"))
            await asyncio.sleep(1.5 * DEADLINE_S)
            health = await asyncio.to_thread(get, address, "/healthz")
            assert not scrape.done()
            go_on.set()
            return health[0], (await scrape)[0]

    assert asyncio.run(exchange()) == (200, 200)


def test_the_table_has_a_line_for_each_queue_of_the_largest_daemon(largest: Snapshot) -> None:
    lines = page(largest, width=140).splitlines()
    assert sum(line.split()[:3] == ["guest127", "7", "rx"] for line in lines) == 2
    assert sum(line.startswith(" guest") for line in lines) == MAX_PORTS * (1 + 2 * 8 * 2)


def test_nobody_can_have_more_formats_made_than_there_are() -> None:
    def version(number: int) -> str:
        return f"application/openmetrics-text; version=1.0.{number}"

    assert scrapes(20, Clock(), Second(), 0.0, version) == (1, PAGES)


def test_many_who_ask_at_once_are_told_of_one_snapshot() -> None:
    async def ask_together() -> int:
        asked, go_on = [], asyncio.Event()

        async def take() -> Snapshot:
            asked.append(1)
            await go_on.wait()
            return snapshot()

        async with endpoint(take, clock=Clock(), spent=Second()) as address:
            waiting = [asyncio.create_task(asyncio.to_thread(get, address, "/healthz")) for _ in range(CONNECTIONS)]
            while not asked:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.1)
            go_on.set()
            await asyncio.gather(*waiting)
            return len(asked)

    assert asyncio.run(ask_together()) == 1


def test_a_client_that_dribbles_is_cut_off() -> None:
    async def exchange() -> None:
        async with endpoint() as address:
            reader, writer = await asyncio.open_connection(*address)
            closed = asyncio.ensure_future(reader.read())
            while not closed.done():  # a byte now and then, for ever: each read succeeds
                try:
                    writer.write(b"G")
                    await writer.drain()
                except OSError:
                    break
                await asyncio.sleep(0.1)
            writer.close()
            await asyncio.gather(closed, return_exceptions=True)

    asyncio.run(exchange())  # the test's own timeout is the judge


def test_a_port_that_is_taken_is_named_with_its_remedy() -> None:
    async def twice() -> None:
        async with endpoint() as address:
            with pytest.raises(SetupError, match=r"metrics 127\.0\.0\.1:\d+: Address already in use; name another"):
                MetricsEndpoint(address, current)

    asyncio.run(twice())


def test_ipv6_is_served() -> None:
    async def exchange() -> int:
        async with endpoint(address=("::1", 0)) as address:
            return (await asyncio.to_thread(get, address, "/healthz"))[0]

    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError as error:
        pytest.skip(f"no IPv6 here: {error}")
    assert asyncio.run(exchange()) == 200


def test_the_endpoint_leaves_no_thread_and_no_descriptor() -> None:
    async def once() -> None:
        async with endpoint() as address:
            await asyncio.to_thread(get, address, "/metrics")

    asyncio.run(once())
    before = set(os.listdir("/proc/self/fd")), threading.active_count()
    asyncio.run(once())
    assert (set(os.listdir("/proc/self/fd")), threading.active_count()) == before


# ---- what is deployed with it ----

DEPLOY = Path(__file__).parents[2] / "deploy"


@pytest.mark.parametrize("name", ["grafana-dashboard.json", "prometheus-rules.yml"])
def test_dashboard_and_rules_ask_for_metrics_and_labels_that_there_are(name: str) -> None:
    broken = Port("db", 2, (Queue(0, traffic(), traffic(), ring(broken="loop")),))
    text = exposition(snapshot(guest_port(), netdev_port(), broken))
    known = {sample.name for family in text_string_to_metric_families(text) for sample in family.samples}
    labels = {label for family in text_string_to_metric_families(text) for s in family.samples for label in s.labels}
    asked = (DEPLOY / name).read_text()
    metrics = set(re.findall(r"(?<![:\w])xdpnet_\w+|process_\w+", asked))
    assert metrics
    assert metrics <= known
    grouped = {label for group in re.findall(r"(?:by|without) \(([^)]*)\)", asked) for label in group.split(", ")}
    assert grouped <= labels | {"instance"}


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_promtool_takes_the_configuration_and_the_rules() -> None:
    checked = subprocess.run(
        ["promtool", "check", "config", str(DEPLOY / "prometheus.yml")], capture_output=True, text=True, check=False
    )
    assert checked.returncode == 0, checked.stderr


@pytest.mark.skipif(shutil.which("promtool") is None, reason="needs promtool (Debian package prometheus)")
def test_each_alert_fires_when_it_should_and_not_before() -> None:
    cases = Path(__file__).with_name("prometheus-rules-test.yml")
    tested = subprocess.run(["promtool", "test", "rules", str(cases)], capture_output=True, text=True, check=False)
    assert tested.returncode == 0, tested.stdout + tested.stderr
    alerts = set(re.findall(r"alert: (\w+)", (DEPLOY / "prometheus-rules.yml").read_text()))
    fires = set(re.findall(r"alertname: (\w+)\n\s+exp_alerts:\n", cases.read_text()))
    assert fires == alerts


def test_the_dashboard_shows_hosts_side_by_side_and_asks_for_no_job_by_name() -> None:
    board = json.loads((DEPLOY / "grafana-dashboard.json").read_text())
    targets = [target for panel in board["panels"] for target in panel.get("targets", [])]
    assert len(targets) > 20
    for target in targets:
        assert "{{instance}}" in target["legendFormat"], target
        assert "job=" not in target["expr"], target
        for grouping in re.findall(r"\b(?:sum|count)\b(.{0,14})", target["expr"]):
            assert grouping.startswith(" by (instance"), target
