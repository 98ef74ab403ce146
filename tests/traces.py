"""What a run could leave on the machine: interfaces, namespaces, processes, mounts, huge pages, BPF links, files."""

import ctypes
import ctypes.util
import os
import re
import time
from pathlib import Path

OUR_PROCESSES = re.compile(r"-m xdpnet |/xdpnet run |qemu-system.* -name xdpn|testpmd.*xdpn|prometheus.*xdpn")
DIRECTORIES = ("/run/xdpnet", "/run/dpdk", "/run/netns")
BPF_LINK_GET_NEXT_ID = 31
SYS_BPF = 321  # x86-64


def take() -> set[str]:
    """A name for each thing there is now."""
    found = {f"interface {name}" for name in os.listdir("/sys/class/net")}
    found |= {f"file {path}" for directory in DIRECTORIES for path in Path(directory).glob("*")}
    found |= {f"file {path}" for path in Path("/tmp").glob("xdpn*")}
    found |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if "huge" in line}
    found.add(f"{Path('/proc/sys/vm/nr_hugepages').read_text().strip()} huge pages")
    found |= {f"BPF link {number}" for number in bpf_links()}
    return found | processes()


def processes() -> set[str]:
    found = set()
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except (FileNotFoundError, ProcessLookupError):
            continue  # it ended while we looked
        if OUR_PROCESSES.search(command):
            found.add(f"process {path.parent.name} {command.strip()[:80]}")
    return found


def bpf_links() -> list[int]:
    """The ids of all BPF links; empty where we may not ask."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    links: list[int] = []
    attributes = (ctypes.c_uint32 * 32)()
    while libc.syscall(SYS_BPF, BPF_LINK_GET_NEXT_ID, ctypes.byref(attributes), ctypes.sizeof(attributes)) == 0:
        links.append(attributes[1])
        attributes[0] = attributes[1]
    return links


def settle(before: set[str], seconds: float = 3.0) -> list[str]:
    """What there is beyond `before` (and what is gone), once the kernel has had time to release it."""
    deadline = time.monotonic() + seconds
    while (now := take()) != before and time.monotonic() < deadline:
        time.sleep(0.1)
    return sorted(now - before) + sorted(f"(gone) {name}" for name in before - now)
