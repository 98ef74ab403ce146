"""The corpus in the repository: an archive for each target, of inputs that each reach something no other does.

Beside it, by name, are inputs that have found something: they stay whatever they reach.
"""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from pathlib import Path

from .build import HERE

KEPT = HERE / "corpus"


def unpack(target: str, into: Path) -> int:
    """Write the target's inputs into a directory; how many."""
    into.mkdir(parents=True, exist_ok=True)
    found = [path for path in sorted(KEPT.glob(f"{target}/*")) if path.is_file()]
    for path in found:
        (into / path.name).write_bytes(path.read_bytes())
    archive = KEPT / f"{target}.tar.xz"
    if not archive.exists():
        return len(found)
    with tarfile.open(archive) as tar:
        members = tar.getmembers()
        for member in members:
            content = tar.extractfile(member)
            if content:
                (into / member.name).write_bytes(content.read())
    return len(members) + len(found)


def pack(target: str, inputs: Path) -> int:
    """Keep a directory's inputs as the target's; the archive's size in bytes. The same inputs make the same archive."""
    KEPT.mkdir(exist_ok=True)
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        contents = {
            hashlib.sha1(data).hexdigest()[:12]: data for data in (path.read_bytes() for path in inputs.iterdir())
        }
        for name, content in sorted(contents.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    packed = lzma.compress(plain.getvalue(), preset=9)
    (KEPT / f"{target}.tar.xz").write_bytes(packed)
    return len(packed)
