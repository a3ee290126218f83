"""docs/methods.md: every row is whole and names what exists and the tests that hold it; nothing public is left out."""

from __future__ import annotations

import ast
import functools
import inspect
import re
from pathlib import Path

import pytest
import torch

import logitless as ll
from logitless.divergences import TABLE
from logitless.logits import TAILS
from logitless.losses.preference.terms import LOSSES

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "methods.md"
COLUMNS = ["method", "formula", "source", "function", "inputs", "products", "test"]
MODULES = ("distillation", "policy", "preference", "contrastive", "classification", "marginal", "decoding", "transport")
EXPORTED = {
    f"ll.{module}.{name}": getattr(getattr(ll, module), name)
    for module in MODULES
    for name in getattr(ll, module).__all__
}


def rows() -> list[dict[str, str]]:
    """Of all tables; a ``\\|`` is no border. Their headers are checked on the way."""
    found, header = [], None
    for line in PAGE.read_text().splitlines():
        cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] if line.startswith("|") else None
        if cells is None:
            header = None
        elif header is None:
            assert cells == COLUMNS, line
            header = cells
        elif set(line) != set("|-"):
            assert len(cells) == len(COLUMNS), line
            found.append(dict(zip(COLUMNS, cells)))
    return found


ROWS = rows()
FUNCTIONS = [row["function"].strip("`") for row in ROWS]


@functools.cache
def mentioned(file: str, test: str) -> frozenset[str]:
    """Names, attributes and strings in a test function and in whatever of its module it refers to."""
    defined = {}
    for node in ast.parse((ROOT / file).read_text()).body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            defined[node.name] = node
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names = [x.id for x in ast.walk(node) if isinstance(x, ast.Name) and isinstance(x.ctx, ast.Store)]
            defined |= dict.fromkeys(names, node)
    assert isinstance(defined.get(test), ast.FunctionDef), f"{file} has no {test}"
    words, waiting = set(), [test]
    while waiting:
        node = defined.pop(waiting.pop(), ast.Module([], []))
        for part in ast.walk(node):
            if isinstance(part, (ast.Name, ast.arg)):
                waiting.append(part.id if isinstance(part, ast.Name) else part.arg)
                words.add(waiting[-1])
            elif isinstance(part, ast.Attribute):
                words.add(part.attr)
            elif isinstance(part, ast.Constant) and isinstance(part.value, str):
                words.add(part.value)
    return frozenset(words)


@pytest.mark.parametrize("row", ROWS, ids=FUNCTIONS)
def test_row(row: dict[str, str]) -> None:
    assert all(row.values()), "an empty cell"
    path, key = re.fullmatch(r'`ll\.([\w.]+)(?:\((?:\w+=)?"(\w+)".*\))?`', row["function"]).groups()
    assert callable(functools.reduce(getattr, path.split("."), ll))
    tests = re.findall(r"`(tests/\w+\.py)::(test_\w+)`", row["test"])
    assert tests and row["test"] == ", ".join(f"`{file}::{test}`" for file, test in tests)
    for file, test in tests:
        assert (key or path.split(".")[-1]) in mentioned(file, test)


def test_nothing_is_doubled() -> None:
    for names in (FUNCTIONS, [row["method"] for row in ROWS]):
        assert sorted(names) == sorted(set(names))


def test_nothing_public_is_left_out() -> None:
    """Functions, that is: the classes are parts that these compose, and some have a row of their own."""
    assert {name for name, public in EXPORTED.items() if inspect.isfunction(public)} <= set(FUNCTIONS)
    assert {name for name in FUNCTIONS if name.count(".") > 1 and "(" not in name} <= set(EXPORTED)


def test_divergences() -> None:
    """Their calls are valid, and state the defaults."""
    calls = {row["method"]: row["function"].strip("`") for row in ROWS if "ll.Divergence(" in row["function"]}
    assert list(calls) == list(TABLE)
    for name, call in calls.items():
        term = eval(call, {"ll": ll})
        assert term.name == name and term.parameters == ll.Divergence(name).parameters


def test_losses_of_pairs() -> None:
    """Their calls are valid, and none is left out but egpo's."""
    calls = [name for name in FUNCTIONS if name.startswith("ll.preference.dpo(")]
    losses = [eval(call, {"ll": ll}).terms[0][1].loss for call in calls]
    assert set(losses) == set(LOSSES) - {"squared"}


def test_example() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)
    names = {"hidden": torch.randn(3, 4), "weight": torch.randn(7, 4), "targets": torch.tensor([1, 0, 6])}
    names |= {"teacher_hidden": torch.randn(3, 5), "teacher_weight": torch.randn(7, 5), "weights": torch.rand(3)}
    exec(code, names)
    result = names["result"]
    total = result.terms["cross_entropy"] + 0.5 * result.terms["dkd"] + 0.1 * result.terms["reverse_kl"]
    torch.testing.assert_close(result.loss, total)


def test_tails() -> None:
    assert {f'll.TopKLogits(tail="{tail}")' for tail in TAILS} <= set(FUNCTIONS)
