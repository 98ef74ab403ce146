"""A process that a system call is refused to: `python -m tests.rig.refuse NUMBER ERRNO WORD...` becomes that command.

seccomp(2), in the classic BPF of linux/filter.h; the system call is compared by number alone.
"""

import ctypes
import os
import platform
import struct
import sys

PR_SET_NO_NEW_PRIVS, PR_SET_SECCOMP, SECCOMP_MODE_FILTER = 38, 22, 2
RET_ERRNO, RET_ALLOW = 0x0005_0000, 0x7FFF_0000
LOAD_WORD, JUMP_EQUAL, RETURN = 0x20, 0x15, 0x06
IO_SETUP = {"x86_64": 206, "aarch64": 0}.get(platform.machine())
USERFAULTFD = {"x86_64": 323, "aarch64": 282}.get(platform.machine())


def refuse(number: int, error: int) -> None:
    """From now on this process, and what it becomes, gets `error` for the system call."""
    program = b"".join(
        struct.pack("HBBI", *instruction)
        for instruction in (
            (LOAD_WORD, 0, 0, 0),
            (JUMP_EQUAL, 0, 1, number),
            (RETURN, 0, 0, RET_ERRNO | error),
            (RETURN, 0, 0, RET_ALLOW),
        )
    )
    held = ctypes.create_string_buffer(program)
    header = struct.pack("HxxxxxxP", 4, ctypes.addressof(held))
    libc = ctypes.CDLL(None, use_errno=True)
    for arguments in ((PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), (PR_SET_SECCOMP, SECCOMP_MODE_FILTER, header, 0, 0)):
        if libc.prctl(*arguments):
            raise OSError(ctypes.get_errno(), "prctl")


if __name__ == "__main__":
    refuse(int(sys.argv[1]), int(sys.argv[2]))
    os.execv(sys.argv[3], sys.argv[3:])
