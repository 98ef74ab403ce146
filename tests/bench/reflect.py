"""Sends every frame that an interface receives back, its addresses swapped, in XDP, until it is ended.

python -m tests.bench.reflect INTERFACE
"""

import ctypes
import os
import signal
import socket
import struct
import sys

from xdpnet.core import bpf_xdp_link

SYS_BPF = 321  # x86-64
BPF_PROG_LOAD, BPF_PROG_TYPE_XDP = 5, 6
XDP_FLAGS_DRV_MODE = 4

LOAD_U16, LOAD_U32, STORE_U16, STORE_U32 = 0x69, 0x61, 0x6B, 0x63  # BPF_LDX and BPF_STX | BPF_MEM
MOVE, ADD_K, MOVE_K, JUMP_GREATER, EXIT = 0xBF, 0x07, 0xB7, 0x2D, 0x95
XDP_DROP, XDP_TX = 1, 3


def instruction(code: int, to: int = 0, source: int = 0, offset: int = 0, immediate: int = 0) -> bytes:
    return struct.pack("=BBhi", code, to | source << 4, offset, immediate)


PROGRAM = b"".join(
    (
        instruction(LOAD_U32, 2, 1, 0),  # data
        instruction(LOAD_U32, 3, 1, 4),  # data_end
        instruction(MOVE, 4, 2),
        instruction(ADD_K, 4, immediate=14),
        instruction(JUMP_GREATER, 4, 3, 10),  # too short: to the drop below
        instruction(LOAD_U32, 5, 2, 0),
        instruction(LOAD_U16, 6, 2, 4),
        instruction(LOAD_U32, 7, 2, 6),
        instruction(LOAD_U16, 8, 2, 10),
        instruction(STORE_U32, 2, 7, 0),
        instruction(STORE_U16, 2, 8, 4),
        instruction(STORE_U32, 2, 5, 6),
        instruction(STORE_U16, 2, 6, 10),
        instruction(MOVE_K, 0, immediate=XDP_TX),
        instruction(EXIT),
        instruction(MOVE_K, 0, immediate=XDP_DROP),
        instruction(EXIT),
    )
)


def load(program: bytes) -> int:
    code = ctypes.create_string_buffer(program, len(program))
    licence = ctypes.create_string_buffer(b"GPL")
    attributes = struct.pack(
        "=IIQQ", BPF_PROG_TYPE_XDP, len(program) // 8, ctypes.addressof(code), ctypes.addressof(licence)
    )
    buffer = ctypes.create_string_buffer(attributes, 128)
    fd = ctypes.CDLL(None, use_errno=True).syscall(SYS_BPF, BPF_PROG_LOAD, buffer, len(buffer))
    if fd < 0:
        raise OSError(ctypes.get_errno(), "load the XDP program")
    return int(fd)


if __name__ == "__main__":
    link = bpf_xdp_link(load(PROGRAM), socket.if_nametoindex(sys.argv[1]), XDP_FLAGS_DRV_MODE)
    signal.pause()
    os.close(link)
