"""Frames sent in place against frames copied, guest to veth: python -m tests.bench.in_place [--turns N] [SIZE...]

One guest (DPDK virtio-user), one bridge, one socket. The two ways take turns of a fraction of a second, by turning the
check of the guest's source address on and off: a guest that is checked is copied. So both see the same machine in the
same minute. Prints a line of Markdown for each size: million frames a second copied and in place, and the median of the
ratios of neighbouring turns, with its quartiles. The copy-break was found with it.
"""

import argparse
import asyncio
import os
import statistics
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import ExitStack, asynccontextmanager
from pathlib import Path

from tests.bench.lab import BACKEND_CPU, CLIENT_CPU, MAC
from tests.rig import dpdk, netns
from xdpnet import core
from xdpnet.config import parse_mac
from xdpnet.demo import process
from xdpnet.netdev.port import Netdev
from xdpnet.netdev.watch import Watch
from xdpnet.virtq.device import GuestDevice
from xdpnet.virtq.server import GuestSocket

SIZES = (64, 128, 256, 512, 1024, 1500)
HUGE_MIB = 320


@asynccontextmanager
async def served(pair: netns.Veth, path: Path) -> AsyncIterator[tuple[core.Bridge, core.Guest, Netdev]]:
    """A bridge of one guest and one interface; its sockets follow the guest's memory as in the daemon."""
    with core.Bridge(netdev_queues=1, cpus=[BACKEND_CPU], zerocopy="on", copybreak=60) as bridge:
        netdev = Netdev(bridge, pair.ifname, 1, zerocopy="on")
        netdev.open()
        guest = bridge.add_guest(1)
        socket = GuestSocket(GuestDevice(bridge, "guest", guest, 1), str(path))
        bridge.start()
        await socket.start()
        watch = asyncio.create_task(Watch(netdev, lambda _: None).run())
        try:
            yield bridge, guest, netdev
        finally:
            watch.cancel()
            await asyncio.gather(watch, return_exceptions=True)
            await socket.stop()
            bridge.stop()
            netdev.close()


async def rate(bridge: core.Bridge, guest: core.Guest, netdev: Netdev, in_place: bool, seconds: float) -> float:
    """Million frames a second that reach the interface one way or the other."""
    guest.set_mac(parse_mac(MAC), check_source=not in_place)
    await asyncio.sleep(seconds / 4)
    before, start = netdev.port.queue_stats(0, core.TX), time.monotonic()
    await asyncio.sleep(seconds)
    after, end = netdev.port.queue_stats(0, core.TX), time.monotonic()
    sent = after.packets - before.packets
    if after.in_place - before.in_place != (sent if in_place else 0):
        raise RuntimeError(f"{after.in_place - before.in_place} of {sent} frames were sent in place")
    return sent / (end - start) / 1e6


async def measure(directory: Path, huge: Path, size: int, turns: int, seconds: float) -> list[tuple[float, float]]:
    """Rates of neighbouring turns, copied and in place."""
    path = directory / f"guest{size}.socket"
    device = f"net_virtio_user0,path={path},queues=1,queue_size=1024,mac={MAC}"
    options = ["--forward-mode=txonly", f"--txpkts={size}"]
    with ExitStack() as stack:
        pair = stack.enter_context(netns.veth())
        async with served(pair, path) as (bridge, guest, netdev):
            client = dpdk.Pmd("client", directory, [device], options, cpu=CLIENT_CPU, huge=huge)
            await asyncio.to_thread(stack.enter_context, client)
            await asyncio.to_thread(client.await_link)
            netdev.memory_changed()
            while netdev.port.is_stale("on"):
                await asyncio.sleep(0.05)
            await asyncio.to_thread(client.command, "start")
            try:
                return [
                    (
                        await rate(bridge, guest, netdev, False, seconds),
                        await rate(bridge, guest, netdev, True, seconds),
                    )
                    for _ in range(turns)
                ]
            finally:
                await asyncio.to_thread(client.close)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.bench.in_place", description=__doc__.splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, metavar="SIZE", default=SIZES, help="of frames, bytes")
    parser.add_argument("--turns", type=int, default=9, help="of each way (%(default)s)")
    parser.add_argument("--seconds", type=float, default=0.4, help="of each turn (%(default)s)")
    options = parser.parse_args()
    process.raise_on_signals()
    print("| bytes | copied, M/s | in place, M/s | ratio (quartiles) |\n|---:|---:|---:|---:|")
    with tempfile.TemporaryDirectory(prefix=f"xdpn{os.getpid()}-") as name:
        directory = Path(name)
        with dpdk.huge_pages(HUGE_MIB, directory) as huge:
            for size in options.sizes:
                pairs = asyncio.run(measure(directory, huge, size, options.turns, options.seconds))
                copied, in_place = (statistics.median(column) for column in zip(*pairs, strict=True))
                low, middle, high = statistics.quantiles([b / a for a, b in pairs], n=4)
                print(f"| {size} | {copied:.3f} | {in_place:.3f} | {middle:.3f} ({low:.3f}-{high:.3f}) |", flush=True)


if __name__ == "__main__":
    main()
