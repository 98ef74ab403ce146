"""Guest memory that may be lent: made ready beside, and unmapped beside; who waits for it, and who does not."""

import os
import select
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from pathlib import Path

import pytest

from tests.rig.backend import Backend, ControlThread, MakeBackend
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.waiting import eventually
from xdpnet import core, threads
from xdpnet.virtq import connection, device, filling, server
from xdpnet.virtq.message import MemoryTable, Request, SingleRegion

pytestmark = pytest.mark.core

MIB = 1 << 20
PART = 64 * MIB  # c/memory/staging.c: no more is unmapped at once


@pytest.fixture(scope="module")
def bridge(control: ControlThread) -> Iterator[core.Bridge]:
    with control.bridge(lambda: core.Bridge(netdev_queues=1, frames_per_queue=256, zerocopy="on")) as made:
        if not made.lends:
            pytest.skip("no userfaultfd(2) here, without which no memory is lent")
        yield made


def whole(size: int = 2 * MIB, at: int = 0) -> RingMemory:
    return RingMemory(size, guest_addr=at, user_addr=0x7F00_0000_0000 + at, prealloc=True)


@pytest.fixture
def memory() -> Iterator[RingMemory]:
    with whole() as made:
        yield made


def mappings(memory: RingMemory) -> int:
    """How many the process has of it, but for the test's own."""
    inode = str(os.fstat(memory.fd).st_ino)
    lines = Path("/proc/self/maps").read_text().splitlines()
    return sum(line.split()[4] == inode for line in lines) - 1


def lent(backend: Backend) -> bool:
    """Whether memory has become a part of the UMEM since it was asked last."""
    return bool(backend.control.call(backend.bridge.events) & core.EVENT_UMEM)


class Gate:
    """In front of all that is filled."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.come = threading.Semaphore(0)
        self.parts: list[tuple[int, int]] = []  # start and length
        self._open = threading.Event()
        fill = core.Staged.fill

        def gated(staged: core.Staged, start: int, length: int) -> bool:
            self.parts.append((start, length))
            self.come.release()
            self._open.wait()
            return fill(staged, start, length)

        monkeypatch.setattr(core.Staged, "fill", gated)

    def open(self) -> None:
        self._open.set()


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[Gate]:
    made = Gate(monkeypatch)
    yield made
    made.open()


def send_memory(frontend: Frontend, memory: RingMemory, need_reply: bool = True) -> None:
    frontend.send(Request.SET_MEM_TABLE, MemoryTable((memory.region(),)), [memory.fd], need_reply)


def silent(frontend: Frontend) -> bool:
    return not select.select([frontend.socket], [], [], 0)[0]


# ---- who waits ----


def test_while_memory_is_made_ready_others_are_served_and_its_frontend_waits(
    make_backend: MakeBackend, memory: RingMemory, gate: Gate
) -> None:
    backend, other = make_backend(), make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()
    send_memory(frontend, memory)
    frontend.send(Request.GET_FEATURES)
    gate.come.acquire()
    neighbour, _ = other.connect()
    neighbour.negotiate()
    assert neighbour.ask(Request.GET_FEATURES)
    assert silent(frontend)
    assert not backend.device.memory
    gate.open()
    assert [frontend.receive()[0] for _ in range(2)] == [Request.SET_MEM_TABLE, Request.GET_FEATURES]
    assert backend.device.memory == [memory.region()]
    assert mappings(memory) == 1
    assert lent(backend)


def test_memory_is_made_ready_whole_and_part_by_part(
    make_backend: MakeBackend, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "PART", MIB)
    backend = make_backend()
    lent(backend)
    frontend, _ = backend.connect()
    frontend.negotiate()
    gate.open()
    with whole(2 * MIB + 4096) as memory:
        assert frontend.set_memory(memory) == 0
    assert gate.parts == [(0, MIB), (MIB, MIB), (2 * MIB, 4096)]
    assert lent(backend)


def test_a_thread_that_takes_its_time_is_waited_for(
    make_backend: MakeBackend, memory: RingMemory, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = threads.ask

    def ask_and_see_it_begin(fill: Callable[[], None]) -> Future[None]:
        asked = ask(fill)
        gate.come.acquire()
        return asked

    monkeypatch.setattr(threads, "ask", ask_and_see_it_begin)
    monkeypatch.setattr(connection, "PATIENCE_S", 0.0)
    backend = make_backend()
    frontend, guest = backend.connect()
    frontend.negotiate()
    send_memory(frontend, memory)
    assert eventually(lambda: gate.parts)
    for _ in range(3):  # turns of the loop, in one of which it is looked for
        backend.control.call(lambda: None)
    gate.open()
    assert frontend.receive()[0] == Request.SET_MEM_TABLE
    assert guest.counters.errors["timeout"] == 0


def test_a_region_that_is_added_is_made_ready_as_well(make_backend: MakeBackend, memory: RingMemory) -> None:
    backend = make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()
    assert frontend.set_memory(memory) == 0
    assert lent(backend)
    with pytest.MonkeyPatch.context() as patch, whole(at=4 * MIB) as more:
        gate = Gate(patch)
        frontend.send(Request.ADD_MEM_REG, SingleRegion(more.region()), [more.fd], need_reply=True)
        gate.come.acquire()
        assert silent(frontend)
        gate.open()
        assert frontend.receive()[0] == Request.ADD_MEM_REG
        assert mappings(more) == 1
        assert lent(backend)
        assert frontend.remove_memory(more) == 0
        assert eventually(lambda: not mappings(more))


def test_rings_in_memory_that_was_made_ready_run(make_backend: MakeBackend, memory: RingMemory) -> None:
    backend = make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()
    assert frontend.set_memory(memory) == 0
    frontend.start_ring(0, memory)
    assert backend.started(0)
    assert frontend.set_memory(memory) == 0, "and once more, while they run"
    assert backend.started(0)
    assert eventually(lambda: mappings(memory) == 1)


@pytest.mark.parametrize("who", ["the frontend", "the backend"])
def test_a_connection_that_ends_meanwhile_leaves_nothing_of_its_memory(
    make_backend: MakeBackend, memory: RingMemory, gate: Gate, who: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(filling, "PART", MIB)
    backend = make_backend()
    frontend, guest = backend.connect()
    frontend.negotiate()
    send_memory(frontend, memory)
    gate.come.acquire()
    if who == "the frontend":
        frontend.close()
    else:
        backend.control.call(guest.disconnect)
        assert frontend.is_disconnected()
    if who == "the backend":
        assert mappings(memory) == 1, "the thread's, for as long as it is in it"
    gate.open()
    assert eventually(lambda: not mappings(memory))
    assert eventually(lambda: not guest.connected)
    assert eventually(lambda: not backend.device.closer.pending)
    assert not backend.device.memory
    if who == "the backend":
        assert gate.parts == [(0, MIB)], "what nobody wants any more is not filled further"
    backend.control.call(lambda: None)
    assert guest.counters.errors["internal"] == 0


def test_memory_that_nobody_wants_any_more_when_the_thread_comes_is_not_touched(
    make_backend: MakeBackend, memory: RingMemory, gate: Gate, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Callable[[], None]] = []
    never: Future[None] = Future()

    def ask(fill: Callable[[], None]) -> Future[None]:
        asked.append(fill)
        return never

    monkeypatch.setattr(threads, "ask", ask)
    backend = make_backend()
    frontend, guest = backend.connect()
    frontend.negotiate()
    send_memory(frontend, memory)
    assert eventually(lambda: asked)
    backend.control.call(guest.disconnect)
    assert not mappings(memory)
    gate.open()
    asked[0]()
    assert gate.parts == []


def test_a_frontend_whose_memory_is_made_ready_keeps_its_place(
    make_backend: MakeBackend, memory: RingMemory, gate: Gate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "HANDSHAKE_S", 0.0)
    backend = make_backend()
    guest = backend.open(str(tmp_path / "socket"))
    with Frontend.connect(str(tmp_path / "socket")) as frontend:
        frontend.negotiate()
        send_memory(frontend, memory)
        gate.come.acquire()
        with Frontend.connect(str(tmp_path / "socket")) as second:
            assert second.is_disconnected()
        assert guest.counters.refused["busy"] == 1
        gate.open()
        assert frontend.receive()[0] == Request.SET_MEM_TABLE


# ---- what cannot be had ----


def test_memory_that_cannot_be_made_ready_is_copied_from(
    make_backend: MakeBackend, memory: RingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.Staged, "fill", lambda *_: False)
    backend = make_backend()
    lent(backend)
    frontend, _ = backend.connect()
    frontend.negotiate()
    assert frontend.set_memory(memory) == 0
    frontend.start_ring(0, memory)
    assert mappings(memory) == 1
    assert not lent(backend)


def test_an_error_of_the_thread_is_told_and_memory_is_copied_from(
    make_backend: MakeBackend,
    memory: RingMemory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    def fails(*_: object) -> bool:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(core.Staged, "fill", fails)
    backend = make_backend()
    lent(backend)
    frontend, _ = backend.connect()
    frontend.negotiate()
    assert frontend.set_memory(memory) == 0
    assert "its memory is copied from: it was not made ready: [Errno 5] Input/output error" in caplog.text
    assert not lent(backend)


def test_without_a_thread_memory_is_copied_from_and_the_log_says_so(
    make_backend: MakeBackend,
    memory: RingMemory,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    backend = make_backend()
    lent(backend)
    frontend, _ = backend.connect()
    frontend.negotiate()

    def refuse(_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threads, "ask", refuse)
    assert frontend.set_memory(memory) == 0
    assert "its memory is copied from: no thread to fill it" in caplog.text
    assert not lent(backend)


def test_a_thread_that_dies_as_it_starts_ends_the_connection(
    make_backend: MakeBackend, memory: RingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    never: Future[None] = Future()
    monkeypatch.setattr(threads, "ask", lambda _: never)
    monkeypatch.setattr(connection, "PATIENCE_S", 0.0)
    backend = make_backend()
    frontend, guest = backend.connect()
    frontend.negotiate()
    send_memory(frontend, memory)
    assert frontend.is_disconnected()
    assert guest.counters.errors["timeout"] == 1
    assert not mappings(memory)


@pytest.mark.parametrize("need_reply", [True, False])
def test_a_table_that_the_core_refuses_leaves_nothing_mapped(
    make_backend: MakeBackend, memory: RingMemory, need_reply: bool
) -> None:
    backend = make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()

    def refuse(*_: object) -> None:
        raise OSError(12, "Cannot allocate memory")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(backend.port, "set_memory", refuse)
        send_memory(frontend, memory, need_reply)
        if need_reply:
            assert frontend.receive() == (Request.SET_MEM_TABLE, (1).to_bytes(8, "little"))
        else:
            assert frontend.is_disconnected()
    assert eventually(lambda: not mappings(memory))
    assert eventually(lambda: not backend.device.closer.pending)


def test_of_a_table_of_which_a_region_cannot_be_mapped_nothing_stays_mapped(
    make_backend: MakeBackend, memory: RingMemory, monkeypatch: pytest.MonkeyPatch
) -> None:
    backend = make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()
    staged = core.Staged

    def stages_one(region: core.Region) -> core.Staged:
        if region.guest_addr:
            raise OSError(12, "Cannot allocate memory")
        return staged(region)

    monkeypatch.setattr(device, "Staged", stages_one)
    with whole(at=4 * MIB) as second:
        regions = MemoryTable((memory.region(), second.region()))
        frontend.send(Request.SET_MEM_TABLE, regions, [memory.fd, second.fd], need_reply=True)
        assert frontend.receive() == (Request.SET_MEM_TABLE, (1).to_bytes(8, "little"))
    assert not mappings(memory)


def test_what_is_staged_is_used_up_by_a_table_that_is_refused(make_backend: MakeBackend, memory: RingMemory) -> None:
    backend = make_backend()
    region = core.Region(0, memory.size, 0, 0, memory.fd)
    empty = core.Region(0, 0, 0, 0, memory.fd)
    for table, at in (([region, empty], region), ([empty, region], region), ([region], empty)):
        pages = core.Staged(region)
        assert pages.fill(0, pages.length)
        pages.filled = True
        if at is empty:  # one that was mapped for another region
            pages.close()
            pages = core.Staged(core.Region(0, memory.size // 2, 0, 0, memory.fd))
        with pytest.raises(OSError, match="Invalid argument"):
            backend.control.call(partial(backend.port.set_memory, table, {region: pages}))
        assert not pages.length
        assert eventually(lambda: not mappings(memory))


def test_a_part_behind_the_end_is_not_filled(memory: RingMemory) -> None:
    pages = core.Staged(core.Region(0, memory.size, 0, 0, memory.fd))
    assert pages.fill(memory.size - 4096, 4096)
    assert not pages.fill(memory.size - 4096, 8192)
    assert not pages.fill(2**64 - 4096, 8192)
    pages.close()
    assert not pages.length
    pages.close()
    assert not mappings(memory)


# ---- unmapped ----


@pytest.mark.parametrize("size", [PART, PART + 4096, 3 * PART + 4096], ids=["a-part", "more", "four-parts"])
@pytest.mark.parametrize("allocated", [True, False], ids=["lent", "copied"])
def test_memory_of_any_size_is_unmapped_and_its_place_used_again(
    make_backend: MakeBackend, size: int, allocated: bool
) -> None:
    backend = make_backend()
    frontend, _ = backend.connect()
    frontend.negotiate()
    with RingMemory(size, prealloc=allocated) as memory, whole() as other:
        for _ in range(2):
            assert frontend.set_memory(memory) == 0
            assert mappings(memory) == 1
            assert frontend.set_memory(other) == 0
            assert eventually(lambda: not mappings(memory))
        frontend.start_ring(0, other)
        assert backend.started(0)
