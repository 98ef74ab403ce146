"""The dirty log as a frontend asks for it: which logs are taken, and in which order the messages may come.

What is marked in one is core/test_dirty.py's affair.
"""

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.rig.backend import Backend
from tests.rig.frontend import ACK_AND_ALL, MODERN, Frontend, RingMemory
from tests.rig.waiting import until_equal
from xdpnet.virtq.features import LOG_ALL, ProtocolFeature, VirtioFeature, mask
from xdpnet.virtq.memory import LOG_PAGE, MOST_LOG
from xdpnet.virtq.message import U64, Log, Request, VringFile
from xdpnet.virtq.server import GuestSocket

pytestmark = pytest.mark.core

Talk = tuple[Frontend, GuestSocket]
SIZE = 1 << 21  # of the guest's memory, which begins at 0
LEAST = SIZE // LOG_PAGE // 8
WITHOUT_ACK = ACK_AND_ALL & ~mask(ProtocolFeature.VHOST_USER_PROTOCOL_F_REPLY_ACK)


@pytest.fixture
def memory() -> Iterator[RingMemory]:
    with RingMemory(SIZE) as made:
        yield made


@pytest.fixture
def log() -> Iterator[int]:
    """A file with room for the log of a guest with twice that memory."""
    fd = os.memfd_create("log", os.MFD_CLOEXEC)
    os.ftruncate(fd, 2 * LEAST)
    yield fd
    os.close(fd)


@pytest.fixture
def talk(backend: Backend, memory: RingMemory) -> Talk:
    """A frontend whose two rings run."""
    frontend, guest = backend.connect()
    frontend.negotiate()
    assert frontend.set_memory(memory) == 0
    for index in range(2):
        frontend.start_ring(index, memory)
    return frontend, guest


def refused(talk: Talk, fd: int, size: int, offset: int = 0) -> bool:
    """As a log; the connection serves on."""
    frontend, guest = talk
    before = guest.counters.errors["log"]
    verdict = frontend.set_log(fd, size, offset)
    frontend.ask_u64(Request.GET_FEATURES)
    return bool(verdict) and guest.counters.errors["log"] == before + 1


def features(frontend: Frontend, on: bool) -> int:
    return frontend.tell(Request.SET_FEATURES, U64(MODERN | (LOG_ALL if on else 0)))


def mappings_of(fd: int) -> int:
    inode = str(os.fstat(fd).st_ino)
    with open("/proc/self/maps") as maps:
        return sum(line.split()[4] == inode for line in maps)


def test_a_backend_that_logs_offers_what_qemu_takes_for_it(talk: Talk) -> None:
    """Without both of these QEMU refuses to migrate (vhost_dev_init, vhost_user_backend_init)."""
    frontend, _ = talk
    assert frontend.ask_u64(Request.GET_FEATURES) & mask(VirtioFeature.VHOST_F_LOG_ALL)
    assert frontend.ask_u64(Request.GET_PROTOCOL_FEATURES) & mask(ProtocolFeature.VHOST_USER_PROTOCOL_F_LOG_SHMFD)


@pytest.mark.parametrize("ack", [True, False], ids=["acknowledged", "not acknowledged"])
def test_a_log_is_answered_once_whether_or_not_that_was_asked_for(
    backend: Backend, memory: RingMemory, log: int, ack: bool
) -> None:
    frontend, _ = backend.connect()
    frontend.negotiate(protocol=ACK_AND_ALL if ack else WITHOUT_ACK)
    for asked in False, True:
        frontend.send(Request.SET_LOG_BASE, Log(LEAST, 0), [log], need_reply=asked)
        assert frontend.receive() == (Request.SET_LOG_BASE, U64(0).pack())
    frontend.ask_u64(Request.GET_FEATURES)


def test_a_log_that_is_refused_ends_a_connection_that_could_not_be_told(talk: Talk, log: int) -> None:
    """QEMU looks at no verdict here: it would go on without a log, and the guest would lose memory on its way."""
    frontend, guest = talk
    frontend.send(Request.SET_LOG_BASE, Log(LEAST - 1, 0), [log])
    assert frontend.is_disconnected()
    assert guest.counters.errors["log"] == 1


def test_a_log_has_a_bit_for_every_page_of_the_table(talk: Talk, log: int) -> None:
    assert talk[0].set_log(log, LEAST) == 0
    assert refused(talk, log, LEAST - 1)
    assert mappings_of(log) == 1


def test_a_log_lies_within_its_file(talk: Talk, log: int) -> None:
    os.ftruncate(log, 0x1000 + LEAST)
    assert talk[0].set_log(log, LEAST, 0x1000) == 0
    assert refused(talk, log, LEAST + 1, 0x1000)
    os.ftruncate(log, 0x1000 + LEAST - 1)
    assert refused(talk, log, LEAST, 0x1000)


def test_a_log_begins_at_a_page_of_its_file(talk: Talk, log: int) -> None:
    os.ftruncate(log, 0x3000)
    assert talk[0].set_log(log, LEAST, 0x1000) == 0
    for offset in 1, 0xFFF, 0x1001:
        assert refused(talk, log, LEAST, offset)


@pytest.mark.parametrize(("size", "offset"), [(0, 0), (MOST_LOG + 1, 0), (1 << 63, 0), (LEAST, (1 << 64) - LEAST)])
def test_sizes_that_no_log_has_are_refused(talk: Talk, log: int, size: int, offset: int) -> None:
    assert refused(talk, log, size, offset)


def test_the_largest_log_is_taken_and_costs_what_is_marked_in_it(talk: Talk, log: int) -> None:
    os.ftruncate(log, MOST_LOG)
    assert talk[0].set_log(log, MOST_LOG) == 0
    assert features(talk[0], True) == 0
    assert os.fstat(log).st_blocks == 0


def test_a_log_is_memory_that_we_can_write(talk: Talk, log: int, memory: RingMemory) -> None:
    read_only = os.open(f"/proc/self/fd/{log}", os.O_RDONLY)
    disk = os.open(__file__, os.O_RDONLY)
    event = talk[0].event()
    near, far = socket.socketpair()
    for fd in read_only, disk, event, near.fileno():
        assert refused(talk, fd, LEAST)
    os.close(read_only)
    os.close(disk)
    near.close()
    far.close()


def test_guest_memory_is_no_log(talk: Talk, memory: RingMemory) -> None:
    assert refused(talk, memory.fd, LEAST)


def test_a_log_comes_with_one_descriptor(talk: Talk, log: int) -> None:
    frontend, guest = talk
    for fds in [], [log, log]:
        assert frontend.tell(Request.SET_LOG_BASE, Log(LEAST, 0), fds) != 0
    assert guest.counters.errors["fds"] == 2


def test_logging_begins_and_ends_while_rings_run(talk: Talk, backend: Backend, memory: RingMemory, log: int) -> None:
    frontend, _ = talk
    assert frontend.set_log(log, LEAST) == 0
    for on in True, False, True:
        assert features(frontend, on) == 0
        for index in range(2):
            assert frontend.tell(Request.SET_VRING_ADDR, memory.ring_addr(index, 256, logged=on)) == 0
    assert backend.started(0)
    assert backend.started(1)
    assert os.pread(log, LEAST, 0) != bytes(LEAST)


def test_what_logs_may_come_before_the_log_does(talk: Talk, memory: RingMemory, log: int) -> None:
    """As from a QEMU whose guest's driver starts during a migration (vhost_dev_start)."""
    frontend, _ = talk
    assert features(frontend, True) == 0
    assert frontend.tell(Request.SET_VRING_ADDR, memory.ring_addr(0, 256, logged=True)) == 0
    assert frontend.set_log(log, LEAST) == 0
    assert os.pread(log, LEAST, 0) != bytes(LEAST)


def test_a_ring_is_logged_within_the_log(talk: Talk, memory: RingMemory, log: int) -> None:
    frontend, guest = talk
    assert frontend.set_log(log, LEAST) == 0
    used = 4 + 8 * 256  # without event index
    addr = memory.ring_addr(0, 256, logged=True)
    assert frontend.tell(Request.SET_VRING_ADDR, replace(addr, log=SIZE - used)) == 0
    for beyond in SIZE - used + 1, (1 << 64) - 1, (1 << 64) - used:
        assert frontend.tell(Request.SET_VRING_ADDR, replace(addr, log=beyond)) != 0
    assert guest.counters.errors["log"] == 3


def test_a_running_ring_still_keeps_its_addresses(talk: Talk, memory: RingMemory) -> None:
    frontend, guest = talk
    addr = memory.ring_addr(0, 256, logged=True)
    assert frontend.tell(Request.SET_VRING_ADDR, replace(addr, used=addr.used + 4)) != 0
    assert guest.counters.errors["state"] == 1


def test_memory_that_the_log_has_no_bits_for_is_refused_while_it_is_used(talk: Talk, log: int) -> None:
    frontend, guest = talk
    assert frontend.set_log(log, LEAST) == 0
    with RingMemory(SIZE, guest_addr=SIZE, user_addr=1 << 40) as more:
        assert features(frontend, True) == 0
        assert frontend.add_memory(more) != 0
        assert frontend.set_memory(more) != 0
        assert features(frontend, False) == 0
        assert frontend.add_memory(more) == 0
        assert features(frontend, True) != 0
        assert guest.counters.errors["log"] == 3
        assert frontend.set_log(log, 2 * LEAST) == 0
        assert features(frontend, True) == 0


def test_a_frontend_that_leaves_takes_its_log_along(talk: Talk, log: int) -> None:
    frontend, _ = talk
    assert frontend.set_log(log, LEAST) == 0
    assert frontend.tell(Request.SET_LOG_FD, b"", [frontend.event()]) == 0
    assert mappings_of(log) == 1
    frontend.close()
    until_equal(lambda: mappings_of(log), 0)


def test_a_log_descriptor_is_an_eventfd(talk: Talk, log: int) -> None:
    frontend, guest = talk
    for _ in range(2):
        assert frontend.tell(Request.SET_LOG_FD, b"", [frontend.event()]) == 0
    assert frontend.tell(Request.SET_LOG_FD, b"", [log]) != 0
    assert guest.counters.errors["event_fd"] == 1


def test_a_log_that_is_truncated_breaks_the_rings_that_are_logged(
    talk: Talk, backend: Backend, memory: RingMemory, log: int
) -> None:
    frontend, _ = talk
    assert frontend.set_event(Request.SET_VRING_ERR, 1, err := frontend.event()) == 0
    assert frontend.set_log(log, LEAST) == 0
    os.ftruncate(log, 0)
    assert frontend.tell(Request.SET_VRING_ADDR, memory.ring_addr(1, 256, logged=True)) == 0
    kick = frontend.event()
    assert frontend.tell(Request.SET_VRING_KICK, VringFile(1, nofd=False), [kick]) == 0
    os.eventfd_write(kick, 1)
    until_equal(lambda: backend.control.call(lambda: backend.port.ring_state(1)).broken, "memory")
    assert os.eventfd_read(err)
    assert frontend.ask_u64(Request.GET_FEATURES)
