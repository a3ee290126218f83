"""Functions of TRL and verl, executed from their installed files: their modules import far more than these need.

requirements/peers.txt pins the packages, and is installed without their dependencies.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import math
import re
from pathlib import Path
from types import CodeType, SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

PINS = Path(__file__).parent.parent / "requirements" / "peers.txt"


def load(package: str, path: str, *names: str, **known) -> SimpleNamespace:
    """Functions ("f", or "Class.f" as a plain function) and constants of a file, in one namespace with ``known``.

    Decorators other than torch's are dropped, annotations are not evaluated. Skips where the pinned version is absent.
    """
    tree = _parsed(package, path)
    nodes = [_find(tree.body, name.split(".")) for name in names]
    for node in nodes:
        if isinstance(node, ast.FunctionDef):
            node.decorator_list = [use for use in node.decorator_list if ast.unparse(use).startswith("torch.")]
    scope = {"torch": torch, "F": F, "math": math, **known}
    exec(_compiled(nodes, path), scope)
    return SimpleNamespace(**scope)


def run_part(package: str, path: str, name: str, text: str, **known) -> SimpleNamespace:
    """Executes the innermost ``if`` of a function that holds this text, with ``known`` for its variables; returns them.

    For what is computed in the middle of a long function.
    """
    parts = ast.walk(_find(_parsed(package, path).body, name.split(".")))
    node = [part for part in parts if isinstance(part, ast.If) and text in ast.unparse(part)][-1]
    scope = {"torch": torch, "math": math, **known}
    exec(_compiled([node], path), scope)
    return SimpleNamespace(**scope)


class Accelerator:
    """Of one process."""

    num_processes = 1
    device = "cpu"
    sync_gradients = False

    def gather(self, x: torch.Tensor) -> torch.Tensor:
        return x

    gather_for_metrics = gather

    def reduce(self, x: torch.Tensor, reduction: str) -> torch.Tensor:
        return x

    def pad_across_processes(self, x: torch.Tensor, dim: int, pad_index: float) -> torch.Tensor:
        return x


def _parsed(package: str, path: str) -> ast.Module:
    wanted = dict(re.findall(r"^(\w+)==([\w.]+)", PINS.read_text(), re.MULTILINE))[package]
    try:
        version = importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        version = "no version"
    if version != wanted:
        pytest.skip(f"{package} {wanted} is compared with, {version} is installed (requirements/peers.txt)")
    return ast.parse(Path(importlib.util.find_spec(package).submodule_search_locations[0], path).read_text())


def _find(body: list[ast.stmt], name: list[str]) -> ast.stmt:
    def names(node: ast.stmt) -> list[str]:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        return [getattr(node, "name", None), *(getattr(target, "id", None) for target in targets)]

    found = next(node for node in body if name[0] in names(node))
    return _find(found.body, name[1:]) if name[1:] else found


def _compiled(nodes: list[ast.stmt], path: str) -> CodeType:
    import __future__

    return compile(ast.Module(nodes, []), path, "exec", __future__.annotations.compiler_flag, dont_inherit=True)
