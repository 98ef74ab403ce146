"""The bytes of vhost-user, against bytes written by hand from the specification."""

import contextlib
import struct
from collections.abc import Callable
from typing import Protocol, Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from xdpnet.virtq import features
from xdpnet.virtq.features import ProtocolFeature, VirtioFeature
from xdpnet.virtq.message import (
    MAX_PAYLOAD,
    REASONS,
    U64,
    Address,
    FramingError,
    Header,
    MemoryRegion,
    MemoryTable,
    Nothing,
    Payload,
    ProtocolError,
    Request,
    SingleRegion,
    VringAddr,
    VringFile,
    VringState,
    reply,
    request_name,
)

REGION = struct.pack("=QQQQ", 1, 2, 3, 4)


class Unpacked(Payload, Protocol):
    @classmethod
    def unpack(cls, data: bytes) -> Self: ...


UNPACKERS: tuple[type[Unpacked], ...] = (
    Nothing,
    U64,
    Address,
    VringState,
    VringAddr,
    VringFile,
    MemoryTable,
    SingleRegion,
)


def reason_of(unpack: Callable[[bytes], object], data: bytes) -> str:
    with pytest.raises(ProtocolError) as caught:
        unpack(data)
    return caught.value.reason


def test_a_header_has_request_flags_and_size() -> None:
    header = Header.unpack(struct.pack("=III", 9, 0x1 | 0x8, 40))
    assert (header.request, header.size, header.need_reply) == (9, 40, True)


@pytest.mark.parametrize("version", [0, 2, 3])
def test_a_header_of_another_version_is_refused(version: int) -> None:
    assert reason_of(Header.unpack, struct.pack("=III", 1, version, 0)) == "flags"


@pytest.mark.parametrize("flags", [0x4, 0x10, 0x80000000])
def test_a_request_with_the_reply_flag_or_an_unknown_flag_is_refused(flags: int) -> None:
    assert reason_of(Header.unpack, struct.pack("=III", 1, 1 | flags, 0)) == "flags"


def test_the_largest_payload_is_legal() -> None:
    assert Header.unpack(struct.pack("=III", 1, 1, MAX_PAYLOAD)).size == MAX_PAYLOAD


@pytest.mark.parametrize("size", [MAX_PAYLOAD + 1, 0xFFFFFFFF])
def test_a_payload_over_the_limit_is_refused_by_its_header(size: int) -> None:
    assert reason_of(Header.unpack, struct.pack("=III", 1, 1, size)) == "size"


@pytest.mark.parametrize(
    ("kind", "size"), [(Nothing, 0), (U64, 8), (VringState, 8), (VringAddr, 40), (VringFile, 8), (SingleRegion, 40)]
)
def test_a_payload_of_any_other_size_is_refused(kind: type[Unpacked], size: int) -> None:
    kind.unpack(bytes(size))
    for wrong in {size - 1, size + 1, 4096} - {-1}:
        with pytest.raises(FramingError) as caught:
            kind.unpack(bytes(wrong))
        assert caught.value.reason == "size"


def test_a_vring_address_has_its_fields_in_the_order_of_the_specification() -> None:
    addr = VringAddr.unpack(struct.pack("=IIQQQQ", 1, 0, 0x10, 0x20, 0x30, 0x40))
    assert (addr.desc, addr.used, addr.avail, addr.log) == (0x10, 0x20, 0x30, 0x40)


def test_a_vring_address_may_have_the_log_flag_and_no_other() -> None:
    VringAddr.unpack(struct.pack("=IIQQQQ", 0, 1, 0, 0, 0, 0))
    assert reason_of(VringAddr.unpack, struct.pack("=IIQQQQ", 0, 2, 0, 0, 0, 0)) == "ring_addr"


def test_a_vring_file_is_an_index_in_eight_bits_and_the_no_descriptor_flag() -> None:
    assert VringFile.unpack(struct.pack("=Q", 0xFF)) == VringFile(0xFF, nofd=False)
    assert VringFile.unpack(struct.pack("=Q", 0x101)) == VringFile(1, nofd=True)


@pytest.mark.parametrize("value", [0x200, 0x10000, 0xFFFFFFFF, 1 << 63])
def test_a_vring_file_with_higher_bits_is_refused_at_full_width(value: int) -> None:
    assert reason_of(VringFile.unpack, struct.pack("=Q", value)) == "index"


@pytest.mark.parametrize("count", [1, 8])
def test_a_memory_table_of_one_to_eight_regions_is_legal(count: int) -> None:
    table = MemoryTable.unpack(struct.pack("=II", count, 0) + count * REGION)
    assert table.regions == count * (MemoryRegion(1, 2, 3, 4),)


@pytest.mark.parametrize("count", [0, 9, 33, 0xFFFFFFFF])
def test_a_memory_table_of_another_count_is_refused(count: int) -> None:
    assert reason_of(MemoryTable.unpack, struct.pack("=II", count, 0) + min(count, 33) * REGION) == "mem"


@pytest.mark.parametrize("size", [0, 7, 8, 39, 41, 71, 73, 263, 265, 296])
def test_a_memory_table_whose_size_is_not_that_of_its_regions_is_refused(size: int) -> None:
    data = (struct.pack("=II", 1, 0) + 9 * REGION)[:size]
    assert reason_of(MemoryTable.unpack, data) == "size"


@pytest.mark.parametrize("places", range(2, 9))
def test_a_memory_table_may_carry_the_whole_array(places: int) -> None:
    """Of eight places, as the specification has it; user-mode Linux has two."""
    assert len(MemoryTable.unpack(struct.pack("=II", 2, 0) + places * REGION).regions) == 2


def test_a_reply_carries_version_reply_flag_and_size() -> None:
    assert reply(Request.GET_FEATURES, U64(7)) == struct.pack("=IIIQ", 1, 0x5, 8, 7)


def test_every_payload_comes_back_as_it_was_packed() -> None:
    region = MemoryRegion(1, 2, 3, 4)
    payloads: tuple[Unpacked, ...] = (
        Nothing(),
        U64(1 << 63),
        VringState(1, 2),
        VringAddr(1, 0, 2, 3, 4, 5),
        VringFile(3, nofd=True),
        MemoryTable((region, region)),
        SingleRegion(region),
    )
    for payload in payloads:
        assert type(payload).unpack(payload.pack()) == payload


@given(data=st.binary(max_size=300), kind=st.sampled_from(UNPACKERS))
def test_no_bytes_raise_anything_but_a_protocol_error(data: bytes, kind: type[Unpacked]) -> None:
    with contextlib.suppress(ProtocolError):
        kind.unpack(data)


@given(data=st.binary(min_size=12, max_size=12))
def test_no_header_raises_anything_but_a_protocol_error(data: bytes) -> None:
    with contextlib.suppress(ProtocolError):
        Header.unpack(data)


def test_every_number_has_a_name_for_the_log() -> None:
    assert request_name(11) == "GET_VRING_BASE"
    assert request_name(0) == "request 0"
    assert request_name(46) == "request 46"


def test_the_requests_are_numbered_without_a_gap() -> None:
    assert [request.value for request in Request] == list(range(1, 46))


def test_reasons_are_words_that_fit_a_label() -> None:
    assert all(reason.replace("_", "").isalpha() and reason.islower() for reason in REASONS)


# ---- feature bits ----


def test_one_pair_is_offered_without_multiqueue() -> None:
    assert not features.offered(1, None) >> VirtioFeature.VIRTIO_NET_F_MQ & 1
    assert features.offered(2, None) >> VirtioFeature.VIRTIO_NET_F_MQ & 1


def test_a_frontend_without_a_control_queue_is_offered_nothing_that_takes_one() -> None:
    """As Linux has it (virtnet_validate): the whole card is refused for any of them."""
    kinds = ["CTRL_GUEST_OFFLOADS", "CTRL_RX", "CTRL_VLAN", "CTRL_RX_EXTRA", "GUEST_ANNOUNCE", "MQ", "CTRL_MAC_ADDR"]
    kinds += ["NOTF_COAL", "HASH_REPORT", "RSS"]
    vq_notf_coal = 52
    bits = features.mask(vq_notf_coal, *(VirtioFeature[f"VIRTIO_NET_F_{kind}"] for kind in kinds))
    assert not features.for_frontend(features.offered(16, 1500), rarp=False, multiqueue=False) & bits


def test_an_mtu_is_offered_when_one_is_known() -> None:
    assert not features.offered(1, None) >> VirtioFeature.VIRTIO_NET_F_MTU & 1
    assert features.offered(1, 1500) >> VirtioFeature.VIRTIO_NET_F_MTU & 1


def test_a_guest_that_takes_nothing_undone_is_offered_nothing_of_that() -> None:
    whole, less = (features.offered(2, 1500, guest_offloads) for guest_offloads in (True, False))
    kinds = ("CSUM", "TSO4", "TSO6", "ECN", "UFO", "USO4", "USO6")
    assert set(features.names(whole & ~less)) == {f"VIRTIO_NET_F_GUEST_{kind}" for kind in kinds}
    assert not less & ~whole


@pytest.mark.parametrize(
    "bit",
    [
        VirtioFeature.VIRTIO_NET_F_CTRL_VQ,
        VirtioFeature.VIRTIO_NET_F_STATUS,
        VirtioFeature.VIRTIO_NET_F_MAC,
    ],
)
def test_what_only_the_frontend_can_serve_is_never_offered(bit: VirtioFeature) -> None:
    assert not features.offered(16, 1500) >> bit & 1


def test_bits_show_by_their_names_and_unknown_ones_by_number() -> None:
    names = ["VIRTIO_NET_F_MRG_RXBUF", "VIRTIO_F_VERSION_1", "bit 44"]
    assert features.names(1 << 44 | 1 << 32 | 1 << 15) == names
    assert features.names(1 << 3, ProtocolFeature) == ["VHOST_USER_PROTOCOL_F_REPLY_ACK"]
