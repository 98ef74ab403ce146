"""Target: the configuration. Of whatever a file or flags say there is a Config, or a ConfigError that can be shown."""

import tomllib

import atheris

with atheris.instrument_imports(include=["xdpnet"]):
    from tests.fuzz.programs import Input, fuzz
    from xdpnet.config import Config, GuestConfig, NetdevConfig, merge, parse, parse_flag
    from xdpnet.errors import ConfigError

VALUES = (
    "1", '"web"', '"/run/a.sock"', '"52:54:00:00:00:01"', "true", "[]", "-1", "2.5", '""', "{}", '"10.0.0.1,fd::1"',
    '"127.0.0.1:1"', "256", '"0-3"', "[0, 1]", '"auto"', '"1G"', "9223372036854775807", '"[::1]:9"', "nan", '"0600"',
    "1979-05-27", '["10.0.0.1"]', '"\\u0000"', "[[1]]", '"on"',
)  # fmt: skip


def keys(model: type) -> list[str]:
    return [field.alias or name for name, field in model.model_fields.items()]  # type: ignore[attr-defined]


TABLES = (("", keys(Config)), ("[[guest]]", keys(GuestConfig)), ("[[netdev]]", keys(NetdevConfig)))


def value(given: Input) -> str:
    how = given.take()
    if how < 200:
        return VALUES[how % len(VALUES)]
    return repr(given.take_bytes(given.take() % 24).decode("latin-1")) if how & 1 else str(given.take(8))


def check(data: bytes) -> None:
    given = Input(data)
    lines: list[str] = []
    flags: dict[str, list[dict[str, object]]] = {"guest": [], "netdev": []}
    faults: list[str] = []
    for _ in range(32):
        if not given.left:
            break
        table, known = TABLES[given.take() % 3]
        if table:
            lines.append(table)
        lines += [f"{known[given.take() % len(known)]} = {value(given)}" for _ in range(given.take() % 6)]
        if given.take() > 224:
            lines.append(given.take_bytes(16).decode("latin-1"))
        if given.take() > 192:
            kind = ("guest", "name"), ("netdev", "interface")
            which, key = kind[given.take() & 1]
            words = given.take_bytes(given.take() % 40).decode("latin-1")
            flags[which].append(parse_flag(words, key, faults))
    try:
        raw = tomllib.loads("\n".join(lines))
    except (tomllib.TOMLDecodeError, RecursionError):
        raw = {}
    try:
        config = parse(merge(raw, {kind: tables for kind, tables in flags.items() if tables}), faults)
    except ConfigError as error:
        str(error).encode()
    else:
        if not config.guests or config.worker_count < 1:
            raise RuntimeError("a configuration that is none")


if __name__ == "__main__":
    fuzz(check)
