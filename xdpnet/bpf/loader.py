"""Compiles and loads steer.c with bcc, in a child process that ends at once: libLLVM would otherwise stay in ours.

The child (`python -m xdpnet.bpf.loader`) gets a socket as its standard input, answers with one JSON message, and with
the file descriptors of the program and its maps beside it (SCM_RIGHTS). A program lives as long as somebody holds it;
it is not attached here. This module must not import bcc outside of the child.

The program is loaded twice, with the same maps: as it is, and for frames in several buffers, where the kernel has that.
"""

import importlib.util
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xdpnet
from xdpnet import core
from xdpnet.bpf.headers import Headers, find_headers
from xdpnet.errors import SetupError

SOURCE = Path(__file__).with_name("steer.c")
VERDICTS = ("redirected", "no_socket", "group", "host", "runt")  # enum verdict
MAPS = ("xsks", "macs", "verdicts")
TIMEOUT_S = 60.0  # 0.3 s is usual; unpacking kheaders on a slow machine is what takes long
ANSWER_MAX = 1 << 16

BCC_REMEDY = (
    "install the distribution's package: apt install python3-bpfcc (Debian, Ubuntu), dnf install python3-bcc (Fedora), "
    "and run xdpnet with the distribution's Python (in a virtual environment: python3 -m venv --system-site-packages)"
)


@dataclass
class Program:
    """A loaded program: owns its file descriptors."""

    prog_fd: int
    xsks_fd: int  # u32 queue -> socket fd
    macs_fd: int  # 6 bytes of address and 2 of zero -> u32
    verdicts_fd: int  # u32 verdict -> u64 a possible CPU
    frags_fd: int  # the program for frames in several buffers; -1: the kernel has refused it
    max_macs: int

    def close(self) -> None:
        for name in ("prog_fd", "xsks_fd", "macs_fd", "verdicts_fd", "frags_fd"):
            fd = getattr(self, name)
            setattr(self, name, -1)
            if fd >= 0:
                os.close(fd)


def check_bcc() -> str:
    """Where the bcc module is; SetupError if it is missing or is the unrelated project of that name."""
    spec = importlib.util.find_spec("bcc")
    if spec is None or not spec.submodule_search_locations:
        raise SetupError("the Python module bcc (BPF Compiler Collection) is missing", BCC_REMEDY)
    directory = Path(next(iter(spec.submodule_search_locations)))
    if not (directory / "libbcc.py").is_file():
        raise SetupError(
            f"the Python module bcc at {directory} is not the BPF Compiler Collection but PyPI's project of that name",
            f"pip uninstall bcc; {BCC_REMEDY}",
        )
    return str(directory)


def load(queues: int, max_macs: int, source: Path = SOURCE) -> Program:
    """Compile and load, in a child; SetupError carries the compiler's or the verifier's words."""
    check_bcc()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours, tempfile.TemporaryFile() as output:
        with theirs:
            child = subprocess.Popen(
                [sys.executable, "-m", "xdpnet.bpf.loader", str(source), str(queues), str(max_macs)],
                stdin=theirs.fileno(),
                stdout=output,
                stderr=output,
                cwd=Path(xdpnet.__file__).parent.parent,
            )
        ours.settimeout(TIMEOUT_S)
        fds: list[int] = []
        try:
            answer, fds, _, _ = socket.recv_fds(ours, ANSWER_MAX, len(MAPS) + 2)
        except TimeoutError as error:
            raise SetupError(f"the compiler of {source.name} did not answer in {TIMEOUT_S:.0f} s") from error
        finally:
            child.kill()  # it has answered, or never will
            child.wait()
        for fd in fds:
            os.set_inheritable(fd, False)
        output.seek(0)
        said = output.read().decode(errors="replace").strip()
    result = json.loads(answer) if answer else {"error": "its child ended without an answer"}
    if "error" in result or len(fds) != len(MAPS) + 1 + bool(result["frags"]):
        for fd in fds:
            os.close(fd)
        message = f"load XDP program {source.name}: {result.get('error', 'file descriptors lost')}"
        raise SetupError(f"{message}\n{said}" if said else message, result.get("remedy", ""))
    prog_fd, xsks_fd, macs_fd, verdicts_fd, *frags = fds
    return Program(prog_fd, xsks_fd, macs_fd, verdicts_fd, frags[0] if frags else -1, max_macs)


def _compile(source: Path, queues: int, max_macs: int) -> tuple[Any, list[int]]:
    """In the child only. The fds live as long as the BPF object."""
    chosen = os.environ.get("BCC_KERNEL_SOURCE")  # bcc's own variable: whoever sets it means it
    headers = Headers(Path(chosen)) if chosen else find_headers()
    with tempfile.TemporaryDirectory(prefix="xdpnet-kheaders-") as scratch:
        if headers.packed:
            headers = headers.unpack(Path(scratch))
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
        import bcc

        flags = [*headers.cflags, f"-DXN_QUEUES={queues}", f"-DXN_MACS={max_macs}", "-Wall", "-Werror"]
        module = bcc.BPF(src_file=str(source), cflags=flags)
        program = module.load_func("steer", bcc.BPF.XDP)
        frags = []
        with suppress(OSError):  # before Linux 5.18
            # bcc takes the flag for this and loses it.
            terms = bcc.lib.bpf_module_license(module.module)
            frags = [core.bpf_xdp_load_frags(module.dump_func("steer"), terms)]
    return module, [program.fd, *(module[name].map_fd for name in MAPS), *frags]


def _child(source: Path, queues: int, max_macs: int) -> None:
    with socket.socket(fileno=os.dup(0)) as parent:
        try:
            module, fds = _compile(source, queues, max_macs)
        except SetupError as error:
            parent.send(json.dumps({"error": error.message, "remedy": error.remedy}).encode())
            return
        except Exception as error:  # bcc raises bare Exceptions; all are told to the parent
            remedy = ""
            if os.geteuid() != 0:
                remedy = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
            parent.send(json.dumps({"error": str(error) or repr(error), "remedy": remedy}).encode())
            return
        frags = len(fds) > len(MAPS) + 1
        socket.send_fds(parent, [json.dumps({"frags": frags}).encode()], fds)
        del module


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
