"""What a run could leave on the machine: interfaces, namespaces, processes, mounts, huge pages, BPF links, files.

What belongs to another run that is still going on is none of it: whose something is, its name says (xdpn<pid>...), or
the process that holds it.
"""

import ctypes
import ctypes.util
import os
import re
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

OUR_PROCESSES = re.compile(r"-m xdpnet |/xdpnet run |qemu-system.* -name xdpn|testpmd.*xdpn|prometheus.*xdpn")
RUNS = re.compile(r"pytest|c/build\.py|tests\.(fuzz|bench)|bootstrap\.sh")
OWNER = re.compile(r"\bxdpn(?:et-[a-z]+-)?(\d+)")
DIRECTORIES = ("/run/xdpnet", "/run/dpdk", "/run/netns")
BPF_LINK_GET_NEXT_ID = 31
SYS_BPF = 321  # x86-64


def take(own: int | None = None) -> set[str]:
    """A name for each thing there is now. own: the process whose run it is, if not this one."""
    commands, parents = processes()
    others = others_of(own or os.getpid(), commands, parents)
    found = {f"interface {name}" for name in os.listdir("/sys/class/net")}
    found |= {f"file {path}" for directory in DIRECTORIES for path in Path(directory).glob("*")}
    found |= {f"file {path}" for path in Path("/tmp").glob("xdpn*")}
    found = {name for name in found if not ((owner := OWNER.search(name)) and int(owner[1]) in others)}
    found |= {f"mount {line.split()[1]}" for line in Path("/proc/mounts").read_text().splitlines() if "huge" in line}
    found.add(f"{Path('/proc/sys/vm/nr_hugepages').read_text().strip()} huge pages")
    found |= {f"BPF link {number}" for number in set(bpf_links()) - held_links(others)}
    ours = commands.keys() - others
    return found | {f"process {pid} {commands[pid][:80]}" for pid in ours if OUR_PROCESSES.search(commands[pid])}


def processes() -> tuple[dict[int, str], dict[int, int]]:
    """The command of each process there is, and its parent."""
    commands, parents = {}, {}
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended while we looked
            command = (path / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            parents[int(path.name)] = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            commands[int(path.name)] = command.strip() + " "
    return commands, parents


def others_of(own: int, commands: dict[int, str], parents: dict[int, int]) -> set[int]:
    """Processes of runs that go on beside: what neither descends from us nor we from it."""

    def ancestry(pid: int) -> list[int]:
        line = [pid]
        while (pid := parents.get(pid, 0)) and pid not in line:
            line.append(pid)
        return line

    above = set(ancestry(own))
    lines = {pid: ancestry(pid) for pid in commands}
    runs = {pid for pid, line in lines.items() if RUNS.search(commands[pid]) and own not in line} - above
    return {pid for pid, line in lines.items() if not runs.isdisjoint(line)}


def held_links(pids: Collection[int]) -> set[int]:
    """The ids of BPF links that these processes hold."""
    found = set()
    for pid in pids:
        with suppress(FileNotFoundError, ProcessLookupError):
            for info in Path(f"/proc/{pid}/fdinfo").iterdir():
                with suppress(FileNotFoundError):
                    found |= {int(each) for each in re.findall(r"^link_id:\s*(\d+)", info.read_text(), re.MULTILINE)}
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
