"""Listening UNIX sockets: who may take a path, and who gives it back.

Invariant: nothing is ever unlinked but a socket of our own user that nobody listens on, and at close the very inode
that we bound. Looking, unlinking and binding happen under a lock on the directory, so that of two daemons that race
for a path one gets it and the other is told that it is taken; no lock file stays behind.

Reference: unix(7).
"""

import contextlib
import errno
import fcntl
import os
import pwd
import socket
import stat
import struct
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import NamedTuple, Self

from xdpnet.errors import SocketPathError

PATH_MAX = 107  # sun_path of unix(7), less its terminating zero
BACKLOG = 16
LOCK_S = 1.0  # the lock is held for some microseconds; whoever holds it longer is not one of us


class ListeningSocket:
    """A bound and listening socket that owns its path until close()."""

    def __init__(self, path: str, sock: socket.socket, inode: tuple[int, int]) -> None:
        self.path = path
        self.socket = sock
        self._inode = inode

    def close(self, dispose: Callable[[int], None] = os.close) -> None:
        """Stops listening; the path goes only if it still names our socket. `dispose` closes the descriptor."""
        with contextlib.suppress(OSError):
            self.socket.shutdown(socket.SHUT_RDWR)
        if self.socket.fileno() >= 0:
            dispose(self.socket.detach())
        try:
            if _inode(os.lstat(self.path)) == self._inode:
                os.unlink(self.path)
        except FileNotFoundError:
            pass  # somebody removed it: nothing to give back

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Peer(NamedTuple):
    """Who is at the other end: who connected, or for who listens, who began to; struct ucred of unix(7)."""

    pid: int
    uid: int
    gid: int

    def __str__(self) -> str:
        return f"process {self.pid}, user {self.uid}, group {self.gid}"


def peer_of(sock: socket.socket) -> Peer:
    """Of a connected UNIX socket."""
    layout = struct.Struct("=iII")
    return Peer(*layout.unpack(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, layout.size)))


def check_path(path: str) -> None:
    """Refuses what can never be the path of a UNIX socket."""
    size = len(os.fsencode(path))
    if not path or "\0" in path:
        raise SocketPathError(path or '""', "not a path")
    if size > PATH_MAX:
        raise SocketPathError(path, f"{size} bytes long, at most {PATH_MAX} are possible", "name a shorter path")


@dataclass(frozen=True)
class Access:
    """Who may connect: the socket's owner and group (-1: as this process makes it), and its permissions."""

    uid: int = -1
    gid: int = -1
    mode: int = 0o660


def listen_unix(path: str, access: Access) -> ListeningSocket:
    """A non-blocking listening stream socket at path, with exactly this owner, group and permissions."""
    check_path(path)
    directory = _lock_directory(path)
    try:
        _clear(path, access.uid)
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        made: ListeningSocket | socket.socket = sock
        try:
            # The umask, rather than a chmod afterwards: at no time may more people connect than mode says.
            umask = os.umask(0o777 & ~access.mode)
            try:
                sock.bind(path)
            finally:
                os.umask(umask)
            made = listening = ListeningSocket(path, sock, _inode(os.lstat(path)))
            _give(path, access)
            sock.listen(BACKLOG)  # from here on somebody can connect
        except SocketPathError:
            made.close()
            raise
        except OSError as error:
            made.close()
            raise SocketPathError(path, f"bind: {error.strerror}", _remedy(error)) from error
        return listening
    finally:
        os.close(directory)


def barred_by(path: str, access: Access) -> str:
    """The first directory on the way to path that whom the access is for may not pass; "": none, or nobody is named."""
    if (access.uid, access.gid) == (-1, -1) or not access.uid:
        return ""
    groups = {access.gid}
    with contextlib.suppress(KeyError):  # a number without a name has no other group
        user = pwd.getpwuid(access.uid)
        groups.update(os.getgrouplist(user.pw_name, user.pw_gid))
    for directory in reversed(Path(os.path.abspath(path)).parents):
        found = directory.stat()
        bit = stat.S_IXUSR if found.st_uid == access.uid else stat.S_IXGRP if found.st_gid in groups else stat.S_IXOTH
        # With an access control list the bits do not tell.
        if not found.st_mode & bit and "system.posix_acl_access" not in os.listxattr(directory):
            return str(directory)
    return ""


def _give(path: str, access: Access) -> None:
    """Gives the socket its owner and group. Whatever a stranger puts into its place stays his own."""
    fd = os.open(path, os.O_PATH | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = os.fstat(fd)
        if not stat.S_ISSOCK(found.st_mode) or found.st_uid != os.geteuid():
            raise SocketPathError(path, "was replaced while it was made", "name a path that no other user may write to")
        if (access.uid, access.gid) != (-1, -1):
            os.chown(f"/proc/self/fd/{fd}", access.uid, access.gid)
    except PermissionError as error:
        raise SocketPathError(
            path, f"give it to user {access.uid}, group {access.gid}: {error.strerror}", "run with CAP_CHOWN"
        ) from error
    finally:
        os.close(fd)


def _lock_directory(path: str) -> int:
    directory = os.path.dirname(path) or "."
    try:
        fd = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    except OSError as error:
        raise SocketPathError(path, f"directory {directory}: {error.strerror}", _remedy(error)) from error
    deadline = time.monotonic() + LOCK_S
    while True:
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return fd
        except BlockingIOError as error:
            if time.monotonic() > deadline:
                os.close(fd)
                raise SocketPathError(
                    path, f"directory {directory} is locked by another process", f"see: fuser -v {directory}"
                ) from error
            time.sleep(0.01)
        except OSError as error:
            os.close(fd)
            raise SocketPathError(path, f"lock directory {directory}: {error.strerror}") from error


def check_free(path: str, owner: int) -> None:
    """Refuses what listen_unix() would, as far as it can be told without taking the path."""
    check_path(path)
    directory = os.path.dirname(path) or "."
    if not os.path.isdir(directory):
        raise SocketPathError(path, f"directory {directory}: {os.strerror(errno.ENOENT)}", "create the directory first")
    _find_stale(path, owner)


def _clear(path: str, owner: int) -> None:
    """Unlinks our own stale socket, or one that we gave to this owner; refuses everything else that is there."""
    if _find_stale(path, owner):
        os.unlink(path)


def _find_stale(path: str, owner: int) -> bool:
    """Whether there is such a socket, or nothing at all."""
    try:
        found = os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError as error:
        raise SocketPathError(path, error.strerror or str(error), _remedy(error)) from error
    if stat.S_ISLNK(found.st_mode):
        raise SocketPathError(path, "is a symbolic link", "remove it, or name the path it points to")
    if not stat.S_ISSOCK(found.st_mode):
        raise SocketPathError(path, "exists and is not a socket", "name another path")
    if found.st_uid not in (os.geteuid(), owner):
        raise SocketPathError(path, f"belongs to user {found.st_uid}", "name another path, or have its owner remove it")
    if not _is_stale(path):
        raise SocketPathError(path, "another process listens on it", "stop that process, or name another path")
    return True


def _is_stale(path: str) -> bool:
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM | socket.SOCK_NONBLOCK) as probe:
        # Only a refused connection tells that nobody listens; a full backlog or a socket of another type is alive.
        answer = probe.connect_ex(path)
    if answer == errno.EACCES:
        raise SocketPathError(path, "we may not ask if somebody listens on it", "remove it if nobody does")
    return answer == errno.ECONNREFUSED


def _inode(found: os.stat_result) -> tuple[int, int]:
    return found.st_dev, found.st_ino


def _remedy(error: OSError) -> str:
    return {
        errno.ENOENT: "create the directory first",
        errno.EACCES: "run as a user who may write to the directory",
        errno.EROFS: "name a path on a writable file system",
    }.get(error.errno or 0, "")
