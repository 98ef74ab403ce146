"""A guest whose frontend keeps a dirty log, as to move it to another host, and looks for what is missing in it.

What the driver stores is known (GuestMemory.watch); so whatever else differs was the device's, and every page of it
has to be marked. Of the memory each thing has pages of its own, or one mark would do for two writes.
QEMU hw/virtio/vhost.c.
"""

import ctypes
import dataclasses
import mmap
import os
import re
from collections.abc import Iterable

from tests.rig.driver import Driver
from tests.rig.rings import GuestMemory
from xdpnet.virtq.features import LOG_ALL

PAGE = 4096
WORD = 8
SEQ_CST = 5
exchange = ctypes.CDLL("libatomic.so.1")["__atomic_exchange_8"]  # comes with gcc
exchange.restype = ctypes.c_uint64


def pages_of(start: int, log: bytes) -> set[int]:
    """Guest physical addresses of the pages that have a bit in this part of a log, from its byte `start` on."""
    return {
        (8 * (start + found.start()) + bit) * PAGE
        for found in re.finditer(rb"[^\0]", log)
        for bit in range(8)
        if log[found.start()] >> bit & 1
    }


class SparseMemory(GuestMemory):
    """RAM in which nothing shares a page with anything else; what is taken is full of what no frame has."""

    def reserve(self, size: int, align: int = 64, region: int = 0) -> int:
        return super().reserve(-(-size // PAGE) * PAGE, max(align, PAGE), region)

    def take(self, size: int) -> int:
        addr = super().take(size)
        self.write(addr, b"\xa5" * size)
        return addr


class DirtyLog:
    """The log of one guest, as its frontend has it."""

    def __init__(self, driver: Driver, size: int | None = None) -> None:
        memory = driver.memory
        self.driver = driver
        self.size = size or -(-max(span.guest_addr + span.size for span in memory.spans) // (8 * PAGE))
        self.fd = os.memfd_create("log", os.MFD_CLOEXEC)
        os.ftruncate(self.fd, self.size)
        self.map = mmap.mmap(self.fd, self.size)

    def close(self) -> None:
        self.map.close()
        os.close(self.fd)

    def set_base(self) -> None:
        self.driver.port.set_log(self.fd, 0, self.size)

    def set_features(self, on: bool) -> None:
        self.driver.port.set_features(self.driver.features | (LOG_ALL if on else 0))

    def set_ring(self, index: int, on: bool) -> None:
        self.driver.port.ring_set_log(index, on, self.used_at(index))

    def used_at(self, index: int) -> int:
        """Where the device's part of a ring lies, as QEMU tells of it."""
        return self.driver.rings()[index].parts()[2][0]

    def start(self, order: Iterable[int] = (0, 1, 2)) -> None:
        """While rings run; then the guest's memory is copied."""
        self.clear()
        rings = range(len(self.driver.rings()))
        for step in order:
            if step == 0:
                self.set_base()
            elif step == 1:
                self.set_features(True)
            else:
                for index in rings:
                    self.set_ring(index, True)
        self.driver.memory.watch()

    def stop(self) -> None:
        for index in range(len(self.driver.rings())):
            self.set_ring(index, False)
        self.set_features(False)

    def restart_ring(self, index: int, base: int, logs: bool = False) -> None:
        config = self.driver.rings()[index].config(base)
        self.driver.port.ring_start(index, dataclasses.replace(config, logs=logs, log_addr=self.used_at(index)))

    def clear(self) -> None:
        self.map[:] = bytes(len(self.map))

    def sync(self) -> None:
        """Fetches what is marked, and copies those pages again, while the device goes on."""
        words = {found.start() // WORD for found in re.finditer(rb"[^\0]", self.map[:])}
        for word in words:
            bits = self._exchange(word)
            for page in pages_of(word * WORD, bits.to_bytes(WORD, "little")):
                self.driver.memory.copy_again(page, PAGE)

    def _exchange(self, word: int) -> int:
        place = ctypes.c_uint64.from_buffer(self.map, word * WORD)
        return int(exchange(ctypes.byref(place), ctypes.c_uint64(0), SEQ_CST))

    def marked(self) -> set[int]:
        """Guest physical addresses of the pages."""
        return pages_of(0, self.map[:])

    def missed(self) -> list[int]:
        """Pages that are not as they were copied, or as the driver has made them since, and that nobody has marked."""
        marked = self.marked()
        return [page for page in self.driver.memory.changed_pages(PAGE) if page not in marked]
