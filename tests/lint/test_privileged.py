"""What takes a capability to serve an interface is done in one place, by a closed list of operations."""

import ast
import re
from pathlib import Path

import pytest

from xdpnet.netdev import privileged

PRODUCT = Path(privileged.__file__).parent.parent
LIST = {"netdev/privileged.py"}
# What the list is made of, by the end of its name, with who may use it.
MADE_OF = {
    "GroupSocket": LIST,
    "bpf_xdp_link": LIST,
    "bpf_xdp_load_frags": {"bpf/loader.py"},
    "ethtool.set_features": LIST,  # pyroute2's
    "loader.load": LIST,
    "port.open_queue": LIST,
    "port.prepare": LIST,
}


def annotations(tree: ast.AST) -> set[int]:
    """The nodes that only say of what type something is."""
    of = [getattr(node, name, None) for node in ast.walk(tree) for name in ("annotation", "returns")]
    return {id(node) for each in of if each is not None for node in ast.walk(each)}


def users(name: str) -> set[str]:
    """Product files that name it, but where it is defined, imported or a type."""
    found = set()
    for path in PRODUCT.rglob("*.py"):
        tree = ast.parse(path.read_text())
        types = annotations(tree)
        for node in ast.walk(tree):
            named = isinstance(node, ast.Attribute | ast.Name) and id(node) not in types
            if named and re.search(rf"(^|\.){re.escape(name)}$", ast.unparse(node)):
                found.add(str(path.relative_to(PRODUCT)))
    return found


@pytest.mark.parametrize("name", MADE_OF)
def test_what_takes_a_capability_is_called_by_the_closed_list_alone(name: str) -> None:
    assert users(name) == MADE_OF[name]


def test_the_closed_list_is_the_one_that_its_text_has_with_the_capability_of_each() -> None:
    listed = re.findall(r"^ {4}(\w+)\(\) +(CAP_\w+)", privileged.__doc__ or "", re.MULTILINE)
    assert sorted(name for name, _ in listed) == privileged.__all__
    assert all(callable(getattr(privileged, name)) for name in privileged.__all__)
