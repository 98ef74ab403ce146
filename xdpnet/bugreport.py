"""`xdpnet bugreport`: one archive of what helps to find a fault, from a daemon that runs, or does not any more.

What is in it is listed in parts(), each a file of its own; what cannot be had says why in its place, and nothing fails
for it. Values of the configuration that may be secrets are left out. Of guests there are counters, states and the
indices of their rings, and nothing of their memory; their addresses are in it, as they are in the configuration.
"""

import io
import json
import os
import platform
import re
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any

from xdpnet import __version__
from xdpnet.check import run_checks
from xdpnet.control.client import ask
from xdpnet.errors import SetupError, XdpnetError

APART_S = 2.0  # between the two snapshots: what counts on shows
LOG_LINES = 2000
COMMAND_S = 20.0
SECRET = re.compile(
    r"^(\s*\"?[\w-]*(?:secret|password|passphrase|token|credential|private|key)[\w-]*\"?\s*=).*$",
    re.MULTILINE | re.IGNORECASE,
)
PACKAGES = ("bcc", "cffi", "prometheus-client", "pydantic", "pyroute2", "rich")


def write(output: str | None, control: str, config: str, log: str | None, apart_s: float = APART_S) -> str:
    """Where it was written to; readable by its owner alone. Raises SetupError if it cannot be."""
    name = f"xdpnet-bugreport-{time.strftime('%Y%m%d-%H%M%S')}"
    path = output or f"{name}.tar.gz"
    try:
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise SetupError(f"{path}: {error.strerror}", "name another file with -o") from error
    made = int(os.fstat(fd).st_mtime)
    with os.fdopen(fd, "wb") as file, tarfile.open(fileobj=file, mode="w:gz") as archive:
        for part, text in parts(control, config, log, apart_s):
            data = text.encode(errors="replace")
            entry = tarfile.TarInfo(f"{name}/{part}")
            entry.size, entry.mtime, entry.mode = len(data), made, 0o600
            archive.addfile(entry, io.BytesIO(data))
    return path


def parts(control: str, config: str, log: str | None, apart_s: float) -> Iterable[tuple[str, str]]:
    """Names and contents."""
    yield "versions.txt", _or_why(_versions)
    yield "config.toml", _or_why(lambda: without_secrets(Path(config).read_text()))
    yield "check.txt", _or_why(_checks)
    first = _stats(control)
    yield "stats-1.json", first if isinstance(first, str) else _json(first)
    if not isinstance(first, str):
        time.sleep(apart_s)
        second = _stats(control)
        yield "stats-2.json", second if isinstance(second, str) else _json(second)
        for interface in (port["netdev"]["interface"] for port in first["ports"] if port["netdev"]):
            yield f"interface-{interface}.txt", _interface(interface)
    yield "links.txt", _outputs(["ip", "-d", "-s", "link", "show"], ["ip", "rule"], ["bpftool", "net", "show"])
    yield "processes.txt", _outputs(["ps", "-eLo", "pid,tid,psr,pri,stat,pcpu,comm"])
    journal = ["journalctl", "-u", "xdpnet", "-n", str(LOG_LINES), "-o", "short-precise", "--no-pager"]
    yield "log.txt", _or_why(lambda: _tail(log)) if log else _outputs(journal)


def without_secrets(text: str) -> str:
    """A configuration whose values for keys that sound like it are left out; on one line each, as TOML has them."""
    return SECRET.sub(r'\1 "(left out)"', text)


def _or_why(make: Callable[[], str]) -> str:
    try:
        return make()
    except (OSError, ValueError, XdpnetError) as error:
        return f"not to be had: {error}\n"


def _versions() -> str:
    lines = [f"xdpnet {__version__}", f"Python {sys.version}", " ".join(platform.uname())]
    for package in PACKAGES:
        try:
            lines.append(f"{package} {metadata.version(package)}")
        except metadata.PackageNotFoundError:
            lines.append(f"{package} is not installed as a package of Python's")
    lines += [Path("/etc/os-release").read_text(), Path("/proc/cmdline").read_text()]
    return "\n".join(lines) + "\n" + _outputs(["qemu-system-x86_64", "--version"], ["lscpu"], ["free", "-m"])


def _checks() -> str:
    found = run_checks([])
    return "".join(f"{'ok' if each.ok else 'FAIL':<5}{each.name}: {each.detail}; {each.remedy}\n" for each in found)


def _stats(control: str) -> Any:
    try:
        return ask(control, "stats")
    except XdpnetError as error:
        return f"not to be had: {error}\n"


def _json(snapshot: Any) -> str:
    return json.dumps(snapshot, indent=1)


def _interface(name: str) -> str:
    tools = [["ethtool", *word, name] for word in ([], ["-i"], ["-k"], ["-l"], ["-g"], ["-c"], ["-S"])]
    return _outputs(["ip", "-d", "-s", "link", "show", "dev", name], *tools)


def _outputs(*commands: list[str]) -> str:
    """Of each its words, and what it says, or why not."""
    text = ""
    for words in commands:
        text += f"$ {' '.join(words)}\n"
        try:
            done = subprocess.run(
                words, capture_output=True, text=True, errors="replace", check=False, timeout=COMMAND_S,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            text += done.stdout + done.stderr + (f"exit status {done.returncode}\n" if done.returncode else "")
        except (OSError, subprocess.TimeoutExpired) as error:
            text += f"not to be had: {error}\n"
    return text


def _tail(path: str) -> str:
    return "".join(Path(path).read_text(errors="replace").splitlines(keepends=True)[-LOG_LINES:])
