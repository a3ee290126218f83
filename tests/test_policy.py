"""Policy objectives against definitions written sequence by sequence in float64: value, gradient, layouts, means."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from logitless.losses import policy

LENGTHS = [5, 2, 0, 1, 4]
B, T = len(LENGTHS), 6
LIVE = sum(LENGTHS)
TOKEN_INPUTS = ("old_logprob", "ref_logprob", "teacher_logprob", "rollout_logprob", "entropy", "masked_logprob")
exp, log = torch.exp, torch.log


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """Padded [B, T] inputs; gaps are large enough that every clip and mask acts on some token."""
    torch.manual_seed(12)
    logprob = -3 * torch.rand(B, T, dtype=torch.float64)
    made = {"logprob": logprob}
    for name in TOKEN_INPUTS:
        made[name] = (logprob + 0.8 * torch.randn(B, T, dtype=torch.float64)).clamp(max=-0.01)
    made["entropy"] = made["entropy"].abs()
    made["masked_entropy"] = torch.rand(B, T, dtype=torch.float64)
    made["advantages"] = torch.randn(B, T, dtype=torch.float64)
    made["advantages"][0, 1] = 0
    made["correct"] = torch.rand(B, T) > 0.5
    made["mask"] = torch.arange(T) < torch.tensor(LENGTHS)[:, None]
    return made


def packed(batch: dict) -> dict:
    """The live tokens alone, end to end."""
    flat = {name: x[batch["mask"]] for name, x in batch.items() if name != "mask"}
    return flat | {"cu_seqlens": torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)}


def evaluate(objective, batch: dict, wrt=("logprob",), **options):
    """(result, gradients) of the tensors named in ``wrt``."""
    known = objective.reads | {"mask", "cu_seqlens", "weights", "entropy"}
    given = {name: x for name, x in batch.items() if name in known}
    leaves = {name: given[name].detach().clone().requires_grad_() for name in wrt}
    result = objective.from_logprobs(**{**given, **leaves}, **options)
    return result, torch.autograd.grad(result.loss, list(leaves.values()))


class Sequence:
    """One sequence's tensors as attributes lp, old, A, ...: what definitions below are written in."""

    def __init__(self, batch: dict, i: int):
        names = {"lp": "logprob", "old": "old_logprob", "ref": "ref_logprob", "T": "teacher_logprob"}
        names |= {"roll": "rollout_logprob", "A": "advantages", "H": "entropy", "correct": "correct"}
        names |= {"image": "masked_logprob", "image_H": "masked_entropy"}
        for short, name in names.items():
            setattr(self, short, batch[name][i, : LENGTHS[i]])

    @property
    def rho(self):
        return exp(self.lp - self.old)


def choose(condition, yes, no):
    return torch.where(condition, torch.tensor(yes, dtype=torch.float64), torch.tensor(no, dtype=torch.float64))


def clip(rho, low, high, A):
    return torch.stack([-A * rho, -A * rho.clamp(1 - low, 1 + high)]).amax(0)


def aggregate(losses: list, mode: str, norm: float | None = None, count_empty: bool = False):
    sequences = B if count_empty else sum(n > 0 for n in LENGTHS)
    if mode == "token-mean":
        return sum(x.sum() for x in losses) / LIVE
    if mode == "token-sum":
        return sum(x.sum() for x in losses)
    if mode == "seq-mean-token-mean":
        return sum(x.mean() for x in losses if len(x)) / sequences
    return sum(x.sum() for x in losses) / sequences / (norm or 1)


def gspo_ratio(s):
    return exp((s.lp - s.old).mean()).expand(len(s.lp))


def vespo(s):
    log_w = (s.lp - s.old).detach().clamp(-20, 20).sum().clamp(math.log(1e-8), 20)
    k, lam = choose(s.A >= 0, 2, 3), choose(s.A >= 0, 3, 2)
    return -exp(lam + k * log_w - lam * exp(log_w)) * s.A * s.lp


def gmpo(s):
    r = s.lp - s.old
    c = torch.where(s.A > 0, r.clamp(max=0.4), torch.where(s.A < 0, r.clamp(min=-0.4), 0))
    return -s.A * exp(c.mean())


def dppo(s, kind):
    p, q = exp(s.lp.detach()), exp(s.old)
    if kind == "tv":
        keep = torch.where(s.A > 0, p - q <= 0.1, p - q >= -0.1)
    else:
        kl = q * log(q / p) + (1 - q) * log((1 - q) / (1 - p))
        keep = ~torch.where(s.A > 0, (kl > 0.02) & (p > q), (kl > 0.02) & (p < q))
    return -s.A * s.rho.detach().clamp(max=1.2) * s.lp * keep


def dual(s):
    loss = clip(s.rho, 0.2, 0.2, s.A)
    return torch.where(s.A < 0, torch.minimum(loss, -s.A * 1.5), loss)


def two_sided(s):
    return -torch.minimum(s.rho.clamp(max=1.5) * s.A, s.rho.clamp(0.8, 1.2) * s.A)


def papo(s):
    k3 = exp(s.image - s.lp) - (s.image - s.lp) - 1
    return clip(s.rho, 0.2, 0.2, s.A) - 0.1 * k3.clamp(max=0.2) + 0.03 * s.H + 0.04 * s.image_H


def cispo(low, high):
    return lambda s: -s.rho.detach().clamp(low, high) * s.A * s.lp


def sapo(s):
    tau = choose(s.A > 0, 1, 1.05)
    return -torch.sigmoid(tau * (s.rho - 1)) * 4 / tau * s.A


# name: (objective, definition of a sequence's losses [len], mode, options of the mean)
CASES = {
    "ppo": (policy.ppo(dual=None), lambda s: clip(s.rho, 0.2, 0.2, s.A), "token-mean", {}),
    "ppo_dual": (policy.ppo(dual=1.5), dual, "token-mean", {}),
    "grpo": (policy.grpo(), lambda s: clip(s.rho, 0.2, 0.2, s.A), "seq-mean-token-mean", {"count_empty": True}),
    "dr_grpo": (policy.dr_grpo(7), lambda s: clip(s.rho, 0.2, 0.2, s.A), "sum", {"norm": 7, "count_empty": True}),
    "bnpo": (policy.bnpo(), lambda s: clip(s.rho, 0.2, 0.2, s.A), "token-mean", {}),
    "dapo": (policy.dapo(), lambda s: clip(s.rho, 0.2, 0.28, s.A), "token-mean", {}),
    "two_sided": (policy.two_sided(1.5), two_sided, "seq-mean-token-mean", {"count_empty": True}),
    "gspo": (policy.gspo(0.1), lambda s: clip(gspo_ratio(s), 0.1, 0.1, s.A), "seq-mean-token-mean", {}),
    "gspo_token": (
        policy.gspo_token(0.1),
        lambda s: clip(gspo_ratio(s).detach() * exp(s.lp - s.lp.detach()), 0.1, 0.1, s.A),
        "seq-mean-token-mean",
        {},
    ),
    "luspo": (policy.luspo(0.1), lambda s: clip(gspo_ratio(s), 0.1, 0.1, s.A), "sum", {"count_empty": True}),
    "gmpo": (policy.gmpo(), gmpo, "seq-mean-token-mean", {"count_empty": True}),
    "rloo": (
        policy.rloo(0.3),
        lambda s: clip(exp((s.lp - s.old).sum()).expand(len(s.lp)), 0.3, 0.3, s.A),
        "seq-mean-token-mean",
        {"count_empty": True},
    ),
    "cispo_verl": (policy.cispo(), cispo(0.8, 1.2), "token-mean", {}),
    "cispo_trl": (policy.cispo("trl", high=1.4), cispo(None, 1.4), "token-mean", {}),
    "cispo_open_instruct": (policy.cispo("open_instruct"), cispo(None, 1.272), "token-mean", {}),
    "cispo_tinker": (policy.cispo("tinker", low=0.5, high=1.3), cispo(0.5, 1.3), "token-mean", {}),
    "reinforce": (policy.reinforce(), lambda s: -s.A * s.lp, "sum", {}),
    "gpg": (policy.gpg(), lambda s: -s.A * s.lp, "token-mean", {}),
    "sapo": (policy.sapo(), sapo, "seq-mean-token-mean", {"count_empty": True}),
    "vespo": (policy.vespo(), vespo, "token-mean", {}),
    "dro": (policy.dro(0.3), lambda s: -(s.A * s.lp - 0.15 * (s.lp - s.old) ** 2), "token-mean", {}),
    "dppo_tv": (policy.dppo_tv(0.1, cap=1.2), lambda s: dppo(s, "tv"), "token-mean", {}),
    "dppo_kl": (policy.dppo_kl(0.02, cap=1.2), lambda s: dppo(s, "kl"), "token-mean", {}),
    "papo": (policy.papo(0.1, (0.03, 0.04)), papo, "seq-mean-token-mean", {"count_empty": True}),
    "grpo_kl_entropy": (
        policy.grpo(beta=0.3, kl="k2", entropy_coef=0.1, aggregation="token-sum"),
        lambda s: clip(s.rho, 0.2, 0.2, s.A) + 0.15 * (s.lp - s.ref) ** 2 - 0.1 * s.H,
        "token-sum",
        {},
    ),
}


@pytest.mark.parametrize("name", list(CASES))
def test_preset(name: str, batch: dict) -> None:
    objective, define, mode, options = CASES[name]
    wrt = ("logprob", *sorted(objective.statistics - {"logprob"}))
    result, gradients = evaluate(objective, batch, wrt)
    leaves = {key: batch[key].clone().requires_grad_() for key in wrt}
    wanted = aggregate([define(Sequence({**batch, **leaves}, i)) for i in range(B)], mode, **options)
    close(result.loss, wanted)
    for found, expected in zip(gradients, torch.autograd.grad(wanted, list(leaves.values()))):
        close(found, expected)
    assert any(gradient.count_nonzero() for gradient in gradients)


@pytest.mark.parametrize("name", list(CASES))
def test_packed_is_padded_and_masked_tokens_are_nothing(name: str, batch: dict) -> None:
    objective = CASES[name][0]
    wrt = ("logprob", *sorted(objective.statistics - {"logprob"}))
    short, short_gradients = evaluate(objective, packed(batch), wrt)
    rubbish = torch.tensor([math.nan, math.inf, -math.inf], dtype=torch.float64)
    dirty = {
        k: x if x.dtype == torch.bool else torch.where(batch["mask"], x, rubbish.repeat(B, 2)) for k, x in batch.items()
    }
    result, gradients = evaluate(objective, dirty, wrt)
    if objective.aggregation.count_empty or not objective.sequences:
        assert result.metrics["tokens"] == LIVE
    close(result.loss, short.loss)
    for key, value in short.terms.items():
        close(result.terms[key], value)
    for key, value in short.metrics.items():
        close(result.metrics[key], value)
    for found, expected in zip(gradients, short_gradients):
        close(found[batch["mask"]], expected)
        assert (found[~batch["mask"]] == 0).all()


@pytest.mark.parametrize("name", list(CASES))
def test_nothing_under_the_mask(name: str, batch: dict) -> None:
    objective = CASES[name][0]
    empty = {k: torch.full_like(x, math.nan) if x.is_floating_point() else x for k, x in batch.items()}
    result, gradients = evaluate(objective, empty | {"mask": torch.zeros(B, T, dtype=torch.bool)})
    assert result.loss == 0
    assert all(x == 0 for x in [*result.terms.values(), *result.metrics.values()])
    assert (gradients[0] == 0).all()


# ---- dL/dlogprob, written out


COEFFICIENTS = {
    "ppo": lambda s: -s.A * s.rho * ((s.A * (s.rho - 1) <= 0) | ((s.rho - 1).abs() <= 0.2)),
    "ppo_dual": lambda s: COEFFICIENTS["ppo"](s) * ~((s.A < 0) & (s.rho > 1.5)),
    "cispo_verl": lambda s: -s.rho.clamp(0.8, 1.2) * s.A,
    "gpg": lambda s: -s.A,
    "sapo": lambda s: -4 * s.rho * s.A * (g := torch.sigmoid(choose(s.A > 0, 1, 1.05) * (s.rho - 1))) * (1 - g),
    "dro": lambda s: -(s.A - 0.3 * (s.lp - s.old)),
}


@pytest.mark.parametrize("name", list(COEFFICIENTS))
def test_coefficient(name: str, batch: dict) -> None:
    objective = dataclasses.replace(CASES[name][0], aggregation="token-sum")
    (gradient,) = evaluate(objective, batch)[1]
    for i, n in enumerate(LENGTHS):
        close(gradient[i, :n], COEFFICIENTS[name](Sequence(batch, i)))


KL = {  # estimator: (value, gradient) of d and the ratio
    "k1": (lambda d, rho: d, lambda d, rho: torch.ones_like(d)),
    "abs": (lambda d, rho: d.abs(), lambda d, rho: d.sign()),
    "k2": (lambda d, rho: d**2 / 2, lambda d, rho: d),
    "k3": (lambda d, rho: exp(-d) + d - 1, lambda d, rho: 1 - exp(-d)),
    "ratio_k3": (lambda d, rho: rho * (exp(-d) + d - 1), lambda d, rho: rho * d),
    "k1+": (lambda d, rho: d, lambda d, rho: d),
    "k3+": (lambda d, rho: exp(-d) + d - 1, lambda d, rho: d),
    "rapo": (lambda d, rho: exp(-d) * -d - exp(-d) + 1, lambda d, rho: exp(-d) * d),
    "dph_forward_kl": (lambda d, rho: exp(d) - d - 1, lambda d, rho: exp(d) - 1),
    "dph_js": (
        lambda d, rho: exp(d) * d - (exp(d) + 1) * log((exp(d) + 1) / 2),
        lambda d, rho: exp(d) * log(2 * exp(d) / (exp(d) + 1)),
    ),
    "dph_alpha": (
        lambda d, rho: (exp(0.8 * d) - 0.8 * exp(d) - 0.2) / (0.2 * -0.8),
        lambda d, rho: (exp(d) - exp(0.8 * d)) / 0.2,
    ),
}


@pytest.mark.parametrize("estimator", list(KL))
def test_kl(estimator: str, batch: dict) -> None:
    value, slope = KL[estimator]
    objective = policy.compose(policy.Reinforce(), beta=0.5, kl=estimator, aggregation="token-sum")
    batch = batch | {"advantages": torch.zeros(B, T)}
    result, (gradient,) = evaluate(objective, batch)
    sequences = [Sequence(batch, i) for i in range(B)]
    close(result.terms["kl"], sum(value(s.lp - s.ref, s.rho).sum() for s in sequences))
    for i, s in enumerate(sequences):
        close(gradient[i, : LENGTHS[i]], 0.5 * slope(s.lp - s.ref, s.rho))


@pytest.mark.parametrize(
    "estimator, of", [("k1", None), ("k2", "reverse"), ("k3", "forward"), ("k3+", "reverse"), ("ratio_k3", "reverse")]
)
def test_expected_gradient_of_an_estimate(estimator: str, of: str | None) -> None:
    """On the policy's own tokens: over a whole vocabulary, weighted by their probabilities."""
    s, t = torch.randn(2, 7, dtype=torch.float64)
    s.requires_grad_()
    q, p = s.softmax(-1), t.softmax(-1)
    objective = policy.compose(policy.Reinforce(), beta=1.0, kl=estimator, aggregation="token-sum")
    given = {"logprob": s.log_softmax(-1), "ref_logprob": log(p), "advantages": torch.zeros(7), "weights": q.detach()}
    (gradient,) = torch.autograd.grad(objective.from_logprobs(**given).loss, s)
    divergence = {None: 0 * s, "reverse": q * log(q / p), "forward": p * log(p / q)}[of].sum()
    close(gradient, torch.autograd.grad(divergence, s)[0])


def test_kl_clamps(batch: dict) -> None:
    """Outside the bounds, as in verl: value at the bound, no gradient."""
    batch = batch | {"ref_logprob": batch["logprob"] + torch.tensor([-30.0, -25.0, -5.0, 0.5, 3.0, 30.0])}
    objective = policy.compose(policy.Reinforce(), beta=1.0, kl_clamp=(20, 10), aggregation="token-sum")
    result, (gradient,) = evaluate(objective, batch | {"advantages": torch.zeros(B), "mask": torch.ones(B, T)})
    d = torch.tensor([20, 20, 5, -0.5, -3, -20], dtype=torch.float64)
    close(result.terms["kl"], B * (exp(-d) + d - 1).clamp(max=10).sum())
    close(gradient[0], torch.tensor([0, 0, 1 - math.exp(-5), 1 - math.exp(0.5), 0, 0], dtype=torch.float64))


# ---- selections


def test_clip_cov(batch: dict) -> None:
    """The tokens left out are drawn among those within the bounds, the stated number of them."""
    flat = packed(batch)
    A, lp = flat["advantages"], flat["logprob"]
    A[A == 0] = 0.5  # so that no gradient is 0 but those of dropped tokens
    cov = (A - A.mean()) * (lp - lp.mean())
    eligible = (cov > 0.1) & (cov < 2)
    assert 3 < eligible.sum() < LIVE
    seen = torch.zeros(LIVE, dtype=torch.bool)
    for seed in range(40):
        generator = torch.Generator().manual_seed(seed)
        objective = policy.clip_cov(0.3, (0.1, 2), clip=100.0, generator=generator)
        result, (gradient,) = evaluate(objective, flat)
        dropped = gradient == 0
        assert dropped.sum() == int(0.3 * LIVE) == 3
        seen |= dropped
        close(gradient[~dropped], (-A * exp(lp - flat["old_logprob"]) / LIVE)[~dropped])
        close(result.metrics["kept_fraction"], torch.tensor(1 - 3 / LIVE, dtype=torch.float64))
    assert torch.equal(seen, eligible)


def test_kl_cov(batch: dict) -> None:
    flat = packed(batch)
    A, lp, old = flat["advantages"], flat["logprob"], flat["old_logprob"]
    top = ((A - A.mean()) * (lp - lp.mean())).topk(int(0.3 * LIVE)).indices
    _, (gradient,) = evaluate(policy.kl_cov(0.3, 0.5), flat)
    wanted = -A * exp(lp - old)
    wanted[top] += 0.5 * (lp - old).sign()[top]
    close(gradient, wanted / LIVE)


@pytest.mark.parametrize("selection", [policy.TopEntropy(0.3), policy.LowestProbability(0.3)])
def test_quantiles(selection, batch: dict) -> None:
    """Only the surrogate is selected; denominators and the KL penalty are not."""
    flat = packed(batch)
    if isinstance(selection, policy.TopEntropy):
        keep = flat["entropy"] >= flat["entropy"].quantile(0.7)
    else:
        keep = flat["logprob"] <= flat["logprob"].quantile(0.3)
    for data in (flat, batch):
        result, _ = evaluate(policy.gpg(selection=(selection,), beta=0.1), data)
        close(result.terms["policy"], (-flat["advantages"] * flat["logprob"] * keep).sum() / LIVE)
        d = flat["logprob"] - flat["ref_logprob"]
        close(result.terms["kl"], (exp(-d) + d - 1).mean())


def test_given_threshold_is_row_local(batch: dict) -> None:
    selection = policy.TopEntropy(threshold=batch["entropy"][0, 0])
    objective = policy.gpg(selection=(selection,))
    assert objective.row_local and not policy.gpg(selection=(policy.TopEntropy(),)).row_local
    flat = packed(batch)
    keep = flat["entropy"] >= flat["entropy"][0]
    close(evaluate(objective, batch)[0].loss, (-flat["advantages"] * flat["logprob"] * keep).mean())


# ---- corrections


def rejected(estimate, over, low, high):
    def factor(s):
        w = s.old - s.roll
        k = {"k1": -w, "k2": w**2 / 2, "k3": exp(w) - 1 - w}[estimate]
        if over != "token":
            k = {"seq_sum": k.sum, "seq_mean": k.mean, "seq_max": k.amax}[over]().expand(len(w))
        return (k >= low) & (k <= high)

    return factor


def bounded(level, mode, low, high, against="old"):
    def factor(s):
        w = getattr(s, against).detach() - s.roll
        w = {"token": w, "sequence": w.sum().expand(len(w)), "geometric": w.mean().expand(len(w))}[level]
        return exp(w).clamp(low, high) if mode == "truncate" else exp(w) * ((exp(w) >= low) & (exp(w) <= high))

    return factor


CORRECTIONS = {
    "tis": (policy.tis(1.1), bounded("token", "truncate", 0, 1.1)),
    "tis_sequence": (policy.tis(1.1, "sequence", low=0.5), bounded("sequence", "truncate", 0.5, 1.1)),
    "mis": (policy.mis(1.5), bounded("sequence", "mask", 0, 1.5)),
    "geometric": (policy.mis(1.2, "geometric", low=0.8), bounded("geometric", "mask", 0.8, 1.2)),
    "icepop": (policy.icepop(0.6, 1.6), bounded("token", "mask", 0.6, 1.6)),
    "bypass": (policy.tis(1.1, against="logprob"), bounded("token", "truncate", 0, 1.1, "lp")),
    "k1": (policy.Rejection(estimate="k1", high=0.3, low=-0.2), rejected("k1", "token", -0.2, 0.3)),
    "k2": (policy.Rejection(estimate="k2", over="seq_sum", high=0.4), rejected("k2", "seq_sum", -1e9, 0.4)),
    "k3": (policy.Rejection(estimate="k3", over="seq_mean", high=0.2), rejected("k3", "seq_mean", -1e9, 0.2)),
    "max": (policy.Rejection(estimate="k1", over="seq_max", high=0.5), rejected("k1", "seq_max", -1e9, 0.5)),
    "opsm": (policy.Opsm(0.05), lambda s: (s.A >= 0) | ((s.roll - s.lp).mean() <= 0.05)),
}


@pytest.mark.parametrize("name", list(CORRECTIONS))
def test_correction(name: str, batch: dict) -> None:
    """A constant factor on the surrogate, not on the KL penalty."""
    correction, factor = CORRECTIONS[name]
    objective = policy.grpo(correction=(correction,), beta=0.2, kl="k2", aggregation="token-mean")
    leaf = batch["logprob"].clone().requires_grad_()
    sequences = [Sequence(batch | {"logprob": leaf}, i) for i in range(B) if LENGTHS[i]]
    factors = [factor(s).detach() for s in sequences]
    losses = [clip(s.rho, 0.2, 0.2, s.A) * f + 0.1 * (s.lp - s.ref) ** 2 for s, f in zip(sequences, factors)]
    wanted = sum(x.sum() for x in losses) / LIVE
    assert torch.cat(factors).double().std() > 0  # neither everything nor nothing is cut
    for data in (batch, packed(batch)):
        result, (gradient,) = evaluate(objective, data)
        close(result.loss, wanted)
        close(result.metrics["factor_mean"], torch.cat(factors).double().mean())
        (expected,) = torch.autograd.grad(wanted, leaf, retain_graph=True)
        close(gradient, expected if data is batch else expected[batch["mask"]])


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_normalised_weights(level: str, batch: dict) -> None:
    objective = policy.gpg(correction=(policy.tis(1.1, level, normalize=True),))
    sequences = [Sequence(batch, i) for i in range(B) if LENGTHS[i]]
    factors = [bounded(level, "truncate", 0, 1.1)(s) for s in sequences]
    mean = torch.cat(factors if level == "token" else [f[:1] for f in factors]).mean()
    wanted = sum((-s.A * s.lp * f / mean).sum() for s, f in zip(sequences, factors)) / LIVE
    close(evaluate(objective, batch)[0].loss, wanted)


def test_rollout_inside_vespo(batch: dict) -> None:
    def define(s):
        log_w = (s.lp - s.old).sum() + (s.old - s.roll).clamp(math.log(1e-8), 20).sum()
        k, lam = choose(s.A >= 0, 2, 3), choose(s.A >= 0, 3, 2)
        return (-exp(lam + k * log_w - lam * exp(log_w)) * s.A * s.lp).sum()

    wanted = sum(define(Sequence(batch, i)) for i in range(B)) / LIVE
    close(evaluate(policy.vespo(rollout=True), batch)[0].loss, wanted)


# ---- aggregation


@pytest.mark.parametrize("count_empty", [False, True])
@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"])
def test_aggregation(mode: str, count_empty: bool, batch: dict) -> None:
    norm = 9.0 if mode.endswith("norm") else None
    objective = policy.gpg(aggregation=policy.Aggregation(mode, norm, count_empty))
    losses = [-s.A * s.lp for s in (Sequence(batch, i) for i in range(B))]
    wanted = aggregate(losses, mode, norm, count_empty)
    close(evaluate(objective, batch)[0].loss, wanted)
    close(evaluate(objective, packed(batch))[0].loss, wanted)
    own = LIVE if mode == "token-mean" else B if count_empty else sum(n > 0 for n in LENGTHS)
    close(evaluate(objective, batch, denominator=torch.tensor(2.5 * own))[0].loss, wanted / 2.5)


@pytest.mark.parametrize("name", list(CASES))
def test_micro_batches_add_up(name: str, batch: dict) -> None:
    """With a common denominator the losses of two micro-batches sum to the whole batch's."""
    objective = CASES[name][0]
    if objective.aggregation.mode == "bnpo":
        objective = dataclasses.replace(objective, aggregation="dapo")
    denominator = 3.0 if objective.aggregation.mode != "token-sum" else None
    whole = evaluate(objective, batch, denominator=denominator)[0]
    parts = [
        evaluate(objective, {k: x[rows] for k, x in batch.items()}, denominator=denominator)[0]
        for rows in (slice(0, 2), slice(2, B))
    ]
    close(sum(part.loss for part in parts), whole.loss)
    for key, value in whole.terms.items():
        close(sum(part.terms[key] for part in parts), value)


def test_weights_per_token_and_per_sequence(batch: dict) -> None:
    of_sequence, of_token = torch.rand(B), torch.rand(B, T)
    losses = [-s.A * s.lp for s in (Sequence(batch, i) for i in range(B))]
    for given, weights in ((of_sequence, of_sequence[:, None].expand(B, T)), (of_token, of_token)):
        wanted = sum((x * weights[i, : len(x)]).sum() for i, x in enumerate(losses)) / LIVE
        close(evaluate(policy.gpg(), batch | {"weights": given})[0].loss, wanted)
        flat = packed(batch) | {"weights": given if given.dim() == 1 else given[batch["mask"]]}
        close(evaluate(policy.gpg(), flat)[0].loss, wanted)


def test_vapo_nll(batch: dict) -> None:
    flat = packed(batch)
    A, lp, old = flat["advantages"], flat["logprob"], flat["old_logprob"]
    wanted = clip(exp(lp - old), 0.2, 0.28, A).mean() - 0.1 * lp[flat["correct"]].mean()
    result, (gradient,) = evaluate(policy.vapo_nll(), flat)
    close(result.loss, wanted)
    without = evaluate(policy.dapo(), flat)
    close(gradient[~flat["correct"]], without[1][0][~flat["correct"]])
    result, (gradient,) = evaluate(policy.vapo_nll(), flat | {"correct": torch.zeros(LIVE)})  # none: nothing is added
    close(result.loss, without[0].loss)
    close(gradient, without[1][0])


@pytest.mark.parametrize("old", [True, False])
def test_value_loss(old: bool, batch: dict) -> None:
    values, returns, previous = batch["logprob"], batch["ref_logprob"], batch["old_logprob"] if old else None
    leaf = values.clone().requires_grad_()
    options = {"clip": 0.3, "mask": batch["mask"], "aggregation": "seq-mean-token-mean"}
    result = policy.value_loss(leaf, returns, previous, **options)
    twin = values.clone().requires_grad_()
    square = (twin - returns) ** 2
    if old:
        clipped = previous + (twin - previous).clamp(-0.3, 0.3)
        square = torch.maximum(square, (clipped - returns) ** 2)
    wanted = aggregate([0.5 * square[i, :n] for i, n in enumerate(LENGTHS)], "seq-mean-token-mean")
    close(result.loss, wanted)
    close(*[torch.autograd.grad(x, y)[0] for x, y in ((result.loss, leaf), (wanted, twin))])


# ---- what the engine relies on


@pytest.mark.parametrize("name", list(CASES))
def test_row_local(name: str, batch: dict) -> None:
    """Value and weights are separate; row-local objectives can be evaluated on any of the tokens."""
    objective = CASES[name][0]
    result, (gradient,) = evaluate(objective, batch)
    given = {k: x for k, x in batch.items() if k in objective.reads - objective.statistics}
    tokens = objective.prepare(given, like=batch["logprob"], mask=batch["mask"])
    weights = objective.weights(tokens)
    statistics = {k: torch.where(batch["mask"], batch[k], 0).reshape(-1) for k in objective.statistics}
    close((weights * objective.value(tokens, **statistics)).sum(), result.loss)
    moved = torch.eye(B * T, dtype=torch.float64)[batch["mask"].reshape(-1)] * 0.1 + statistics["logprob"]
    values = [objective.value(tokens, **statistics | {"logprob": lp}) for lp in [statistics["logprob"], *moved]]
    changed = torch.stack(values[1:]) != values[0]
    others = changed & ~torch.eye(B * T, dtype=torch.bool)[batch["mask"].reshape(-1)]
    assert objective.row_local != others.any()
    if objective.row_local:
        rows = [slice(0, 7), slice(7, B * T)]
        values = [objective.value(tokens.rows(r), **{k: x[r] for k, x in statistics.items()}) for r in rows]
        close((weights * torch.cat(values)).sum(), result.loss)


def test_sequence_corrections_of_inputs_are_known_beforehand(batch: dict) -> None:
    objective = policy.ppo(correction=(policy.mis(1.5),))
    assert objective.row_local and "rollout_logprob" in objective.inputs and objective.sequences
    given = {k: x for k, x in packed(batch).items() if k in objective.inputs}
    tokens = objective.prepare(given, like=given["advantages"], cu_seqlens=packed(batch)["cu_seqlens"])
    lp = packed(batch)["logprob"]
    values = [objective.value(tokens.rows(r), logprob=lp[r]) for r in (slice(0, 3), slice(3, LIVE))]
    close((objective.weights(tokens) * torch.cat(values)).sum(), evaluate(objective, batch)[0].loss)
    with pytest.raises(ValueError, match="old_logprob"):
        objective.from_logprobs(logprob=lp, advantages=lp, rollout_logprob=lp, cu_seqlens=packed(batch)["cu_seqlens"])
    assert not policy.ppo(correction=(policy.tis(level="sequence", against="logprob"),)).row_local


def test_metrics(batch: dict) -> None:
    result, _ = evaluate(policy.ppo((0.1, 0.2), dual=None), batch)
    flat = packed(batch)
    A, r = flat["advantages"], flat["logprob"] - flat["old_logprob"]
    wanted = {
        "tokens": torch.tensor(LIVE),
        "clip_fraction_low": ((exp(r) < 0.9) & (A < 0)).double().mean(),
        "clip_fraction_high": ((exp(r) > 1.2) & (A > 0)).double().mean(),
        "approx_kl_k1": -r.mean(),
        "approx_kl_k3": (exp(r) - 1 - r).mean(),
        "ratio_mean": exp(r).mean(),
        "ratio_min": exp(r).min(),
        "ratio_max": exp(r).max(),
        "entropy": flat["entropy"].mean(),
    }
    assert result.metrics.keys() == wanted.keys()
    assert 0 < wanted["clip_fraction_low"] < 1 and 0 < wanted["clip_fraction_high"] < 1
    for name, value in wanted.items():
        close(result.metrics[name], value)
        assert not result.metrics[name].requires_grad and result.metrics[name].dim() == 0


def test_on_policy(batch: dict) -> None:
    """Without old_logprob every ratio is 1, and the gradient is REINFORCE's."""
    data = {k: x for k, x in batch.items() if k in ("logprob", "advantages", "mask")}
    _, (gradient,) = evaluate(policy.ppo(), data)
    close(gradient, evaluate(policy.gpg(), data)[1][0])


@pytest.mark.parametrize("gap", [1e3, -1e3])
@pytest.mark.parametrize("name", [name for name in CASES if name != "reinforce"])
def test_extreme_ratios(name: str, gap: float, batch: dict) -> None:
    """Neither NaN nor infinity, in float32 too."""
    data = {k: x.float() if x.is_floating_point() else x for k, x in batch.items()}
    for other in ("old_logprob", "ref_logprob"):
        data[other] = data["logprob"] - gap
    result, gradients = evaluate(CASES[name][0], data)
    found = [result.loss, *result.terms.values(), *result.metrics.values(), *gradients]
    assert all(x.isfinite().all() for x in found)
    assert result.loss.dtype == torch.float32


@pytest.mark.parametrize("level", ["token", "sequence-token"])
def test_clamped_log_ratio(level: str, batch: dict) -> None:
    """verl's clamps: value at the bound, and no gradient outside."""
    objective = policy.compose(policy.Importance(), ratio=policy.Ratio(level, low=-0.2, high=0.1))
    leaf = batch["logprob"].clone().requires_grad_()
    wanted = 0
    for s in (Sequence(batch | {"logprob": leaf}, i) for i in range(B) if LENGTHS[i]):
        r = s.lp - s.old if level == "token" else (s.lp - s.old).detach().mean() + s.lp - s.lp.detach()
        wanted = wanted + (-s.A * exp(r.clamp(-0.2, 0.1))).sum() / LIVE
    result, (gradient,) = evaluate(objective, batch)
    close(result.loss, wanted)
    close(gradient, torch.autograd.grad(wanted, leaf)[0])


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", [*CASES, *CORRECTIONS, "clip_cov", "kl_cov", "top_entropy", "vapo_nll"])
def test_nothing_waits_for_the_device(name: str, layout: str, batch: dict) -> None:
    """On torch's meta device whatever reads a value of a tensor raises."""
    others = {"clip_cov": policy.clip_cov(), "kl_cov": policy.kl_cov(), "vapo_nll": policy.vapo_nll()}
    others |= {"top_entropy": policy.gpg(selection=(policy.TopEntropy(),))}
    others |= {key: policy.ppo(correction=(correction,)) for key, (correction, _) in CORRECTIONS.items()}
    objective = CASES[name][0] if name in CASES else others[name]
    data = {k: x.to("meta") for k, x in (packed(batch) if layout == "packed" else batch).items()}
    result, (gradient,) = evaluate(objective, data)
    found = [result.loss, *result.terms.values(), *result.metrics.values()]
    assert all(x.device.type == "meta" and x.dim() == 0 for x in found)
    assert gradient.shape == data["logprob"].shape


def test_low_precision_is_computed_in_float32(batch: dict) -> None:
    data = {k: x.bfloat16() if x.is_floating_point() else x for k, x in batch.items()}
    result, (gradient,) = evaluate(policy.grpo(), data)
    exact = evaluate(policy.grpo(), {k: x.double() if x.is_floating_point() else x for k, x in data.items()})[0]
    assert result.loss.dtype == torch.float32 and gradient.dtype == torch.bfloat16
    torch.testing.assert_close(result.loss.double(), exact.loss, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["grpo", "vespo", "top_entropy"])
def test_compiles_in_one_graph(name: str, batch: dict) -> None:
    others = {"grpo": policy.grpo(correction=(policy.mis(),), beta=0.1)}
    others |= {"top_entropy": policy.gpg(selection=(policy.TopEntropy(),))}
    objective = others.get(name) or CASES[name][0]
    leaf = (flat := packed(batch))["logprob"].requires_grad_()
    inputs = {k: x for k, x in flat.items() if k in objective.reads | {"cu_seqlens"}}

    def loss(leaf):
        return objective.from_logprobs(**inputs | {"logprob": leaf}).loss

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    close(*[torch.autograd.grad(f(leaf), leaf)[0] for f in (compiled, loss)])


def test_long_sequences_in_float32() -> None:
    lp = torch.rand(2, 100_000)
    ratio = policy.gspo(1e9).from_logprobs(logprob=lp, old_logprob=torch.zeros_like(lp), advantages=torch.ones(2))
    close(ratio.metrics["ratio_max"], exp(lp.double().mean(1)).max(), rtol=3e-7)


def test_parts_that_may_hold_tensors_are_equal_to_themselves_alone() -> None:
    may_hold = ((policy.TopEntropy, "threshold"), (policy.ClipCovariance, "share"), (policy.PositiveNLL, "share"))
    for make, name in may_hold:
        one = make(**{name: 0.2})
        assert one == one and one != make(**{name: 0.3})
    assert policy.KL(0.1) == policy.KL(0.1) != policy.KL(0.2)


def test_names_that_occur_again(batch: dict) -> None:
    two = (policy.KL(0.1, "k2"), policy.KL(0.2, "k3"), policy.KL(0.3, "k1", "teacher_logprob"))
    result, _ = evaluate(policy.gpg(penalties=two), batch)
    assert list(result.terms) == ["policy", "kl", "kl_2", "kl_teacher"]
    terms = result.terms
    close(result.loss, terms["policy"] + 0.1 * terms["kl"] + 0.2 * terms["kl_2"] + 0.3 * terms["kl_teacher"])


def test_no_tokens() -> None:
    empty = torch.zeros(0, dtype=torch.float64)
    result = policy.dapo(beta=0.1).from_logprobs(logprob=empty, advantages=empty, ref_logprob=empty)
    assert result.loss == 0 and all(x == 0 for x in result.metrics.values())


def test_tokens_after_the_last_sequence(batch: dict) -> None:
    flat = packed(batch)
    longer = {k: x if k == "cu_seqlens" else torch.cat([x, x.new_full((3,), 5)]) for k, x in flat.items()}
    for objective in (policy.gspo(0.1), policy.dapo()):
        result, (gradient,) = evaluate(objective, longer)
        close(result.loss, evaluate(objective, flat)[0].loss)
        assert (gradient[LIVE:] == 0).all()


def test_bad_arguments(batch: dict) -> None:
    lp, A = batch["logprob"], batch["advantages"]
    bad = [
        (ValueError, "advantages: needed", lambda: policy.ppo().from_logprobs(logprob=lp)),
        (ValueError, "ref_logprob: needed", lambda: policy.ppo(beta=1.0).from_logprobs(logprob=lp, advantages=A)),
        (ValueError, "entropy: needed", lambda: policy.ppo(entropy_coef=1.0).from_logprobs(logprob=lp, advantages=A)),
        (ValueError, "advantages: shape", lambda: policy.ppo().from_logprobs(logprob=lp, advantages=A[:, 1:])),
        (ValueError, "logprob: needs the shape", lambda: policy.ppo().from_logprobs(logprob=lp[None], advantages=A)),
        (ValueError, "cu_seqlens: needed", lambda: policy.gspo().from_logprobs(logprob=lp[0], advantages=A[0])),
        (TypeError, "logprob: a tensor", lambda: policy.ppo().from_logprobs(logprob=1.0, advantages=A)),
        (TypeError, "correct: not an input", lambda: policy.ppo().from_logprobs(logprob=lp, advantages=A, correct=A)),
        (
            ValueError,
            "no gradient",
            lambda: policy.ppo().from_logprobs(logprob=lp, advantages=A.clone().requires_grad_()),
        ),
        (ValueError, "denominator: aggregation 'dapo'", lambda: evaluate(policy.ppo(aggregation="dapo"), batch)),
        (ValueError, "denominator: aggregation 'bnpo'", lambda: evaluate(policy.bnpo(), batch, denominator=3)),
        (ValueError, "denominator", lambda: evaluate(policy.ppo(), batch, denominator=-1.0)),
        (ValueError, "aggregation: one of", lambda: policy.ppo(aggregation="mean")),
        (ValueError, "norm", lambda: policy.Aggregation("seq-mean-token-sum-norm")),
        (TypeError, "high: a number", lambda: policy.tis("3")),
        (ValueError, "mode: ", lambda: policy.ImportanceCorrection(mode="cut")),
        (ValueError, "against: ", lambda: policy.tis(against="ref_logprob")),
        (ValueError, "high: at least one", lambda: policy.Rejection()),
        (ValueError, "level: one of", lambda: policy.Ratio("word")),
        (ValueError, "share: must lie", lambda: policy.TopEntropy(1.5)),
        (ValueError, "entropy: shape", lambda: evaluate(policy.ppo(), batch | {"entropy": batch["entropy"][:, 0]})),
        (ValueError, "convention: one of", lambda: policy.cispo("openrlhf")),
        (ValueError, "low: trl", lambda: policy.cispo("trl", low=0.1)),
        (ValueError, "estimator: one of", lambda: policy.grpo(beta=0.1, kl="k4")),
        (TypeError, "correction: a tuple", lambda: policy.ppo(correction=policy.tis())),
        (ValueError, "dual: must be greater", lambda: policy.ppo(dual=1.0)),
        (
            ValueError,
            "cu_seqlens: must rise",
            lambda: evaluate(policy.gspo(), packed(batch) | {"cu_seqlens": torch.tensor([0, 99])}),
        ),
        (
            TypeError,
            "cu_seqlens",
            lambda: evaluate(policy.gspo(), packed(batch) | {"cu_seqlens": torch.tensor([0.0, 9])}),
        ),
        (
            ValueError,
            "cu_seqlens: is for packed",
            lambda: evaluate(policy.gspo(), batch | {"cu_seqlens": torch.tensor([0, 9])}),
        ),
    ]
    for error, match, call in bad:
        with pytest.raises(error, match=match):
            call()


def close(found: torch.Tensor, expected: torch.Tensor, rtol: float = 1e-10, atol: float = 1e-13) -> None:
    torch.testing.assert_close(found.double(), expected.double(), rtol=rtol, atol=atol)
