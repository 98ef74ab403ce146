"""Where the running kernel has the fields of its own structs, and the values of its enums: BTF, as it describes itself.

Reference: kernel Documentation/bpf/btf.rst.
"""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

VMLINUX = Path("/sys/kernel/btf/vmlinux")
MAGIC = 0xEB9F
INT, ARRAY, STRUCT, UNION, ENUM, FUNC_PROTO, VAR, DATASEC, DECL_TAG, ENUM64 = 1, 3, 4, 5, 6, 13, 14, 15, 17, 19
# Bytes behind the 12 that each type has: always, and for each of its members, values or parameters.
TAILS = {INT: 4, ARRAY: 12, VAR: 4, DECL_TAG: 4}
EACH = {STRUCT: 12, UNION: 12, ENUM: 8, FUNC_PROTO: 8, DATASEC: 12, ENUM64: 12}


@dataclass
class Struct:
    size: int
    offsets: dict[str, int] = field(default_factory=dict)  # of members, those of unnamed ones within it too; bytes


class Btf:
    """A BTF blob. ValueError: it is none."""

    def __init__(self, blob: bytes) -> None:
        if len(blob) < 24:
            raise ValueError("no BTF")
        magic, _, _, header, types, types_len, strings, strings_len = struct.unpack_from("<HBBIIIII", blob)
        if magic != MAGIC:
            raise ValueError("no BTF")
        self._types = blob[header + types : header + types + types_len]
        self._strings = blob[header + strings : header + strings + strings_len]
        self._at = [0]  # of each type by its number, of which 0 is void
        at = 0
        while at < len(self._types):
            self._at.append(at)
            _, info, _ = struct.unpack_from("<III", self._types, at)
            kind, count = info >> 24 & 31, info & 0xFFFF
            at += 12 + TAILS.get(kind, 0) + EACH.get(kind, 0) * count

    @classmethod
    def of_kernel(cls) -> "Btf":
        return cls(VMLINUX.read_bytes())

    def struct(self, name: str) -> Struct:
        """KeyError: there is none."""
        for at in self._named(name, STRUCT):
            found = Struct(struct.unpack_from("<I", self._types, at + 8)[0])
            self._add_members(at, 0, found)
            return found
        raise KeyError(name)

    def values(self, *names: str) -> dict[str, int]:
        """Of these constants, whatever enum they are in; KeyError: one is in none."""
        found = {}
        wanted = {self._offset_of(name): name for name in names}
        for at in self._at[1:]:
            _, info, _ = struct.unpack_from("<III", self._types, at)
            if info >> 24 & 31 != ENUM:
                continue
            for number in range(info & 0xFFFF):
                name_at, value = struct.unpack_from("<Ii", self._types, at + 12 + 8 * number)
                if name_at in wanted:
                    found[wanted[name_at]] = value
        return {name: found[name] for name in names}

    def _named(self, name: str, kind: int) -> Iterator[int]:
        wanted = self._offset_of(name)
        for at in self._at[1:]:
            name_at, info, _ = struct.unpack_from("<III", self._types, at)
            if name_at == wanted and info >> 24 & 31 == kind:
                yield at

    def _offset_of(self, name: str) -> int:
        at = self._strings.find(b"\0" + name.encode() + b"\0")
        if at < 0:
            raise KeyError(name)
        return at + 1

    def _add_members(self, at: int, base: int, found: Struct) -> None:
        _, info, _ = struct.unpack_from("<III", self._types, at)
        for number in range(info & 0xFFFF):
            name_at, kind, offset = struct.unpack_from("<III", self._types, at + 12 + 12 * number)
            offset = base + (offset & 0xFFFFFF if info >> 31 else offset) // 8
            if name_at:
                end = self._strings.index(b"\0", name_at)
                found.offsets[self._strings[name_at:end].decode()] = offset
            elif kind and struct.unpack_from("<I", self._types, self._at[kind] + 4)[0] >> 24 & 31 in (STRUCT, UNION):
                self._add_members(self._at[kind], offset, found)
