"""What a person may set: the models behind the TOML file and the flags of `xdpnet run`, which are the same.

Invariant: a Config exists only if every value is legal and no two ports share a name, socket, address or interface;
otherwise parse() raises one ConfigError with a line for each fault, naming the key and the value. Nothing here looks at
the machine.
"""

import difflib
import ipaddress
import json
import re
import tomllib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from xdpnet import limits
from xdpnet.core import (
    MAX_FRAMES,
    MAX_IPS,
    MAX_MACS,
    MAX_NETDEV_QUEUES,
    MAX_OWN_MACS,
    MAX_PAIRS,
    MAX_PORTS,
    MAX_WORKERS,
    MIN_FRAMES,
)
from xdpnet.errors import ConfigError, SocketPathError
from xdpnet.sockets import check_path

Raw = dict[str, Any]
IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address

MAX_CPU = 4095
ADDRESS_SPACE = 64 << 40  # of 47 bits, half: a table of memory is mapped before the one that it replaces goes
NO_ID = (1 << 32) - 1  # of chown(2): leave it as it is
IFNAME_MAX = 127  # of an alternative name: ALTIFNAMSIZ, less its terminating zero
CONFIG_BYTES = 1 << 20  # more is not a configuration
IDENTITY = {"guest": "name", "netdev": "interface"}  # the key of a table that says which one it is


def _number(value: object) -> int | None:
    """A whole number, as TOML has it or as a flag spells it."""
    if isinstance(value, str) and re.fullmatch(r"[0-9]{1,10}", value):
        return int(value)
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def _integer(low: int, high: int) -> BeforeValidator:
    def check(value: object) -> int:
        number = _number(value)
        if number is None or not low <= number <= high:
            raise ValueError(f"must be {low}..{high}")
        return number

    return BeforeValidator(check)


def _power_of_two(value: object) -> int:
    number = _number(value)
    if number is None or not MIN_FRAMES <= number <= MAX_FRAMES or number & (number - 1):
        raise ValueError(f"must be a power of two, {MIN_FRAMES}..{MAX_FRAMES}")
    return number


def _boolean(value: object) -> bool:
    words = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.lower() in words:
        return words[value.lower()]
    raise ValueError("must be true or false")


def _text(check: Callable[[str], str | None]) -> BeforeValidator:
    def checked(value: object) -> str | None:
        if not isinstance(value, str):
            raise ValueError("must be a string")
        return check(value)

    return BeforeValidator(checked)


def _name(value: str) -> str:
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,32}", value):
        raise ValueError("must be 1..32 letters, digits, '_', '.' or '-'")
    return value


def _interface(value: str) -> str:
    # dev_valid_name() of net/core/dev.c, and nothing that would need quoting in a log line or label.
    if not re.fullmatch(rf"[!-~]{{1,{IFNAME_MAX}}}", value) or set(value) & set('/:"\\') or value in (".", ".."):
        raise ValueError(f"must be the name of an interface, 1..{IFNAME_MAX} characters")
    return value


def _account(value: object) -> str | int:
    """A user or group: its number, or its name as useradd(8) lets it be."""
    number = _number(value)
    if number is not None and 0 <= number < NO_ID:
        return number
    if isinstance(value, str) and re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]{0,31}\$?", value):
        return value
    raise ValueError("must be a name or a number")


def _mode(value: object) -> int:
    """Permissions, as chmod has them. Not a number: of 660 nobody could say whether it was meant as 0o660."""
    if isinstance(value, str) and re.fullmatch(r"0?[0-7]{3}", value):
        return int(value, 8)
    raise ValueError('must be permissions, as "0660"')


def _optional_socket(value: str) -> str | None:
    return _socket(value) if value else None


def _socket(value: str) -> str:
    try:
        check_path(value)
    except SocketPathError as error:
        raise ValueError(error.message) from error
    return value


def parse_mac(value: object) -> bytes:
    """The six bytes of "52:54:00:12:34:56"; refuses what cannot be the address of one station."""
    if not isinstance(value, str) or not re.fullmatch(r"[0-9A-Fa-f]{2}(:[0-9A-Fa-f]{2}){5}", value):
        raise ValueError("must be six bytes, as 52:54:00:12:34:56")
    mac = bytes.fromhex(value.replace(":", ""))
    if mac[0] & 1:
        raise ValueError("must be a unicast address: this is a group address")
    if not any(mac):
        raise ValueError("must be a unicast address: this is all zero")
    return mac


def parse_macs(value: object) -> tuple[bytes, ...]:
    """The addresses of "52:54:00:12:34:56+52:54:00:12:34:57"; a list of strings is taken too."""
    words = value.split("+") if isinstance(value, str) else value
    if not isinstance(words, list | tuple):
        words = [words]
    if not 1 <= len(words) <= MAX_OWN_MACS:
        raise ValueError(f"must be 1..{MAX_OWN_MACS} addresses")
    macs = tuple(parse_mac(word) for word in words)
    if len(macs) != len(set(macs)):
        raise ValueError("names an address twice")
    return macs


def parse_cpus(value: object) -> tuple[int, ...]:
    """(0, 2, 3) of "0,2-3"; a list of numbers is taken too."""
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if isinstance(value, list):
        value = ",".join(str(cpu) for cpu in value)
    if not isinstance(value, str) or not re.fullmatch(r"[0-9]{1,4}(-[0-9]{1,4})?(,[0-9]{1,4}(-[0-9]{1,4})?)*", value):
        raise ValueError('must be a list of CPUs, as "0,2-3"')
    cpus: list[int] = []
    for part in value.split(","):
        first, _, last = part.partition("-")
        low, high = int(first), int(last or first)
        if low > high:
            raise ValueError(f"the range {part} is empty")
        if high > MAX_CPU:
            raise ValueError(f"CPUs are 0..{MAX_CPU}")
        cpus.extend(range(low, high + 1))
    if len(cpus) != len(set(cpus)):
        raise ValueError("names a CPU twice")
    return tuple(cpus)


def parse_address(value: object) -> tuple[str, int]:
    """Host and port of "127.0.0.1:9100", "[::1]:9100" or "localhost:9100"; port 0 lets the kernel choose."""
    fault = ValueError("must be HOST:PORT, as 127.0.0.1:9100 or [::1]:9100")
    if not isinstance(value, str):
        raise fault
    host, colon, port = value.rpartition(":")
    if not colon or not re.fullmatch(r"[0-9]{1,5}", port) or int(port) > 65535:
        raise fault
    if host.startswith("[") and host.endswith("]"):
        try:
            return str(ipaddress.IPv6Address(host[1:-1])), int(port)
        except ValueError:
            raise fault from None
    if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9.-]{0,252})", host):
        raise fault
    return host, int(port)


def parse_ips(value: object) -> tuple[IPAddress, ...]:
    """The addresses of "10.0.0.5+fd00::5"; a list of strings is taken too."""
    fault = ValueError(f'must be at most {MAX_IPS} IP addresses, as "10.0.0.5+fd00::5"')
    words = value.split("+") if isinstance(value, str) else value
    if not isinstance(words, list | tuple) or len(words) > MAX_IPS:
        raise fault
    ips = []
    for word in words:
        try:
            ips.append(ipaddress.ip_address(word if isinstance(word, str) and "%" not in word else ""))
        except ValueError:
            raise fault from None
        if ips[-1].is_multicast or ips[-1].is_unspecified:
            raise ValueError(f"must be addresses of a station: {word} is not")
    return tuple(ips)


def parse_size(value: object) -> int:
    """Bytes of "64GiB"; a plain number is bytes."""
    units = {"": 0, "KiB": 10, "MiB": 20, "GiB": 30, "TiB": 40}
    word = re.fullmatch(r"([0-9]{1,15})([KMGT]iB)?", str(value)) if isinstance(value, str | int) else None
    size = int(word[1]) << units[word[2] or ""] if word and not isinstance(value, bool) else -1
    least, most = limits.MEMORY
    if not least <= size <= most:
        raise ValueError(f'must be {least >> 20}MiB..{most >> 40}TiB, as "64GiB"')
    return size


Boolean = Annotated[bool, BeforeValidator(_boolean)]
Mac = Annotated[bytes, BeforeValidator(parse_mac)]
SocketPath = Annotated[str, _text(_socket)]
Size = Annotated[int, BeforeValidator(parse_size)]


class GuestConfig(BaseModel):
    """One guest: a vhost-user socket, or a connection that we inherit, and what is on the other side of it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, _text(_name)]
    socket: SocketPath | None = None
    fd: Annotated[int, _integer(0, (1 << 20) - 1)] | None = None
    macs: Annotated[tuple[bytes, ...], BeforeValidator(parse_macs)] = Field(default=(), alias="mac")
    queues: Annotated[int, _integer(1, MAX_PAIRS)] = 1
    client: Boolean = False
    mtu: Annotated[int, _integer(*limits.MTU)] | None = None
    check_source: Boolean | None = None
    ips: Annotated[tuple[IPAddress, ...], BeforeValidator(parse_ips)] = ()
    poll: Boolean = False
    guest_offloads: Boolean = True
    max_memory: Size | None = None
    user: Annotated[str | int, BeforeValidator(_account)] | None = None
    group: Annotated[str | int, BeforeValidator(_account)] | None = None
    mode: Annotated[int, BeforeValidator(_mode)] | None = None

    @property
    def checks_source(self) -> bool:
        """Whether frames from another source address are dropped: on wherever the address is known."""
        return bool(self.macs) if self.check_source is None else self.check_source


class NetdevConfig(BaseModel):
    """One network interface; without a number, all queues that it has or gets are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    interface: Annotated[str, _text(_interface)]
    queues: Annotated[int, _integer(1, MAX_NETDEV_QUEUES)] | None = None
    mode: Literal["auto", "native", "generic"] = "auto"
    zerocopy: Literal["auto", "on", "off"] = "auto"


class Config(BaseModel):
    """One daemon: one bridge and its ports."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    workers: Annotated[int, _integer(1, MAX_WORKERS)] | None = None
    cpus: Annotated[tuple[int, ...], BeforeValidator(parse_cpus)] = ()
    spin_us: Annotated[int, _integer(0, 1_000_000)] = limits.SPIN_US
    ageing_s: Annotated[int, _integer(0, 1_000_000)] = limits.AGEING_S
    frames_per_queue: Annotated[int, BeforeValidator(_power_of_two)] = limits.FRAMES_PER_QUEUE
    max_macs: Annotated[int, _integer(1, MAX_MACS)] = limits.MACS_PER_PORT
    max_memory: Size = limits.MAX_MEMORY  # of each guest that has no such of its own
    control: Annotated[str | None, _text(_optional_socket)] = limits.CONTROL  # "": none
    metrics: Annotated[tuple[str, int], BeforeValidator(parse_address)] | None = None
    guests: tuple[GuestConfig, ...] = Field(default=(), alias="guest")
    netdevs: tuple[NetdevConfig, ...] = Field(default=(), alias="netdev")

    @property
    def zerocopy(self) -> Literal["auto", "on", "off"]:
        """The most that any interface may do with guest memory."""
        wishes = {netdev.zerocopy for netdev in self.netdevs}
        return "on" if "on" in wishes else "auto" if "auto" in wishes else "off"

    @property
    def worker_count(self) -> int:
        """As many as set, else one for each CPU named, else one."""
        return self.workers or len(self.cpus) or 1


def read_file(path: str) -> tuple[str, Raw]:
    """The text of a TOML file, and its tables as they stand, unchecked."""
    try:
        with Path(path).open("rb") as file:
            content = file.read(CONFIG_BYTES + 1)
    except OSError as error:
        raise ConfigError([f"{path}: {error.strerror}"]) from error
    if len(content) > CONFIG_BYTES:
        raise ConfigError([f"{path}: more than {CONFIG_BYTES} bytes are no configuration"])
    try:
        text = content.decode()
        return text, tomllib.loads(text)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConfigError([f"{path}:{line}: not TOML: not UTF-8"]) from error
    except tomllib.TOMLDecodeError as error:
        reason, _, place = str(error).partition(" (at line ")
        found = re.match(r"[0-9]+", place)
        raise ConfigError([f"{path}:{found[0] if found else len(text.splitlines())}: not TOML: {reason}"]) from error
    except RecursionError as error:
        raise ConfigError([f"{path}: nested too deeply"]) from error


def parse_flag(flag: str, key: str, faults: list[str]) -> Raw:
    """The file's table for "web,socket=/run/web.sock", as --guest (key "name") or --netdev (key "interface") has it."""
    kind = "guest" if key == "name" else "netdev"
    first, *rest = flag.split(",")
    table: Raw = {} if "=" in first else {key: first}
    for part in [first, *rest] if "=" in first else rest:
        name, equals, value = part.partition("=")
        if not equals or not name:
            faults.append(f"{kind} {_show(flag)}: {part!r}: must be KEY=VALUE")
        elif name in table:
            faults.append(f"{kind} {_show(flag)}: {name}: given twice")
        else:
            table[name] = value
    return table


def merge(file: Raw, flags: Raw) -> Raw:
    """Flags override the file; a guest or netdev that the file has too is changed, another one is added."""
    merged = {**file, **{key: value for key, value in flags.items() if key not in ("guest", "netdev")}}
    for key, identity in IDENTITY.items():
        if key not in flags:
            continue
        tables = file.get(key, [])
        if not isinstance(tables, list):
            continue  # a fault that parse() reports
        tables = list(tables)
        names = [table.get(identity) if isinstance(table, dict) else None for table in tables]
        known = {name: at for at, name in enumerate(names) if isinstance(name, str)}
        for table in flags[key]:
            at = known.get(table.get(identity))
            if at is None:
                tables.append(table)
            else:
                tables[at] = {**tables[at], **table}
        merged[key] = tables
    return merged


def to_raw(config: Config) -> Raw:
    """What parse() makes this configuration of: the keys that were set, spelt as in a file."""
    return {_alias(config, name): _spelt(name, getattr(config, name)) for name in _set_in(config)}


def _set_in(model: BaseModel) -> list[str]:
    """In the order of the model, which is that of the documents."""
    return [name for name in type(model).model_fields if name in model.model_fields_set]


def _alias(model: BaseModel, name: str) -> str:
    return type(model).model_fields[name].alias or name


def _spelt(name: str, value: Any) -> Any:
    if isinstance(value, BaseModel):
        return {_alias(value, key): _spelt(key, getattr(value, key)) for key in _set_in(value)}
    if name == "macs":
        words = [mac.hex(":") for mac in value]
        return words[0] if len(words) == 1 else words
    if name == "metrics" and value is not None:
        host, port = value
        return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    if name == "mode" and isinstance(value, int):
        return f"{value:04o}"
    if name == "control":
        return value or ""
    if isinstance(value, tuple):
        return [_spelt("", each) for each in value]
    return str(value) if isinstance(value, IPAddress) else value


def to_toml(config: Config) -> str:
    """A file of which parse() makes the same configuration."""
    raw = {key: value for key, value in to_raw(config).items() if value is not None}
    lines = [f"{key} = {_toml(value)}" for key, value in raw.items() if key not in ("guest", "netdev")]
    for key in "netdev", "guest":
        for table in raw.get(key, ()):
            lines += ["", f"[[{key}]]"] if lines else [f"[[{key}]]"]
            lines += [f"{name} = {_toml(value)}" for name, value in table.items() if value is not None]
    return "\n".join(lines) + "\n"


def _toml(value: Any) -> str:
    """Of what to_raw() has. Strings as JSON has them, of which TOML takes all but surrogates and DEL."""
    if isinstance(value, list):
        return f"[{', '.join(_toml(each) for each in value)}]"
    if isinstance(value, str):
        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return str(value).lower()  # a number, or a Boolean


def with_table(raw: Raw, kind: str, table: Raw, there: bool) -> Raw:
    """With a port added or, of one that is there, these keys set; without those that are set to nothing."""
    identity = IDENTITY[kind]
    known = [each[identity] for each in raw.get(kind, [])]
    name = table.get(identity)
    if there and name not in known:
        raise ConfigError([f"{kind} {_show(name)}: there is none; there are: {', '.join(known) or 'none'}"])
    if not there and name in known:
        raise ConfigError([f"{kind} {_show(name)}: is there already; change it with: xdpnet {kind} set"])
    merged = merge(raw, {kind: [table]})
    # KEY= takes it away.
    merged[kind] = [{key: value for key, value in each.items() if value != ""} for each in merged[kind]]
    return merged


def without_table(raw: Raw, kind: str, name: object) -> Raw:
    identity = IDENTITY[kind]
    known = [each[identity] for each in raw.get(kind, [])]
    if name not in known:
        raise ConfigError([f"{kind} {_show(name)}: there is none; there are: {', '.join(known) or 'none'}"])
    return {**raw, kind: [each for each in raw[kind] if each[identity] != name]}


def parse(raw: Raw, faults: Sequence[str] = ()) -> Config:
    """The configuration that raw describes, or a ConfigError with these and all its own faults."""
    found = list(faults)
    config: Config | None = None
    try:
        config = Config.model_validate(raw)
    except ValidationError as error:
        found += [_describe(raw, fault["loc"], fault["type"], fault["msg"], fault["input"]) for fault in error.errors()]
    found += _relations(raw)
    if found or config is None:
        raise ConfigError(found)
    return config


def _describe(raw: Raw, location: tuple[int | str, ...], kind: str, message: str, value: object) -> str:
    where, key = _place(raw, location)
    if kind == "missing":
        return f"{where}{key}: is missing"
    if kind == "extra_forbidden":
        return f"{where}{_bare(key)} = {_show(value)}: unknown key{_suggest(location, key)}"
    reason = {
        "model_type": "must be a table",
        "tuple_type": f"must be tables, as [[{key}]]",
        "literal_error": message.replace("Input should", "must").replace("'", '"'),
    }.get(kind, message.removeprefix("Value error, "))
    return f"{where}{key} = {_show(value)}: {reason}"


def _place(raw: Raw, location: tuple[int | str, ...]) -> tuple[str, str]:
    """Port and key, as 'guest "web": ' and "queues", of a location as ("guest", 0, "queues")."""
    if len(location) < 2 or location[0] not in ("guest", "netdev") or not isinstance(location[1], int):
        return "", str(location[0]) if location else "config"
    kind, at = str(location[0]), location[1]
    if len(location) == 2:
        return "", f"{kind} {at + 1}"
    return port_at(kind, at, raw[kind][at]) + ": ", str(location[2])


def port_at(kind: str, at: int, table: Mapping[str, Any]) -> str:
    """As faults begin: by its name or, if it has none, by its number."""
    name = table.get("name" if kind == "guest" else "interface")
    return f"{kind} {_show(name)}" if isinstance(name, str) else f"{kind} {at + 1}"


def _show(value: object) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int):
        return str(value)
    shown = repr(value) if not isinstance(value, str) else '"' + value.encode("unicode_escape").decode() + '"'
    return shown if len(shown) <= 120 else shown[:117] + "..."


def _bare(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]{1,64}", key) else _show(key)


def _suggest(location: tuple[int | str, ...], key: str) -> str:
    tables: dict[object, type[BaseModel]] = {"guest": GuestConfig, "netdev": NetdevConfig}
    model = Config if len(location) == 1 else tables[location[0]]
    known = [field.alias or name for name, field in model.model_fields.items()]
    close = difflib.get_close_matches(key, known, 1)
    return f', did you mean "{close[0]}"?' if close else f"; known are {', '.join(known)}"


def _relations(raw: Raw) -> Iterator[str]:
    """Faults between values. Read from raw, so that they are told together with those of single values."""
    guests, netdevs = _tables(raw, "guest"), _tables(raw, "netdev")
    if not guests and not raw.get("guest"):
        yield "guest: none given; add one with --guest NAME,socket=PATH or [[guest]]"
    if len(guests) + len(netdevs) > MAX_PORTS:
        yield f"guest, netdev: {len(guests) + len(netdevs)} ports: at most {MAX_PORTS} are possible"
    for where, table in guests:
        if table.get("socket") is None and table.get("fd") is None:
            yield f"{where}: socket: is missing"
        if table.get("socket") is not None and table.get("fd") is not None:
            yield f"{where}: fd = {_show(table['fd'])}: excludes socket"
        listens = table.get("fd") is None and table.get("client") in (None, False, "false", "no", "off")
        for key in ("group", "mode"):
            if table.get(key) is not None and not listens:
                yield f"{where}: {key} = {_show(table[key])}: needs a socket that we make, not client or fd"
        if table.get("mac") is None and table.get("check_source") in (True, "true", "yes", "on"):
            yield f"{where}: check_source = true: needs mac"
        unchecked = table.get("mac") is None or table.get("check_source") in (False, "false", "no", "off")
        if table.get("ips") and unchecked:
            yield f"{where}: ips = {_show(table['ips'])}: needs mac, and its check"
        if table.get("socket") is not None and table["socket"] == raw.get("control", limits.CONTROL):
            yield f"{where}: socket = {_show(table['socket'])}: is the control socket"
    yield from _duplicates(guests, "socket")
    yield from _duplicates(guests, "fd")
    yield from _duplicates([(where, {"mac": mac}) for where, table in guests for mac in _macs(table)], "mac")
    names = [(where, {"name": table.get("name", table.get("interface"))}) for where, table in guests + netdevs]
    yield from _duplicates(names, "name")
    yield from _counts(raw)
    yield from _memory(raw, [table for _, table in guests])


def _macs(table: Raw) -> Sequence[object]:
    """As they are spelt, each alone."""
    macs = table.get("mac")
    if isinstance(macs, str):
        return macs.split("+")
    return macs if isinstance(macs, list) else []


def _memory(raw: Raw, guests: Sequence[Raw]) -> Iterator[str]:
    try:
        default = parse_size(raw.get("max_memory", limits.MAX_MEMORY))
        total = sum(parse_size(table.get("max_memory", default)) for table in guests)
    except ValueError:
        return  # already a fault of its own
    if total > ADDRESS_SPACE:
        yield f"max_memory: {total >> 30} GiB for all guests together: at most {ADDRESS_SPACE >> 30} GiB are possible"


def _counts(raw: Raw) -> Iterator[str]:
    try:
        cpus = len(parse_cpus(raw["cpus"])) if raw.get("cpus") is not None else 0
        workers = int(raw["workers"]) if raw.get("workers") is not None else cpus
    except (ValueError, TypeError):
        return  # already a fault of its own
    if cpus and workers != cpus:
        yield f"cpus = {_show(raw['cpus'])}: names {cpus} CPUs for {workers} workers; each worker needs one"
    elif cpus > MAX_WORKERS:
        yield f"cpus = {_show(raw['cpus'])}: at most {MAX_WORKERS} workers are possible"


def _tables(raw: Raw, kind: str) -> list[tuple[str, Raw]]:
    tables = raw.get(kind, [])
    if not isinstance(tables, list):
        return []
    return [(port_at(kind, at, table), table) for at, table in enumerate(tables) if isinstance(table, dict)]


def _duplicates(tables: Sequence[tuple[str, Raw]], key: str) -> Iterator[str]:
    seen: dict[str, str] = {}
    for where, table in tables:
        value = table.get(key)
        if not isinstance(value, str | int):
            continue
        same = str(value).lower() if key == "mac" else str(value)
        if same in seen:
            yield f"{where}: {key} = {_show(value)}: is also that of {seen[same]}"
        else:
            seen[same] = where
