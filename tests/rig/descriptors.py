"""What a process has open."""

import contextlib
import os


def open_files(pid: int | str = "self") -> dict[str, str]:
    """What each descriptor is of, by its number."""
    links = {}
    for fd in os.listdir(f"/proc/{pid}/fd"):
        with contextlib.suppress(FileNotFoundError):  # closed meanwhile, as is the descriptor of this very listing
            links[fd] = os.readlink(f"/proc/{pid}/fd/{fd}")
    return links
