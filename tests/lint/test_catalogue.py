"""The catalogue of hostile inputs is whole: every row is there, and every row has tests that exist, or a reason."""

import ast
import functools
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
GROUPS = {"A": 44, "B": 48, "C": 34, "D": 40, "E": 24}
ROW = re.compile(r"\| ([A-Z]\d+) \| (.+) \| (.+) \| (.*) \|")
TEST = re.compile(r"`(\w+/test_\w+\.py)::(test_\w+)`")
REASON = re.compile(r"no test: \w.{10,}")

rows = {row[1]: row[4] for row in map(ROW.fullmatch, (TESTS / "HOSTILE.md").read_text().splitlines()) if row}


@functools.cache
def functions_of(path: Path) -> set[str]:
    """Functions at a module's top, or in its classes, that pytest collects."""
    module = ast.parse(path.read_text())
    bodies = [module.body, *(node.body for node in module.body if isinstance(node, ast.ClassDef))]
    functions = (node for body in bodies for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))
    return {function.name for function in functions if function.name.startswith("test_")}


def test_every_row_is_there_once_and_in_its_place() -> None:
    assert list(rows) == [f"{group}{number}" for group, most in GROUPS.items() for number in range(1, most + 1)]
    text = (TESTS / "HOSTILE.md").read_text()
    assert len(re.findall(r"^\| [A-Z]\d", text, flags=re.MULTILINE)) == len(rows)


@pytest.mark.parametrize("row", rows)
def test_a_row_is_shown_by_tests_that_exist_or_says_why_not(row: str) -> None:
    shown = TEST.findall(rows[row])
    assert shown or REASON.fullmatch(rows[row])
    assert "TODO" not in rows[row]
    for name, function in shown:
        assert function in functions_of(TESTS / name), f"{name}::{function}"
    assert rows[row].count("`") == 2 * len(shown)
