"""Options of the suite, and what becomes of its measurements: one table, and one file unless ``--quick``."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks import cases, operations, report
from benchmarks.environment import ROOT, environment, result_path

RECORDS, OPERATION_RECORDS = pytest.StashKey[list[dict]](), pytest.StashKey[list[dict]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--quick", action="store_true", help="small shapes: see that everything runs; write no results")
    parser.addoption("--every", action="store_true", help="also divergences that cost like one of the default cases")
    parser.addoption("--rounds", type=int, default=9, help="rounds after the warm-up (default: %(default)s)")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    config.stash[RECORDS], config.stash[OPERATION_RECORDS] = [], []
    config.option.benchmark_quiet = True  # our table has the ratios, and says what was reached


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "case" in metafunc.fixturenames:
        every = metafunc.config.getoption("--every") or metafunc.config.getoption("--quick")
        chosen = cases.CASES + cases.MORE_CASES if every else cases.CASES
        metafunc.parametrize("case", chosen, ids=lambda case: case.name)
    if "operation" in metafunc.fixturenames:
        metafunc.parametrize("operation", operations.OPERATIONS, ids=lambda operation: operation.name)


@pytest.fixture
def quick(request: pytest.FixtureRequest) -> bool:
    return request.config.getoption("--quick")


@pytest.fixture
def size(quick: bool) -> cases.Size:
    return cases.QUICK if quick else cases.FULL


@pytest.fixture
def rounds(request: pytest.FixtureRequest, quick: bool) -> int:
    return 2 if quick else request.config.getoption("--rounds")


@pytest.fixture
def records(request: pytest.FixtureRequest) -> list[dict]:
    """What :func:`pytest_terminal_summary` reports."""
    return request.config.stash[RECORDS]


@pytest.fixture
def operation_records(request: pytest.FixtureRequest) -> list[dict]:
    return request.config.stash[OPERATION_RECORDS]


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    records, of_operations = config.stash[RECORDS], config.stash[OPERATION_RECORDS]
    if not records and not of_operations:
        return
    quick = config.getoption("--quick")
    size = cases.QUICK if quick else cases.FULL
    result = {**environment(), "size": dataclasses.asdict(size), "cases": records, "operations": of_operations}
    terminalreporter.write_line("\n" + report.table(result))
    if quick:
        terminalreporter.write_line("--quick: these shapes measure nothing; no file is written.")
    elif exitstatus == 0:
        path = result_path(result)
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(result, indent=1) + "\n")
        terminalreporter.write_line(f"written to {path.relative_to(ROOT)}")
