"""The Snapshot as tables for a terminal, with rates where there is an earlier snapshot to compare with.

Pure functions from snapshots to rich renderables, for any width from 80 columns on: where a table finds no room, it
leaves out what matters least, and never its drops. Totals are exact, other large counts are shortened; who needs every
digit takes --json. Tables are laid out here: of thousands of rows rich's own takes seconds.
"""

import textwrap
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.segment import Segment
from rich.text import Text

from xdpnet.counters import Metric, Traffic, Work, XdpStatistics, declared
from xdpnet.metrics.snapshot import Port, Ring, Snapshot, Worker

NOTHING = Text("-", style="dim")
GAP = "  "  # between columns
TOGETHER = "\N{NO-BREAK SPACE}"  # where a cell is not to be wrapped; shown as any other
STATE_STYLES: dict[str, str] = {"up": "green", "no_frontend": "yellow", "no_driver": "yellow"}
Sort = Literal["name", "drops", "packets", "cpu"]
SORTS: tuple[Sort, ...] = ("name", "drops", "packets", "cpu")
Line = list[Segment]  # of the terminal, without its end


@dataclass(frozen=True)
class View:
    """What of a snapshot is shown: these ports (none: all), the most of `sort` first, per second if there are rates."""

    sort: Sort | None = None  # as they are configured
    ports: frozenset[str] = frozenset()


def render(now: Snapshot, before: Snapshot | None = None, view: View = View()) -> Group:
    """The whole page; before, if it is of the same daemon, adds the rates."""
    if before and not 0 < now.time - before.time <= now.uptime_s:
        before = None
    since = Since(now, before)
    now = replace(now, ports=tuple(_shown(now.ports, since, view)))
    # The books first: a live page in a small terminal shows its top.
    parts: list[RenderableType] = [Text("\n").join((_heading(now), _totals(now)))]
    parts += [
        Text(f"  worker {worker.number} has been {worker.stalled_at} for {worker.stalled_s:.1f} s", style="bold red")
        for worker in now.workers
        if worker.stalled_at
    ]
    parts += [_ports(now, since), _workers(now, before)]
    parts += [Text(""), *(_port_line(port) for port in now.ports)]
    parts.append(_traffic(now, before))
    if any(port.guest for port in now.ports):
        parts.append(_rings(now))
    if any(port.netdev for port in now.ports):
        parts.append(_sockets(now))
    return Group(*parts)


def _shown(ports: Iterable[Port], since: "Since", view: View) -> Iterable[Port]:
    shown = [port for port in ports if not view.ports or port.name in view.ports]
    keys: dict[Sort, Callable[[Port], float]] = {"drops": since.drops, "packets": since.packets, "cpu": since.cycles}
    if view.sort == "name":
        return sorted(shown, key=lambda port: port.name)
    return sorted(shown, key=keys[view.sort], reverse=True) if view.sort else shown


# ---- layout ----


class Table:
    """Columns by their headings, which may have two lines; ">" aligns to the right. The last column may wrap.

    optional: headings of columns that are left out, one after the other, while the last one finds no `least` columns.
    """

    def __init__(self, *columns: str, optional: Sequence[str] = (), least: int = 0) -> None:
        self._columns = [column.removeprefix(">").split("\n") for column in columns]
        self._right = [column.startswith(">") for column in columns]
        self._optional = [columns.index(heading) for heading in optional if heading in columns]
        self._least = least
        self._rows: list[tuple[str | Text, ...]] = []  # an empty one ends a section

    def add_row(self, *cells: str | Text) -> None:
        self._rows.append(cells)

    def add_section(self) -> None:
        if self._rows and self._rows[-1]:
            self._rows.append(())

    def lines(self, console: Console, width: int) -> tuple[list[Line], list[Line]]:
        """Its headings, and its rows."""
        height = max(len(lines) for lines in self._columns)
        headings = [("", "")[: height - len(lines)] + tuple(lines) for lines in self._columns]
        widths = [max(len(line) for line in lines) for lines in headings]
        for row in self._rows:
            for at, cell in enumerate(row):
                widths[at] = max(widths[at], len(cell))
        shown = self._fitting(widths, width)
        *most, last = shown
        room = width - 1 - sum(widths[at] + len(GAP) for at in most)
        widths[last] = min(widths[last], max(room, *(len(line) for line in headings[last])))
        total = sum(widths[at] for at in shown) + len(GAP) * len(most)
        bold = ([Text(cell, style="bold") for cell in line] for line in zip(*headings, strict=True))
        head: list[Line] = [[], *(self._line(console, cells, widths, shown) for cells in bold)]
        head.append([Segment(" " + "─" * (total - 1))])
        rows: list[Line] = []
        for row in self._rows if self._rows and self._rows[-1] else self._rows[:-1]:
            if not row:
                rows.append([])
                continue
            style = row[-1].style if isinstance(row[-1], Text) else ""
            for n, part in enumerate(textwrap.wrap(str(row[-1]), widths[last]) or [""]):
                part = part.replace(TOGETHER, " ")
                cells = [*(row[:-1] if n == 0 else [""] * (len(row) - 1)), Text(part, style)]
                rows.append(self._line(console, cells, widths, shown))
        return head, rows

    def _fitting(self, widths: Sequence[int], width: int) -> list[int]:
        """The columns that are shown."""
        shown = [*range(len(widths))]
        least = min(self._least, widths[-1])
        for at in self._optional:
            if sum(widths[each] + len(GAP) for each in shown[:-1]) + least + 1 <= width:
                break
            shown.remove(at)
        return shown

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> Iterator[Segment]:
        for lines in self.lines(console, options.max_width):
            for line in lines:
                yield from line
                yield Segment.line()

    def _line(self, console: Console, cells: Sequence[str | Text], widths: Sequence[int], shown: Sequence[int]) -> Line:
        line = []
        for at in shown:
            cell = cells[at]
            text = str(cell)
            style = console.get_style(cell.style) if isinstance(cell, Text) else None
            line += [Segment(GAP)] if at else []
            line.append(Segment(text.rjust(widths[at]) if self._right[at] else text.ljust(widths[at]), style))
        return line


# ---- numbers ----


def count(value: int) -> str:
    """Exact to seven digits, then four of them with a suffix: 1,234,567 and 12.35M."""
    return f"{value:,}" if value < 10_000_000 else _short(value, 1000, ("", "k", "M", "G", "T", "P", "E"))


def size(value: int) -> str:
    """Bytes in decimal units, as links have them."""
    return _short(value, 1000, (" B", " kB", " MB", " GB", " TB", " PB", " EB"))


def _short(value: float, step: int, units: tuple[str, ...]) -> str:
    at = 0
    while value >= step and at < len(units) - 1:
        value /= step
        at += 1
    return f"{value:.0f}{units[0]}" if at == 0 else f"{value:.4g}{units[at]}"


def duration(seconds: float) -> str:
    whole = int(seconds)
    days, hours, minutes = whole // 86400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours:02} h"
    return f"{hours} h {minutes:02} min" if hours else f"{minutes} min {whole % 60:02} s"


# ---- the page, from top to bottom ----


def _heading(now: Snapshot) -> Text:
    text = Text()
    text.append(f"xdpnet {now.version}", style="bold")
    text.append(f"  up {duration(now.uptime_s)}, {_plural(len(now.ports), 'port')}, ")
    text.append(f"{_plural(sum(port.given + port.learned for port in now.ports), 'address', 'addresses')} known")
    return text


def _port_line(port: Port) -> Text:
    text = Text("  ")
    text.append(f"{port.name}  ", style="bold cyan")
    if port.guest:
        guest = port.guest
        text.append(f"{guest.socket or 'inherited descriptor'}{' (client)' if guest.client else ''}")
        text.append(f"  {guest.mac}" if guest.mac else "")
        text.append(f"  MTU {guest.mtu}" if guest.mtu else "")
        text.append("  " + " ".join(_short_feature(name) for name in guest.features), style="dim")
        _append_counts(text, "vhost-user errors", guest.errors)
        _append_counts(text, "refused", guest.refused)
        for last in guest.offences:
            text.append(f"  last {last.reason}: {last}, {duration(last.age_s)} ago", style="yellow")
        _append_counts(text, "not learned", {"addresses": sum(queue.tx.unlearned for queue in port.queues)})
    if port.netdev:
        netdev = port.netdev
        text.append(f"XDP {netdev.mode or 'detached'}", style="green" if netdev.alive else "bold red")
        text.append(f", {'zero copy' if netdev.zerocopy else 'copy mode'}")
        text.append(f", MTU {netdev.mtu}" if netdev.mtu else "")
        in_place = sum(queue.tx.in_place for queue in port.queues)
        text.append(f"  sent in place: {netdev.policy}, {count(in_place)}", style="dim")
        text.append("" if netdev.alive else "  interface gone", style="bold red")
        _append_counts(text, "verdicts", netdev.verdicts, "")
        _append_counts(text, "lost", {"group": netdev.group_lost})
        _append_counts(text, "without a socket", {"queues": netdev.unserved}, "bold red")
    return text


@dataclass(frozen=True)
class Since:
    """What ports have done since an earlier snapshot, per second; without one in all."""

    now: Snapshot
    before: Snapshot | None

    def drops(self, port: Port) -> float:
        return self._rate(port, _dropped)

    def packets(self, port: Port) -> float:
        return self._rate(port, lambda each: sum(queue.rx.packets + queue.tx.packets for queue in each.queues))

    def bytes(self, port: Port) -> float:
        return self._rate(port, lambda each: sum(queue.rx.bytes + queue.tx.bytes for queue in each.queues))

    def cycles(self, port: Port) -> float:
        return self._rate(port, lambda each: each.busy_cycles)

    def cpu(self, port: Port) -> float:
        """Its part of what the workers' threads ran, in percent of a CPU; with no earlier snapshot, of all they did."""
        whole = sum(self.cycles(each) for each in self.now.ports)
        if not whole:
            return 0.0
        ran = sum(cpu_of(worker, self.before, self.now) for worker in self.now.workers) if self.before else 100
        return self.cycles(port) / whole * ran

    def _rate(self, port: Port, value: Callable[[Port], int]) -> float:
        if self.before is None:
            return value(port)
        was = next((each for each in self.before.ports if (each.name, each.number) == (port.name, port.number)), None)
        done = value(port) - value(was) if was else 0
        return max(done, 0) / (self.now.time - self.before.time)


def cpu_of(worker: Worker, before: Snapshot | None, now: Snapshot) -> float:
    """Percent of a CPU that its thread has run for since then, or since it was started."""
    if before is None:
        return 100 * worker.cpu_s / now.uptime_s if now.uptime_s > 0 else 0.0
    was = next((each for each in before.workers if each.number == worker.number), worker)
    return 100 * (worker.cpu_s - was.cpu_s) / (now.time - before.time)


def _dropped(port: Port) -> int:
    return sum(sum(way.drops.values()) for queue in port.queues for way in (queue.rx, queue.tx))


def _ports(now: Snapshot, since: Since) -> Table:
    """One row each: who is in what state, who loses frames, who takes the workers' time."""
    rated = since.before is not None
    rates = (">Packets/s", ">Mb/s") if rated else (">Packets",)
    losses = (">Drops", ">Drops/s") if rated else (">Drops",)
    share = ">CPU %" if rated else ">Share of\nworkers %"
    table = Table(" Port", *rates, *losses, share, "State", optional=[">Mb/s"], least=24)
    for port in now.ports:
        cells: list[str | Text] = [f" {port.name}", count(round(since.packets(port)))]
        if rated:
            cells.append(f"{since.bytes(port) * 8 / 1e6:,.1f}")
        dropped = _dropped(port)
        cells.append(Text(count(dropped), style="yellow" if dropped else ""))
        if rated:
            lately = since.drops(port)
            cells.append(Text(_per_second(lately), style="bold yellow" if lately else ""))
        table.add_row(*cells, f"{since.cpu(port):.1f}", _state_of(port))
    return table


def _per_second(value: float) -> str:
    """One frame in a while is not none."""
    return f"{value:.1f}" if 0 < value < 10 else count(round(value))


def _state_of(port: Port) -> Text:
    if port.guest:
        state = port.guest.state
        return Text(str(state), style=STATE_STYLES.get(state.kind, "bold red"))
    if port.netdev and not port.netdev.alive:
        return Text("interface gone", style="bold red")
    return Text("up", style="green")


def _columns(holder: type) -> list[tuple[str, Metric]]:
    """Fields of a class that have a column."""
    return [(name, metric) for name, metric in declared(holder).items() if metric.column]


def _headings(columns: Iterable[tuple[str, Metric]]) -> list[str]:
    return [f">{metric.column}" for _, metric in columns]


def _traffic(now: Snapshot, before: Snapshot | None) -> Table:
    columns = _columns(Traffic)
    moved = [each for each in columns if each[1].of == "queues"]
    notified = [each for each in columns if each[1].of != "queues"]
    rates = (">Packets/s", ">Mb/s") if before else ()
    losses = (">Drops", ">Drops/s") if before else (">Drops",)
    seldom = [*reversed(_headings(notified)), *reversed(_headings(moved)), ">Mb/s"]
    table = Table(
        " Port", ">Q", "Dir", *_headings(moved), *rates, *_headings(notified), *losses, "Drops by reason",
        optional=seldom if before else seldom[:-2], least=24,
    )  # fmt: skip
    earlier = dict(_directions(before)) if before else {}
    for port in now.ports:
        for (name, number, direction), traffic in _directions_of(port):
            cells: list[str | Text] = [f" {name}", str(number), direction]
            cells += [(size if metric.unit == "bytes" else count)(getattr(traffic, field)) for field, metric in moved]
            was = earlier.get((name, number, direction))
            if before:
                cells += _rates(traffic, was, now.time - before.time)
            has = {"rings": bool(port.guest), "kicked": bool(port.guest) or direction == "tx"}
            cells += [count(getattr(traffic, field)) if has[metric.of] else NOTHING for field, metric in notified]
            lost = sum(traffic.drops.values())
            cells.append(Text(count(lost), style="yellow") if lost else NOTHING)
            if before:
                cells.append(_drop_rate(lost, was, now.time - before.time))
            table.add_row(*cells, _drops(traffic))
        table.add_section()
    return table


def _drop_rate(lost: int, before: Traffic | None, seconds: float) -> Text:
    lately = lost - sum(before.drops.values()) if before else 0
    return Text(_per_second(lately / seconds), style="bold yellow") if lately > 0 else NOTHING


def _rates(now: Traffic, before: Traffic | None, seconds: float) -> list[str | Text]:
    if before is None or now.packets < before.packets:
        return [NOTHING, NOTHING]
    packets, size_ = (now.packets - before.packets) / seconds, (now.bytes - before.bytes) / seconds
    return [count(round(packets)), f"{size_ * 8 / 1e6:,.1f}"]


def _drops(traffic: Traffic) -> Text:
    lost = [f"{reason}{TOGETHER}{count(number)}" for reason, number in traffic.drops.items() if number]
    return Text(", ".join(lost), style="yellow") if lost else NOTHING


def _rings(now: Snapshot) -> Table:
    indices = (">Available", ">Used", ">Kick\nwanted at", ">Call\nwanted at")
    columns = (" Guest", ">Q", "Ring", ">Entries", "State", *indices, ">Frames\nwaited", ">Worker")
    table = Table(*columns, optional=[*reversed(indices[2:]), ">Entries"], least=6)
    for port in now.ports:
        for queue in port.queues:
            for name, ring, traffic in (("rx", queue.rx_ring, queue.rx), ("tx", queue.tx_ring, queue.tx)):
                if ring is None:
                    continue
                cells: list[str | Text] = [f" {port.name}", str(queue.number), name]
                if ring.started or ring.broken:
                    cells += [str(ring.size), ring_state(ring), str(ring.available), str(ring.used)]
                    cells += [str(ring.available_event), str(ring.used_event)]
                    cells += [count(traffic.waited) if name == "rx" else NOTHING, str(ring.worker)]
                else:
                    cells += [NOTHING, ring_state(ring), *[NOTHING] * 6]
                table.add_row(*cells)
        table.add_section()
    return table


def ring_state(ring: Ring) -> Text:
    if ring.broken:
        return Text(f"broken: {ring.broken}", style="bold red")
    if not ring.started:
        return Text("stopped", style="dim")
    return Text("up", style="green") if ring.enabled else Text("disabled", style="yellow")


def _sockets(now: Snapshot) -> Table:
    columns = _columns(XdpStatistics)
    frames = (">Frames\nfree", ">Frames\nfill", ">Frames\ntx")
    table = Table(" Interface", ">Q", "Socket", *_headings(columns), *frames, optional=[frames[1], frames[0]], least=6)
    for port in now.ports:
        for queue in port.queues:
            if queue.xsk is None:
                continue
            xsk = queue.xsk
            state = Text("open", style="green") if xsk.open else Text("closed", style="bold red")
            statistics = (count(getattr(xsk.statistics, name)) for name, _ in columns)
            held = (count(frames) for frames in (xsk.frames_free, xsk.frames_fill, xsk.frames_tx))
            table.add_row(f" {port.name}", str(queue.number), state, *statistics, *held)
        table.add_section()
    return table


def _workers(now: Snapshot, before: Snapshot | None) -> Table:
    columns = _columns(Work)
    rates = [f"{heading}/s" for heading in _headings(columns)] if before else []
    busy = [">CPU %"] if before else [">CPU %\nin all"]
    in_all = _headings(columns)
    table = Table(" Worker", "On CPU", *busy, *in_all, *rates, optional=in_all[::-1] if before else [], least=6)
    earlier = {worker.number: worker for worker in before.workers} if before else {}
    for worker in now.workers:
        cells = [f" {worker.number}", "any" if worker.cpu < 0 else str(worker.cpu)]
        cells.append(f"{cpu_of(worker, before, now):.1f}")
        cells += [count(getattr(worker, name)) for name, _ in columns]
        if before:
            was, seconds = earlier.get(worker.number, worker), now.time - before.time
            cells += [count(round((getattr(worker, name) - getattr(was, name)) / seconds)) for name, _ in columns]
        table.add_row(*cells)
    return table


def _totals(now: Snapshot) -> Text:
    totals = now.totals
    text = Text("  ")
    text.append(f"in {totals.frames_in:,} + copies {totals.copies:,} ", style="bold")
    text.append(f"+ segments {totals.segments:,} " if totals.segments else "", style="bold")
    text.append(f"= out {totals.frames_out:,} ", style="bold")
    text.append(f"+ joined {totals.joined:,} " if totals.joined else "", style="bold")
    text.append(f"+ drops {totals.drops:,}", style="bold yellow" if totals.drops else "bold")
    text.append(f" + waiting {totals.waiting:,}" if totals.waiting else "", style="bold")
    if totals.rest:
        text.append(f"   {totals.rest:+,} on their way while this was read", style="yellow")
    else:
        text.append("   every frame accounted for", style="green")
    return text


# ---- small things ----


Key = tuple[str, int, str]


def _directions(snapshot: Snapshot) -> Iterator[tuple[Key, Traffic]]:
    for port in snapshot.ports:
        yield from _directions_of(port)


def _directions_of(port: Port) -> Iterator[tuple[Key, Traffic]]:
    for queue in port.queues:
        yield (port.name, queue.number, "rx"), queue.rx
        yield (port.name, queue.number, "tx"), queue.tx


def _append_counts(text: Text, what: str, counts: dict[str, int], style: str = "yellow") -> None:
    shown = ", ".join(f"{name} {count(number)}" for name, number in counts.items() if number)
    if shown:
        text.append(f"  {what}: {shown}", style=style)


def _short_feature(name: str) -> str:
    for prefix in ("VIRTIO_NET_F_", "VIRTIO_RING_F_", "VIRTIO_F_", "VHOST_USER_F_", "VHOST_F_"):
        name = name.removeprefix(prefix)
    return name


def _plural(number: int, one: str, many: str = "") -> str:
    return f"{number} {one if number == 1 else many or one + 's'}"
