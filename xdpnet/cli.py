"""The command line: run, check, stats, fdb, ring, demo; show, apply, guest, netdev of a running daemon.

Flags and file go through the same models (config.py). Called without a command, but with options, it runs: that is
how "Backend program conventions" of QEMU's docs/interop/vhost-user.rst call a backend, with --socket-path=PATH or
--fd=FDNUM; --print-capabilities is answered before anything else is looked at.
Exit status: 0 done, 1 failed, 2 wrong usage or a faulty configuration, of which nothing was tried.
"""

import argparse
import asyncio
import json
import logging
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from xdpnet import __version__, core, limits
from xdpnet.control import systemd
from xdpnet.errors import ConfigError, ControlError, SetupError, XdpnetError

if TYPE_CHECKING:
    from rich.console import Console

    from xdpnet.origin import Origin

CAPABILITIES = {"type": "net"}  # VHostUserBackendCapabilities of docs/interop/vhost-user.json; "net" has no features
CONVENTION_GUEST = "guest"  # the name of the one that --socket-path or --fd is about
PIPE_COLUMNS = 140  # the width of tables that no terminal limits

SORTS = ("name", "drops", "packets", "cpu")  # metrics/table.py's, which brings rich

log = logging.getLogger(__name__)


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit status of `xdpnet ARGUMENTS`."""
    words = list(sys.argv[1:] if arguments is None else arguments)
    if "--print-capabilities" in words:
        print(json.dumps(CAPABILITIES))
        return 0
    if words and words[0].startswith("-") and words[0] not in ("-h", "--help", "--version"):
        words.insert(0, "run")
    options = _parser().parse_args(words)
    try:
        return int(options.command(options))
    except ConfigError as error:
        return _fail(error.faults, 2)
    except XdpnetError as error:
        return _fail(str(error).splitlines(), 1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # else the interpreter complains at exit
        return 1
    except KeyboardInterrupt:
        return 130


def _fail(faults: Sequence[str], status: int) -> int:
    for fault in faults:
        line = systemd.prioritized(fault, logging.ERROR) if systemd.is_journal(2) else f"xdpnet: {fault}"
        print(line, file=sys.stderr)
    return status


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="xdpnet",
        description="A vhost-user network backend on AF_XDP: the other half of a virtual machine's network card.",
    )
    parser.add_argument("--version", action="version", version=f"xdpnet {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    _add_run(commands.add_parser("run", help="serve guests", description=_run.__doc__))
    _add_check(commands.add_parser("check", help="look at what this machine offers", description=_check.__doc__))
    _add_stats(commands.add_parser("stats", help="show the counters of a running daemon", description=_stats.__doc__))
    _add_fdb(commands.add_parser("fdb", help="show the addresses that it knows", description=_fdb.__doc__))
    _add_ring(commands.add_parser("ring", help="show a queue pair of a guest", description=_ring.__doc__))
    _add_log(commands.add_parser("log", help="show or set how much it says", description=_log.__doc__))
    _add_bugreport(commands.add_parser("bugreport", help="gather what helps", description=_bugreport.__doc__))
    _add_show(commands.add_parser("show", help="print its configuration", description=_show.__doc__))
    _add_apply(commands.add_parser("apply", help="have it serve another configuration", description=_apply.__doc__))
    for kind, title in ("guest", "a guest"), ("netdev", "an interface"):
        _add_change(commands.add_parser(kind, help=f"add, set or remove {title}", description=_change.__doc__), kind)
    demo = commands.add_parser("demo", help="boot a guest and send traffic through it", description=_demo.__doc__)
    demo.add_argument("--seconds", type=int, default=3, metavar="S", help="length of each TCP measurement (3)")
    demo.set_defaults(command=_demo)
    return parser


# ---- run ----


def _add_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--config", metavar="FILE", help="TOML file; flags add to it and override it")
    add(
        "--guest",
        action="append",
        metavar="NAME,socket=PATH[,KEY=VALUE...]",
        help=f"a guest: mac=MAC+MAC, queues=1..{core.MAX_PAIRS}, client=true, mtu=N, check_source=false, ips=IP+IP, "
        "user=USER, poll=true, guest_offloads=false, max_memory=SIZE; repeatable",
    )
    add(
        "--netdev",
        action="append",
        metavar="IF[,queues=N][,mode=auto|native|generic][,zerocopy=auto|on|off]",
        help="a network interface; without one, guests talk among themselves; repeatable",
    )
    add("--workers", metavar="N", help="threads that move frames (1)")
    add("--cpus", metavar="LIST", help='a CPU for each worker, as "0,2-3"')
    add("--spin-us", metavar="N", help=f"microseconds to poll after the last frame before sleeping ({limits.SPIN_US})")
    add("--ageing-s", metavar="N", help=f"seconds that a learned address lives, 0 for ever ({limits.AGEING_S})")
    add(
        "--frames-per-queue",
        metavar="N",
        help=f"{core.FRAME_SIZE >> 10} KiB frames for each queue of an interface ({limits.FRAMES_PER_QUEUE})",
    )
    add("--max-macs", metavar="N", help=f"addresses that one port may teach the bridge ({limits.MACS_PER_PORT})")
    add("--max-memory", metavar="SIZE", help=f"memory that one guest may have, as 64GiB ({limits.MAX_MEMORY >> 30}GiB)")
    add("--metrics", metavar="HOST:PORT", help="serve /metrics and /healthz")
    add("--control", metavar="PATH", help=f"control socket, '' for none ({limits.CONTROL})")
    add("--check", action="store_true", help="look whether this can be served here, change nothing, and end")
    add("--verbose", "-v", action="store_true", help="say more")
    one = parser.add_mutually_exclusive_group()
    one.add_argument("--socket-path", metavar="PATH", help="serve one guest at this socket (backend conventions)")
    one.add_argument("--fd", metavar="FDNUM", help="serve one guest on this connected socket (backend conventions)")
    parser.add_argument("--print-capabilities", action="store_true", help="print them as JSON and exit")
    parser.set_defaults(command=_run)


def _run(options: argparse.Namespace) -> int:
    """Serves guests until SIGTERM, from a file, from flags, or from both; SIGHUP has it read the file again."""
    from xdpnet import daemon, journal

    origin = _origin(options)
    config = origin.read()
    with origin.locating():
        daemon.vet(config)
    if options.check:
        return 0
    journal.set_up(logging.DEBUG if options.verbose else logging.INFO)
    try:
        asyncio.run(daemon.run(config, origin))
    except OSError as error:  # of the core, whose text names verb and object
        log.debug("where it happened", exc_info=error)
        raise SetupError(str(error)) from error
    except XdpnetError:
        raise
    except Exception:  # as a line of the log, with the priority that it deserves
        log.critical("internal error", exc_info=True)
        return 1
    return 0


def _origin(options: argparse.Namespace) -> "Origin":
    from xdpnet import config
    from xdpnet.origin import Origin

    faults: list[str] = []
    bridge = ("workers", "cpus", "spin_us", "ageing_s", "frames_per_queue", "max_macs", "max_memory")
    scalars = (*bridge, "metrics", "control")
    flags: dict[str, Any] = {key: value for key in scalars if (value := getattr(options, key)) is not None}
    guests = [config.parse_flag(flag, "name", faults) for flag in options.guest or ()]
    if options.socket_path is not None:
        guests.append({"name": CONVENTION_GUEST, "socket": options.socket_path})
    if options.fd is not None:
        guests.append({"name": CONVENTION_GUEST, "fd": options.fd})
    if guests:
        flags["guest"] = guests
    if options.netdev:
        flags["netdev"] = [config.parse_flag(flag, "interface", faults) for flag in options.netdev]
    # One such process for each guest: they cannot all have the default.
    defaults = {"control": ""} if options.socket_path or options.fd else {}
    return Origin(options.config, flags, faults, defaults)


# ---- check ----


def _add_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("interfaces", nargs="*", metavar="IF", help="interfaces to look at too")
    parser.add_argument("--netdev", action="append", default=[], metavar="IF", help="the same, as run spells it")
    parser.add_argument("--config", metavar="FILE", help="look at this file instead: whether it can be served here")
    parser.set_defaults(command=_check)


def _check(options: argparse.Namespace) -> int:
    """Looks at everything that a start needs, changes nothing, and names the remedy for what is missing."""
    if options.config:
        return _check_file(options.config)
    from rich.text import Text

    from xdpnet.check import run_checks

    interfaces = [*options.interfaces, *(flag.partition(",")[0] for flag in options.netdev)]
    checks = run_checks(dict.fromkeys(interfaces))
    console = _console()
    width = max(len(check.name) for check in checks)
    for check in checks:
        verdict, style = ("ok", "green") if check.ok else ("FAIL", "bold red") if check.required else ("note", "yellow")
        line = Text.assemble((f"{verdict:<5}", style), f"{check.name:<{width}}  {check.detail}")
        if check.remedy:
            line.append(f"; {check.remedy}", style="" if check.ok else "bold")
        console.print(line, soft_wrap=True)
    return int(any(check.required and not check.ok for check in checks))


def _check_file(path: str) -> int:
    from xdpnet import daemon
    from xdpnet.origin import Origin

    origin = Origin(path)
    config = origin.read()
    with origin.locating():
        if faults := daemon.faults_of(config):
            raise ConfigError(faults)
    return 0


# ---- changes ----


def _add_show(parser: argparse.ArgumentParser) -> None:
    _add_control(parser)
    parser.set_defaults(command=_show)


def _show(options: argparse.Namespace) -> int:
    """Prints the configuration that the running daemon has now, as a file that run and apply take."""
    from xdpnet.control.client import ask

    print(ask(options.control, "show"), end="")
    return 0


def _add_apply(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("file", metavar="FILE", help="TOML file, as run --config takes it")
    _add_order(parser)
    parser.set_defaults(command=_apply)


def _apply(options: argparse.Namespace) -> int:
    """Has the running daemon serve what the file says and nothing else: the difference is made, all or nothing."""
    from xdpnet.origin import Origin

    origin = Origin(options.file)
    origin.read()
    with origin.locating():
        return _order(options, "apply", config=origin.file)


def _add_change(parser: argparse.ArgumentParser, kind: str) -> None:
    actions = parser.add_subparsers(title="actions", metavar="ACTION", required=True)
    name = "NAME" if kind == "guest" else "IF"
    for action in "add", "set", "remove":
        one = actions.add_parser(action, help=f"{action} one", description=_change.__doc__)
        keys = (
            ""
            if action == "remove"
            else f"{',socket=PATH' if (kind, action) == ('guest', 'add') else ''}[,KEY=VALUE...]"
        )
        one.add_argument("port", metavar=f"{name}{keys}", help=f"as --{kind} of run has it; KEY= is the default again")
        _add_order(one)
        one.set_defaults(command=_change, kind=kind, action=action)


def _change(options: argparse.Namespace) -> int:
    """Changes the running daemon until its file is read again, all or nothing; xdpnet show prints the outcome."""
    from xdpnet import config

    faults: list[str] = []
    table = config.parse_flag(options.port, config.IDENTITY[options.kind], faults)
    if faults:
        raise ConfigError(faults)
    return _order(options, "change", kind=options.kind, action=options.action, table=table)


def _add_control(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--control", metavar="PATH", default=limits.CONTROL, help=f"its socket ({limits.CONTROL})")


def _add_order(parser: argparse.ArgumentParser) -> None:
    _add_control(parser)
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, and do nothing")
    parser.add_argument(
        "--interrupt", action="store_true", help="also what takes it that a guest's frontend connects anew"
    )


def _order(options: argparse.Namespace, command: str, **more: Any) -> int:
    from xdpnet.control.client import CHANGED_S, ask

    more |= {"dry": options.dry_run, "interrupt": options.interrupt}
    done = ask(options.control, command, CHANGED_S, **more)["done"]
    for line in done:
        print(line)
    if not done:
        print("nothing to change")
    return 0


# ---- stats ----


def _add_stats(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the whole snapshot as JSON; with --watch one line each")
    parser.add_argument(
        "--watch", nargs="?", type=_seconds, const=1.0, metavar="S", help="again every S seconds (1), with rates"
    )
    parser.add_argument("--sort", choices=SORTS, help="ports with the most of it first; drops and so on are per second")
    parser.add_argument("--port", action="append", default=[], metavar="NAME", help="this port alone; repeatable")
    _add_control(parser)
    parser.set_defaults(command=_stats)


def _seconds(word: str) -> float:
    value = float(word)
    if not 0.1 <= value <= 86400:
        raise argparse.ArgumentTypeError("must be 0.1..86400 seconds")
    return value


def _stats(options: argparse.Namespace) -> int:
    """Shows what the running daemon has counted, by port and queue."""
    from xdpnet.control.client import ask

    if options.json:
        while True:
            answer = ask(options.control, "stats")
            print(json.dumps(answer, indent=None if options.watch else 2), flush=True)
            if not options.watch:
                return 0
            time.sleep(options.watch)
    from xdpnet.metrics import screen
    from xdpnet.metrics.table import View, render

    console, view = _console(), View(options.sort, frozenset(options.port))
    if options.watch:
        screen.watch(console, lambda: _snapshot(options.control), options.watch, view)
        return 0
    now = _snapshot(options.control)
    if absent := view.ports - {port.name for port in now.ports}:
        there = ", ".join(port.name for port in now.ports)
        raise ControlError(f"no port {', '.join(sorted(absent))}; there are: {there}")
    console.print(render(now, None, view))
    return 0


def _add_fdb(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="as JSON")
    parser.add_argument("--port", action="append", default=[], metavar="NAME", help="of this port alone; repeatable")
    _add_control(parser)
    parser.set_defaults(command=_fdb)


def _fdb(options: argparse.Namespace) -> int:
    """Shows which addresses the running daemon knows, of which port, and since when they are silent."""
    from xdpnet.metrics import detail

    now = _snapshot(options.control)
    if options.json:
        print(json.dumps([asdict(address) for address in detail.addresses(now, options.port)], indent=2))
    else:
        _console().print(detail.fdb(now, options.port))
    return 0


def _add_ring(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("guest", metavar="GUEST", help="its name")
    parser.add_argument("pair", metavar="Q", type=int, help="the number of a queue pair, from 0 on")
    parser.add_argument("--json", action="store_true", help="as JSON")
    _add_control(parser)
    parser.set_defaults(command=_ring)


def _ring(options: argparse.Namespace) -> int:
    """Shows both rings of a queue pair: state, indices, and every counter with what it means."""
    from xdpnet.metrics import detail

    queue = detail.queue_of(_snapshot(options.control), options.guest, options.pair)
    if options.json:
        print(json.dumps(asdict(queue), indent=2))
    else:
        _console().print(detail.ring(queue))
    return 0


# ---- log, bugreport ----


def _add_log(parser: argparse.ArgumentParser) -> None:
    from xdpnet.journal import LEVELS

    parser.add_argument("level", nargs="?", choices=LEVELS, help="from now on, until it ends")
    _add_control(parser)
    parser.set_defaults(command=_log)


def _log(options: argparse.Namespace) -> int:
    """Shows the level of the running daemon's log, or sets it: debug has the vhost-user conversation, too."""
    from xdpnet.control.client import ask

    print(ask(options.control, f"log {options.level}" if options.level else "log")["level"])
    return 0


def _add_bugreport(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("-o", "--output", metavar="FILE", help="a .tar.gz (xdpnet-bugreport-TIME.tar.gz here)")
    parser.add_argument("--config", metavar="FILE", default="/etc/xdpnet.toml", help="its file (/etc/xdpnet.toml)")
    parser.add_argument("--log", metavar="FILE", help="its log, if it is not in the journal as xdpnet.service")
    _add_control(parser)
    parser.set_defaults(command=_bugreport)


def _bugreport(options: argparse.Namespace) -> int:
    """Gathers in one archive what helps to find a fault, without secrets, and with nothing of guests' memory."""
    from xdpnet import bugreport

    print(bugreport.write(options.output, options.control, options.config, options.log))
    return 0


def _snapshot(path: str) -> Any:
    from xdpnet.control.client import ask
    from xdpnet.metrics.snapshot import Snapshot

    try:
        return Snapshot.from_json(ask(path, "stats"))
    except ValueError as error:
        raise ControlError(f"control socket {path}: the daemon is of another version; restart it") from error


def _console() -> "Console":
    from rich.console import Console

    console = Console(highlight=False)
    return console if console.is_terminal else Console(highlight=False, width=PIPE_COLUMNS)


# ---- demo ----


def _demo(options: argparse.Namespace) -> int:
    """Boots a Linux guest behind a veth pair in a network namespace of its own, pings it, measures it, cleans up."""
    from xdpnet import demo

    return demo.run(options.seconds)
