"""The planner, a pure function: budgets are kept, the cost model orders what it should, choices are as stated."""

from __future__ import annotations

from dataclasses import replace

import pytest

from logitless.engine.plan import MIB, Shape, Side, applicable, cpu, gpu, plan
from pairwise import sample

LLAMA = Side(4096, 2, hidden_grad=True, weight_grad=True)
TRAINED = Shape(8192, 128256, LLAMA)
FACTORS = {
    "tokens": [0, 1, 1000, 16384, 300000],
    "vocab": [1, 49152, 151936, 262144],
    "hidden": [0, 576, 4096],
    "itemsize": [2, 4],
    "teacher": [None, 576, 5120],
    "hidden_grad": [False, True],
    "weight_grad": [False, True],
    "per_row": [False, True],
    "whole_rows": [False, True],
    "scratch": [0, 1, 6],
    "workspace": [None, 4 * MIB, 64 * MIB, 1024 * MIB],
    "machine": [cpu(2), cpu(64), gpu()],
}


def shape_of(case: dict) -> Shape:
    student = Side(case["hidden"], case["itemsize"], True, case["hidden_grad"], case["weight_grad"])
    teacher = None if case["teacher"] is None else Side(case["teacher"], case["itemsize"])
    return Shape(
        case["tokens"],
        case["vocab"],
        student,
        teacher,
        per_row=case["per_row"],
        whole_rows=case["whole_rows"] or case["scratch"] > 1,
        scratch=case["scratch"],
    )


@pytest.mark.parametrize("case", sample(FACTORS, lambda case: True, 150), ids=str)
def test_budgets_are_kept_and_tiles_cover(case: dict) -> None:
    shape = shape_of(case)
    for strategy in ("auto", *applicable(shape)):
        try:
            found = plan(shape, case["machine"], strategy, case["workspace"])
        except ValueError as error:
            assert "workspace" in str(error) and case["workspace"] is not None
            continue
        if case["workspace"] is not None:
            assert found.workspace <= case["workspace"]
        assert found.strategy in applicable(shape)
        assert 0 <= found.stash_rows <= shape.tokens
        for tiling in (found.forward, found.backward):
            if tiling is not None:
                rows = [i for block, _ in tiling.row_blocks(0, shape.tokens) for i in (block.start, block.stop)]
                columns = [i for block in tiling.column_blocks(shape.vocab) for i in (block.start, block.stop)]
                assert rows[:1] + rows[-1:] == ([0, shape.tokens] if shape.tokens else [])
                assert columns[0] == 0 and columns[-1] == shape.vocab
                assert rows[1:-1:2] == rows[2::2] and columns[1:-1:2] == columns[2::2]
        if found.strategy in ("eager", "frozen") or shape.whole_rows:
            assert found.forward.columns == shape.vocab


def test_products() -> None:
    """The table of strategies, in units of G."""
    two_heads = replace(TRAINED, teacher=Side(4096, 2))
    frozen = replace(TRAINED, student=Side(4096, 2, hidden_grad=True))
    no_grad = replace(TRAINED, student=Side(4096, 2))

    def products(shape, strategy):
        return plan(shape, gpu(), strategy, 1024 * MIB).products

    assert products(TRAINED, "eager") == 3 and products(two_heads, "eager") == 4
    assert products(replace(TRAINED, per_row=True), "recompute") == 4
    assert products(replace(two_heads, per_row=True), "recompute") == 6
    assert products(replace(frozen, per_row=True), "frozen") == 2
    assert products(replace(no_grad, per_row=True), "forward") == 1
    stash = plan(replace(TRAINED, per_row=True), gpu(), "stash", 1024 * MIB)
    assert stash.products == pytest.approx(4 - stash.stash_rows / TRAINED.tokens) and stash.stash_rows > 1000
    both = replace(two_heads, teacher=replace(LLAMA))
    assert products(both, "eager") == 6  # the teacher's gradient: its dH and dW


def test_automatic_choices() -> None:
    per_row = replace(TRAINED, per_row=True)
    assert plan(TRAINED, gpu()).strategy == "eager"
    assert plan(replace(per_row, student=Side(4096, 2, hidden_grad=True)), gpu()).strategy == "frozen"
    assert plan(replace(per_row, student=Side(4096, 2, hidden_grad=True), one_scalar=False), gpu()).strategy != "frozen"
    assert plan(replace(per_row, student=Side(4096, 2)), gpu()).strategy == "forward"
    assert plan(per_row, gpu()).strategy in ("recompute", "stash")
    assert plan(replace(per_row, tokens=64), cpu(2)).strategy == "stash"  # all logits fit, and keeping them saves 1G


def test_default_workspace_is_the_smallest_near_the_best() -> None:
    for machine, cap in ((cpu(2), 256 * MIB), (gpu(), 1024 * MIB)):
        found = plan(TRAINED, machine)
        best = plan(TRAINED, machine, workspace=cap)
        assert found.workspace <= cap and found.seconds <= 1.03 * best.seconds
        smaller = plan(TRAINED, machine, workspace=found.workspace // 4)
        assert smaller.seconds > 1.03 * best.seconds


def test_more_memory_is_never_slower() -> None:
    for strategy in ("eager", "recompute"):
        times = [plan(TRAINED, gpu(), strategy, size * MIB).seconds for size in (32, 64, 128, 256, 512, 1024)]
        assert times == sorted(times, reverse=True)


def test_accumulators_are_listed_for_low_precision() -> None:
    found = plan(TRAINED, gpu(), "eager", 256 * MIB)
    assert found.accumulators == 4 * 4096 * (8192 + 128256)
    sliced = plan(replace(TRAINED, per_row=True), gpu(), "recompute", 1024 * MIB)
    assert sliced.accumulators == 4 * 4096 * 8192  # every slice of dW is complete when it is written
    assert plan(replace(TRAINED, student=replace(LLAMA, itemsize=4)), gpu(), "eager", 256 * MIB).accumulators == 0


def test_a_row_beyond_the_cap_still_gets_a_plan() -> None:
    machine = replace(cpu(2), cap=4 * MIB)
    assert plan(Shape(100, 4_000_000, Side(64, 4, True, True, True)), machine).forward.rows == 1
