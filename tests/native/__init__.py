"""Programs in C that tests compile when they run: what Python would be too slow for."""

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.rig.rings import GuestMemory

SOURCES = Path(__file__).parent
MAX_WORDS, MAX_VALUES = 1024, 16


def compile_program(name: str, into: Path, *flags: str) -> Path:
    if not shutil.which("gcc"):
        pytest.skip("needs gcc")
    program = into / name
    if not program.exists():
        subprocess.run(
            ["gcc", "-O2", "-Wall", "-Wextra", "-Werror", *flags, "-o", program, SOURCES / f"{name}.c"],
            check=True,
            timeout=60,
        )
    return program


class Rewriter:
    """The process that rewrites."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    @contextmanager
    def paused(self) -> Iterator[None]:
        self._process.send_signal(signal.SIGSTOP)
        os.waitid(os.P_PID, self._process.pid, os.WSTOPPED)
        yield
        self._process.send_signal(signal.SIGCONT)


@contextmanager
def rewriting(program: Path, memory: GuestMemory, words: Mapping[int, Sequence[int]]) -> Iterator[Rewriter]:
    """Another process stores values in words of the guest's memory, at random and without a pause but for paused()."""
    if len(words) > MAX_WORDS or any(len(values) > MAX_VALUES for values in words.values()):
        raise ValueError("more than the program holds")
    lines = [[memory.offset(addr), *values] for addr, values in words.items()]
    text = "".join(" ".join(f"{number:x}" for number in line) + "\n" for line in lines)
    with subprocess.Popen(
        [program, str(memory.fd), str(memory.size)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        pass_fds=[memory.fd],
        env={key: value for key, value in os.environ.items() if key != "LD_PRELOAD"},
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(text)
        process.stdin.close()
        assert process.stdout.readline() == "running\n"
        try:
            yield Rewriter(process)
            assert process.poll() is None
        finally:
            process.kill()
