"""Who may know whom in c/, as its README draws it: a lint."""

import re
import shutil
import subprocess
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import pytest

from tests.lint.test_floors import Place, drawn

PRODUCT = Path(__file__).parents[2] / "c"

pytestmark = pytest.mark.skipif(not shutil.which("gcc"), reason="needs gcc")


def compiled(tree: Path, *arguments: str | Path, into: Path) -> str:
    command = ["gcc", "-std=gnu11", f"-I{tree}", *arguments]
    return subprocess.run(command, cwd=into, check=True, capture_output=True, text=True).stdout


def module(tree: Path, path: str | Path) -> str:
    """A header and the source of its name are one."""
    return ".".join(Path(path).relative_to(tree).with_suffix("").parts)


def files(tree: Path, *endings: str) -> list[Path]:
    return sorted(path for ending in endings for path in tree.rglob(f"*{ending}"))


def included(tree: Path, into: Path) -> dict[str, set[str]]:
    """What each module's files include, and what these do."""
    found: defaultdict[str, set[str]] = defaultdict(set)
    rules = compiled(tree, "-MM", *files(tree, ".c", ".h"), into=into).replace("\\\n", " ")
    for rule in rules.splitlines():
        path, *others = rule.partition(":")[2].split()
        found[module(tree, path)] |= {module(tree, other) for other in others}
    return found


def symbols(tree: Path, sources: Sequence[Path], into: Path) -> tuple[dict[str, str], dict[str, set[str]]]:
    """Whose each function and each datum is, and which each module uses."""
    compiled(tree, "-c", "-O0", *sources, into=into)
    defined: dict[str, str] = {}
    used: dict[str, set[str]] = {}
    for path in sources:
        told = subprocess.run(["nm", "-g", into / f"{path.stem}.o"], check=True, capture_output=True, text=True).stdout
        used[module(tree, path)] = set(re.findall(r"^ +U (\w+)$", told, re.MULTILINE))
        defined |= dict.fromkeys(re.findall(r"^\w+ [A-TV-Z] (\w+)$", told, re.MULTILINE), module(tree, path))
    return defined, used


def called(defined: dict[str, str], used: dict[str, set[str]]) -> dict[str, set[str]]:
    """Whom each module uses, wherever that is declared: it may be in a header of another's."""
    return {name: {defined[symbol] for symbol in wanted if symbol in defined} for name, wanted in used.items()}


def faults(known: dict[str, set[str]], places: dict[str, Place]) -> list[str]:
    return [
        f"{name} knows {other}"
        for name, others in sorted(known.items())
        for other in sorted(others)
        if other != name and not places[name].may_know(places[other])
    ]


@pytest.fixture(scope="module")
def core(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, str], dict[str, set[str]]]:
    return symbols(PRODUCT, files(PRODUCT, ".c"), tmp_path_factory.mktemp("objects"))


@pytest.fixture(scope="module")
def places() -> dict[str, Place]:
    return drawn((PRODUCT / "README.md").read_text())


def test_every_part_of_the_core_has_its_place_and_every_place_is_a_part(places: dict[str, Place]) -> None:
    assert sorted(places) == sorted({module(PRODUCT, path) for path in files(PRODUCT, ".c", ".h")})


def test_no_part_of_the_core_includes_from_a_floor_above_or_from_beside(
    places: dict[str, Place], tmp_path: Path
) -> None:
    assert not faults(included(PRODUCT, tmp_path), places)


def test_no_part_of_the_core_calls_a_floor_above_or_beside(
    places: dict[str, Place], core: tuple[dict[str, str], dict[str, set[str]]]
) -> None:
    assert not faults(called(*core), places)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    return Path(shutil.copytree(PRODUCT, tmp_path / "c"))


@pytest.mark.parametrize(
    ("path", "other"),
    [
        ("base.h", "events.h"),
        ("ring/vring.c", "xdp/xsk.h"),
        ("frame/gso.h", "ring/vring.h"),
        ("worker/worker.c", "bridge/port.h"),
        ("bridge/forward.c", "port/guest.h"),
        ("port/netdev_tx.c", "port/guest.h"),
    ],
)
def test_an_include_upwards_or_beside_is_found(
    places: dict[str, Place], tree: Path, tmp_path: Path, path: str, other: str
) -> None:
    file = tree / path
    file.write_text(file.read_text() + f'#include "{other}"\n')
    assert f"{module(tree, file)} knows {module(tree, tree / other)}" in faults(included(tree, tmp_path), places)


def test_a_call_upwards_of_what_is_declared_elsewhere_is_found(
    places: dict[str, Place], core: tuple[dict[str, str], dict[str, set[str]]], tree: Path, tmp_path: Path
) -> None:
    path = tree / "ring/split.c"
    with path.open("a") as file:
        file.write("void xsk_recall(void *x);\nvoid split_recall(void *x)\n{\n\txsk_recall(x);\n}\n")
    _, used = symbols(tree, [path], tmp_path)
    assert faults(called(core[0], used), places) == ["ring.split knows xdp.xsk"]
