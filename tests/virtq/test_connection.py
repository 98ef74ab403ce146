"""The socket of one frontend: pieces, descriptors, patience. A real core behind it, real sockets in front."""

import array
import contextlib
import os
import socket
import struct
from collections.abc import Iterator

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.rig.backend import Backend
from tests.rig.frontend import ACK_AND_ALL, DisconnectedError, Frontend, RingMemory
from xdpnet.closer import Closer
from xdpnet.virtq import connection
from xdpnet.virtq.fd import Fd
from xdpnet.virtq.message import MAX_FDS, MAX_PAYLOAD, U64, VERSION, Header, Request, VringState
from xdpnet.virtq.server import GuestSocket

GET_FEATURES = Header(Request.GET_FEATURES, VERSION, 0).pack()
SET_PROTOCOL_FEATURES = Header(Request.SET_PROTOCOL_FEATURES, VERSION, 8).pack() + U64(ACK_AND_ALL).pack()

pytestmark = pytest.mark.core


@pytest.fixture
def spare() -> Iterator[int]:
    """A descriptor to send where none belongs."""
    fd = os.eventfd(0)
    yield fd
    os.close(fd)


def ended(frontend: Frontend, guest: GuestSocket, reason: str, times: int = 1) -> bool:
    """The backend closed the connection, and counted why."""
    return frontend.is_disconnected() and guest.counters.errors[reason] == times


# ---- fds have one owner ----


def test_a_descriptor_is_closed_once_however_often_it_is_asked_to(fds_unchanged: None) -> None:
    fd = Fd(os.eventfd(0), Closer())
    fd.close()
    reused = os.eventfd(0)
    fd.close()
    os.fstat(reused)
    os.close(reused)


def test_a_detached_descriptor_stays_open(fds_unchanged: None) -> None:
    fd = Fd(os.eventfd(0), Closer())
    number = fd.detach()
    fd.close()
    os.close(number)


def test_a_dropped_descriptor_is_closed(fds_unchanged: None) -> None:
    Fd(os.eventfd(0), Closer())


def test_a_closed_descriptor_has_no_number() -> None:
    fd = Fd(-1, Closer())
    with pytest.raises(ValueError, match="closed"):
        fd.fileno()


# ---- pieces ----


def test_a_request_may_come_byte_by_byte(backend: Backend) -> None:
    frontend, _ = backend.connect()
    for byte in SET_PROTOCOL_FEATURES + GET_FEATURES:
        frontend.send_bytes(bytes([byte]))
    assert frontend.receive()[0] == Request.GET_FEATURES


def test_many_requests_may_come_in_one_piece(backend: Backend) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(GET_FEATURES * 100)
    assert [frontend.receive()[0] for _ in range(100)] == [Request.GET_FEATURES] * 100
    assert guest.counters.messages == 100


def test_a_request_and_its_descriptor_may_follow_one_without(backend: Backend) -> None:
    with RingMemory() as memory:
        frontend, _ = backend.connect()
        frontend.negotiate()
        frontend.send_bytes(GET_FEATURES)
        assert frontend.receive()[0] == Request.GET_FEATURES
        assert frontend.set_memory(memory) == 0


# ---- framing ----


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_a_payload_over_the_limit_ends_the_connection_before_it_comes(backend: Backend, size: int) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(Header(Request.SET_MEM_TABLE, VERSION, size).pack())
    assert ended(frontend, guest, "size")


@pytest.mark.parametrize("size", [0, 7, 9, 4096])
def test_a_payload_of_the_wrong_size_ends_the_connection(backend: Backend, size: int) -> None:
    frontend, guest = backend.connect()
    frontend.send(Request.SET_FEATURES, bytes(size))
    assert ended(frontend, guest, "size")


@pytest.mark.parametrize("flags", [0, 2, 3, VERSION | 4, VERSION | 0x10, 0xFFFFFFFF])
def test_foreign_flags_end_the_connection(backend: Backend, flags: int) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(Header(Request.GET_FEATURES, flags, 0).pack())
    assert ended(frontend, guest, "flags")


def test_a_connection_that_ends_inside_a_message_is_counted(backend: Backend) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(GET_FEATURES[:5])
    frontend.socket.shutdown(socket.SHUT_WR)
    assert ended(frontend, guest, "size")


def test_a_connection_that_just_ends_is_no_error(backend: Backend) -> None:
    frontend, guest = backend.connect()
    frontend.socket.shutdown(socket.SHUT_WR)
    assert frontend.is_disconnected()
    assert not any(guest.counters.errors.values())
    assert guest.counters.disconnects == 1


# ---- descriptors ----


def test_a_descriptor_with_a_request_that_takes_none_is_refused(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.send(Request.GET_FEATURES, fds=[spare])
    assert ended(frontend, guest, "fds")


def test_two_descriptors_where_one_belongs_are_refused_and_the_connection_goes_on(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.negotiate()
    assert frontend.tell(Request.SET_VRING_CALL, U64(0), [spare, spare]) != 0
    assert guest.counters.errors["fds"] == 1
    assert frontend.set_event(Request.SET_VRING_CALL, 0, spare) == 0


def test_as_many_descriptors_as_we_have_room_for_are_closed_and_refused(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.negotiate()
    assert frontend.tell(Request.SET_VRING_CALL, U64(0), [spare] * MAX_FDS) != 0
    assert guest.counters.errors["fds"] == 1


@pytest.mark.parametrize("count", [MAX_FDS + 2, 253])
def test_more_descriptors_than_we_have_room_for_end_the_connection(backend: Backend, spare: int, count: int) -> None:
    frontend, guest = backend.connect()
    frontend.negotiate()
    frontend.send(Request.SET_VRING_CALL, U64(0), [spare] * count, need_reply=True)
    assert ended(frontend, guest, "fds")


def test_a_descriptor_that_comes_with_the_payload_ends_the_connection(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(Header(Request.SET_VRING_CALL, VERSION, 8).pack())
    backend.settle()
    frontend.send_bytes(U64(0).pack(), [spare])
    assert ended(frontend, guest, "fds")


def test_a_descriptor_that_comes_late_in_the_header_ends_the_connection(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(GET_FEATURES[:4])
    backend.settle()
    frontend.send_bytes(GET_FEATURES[4:], [spare])
    assert ended(frontend, guest, "fds")


def test_descriptors_in_two_control_messages_count_together(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.negotiate()
    one = (socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [spare]))
    frontend.socket.sendmsg([Header(Request.SET_VRING_CALL, VERSION, 8).pack() + U64(0).pack()], [one, one])
    assert ended(frontend, guest, "fds")


def test_credentials_on_the_socket_end_the_connection(backend: Backend) -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
    guest = backend.open(None, fd=theirs.detach())
    with Frontend(ours) as frontend:
        who = struct.pack("=iII", os.getpid(), os.getuid(), os.getgid())
        frontend.socket.sendmsg([GET_FEATURES], [(socket.SOL_SOCKET, socket.SCM_CREDENTIALS, who)])
        assert ended(frontend, guest, "fds")


def test_descriptors_of_a_message_that_never_comes_whole_are_closed(backend: Backend, spare: int) -> None:
    frontend, guest = backend.connect()
    frontend.send_bytes(Header(Request.SET_VRING_CALL, VERSION, 8).pack(), [spare])
    backend.settle()
    frontend.close()
    backend.settle()
    assert not guest.connected


# ---- patience ----


@pytest.mark.parametrize("part", [GET_FEATURES[:1], SET_PROTOCOL_FEATURES[:12], SET_PROTOCOL_FEATURES[:-1]])
def test_half_a_message_ends_the_connection_after_a_while(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, part: bytes
) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.1)
    frontend, guest = backend.connect()
    frontend.send_bytes(part)
    assert ended(frontend, guest, "timeout")


def test_a_message_that_drips_in_gets_no_more_time_than_one_that_stalls(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.3)
    frontend, guest = backend.connect()
    frontend.send_bytes(Header(Request.SET_MEM_TABLE, VERSION, MAX_PAYLOAD).pack())
    with contextlib.suppress(DisconnectedError):
        for _ in range(MAX_PAYLOAD - 1):
            if not guest.connected:
                break
            frontend.send_bytes(bytes(1))
            backend.settle()
    assert ended(frontend, guest, "timeout")


def test_an_idle_connection_stays(backend: Backend, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.05)
    frontend, guest = backend.connect()
    frontend.send_bytes(GET_FEATURES)
    frontend.receive()
    for _ in range(5):
        backend.settle()
    assert guest.connected


def test_a_frontend_that_does_not_read_its_replies_is_disconnected(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "PATIENCE_S", 0.3)
    frontend, guest = backend.connect()
    frontend.socket.setblocking(False)
    while guest.connected:
        try:
            frontend.socket.send(GET_FEATURES * 64)
        except (BlockingIOError, ConnectionError):
            backend.settle()
    assert guest.counters.errors["send_stall"] == 1


def test_a_frontend_that_reads_its_replies_late_gets_them_all(backend: Backend) -> None:
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    backend.open(None, fd=theirs.detach())
    with Frontend(ours) as frontend:
        for _ in range(20):
            frontend.send_bytes(GET_FEATURES * 16)
        backend.settle()
        for _ in range(20 * 16):
            assert frontend.receive()[0] == Request.GET_FEATURES


# ---- the end ----


def test_when_the_frontend_vanishes_rings_stop_and_the_counters_stay(backend: Backend) -> None:
    with RingMemory() as memory:
        frontend, guest = backend.connect()
        frontend.negotiate()
        assert frontend.set_memory(memory) == 0
        frontend.start_ring(0, memory)
        frontend.start_ring(1, memory)
        assert backend.started(0)
        assert backend.started(1)
        frontend.close()
        backend.settle()
        assert not guest.connected
        assert not backend.started(0)
        assert not backend.started(1)
        assert (guest.counters.connects, guest.counters.disconnects) == (1, 1)
        with open("/proc/self/maps") as maps:
            assert maps.read().count("memfd:guest") == 1  # the frontend's own
        assert backend.device.features == 0


def test_the_next_frontend_finds_a_bare_device(backend: Backend) -> None:
    with RingMemory() as memory:
        first, _ = backend.connect()
        first.negotiate()
        assert first.set_memory(memory) == 0
        first.start_ring(0, memory, base=5)
        first.close()
        backend.settle()
        second, _ = backend.connect()
        second.negotiate()
        assert VringState.unpack(second.ask(Request.GET_VRING_BASE, VringState(0, 0))).num == 0
        assert second.set_memory(memory) == 0
        second.start_ring(0, memory)
        assert backend.started(0)


headers = st.builds(
    lambda request, flags, size: Header(request, flags, size).pack(),
    st.integers(0, 47),
    st.sampled_from([VERSION, VERSION, VERSION, VERSION | 8, VERSION | 4, 0]),
    st.sampled_from([0, 8, 8, 40, 296, MAX_PAYLOAD, MAX_PAYLOAD + 1]),
)


@settings(max_examples=100, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(pieces=st.lists(st.one_of(headers, st.binary(max_size=64)), max_size=12))
def test_no_stream_of_bytes_does_more_than_end_its_connection(backend: Backend, pieces: list[bytes]) -> None:
    frontend, guest = backend.connect()
    with frontend, contextlib.suppress(ConnectionError):
        for piece in pieces:
            frontend.send_bytes(piece)
        frontend.socket.shutdown(socket.SHUT_WR)
        while frontend.socket.recv(4096):
            pass
    backend.settle()
    assert not guest.connected
    assert guest.counters.errors["internal"] == 0


def test_a_bug_of_ours_ends_the_connection_and_not_the_daemon(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    frontend, guest = backend.connect()
    monkeypatch.setattr(backend.device, "set_mtu", lambda _: 1 // 0)
    frontend.negotiate()
    frontend.send(Request.NET_SET_MTU, U64(1500))
    assert ended(frontend, guest, "internal")
    again, _ = backend.connect()
    again.negotiate()
