"""/metrics and /healthz over HTTP, on a thread and an event loop of their own.

Invariant: nothing that a client does, or omits, costs the daemon more than one of CONNECTIONS places, for DEADLINE_S
seconds and as long as a large page may take (clients.py): limits for all of it, not for each read. One exchange a
connection. The snapshot is taken on the daemon's own loop, for it alone may call the core; a page is made in a thread:
/healthz is not to wait for that of a hundred guests. Who asks sooner than they were worth gets the last ones.

Reference: RFC 9112 as far as GET goes; OpenMetrics and the text format by prometheus-client's content negotiation.
"""

import asyncio
import contextlib
import gzip
import http.client
import io
import logging
import socket
import threading
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path

from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from xdpnet import threads
from xdpnet.clients import serve_few
from xdpnet.errors import SetupError
from xdpnet.metrics.collector import SnapshotCollector, StallCollector, registry
from xdpnet.metrics.snapshot import Snapshot
from xdpnet.ration import Clock, RationedLog
from xdpnet.stalls import Stall

CONNECTIONS = 8  # a few scrapers; everybody else waits
DEADLINE_S = 2.0  # who needs longer to ask is not a scraper
PAGE_S = 30.0  # no page takes so long that is made at all
REUSE = 4  # what was made is good for so many times what it took: whoever asks, a fifth of the thread's time goes there
PAGES = 2  # formats that are made of one snapshot: clients could think of any number of versions
REQUEST_BYTES = 8192  # request line and header fields

log = RationedLog(logging.getLogger(__name__), "metrics")  # clients provoke it

Encoder = Callable[[Collector], bytes]


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    headers: http.client.HTTPMessage


@dataclass(frozen=True)
class Response:
    status: HTTPStatus
    body: bytes
    content_type: str = "text/plain; charset=utf-8"
    encoding: str = ""

    def encode(self, head_only: bool) -> bytes:
        lines = [
            f"HTTP/1.1 {self.status.value} {self.status.phrase}",
            f"Content-Type: {self.content_type}",
            f"Content-Length: {len(self.body)}",
            "Connection: close",
        ]
        if self.encoding:
            lines.append(f"Content-Encoding: {self.encoding}")
        if self.status is HTTPStatus.METHOD_NOT_ALLOWED:
            lines.append("Allow: GET, HEAD")
        return "\r\n".join([*lines, "", ""]).encode() + (b"" if head_only else self.body)


def plain(status: HTTPStatus, text: str) -> Response:
    return Response(status, f"{text}\n".encode())


class MetricsEndpoint:
    """Serves what `take` returns; close() ends the thread."""

    def __init__(
        self,
        address: tuple[str, int],
        take: Callable[[], Awaitable[Snapshot]],
        stalls: Callable[[], Mapping[int, Stall]] = dict,
        clock: Clock = time.monotonic,
        spent: Clock = time.thread_time,
    ) -> None:
        """take is called on the daemon's loop; stalls, which says what that loop may wait for, is called on ours.

        spent: seconds of processor time of the thread that asks.
        """
        self._take = take
        self._stalls = stalls
        self._daemon_loop = asyncio.get_running_loop()
        self._collector = SnapshotCollector()
        self._registry = registry(self._collector)
        self._clock = clock
        self._spent = spent
        self._taking: asyncio.Future[tuple[Snapshot, float]] | None = None
        self._taken: Snapshot | None = None
        self._taken_until = 0.0
        self._pages: dict[tuple[str, bool], Response] = {}  # by content type, and whether compressed
        self._pages_until = 0.0
        self._making = asyncio.Lock()  # of a page: who waits for the same one gets it
        self._socket = _listen(address)
        self._loop = asyncio.new_event_loop()
        self._stop = asyncio.Event()
        self._thread = threading.Thread(target=self._run, name="xdpnet-metrics", daemon=True)
        self._thread.start()

    @property
    def address(self) -> tuple[str, int]:
        host, port = self._socket.getsockname()[:2]
        return host, port

    @property
    def url(self) -> str:
        return f"http://{_shown(self.address)}/metrics"

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(DEADLINE_S)

    def _run(self) -> None:
        with contextlib.closing(self._loop), self._socket:
            self._loop.run_until_complete(self._serve())

    async def _serve(self) -> None:
        serving = serve_few(self._socket, CONNECTIONS, DEADLINE_S, REQUEST_BYTES, self._read, self._respond, log)
        task = asyncio.create_task(serving)
        await self._stop.wait()
        task.cancel()
        await asyncio.wait([task])

    async def _read(self, reader: asyncio.StreamReader) -> Request | Response:
        """What is asked, or the answer to what cannot be."""
        try:
            request = await reader.readuntil(b"\r\n\r\n")
            line, _, fields = request.partition(b"\r\n")
            method, target, version = line.decode("ascii").split(" ")
            if not version.startswith("HTTP/1."):
                raise ValueError(version)
            headers = http.client.parse_headers(io.BytesIO(fields))
        except asyncio.LimitOverrunError:
            return plain(HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, "request too large")
        except (asyncio.IncompleteReadError, ValueError, http.client.HTTPException):
            return plain(HTTPStatus.BAD_REQUEST, "not an HTTP request")
        if method not in ("GET", "HEAD"):
            return plain(HTTPStatus.METHOD_NOT_ALLOWED, "only GET and HEAD are served")
        return Request(method, target.partition("?")[0], headers)

    async def _respond(self, request: Request | Response) -> bytes:
        if isinstance(request, Response):
            return request.encode(False)
        response = await self._answer(request.path, request.headers)
        return response.encode(head_only=request.method == "HEAD")

    async def _answer(self, path: str, headers: http.client.HTTPMessage) -> Response:
        if path not in ("/metrics", "/healthz"):
            return plain(HTTPStatus.NOT_FOUND, "only /metrics and /healthz are here")
        encode, content_type = choose_encoder(headers.get("Accept", ""))
        try:
            async with asyncio.timeout(DEADLINE_S / 2):
                snapshot = await self._snapshot()
        except TimeoutError:
            stalls = self._stalls()
            if path == "/metrics" and stalls:  # whom the alert is about is known
                seconds = {worker: self._clock() - stall.since for worker, stall in stalls.items()}
                return Response(HTTPStatus.OK, encode(StallCollector(seconds)), content_type)
            stuck = [f"worker {worker} is {stall.where}" for worker, stall in stalls.items()]
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "\n".join(["the control thread does not answer", *stuck]))
        except Exception as error:  # told to the client and to the log: a scrape must not end the thread
            log.exception("no snapshot")
            return plain(HTTPStatus.INTERNAL_SERVER_ERROR, f"no snapshot: {error}")
        if path == "/healthz":
            ill = faults(snapshot)
            return plain(HTTPStatus.SERVICE_UNAVAILABLE if ill else HTTPStatus.OK, "\n".join(ill or ["ok"]))
        try:
            async with self._making, asyncio.timeout(PAGE_S):
                return await self._page(snapshot, encode, content_type, "gzip" in headers.get("Accept-Encoding", ""))
        except (RuntimeError, TimeoutError) as error:  # no thread to be had, or it died as it started
            log.warning("no page: %s", error)
            return plain(HTTPStatus.SERVICE_UNAVAILABLE, "no thread to make a page in")

    async def _page(self, snapshot: Snapshot, encode: Encoder, content_type: str, zipped: bool) -> Response:
        now = self._clock()
        if now >= self._pages_until:
            self._pages.clear()
        fitting = [page for (_, compressed), page in self._pages.items() if compressed is zipped]
        page = self._pages.get((content_type, zipped))
        if page is None and len(fitting) == PAGES:
            return fitting[0]
        if page is None:

            def make() -> tuple[bytes, float]:
                begin = self._spent()
                self._collector.snapshot = snapshot
                body = encode(self._registry)
                return gzip.compress(body, 1) if zipped else body, self._spent() - begin

            body, spent = await asyncio.wrap_future(threads.ask(make))
            page = Response(HTTPStatus.OK, body, content_type, "gzip" if zipped else "")
            self._pages[content_type, zipped] = page
            self._pages_until = max(self._pages_until, now) + REUSE * spent
        return page

    async def _snapshot(self) -> Snapshot:
        """The daemon's; asked for once, however many wait for it."""
        if self._taken is not None and self._clock() < self._taken_until:
            return self._taken
        if self._taking is None or self._taking.done():
            taking = asyncio.run_coroutine_threadsafe(self._measured(), self._daemon_loop)
            self._taking = asyncio.wrap_future(taking)
            self._taking.add_done_callback(lambda done: done.cancelled() or done.exception())  # all may have given up
        snapshot, spent = await asyncio.shield(self._taking)
        self._taken, self._taken_until = snapshot, self._clock() + REUSE * spent
        return snapshot

    async def _measured(self) -> tuple[Snapshot, float]:
        """On the daemon's loop: the snapshot, and what it took."""
        begin = self._spent()
        return await self._take(), self._spent() - begin


def faults(snapshot: Snapshot) -> list[str]:
    """Why the daemon is not healthy; a guest that is absent or broken is no illness of ours."""
    workers = [
        f"worker {worker.number} does not run"
        for worker in snapshot.workers
        if not worker.tid or not Path(f"/proc/self/task/{worker.tid}").exists()
    ]
    workers += [
        f"worker {worker.number} has been {worker.stalled_at} for {worker.stalled_s:.1f} s"
        for worker in snapshot.workers
        if worker.stalled_at
    ]
    netdevs = [f"interface {port.name} is gone" for port in snapshot.ports if port.netdev and not port.netdev.alive]
    return workers + netdevs


def _listen(address: tuple[str, int]) -> socket.socket:
    host, port = address
    shown = _shown(address)
    try:
        family, kind, protocol, _, where = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        sock = socket.socket(family, kind | socket.SOCK_NONBLOCK, protocol)
    except OSError as error:
        raise SetupError(f"metrics {shown}: {error.strerror}", "name an address of this machine") from error
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        sock.bind(where)
        sock.listen(2 * CONNECTIONS)
    except OSError as error:
        sock.close()
        raise SetupError(f"metrics {shown}: {error.strerror}", "name another HOST:PORT with --metrics") from error
    return sock


def _shown(address: tuple[str, int]) -> str:
    host, port = address
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
