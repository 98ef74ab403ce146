"""Descriptors whose close() waits for as long as their sender likes: nobody else waits for them."""

import os
import socket
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.rig.backend import Backend, MakeBackend
from tests.rig.frontend import Frontend, RingMemory
from tests.rig.lingering import lingering
from tests.rig.waiting import until, until_equal
from xdpnet import closer
from xdpnet.closer import MAX_PENDING, Closer
from xdpnet.virtq import server
from xdpnet.virtq.message import MAX_FDS, VERSION, Header, Request, VringState

core = pytest.mark.core
Send = Callable[[Frontend, int], None]


def test_who_hands_over_a_descriptor_does_not_wait_for_its_close(fds_unchanged: None) -> None:
    one, other = Closer(), Closer()
    with lingering() as (sock, release):
        one.close(sock.detach())
        one.close(os.eventfd(0))
        other.close(os.eventfd(0))
        until_equal(lambda: other.pending, 0)
        assert one.pending == 2
        release()
        until_equal(lambda: one.pending, 0)


def test_it_is_full_from_the_last_place_on(fds_unchanged: None) -> None:
    one = Closer()
    with lingering() as (sock, release):
        one.close(sock.detach())
        for _ in range(MAX_PENDING - 2):
            one.close(os.eventfd(0))
        before = one.full
        one.close(os.eventfd(0))
        assert (before, one.full) == (False, True)
        release()
        until(lambda: not one.pending)


def test_after_a_while_with_nothing_to_do_it_goes_on(fds_unchanged: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(closer, "IDLE_S", 0.0)
    one = Closer()
    for _ in range(100):
        one.close(os.eventfd(0))
        until(lambda: not one.pending)


# ---- where a frontend's descriptors come to their end ----


def hand_over(backend: Backend, frontend: Frontend, send: Send, sock: socket.socket) -> None:
    """The backend's is the last one: it sees the message once ours is closed."""

    def hand() -> None:
        send(frontend, sock.fileno())
        sock.close()

    backend.control.call(hand)


def surplus(frontend: Frontend, fd: int) -> None:
    """With a request that takes none."""
    frontend.send(Request.SET_OWNER, b"", [fd])


def refused(frontend: Frontend, fd: int) -> None:
    """Where another kind belongs; the connection goes on."""
    frontend.send(Request.SET_BACKEND_REQ_FD, b"", [fd], need_reply=True)


def in_a_socket(frontend: Frontend, fd: int) -> None:
    """In the queue of a UNIX socket, which is taken as the backend's channel."""
    near, far = socket.socketpair()
    with near, far:
        socket.send_fds(near, [b"x"], [fd])
        frontend.send(Request.SET_BACKEND_REQ_FD, b"", [far.fileno()])
    frontend.close()


def unread(frontend: Frontend, fd: int) -> None:
    """Behind the message that ends the connection."""
    frontend.send_bytes(Header(Request.GET_FEATURES, 0xFFFF, 0).pack())
    frontend.send(Request.SET_OWNER, b"", [fd])


def last_of_many(frontend: Frontend, fd: int) -> None:
    """Of more than any message takes."""
    with RingMemory() as memory:
        frontend.send(Request.SET_OWNER, b"", [memory.fd] * 252 + [fd])


def with_half_a_message(frontend: Frontend, fd: int) -> None:
    frontend.send_bytes(Header(Request.SET_VRING_CALL, VERSION, 8).pack(), [fd])
    frontend.close()


@core
@pytest.mark.parametrize("send", [surplus, refused, in_a_socket, unread, last_of_many, with_half_a_message])
def test_a_close_that_waits_keeps_no_other_guest_waiting(make_backend: MakeBackend, send: Send) -> None:
    evil, good = make_backend(), make_backend()
    frontend, _ = evil.connect()
    neighbour, _ = good.connect()
    frontend.negotiate()
    neighbour.negotiate()
    with lingering() as (sock, release):
        hand_over(evil, frontend, send, sock)
        evil.settle()
        assert neighbour.tell(Request.SET_VRING_ENABLE, VringState(0, 1)) == 0
        release()


@core
def test_what_a_second_frontend_left_in_its_queue_keeps_nobody_waiting(
    make_backend: MakeBackend, tmp_path: Path
) -> None:
    evil, good = make_backend(), make_backend()
    path = str(tmp_path / "evil.sock")
    guest = evil.open(path)
    neighbour, _ = good.connect()
    with lingering() as (sock, release), Frontend.connect(path) as first:
        assert first.ask_u64(Request.GET_FEATURES)
        with Frontend(socket.socket(socket.AF_UNIX)) as second:

            def come(frontend: Frontend, fd: int) -> None:
                frontend.socket.connect(path)
                surplus(frontend, fd)

            hand_over(evil, second, come, sock)
            until(lambda: guest.counters.refused["busy"])
            assert neighbour.ask_u64(Request.GET_FEATURES)
            release()


@core
def test_others_that_cannot_be_closed_are_no_fault_of_the_frontend_that_is_served(
    backend: Backend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(closer, "MAX_PENDING", 2)
    path = str(tmp_path / "guest.sock")
    guest = backend.open(path)
    with lingering() as (sock, release), Frontend.connect(path) as served:
        served.negotiate()
        with Frontend(socket.socket(socket.AF_UNIX)) as stuck, Frontend(socket.socket(socket.AF_UNIX)) as behind:

            def come(frontend: Frontend, fd: int) -> None:
                frontend.socket.connect(path)
                surplus(frontend, fd)

            hand_over(backend, stuck, come, sock)
            until(lambda: guest.counters.refused["busy"] == 1)
            behind.socket.connect(path)
            until(lambda: guest.counters.refused["busy"] == 2)
            with Frontend.connect(path):
                until(lambda: guest.counters.refused["closing"])
                assert served.set_event(Request.SET_VRING_CALL, 0, served.event()) == 0
            release()


@core
def test_a_connection_that_nobody_accepted_keeps_nobody_waiting_when_we_stop(
    make_backend: MakeBackend, tmp_path: Path
) -> None:
    evil, good = make_backend(), make_backend()
    path = str(tmp_path / "evil.sock")
    guest = evil.open(path)
    neighbour, _ = good.connect()
    with lingering() as (sock, release), Frontend(socket.socket(socket.AF_UNIX)) as waiting:

        async def come_too_late() -> None:
            waiting.socket.connect(path)
            waiting.send(Request.SET_OWNER, b"", [sock.fileno()])
            sock.close()
            await guest.stop()

        evil.control.run(come_too_late())
        assert neighbour.ask_u64(Request.GET_FEATURES)
        release()


@core
def test_a_guest_with_too_many_unclosed_is_turned_away_until_they_are_closed(
    make_backend: MakeBackend, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server, "ACCEPT_PAUSE_S", 0.02)
    evil, good = make_backend(), make_backend()
    path = str(tmp_path / "evil.sock")
    guest = evil.open(path)
    neighbour, _ = good.connect()
    with lingering() as (sock, release), RingMemory() as memory:
        with Frontend.connect(path) as frontend:
            frontend.negotiate()
            hand_over(evil, frontend, refused, sock)
            frontend.receive()
            while not evil.device.closer.full:
                assert frontend.tell(Request.SET_OWNER, b"", [memory.fd] * MAX_FDS) != 0
            frontend.send(Request.SET_VRING_CALL, b"", [memory.fd])
            assert frontend.is_disconnected()
        with Frontend.connect(path) as late:
            until(lambda: guest.counters.refused["closing"])
            assert neighbour.ask_u64(Request.GET_FEATURES)
            assert guest.counters.connects == 1
            release()
            assert late.ask_u64(Request.GET_FEATURES)


@core
def test_memory_that_only_we_still_have_is_freed_by_another_thread(backend: Backend) -> None:
    frontend, _ = backend.connect()
    frontend.negotiate()
    with (
        lingering() as (sock, release),
        RingMemory() as one,
        RingMemory(guest_addr=1 << 40, user_addr=1 << 40) as other,
    ):
        hand_over(backend, frontend, refused, sock)  # keeps the guest's later ones waiting
        frontend.receive()
        assert frontend.set_memory(one) == 0
        assert frontend.add_memory(other) == 0
        pending = backend.device.closer.pending
        assert frontend.remove_memory(other) == 0
        assert backend.device.closer.pending == pending + 1
        frontend.close()
        until(lambda: not backend.device.memory)
        until(lambda: backend.device.closer.pending == pending + 3)  # its other memory, and the connection
        release()
