"""Guest memory and event descriptors, examined before the core maps or polls them.

A region is accepted only on a file whose faults cannot hang and whose pages we may write: a regular file on tmpfs (so
every memfd) or hugetlbfs, opened read-write. A frontend that can still shrink the file is accepted and counted; the
core survives the SIGBUS. A page of any other file comes when its disk, its server, or who has frozen its file system
lets it come, and even a store to one that is there may wait for the journal: so would a worker, and all guests that it
serves, and therefore such a region is left out. Invariant: what these checks pass never overflows 64 bits and never
overlaps. No file system is asked anything before it is known to be one of the two: a hostile FUSE server would leave
even fstat() waiting.

Reference: QEMU docs/interop/vhost-user.rst, "Memory access"; F_GET_SEALS in fcntl(2); eventfd(2).
"""

import fcntl
import itertools
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from xdpnet.virtq.fd import Fd
from xdpnet.virtq.message import Log, MemoryRegion, ProtocolError, Reason, VringAddr

ADDRESS_SPACE = 1 << 64
REMEDY = "use memory-backend-memfd"
LOG_PAGE = 4096  # VHOST_LOG_PAGE: what a bit of the dirty log stands for
MOST_LOG = (1 << 52) // LOG_PAGE // 8  # bytes, for all addresses that a guest can have


@dataclass(frozen=True, slots=True)
class File:
    """What is behind a region."""

    fd: Fd
    sealed: bool  # against shrinking
    mapped: int  # bytes that the region takes, in whole pages of the file


def check_table(regions: Sequence[MemoryRegion]) -> None:
    """The geometry of a whole table: sizes, overflow, overlap."""
    for region in regions:
        _check_range(region)
    for what in ("guest_addr", "user_addr"):
        ordered = sorted(regions, key=lambda region: int(getattr(region, what)))
        for low, high in itertools.pairwise(ordered):
            if getattr(low, what) + low.size > getattr(high, what):
                raise ProtocolError("mem", f"{_name(low)} and {_name(high)} overlap in {what}")


def check_total(files: Iterable[File], limit: int) -> None:
    """What a guest may promise to have: what it has not yet is allocated, and charged, as it is touched, also by us."""
    total = sum(file.mapped for file in files)
    if total > limit:
        raise ProtocolError("mem_limit", f"{total} bytes of guest memory: max_memory of the guest is {limit}")


def check_file(region: MemoryRegion, fd: Fd) -> File:
    """The file behind a region. Refused as `mem_fd`: one that is no memory for us, whatever the region says."""
    seals = _check_memory(_name(region), "mem_fd", fd)
    step = _check_extent(_name(region), "mem_size", region.offset, region.size, fd)
    return File(fd, bool(seals & fcntl.F_SEAL_SHRINK), (region.size + step - 1) // step * step)


def check_log(log: Log, fd: Fd, regions: Iterable[MemoryRegion], files: Iterable[File]) -> None:
    """A dirty log and its file. It may be sparse: we touch no more of it than has bits of the guest's memory."""
    name = f"dirty log of {log.size} bytes"
    if not 0 < log.size <= MOST_LOG:
        raise ProtocolError("log", f"{name}, possible are 1 to {MOST_LOG}")
    if log.offset + log.size >= ADDRESS_SPACE:
        raise ProtocolError("log", f"{name}: offset + size overflows")
    _check_memory(name, "log", fd)
    _check_extent(name, "log", log.offset, log.size, fd)
    if any(os.path.sameopenfile(fd.fileno(), file.fd.fileno()) for file in files):
        raise ProtocolError("log", f"{name}: its file is memory of the guest")
    check_log_size(log, regions)


def check_log_size(log: Log, regions: Iterable[MemoryRegion]) -> None:
    """A log that is in use has a bit for each page of the memory."""
    for region in regions:
        least = -(-(region.guest_addr + region.size) // (8 * LOG_PAGE))
        if log.size < least:
            raise ProtocolError("log", f"dirty log of {log.size} bytes: {_name(region)} takes {least}")


def _check_memory(name: str, reason: Reason, fd: Fd) -> int:
    """Memory that we can map and write; its seals."""
    try:
        seals = fcntl.fcntl(fd.fileno(), fcntl.F_GET_SEALS)
    except OSError as error:
        # The kernel knows of seals on regular files of tmpfs and hugetlbfs alone (mm/memfd.c).
        raise ProtocolError(reason, f"{name}: not a file on tmpfs or hugetlbfs") from error
    if fcntl.fcntl(fd.fileno(), fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDWR:
        raise ProtocolError(reason, f"{name}: not opened read-write")
    return seals


def _check_extent(name: str, reason: Reason, offset: int, size: int, fd: Fd) -> int:
    """A part of such a file that is there; the unit in which it is mapped, in bytes."""
    page = os.fstatvfs(fd.fileno()).f_bsize  # on hugetlbfs that of the huge pages
    if offset % page:
        raise ProtocolError(reason, f"{name}: offset {offset:#x} is not a multiple of {page} bytes")
    status = os.fstat(fd.fileno())
    if offset + size > status.st_size:
        raise ProtocolError(reason, f"{name}: ends behind the {status.st_size} bytes of its file")
    return max(page, status.st_blksize)  # as c/memory/staging.c has it


def is_whole(fd: Fd) -> bool:
    """Whether every page of the file is allocated; what is not is never lent to an interface (c/memory/arena.c)."""
    status = os.fstat(fd.fileno())
    return status.st_blocks * 512 >= status.st_size


def check_ring(ring: VringAddr, left_out: Iterable[MemoryRegion]) -> None:
    """No part of a ring begins in a region that was left out: buffers there can be handed back, rings cannot."""
    for region in left_out:
        for part in ("desc", "avail", "used"):
            if 0 <= getattr(ring, part) - region.user_addr < region.size:
                where = f"{_name(region)}, which is left out: not a file on tmpfs or hugetlbfs"
                raise ProtocolError("ring_addr", f"ring {ring.index}: its {part} is in {where}; {REMEDY}")


def check_eventfd(fd: Fd) -> None:
    """Accepts plain eventfds only, and makes them non-blocking."""
    kind = _kind(fd)
    if kind != "anon_inode:[eventfd]":
        raise ProtocolError("event_fd", f"{kind} where an eventfd is needed")
    os.set_blocking(fd.fileno(), False)


def check_call(fd: Fd) -> None:
    """Accepts what the core can signal without waiting for anybody: eventfds and UNIX stream sockets (c/caller.h)."""
    kind = _kind(fd)
    if kind != "UNIX-STREAM":
        check_eventfd(fd)


def check_socket(fd: Fd) -> None:
    """Accepts UNIX sockets only, and makes them non-blocking."""
    kind = _kind(fd)
    if not kind.startswith("UNIX"):
        raise ProtocolError("fds", f"{kind} where a UNIX socket is needed")
    os.set_blocking(fd.fileno(), False)


def _check_range(region: MemoryRegion) -> None:
    if region.size == 0:
        raise ProtocolError("mem", f"{_name(region)}: empty")
    for what in ("guest_addr", "user_addr", "offset"):
        if getattr(region, what) + region.size >= ADDRESS_SPACE:
            raise ProtocolError("mem", f"{_name(region)}: {what} + size overflows")


def _kind(fd: Fd) -> str:
    kind = os.readlink(f"/proc/self/fd/{fd.fileno()}")
    # Its family, without a question that a socket answers under its lock: somebody may hold that for long.
    if kind.startswith("socket:["):
        kind = os.getxattr(fd.fileno(), "system.sockprotoname").rstrip(b"\0").decode()
    return kind


def _name(region: MemoryRegion) -> str:
    return f"region {region.guest_addr:#x}+{region.size:#x}"
