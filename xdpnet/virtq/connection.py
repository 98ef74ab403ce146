"""One frontend's socket: bytes and descriptors in, whole messages to the session, replies out. Never blocks.

Invariant: a descriptor is owned by an Fd from the call that received it; a header is checked before one byte of its
payload is awaited; while a reply waits for room, or the guest's allowance is overdrawn, no further request is read.
Half a message, or a reply that nobody reads, ends the connection after some seconds.

Reference: unix(7), "Ancillary messages"; QEMU docs/interop/vhost-user.rst, "Communication".
"""

import array
import asyncio
import contextlib
import socket
from collections.abc import Callable, Iterator
from concurrent.futures import Future

from xdpnet import threads
from xdpnet.virtq.counters import Counters
from xdpnet.virtq.fd import Fd
from xdpnet.virtq.filling import MemoryChange
from xdpnet.virtq.message import HEADER_SIZE, MAX_FDS, SCM_MAX_FD, FramingError, Header, Message, ProtocolError, Reason
from xdpnet.virtq.session import Session

PATIENCE_S = 5.0  # for the rest of a message that has begun, and for room for a reply
SLOW_S = 1.0  # for memory to be made ready: that is told
REST_MOST_S = 1.0  # then it is looked again whether something may be read
MESSAGES_PER_TURN = 16  # then the event loop serves the other sockets
# Room for all that one sendmsg() can send (SCM_MAX_FD), and for what else a socket may be set to deliver: of what finds
# no room the kernel closes the descriptors, in our thread.
ANCILLARY_ROOM = socket.CMSG_SPACE(SCM_MAX_FD * array.array("i").itemsize) + 512


class Connection:
    """Reads one frontend's socket until either side ends it; then calls on_close, once."""

    def __init__(self, sock: socket.socket, session: Session, counters: Counters, on_close: Callable[[], None]) -> None:
        sock.setblocking(False)
        self.socket = sock
        self.left = False  # it was the frontend that ended it
        self.fault = ""  # why we did, if that is the frontend's
        self._session = session
        self._counters = counters
        self._on_close = on_close
        self._log = session.device.log
        self._closer = session.device.closer
        self._allowance = session.device.allowance
        self._loop = asyncio.get_running_loop()
        self._timer: asyncio.TimerHandle | None = None
        self._resting: asyncio.TimerHandle | None = None
        self._header: Header | None = None
        self._received = bytearray()  # of the message that is coming in, header included
        self._fds: list[Fd] = []
        self._unsent = b""
        self._open = True
        self._loop.add_reader(sock, self._on_readable)

    def close(self) -> None:
        """Ends the connection; the device forgets its frontend."""
        if not self._open:
            return
        self._open = False
        self._stop_timer()
        if self._resting is not None:
            self._resting.cancel()
        self._loop.remove_reader(self.socket)
        self._loop.remove_writer(self.socket)
        for fd in self._fds:
            fd.close()
        try:
            with self._allowance.charged():
                self._session.close()
        finally:
            self._counters.disconnects += 1
            self._on_close()
            # Last: a frontend that sees the end knows that nothing of it is in use.
            with contextlib.suppress(OSError):
                self.socket.shutdown(socket.SHUT_RDWR)
            self._closer.close(self.socket.detach())

    # ---- in ----

    def _on_readable(self) -> None:
        with self._serving():
            for _ in range(MESSAGES_PER_TURN):
                if not self._received and (wait_s := self._allowance.wait_s()):
                    self._rest(wait_s)
                    return
                with self._allowance.charged():
                    if not self._serve_one():
                        return

    @contextlib.contextmanager
    def _serving(self) -> Iterator[None]:
        """Whatever goes wrong ends this connection, and no other."""
        try:
            yield
        except ProtocolError as error:
            self.fail(error)
        except (ConnectionError, EOFError) as error:
            self._log.debug("the frontend is gone: %s", error)
            self.left = True
            self.close()
        except Exception:
            self._log.exception("internal error, the frontend is disconnected")
            self._counters.errors["internal"] += 1
            self.close()

    def _serve_one(self) -> bool:
        """False if there is no more to read now, or nothing may be read."""
        if not self._receive():
            return False
        message, fds = self._take()
        answer = self._session.handle(message, fds)
        if self._session.filling is not None:
            self._prepare(self._session.filling)
            return False
        return answer is None or self._send(answer)

    def _prepare(self, change: MemoryChange) -> None:
        """Until its memory is filled nothing is read; then the request is served to its end."""
        loop = self._loop

        def on_end(filled: Future[None]) -> None:
            if error := filled.exception():
                self._log.warning("its memory is copied from: it was not made ready: %s", error)
            with contextlib.suppress(RuntimeError):  # the loop has ended, and with it the connection
                loop.call_soon_threadsafe(self._prepared, change)

        loop.remove_reader(self.socket)
        try:
            threads.ask(change.fill).add_done_callback(on_end)
        except RuntimeError as error:
            self._log.warning("its memory is copied from: no thread to fill it: %s", error)
            loop.call_soon(self._prepared, change)
            return
        self._patience_for(change)

    def _patience_for(self, change: MemoryChange) -> None:
        """A thread may die as it starts, for want of memory: then nobody would answer the frontend."""

        def look() -> None:
            if self._open and self._session.filling is change and not change.begun:
                self.fail(FramingError("timeout", "no thread to fill its memory"))

        self._loop.call_later(PATIENCE_S, look)

    def _prepared(self, change: MemoryChange) -> None:
        if not self._open or self._session.filling is not change:
            return
        if change.seconds > SLOW_S:
            self._log.info("%d MiB of its memory were made ready in %.1f s", change.size >> 20, change.seconds)
        with self._serving(), self._allowance.charged():
            self._read_on()
            if (answer := self._session.finish()) is not None:
                self._send(answer)

    def _rest(self, wait_s: float) -> None:
        """Between two messages nothing is read for so long: those that came have cost others too much."""
        self._counters.rests += 1
        self._loop.remove_reader(self.socket)
        self._resting = self._loop.call_later(min(wait_s, REST_MOST_S), self._read_on)

    def _read_on(self) -> None:
        self._loop.add_reader(self.socket, self._on_readable)

    def _receive(self) -> bool:
        """True once a whole message is there."""
        if not self._fill(HEADER_SIZE):
            return False
        if self._header is None:
            self._header = Header.unpack(bytes(self._received))
        return self._fill(HEADER_SIZE + self._header.size)

    def _take(self) -> tuple[Message, list[Fd]]:
        if self._header is None:
            raise ValueError("no message is there")
        message, fds = Message(self._header, bytes(self._received[HEADER_SIZE:])), self._fds
        self._header, self._received, self._fds = None, bytearray(), []
        self._stop_timer()
        return message, fds

    def _fill(self, size: int) -> bool:
        """Reads until the message has so many bytes; False if no more are there yet."""
        while len(self._received) < size:
            try:
                data, ancillary, flags, _ = self.socket.recvmsg(
                    size - len(self._received), ANCILLARY_ROOM, socket.MSG_CMSG_CLOEXEC | socket.MSG_DONTWAIT
                )
            except BlockingIOError:
                if self._received:
                    self._start_timer("timeout", "half a message, and no more")
                return False
            except OSError as error:
                raise ConnectionError(error.errno, error.strerror) from error  # whatever it is, it ends here
            self._keep_fds(ancillary, flags)
            if not data:
                if self._received:
                    raise FramingError("size", "the connection ended inside a message")
                raise EOFError("end of stream")
            self._received += data
        return True

    def _keep_fds(self, ancillary: list[tuple[int, int, bytes]], flags: int) -> None:
        """Descriptors belong to a message's first byte; all that came are owned before any is judged."""
        fds: list[Fd] = []
        foreign = False
        for level, kind, data in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                numbers = array.array("i")
                numbers.frombytes(data[: len(data) - len(data) % numbers.itemsize])
                fds += [Fd(number, self._closer) for number in numbers]
            else:
                foreign = True
        early = not self._received
        self._fds += fds
        if flags & socket.MSG_CTRUNC:
            raise FramingError("fds", "no room for a message's descriptors: too few are left (RLIMIT_NOFILE)")
        if len(fds) > MAX_FDS:
            raise FramingError("fds", f"{len(fds)} descriptors with a message, possible are {MAX_FDS}")
        if fds and self._closer.full:
            raise FramingError("fds", f"{self._closer.pending} descriptors that came before are not closed yet")
        if foreign or (fds and not early):
            raise FramingError("fds", "ancillary data that does not belong to a message's first byte")

    # ---- out ----

    def _send(self, data: bytes) -> bool:
        """True if all of it went out; else reading pauses until it has."""
        sent = self._try_send(data)
        if sent == len(data):
            return True
        self._unsent = data[sent:]
        self._loop.remove_reader(self.socket)
        self._loop.add_writer(self.socket, self._on_writable)
        self._start_timer("send_stall", "the frontend does not read its replies")
        return False

    def _on_writable(self) -> None:
        try:
            self._unsent = self._unsent[self._try_send(self._unsent) :]
        except ConnectionError as error:
            self._log.debug("the frontend is gone: %s", error)
            self.close()
            return
        if not self._unsent:
            self._stop_timer()
            self._loop.remove_writer(self.socket)
            self._read_on()

    def _try_send(self, data: bytes) -> int:
        try:
            return self.socket.send(data, socket.MSG_DONTWAIT | socket.MSG_NOSIGNAL)
        except BlockingIOError:
            return 0
        except OSError as error:
            raise ConnectionError(error.errno, error.strerror) from error

    # ---- patience ----

    def _start_timer(self, reason: Reason, text: str) -> None:
        if self._timer is None:
            self._timer = self._loop.call_later(PATIENCE_S, self.fail, FramingError(reason, text))

    def _stop_timer(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def fail(self, error: ProtocolError) -> None:
        """Ends the connection for this reason."""
        self._log.warning("the frontend is disconnected: %s", error)
        self.fault = str(error)
        self._counters.count_error(error)
        self.close()
