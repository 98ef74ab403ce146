"""Which process holds an interface's XDP program by a bpf_link: then nothing takes it off but that process's end.

Reference: bpf_link_show_fdinfo() of kernel/bpf/syscall.c.
"""

import re
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Holder:
    """A process; words: its command line."""

    pid: int
    words: tuple[str, ...]

    @property
    def is_xdpnet(self) -> bool:
        return any(Path(word).name == "xdpnet" for word in self.words)

    def __str__(self) -> str:
        return f"process {self.pid} ({' '.join(self.words)[:60]})"


def find_holder(program: int) -> Holder | None:
    """By the program's number; None: it is not held by a link, or by one that is pinned, or whose holder is hidden."""
    for directory in Path("/proc").glob("[0-9]*/fdinfo"):
        try:
            if any(_is_link(file, program) for file in directory.iterdir()):
                words = (directory.parent / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return Holder(int(directory.parent.name), tuple(filter(None, words)))
        except OSError:  # it has ended, or is another user's
            continue
    return None


def _is_link(file: Path, program: int) -> bool:
    try:
        text = file.read_text()
    except OSError:  # closed meanwhile
        return False
    found = dict(re.findall(r"^(\w+):\s+(\S+)$", text, re.MULTILINE))
    return found.get("link_type") == "xdp" and found.get("prog_id") == str(program)
