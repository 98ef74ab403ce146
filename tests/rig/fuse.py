"""A file on FUSE whose server answers until it is open, and then nothing more; Linux include/uapi/linux/fuse.h."""

import contextlib
import ctypes
import os
import stat
import struct
import threading
from collections.abc import Iterator
from pathlib import Path

LOOKUP, GETATTR, OPEN, INIT = 1, 3, 14, 26
MNT_DETACH = 2
ROOT, FILE = 1, 2  # inodes


def _attributes(inode: int, size: int) -> bytes:
    mode = stat.S_IFDIR | 0o755 if inode == ROOT else stat.S_IFREG | 0o600
    return struct.pack("=6Q10I", inode, size, 0, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0)


def _serve(device: int, size: int) -> None:
    """Until it is told that the file is open, or that the file system is gone."""
    opcode = 0
    while opcode != OPEN:
        try:
            request = os.read(device, 1 << 17)
        except OSError:
            return
        _, opcode, unique, inode = struct.unpack_from("=IIQQ", request)
        answers = {
            INIT: struct.pack("=4I2H2I2HI28x", 7, 31, 0, 0, 0, 0, 4096, 1, 0, 0, 0),
            LOOKUP: struct.pack("=4Q2I", FILE, 0, 60, 60, 0, 0) + _attributes(FILE, size),
            GETATTR: struct.pack("=Q2I", 60, 0, 0) + _attributes(inode, size),
            OPEN: bytes(16),
        }
        answer = answers.get(opcode)
        error = 0 if answer is not None else -38  # ENOSYS
        os.write(device, struct.pack("=IiQ", 16 + len(answer or b""), error, unique) + (answer or b""))


@contextlib.contextmanager
def silent_file(directory: Path, size: int) -> Iterator[int]:
    """An open file, of this size, of a server that has stopped answering. In the end the connection is aborted."""
    libc = ctypes.CDLL(None, use_errno=True)
    device = os.open("/dev/fuse", os.O_RDWR | os.O_CLOEXEC)
    where = str(directory).encode()
    try:
        if libc.mount(b"xdpnet-test", where, b"fuse", 0, f"fd={device},rootmode=40000,user_id=0,group_id=0".encode()):
            raise OSError(ctypes.get_errno(), "mount")
        try:
            server = threading.Thread(target=_serve, args=(device, size), daemon=True)
            server.start()
            fd = os.open(directory / "memory", os.O_RDWR)
            server.join()
            yield fd
        finally:
            libc.umount2(where, MNT_DETACH)
    finally:
        # Whoever waits for the server goes on; so does the close() of the file.
        os.close(device)
        with contextlib.suppress(NameError, OSError):
            os.close(fd)
