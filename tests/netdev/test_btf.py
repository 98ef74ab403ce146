"""What the running kernel says of its own structs: blobs made by hand, and the kernel's own."""

import struct
from pathlib import Path

import pytest

from xdpnet.bpf import btf, loader
from xdpnet.bpf.btf import MAGIC, VMLINUX, Btf

NAMES = ("", "outer", "first", "last", "ONE", "MANY")
INT, STRUCT, UNION, ENUM, FLAG = 1 << 24, 4 << 24, 5 << 24, 6 << 24, 1 << 31


def at(name: str) -> int:
    return sum(len(each) + 1 for each in NAMES[: NAMES.index(name)])


def words(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}I", *values)


TYPES = [
    words(0, INT, 4, 32),  # 1: an int
    words(0, UNION | FLAG | 1, 4) + words(at("last"), 1, 8 << 24 | 16),  # 2: { bits of an int, from the 16th on }
    words(at("outer"), STRUCT | 2, 12) + words(at("first"), 1, 0) + words(0, 2, 64),  # 3
    words(at("outer"), ENUM | 2, 4) + words(at("ONE"), 1) + words(at("MANY"), 0xFFFFFFFE),  # 4
]


def blob(types: bytes = b"".join(TYPES)) -> bytes:
    strings = b"".join(name.encode() + b"\0" for name in NAMES)
    return struct.pack("<HBBIIIII", MAGIC, 1, 0, 24, 0, len(types), len(types), len(strings)) + types + strings


def test_members_are_found_those_of_unnamed_ones_too() -> None:
    found = Btf(blob()).struct("outer")
    assert (found.size, found.offsets) == (12, {"first": 0, "last": 10})


def test_constants_are_found_in_whatever_enum() -> None:
    assert Btf(blob()).values("MANY", "ONE") == {"ONE": 1, "MANY": -2}


@pytest.mark.parametrize("name", ["absent", "first"])
def test_what_is_not_there_is_named(name: str) -> None:
    with pytest.raises(KeyError, match=name):
        Btf(blob()).struct(name)
    with pytest.raises(KeyError, match=name):
        Btf(blob()).values(name)


@pytest.mark.parametrize("other", [b"", bytes(23), bytes(24), b"\x7fELF" + bytes(60)])
def test_what_is_no_btf_is_refused(other: bytes) -> None:
    with pytest.raises(ValueError, match="no BTF"):
        Btf(other)


@pytest.mark.skipif(not VMLINUX.exists(), reason="this kernel has no BTF")
def test_the_kernel_tells_what_the_program_wants_to_know() -> None:
    known = loader.tells()
    assert known["XN_TELLS"] == 1
    assert known["XN_SHARED_INFO"] % 64 == 0
    # Part of what no kernel since 4.18 has changed.
    assert (known["XN_GSO_TCPV4"], known["XN_GSO_TCPV6"], known["XN_GSO_UDP_L4"]) == (1, 16, 1 << 17)


@pytest.mark.parametrize("content", [None, b"", blob()], ids=["none", "empty", "of another"])
def test_a_kernel_that_does_not_describe_itself_tells_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, content: bytes | None
) -> None:
    path = tmp_path / "vmlinux"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(btf, "VMLINUX", path)
    assert loader.tells() == {}
