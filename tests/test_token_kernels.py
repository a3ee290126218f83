"""The token kernels against the torch expression of the same objective, which test_policy.py holds to its definition.

Inputs are float32, and the same in float64 for the exact numbers. With the norm over the tokens of a derivative, and
for a result with the sum of |its summands| for |exact|,

    |ours - exact| <= 1.5 |torch float32 - exact| + 2 eps |exact|
"""

from __future__ import annotations

import importlib
import math
from types import ModuleType

import pytest
import torch
from torch import Tensor

import cuda_build
from logitless.backends import cpu, triton
from logitless.losses import policy
from logitless.losses.policy.inputs import Tokens
from logitless.ops.tokens import kernels
from logitless.ops.tokens.recipe import FACTORS, LEVELS, PENALTIES, SURROGATES, Recipe
from logitless.tokenwise import Tokenwise
from pairwise import pairwise

EPSILON = torch.finfo(torch.float32).eps
COPIES = [] if cpu.PROBLEM else cpu._C.isas()
SUBJECTS = [f"cpu-{copy}" for copy in COPIES]  # a backend, and which of its copies or machines
SUBJECTS += [] if cuda_build.missing() else ["cuda-1", "cuda-5"]  # processors
SUBJECTS += ["triton"] if triton.PROBLEM is None else []

KL, Ratio, Only = policy.KL, policy.Ratio, policy.Only
FACTOR_LEVELS = {
    "surrogate": [
        policy.Clip(),
        policy.Clip(0.1, 0.3, dual=1.3),
        policy.Clip(0.2, 0.2, delta=1.4),
        policy.Clip(0.2, 0.2, dual=1.35, delta=1.5),
        policy.Importance(),
        policy.Reinforce(),
        policy.Cispo(0.8, 1.2),
        policy.Cispo(None, None),
        policy.Sapo(1.0, 2.0),
        policy.Vespo(),
        policy.Vespo(1.5, 1.0, 2.0, 0.5, rollout=True),
        policy.Dro(0.3),
        policy.Dppo("tv", 0.05, 0.05, 1.1),
        policy.Dppo("kl", 0.01, 0.01, 1.1),
        policy.Dppo("tv", 0.1, 0.05, detach_ratio=False),
        policy.Dppo("kl", 0.01, 0.02, detach_ratio=False),
    ],
    "ratio": [
        Ratio(),
        Ratio(low=-0.3, high=0.2),
        Ratio(teacher_share=0.3),
        Ratio("sequence-mean"),
        Ratio("sequence-mean", 0.4, high=0.05),
        Ratio("sequence-sum", low=-2.0, high=2.0),
        Ratio("sequence-token"),
        policy.GeometricRatio(0.1, 0.2),
    ],
    "penalties": [
        (),
        *((KL(0.3, estimator),) for estimator in ("k1", "abs", "k2", "k3", "k1+", "k3+", "rapo", "ratio_k3")),
        *((KL(0.3, f"dph_{generator}"),) for generator in ("forward_kl", "js", "alpha")),
        (KL(0.1, "k3", clamp=(0.4, 0.05)), KL(-0.2, "ratio_k3", "masked_logprob", clamp=(0.5, 0.1))),
        (KL(0.1, "k2", weights="kl_weights", selection=Only("replay")), KL(0.1, "k1", "old_logprob")),
        (policy.Entropy(-0.1), policy.Entropy(0.05, "masked_entropy"), KL(0.1, "dph_alpha", alpha=-0.5)),
        (policy.PositiveNLL(0.2), policy.Entropy(0.1), policy.Entropy(0.1)),
        (KL(0.1, "abs", selection=policy.LowestProbability(0.2)), policy.PositiveNLL(0.1, share=0.5)),
    ],
    "factors": [
        (),
        (policy.tis(1.2),),
        (policy.mis(1.5),),
        (policy.ImportanceCorrection(level="geometric", high=1.05, low=0.95), policy.Opsm(0.0)),
        (policy.ImportanceCorrection(normalize=True, against="logprob", high=None, bound=None), Only("replay")),
        (policy.icepop(0.7, 1.3, against="logprob"), Only("replay", value=False)),
        (
            policy.Rejection(estimate="k1", over="token", high=0.2, low=-0.3),
            policy.tis(1.1, "sequence", against="logprob"),
        ),
        (
            policy.Rejection(estimate="k2", over="seq_sum", high=0.5),
            policy.Rejection(estimate="k3", over="seq_max", high=0.2),
        ),
        (policy.Rejection(estimate="k3", over="seq_mean", high=0.05, against="logprob"),),
        (policy.TopEntropy(threshold=0.4), policy.Opsm(-0.02)),
        (policy.TopEntropy(0.5), policy.LowestProbability(0.6)),
    ],
    "rewards": [(), (policy.LogRatioReward(0.5),), (policy.LogRatioReward(1.2, "ref_logprob", "logprob"),) * 2],
    "aggregation": [
        *(
            policy.Aggregation(mode)
            for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean")
        ),
        policy.Aggregation("seq-mean-token-mean", count_empty=True),
        policy.Aggregation("seq-mean-token-sum-norm", norm=7.0),
        policy.Aggregation("seq-mean-token-sum-norm", norm=7.0, count_empty=True),
    ],
    "denominator": [None, 13.0, torch.tensor(17, device="cpu")],
    "layout": ["packed", "padded", "flat"],
    "masked": [False, True],
    "old": [True, False],
    "advantages": ["token", "sequence", "absent"],
    "weights": [None, "token", "sequence"],
}


def objective_of(case: dict) -> policy.TokenObjective:
    factors = case["factors"]
    return policy.TokenObjective(
        case["surrogate"],
        case["ratio"],
        case["penalties"],
        case["rewards"],
        tuple(f for f in factors if not isinstance(f, policy.selection.Selection)),
        tuple(f for f in factors if isinstance(f, policy.selection.Selection)),
        case["aggregation"],
    )


def valid(case: dict) -> bool:
    per_sequence = "sequence" in (case["advantages"], case["weights"])
    if case["layout"] == "flat" and (per_sequence or objective_of(case).sequences):
        return False
    if case["advantages"] == "absent" and not case["rewards"]:
        return False
    if case["denominator"] is not None and case["aggregation"].mode == "token-sum":
        return False
    fixed = any("old_logprob" in factor.reads for factor in case["factors"] if factor.fixed)
    return case["old"] or not fixed  # which is said by prepare


CASES = pairwise(FACTOR_LEVELS, valid)


def is_slow(parameters: dict) -> bool:
    """The best copy runs them all, the others a part of them."""
    case = parameters.get("case")
    return case is not None and parameters.get("subject") != SUBJECTS[0] and CASES.index(case) % 5 > 0


class Inputs:
    """Numbers of which every clip, bound and mask catches some, and what the mask hides is NaN or infinite."""

    def __init__(self, case: dict, lengths: list[int], behind: int = 3, noise: float = 0.3, reach: float = 3.0) -> None:
        objective, padded = objective_of(case), case["layout"] == "padded"
        count = sum(lengths) + behind if not padded else len(lengths) * max(lengths, default=0)
        shape = (len(lengths), max(lengths, default=0)) if padded else (count,)
        logprob = -reach * torch.rand(shape)
        made = {"logprob": logprob}
        for name in ("old", "ref", "teacher", "rollout", "masked"):
            made[f"{name}_logprob"] = (logprob + noise * torch.randn(shape)).clamp(max=-0.01)
        made |= {"entropy": torch.rand(shape), "masked_entropy": torch.rand(shape), "advantages": torch.randn(shape)}
        made |= {"correct": torch.rand(shape) > 0.5, "replay": torch.rand(shape) > 0.4, "kl_weights": torch.rand(shape)}
        made["weights"] = torch.rand(shape) * (torch.rand(shape) > 0.2)
        made["advantages"][torch.rand(shape) < 0.1] = 0
        for name in ("advantages", "weights"):
            if case[name] == "sequence":
                made[name] = torch.randn(len(lengths)) if name == "advantages" else torch.rand(len(lengths))
        absent = {"advantages"} if case["advantages"] == "absent" else set()
        absent |= set() if case["old"] else {"old_logprob"}
        absent |= set() if case["weights"] else {"weights"}
        self.given = {name: x for name, x in made.items() if name in {*objective.reads, "weights", "entropy"} - absent}
        self.mask = torch.rand(shape) > 0.3 if case["masked"] else None
        if padded:
            self.mask = (torch.arange(shape[1]) < torch.tensor(lengths)[:, None]) & (
                torch.ones(shape, dtype=torch.bool) if self.mask is None else self.mask
            )
        self.cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int() if case["layout"] == "packed" else None
        hidden = torch.zeros(shape, dtype=torch.bool) if self.mask is None else ~self.mask
        if self.cu_seqlens is not None:
            hidden = hidden | (torch.arange(count) >= self.cu_seqlens[-1])
        rubbish = torch.tensor([math.nan, math.inf, -math.inf]).repeat(count // 3 + 1)[:count].view(shape)
        for name, x in self.given.items():
            if x.is_floating_point() and x.shape == shape:
                self.given[name] = torch.where(hidden, rubbish, x)
        self.wrt = sorted(objective.statistics)

    def tokens(self, objective: policy.TokenObjective, dtype: torch.dtype) -> tuple[Tokens, list[Tensor]]:
        given = {name: x.to(dtype) if x.is_floating_point() else x for name, x in self.given.items()}
        leaves = [given[name].requires_grad_() for name in self.wrt]
        return objective.prepare(given, like=given["logprob"], mask=self.mask, cu_seqlens=self.cu_seqlens), leaves


def module_of(subject: str, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """The kernels of a subject, made ready."""
    name, _, variant = subject.partition("-")
    if name == "cpu":
        cpu._C.force_isa(variant)
    if name == "cuda":
        cuda_build.serve(monkeypatch, cuda_build.load(cuda_build.build()), processors=int(variant))
    return importlib.import_module(f"logitless.ops.tokens.{name}")


@pytest.fixture(params=SUBJECTS)
def subject(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    if request.param.startswith("cpu") and torch.get_default_device().type != "cpu":
        pytest.skip("tensors are on a GPU")
    yield module_of(request.param, monkeypatch)
    if COPIES:
        cpu._C.force_isa(COPIES[0])


def slow(module: ModuleType) -> bool:
    """Triton's interpreter takes seconds for what others do in milliseconds."""
    return module.__name__.endswith("triton") and triton.interpreted()


def by_kernel(module: ModuleType, recipe: Recipe, inputs: list[Tensor], tokens: Tokens, given: Tensor | None):
    """({result: value}, {slot: derivative}), the second twice over."""
    inputs = tuple(x.detach().float().contiguous() for x in inputs)
    offsets = None if tokens.segments is None else tokens.segments.offsets
    given = None if given is None else given.float()
    call = kernels.Call(recipe, inputs, tokens.given_mask, offsets, given)
    results, state = module.forward(call, True)
    alone, nothing = module.forward(call, False)
    assert nothing is None and torch.equal(alone, results)
    first, second = [module.backward(recipe, state, torch.tensor(2.0)) for _ in range(2)]
    for a, b in zip(first, second, strict=True):
        assert torch.equal(a, b) and a.dtype == torch.float32
    return dict(zip(recipe.results, results, strict=True)), dict(zip(recipe.gradients, first, strict=True))


def expression(objective: policy.TokenObjective, inputs: Inputs, denominator, dtype: torch.dtype):
    """Results, gradients of twice the loss by input, and the sums of what the results' summands amount to."""
    tokens, leaves = inputs.tokens(objective, dtype)
    found = Tokenwise.evaluate(objective, tokens, denominator)
    gradients = torch.autograd.grad(2 * found.loss, leaves, allow_unused=True)
    names = ["policy", *(f"penalty_{k}" for k in range(len(objective.penalties)))]
    results = {"loss": found.loss.detach(), **dict(zip(names, found.terms.values(), strict=True)), **found.metrics}
    weights = objective.weights(tokens, denominator)
    losses = objective.losses(tokens)
    sizes = {name: (weights * x).nan_to_num().abs().sum() for name, x in zip(names, losses.values(), strict=True)}
    sizes["loss"] = (weights * objective.total(losses)).nan_to_num().abs().sum()
    return results, dict(zip(inputs.wrt, gradients, strict=True)), {name: x.detach() for name, x in sizes.items()}


def evaluate(module: ModuleType, case: dict, inputs: Inputs) -> dict[str, tuple[Tensor, ...]]:
    """(ours, exact, torch's, size) of every result and derivative."""
    objective, found = objective_of(case), {}
    torch.manual_seed(5)
    tokens, _ = inputs.tokens(objective, torch.float32)
    recipe, slots, given = objective.recipe(tokens, case["denominator"])
    results, derivatives = by_kernel(module, recipe, slots, tokens, given)
    exact, exact_gradients, sizes = expression(objective, inputs, case["denominator"], torch.float64)
    baseline, baseline_gradients, _ = expression(objective, inputs, case["denominator"], torch.float32)
    for name in {*recipe.results} - {"norm"}:
        if name in exact:
            found[name] = (results[name], exact[name], baseline[name], sizes.get(name, 1.0) + exact[name].abs())
        else:
            assert results[name] == 0, name
    shape = inputs.given["logprob"].shape
    for name, wanted in exact_gradients.items():
        slope = derivatives.get(recipe.inputs.index(name)) if name in recipe.inputs else None
        if wanted is None or slope is None:
            assert slope is None or not slope.any()
            assert wanted is None or not wanted.any()
            continue
        slope = slope.view(shape)
        hidden = inputs.given["logprob"].isnan() | inputs.given["logprob"].isinf()
        assert not slope[hidden].any()
        found[f"d {name}"] = (slope, wanted, baseline_gradients[name], wanted.norm())
    return found


def check(module: ModuleType, case: dict, draws: list[Inputs]) -> None:
    """Over several draws: the error of a single number may be 0 by chance."""
    found = [evaluate(module, case, inputs) for inputs in draws]
    for name in found[0]:
        ours, exact, baseline, size = [
            torch.cat([draw[name][i].double().reshape(-1) for draw in found]) for i in range(4)
        ]
        error, bar = (ours - exact).norm(), 1.5 * (baseline - exact).norm() + 2 * EPSILON * size.norm()
        assert error <= bar, f"{name}: error {error:.3e}, bar {bar:.3e}, |exact| {exact.norm():.3e}"


def identify(case: dict) -> str:
    return f"{CASES.index(case)}-{type(case['surrogate']).__name__}-{case['layout']}"


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_objective(subject: ModuleType, case: dict) -> None:
    torch.manual_seed(CASES.index(case))
    lengths, draws = ([5, 0, 40], 2) if slow(subject) else ([5, 0, 23, 1, 40, 0, 8], 3)
    check(subject, case, [Inputs(case, lengths) for _ in range(draws)])


# One case per path that depends on sizes: sums of sequences, means that spread, what needs no sequences.
SIZES = {
    "no tokens": ([0, 0], 0),
    "no tokens in sequences": ([0, 0], 3),
    "one token": ([1], 0),
    "several units": ([4095, 1, 9000, 0, 0, 5000], 5000),  # of csrc/cpu/tokens.h; the last has no sequence
    "many sequences": ([3] * 2000, 1),
}
BY_SIZE = {
    "tokens": dict(surrogate=policy.Clip(), ratio=Ratio(), penalties=(KL(0.04),), aggregation="token-mean"),
    "spread": dict(
        surrogate=policy.Clip(0.01, 0.01), ratio=Ratio("sequence-mean"), penalties=(), aggregation="seq-mean-token-mean"
    ),
    "sums": dict(
        surrogate=policy.Vespo(), ratio=policy.GeometricRatio(), penalties=(), aggregation="seq-mean-token-sum"
    ),
}


@pytest.mark.parametrize("size", list(SIZES))
@pytest.mark.parametrize("name", list(BY_SIZE))
def test_sizes(subject: ModuleType, name: str, size: str) -> None:
    case = {"factors": (policy.mis(2.0),), "rewards": (), "denominator": None, "layout": "packed", "masked": True}
    case |= {"old": True, "advantages": "sequence", "weights": None} | BY_SIZE[name]
    case["aggregation"] = policy.Aggregation(case["aggregation"])
    lengths, behind = SIZES[size]
    if slow(subject):  # still parts of 128 tokens, and programs that take several
        few = 1 if behind < 100 else 16
        lengths, behind = [n // few for n in lengths[:9]], behind // few
    check(subject, case, [Inputs(case, lengths, behind, noise=0.02) for _ in range(2)])


FAR = [KL(1e-3, name) for name in ("k3", "k3+", "rapo", "dph_forward_kl", "dph_js", "dph_alpha")]


@pytest.mark.parametrize(
    "surrogate", [policy.Clip(), policy.Importance(), policy.Sapo(), policy.Dppo("kl"), policy.Dro(1)]
)
@pytest.mark.parametrize("penalty", FAR, ids=lambda penalty: penalty.estimator)
def test_beyond_the_largest_exponent(subject: ModuleType, surrogate: policy.Surrogate, penalty: KL) -> None:
    case = {"surrogate": surrogate, "ratio": Ratio(), "penalties": (penalty,), "rewards": (), "factors": ()}
    case |= {"aggregation": policy.Aggregation(), "denominator": None, "layout": "flat", "masked": False}
    case |= {"old": True, "advantages": "token", "weights": None}
    check(subject, case, [Inputs(case, [90], 0, noise=100.0, reach=200.0) for _ in range(2)])


# ---- the operation around them


needs_cpu = pytest.mark.skipif(not COPIES, reason=str(cpu.PROBLEM))


@pytest.fixture
def batch() -> dict[str, Tensor]:
    made = {
        "logprob": -torch.rand(70_000).requires_grad_(),
        "advantages": torch.randn(5),
        "entropy": torch.rand(70_000),
    }
    made["old_logprob"] = made["logprob"].detach() + 0.01 * torch.randn(70_000)
    return made | {"cu_seqlens": torch.tensor([0, 7, 4096, 30_000, 30_000, 69_000], dtype=torch.int32)}


@needs_cpu
@pytest.mark.parametrize("objective", [policy.dapo(), policy.gspo()], ids=["dapo", "gspo"])
def test_threads_change_nothing(objective: policy.TokenObjective, batch: dict) -> None:
    found, before = [], torch.get_num_threads()
    for threads in (1, 2, 3):
        torch.set_num_threads(threads)
        result = objective.from_logprobs(**batch)
        found.append([result.loss, *result.metrics.values(), *torch.autograd.grad(result.loss, batch["logprob"])])
    torch.set_num_threads(before)
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@needs_cpu
def test_they_serve_float32_and_are_told_apart_by_their_parts(batch: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    served = []
    module = kernels.select(torch.device("cpu"), torch.float32)
    original = module.forward
    monkeypatch.setattr(module, "forward", lambda recipe, *rest: served.append(recipe) or original(recipe, *rest))

    class Doubled(policy.Clip):
        def loss(self, tokens: Tokens, log_ratio: Tensor) -> Tensor:
            return 2 * super().loss(tokens, log_ratio)

    class Early(policy.Only):
        def keep(self, tokens: Tokens) -> Tensor:
            return torch.arange(len(tokens.mask)) < 100

    one = policy.dapo().from_logprobs(**batch)
    assert len(served) == 1
    own = policy.TokenObjective(Doubled(0.2, 0.28)).from_logprobs(**batch)
    assert len(served) == 1 and own.loss.item() == pytest.approx(2 * one.loss.item(), rel=1e-5)
    few = policy.dapo(selection=(Early("entropy"),)).from_logprobs(**batch)
    assert len(served) == 2 and few.metrics["kept_fraction"].item() == pytest.approx(100 / 69_000)
    policy.dapo().from_logprobs(**{name: x if x.dtype == torch.int32 else x.double() for name, x in batch.items()})
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    policy.dapo().from_logprobs(**batch)
    assert len(served) == 2


@needs_cpu
def test_gradients_of_an_operation_among_others(batch: dict) -> None:
    """Any upstream gradient, strides and types; twice; and an input whose gradient is the loss's, an entropy."""
    wide = torch.randn(69, 1000, 2, dtype=torch.bfloat16)
    leaves = [wide[..., 0].clone().requires_grad_(), wide[..., 1].float().requires_grad_()]
    given = {"logprob": leaves[0].mT.contiguous().mT, "entropy": leaves[1], "advantages": torch.randn(69)}
    loss = policy.grpo(entropy_coef=0.5).from_logprobs(**given).loss ** 2
    first = torch.autograd.grad(loss, leaves, retain_graph=True)
    second = torch.autograd.grad(loss, leaves)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert [x.dtype for x in first] == [torch.bfloat16, torch.float32]
    slope = (
        2
        * loss.detach().sqrt()
        * (-0.5 / 69_000)
        * torch.sign(policy.grpo(entropy_coef=0.5).from_logprobs(**given).loss)
    )
    torch.testing.assert_close(second[1], slope.detach().expand(69, 1000))
    with torch.no_grad():
        assert not policy.grpo(entropy_coef=0.5).from_logprobs(**given).loss.requires_grad


@needs_cpu
def test_strides(batch: dict) -> None:
    batch = {name: x.detach() for name, x in batch.items()} | {"mask": torch.rand(70_000) > 0.5}
    strided = {name: torch.stack([x, x], -1)[..., 0] for name, x in batch.items()}
    assert not any(x.is_contiguous() for x in strided.values())
    objective = policy.gspo(entropy_coef=0.1)
    assert torch.equal(objective.from_logprobs(**strided).loss, objective.from_logprobs(**batch).loss)


@needs_cpu
def test_compiled_graphs_have_the_torch_expression() -> None:
    objective = policy.gspo(correction=(policy.mis(against="logprob"),))
    given = {"logprob": -torch.rand(6, 20).requires_grad_(), "advantages": torch.randn(6)}
    given |= {"old_logprob": -torch.rand(6, 20), "rollout_logprob": -torch.rand(6, 20)}
    compiled = torch.compile(lambda: objective.from_logprobs(**given).loss, fullgraph=True, backend="aot_eager")
    losses = compiled(), objective.from_logprobs(**given).loss
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(*[torch.autograd.grad(x, given["logprob"])[0] for x in losses], rtol=1e-5, atol=1e-7)


def test_cases_cover_the_recipes() -> None:
    recipes = []
    for case in CASES:
        objective = objective_of(case)
        tokens, _ = Inputs(case, [4, 3]).tokens(objective, torch.float32)
        recipes.append(objective.recipe(tokens, case["denominator"])[0])
    assert {r.surrogate.name for r in recipes} == set(SURROGATES)
    assert {r.ratio.level for r in recipes} == set(LEVELS)
    assert {p.name for r in recipes for p in r.penalties} == set(PENALTIES)
    assert {f.name for r in recipes for f in r.factors} == set(FACTORS)
