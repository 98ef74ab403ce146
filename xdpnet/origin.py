"""Where a configuration comes from: a file, flags that go over it, or both; and where in the file a fault is.

Faults begin with what they are about: 'guest "web": queues = 0: ...' (config.py), 'interface eth1: ...' (whoever looks
at the machine). tomllib keeps no lines, so headers and keys are looked for in the text again, one a line. What a file
that is laid out otherwise says has no line in the message, nor what was set by a flag.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from xdpnet.config import IDENTITY, Config, Raw, merge, parse, port_at, read_file
from xdpnet.errors import ConfigError, SetupError

Lines = dict[str, int]  # of each key of a table; of "", its header

BY_FLAG = 0  # instead of a line

_HEADER = re.compile(r"\s*\[\[\s*(guest|netdev)\s*\]\]")
_OTHER = re.compile(r"\s*\[+\s*([A-Za-z0-9_-]+)")
_KEY = re.compile(r"""\s*["']?([A-Za-z0-9_-]+)["']?\s*[=.]""")
_FIRST = re.compile(r"[A-Za-z0-9_-]*")


class Origin:
    """Of one daemon; read as often as it is to be another."""

    def __init__(
        self, path: str | None, flags: Raw | None = None, faults: Sequence[str] = (), defaults: Raw | None = None
    ) -> None:
        """faults: of how the flags are spelt; defaults: of what neither they nor the file say, others than usual."""
        self.file: Raw = {}  # as it was when it was read
        self._path = path
        self._flags = flags or {}
        self._faults = faults
        self._defaults = defaults or {}
        self._places: dict[str, Lines] = {}  # by the first words of a fault

    def read(self) -> Config:
        """As it is now. ConfigError has every fault, with its place."""
        text, self.file = read_file(self._path) if self._path else ("", {})
        merged = merge({**self._defaults, **self.file}, self._flags)
        self._places = _places(self.file, self._flags, merged, _lines(text))
        with self.locating():
            return parse(merged, self._faults)

    def locate(self, faults: Iterable[str]) -> list[str]:
        """Each with file and line, if it is in there; for a second time as they are."""
        return [self._prefix(fault) + fault for fault in faults]

    @contextmanager
    def locating(self) -> Iterator[None]:
        """What is refused meanwhile was asked for here."""
        try:
            yield
        except ConfigError as error:
            raise ConfigError(self.locate(error.faults)) from error
        except SetupError as error:
            raise SetupError("\n".join(self.locate(str(error).splitlines()))) from error

    def _prefix(self, fault: str) -> str:
        if not self._path or fault.startswith(f"{self._path}:"):
            return ""
        about = next((about for about in self._places if about and fault.startswith(f"{about}: ")), "")
        lines = self._places.get(about, {})
        first = _FIRST.match(fault, len(about) + 2 if about else 0)
        line = lines.get(first[0] if first else "", lines.get(""))
        return "" if line == BY_FLAG else f"{self._path}:{line}: " if line else f"{self._path}: "


def _places(file: Raw, flags: Raw, merged: Raw, lines: dict[str, list[Lines]]) -> dict[str, Lines]:
    """By what faults begin with; of the configuration itself, by ""."""
    places = {"": {**lines[""][0], **dict.fromkeys(flags, BY_FLAG)}}
    for kind, identity in IDENTITY.items():
        tables = merged.get(kind)
        if not isinstance(tables, list):
            continue
        count = len(file.get(kind, ()))
        found = lines[kind] if len(lines[kind]) == count else [{}] * count
        found = found + [{"": BY_FLAG}] * (len(tables) - count)
        for at, (table, keys) in enumerate(zip(tables, found, strict=True)):
            if not isinstance(table, dict):
                continue
            name = table.get(identity)
            by_flag = [key for flag in flags.get(kind, ()) if flag.get(identity) == name for key in flag]
            for about in port_at(kind, at, table), f"{kind} {name}", f"{identity} {name}":
                places[about] = {**keys, **dict.fromkeys(by_flag, BY_FLAG)}
    return places


def _lines(text: str) -> dict[str, list[Lines]]:
    """Of the file itself (""), and of each [[guest]] and [[netdev]] in turn."""
    found: dict[str, list[Lines]] = {"": [{}], "guest": [], "netdev": []}
    keys = found[""][0]
    for number, line in enumerate(text.split("\n"), 1):
        if header := _HEADER.match(line):
            keys = {"": number}
            found[header[1]].append(keys)
        elif other := _OTHER.match(line):
            found[""][0].setdefault(other[1], number)
            keys = {}
        elif key := _KEY.match(line):
            keys.setdefault(key[1], number)
    return found
