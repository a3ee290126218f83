"""The contract: every operation, backend, type and option against the dense float64 definitions.

The bar is relative. With e = |ours - float64| and e32 = |torch on materialised float32 logits - float64|, both from the
same inputs and in the norm over the tensor, e <= 1.5 e32 + 2 eps |float64|, with eps that of the result's type. The
last term is for the cases in which torch's error happens to be 0. Where a tensor holds few numbers, both errors are
those over several draws of the inputs.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

import logitless as ll
import reference
from logitless.divergences import TABLE
from logitless.engine import memory
from logitless.engine import plan as planning
from pairwise import pairwise, sample

TYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# A list is a tensor with one number per token, those of the list in turn. Terms that are summed here have gradients of
# similar size: an error of one is not lost in the rounding of another.
OBJECTIVES = {
    "cross_entropy": [(1.0, "cross_entropy", {})],
    "class_weights": [(1.0, "cross_entropy", {"class_weights": True})],
    "smoothed_class_weights": [(1.0, "cross_entropy", {"label_smoothing": 0.2, "class_weights": True})],
    "z_loss": [(0.1, "z_loss", {})],
    "logprob": [(1.0, "logprob", {}), (-1.0, "entropy", {})],
    "forward_kl": [(1.0, "forward_kl", {})],
    "reverse_kl": [(1.0, "reverse_kl", {})],
    "symmetric_kl": [(1.0, "symmetric_kl", {"weight": [0.3, 1.0, 0.0]})],
    "jsd": [(1.0, "jsd", {"beta": 0.5})],
    "mixtures": [
        (2.0, "jsd", {"beta": 0.05}),
        (1.0, "skew_forward_kl", {"alpha": 0.1}),
        (1.0, "skew_reverse_kl", {"alpha": 0.4, "detach_mixture": True}),
        (1.0, "softened_reverse_kl", {}),
    ],
    "bounded": [(1.0, "tvd", {}), (1.0, "squared_hellinger", {})],
    "alpha_beta": [(1.0, "alpha_beta", {})],
    "alpha_beta_limits": [(1.0, "alpha_beta", {"a": 0.0, "b": 0.0}), (1.0, "alpha_beta", {"a": 0.5, "b": -0.5})],
    "alpha": [(1.0, "alpha", {}), (0.3, "alpha", {"alpha": 1.5})],
    "chi2": [(1.0, "chi2_pearson", {"temperature": 4.0}), (1.0, "chi2_neyman", {"temperature": 4.0})],
    "log_sums": [(0.5, "renyi", {"alpha": 2.0}), (1.0, "bhattacharyya", {}), (1.0, "cauchy_schwarz", {})],
    "adaptive_kl": [(1.0, "adaptive_kl", {"mu": 0.1})],  # at most of the probabilities' mass their order is chance
    "per_token": [
        (1.0, "jsd", {"beta": [0.1, 0.5, 0.9]}),
        (1.0, "skew_reverse_kl", {"alpha": [0.2, 0.9]}),
        (1.0, "renyi", {"alpha": [0.3, 2.5]}),
        (1.0, "alpha_beta", {"a": [0.3, 0.0, 0.8], "b": [0.9, 1.5, 0.0]}),
    ],
    "temperatures": [
        (0.5, "cross_entropy", {"label_smoothing": 0.1}),
        (1.0, "jsd", {"beta": 0.7, "temperature": 2.0, "temperature_squared": True}),
        (0.3, "adaptive_kl", {"mu": 0.1, "temperature": 0.5, "temperature_squared": True}),
        (0.5, "symmetric_kl", {"weight": [0.2, 0.6], "temperature": 1.5}),
    ],
    "row_term": [(1.0, "row_student", {}), (0.5, "row_teacher", {}), (0.5, "forward_kl", {})],
    "sum": [(0.5, "cross_entropy", {"label_smoothing": 0.1}), (0.5, "forward_kl", {}), (1e-3, "z_loss", {})],
    "everything": [
        (0.3, "cross_entropy", {"class_weights": True}),
        (0.2, "jsd", {"beta": 0.4}),
        (0.1, "jsd", {"beta": 0.9}),
        (0.2, "reverse_kl", {"temperature_squared": True}),
        (-0.1, "entropy", {}),
        (1e-3, "z_loss", {}),
    ],
}
DIVERGENCES = set(TABLE)
MOMENTS = {"forward_kl", "reverse_kl", "symmetric_kl"}
WITH_TEACHER = DIVERGENCES | {"row_teacher"}
WITH_TARGETS = {"cross_entropy", "logprob"}
# Of these one number says little: a few columns make up the sum, or it is the logarithm of a sum near 1.
UNEVEN = {"alpha", "chi2_pearson", "chi2_neyman", "bhattacharyya", "renyi"}
ROW_FUNCTIONS = {"row_student", "row_teacher", "adaptive_kl"}

SEVERAL_BASIS_ELEMENTS = {name for name, terms in OBJECTIVES.items() if len(terms) > 1} | {"smoothed_class_weights"}

FACTORS = {
    "objective": list(OBJECTIVES),
    "dtype": list(TYPES),
    "shape": [(5, 7, 3), (24, 16, 50), (33, 8, 1000), (6, 12, 4099), (1, 4, 1), (64, 32, 257)],  # N, H, V
    "student": ["linear", "dense"],
    "teacher": ["linear", "dense", "other_hidden"],
    "reduction": ["mean", "sum", "none"],
    "strategy": ["auto", "eager", "recompute", "frozen", "stash", "forward"],
    "frozen_head": [False, True],
    "bias": [False, True],
    "scaling": ["plain", "scale", "softcap", "temperature", "temperatures", "all"],
    "padding": [0, 13],
    "targets": ["none", "all", "some_ignored", "all_ignored"],
    "weights": [False, True],
    "denominator": [None, 7.5, "tensor"],
    "layout": ["flat", "batched", "strided"],
    "workspace": ["auto", "tight", "roomy"],
    "compact": [None, False],
    "teacher_grad": [False, True],
}


def needs(case: dict, kinds: set[str]) -> bool:
    return any(name in kinds for _, name, _ in OBJECTIVES[case["objective"]])


def valid(case: dict) -> bool:
    if needs(case, WITH_TARGETS) and case["targets"] == "none":
        return False
    if case["student"] == "dense" and (case["frozen_head"] or case["bias"]):
        return False
    if case["teacher_grad"] and not needs(case, WITH_TEACHER):
        return False
    if case["denominator"] is not None and case["reduction"] != "mean":
        return False
    if case["strategy"] == "eager" and case["reduction"] == "none":
        return False
    if case["strategy"] == "frozen" and (not case["frozen_head"] or case["teacher_grad"]):
        return False
    if case["strategy"] == "forward" and case["teacher_grad"]:
        return False
    if case["shape"][2] == 1 and case["objective"] in SEVERAL_BASIS_ELEMENTS:
        return False  # one column: these gradients are exactly 0, and a sum of basis elements leaves rounding errors
    return not (needs(case, ROW_FUNCTIONS) and case["workspace"] == "tight")


SUPPORTS = {
    "min_p": [("min_p", 0.1)],
    "top_k": [("top_k", 7)],
    "top_p": [("top_p", 0.8)],
    "in order": [("top_k", 20), ("top_p", 0.7), ("min_p", 0.05)],
    "ids": [],  # of tokens that are drawn for each case
}
ON_SUPPORTS = ["cross_entropy", "class_weights", "z_loss", "logprob", "reverse_kl", "jsd"]  # finite ones


def valid_on_support(case: dict) -> bool:
    needs_all = needs(case, WITH_TEACHER) or case["objective"] == "class_weights"
    return valid(case) and not (case["keep"] == "ids" and needs_all)


CASES = pairwise(FACTORS, valid)
SHORT = [shape for shape in FACTORS["shape"] if shape[2] < 4099]
KEPT = pairwise(FACTORS | {"objective": ON_SUPPORTS, "shape": SHORT, "keep": list(SUPPORTS)}, valid_on_support)
MORE = sample(FACTORS, valid, 1500)


def row_student(s):
    """A user's idea: margin between the two best logits."""
    best = s.topk(2, -1).values
    return torch.nn.functional.softplus(best[..., 0] - best[..., 1])


def row_teacher(s, t):
    """Squared Hellinger distance from its definition."""
    return 1 - ((s.log_softmax(-1) + t.log_softmax(-1)) / 2).exp().sum(-1)


def term(name: str, options: dict, class_weights: Tensor) -> ll.Term:
    options = options | ({"class_weights": class_weights} if options.get("class_weights") else {})
    if name == "row_student":
        return ll.row_term(row_student, name=name)
    if name == "row_teacher":
        return ll.row_term(row_teacher, name=name, teacher=True)
    plain = {"cross_entropy": ll.CrossEntropy, "z_loss": ll.ZLoss, "entropy": ll.Entropy, "logprob": ll.LogProb}
    return plain[name](**options) if name in plain else ll.Divergence(name, **options)


class Inputs:
    """Tensors of a case, and its evaluation by logitless and by the dense definitions."""

    def __init__(self, case: dict, draw: int) -> None:
        self.case = case
        generator = torch.Generator(torch.get_default_device()).manual_seed(draw)
        n, h, v = case["shape"]
        self.leading = {"flat": (n,), "batched": (1, n), "strided": (n,)}[case["layout"]]
        dtype = TYPES[case["dtype"]]
        padded = v + case["padding"]
        self.options = {"vocab_size": v} if case["padding"] else {}
        if case["scaling"] in ("scale", "all"):
            self.options["scale"] = 0.7
        if case["scaling"] in ("softcap", "all"):
            self.options["softcap"] = 4.0
        if case["scaling"] == "temperature":
            self.options["temperature"] = 1.7
        if case["scaling"] in ("temperatures", "all"):
            self.options["temperature"] = torch.rand(self.leading, generator=generator) + 0.5

        def random(*shape: int, factor: float = 1.0) -> Tensor:
            x = (factor * torch.randn(*shape, generator=generator, dtype=torch.float64)).to(dtype)
            if case["layout"] == "strided":  # last dimension contiguous, rows apart
                x = torch.nn.functional.pad(x, (0, 5))[..., : shape[-1]]
            return x

        def head(kind: str) -> list[Tensor]:
            if kind == "dense":
                return [random(*self.leading, padded, factor=2.0)]
            size = h + 3 if kind == "other_hidden" else h
            bias = [random(padded)] if case["bias"] and kind == "linear" else []
            return [random(*self.leading, size), random(padded, size, factor=2 * size**-0.5), *bias]

        self.student, self.teacher = head(case["student"]), head(case["teacher"])
        self.class_weights = torch.rand(v, generator=generator, dtype=torch.float64).to(torch.float32)
        self.targets = torch.randint(0, v, self.leading, generator=generator)
        if case["targets"] == "some_ignored":
            self.targets[torch.rand(self.leading, generator=generator) < 0.4] = -100
        if case["targets"] == "all_ignored":
            self.targets[:] = -100
        self.keep, self.mask = None, None
        if case.get("keep"):
            self.keep, self.mask = self.support(SUPPORTS[case["keep"]])
            some = self.mask.double().reshape(n, v).multinomial(1, generator=generator).reshape(self.leading)
            self.targets = torch.where(self.targets == -100, -100, some)
        self.weights = torch.rand(self.leading, generator=generator) if case["weights"] else None
        self.upstream = torch.randn(self.leading, generator=generator, dtype=torch.float64)
        self.objective = [
            (scale, name, self.per_token(options)) for scale, name, options in OBJECTIVES[case["objective"]]
        ]
        wanted = case["strategy"] != "forward"
        self.wants = [wanted and not (case["frozen_head"] and i > 0) for i in range(len(self.student))]

    def support(self, filters: list) -> tuple[object, Tensor]:
        """(what to pass as ``keep``, the [..., V] mask of what it keeps)."""
        kinds = {"min_p": ll.MinP, "top_k": ll.TopK, "top_p": ll.TopP}
        keep = tuple(kinds[name](parameter) for name, parameter in filters)
        if not filters:  # recorded tokens: padded, some of them twice
            steps = torch.arange(8) * torch.tensor(range(1, 1 + self.case["shape"][0])).reshape(*self.leading, 1)
            filters = [("ids", torch.where(torch.arange(8) == 4, -1, steps % self.case["shape"][2]))]
            keep = (ll.KeepIds(filters[0][1]),)
        s = self.logits([x.double() for x in self.student])
        return keep if len(keep) > 1 else keep[0], reference.kept(s, *filters)

    def logits(self, tensors: list[Tensor]) -> Tensor:
        return (reference.transform if len(tensors) == 1 else reference.logits)(*tensors, **self.options)

    def per_token(self, options: dict) -> dict:
        """Lists among the options of a term as tensors."""
        n = self.case["shape"][0]
        return {
            name: torch.tensor((n * value)[:n]).reshape(self.leading) if isinstance(value, list) else value
            for name, value in options.items()
        }

    def leaves(self) -> tuple[list[Tensor], list[Tensor]]:
        """Fresh leaves of the inputs."""
        student = [x.detach().requires_grad_(want) for x, want in zip(self.student, self.wants, strict=True)]
        teacher = [x.detach().requires_grad_(self.case["teacher_grad"]) for x in self.teacher]
        return student, teacher

    def gradients(self, student: list[Tensor], teacher: list[Tensor], loss: Tensor) -> list[Tensor]:
        leaves = [x for x in student + teacher if x.requires_grad]
        if not leaves or not loss.requires_grad:
            return [torch.zeros_like(x) for x in leaves]
        upstream = self.upstream.to(loss.dtype) if loss.dim() else torch.tensor(1.3, dtype=loss.dtype)
        found = torch.autograd.grad(loss, leaves, upstream, allow_unused=True)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(leaves, found, strict=True)]

    def describe(self, tensors: list[Tensor]) -> ll.LinearLogits | ll.DenseLogits:
        return (ll.DenseLogits if len(tensors) == 1 else ll.LinearLogits)(*tensors, **self.options)

    def ours(self) -> dict[str, Tensor]:
        case = self.case
        student, teacher = self.leaves()
        objective = None
        for scale, name, options in self.objective:
            part = scale * term(name, options, self.class_weights)
            objective = part if objective is None else objective + part
        result = objective(
            self.describe(student),
            targets=None if case["targets"] == "none" else self.targets,
            teacher=self.describe(teacher) if needs(case, WITH_TEACHER) else None,
            weights=self.weights,
            reduction=case["reduction"],
            denominator=torch.tensor(7.5) if case["denominator"] == "tensor" else case["denominator"],
            keep=self.keep,
            strategy=case["strategy"],
            product=case.get("product", "auto"),
            workspace=self.workspace(),
            compact=case["compact"],
            teacher_grad=case["teacher_grad"],
        )
        found = {"loss": result.loss.detach()} | result.terms
        for i, gradient in enumerate(self.gradients(student, teacher, result.loss)):
            found[f"gradient {i}"] = gradient
        return found

    def workspace(self) -> int | str:
        v = self.case["shape"][2]
        row = 8 * v * (3 if self.case["teacher_grad"] else 2)
        return {"auto": "auto", "tight": 3 * row + 20000, "roomy": 16 * row * self.case["shape"][0] + (1 << 20)}[
            self.case["workspace"]
        ]

    def dense(self, dtype: torch.dtype) -> dict[str, Tensor]:
        """By definition, on materialised logits in ``dtype``; gradients in the types of the inputs, rounded once."""
        case = self.case
        inputs_s, inputs_t = self.leaves()
        work_s = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs_s]
        work_t = [x.detach().to(dtype).requires_grad_(x.requires_grad) for x in inputs_t]

        live = torch.ones(self.leading, dtype=torch.bool)
        if case["targets"] != "none":
            live = self.targets != -100
        s, t = self.logits(work_s)[live], self.logits(work_t)[live]
        if self.mask is not None:
            s = reference.filtered(s, self.mask[live])
        y = self.targets[live]
        temperature = self.options.get("temperature", 1.0)
        temperature = temperature[live].to(dtype) if isinstance(temperature, Tensor) else temperature
        weights = torch.ones(self.leading, dtype=dtype) if self.weights is None else self.weights.to(dtype)
        loss, found = 0.0, {}
        for scale, name, options in self.objective:
            options = {k: x[live].to(dtype) if isinstance(x, Tensor) else x for k, x in options.items()}
            of_term = options.pop("temperature", 1.0)
            squared = options.pop("temperature_squared", False)
            class_weights = options.pop("class_weights", False)
            if class_weights:
                options["class_weights"] = self.class_weights
            if name.startswith("row_"):
                value = row_student(s) if name == "row_student" else row_teacher(s, t)
            elif name in WITH_TEACHER:
                value = getattr(reference, name)(s / of_term, t / of_term, **options)
            elif name in WITH_TARGETS:
                value = getattr(reference, name)(s, y, **options)
            else:
                value = getattr(reference, name)(s, **options)
            value = value * (of_term * temperature) ** 2 if squared else value
            per_token = torch.zeros(self.leading, dtype=dtype)
            per_token[live] = weights[live] * value
            if case["reduction"] != "none":
                per_token = per_token.sum()
            if case["reduction"] == "mean":
                count = self.class_weights[y].to(dtype).sum() if class_weights else live.sum().to(dtype)
                count = 7.5 if case["denominator"] is not None else count.clamp(min=1) if not live.any() else count
                per_token = per_token / count
            loss = loss + scale * per_token
            key = name
            while key in found:
                key = f"{name}_{int(key[len(name) + 1 :] or 1) + 1}"
            found[key] = per_token.detach()
        found = {"loss": loss.detach()} | found
        gradients = self.gradients(work_s, work_t, loss)
        leaves = [x for x in inputs_s + inputs_t if x.requires_grad]
        for i, (gradient, x) in enumerate(zip(gradients, leaves, strict=True)):
            found[f"gradient {i}"] = gradient if dtype == torch.float64 else gradient.to(x.dtype)
        return found


def test_every_divergence_is_here() -> None:
    assert {name for terms in OBJECTIVES.values() for _, name, _ in terms} >= DIVERGENCES


def check(case: dict, gradient_factor: float = 1.5, repeats: int = 1) -> None:
    if torch.get_default_device().type == "cuda" and case["dtype"] in ("bfloat16", "float16"):
        gradient_factor = 2.0  # gradients of logits are rounded once to the type of the products' operands
    n, _, v = case["shape"]
    dtype = TYPES[case["dtype"]]
    found: dict[str, list[tuple[Tensor, Tensor, Tensor]]] = {}
    for draw in range(repeats * (8 if n * v < 2000 else 3 if n < 10 and needs(case, UNEVEN) else 1)):
        inputs = Inputs(case, draw)
        ours, truth, baseline = inputs.ours(), inputs.dense(torch.float64), inputs.dense(torch.float32)
        assert list(ours) == list(truth)
        for name, exact in truth.items():
            assert ours[name].shape == exact.shape, name
            result = torch.float64 if dtype == torch.float64 else torch.float32
            assert ours[name].dtype == (dtype if name.startswith("gradient") else result), name
            found.setdefault(name, []).append((ours[name], exact, baseline[name]))
    for name, draws in found.items():
        factor = gradient_factor if name.startswith("gradient") else 1.5
        within_bar(name, *(torch.stack(parts) for parts in zip(*draws, strict=True)), factor)


def within_bar(name: str, found: Tensor, exact: Tensor, baseline: Tensor, factor: float = 1.5) -> None:
    error = (found.double() - exact).norm()
    if found.dtype == torch.float64:
        bar = 1e-12 * (1 + exact.norm())
    else:
        bar = factor * (baseline.double() - exact).norm() + 2 * torch.finfo(found.dtype).eps * exact.norm()
    assert error <= bar, f"{name}: error {error:.3e}, bar {bar:.3e}, |exact| {exact.norm():.3e}"


def identify(case: dict) -> str:
    return "-".join(str(value) for value in case.values()).replace(" ", "")


@pytest.mark.parametrize("case", CASES, ids=identify)
def test_objective(backend: str, case: dict) -> None:
    if backend != "torch" and case["dtype"] == "float64":
        pytest.skip("the kernels compute in float32; float64 is the torch backend's")
    check(case)


@pytest.mark.parametrize("case", KEPT, ids=identify)
def test_on_filtered_support(backend: str, case: dict) -> None:
    if backend != "torch" and case["dtype"] == "float64":
        pytest.skip("the kernels compute in float32; float64 is the torch backend's")
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", MORE, ids=identify)
def test_objective_more(backend: str, case: dict) -> None:
    if backend != "torch" and case["dtype"] == "float64":
        pytest.skip("the kernels compute in float32; float64 is the torch backend's")
    check(case, repeats=3)  # of thousands of cases, some are unlucky with one draw


LOW = [case for case in CASES if case["dtype"] in ("bfloat16", "float16") and case["student"] == "linear"]


@pytest.mark.parametrize("case", LOW, ids=identify)
def test_products_of_low_precision_operands(backend: str, case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a GPU: operands are multiplied as they are, and gradients of logits rounded once to their type."""
    if backend == "cpu" or (backend == "triton" and case["workspace"] == "auto"):
        pytest.skip("the C++ kernels write float32; many small blocks take the interpreter long")
    machine = replace(planning.gpu(), cap=64 << 20, overhead=0.0)
    monkeypatch.setattr(planning, "machine", lambda device: machine)
    monkeypatch.setattr(memory, "alignment", lambda device: 64)
    if case["workspace"] == "auto":  # several blocks of logits in a group of gradients, and several groups
        tilings = lambda shape, machine, room, operand: [planning.Tiling(3, shape.vocab, 10 if operand else 0)]  # noqa: E731
        monkeypatch.setattr(planning, "_whole_tilings", tilings)
    check(case, gradient_factor=2.0)


def serves_fused_products(case: dict) -> bool:
    if case["dtype"] == "float64" or case["student"] != "linear" or needs(case, DIVERGENCES - MOMENTS | ROW_FUNCTIONS):
        return False
    if needs(case, WITH_TEACHER) and case["teacher"] == "dense":
        return False
    no_grad = case["strategy"] == "forward"
    return no_grad or (case["reduction"] == "none" and case["strategy"] in ("auto", "recompute"))


@pytest.mark.parametrize("case", [case for case in CASES if serves_fused_products(case)], ids=identify)
def test_fused_product(case: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """Products folded into statistics, without a buffer: a kernel that only Triton has."""
    monkeypatch.setenv("LOGITLESS_BACKEND", "triton")
    check(case | {"product": "fused"})
