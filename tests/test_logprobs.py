"""``logprobs``: every statistic and their gradients together, against dense definitions (bar as in test_contract)."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
import reference
from pairwise import pairwise
from test_contract import TYPES, identify, within_bar

FACTORS = {
    "dtype": list(TYPES),
    "shape": [(40, 7, 3), (24, 16, 50), (33, 8, 1000), (6, 12, 4099)],
    "student": ["linear", "dense"],
    "wanted": [(), ("entropy",), ("collision",), ("entropy", "collision")],
    "upstream": ["logprob", "all"],
    "strategy": ["auto", "recompute", "frozen", "stash", "forward"],
    "frozen_head": [False, True],
    "bias": [False, True],
    "options": [{}, {"softcap": 3.0}, {"temperature": 0.8, "scale": 1.2}, {"softcap": 5.0, "temperature": 1.5}],
    "ignored": [False, True],
    "compact": [None, False],
    "workspace": ["auto", "tight"],
    "keep": [None, [("min_p", 0.2)], [("top_k", 5)], [("top_p", 0.8)], [("top_k", 20), ("top_p", 0.7)], "ids"],
}


def valid(case: dict) -> bool:
    if case["student"] == "dense" and (case["frozen_head"] or case["bias"]):
        return False
    if case["strategy"] == "frozen" and case["keep"] == "ids":
        return False
    if case["strategy"] == "frozen":
        return case["frozen_head"] and not case["wanted"]
    return True


@pytest.mark.parametrize("case", pairwise(FACTORS, valid), ids=identify)
def test_logprobs(backend: str, case: dict) -> None:
    if backend != "torch" and case["dtype"] == "float64":
        pytest.skip("the kernels compute in float32; float64 is the torch backend's")
    n, _, v = case["shape"]
    results: dict[str, list] = {}
    for _ in range(8 if n * v < 2000 else 1):
        ours, truth, baseline = draw(case)
        for name, found in ours.items():
            results.setdefault(name, []).append((found, truth[name], baseline[name]))
    for name, draws in results.items():
        within_bar(name, *(torch.stack(parts) for parts in zip(*draws, strict=True)))


def draw(case: dict) -> list[dict]:
    """Values and gradients of one draw of inputs: ours, float64, and torch on materialised float32 logits."""
    n, h, v = case["shape"]
    dtype = TYPES[case["dtype"]]
    if case["student"] == "dense":
        inputs = [2 * torch.randn(n, v).to(dtype)]
    else:
        inputs = [torch.randn(n, h).to(dtype), (2 * h**-0.5 * torch.randn(v, h)).to(dtype)]
        inputs += [torch.randn(v).to(dtype)] if case["bias"] else []
    wants = [case["strategy"] != "forward" and (i == 0 or not case["frozen_head"]) for i in range(len(inputs))]
    targets = torch.randint(0, v, (n,))
    keep, filters = filters_of(case["keep"], n, v)
    if keep is not None:  # targets that are not kept have tests of their own
        mask = reference.kept(_dense(inputs, torch.float64, case["options"])[1], *filters)
        targets = mask.double().multinomial(1)[:, 0]
    if case["ignored"]:
        targets[::3] = -100
    names = ["logprob", "lse", "target_logit", *case["wanted"]]
    upstream = {name: torch.randn(n, dtype=torch.float64) for name in names}
    if case["upstream"] == "logprob":
        upstream = {name: u * (name == "logprob") for name, u in upstream.items()}

    def ours():
        leaves = [x.clone().requires_grad_(want) for x, want in zip(inputs, wants, strict=True)]
        logits = (ll.DenseLogits if len(leaves) == 1 else ll.LinearLogits)(*leaves, **case["options"])
        stats = ll.logprobs(
            logits,
            targets,
            **{name: True for name in case["wanted"]},
            keep=keep,
            strategy=case["strategy"],
            compact=case["compact"],
            workspace="auto" if case["workspace"] == "auto" else 12 * v + 20000,
        )
        assert (stats.entropy is None) == ("entropy" not in case["wanted"])
        assert (stats.collision is None) == ("collision" not in case["wanted"])
        found = {name: getattr(stats, name) for name in names}
        live = targets != -100
        with torch.no_grad():
            s = _dense(leaves, torch.float64, case["options"])[1]
            s = s if keep is None else reference.filtered(s, mask)
            assert torch.equal(stats.argmax[live], s.argmax(-1)[live])
            within_bar("max", stats.max_logit[live], s.amax(-1)[live], s.float().amax(-1)[live])
        assert not stats.max_logit[~live].any() and not stats.argmax[~live].any()
        return found, leaves

    def dense(kind: torch.dtype):
        leaves, s = _dense(inputs, kind, case["options"], wants)
        s = s if keep is None else reference.filtered(s, mask)
        live = targets != -100
        found = {}
        for name in names:
            full = torch.zeros(n, dtype=kind)
            row = getattr(reference, name)
            full[live] = row(s[live], targets[live]) if name in ("logprob", "target_logit") else row(s[live])
            found[name] = full
        return found, leaves

    outcomes = []
    for values, leaves in (ours(), dense(torch.float64), dense(torch.float32)):
        total = sum((values[name] * upstream[name].to(values[name].dtype)).sum() for name in names)
        outcome = {name: value.detach() for name, value in values.items()}
        wanted = [x for x in leaves if x.requires_grad]
        gradients = torch.autograd.grad(total, wanted) if wanted else ()
        outcomes.append(outcome | {f"gradient {i}": g for i, g in enumerate(gradients)})
    for i in range(sum(wants)):
        assert outcomes[0][f"gradient {i}"].dtype == dtype
        outcomes[2][f"gradient {i}"] = outcomes[2][f"gradient {i}"].to(dtype)
    return outcomes


def filters_of(which, n: int, v: int):
    """(what to pass as ``keep``, filters of reference.kept)."""
    kinds = {"min_p": ll.MinP, "top_k": ll.TopK, "top_p": ll.TopP}
    if which is None:
        return None, []
    if which == "ids":
        ids = torch.randint(-1, v, (n, 7))
        ids[:, 3] = torch.randint(0, v, (n,))
        return ll.KeepIds(ids), [("ids", ids)]
    keep = tuple(kinds[name](parameter) for name, parameter in which)
    return keep if len(keep) > 1 else keep[0], which


def _dense(inputs, dtype, options, wants=None):
    leaves = [x.detach().to(dtype) for x in inputs]
    if wants is not None:
        leaves = [x.requires_grad_(want) for x, want in zip(leaves, wants, strict=True)]
    return leaves, (reference.transform if len(leaves) == 1 else reference.logits)(*leaves, **options)


def test_confident_tokens_keep_their_gradient(backend: str) -> None:
    """A frozen head and p_y close to 1: the difference e_y - q must not be lost in W_y - E_q[W]."""
    hidden, weight = torch.randn(16, 8), torch.randn(50, 8)
    targets = (hidden @ weight.T).argmax(-1)
    hidden = hidden * 3
    exact_hidden = hidden.double().requires_grad_()
    (exact,) = torch.autograd.grad(reference.logprob(exact_hidden @ weight.double().T, targets).sum(), exact_hidden)
    dense_hidden = hidden.clone().requires_grad_()
    (dense,) = torch.autograd.grad(reference.logprob(dense_hidden @ weight.T, targets).sum(), dense_hidden)
    leaf = hidden.clone().requires_grad_()
    stats = ll.logprobs(ll.LinearLogits(leaf, weight), targets, strategy="frozen")
    (found,) = torch.autograd.grad(stats.logprob.sum(), leaf)
    within_bar("hidden", found, exact, dense)
