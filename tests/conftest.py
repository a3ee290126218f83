from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # reference, pairwise, interpreter

BACKENDS = {"cpu": ["cpu", "triton", "torch"], "cuda": ["cuda", "triton", "torch"]}


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="run everything, also the tests marked slow")
    parser.addoption("--device", default="cpu", choices=list(BACKENDS), help="cuda: the contract, on a GPU")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("--device") == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # before the kernels are imported: Triton's interpreter runs them
        if importlib.util.find_spec("triton"):
            import interpreter

            interpreter.correct_bfloat16()
    config.addinivalue_line("markers", "slow: left out unless --slow is given")
    for arithmetic in ("invalid value", "overflow", "divide by zero", "All-NaN slice"):  # which kernels must stand
        config.addinivalue_line(
            "filterwarnings", f"ignore:{arithmetic} encountered:RuntimeWarning:triton.runtime.interpreter"
        )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if not config.getoption("--slow"):
        skipped = [item for item in items if item.get_closest_marker("slow") or _is_slow_case(item)]
        config.hook.pytest_deselected(items=skipped)
        items[:] = [item for item in items if item not in set(skipped)]


def _is_slow_case(item: pytest.Item) -> bool:
    """A module may say by a function ``is_slow`` which cases of its tests are slow."""
    is_slow = getattr(item.module, "is_slow", None)
    return is_slow is not None and hasattr(item, "callspec") and is_slow(item.callspec.params)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def device(request: pytest.FixtureRequest) -> Iterator[torch.device]:
    """Where tensors are made unless a test says otherwise."""
    before = torch.get_default_device()
    torch.set_default_device(request.config.getoption("--device"))
    yield torch.get_default_device()
    torch.set_default_device(before)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "backend" in metafunc.fixturenames:
        device = metafunc.config.getoption("--device")
        metafunc.parametrize("backend", BACKENDS[device], indirect=True)


@pytest.fixture
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every backend of the device in turn, forced for the test."""
    monkeypatch.setenv("LOGITLESS_BACKEND", request.param)
    return request.param
