"""BPF programs of a test's own that see what an interface sends or receives (tc's clsact)."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from pyroute2.iproute.linux import IPRoute

from xdpnet.bpf.headers import find_headers

INGRESS, EGRESS = "ffff:fff2", "ffff:fff3"


@contextmanager
def loaded(text: bytes, function: bytes) -> Iterator[Any]:
    headers = find_headers()
    with (
        tempfile.TemporaryDirectory(prefix=f"xdpnet-kheaders-{os.getpid()}-") as scratch,
        pytest.MonkeyPatch.context() as environment,
    ):
        if headers.packed:
            headers = headers.unpack(Path(scratch))
        environment.setenv("BCC_KERNEL_SOURCE", str(headers.source))
        import bcc

        module = bcc.BPF(text=text, cflags=list(headers.cflags))
    yield module.load_func(function, bcc.BPF.SCHED_CLS)
    module.cleanup()


def attach(program: Any, interface: str, *hooks: str) -> None:
    """In the namespace of the calling thread, until the interface is gone."""
    with IPRoute() as netlink:
        (index,) = netlink.link_lookup(ifname=interface)
        netlink.tc("add", "clsact", index)
        for hook in hooks:
            filtered = {"fd": program.fd, "name": program.name, "parent": hook, "classid": 1}
            netlink.tc("add-filter", "bpf", index, ":1", direct_action=True, **filtered)


def detach(interface: str) -> None:
    with IPRoute() as netlink:
        (index,) = netlink.link_lookup(ifname=interface)
        netlink.tc("del", "clsact", index)
