"""A real Prometheus server scrapes the daemon; promtool reads its metrics as a linter would."""

import json
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig import needs
from tests.rig.waiting import PATIENCE_S, until
from xdpnet.demo import await_listener, process, topology
from xdpnet.demo.backend import Backend

pytestmark = [
    pytest.mark.net,
    needs.root,
    needs.program("promtool", "prometheus"),
    needs.program("prometheus", "prometheus"),
    needs.program("busybox", "busybox-static"),
]

METRICS_PORT, SERVER_PORT = 9101, 9102
CONFIG = """
global: {{scrape_interval: {every}s}}
scrape_configs:
  - job_name: xdpnet
    static_configs: [{{targets: ["127.0.0.1:{port}"]}}]
"""


@pytest.fixture(scope="module")
def net() -> Iterator[topology.Topology]:
    with topology.topology() as made:
        yield made


@pytest.fixture(scope="module")
def daemon(net: topology.Topology, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Backend]:
    directory = tmp_path_factory.mktemp("xdpn")
    guests = ["--guest", f"one,socket={directory}/one", "--guest", f"two,socket={directory}/two,queues=2"]
    arguments = ["--netdev", topology.HOST_IF, *guests, "--metrics", f"127.0.0.1:{METRICS_PORT}"]
    backend = Backend(net.host, directory, arguments).start()
    yield backend
    assert backend.stop() == 0


def get(net: topology.Topology, port: int, path: str) -> str:
    return net.host.run("busybox", "wget", "-q", "-O", "-", f"http://127.0.0.1:{port}{path}")


def test_promtool_finds_nothing_to_complain_of(net: topology.Topology, daemon: Backend) -> None:
    metrics = get(net, METRICS_PORT, "/metrics")
    linted = subprocess.run(
        ["promtool", "check", "metrics"], input=metrics, capture_output=True, text=True, check=False
    )
    assert (linted.returncode, linted.stdout + linted.stderr) == (0, "")
    assert "xdpnet_queue_packets_total{" in metrics


def test_the_daemon_says_that_it_is_healthy(net: topology.Topology, daemon: Backend) -> None:
    assert get(net, METRICS_PORT, "/healthz").strip() == "ok"


MANY, PAIRS = 127, 8


def test_55_as_many_guests_as_there_can_be_are_scraped_whole_and_stats_answers(
    net: topology.Topology, tmp_path: Path
) -> None:
    """Without compression too: then a scrape is of megabytes."""
    guests = [f"--guest=g{number},socket={tmp_path}/{number},queues={PAIRS}" for number in range(MANY)]
    daemon = Backend(net.host, tmp_path, [*guests, "--metrics", f"127.0.0.1:{METRICS_PORT + 2}"]).start()
    try:
        page = get(net, METRICS_PORT + 2, "/metrics").splitlines()
        assert sum(line.startswith("xdpnet_queue_packets_total{") for line in page) == MANY * PAIRS * 2
        table = net.host.run(sys.executable, "-m", "xdpnet", "stats", "--control", str(daemon.control))
        assert all(f"g{number}" in table for number in range(MANY))
        with prometheus(net, tmp_path, METRICS_PORT + 2, every=10):
            await_result(net, 'up{job="xdpnet"} == 1')
            (_, series), *_ = await_result(net, "count(xdpnet_queue_packets_total)")
            assert int(series) == MANY * PAIRS * 2
        assert daemon.stop() == 0
    finally:
        daemon.kill()


def test_prometheus_scrapes_every_queue_and_sees_its_counters(
    net: topology.Topology, daemon: Backend, tmp_path: Path
) -> None:
    with prometheus(net, tmp_path, METRICS_PORT):
        assert await_result(net, 'up{job="xdpnet"} == 1') == [({"job": "xdpnet"}, "1")]
        series = {
            (labels["port"], labels["queue"], labels["direction"])
            for labels, _ in await_result(net, "xdpnet_queue_packets_total")
        }
        queues = [("one", 0), ("two", 0), ("two", 1), (topology.HOST_IF, 0)]
        assert series == {(port, str(queue), way) for port, queue in queues for way in ("rx", "tx")}
        net.far.run("busybox", "ping", "-c", "3", topology.HOST_ADDRESS)
        assert await_result(net, "rate(process_cpu_seconds_total[5s]) >= 0")


@contextmanager
def prometheus(net: topology.Topology, directory: Path, metrics_port: int, every: int = 1) -> Iterator[None]:
    """A server that scrapes this port of the host's; a scrape may take as long as there is between two, in seconds."""
    config = directory / "prometheus.yml"
    config.write_text(CONFIG.format(port=metrics_port, every=every))
    server = net.host.spawn(
        [
            "prometheus",
            f"--config.file={config}",
            f"--storage.tsdb.path={directory / 'xdpn-tsdb'}",
            f"--web.listen-address=127.0.0.1:{SERVER_PORT}",
        ],
        directory / "prometheus.log",
    )
    try:
        await_listener(net.host, SERVER_PORT, patience=30)
        until(lambda: ready(net))
        yield
    finally:
        process.end(server)


def ready(net: topology.Topology) -> bool:
    """Prometheus listens before it answers."""
    try:
        get(net, SERVER_PORT, "/-/ready")
    except topology.CommandError:
        return False
    return True


def await_result(net: topology.Topology, query: str, patience: float = PATIENCE_S) -> list[tuple[dict[str, str], str]]:
    """The first answer that is not empty: labels (but for the instance and the name) and value of each series."""
    deadline = time.monotonic() + patience
    while True:
        answer = json.loads(get(net, SERVER_PORT, f"/api/v1/query?query={urllib.parse.quote(query)}"))
        if result := answer["data"]["result"]:
            return [
                (
                    {key: value for key, value in row["metric"].items() if key not in ("instance", "__name__")},
                    row["value"][1],
                )
                for row in result
            ]
        assert time.monotonic() < deadline, f"{query}: no result"
        time.sleep(0.2)
