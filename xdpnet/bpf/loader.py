"""Compiles and loads steer.c with bcc, in a child process that ends at once: libLLVM would otherwise stay in ours.

The child (`python -m xdpnet.bpf.loader`) gets a socket as its standard input, answers with one JSON message, and with
the file descriptors of the program and its maps beside it (SCM_RIGHTS). A program lives as long as somebody holds it;
it is not attached here. This module must not import bcc outside of the child.

The program is loaded up to three times, with the same maps: as it is; for frames in several buffers, where the kernel
has that; and for generic mode, where it tells what is several frames in one, if the kernel describes itself (BTF) and
lets itself be read.
"""

import importlib.util
import json
import os
import re
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
from xdpnet.bpf.btf import Btf
from xdpnet.bpf.headers import Headers, find_headers
from xdpnet.errors import SetupError

SOURCE = Path(__file__).with_name("steer.c")
# What the program's enum has; its last is the number of them.
VERDICTS = tuple(re.findall(r"enum verdict \{ (.*), VERDICTS \}", SOURCE.read_text())[0].lower().split(", "))
MAPS = ("xsks", "macs", "verdicts")
CACHE_LINE = 64  # SMP_CACHE_BYTES
# enum SKB_GSO_*: what is not simply TCP or UDP to be cut, tunnels and fragments.
GSO_OTHERS = (
    *("FCOE", "GRE", "GRE_CSUM", "IPXIP4", "IPXIP6", "UDP_TUNNEL", "UDP_TUNNEL_CSUM", "TUNNEL_REMCSUM"),
    *("SCTP", "ESP", "UDP", "FRAGLIST"),
)
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
    tells_fd: int  # the same for generic mode, with what core.XN_TELLS wants in front of each frame; -1: likewise
    max_macs: int

    def close(self) -> None:
        for name in ("prog_fd", "xsks_fd", "macs_fd", "verdicts_fd", "frags_fd", "tells_fd"):
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
            answer, fds, _, _ = socket.recv_fds(ours, ANSWER_MAX, len(MAPS) + 3)
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
    if "error" in result or len(fds) != len(MAPS) + 1 + bool(result["frags"]) + bool(result["tells"]):
        for fd in fds:
            os.close(fd)
        message = f"load XDP program {source.name}: {result.get('error', 'file descriptors lost')}"
        raise SetupError(f"{message}\n{said}" if said else message, result.get("remedy", ""))
    prog_fd, xsks_fd, macs_fd, verdicts_fd, *more = fds
    frags_fd = more.pop(0) if result["frags"] else -1
    tells_fd = more.pop(0) if result["tells"] else -1
    return Program(prog_fd, xsks_fd, macs_fd, verdicts_fd, frags_fd, tells_fd, max_macs)


def tells() -> dict[str, int]:
    """What steer.c wants to know of this kernel to tell what is several frames in one; empty: it does not say.

    Reference: include/net/xdp.h, xdp_data_hard_end(); include/linux/skbuff.h, SKB_DATA_ALIGN().
    """
    try:
        kernel = Btf.of_kernel()
        buff, shared = kernel.struct("xdp_buff"), kernel.struct("skb_shared_info")
        types = kernel.values(*(f"SKB_GSO_{name}" for name in ("TCPV4", "TCPV6", "UDP_L4", *GSO_OTHERS)))
        return {
            "XN_TELLS": 1,
            "XN_BUFF_START": buff.offsets["data_hard_start"],
            "XN_BUFF_SIZE": buff.offsets["frame_sz"],
            "XN_SHARED_INFO": -(-shared.size // CACHE_LINE) * CACHE_LINE,
            "XN_GSO_SIZE": shared.offsets["gso_size"],
            "XN_GSO_TYPE": shared.offsets["gso_type"],
            **{f"XN_GSO_{name}": types[f"SKB_GSO_{name}"] for name in ("TCPV4", "TCPV6", "UDP_L4")},
            "XN_GSO_OTHERS": sum(types[f"SKB_GSO_{name}"] for name in GSO_OTHERS),
        }
    except (OSError, ValueError, KeyError):
        return {}


def _compile(source: Path, queues: int, max_macs: int) -> tuple[Any, list[int], dict[str, bool]]:
    """In the child only. The fds live as long as the BPF object; of those that need not be, which there are."""
    chosen = os.environ.get("BCC_KERNEL_SOURCE")  # bcc's own variable: whoever sets it means it
    headers = Headers(Path(chosen)) if chosen else find_headers()
    with tempfile.TemporaryDirectory(prefix=f"xdpnet-kheaders-{os.getpid()}-") as scratch:
        if headers.packed:
            headers = headers.unpack(Path(scratch))
        os.environ["BCC_KERNEL_SOURCE"] = str(headers.source)
        import bcc

        known = {"XN_QUEUES": queues, "XN_MACS": max_macs, **tells()}
        flags = [*headers.cflags, *(f"-D{name}={value}" for name, value in known.items()), "-Wall", "-Werror"]
        module = bcc.BPF(src_file=str(source), cflags=flags)
        program = module.load_func("steer", bcc.BPF.XDP)
        more = []
        have = dict.fromkeys(("frags", "tells"), False)
        # bcc takes the flag for this and loses it.
        terms = bcc.lib.bpf_module_license(module.module)
        for name, function in ("frags", "steer"), ("tells", "steer_and_tell"):
            if name == "tells" and "XN_TELLS" not in known:
                continue
            with suppress(OSError):  # before Linux 5.18, or it may not be read (lockdown)
                more.append(core.bpf_xdp_load_frags(module.dump_func(function), terms))
                have[name] = True
    return module, [program.fd, *(module[name].map_fd for name in MAPS), *more], have


def _child(source: Path, queues: int, max_macs: int) -> None:
    with socket.socket(fileno=os.dup(0)) as parent:
        try:
            module, fds, have = _compile(source, queues, max_macs)
        except SetupError as error:
            parent.send(json.dumps({"error": error.message, "remedy": error.remedy}).encode())
            return
        except Exception as error:  # bcc raises bare Exceptions; all are told to the parent
            remedy = ""
            if os.geteuid() != 0:
                remedy = "run as root, or with CAP_BPF, CAP_NET_ADMIN and CAP_PERFMON"
            parent.send(json.dumps({"error": str(error) or repr(error), "remedy": remedy}).encode())
            return
        socket.send_fds(parent, [json.dumps(have).encode()], fds)
        del module


if __name__ == "__main__":
    _child(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
