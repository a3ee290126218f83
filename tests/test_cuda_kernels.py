"""The CUDA kernels on the CPU (tests/cuda_host) against the torch backend, with the bar of test_row_kernels.py.

Devices with little shared memory make short rows take the ways of long ones: one block, clusters of several sizes, and
two passes in tiles. Without nvcc's headers or a compiler all but nvcc's own report is skipped.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

import cuda_build
from logitless.backends import BASIS, WANTED, Chunk, Combination, Normalizers, cuda
from logitless.backends import torch as specification
from logitless.divergences import SUMS
from logitless.engine import statistics as algebra
from logitless.ops.tokens import cuda as tokens
from logitless.ops.tokens import recipe as recipes
from logitless.ops.tokens.kernels import Call
from logitless.ops.tokens.recipe import Recipe
from test_row_kernels import (
    INFINITY,
    JSD,
    ROW_SUMS,
    check,
    check_row_sum,
    double,
    filtered,
    near,
    normalizers_of,
    shaped,
    strided,
)

MISSING = cuda_build.missing()
needs_host = pytest.mark.skipif(MISSING is not None, reason=str(MISSING))

# Of the largest launch of each kind: processors, bytes of shared memory of a block and of a processor, largest cluster.
# The kernels want 1.5 KB beside the rows, and half of a processor if they can have it.
DEVICES = {
    "block": dict(processors=2, shared_per_block=227 << 10, shared_per_processor=228 << 10, most_cluster=8),
    "cluster": dict(processors=8, shared_per_block=5000, shared_per_processor=10240, most_cluster=8),
    "cluster16": dict(processors=16, shared_per_block=3000, shared_per_processor=8048, most_cluster=16),
    "tiles": dict(processors=2, shared_per_block=3000, shared_per_processor=8048, most_cluster=0),
}
LONG = 2051
COLUMNS = [1, 3, 6, 17, 1000, LONG]  # less than a quad, ragged ends, several quads a thread, several blocks
ROWS = 24
TYPES = [torch.float32, torch.bfloat16, torch.float16]
FIELDS = sorted(WANTED)


@pytest.fixture(autouse=True)
def _on_one_thread_of_the_cpu() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with torch.device("cpu"):
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def library() -> Path:
    if MISSING:
        pytest.skip(MISSING)
    built = os.environ.get("LOGITLESS_CUDA_HOST")  # of the sanitized run, below
    return Path(built) if built else cuda_build.build()


@pytest.fixture(scope="session")
def host(library):
    return cuda_build.load(library)


@pytest.fixture
def use(host, monkeypatch):
    """use(name): the cuda backend runs on that device of DEVICES."""

    def chosen(name: str) -> None:
        cuda_build.serve(monkeypatch, host, list(DEVICES).index(name), **DEVICES[name])
        host.launches()

    yield chosen
    host.drop_barrier(0)


@pytest.fixture(params=DEVICES)
def way(request, use) -> str:
    use(request.param)
    return request.param


# ------------------------------------------------------------------------------------------------------------ helpers


def make(columns: int, *, bias: bool = False, softcap: float | None = None, dtype=torch.float32, rows=ROWS) -> Chunk:
    scale, temperature = 1.3, torch.rand(rows) + 0.7
    return Chunk(
        z=strided(2 * torch.randn(rows, columns)).to(dtype)
        if dtype != torch.float32
        else strided(2 * torch.randn(rows, columns)),
        bias=torch.randn(columns) if bias else None,
        inner=None if softcap is None else scale / softcap,
        outer=(scale if softcap is None else softcap) / temperature,
    )


def pair_of(columns: int, **options) -> tuple[Chunk, Chunk]:
    student = make(columns, **options)
    return student, near(student, bias=not options.get("bias", False))


def elsewhere(values: Tensor, offset: int) -> Tensor:
    """The same values at other addresses: rows begin `offset` elements after an aligned one, and so does every row."""
    rows, columns = values.shape
    storage = torch.full((rows, columns + 12 & ~3), float("nan"), dtype=values.dtype)
    storage[:, offset : offset + columns] = values
    return storage[:, offset : offset + columns]


def targets_of(columns: int, rows: int = ROWS) -> Tensor:
    y = torch.randint(0, columns, (rows,))
    y[::5], y[1::7], y[2::7] = -1, columns, columns + 3
    y[rows // 2 :][:2] = torch.tensor([columns - 1, 0])[: rows - rows // 2]
    return y


def combination_of(
    names, columns: int, *, rows: int = ROWS, ones: bool = False, given_rows: bool = False
) -> Combination:
    """Random coefficients of some of BASIS and "q_lse", and a divergence for each "jsd"."""
    return Combination(
        coefficients={name: torch.randn(rows) for name in (*BASIS, "q_lse") if name in names},
        targets=targets_of(columns, rows) if "one_hot" in names else None,
        weights=None if ones else torch.rand(columns),
        generic=tuple((JSD, (torch.rand(rows),), torch.randn(rows)) for name in names if name.startswith("jsd")),
        rows=strided(torch.randn(rows, columns)) if given_rows else None,
    )


def check_statistics(student, teacher, *, targets=None, weights=None, wanted=WANTED) -> dict[str, Tensor]:
    given = {"targets": targets, "weights": weights, "wanted": frozenset(wanted)}
    ours = cuda.statistics(student, teacher, **given)
    compare_statistics(ours, student, teacher, given)
    return ours


def compare_statistics(ours, student, teacher, given) -> None:
    theirs = specification.statistics(single(student), single(teacher), **given)
    exact = specification.statistics(exactly(student), exactly(teacher), **double(given))
    assert {name for name in ours if isinstance(name, str)} == theirs.keys()
    for name, value in theirs.items():
        assert ours[name].dtype == value.dtype and ours[name].shape == value.shape
        if name == "argmax" and student.inner is None:  # tanh may round two to one
            assert torch.equal(ours[name], value)
        elif name != "argmax":
            check(name, ours[name], value, exact[name])


def single(chunk: Chunk | None) -> Chunk | None:
    return chunk and replace(chunk, z=chunk.z.float())


def exactly(chunk: Chunk | None) -> Chunk | None:
    return double(single(chunk))


def gradient_of(backend, student, teacher, normalizers, combination, dtype=None) -> Tensor:
    out = torch.full(student.z.shape, float("nan"), dtype=dtype or student.z.dtype)
    backend.gradient(student, teacher, normalizers, combination, out)
    return out


def fused_of(student, teacher, combination, *, targets=None, wanted=WANTED, out: Tensor | None = None):
    """The cuda backend's: (gradient, accumulators)."""
    out = torch.full(student.z.shape, float("nan")) if out is None else out
    given = {"targets": targets, "weights": combination.weights, "wanted": frozenset(wanted)}
    found = cuda.fused(student, teacher, combination=combination, out=out, **given)
    return out, found


def fused_by(student: Chunk, teacher: Chunk | None, combination: Combination) -> tuple[Tensor, list]:
    """The same from the torch backend, in the chunks' type: (gradient, (value, slope) of the divergences)."""
    dtype = student.z.dtype
    accumulators = specification.statistics(
        student, teacher, targets=None, weights=combination.weights, wanted=WANTED - {"argmax"}
    )
    s = algebra.finish(accumulators)
    normalizers = Normalizers(
        *(s[name].to(dtype) for name in ("max", "log_sum")),
        *(s[name].to(dtype) if teacher else None for name in ("teacher_max", "teacher_log_sum")),
    )
    opened = algebra.Coefficients({name: c.double() for name, c in combination.coefficients.items()})
    sums = []
    for k, (definition, parameters, c) in enumerate(combination.generic):
        sums.append(specification.generic(student, teacher, normalizers, definition, parameters))
        s[(k, "jsd"), "value"], s[(k, "jsd"), "slope"] = sums[-1]
        opened[k, "jsd"] = c.double()
    closed = algebra.close(opened, s)
    coefficients = {name: c.to(dtype) for name, c in closed.items() if isinstance(name, str)}
    out = torch.empty_like(student.z)
    specification.gradient(student, teacher, normalizers, replace(combination, coefficients=coefficients), out)
    return out, sums


def check_fused(student, teacher, combination, **options) -> Tensor:
    ours, found = fused_of(student, teacher, combination, **options)
    theirs, theirs_sums = fused_by(single(student), single(teacher), combination)
    exact, exact_sums = fused_by(exactly(student), exactly(teacher), double(combination))
    check("gradient", ours, theirs.to(ours.dtype), exact)
    for k, pair in enumerate(zip(theirs_sums, exact_sums)):
        for name, theirs, exact in zip(("value", "slope"), *pair):
            check(name, found[k, name], theirs, exact)
    given = {
        "targets": options.get("targets"),
        "weights": combination.weights,
        "wanted": frozenset(options.get("wanted", WANTED)),
    }
    compare_statistics(found, student if options.get("out") is None else student, teacher, given)
    return ours


# ------------------------------------------------------------------------------------------------ the ways of a row


@needs_host
@pytest.mark.parametrize(
    ("name", "paired", "expected"),
    [
        ("block", True, {"single": 1, "clusters": 0, "largest_cluster": 1}),
        ("cluster", False, {"single": 0, "clusters": 1, "largest_cluster": 4}),
        ("cluster", True, {"single": 0, "clusters": 1, "largest_cluster": 8}),
        ("cluster16", True, {"single": 0, "clusters": 1, "largest_cluster": 16}),
        ("tiles", False, {"single": 2, "clusters": 0, "largest_cluster": 1}),
        ("tiles", True, {"single": 3, "clusters": 0, "largest_cluster": 1}),
    ],
)
def test_how_a_row_is_shared_out(host, use, name, paired, expected):
    """One launch where a row fits, else statistics, sums of the divergence, gradient."""
    use(name)
    student, teacher = pair_of(LONG, rows=5)
    fused_of(student, teacher if paired else None, combination_of({"q", "jsd"} if paired else {"q"}, LONG, rows=5))
    launches = host.launches()
    assert {key: launches[key] for key in expected} == expected
    assert launches["threads"] <= (320 if paired and name != "tiles" else 384)


# ---------------------------------------------------------------------------------------------------------- statistics


@needs_host
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize(("bias", "softcap"), [(False, None), (True, 20.0)], ids=["", "bias-softcap"])
@pytest.mark.parametrize("paired", [False, True], ids=["", "teacher"])
def test_statistics(way, columns, bias, softcap, paired):
    student, teacher = pair_of(columns, bias=bias, softcap=softcap)
    teacher = teacher if paired else None
    check_statistics(student, teacher, targets=targets_of(columns), weights=torch.rand(columns))
    check_statistics(student, teacher)


@needs_host
@pytest.mark.parametrize("wanted", [(), *((name,) for name in FIELDS)], ids="+".join)
def test_each_statistic_alone(use, wanted):
    use("cluster")
    student, teacher = pair_of(1000)
    found = check_statistics(student, teacher, weights=torch.rand(1000), wanted=wanted)
    assert "target" not in found
    check_statistics(student, None, targets=targets_of(1000), wanted=wanted)


@needs_host
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_an_offset(way, offset):
    student, teacher = pair_of(LONG)
    student, teacher = replace(student, z=strided(student.z + offset)), replace(teacher, z=strided(teacher.z - offset))
    check_statistics(student, teacher, targets=targets_of(LONG))
    check_fused(student, teacher, combination_of({"one_hot", "q", "p", "q_log_ratio", "jsd"}, LONG))


@needs_host
@pytest.mark.parametrize("sign", [1, -1], ids=["rising", "falling"])
def test_a_maximum_that_keeps_moving(use, sign):
    """Every tile of a rising row raises the maximum, by so much that what came before fades."""
    use("tiles")
    student, teacher = pair_of(LONG)
    z = student.z + sign * torch.linspace(-60, 60, LONG)
    for t in (z, -z):
        given = {"targets": targets_of(LONG), "weights": torch.rand(LONG)}
        check_statistics(replace(student, z=strided(z)), replace(teacher, z=strided(t)), **given)


@needs_host
def test_the_first_of_equal_maxima(way):
    student = make(LONG)
    student.z[:, 7] = student.z[:, 1500] = student.z[:, LONG - 1] = 50.0
    assert bool((check_statistics(student, None, wanted={"argmax"})["argmax"] == 7).all())


# ----------------------------------------------------------------------------------------- divergences and gradients

ELEMENTS = [frozenset({name}) for name in (*BASIS, "jsd")]
MIXTURES = [frozenset({"one_hot", "q"}), frozenset({*BASIS, "jsd"}), frozenset({*BASIS, "jsd", "jsd 2", "jsd 3"})]
OF_TEACHER = {"p", "q_log_ratio", "jsd"}


@needs_host
@pytest.mark.parametrize("columns", [17, LONG])
@pytest.mark.parametrize("shape", ["near", "apart", "masked student", "masked teacher", "filtered"])
@pytest.mark.parametrize("row_sum", ROW_SUMS, ids=str)
def test_every_row_sum(use, row_sum, shape, columns):
    use("block")
    student, teacher = pair_of(columns, bias=True, softcap=20.0 if shape == "near" else None)
    check_row_sum(cuda, row_sum, *shaped(student, teacher, shape))


@needs_host
@pytest.mark.parametrize("row_sum", [r for r in ROW_SUMS if SUMS[r[0]].family == "generic"], ids=str)
def test_every_divergence_fused(use, row_sum):
    """One term leaves its slope where the teacher was, two are evaluated once more for the gradient."""
    use("cluster")
    name, *numbers = row_sum
    student, teacher = pair_of(LONG)
    parameters = tuple(torch.full((ROWS,), float(number)) for number in numbers)
    term = (SUMS[name], parameters, torch.randn(ROWS))
    for terms in ((term,), (term, term)):
        check_fused(student, teacher, replace(combination_of({"q"}, LONG), generic=terms))


@needs_host
@pytest.mark.parametrize("columns", [3, 1000, LONG])
@pytest.mark.parametrize("names", [*ELEMENTS, *MIXTURES], ids=lambda names: "+".join(sorted(names)))
def test_gradient(use, columns, names):
    use("block")
    student, teacher = pair_of(columns, bias=True, softcap=20.0)
    teacher = teacher if names & OF_TEACHER else None
    for ones in (False, True):
        combination = combination_of(names, columns, ones=ones, given_rows=ones)
        given = (student, teacher, normalizers_of(student, teacher), combination)
        check(
            "gradient",
            gradient_of(cuda, *given),
            gradient_of(specification, *given),
            gradient_of(specification, *double(given)),
        )


@needs_host
@pytest.mark.parametrize("columns", [3, 1000, LONG])
@pytest.mark.parametrize(
    "names", [*ELEMENTS, frozenset({"q_lse"}), *MIXTURES], ids=lambda names: "+".join(sorted(names))
)
def test_fused(way, columns, names):
    student, teacher = pair_of(columns, bias=True)
    teacher = teacher if names & OF_TEACHER else None
    check_fused(student, teacher, combination_of(names, columns), targets=targets_of(columns))


@needs_host
@pytest.mark.parametrize("columns", [3, 1000, LONG])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
def test_filtered(way, columns, softcap):
    """Columns below a row's floor do not exist; their gradients are exactly 0, whatever is given there."""
    student, teacher = pair_of(columns, bias=True, softcap=softcap)
    student = filtered(student)
    dropped = specification.raw(student) < student.floor[:, None]
    combination = combination_of({*BASIS, "jsd"}, columns, given_rows=True)
    combination.rows[dropped & (torch.rand(dropped.shape) < 0.5)] = float("nan")
    for other in (teacher, filtered(teacher)):
        check_statistics(student, other, targets=targets_of(columns), weights=0.1 + torch.rand(columns))
        given = (student, other, normalizers_of(student, other), combination)
        ours = gradient_of(cuda, *given)
        check("gradient", ours, gradient_of(specification, *given), gradient_of(specification, *double(given)))
        assert bool((ours[dropped] == 0).all())
    alone = combination_of({"q", "q_log_q", "q_squared", "q_lse"}, columns)
    assert bool((check_fused(student, None, alone, targets=targets_of(columns), wanted=())[dropped] == 0).all())
    of_pair = combination_of({"q", "q_log_ratio", "jsd"}, columns)
    check_fused(student, teacher, replace(of_pair, weights=None), wanted=())


@needs_host
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
def test_fused_with_all_else(way, softcap):
    """Weights of one, given rows, a softcap, and nothing wanted beside what the balance of q reads."""
    student, teacher = pair_of(LONG, softcap=softcap)
    combination = combination_of({*BASIS, "q_lse", "jsd"}, LONG, ones=True, given_rows=True)
    check_fused(student, teacher, combination)
    ours, found = fused_of(student, teacher, combination, wanted=())
    assert found.keys() == {"max", "sum", "teacher_max", "teacher_sum", (0, "value"), (0, "slope")}
    assert torch.equal(ours, fused_of(student, teacher, combination)[0])


@needs_host
def test_closed_gradients_sum_to_zero_and_those_of_a_perfect_student_vanish(way):
    student, _ = pair_of(LONG)
    twin = replace(student, z=elsewhere(student.z, 2))
    out, found = fused_of(student, twin, Combination({"p": torch.full((ROWS,), -1.0)}))
    assert bool((out == 0).all())
    assert bool((found["forward"].abs() <= 1e-6 * found["sum"]).all())
    out, _ = fused_of(student, None, combination_of({"weights", "q_log_q", "q_squared"}, LONG))
    assert bool(((out / student.outer[:, None]).double().sum(-1).abs() <= 1e-4 * out.abs().double().sum(-1)).all())


@needs_host
@pytest.mark.parametrize("columns", [6, 1000, LONG])
@pytest.mark.parametrize("dtype", TYPES[1:], ids=str)
def test_low_precision(way, columns, dtype):
    """Gradients are the float32 ones rounded once; logits are widened first."""
    student, teacher = pair_of(columns)
    combination = combination_of(MIXTURES[1], columns)
    expected, _ = fused_of(student, teacher, combination)
    out, _ = fused_of(student, teacher, combination, out=elsewhere(torch.zeros(ROWS, columns, dtype=dtype), 1))
    assert torch.equal(out, expected.to(dtype))
    normalizers = normalizers_of(student, teacher)
    closed = replace(combination_of(MIXTURES[1], columns), rows=None)
    expected = gradient_of(cuda, student, teacher, normalizers, closed)
    assert torch.equal(gradient_of(cuda, student, teacher, normalizers, closed, dtype), expected.to(dtype))

    low = replace(student, z=elsewhere(student.z.to(dtype), 3)), replace(teacher, z=elsewhere(teacher.z.to(dtype), 1))
    wide = [replace(chunk, z=chunk.z.float()) for chunk in low]
    given = {"targets": targets_of(columns), "weights": None, "wanted": WANTED}
    low_found, wide_found = cuda.statistics(*low, **given), cuda.statistics(*wide, **given)
    for name, value in wide_found.items():
        torch.testing.assert_close(low_found[name], value, rtol=1e-6, atol=1e-6)
    check_fused(*low, combination)
    check_statistics(*low)


@needs_host
@pytest.mark.parametrize("columns", [1, 5, 18, 1000, LONG])
def test_every_alignment(use, columns):
    """Each tensor begins where it likes; nothing beside a row is written, and nothing beside it is read (it is NaN)."""
    use("cluster")
    rows = 6
    student, teacher = pair_of(columns, rows=rows)
    combination = combination_of({"one_hot", "weights", "p", "jsd"}, columns, rows=rows, given_rows=True)
    expected, _ = fused_of(student, teacher, combination)
    normalizers = normalizers_of(student, teacher)
    expected_pass = gradient_of(cuda, student, teacher, normalizers, combination)
    for k in range(8):
        moved = replace(student, z=elsewhere(student.z, k % 4)), replace(teacher, z=elsewhere(teacher.z, k // 2))
        canvas = torch.full((2 * rows, columns + 9), 7.0)
        out = canvas[::2, k : k + columns]
        fused_of(*moved, combination, out=out)
        torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-5)
        cuda.gradient(*moved, normalizers, combination, out)
        torch.testing.assert_close(out, expected_pass, rtol=1e-6, atol=1e-7)
        out.fill_(7.0)
        assert bool((canvas == 7.0).all())


@needs_host
def test_in_place(way):
    student, teacher = pair_of(LONG, bias=True)
    combination = combination_of(MIXTURES[2], LONG)
    expected, statistics = fused_of(student, teacher, combination)
    again, found = fused_of(student, teacher, combination)
    assert torch.equal(again, expected), "same inputs, same bits"
    storage, before = student.z._base, student.z._base.clone()
    out, found = fused_of(student, teacher, combination, out=student.z)
    assert torch.equal(out, expected) and all(torch.equal(found[name], value) for name, value in statistics.items())
    assert bool(storage[:, :3].isnan().all() and storage[:, 3 + LONG :].isnan().all() and before[0, 0].isnan())


# ------------------------------------------------------------------------------------------------ dead rows, masks, NaN


@needs_host
def test_rows_that_are_not_live_get_exact_zeros(way):
    student, teacher = pair_of(LONG)
    student.z[::3] = float("nan")
    live = torch.arange(ROWS) % 3 != 0
    combination = combination_of(MIXTURES[1], LONG)
    ours, _ = fused_of(student, teacher, replace(combination, live=live))
    assert torch.equal(ours[~live], torch.zeros(int((~live).sum()), LONG))
    everything, _ = fused_of(student, teacher, combination)
    assert torch.equal(ours[live], everything[live]) and bool(everything[~live].isnan().all())
    normalizers = normalizers_of(student, teacher)
    ours = gradient_of(cuda, student, teacher, normalizers, replace(combination, live=live))
    assert bool((ours[~live] == 0).all() and ours[live].isfinite().all())


def masks(columns: int) -> dict[str, tuple[Tensor, Tensor]]:
    some, others = torch.rand(2, ROWS, columns) < 0.3
    some[::4, : columns // 2] = True
    some[:, -1] = others[:, -1] = False
    none = torch.zeros_like(some)
    return {"student": (some, none), "teacher": (none, some), "both": (some, some), "different": (some, others)}


@needs_host
@pytest.mark.parametrize("which", ["student", "teacher", "both", "different"])
def test_masked_columns(way, which):
    student, teacher = pair_of(LONG)
    hidden_s, hidden_t = masks(LONG)[which]
    student = replace(student, z=strided(student.z.masked_fill(hidden_s, -INFINITY)))
    teacher = replace(teacher, z=strided(teacher.z.masked_fill(hidden_t, -INFINITY)))
    check_statistics(student, teacher, targets=targets_of(LONG), wanted=WANTED)
    names = {"q", "one_hot", "q_log_q", "q_squared", "p", "jsd"}
    names = names | {"q_log_ratio"} if which in ("student", "both") else names  # else infinite: reverse KL is
    ours = check_fused(student, teacher, combination_of(names - {"one_hot"}, LONG))
    assert bool((ours[hidden_s & hidden_t] == 0).all())


@needs_host
def test_a_whole_row_masked(way):
    student, teacher = pair_of(LONG)
    student.z[0] = teacher.z[1] = student.z[2] = teacher.z[2] = -INFINITY
    found = check_statistics(student, teacher, wanted=WANTED - {"weighted"})
    assert found["max"][0] == -INFINITY and found["sum"][0] == 0 and found["argmax"][0] == 0
    assert found["teacher_max"][1] == -INFINITY and found["teacher_sum"][1] == 0
    ours, _ = fused_of(student, teacher, combination_of({"q", "p"}, LONG))
    assert bool(ours[:3].isnan().all() and ours[3:].isfinite().all())


@needs_host
@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_a_bad_row_stays_alone(way, bad):
    student, teacher = pair_of(LONG)
    z = student.z.clone()
    z[3, 700] = bad
    broken = replace(student, z=strided(z))
    others = torch.arange(ROWS) != 3
    combination = combination_of(MIXTURES[1], LONG)
    (clean, clean_found), (dirty, dirty_found) = (fused_of(s, teacher, combination) for s in (student, broken))
    assert torch.equal(clean[others], dirty[others]) and bool(dirty[3].isnan().all())
    for name in clean_found.keys() - {"teacher_max", "teacher_sum", "argmax", "mass"}:
        assert torch.equal(clean_found[name][others], dirty_found[name][others])
        assert bool(dirty_found[name][3].isnan()), name


# ------------------------------------------------------------------------------------------------ sizes, orders, errors


@needs_host
@pytest.mark.parametrize(("rows", "columns"), [(0, 5), (3, 0), (1, LONG), (100, 5)])
def test_shapes(way, rows, columns):
    student, teacher = pair_of(columns, rows=rows)
    found = cuda.statistics(student, teacher, targets=torch.zeros(rows, dtype=torch.int64), weights=None, wanted=WANTED)
    assert all(value.shape == (rows,) for value in found.values())
    if columns:
        check_statistics(student, teacher)
        combination = combination_of(MIXTURES[1], columns, rows=rows)
        assert bool(fused_of(student, teacher, combination)[0].isfinite().all())
    else:
        assert found["max"].tolist() == [-INFINITY] * rows and found["sum"].tolist() == [0] * rows
    out, _ = fused_of(student, teacher, Combination({"q": torch.rand(rows)}))
    assert out.shape == (rows, columns)


@needs_host
def test_lengths_in_turn_and_the_current_device(host, use):
    """What one length asks of the driver holds for the others; launches leave the current device as it was."""
    for name in ("cluster", "block", "cluster16"):
        use(name)
        for columns in (LONG, 1000, 33, LONG, 33):
            student, teacher = pair_of(columns, rows=3)
            fused_of(student, teacher, combination_of({"q", "p"}, columns, rows=3))
            check_statistics(student, teacher)
    assert host.current_device() == 0


@needs_host
@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_the_order_of_threads_changes_no_bit(way, monkeypatch, order):
    student, teacher = pair_of(LONG, bias=True, rows=20)
    combination = combination_of(MIXTURES[2], LONG, rows=20)
    normalizers = normalizers_of(student, teacher)

    def everything() -> list[Tensor]:
        out, found = fused_of(student, teacher, combination, targets=targets)
        sums = cuda.generic(student, teacher, normalizers, JSD, (torch.full((20,), 0.3),))
        alone = cuda.statistics(student, teacher, targets=targets, weights=None, wanted=WANTED)
        gradient = gradient_of(
            cuda, student, teacher, normalizers, replace(combination, coefficients={"q": student.outer})
        )
        return [out, *found.values(), *sums, *alone.values(), gradient]

    targets = targets_of(LONG, 20)
    expected = everything()
    monkeypatch.setenv("CUDA_HOST_ORDER", order)
    assert all(torch.equal(a, b) for a, b in zip(expected, everything(), strict=True))


BARRIERS = {  # of csrc/cuda: the device on which it is reached, and the call
    1: ("block", "fused"),
    2: ("cluster", "fused"),
    3: ("cluster", "fused"),
    4: ("block", "fused"),
    5: ("tiles", "statistics"),
    6: ("cluster", "fused"),
    7: ("cluster", "fused"),
    8: ("cluster", "fused"),
    9: ("block", "generic"),
    10: ("tiles", "fused"),
    11: ("block", "gradient"),
    12: ("block", "gradient"),
    13: ("block", "log_sum"),
    **dict.fromkeys((14, 15, 16), ("block", "tokens")),
}


@needs_host
def test_the_barriers_have_a_test():
    source = "".join(
        (cuda_build.ROOT / "csrc/cuda" / name).read_text()
        for name in ("block.cuh", "fused.cu", "passes.cu", "tokens.cu")
    )
    assert {int(number) for number in re.findall(r"barrier<(\d+)>\(", source)} == BARRIERS.keys()


@needs_host
@pytest.mark.parametrize("number", BARRIERS)
def test_no_barrier_can_be_left_out(host, use, monkeypatch, number):
    """Some order of threads gives other results without it."""
    where, call = BARRIERS[number]
    use(where)
    student, teacher = pair_of(LONG, rows=40)
    combination = combination_of({"q", "q_log_q", "jsd", "jsd 2"}, LONG, rows=40)
    normalizers = normalizers_of(student, teacher)

    def results() -> list[Tensor]:
        if call == "fused":
            out, found = fused_of(student, teacher, combination)
            return [out, *found.values()]
        if call == "statistics":
            return list(cuda.statistics(student, teacher, targets=None, weights=None, wanted=WANTED).values())
        if call == "tokens":
            others = [2 * x - 1 for x in tokens_of(**MANY_TOKENS)["inputs"]]
            tokens_by_kernel(**MANY_TOKENS, inputs=others)  # other numbers in memory that is used again
            return tokens_by_kernel(**MANY_TOKENS)
        if call == "generic":
            return list(cuda.generic(student, teacher, normalizers, JSD, combination.generic[0][1]))
        if call == "log_sum":
            half = torch.full((40,), 0.5)
            return list(cuda.generic(student, teacher, normalizers, SUMS["log_sum"], (half, half)))
        return [gradient_of(cuda, student, teacher, normalizers, combination)]

    expected = results()
    host.drop_barrier(number)
    changed = 0
    for order in range(6):
        monkeypatch.setenv("CUDA_HOST_ORDER", str(order))
        changed += not all(torch.equal(a, b) for a, b in zip(expected, results()))
    assert changed


@needs_host
def test_what_cannot_be_launched_is_said(use, host):
    use("block")
    student, teacher = pair_of(17, rows=2)
    many = combination_of({f"jsd {k}" for k in range(17)}, 17, rows=2)
    with pytest.raises(ValueError, match="at most 16"):
        fused_of(student, teacher, many)
    log_sum = (SUMS["log_sum"], (student.outer,) * 3, student.outer)
    with pytest.raises(RuntimeError, match="CUDA"):
        fused_of(student, teacher, replace(combination_of({"q"}, 17, rows=2), generic=(log_sum,)))
    host.device(processors=0, shared_per_block=5000, shared_per_processor=5000, clusters=False, most_cluster=0)
    with pytest.raises(RuntimeError, match="CUDA"):
        fused_of(*pair_of(19, rows=2), combination_of({"q"}, 19, rows=2))


@needs_host
@pytest.mark.slow
def test_address_sanitizer():
    """A small set of this file in a process that watches every access."""
    library = cuda_build.build("-fsanitize=address -fno-omit-frame-pointer")
    runtime = [
        subprocess.run(
            [cuda_build.compiler(), f"-print-file-name={name}"], check=True, text=True, stdout=subprocess.PIPE
        ).stdout.strip()
        for name in ("libasan.so", "libstdc++.so")
    ]
    environment = os.environ | {
        "LD_PRELOAD": ":".join(runtime),
        "ASAN_OPTIONS": "detect_leaks=0:detect_stack_use_after_return=0",
        "LOGITLESS_CUDA_HOST": str(library),
    }
    chosen = "test_every_alignment or test_shapes or test_low_precision or test_in_place or test_tokens"
    subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-s", "-p", "no:cacheprovider", __file__, "-k", chosen],
        env=environment,
        check=True,
    )


# ------------------------------------------------------------------ token objectives, beside test_token_kernels.py

MANY_TOKENS = {  # several blocks, pieces of every kind: see csrc/cuda/tokens.cu
    "recipe": Recipe(
        inputs=("logprob", "old_logprob", "advantages", "ref_logprob", "weights", "entropy", "rollout_logprob"),
        gradients=(0, 5),
        old=1,
        advantages=2,
        ratio=recipes.Ratio("sequence-mean"),
        surrogate=recipes.Surrogate("clip", (0.2, 0.3, INFINITY, INFINITY)),
        penalties=(recipes.Penalty("k3", 0.1, other=3), recipes.Penalty("input", -0.2, other=5)),
        factors=(recipes.Factor("rejection_k3", 1, 6, "max", high=0.8),),
        weights=4,
        entropy=5,
        denominator="sequences",
    ),
    "lengths": (1, 0, 700, 130, 3, 2500, 5, 900),
    "behind": 7,
}


def tokens_of(recipe: Recipe, lengths: tuple[int, ...], behind: int = 0) -> dict[str, object]:
    generator = torch.Generator().manual_seed(0)
    count = sum(lengths) + behind
    logprob = -3 * torch.rand(count, generator=generator)
    inputs = [logprob] + [logprob + 0.3 * torch.randn(count, generator=generator) for _ in recipe.inputs[1:]]
    return {
        "inputs": inputs,
        "mask": torch.rand(count, generator=generator) > 0.3,
        "offsets": torch.tensor([0, *lengths]).cumsum(0),
    }


def tokens_by_kernel(recipe: Recipe, lengths: tuple[int, ...], behind: int = 0, **changed) -> list[Tensor]:
    given = tokens_of(recipe, lengths, behind) | changed
    call = Call(recipe, tuple(given["inputs"]), given["mask"], given["offsets"], None)
    results, state = tokens.forward(call, True)
    return [results, *tokens.backward(recipe, state, torch.tensor(3.0))]


@needs_host
@pytest.mark.parametrize("order", ["1", "2", "3"])
def test_tokens_in_any_order_of_threads_and_blocks(use, monkeypatch, order):
    """Whichever block comes last adds up all of them, and leaves the ticket for the next call."""
    use("block")
    expected = tokens_by_kernel(**MANY_TOKENS)
    monkeypatch.setenv("CUDA_HOST_ORDER", order)
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(expected, tokens_by_kernel(**MANY_TOKENS), strict=True))
        assert tokens._ticket_of(torch.device("cpu"), 0) == 0


def test_tickets(monkeypatch):
    """One for each stream, and one for each captured call."""
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    first, again, other = [tokens._ticket(torch.device("cpu"), stream) for stream in (1, 1, 2)]
    assert first is again and first.data_ptr() != other.data_ptr()
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    captured = [tokens._ticket(torch.device("cpu"), 1) for _ in range(2)]
    assert len({ticket.data_ptr() for ticket in (first, other, *captured)}) == 4
    assert not any(captured)


@needs_host
def test_tokens_at_every_alignment(use):
    """Nothing beside the inputs is read that matters: it is NaN."""
    use("block")
    given = tokens_of(**MANY_TOKENS)
    expected = tokens_by_kernel(**MANY_TOKENS)
    for k in range(1, 5):
        inputs = [elsewhere(x[None], (k + i) % 4)[0] for i, x in enumerate(given["inputs"])]
        mask = elsewhere(given["mask"][None].to(torch.float32), k % 4).bool()[0]
        for a, b in zip(expected, tokens_by_kernel(**MANY_TOKENS, inputs=inputs, mask=mask), strict=True):
            assert torch.equal(a, b)


@needs_host
@pytest.mark.parametrize("whole", [False, True], ids=["masked", "unmasked"])
@pytest.mark.parametrize(
    ("changes", "launches"),
    [
        ({}, (2, 2)),
        ({"ratio": recipes.Ratio(), "factors": ()}, (2, 1)),  # sequences are counted: they need no sums but of the mask
        ({"ratio": recipes.Ratio(), "factors": (), "denominator": "tokens"}, (1, 1)),
    ],
    ids=["sums", "counts", "neither"],
)
def test_launches_of_tokens(host, use, changes, launches, whole):
    use("block")
    recipe = replace(MANY_TOKENS["recipe"], **changes)
    given = {"mask": None} if whole else {}
    host.launches()
    tokens_by_kernel(recipe, MANY_TOKENS["lengths"], **given)
    assert host.launches()["single"] == launches[whole] + 1


# -------------------------------------------------------------------------------------------------------- nvcc's report


INSTANCES = {  # of kernels, by file, and the most registers: 128, so that two blocks of 256 share a processor
    "cuda-fused": (8, 128),
    "cuda-passes": (7, 128),
    "cuda-tokens": (3, 128),
    "cuda-doubly_stochastic": (10, 128),
    "cuda-sinkhorn": (9, 168),  # three blocks of 128; those of 256 threads 80
    "cuda-l1": (2, 128),
    "cuda-softmin": (3, 64),
    "cuda-iteration": (3, 128),  # one block of 512 threads
}


def test_registers_and_spills():
    """What ptxas said when the extension was built: no spills, and registers for two blocks on a processor."""
    reports = sorted((cuda_build.ROOT / "build").glob("*/cuda-*.o.report"))
    if not reports:
        pytest.skip("the extension was not built here with nvcc")
    found = {}
    for report in reports:
        for entry in report.read_text().split("Compiling entry function")[1:]:
            kernel, arch = re.search(r"'(\S+)' for '(sm_\d+)'", entry).groups()
            spills = sum(int(n) for n in re.findall(r"(\d+) bytes (?:stack frame|spill)", entry))
            registers = int(re.search(r"Used (\d+) registers", entry).group(1))
            found[report.parent.name, report.name.split(".")[0], kernel, arch] = spills, registers
    instances = Counter(file for _, file, _ in {(folder, file, kernel) for folder, file, kernel, _ in found})
    folders = len({report.parent for report in reports})
    assert {file: count // folders for file, count in instances.items()} == {f: n for f, (n, _) in INSTANCES.items()}
    for (_, file, kernel, arch), (spills, registers) in found.items():
        one_row = file in ("cuda-fused", "cuda-passes") and "Lb1E" not in kernel and "generic" not in kernel
        assert spills == 0 and registers <= (80 if one_row else INSTANCES[file][1]), (kernel, arch, spills, registers)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc")
def test_rows_are_read_and_written_as_vectors(tmp_path):
    """In PTX, where vectors are final: every kernel that writes gradients has both of its stores of a whole quad."""
    source, ptx = cuda_build.ROOT / "csrc/cuda/fused.cu", tmp_path / "fused.ptx"
    subprocess.run(["nvcc", "-std=c++17", "-fmad=false", "-arch=sm_90", "-ptx", source, "-o", ptx], check=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == 8
    for kernel in kernels:
        name = kernel[: kernel.index("(")]
        assert "cp.async.cg.shared.global" in kernel and "ld.shared.v4.f32" in kernel
        if "Nothing" not in name:
            assert (
                len(re.findall(r"st\.global\.wb\.v4\.f32" if "IfLb" in name else r"st\.global\.wb\.v2\.u32", kernel))
                == 2
            )
