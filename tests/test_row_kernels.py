"""Row kernels against the torch backend, the contract's executable specification.

Every compiled copy of the C++ ones, and the Triton ones in tiles of several shapes (interpreted where there is no GPU).

The bar is relative. Both backends get the same float32 chunk, the torch backend also gets it in float64, and with the
norm over a result of many rows

    |ours - float64| <= 1.5 |torch float32 - float64| + 2 eps |float64| + tiny

where eps and tiny are those of float32: the second term is for the cases in which torch's error happens to be 0, the
third for results below the smallest normal number, which the kernels take to be 0. Infinities and NaNs must agree.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from logitless.backends import BASIS, WANTED, Chunk, Combination, Normalizers, cpu, cuda, triton
from logitless.backends import torch as specification
from logitless.divergences import SUMS
from logitless.engine import statistics as algebra

ON_GPU = os.environ.get("TRITON_INTERPRET") != "1"  # conftest.py
COPIES = [] if cpu.PROBLEM or ON_GPU else [f"cpu-{copy}" for copy in cpu._C.isas()]
TILES = {"triton-row": (8, 8192, 1), "triton-split": (32, 256, 3)}  # rows, columns, parts of a row
COLUMNS = [1, 3, 17, 512, 1000, 4099]  # around the vector sizes, one whole block, several and a part
JSD = SUMS["jsd"]
ALPHA_BETA = [(0.2, 0.7), (2, -1), (-1, 2), (0, 1), (1, 0), (0.5, -0.5), (-0.5, 0.5), (0, 0), (0.5, 0.5), (-0.1, -0.05)]
LOG_SUM = [(0.5, 0.5), (2, -1), (1, 1), (0, 2), (2, 0), (0.3, 0.7)]
ROW_SUMS = [  # names and parameters
    ("jsd", 0.3),
    ("skew_forward_kl", 0.1),
    ("skew_reverse_kl", 0.1, 0.1),
    ("skew_reverse_kl", 0.1, 0.0),
    ("tvd",),
    ("squared_hellinger",),
    *(("alpha_beta", *numbers) for numbers in ALPHA_BETA),
    *(("log_sum", *numbers) for numbers in LOG_SUM),
]


def is_slow(parameters: dict) -> bool:
    """Cases left to --slow: the interpreter needs a microsecond for an element."""
    tiles, columns = parameters.get("subject", ""), parameters.get("columns", 17)
    return tiles == "triton-row" or (tiles == "triton-split" and columns not in (17, 1000))


EPSILON, TINY = torch.finfo(torch.float32).eps, torch.finfo(torch.float32).tiny
INFINITY = float("inf")


class Kernels:
    """The backend under test, with rows whole."""

    backend = specification

    def statistics(self, *given, **options) -> dict[str, Tensor]:
        found = self.backend.statistics(*given, **options)
        return algebra.join(found) if found["max"].dim() == 2 else found

    def generic(self, *given) -> tuple[Tensor, Tensor]:
        return self.backend.generic(*given)

    def gradient(self, *given) -> None:
        self.backend.gradient(*given)


kernels = Kernels()


SUBJECTS = [*COPIES, *([] if triton.PROBLEM else TILES), *(["cuda"] if ON_GPU and not cuda.PROBLEM else [])]


@pytest.fixture(params=SUBJECTS, autouse=True)
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which kernels serve: "cpu-" and the copy, "triton-" and the tiles, or "cuda"."""
    name, _, which = request.param.partition("-")
    if name == "cpu":
        best = cpu._C.isa()
        request.addfinalizer(lambda: cpu._C.force_isa(best))
        cpu._C.force_isa(which)
        monkeypatch.setattr(kernels, "backend", cpu)
    elif name == "cuda":
        monkeypatch.setattr(kernels, "backend", cuda)
    else:
        rows, columns, parts = TILES[request.param]
        monkeypatch.setattr(kernels, "backend", triton)
        tile(monkeypatch, rows, columns)
        monkeypatch.setattr(triton._kernels.configs, "parts", lambda *_: parts)
    return request.param


def tile(monkeypatch: pytest.MonkeyPatch, rows: int, columns: int) -> None:
    """The tile of the Triton kernels from here on."""
    monkeypatch.setattr(triton, "_tile", lambda *_: triton._kernels.configs.Config(rows, columns, 1))


@pytest.fixture(autouse=True)
def _one_thread() -> Iterator[None]:
    """The tensors are small; threads have a test of their own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ------------------------------------------------------------------------------------------------------------ helpers


def rows_for(columns: int) -> int:
    """Enough rows for the norm of an error not to be a matter of luck."""
    return max(48, 2048 // columns)


def strided(values: Tensor) -> Tensor:
    """The same values with rows further apart than they are long, at odd addresses, between NaNs."""
    rows, columns = values.shape
    storage = torch.full((rows, columns + 5), float("nan"))
    storage[:, 3 : 3 + columns] = values
    return storage[:, 3 : 3 + columns]


def make(columns: int, *, rows: int | None = None, bias: bool = False, softcap: float | None = None) -> Chunk:
    rows = rows_for(columns) if rows is None else rows
    scale, temperature = 1.3, torch.rand(rows) + 0.7
    return Chunk(
        z=strided(2 * torch.randn(rows, columns)),
        bias=torch.randn(columns) if bias else None,
        inner=None if softcap is None else scale / softcap,
        outer=(scale if softcap is None else softcap) / temperature,
    )


def near(student: Chunk, *, bias: bool = False) -> Chunk:
    """A teacher that agrees with the student about as well as one does in training."""
    teacher = make(student.z.shape[1], rows=student.z.shape[0], bias=bias, softcap=None)
    return replace(teacher, z=strided(student.z + 0.3 * teacher.z))


def filtered(chunk: Chunk) -> Chunk:
    """With floors between its columns: under all, in the middle, and under the largest alone."""
    x = specification.raw(chunk).sort(-1).values
    between = torch.cat([torch.full((len(x), 1), -INFINITY), (x[:, :-1] + x[:, 1:]) / 2], -1)
    places = torch.randint(0, x.shape[1], (len(x),))
    places[::3], places[1::3] = x.shape[1] - 1, 0
    return replace(chunk, floor=between.gather(1, places[:, None])[:, 0])


def with_z(chunk: Chunk, z: Tensor) -> Chunk:
    return replace(chunk, z=strided(z))


def double(given):
    """The same in float64: of a tensor, a chunk, normalizers, a combination, or a container of those."""
    if isinstance(given, Tensor):
        return given.double() if given.dtype == torch.float32 else given
    if isinstance(given, (Chunk, Normalizers, Combination)):
        return replace(given, **{name: double(value) for name, value in vars(given).items()})
    if isinstance(given, tuple):
        return tuple(double(value) for value in given)
    if isinstance(given, dict):
        return {name: double(value) for name, value in given.items()}
    return given


def targets_of(columns: int, rows: int | None = None) -> Tensor:
    """Inside the chunk, and outside on both sides: -1, columns, and beyond."""
    rows = rows_for(columns) if rows is None else rows
    y = torch.randint(0, columns, (rows,))
    y[::5], y[1::7], y[2::7] = -1, columns, columns + 3
    y[-1], y[-2] = columns - 1, 0
    return y


def normalizers_of(student: Chunk, teacher: Chunk | None) -> Normalizers:
    found = specification.statistics(double(student), double(teacher), targets=None, weights=None, wanted=frozenset())
    names = {"max": "max", "sum": "log_sum", "teacher_max": "teacher_max", "teacher_sum": "teacher_log_sum"}
    return Normalizers(
        **{
            to: (found[name].log() if name.endswith("sum") else found[name]).float()
            for name, to in names.items()
            if name in found
        }
    )


def check(name: str, ours: Tensor, theirs: Tensor, exact: Tensor) -> None:
    ours, theirs = ours.double(), theirs.double()
    special = ~exact.isfinite()
    torch.testing.assert_close(ours[special], exact[special], rtol=0, atol=0, equal_nan=True, msg=f"{name}: not finite")
    ours, theirs, exact = ours[~special], theirs[~special], exact[~special]
    error, bar = (ours - exact).norm(), (theirs - exact).norm()
    floor = 2 * EPSILON * exact.norm() + TINY * max(1, exact.numel()) ** 0.5
    assert error <= 1.5 * bar + floor, f"{name}: error {error:.3g}, torch's {bar:.3g}, of {exact.norm():.3g}"


def check_statistics(student, teacher, *, targets=None, weights=None, wanted=WANTED) -> dict[str, Tensor]:
    given = {"targets": targets, "weights": weights, "wanted": frozenset(wanted)}
    ours = kernels.statistics(student, teacher, **given)
    theirs = specification.statistics(student, teacher, **given)
    exact = specification.statistics(double(student), double(teacher), **double(given))
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        assert value.dtype == theirs[name].dtype and value.shape == theirs[name].shape
        if name == "argmax":
            check(
                "argmax",
                specification.scaled(double(student)).gather(1, value[:, None])[:, 0],
                theirs["max"],
                exact["max"],
            )
            assert student.inner is not None or torch.equal(value, theirs["argmax"])  # tanh may round two to one
        else:
            check(name, value, theirs[name], exact[name])
    return ours


def gradient_of(backend, student, teacher, normalizers, combination) -> Tensor:
    out = torch.full_like(student.z, float("nan"))
    backend.gradient(student, teacher, normalizers, combination, out)
    return out


def check_gradient(student, teacher, normalizers, combination) -> Tensor:
    given = (student, teacher, normalizers, combination)
    ours = gradient_of(kernels, *given)
    check("gradient", ours, gradient_of(specification, *given), gradient_of(specification, *double(given)))
    return ours


def combination_of(names: frozenset[str], columns: int, *, ones: bool = False, rows: int | None = None) -> Combination:
    """Random coefficients on the given basis elements; "jsd" and "rows" are those outside of BASIS."""
    rows = rows_for(columns) if rows is None else rows
    return Combination(
        coefficients={name: torch.randn(rows) for name in BASIS if name in names},
        targets=targets_of(columns, rows) if "one_hot" in names else None,
        weights=None if ones else torch.rand(columns),
        generic=((JSD, (torch.rand(rows),), torch.randn(rows)),) if "jsd" in names else (),
        rows=strided(torch.randn(rows, columns)) if "rows" in names else None,
    )


# --------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize("paired", [False, True], ids=["", "teacher"])
def test_statistics(columns, bias, softcap, paired):
    student = make(columns, bias=bias, softcap=softcap)
    teacher = near(student, bias=not bias) if paired else None
    for wanted in [(), *((name,) for name in sorted(WANTED)), WANTED]:
        check_statistics(
            student, teacher, targets=targets_of(columns), weights=torch.rand(columns), wanted=frozenset(wanted)
        )
    without_targets = check_statistics(student, teacher, wanted={"weighted"})
    assert "target" not in without_targets


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
def test_filtered_statistics(columns, bias, softcap):
    """Columns below a row's floor do not exist: not for a sum, not for the maximum, and not as a target."""
    student = filtered(make(columns, bias=bias, softcap=softcap))
    given = {"targets": targets_of(columns), "weights": 0.1 + torch.rand(columns)}
    found = check_statistics(student, None, **given)
    rows = torch.arange(len(student.z))
    y = given["targets"]
    below = specification.raw(student)[rows, y.clamp(0, columns - 1)] < student.floor
    assert torch.equal(found["target"] == -INFINITY, below & (y >= 0) & (y < columns))
    check_statistics(student, near(student), **given)
    exchanged = kernels.statistics(near(student), student, targets=None, weights=None, wanted=frozenset())
    torch.testing.assert_close(exchanged["teacher_sum"], found["sum"], rtol=1e-6, atol=0)
    open_floor = replace(student, floor=torch.full_like(student.floor, -INFINITY))
    plain = kernels.statistics(replace(student, floor=None), None, wanted=WANTED, **given)
    for name, value in kernels.statistics(open_floor, None, wanted=WANTED, **given).items():
        assert torch.equal(value, plain[name]), name


def test_what_ties_at_the_floor_is_kept():
    z = torch.randint(-3, 4, (48, 100)).float()
    chunk = Chunk(z, None, None, torch.ones(48), floor=torch.randint(-3, 3, (48,)).float())
    found = kernels.statistics(chunk, None, targets=None, weights=None, wanted=frozenset())
    kept = torch.where(z >= chunk.floor[:, None], (z - z.amax(-1, keepdim=True)).double().exp(), 0).sum(-1)
    torch.testing.assert_close(found["sum"], kept, rtol=1e-6, atol=0)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_statistics_at_an_offset(offset):
    student = make(1000)
    teacher = near(student)
    check_statistics(with_z(student, student.z + offset), with_z(teacher, teacher.z - offset), targets=targets_of(1000))


@pytest.mark.parametrize("order", ["rising", "falling"])
def test_a_maximum_that_keeps_moving(order):
    """Every block of a rising row raises the maximum, by so much that what came before fades."""
    columns = 4099
    ramp = torch.linspace(-60, 60, columns)
    student = make(columns)
    teacher = near(student)
    z = student.z + (ramp if order == "rising" else -ramp)
    for t in (z, -z):
        check_statistics(
            with_z(student, z), with_z(teacher, t), targets=targets_of(columns), weights=torch.rand(columns)
        )


# ------------------------------------------------------------------------------------------- divergences and gradients


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize("beta", [0.5, 1e-3, 0.9, None], ids=str)
def test_generic(columns, softcap, beta):
    student = make(columns, bias=True, softcap=softcap)
    teacher = near(student)
    rows = rows_for(columns)
    parameter = torch.rand(rows) if beta is None else torch.full((), beta).expand(rows)
    given = (student, teacher, normalizers_of(student, teacher), JSD, (parameter,))
    results = kernels.generic(*given), specification.generic(*given), specification.generic(*double(given))
    for name, ours, theirs, exact in zip(("value", "slope"), *results):
        assert ours.dtype == torch.float64 and ours.shape == (rows,)
        check(name, ours, theirs, exact)


def check_row_sum(backend, row_sum, student: Chunk, teacher: Chunk) -> tuple[Tensor, Tensor]:
    """Value and slope of one of ROW_SUMS, and its part of a gradient."""
    name, *numbers = row_sum
    rows = len(student.z)
    normalizers = normalizers_of(student, teacher)
    parameters = tuple(torch.full((), float(number)).expand(rows) for number in numbers)
    given = (student, teacher, normalizers, SUMS[name], parameters)
    found = backend.generic(*given), specification.generic(*given), specification.generic(*double(given))
    for which, ours, theirs, exact in zip(("value", "slope"), *found):
        assert ours.dtype == torch.float64 and ours.shape == (rows,)
        check(which, ours, theirs, exact)
    if name == "log_sum":
        parameters += (found[2][0].float(),)
    combination = Combination({"q": torch.randn(rows)}, generic=((SUMS[name], parameters, torch.randn(rows)),))
    given = (student, teacher, normalizers, combination)
    exact = gradient_of(specification, *double(given))
    check("gradient", gradient_of(backend, *given), gradient_of(specification, *given), exact)
    return found[0]


def shaped(student: Chunk, teacher: Chunk, shape: str) -> tuple[Chunk, Chunk]:
    """The pair as it is, far apart, with columns of -inf on one side and on both, or a student without some columns."""
    if shape == "filtered":
        return filtered(student), teacher
    if shape == "apart":
        away = torch.randn_like(student.z).sign() * 120
        return with_z(student, student.z + away), with_z(teacher, teacher.z - away)
    if shape.startswith("masked"):
        s, t = student.z.clone(), teacher.z.clone()
        s[:, 2::7] = t[:, 2::7] = -INFINITY
        (s if shape.endswith("student") else t)[:, 5::7] = -INFINITY
        return with_z(student, s), with_z(teacher, t)
    return student, teacher


@pytest.mark.parametrize("columns", [17, 1000])
@pytest.mark.parametrize("shape", ["near", "apart", "masked student", "masked teacher", "filtered"])
@pytest.mark.parametrize("row_sum", ROW_SUMS, ids=str)
def test_every_row_sum(row_sum, shape, columns):
    student = make(columns, bias=True, softcap=20.0 if shape == "near" else None)
    value, slope = check_row_sum(kernels, row_sum, *shaped(student, near(student), shape))
    assert not bool((value.isnan() | slope.isnan()).any())


def test_the_row_sums_are_all_here():
    assert {name for name, *_ in ROW_SUMS} == {name for name, row in SUMS.items() if row.family != "moments"}


def test_a_log_sum_of_very_small_numbers():
    """Of e^-100 and less; and of nothing, where the supports are disjoint, with a slope of 0."""
    student = make(1000)
    far = torch.where(torch.arange(1000) % 2 == 0, 150.0, -150.0)
    student, teacher = with_z(student, student.z + far), with_z(student, student.z - far)
    for row_sum in (("log_sum", 0.5, 0.5), ("log_sum", 1, 1)):
        assert bool((check_row_sum(kernels, row_sum, student, teacher)[0] < -100).all())
    hidden = far > 0
    student = with_z(student, student.z.masked_fill(hidden, -INFINITY))
    teacher = with_z(teacher, teacher.z.masked_fill(~hidden, -INFINITY))
    half, nothing = torch.full((len(student.z),), 0.5), torch.full((len(student.z),), -INFINITY)
    normalizers = normalizers_of(student, teacher)
    value, _ = kernels.generic(student, teacher, normalizers, SUMS["log_sum"], (half, half))
    assert torch.equal(value, nothing.double())
    combination = Combination({}, generic=((SUMS["log_sum"], (half, half, nothing), half),))
    assert bool((gradient_of(kernels, student, teacher, normalizers, combination) == 0).all())


ELEMENTS = [frozenset({name}) for name in (*BASIS, "jsd", "rows")]
MIXTURES = [frozenset({"one_hot", "q"}), frozenset({"q", "q_log_ratio"}), frozenset({*BASIS, "jsd", "rows"})]


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize("names", [*ELEMENTS, *MIXTURES], ids=lambda names: "+".join(sorted(names)))
def test_gradient(columns, softcap, names):
    student = make(columns, bias=True, softcap=softcap)
    teacher = near(student) if names & {"p", "q_log_ratio", "jsd"} else None
    for ones in (False, True):
        check_gradient(student, teacher, normalizers_of(student, teacher), combination_of(names, columns, ones=ones))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
def test_filtered_gradient(columns, softcap):
    """Exactly 0 at columns that are not kept, whatever the combination holds there."""
    student = filtered(make(columns, bias=True, softcap=softcap))
    combination = combination_of(MIXTURES[-1], columns)
    dropped = specification.raw(student) < student.floor[:, None]
    combination.rows[dropped & (torch.rand(dropped.shape) < 0.5)] = float("nan")
    for teacher in (near(student), filtered(near(student))):
        ours = check_gradient(student, teacher, normalizers_of(student, teacher), combination)
        assert bool((ours[dropped] == 0).all()) and bool((ours[~dropped] != 0).any())
    one_hot = combination_of(frozenset({"one_hot", "q"}), columns)
    check_gradient(student, None, normalizers_of(student, None), one_hot)


def test_gradient_of_several_divergences():
    student = make(1000)
    teacher = near(student)
    rows = len(student.z)
    terms = tuple((JSD, (torch.full((rows,), beta),), torch.randn(rows)) for beta in (0.1, 0.5, 0.8))
    combination = Combination({"q": torch.randn(rows)}, generic=terms)
    check_gradient(student, teacher, normalizers_of(student, teacher), combination)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_gradient_at_an_offset(offset):
    student = make(1000)
    teacher = near(student)
    student, teacher = with_z(student, student.z + offset), with_z(teacher, teacher.z - offset)
    check_gradient(student, teacher, normalizers_of(student, teacher), combination_of(MIXTURES[-1], 1000))


def test_rows_that_are_not_live_get_exact_zeros():
    columns = 1000
    student = make(columns)
    z = student.z.clone()
    z[::3] = float("nan")
    student = with_z(student, z)
    teacher = near(student)
    live = torch.arange(len(z)) % 3 != 0
    normalizers = normalizers_of(student, teacher)
    combination = replace(combination_of(MIXTURES[-1], columns), live=live)
    ours = check_gradient(student, teacher, normalizers, combination)
    assert torch.equal(ours[~live], torch.zeros(int((~live).sum()), columns))
    everything = gradient_of(kernels, student, teacher, normalizers, replace(combination, live=None))
    assert torch.equal(ours[live], everything[live])


@pytest.mark.parametrize("columns", [17, 1000])
def test_the_output_may_be_the_input_and_nothing_beside_it_is_written(columns):
    student = make(columns, bias=True)
    teacher = near(student)
    given = (teacher, normalizers_of(student, teacher), combination_of(MIXTURES[-1], columns))
    expected = gradient_of(kernels, student, *given)

    canvas = torch.full((2 * len(expected), columns + 9), 7.0)
    out = canvas[::2, 2 : 2 + columns]
    kernels.gradient(student, *given, out)
    assert torch.equal(out, expected)
    out.fill_(7.0)
    assert bool((canvas == 7.0).all())

    kernels.gradient(student, *given, student.z)
    assert torch.equal(student.z, expected)


# ---------------------------------------------------------------------------------------------------------------- fused


FUSED = {  # open coefficients, and what their balance needs
    "one_hot": [],
    "one_hot+weights": ["weighted"],
    "q+q_lse": [],
    "q_log_q": ["entropy"],
    "q_squared": ["collision"],
    "p": [],
    "p+q_log_ratio": ["moments"],
    "jsd": [],
    "one_hot+q+q_lse+weights+q_log_q+q_squared+p+q_log_ratio+jsd": sorted(WANTED - {"argmax"}),
}


def fused_by_parts(student, teacher, targets, weights, wanted, combination) -> tuple[dict, Tensor]:
    """Statistics, generic and gradient in turn, of the torch backend: what ``fused`` does in one call."""
    found = specification.statistics(student, teacher, targets=targets, weights=weights, wanted=wanted)
    s = algebra.finish(found)
    coefficients = algebra.Coefficients({key: c.double() for key, c in combination.coefficients.items()})
    for k, (definition, parameters, c) in enumerate(combination.generic):
        normalizers = algebra.normalizers(s, student.outer.dtype)
        found[k, "value"], slope = specification.generic(student, teacher, normalizers, definition, parameters)
        found[k, "slope"] = s[(k,), "slope"] = slope
        coefficients[(k,)] = c.double()
    closed = algebra.close(coefficients, s)
    basis = {key: c.to(student.outer.dtype) for key, c in closed.items() if not isinstance(key, tuple)}
    out = torch.empty_like(student.z)
    normalizers = algebra.normalizers(s, student.outer.dtype)
    specification.gradient(student, teacher, normalizers, replace(combination, coefficients=basis), out)
    return found, out


@pytest.mark.parametrize("subject", [name for name in SUBJECTS if not name.startswith("cpu")], indirect=True)
@pytest.mark.parametrize("columns", [17, 1000])
@pytest.mark.parametrize("softcap", [None, 20.0], ids=["", "softcap"])
@pytest.mark.parametrize("names", list(FUSED))
def test_fused(columns, softcap, names):
    student = make(columns, bias=True, softcap=softcap)
    rows = len(student.z)
    given = names.split("+")
    teacher = near(student) if {"p", "q_log_ratio", "jsd"} & set(given) else None
    targets, weights = torch.randint(0, columns, (rows,)), torch.rand(columns)
    combination = Combination(
        {name: torch.randn(rows) for name in given if name != "jsd"},
        targets,
        weights,
        tuple((JSD, (torch.rand(rows),), torch.randn(rows)) for _ in range(2 * ("jsd" in given))),
        live=torch.arange(rows) % 5 != 0,
    )
    inputs = (student, teacher, targets, weights, frozenset(FUSED[names]), combination)
    theirs, theirs_gradient = fused_by_parts(*inputs)
    exact, exact_gradient = fused_by_parts(*double(inputs[:-2]), inputs[-2], double(combination))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        canvas = torch.full((rows, columns + 9), 7.0, dtype=dtype)
        out = canvas[:, 2 : 2 + columns]
        ours = kernels.backend.fused(
            student, teacher, targets=targets, weights=weights, wanted=inputs[4], combination=combination, out=out
        )
        ours = algebra.join(ours) if ours["max"].dim() == 2 else ours
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            check(str(name), value, theirs[name], exact[name])
        check("gradient", out, theirs_gradient.to(dtype), exact_gradient)
        assert bool((out[::5] == 0).all())
        out.fill_(7.0)
        assert bool((canvas == 7.0).all())


# ------------------------------------------------------------------------------------------------------ masks and NaN


def masks(columns: int) -> dict[str, tuple[Tensor, Tensor]]:
    """Where the student's and the teacher's logits are -inf; the first block of some rows is masked as a whole."""
    some, others = torch.rand(2, rows_for(columns), columns) < 0.3
    some[::4, : columns // 2] = True
    some[:, -1] = others[:, -1] = False
    none = torch.zeros_like(some)
    return {"student": (some, none), "teacher": (none, some), "both": (some, some), "different": (some, others)}


@pytest.mark.parametrize("columns", [3, 17, 1000, 4099])
@pytest.mark.parametrize("where", ["student", "teacher", "both", "different"])
def test_masked_columns(columns, where):
    hidden_s, hidden_t = masks(columns)[where]
    student = make(columns)
    teacher = near(student)
    student = with_z(student, student.z.masked_fill(hidden_s, -INFINITY))
    teacher = with_z(teacher, teacher.z.masked_fill(hidden_t, -INFINITY))
    check_statistics(student, teacher, targets=targets_of(columns), weights=0.1 + torch.rand(columns))

    normalizers = normalizers_of(student, teacher)
    given = (student, teacher, normalizers, JSD, (torch.rand(len(student.z)),))
    found = kernels.generic(*given), specification.generic(*given), specification.generic(*double(given))
    for results in zip(("value", "slope"), *found):
        check(*results)
        assert bool(results[1].isfinite().all())
    names = {"q", "q_log_q", "q_squared", "p", "jsd"}
    ours = check_gradient(student, teacher, normalizers, combination_of(frozenset(names), columns))
    assert bool((ours[hidden_s & hidden_t] == 0).all())
    check_gradient(student, teacher, normalizers, combination_of(frozenset({"q_log_ratio"}), columns))


def test_a_whole_row_masked():
    student = make(1000)
    teacher = near(student)
    z, t = student.z.clone(), teacher.z.clone()
    z[0], t[1], z[2], t[2] = -INFINITY, -INFINITY, -INFINITY, -INFINITY
    found = check_statistics(with_z(student, z), with_z(teacher, t), wanted=WANTED - {"weighted"})
    assert found["max"][0] == -INFINITY and found["sum"][0] == 0 and found["argmax"][0] == 0
    assert found["teacher_max"][1] == -INFINITY and found["teacher_sum"][1] == 0


@pytest.mark.parametrize("bad", [float("nan"), INFINITY])
def test_a_bad_row_stays_alone(bad):
    columns = 1000
    student = make(columns)
    teacher = near(student)
    z = student.z.clone()
    z[3, 700] = bad
    broken = with_z(student, z)
    others = torch.arange(len(z)) != 3

    clean, dirty = (
        kernels.statistics(s, teacher, targets=targets_of(columns), weights=None, wanted=WANTED)
        for s in (student, broken)
    )
    for name in clean.keys() - {"mass", "target", "teacher_max", "teacher_sum", "argmax"}:
        assert torch.equal(clean[name][others], dirty[name][others])
        assert bool(dirty[name][3].isnan()), name

    normalizers = normalizers_of(student, teacher)
    normalizers.max[3] = dirty["max"][3].float()
    normalizers.log_sum[3] = dirty["sum"][3].log().float()
    combination = combination_of(MIXTURES[-1], columns)
    clean, dirty = (gradient_of(kernels, s, teacher, normalizers, combination) for s in (student, broken))
    assert torch.equal(clean[others], dirty[others]) and bool(dirty[3].isnan().all())


# ------------------------------------------------------------------------------------- sizes, threads, floating point


@pytest.mark.parametrize("rows", [0, 1])
def test_few_rows(rows):
    student = make(100, rows=rows)
    teacher = near(student)
    found = kernels.statistics(student, teacher, targets=targets_of(100, 2)[:rows], weights=None, wanted=WANTED)
    assert all(value.shape == (rows,) for value in found.values())
    normalizers = normalizers_of(student, teacher)
    sums = kernels.generic(student, teacher, normalizers, JSD, (torch.rand(rows),))
    assert all(value.shape == (rows,) for value in sums)
    if rows:
        check_gradient(student, teacher, normalizers, combination_of(MIXTURES[1], 100, rows=rows))
    else:
        kernels.gradient(student, teacher, normalizers, Combination({"q": torch.rand(0)}), torch.empty(0, 100))


@pytest.mark.parametrize(("rows", "columns"), [(70, 4099), (2000, 130)])
def test_the_number_of_threads_changes_no_bit(subject, rows, columns):
    if not subject.startswith("cpu"):
        pytest.skip("threads are the C++ kernels'")
    student = make(columns, rows=rows)
    teacher = near(student)
    y, normalizers = targets_of(columns, rows), normalizers_of(student, teacher)
    parameters, combination = (torch.rand(rows),), combination_of(MIXTURES[-1], columns, rows=rows)
    found = []
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        statistics = kernels.statistics(student, teacher, targets=y, weights=None, wanted=WANTED)
        sums = kernels.generic(student, teacher, normalizers, JSD, parameters)
        found.append([*statistics.values(), *sums, gradient_of(kernels, student, teacher, normalizers, combination)])
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def test_the_callers_denormals_survive(subject):
    """The C++ kernels flush denormals to zero; the threads they borrow must not keep that."""
    if not subject.startswith("cpu"):
        pytest.skip("threads are the C++ kernels'")
    torch.set_num_threads(2)
    check_statistics(make(4099, rows=70), None)
    small = torch.full((1 << 20,), 1e-40)
    assert bool((small * 1 > 0).all())


def unit_of(exact: Tensor) -> Tensor:
    """One unit in the last place of these numbers as float32."""
    size = exact.abs().float()
    return (size.nextafter(torch.tensor(INFINITY)) - size).double()


def test_exponential(monkeypatch):
    """q with max = log_sum = 0 is e^z."""
    tile(monkeypatch, 1, 1 << 18)
    z = torch.cat([-torch.logspace(-8, 2, 200_001), torch.tensor([0.0, -INFINITY, -1e30, -200.0, float("nan")])])[None]
    zero = torch.zeros(1)
    ours = gradient_of(
        kernels, Chunk(z, None, None, torch.ones(1)), None, Normalizers(zero, zero), Combination({"q": torch.ones(1)})
    )[0]
    assert ours[-5:-1].tolist() == [1.0, 0.0, 0.0, 0.0] and bool(ours[-1].isnan())
    exact = z[0, :-5].double().exp()
    assert bool(((ours[:-5].double() - exact).abs() <= 1.2 * unit_of(exact) + TINY).all())


def test_tanh(monkeypatch):
    """s of one column with inner = outer = 1 is tanh(z)."""
    tile(monkeypatch, 1 << 16, 1)
    z = torch.cat([torch.logspace(-8, 2, 20_001), torch.tensor([INFINITY, 0.0])])
    z = torch.cat([z, -z])[:, None]
    chunk = Chunk(z, None, 1.0, torch.ones(len(z)))
    ours = kernels.statistics(
        chunk, None, targets=torch.zeros(len(z), dtype=torch.int64), weights=None, wanted=frozenset()
    )["target"]
    exact = z[:, 0].double().tanh()
    assert bool(((ours - exact).abs() <= 1.2 * unit_of(exact)).all())
    assert bool((ours[exact.abs() == 1].abs() == 1).all())
