"""Who may know whom in xdpnet/, as its README draws it: a lint."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

PRODUCT = Path(__file__).parents[2] / "xdpnet"


@dataclass(frozen=True)
class Place:
    """floor: 0 is the lowest; room: 0 is the last of a line, what the others of it know."""

    floor: int
    line: str
    room: int

    def may_know(self, other: "Place") -> bool:
        return other.floor < self.floor or (other.line == self.line and other.room < self.room)


def drawn(text: str) -> dict[str, Place]:
    """The drawing under "Floors", by module."""
    (drawing,) = re.findall(r"^## Floors\n.*?^```\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    places: dict[str, Place] = {}
    for floor, lines in enumerate(reversed(re.split(r"^-+\n", drawing, flags=re.MULTILINE))):
        for line in lines.splitlines():
            package, _, rooms = line.rpartition(":")
            for room, names in enumerate(reversed(rooms.split(">"))):
                for name in names.split():
                    module = f"{package}.{name}".removeprefix(".").removesuffix(".__init__")
                    if module in places:
                        raise ValueError(f"{module} is drawn twice")
                    places[module] = Place(floor, line, room)
    return places


def modules() -> dict[str, ast.Module]:
    """By name, without that of the product; packages that say nothing are none."""
    found = {}
    for path in sorted(PRODUCT.rglob("*.py")):
        tree = ast.parse(path.read_text())
        if path.name == "__init__.py" and not any(isinstance(node, ast.Import | ast.ImportFrom) for node in tree.body):
            continue
        found[".".join(path.relative_to(PRODUCT).with_suffix("").parts).removesuffix(".__init__")] = tree
    return found


def imports(tree: ast.Module, known: Mapping[str, object]) -> Iterator[tuple[str, int]]:
    """Modules of the product that it imports, wherever it does, and the lines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        for name in names:
            of_product = name.removeprefix("xdpnet.")
            module = of_product if of_product in known else of_product.rpartition(".")[0]
            if name.startswith("xdpnet.") and module in known:
                yield module, node.lineno


def faults(trees: Mapping[str, ast.Module], places: Mapping[str, Place]) -> list[str]:
    return [
        f"xdpnet.{module}, line {line}: imports {other}"
        for module, tree in trees.items()
        for other, line in imports(tree, trees)
        if not places[module].may_know(places[other])
    ]


@pytest.fixture(scope="module")
def places() -> dict[str, Place]:
    return drawn((PRODUCT / "README.md").read_text())


def test_every_module_has_its_place_and_every_place_is_a_module(places: dict[str, Place]) -> None:
    assert sorted(places) == sorted(modules())


def test_nobody_imports_from_a_floor_above_or_from_beside(places: dict[str, Place]) -> None:
    assert not faults(modules(), places)


@pytest.mark.parametrize(
    ("module", "line"),
    [
        ("limits", "from xdpnet import core"),
        ("core", "import xdpnet.config"),
        ("virtq.device", "from xdpnet.virtq.session import Session"),
        ("netdev.fitness", "from xdpnet.netdev.group import GroupSocket"),
        ("netdev.port", "from xdpnet.virtq import device"),
        ("reports", "def read():\n    from xdpnet.daemon import Daemon"),
    ],
)
def test_an_import_upwards_or_beside_is_found(places: dict[str, Place], module: str, line: str) -> None:
    found = faults(modules() | {module: ast.parse(line)}, places)
    assert len(found) == 1
    assert found[0].startswith(f"xdpnet.{module}, line ")


def test_a_drawing_that_has_a_module_twice_is_refused() -> None:
    with pytest.raises(ValueError, match="errors is drawn twice"):
        drawn("## Floors\n```\nerrors\n-----\nlimits\nerrors\n```\n")
