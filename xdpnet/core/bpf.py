"""bpf(2), as far as steering needs it."""

from xdpnet.core.binding import check, ffi, lib


def bpf_map_update(map_fd: int, key: bytes, value: bytes) -> None:
    """Set an element of a BPF map; key and value as long as the map has them (per-CPU: rounded to 8, times CPUs)."""
    check(lib.xn_bpf_map_update(map_fd, key, value), f"update BPF map {map_fd}")


def bpf_map_delete(map_fd: int, key: bytes) -> None:
    """Delete an element of a BPF map."""
    check(lib.xn_bpf_map_delete(map_fd, key), f"delete from BPF map {map_fd}")


def bpf_map_lookup(map_fd: int, key: bytes, value_size: int) -> bytes:
    """An element of a BPF map, `value_size` bytes (per-CPU maps: of all possible CPUs)."""
    value = ffi.new("uint8_t[]", value_size)
    check(lib.xn_bpf_map_lookup(map_fd, key, value), f"look up in BPF map {map_fd}")
    return bytes(value)


def bpf_xdp_load_frags(instructions: bytes, terms: bytes) -> int:
    """Load an XDP program, under a license, for frames in several buffers; its fd."""
    loaded = lib.xn_bpf_xdp_load_frags(instructions, len(instructions) // 8, terms)
    return check(loaded, "load XDP program for frames in several buffers")


def bpf_xdp_link(prog_fd: int, ifindex: int, flags: int) -> int:
    """Attach an XDP program by a bpf_link; the link's fd, upon whose close the program is detached."""
    return check(lib.xn_bpf_xdp_link(prog_fd, ifindex, flags), f"attach XDP program to interface {ifindex}")


def bpf_link_ifindex(link_fd: int) -> int:
    """The interface a link is attached to; 0 when it is gone."""
    return check(lib.xn_bpf_link_ifindex(link_fd), f"read BPF link {link_fd}")
