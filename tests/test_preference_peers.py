"""Preference losses against TRL's trainers: value, and gradient with respect to log-probabilities or logits."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import nullcontext
from functools import partial
from types import SimpleNamespace

import pytest
import torch

import peers
from logitless.losses import preference

LENGTHS = [5, 2, 4, 3, 1, 6]  # three chosen, then three rejected
S, T = len(LENGTHS), 7  # positions; the first is the prompt's, so there are T - 1 log-probabilities
LINKS = {"reverse_kl": "reverse_kl", "forward_kl": "forward_kl", "js": "js_divergence", "alpha": "alpha_divergence"}


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """For what the peers make of Python numbers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """ids and completion [S, T]; of the tokens after the first logprob, ref_logprob, collision [S, T - 1]."""
    torch.manual_seed(3)
    completion = (torch.arange(T) >= 1) & (torch.arange(T) <= torch.tensor(LENGTHS)[:, None])
    mask = completion[:, 1:]
    logprob = -2 * torch.rand(S, T - 1) * mask
    ref_logprob = (logprob + torch.randn(S, T - 1)).clamp(max=-0.01) * mask
    collision = torch.rand(S, T - 1)
    ids = torch.randint(11, (S, T))
    return {"ids": ids, "completion": completion.long(), "mask": mask} | {
        "logprob": logprob,
        "ref_logprob": ref_logprob,
        "collision": collision,
    }


def differentiate(loss, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    at = at.clone().requires_grad_()
    value = loss(at)
    return value.detach(), *torch.autograd.grad(value, at)


def ours(method, batch: dict, dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    given = {"mask": batch["mask"], "ref_logprob": batch["ref_logprob"].to(dtype), "collision": batch["collision"]}
    return differentiate(lambda x: method.from_logprobs(logprob=x, **given).loss, batch["logprob"].to(dtype))


def agree(found: tuple, expected: tuple, rtol: float = 1e-12) -> None:
    assert expected[1].count_nonzero()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=rtol / 100, check_dtype=False)


def bound(functions: SimpleNamespace, *methods: str, **state) -> SimpleNamespace:
    """In the place of a trainer."""
    usual = {"accelerator": peers.Accelerator(), "model": SimpleNamespace(training=False), "aux_loss_enabled": False}
    made = SimpleNamespace(**usual, _metrics=defaultdict(lambda: defaultdict(list)), _tp_size=1, **state)
    for name in methods:
        setattr(made, name, partial(getattr(functions, name), made))
    return made


def outputs(logprob: torch.Tensor, collision: torch.Tensor | None = None) -> SimpleNamespace:
    """Of a model with TRL's fused head, which gives 0 where labels are ignored."""
    nothing = torch.zeros_like(logprob)
    made = {"log_probs": logprob, "entropy": nothing, "mean_logits": nothing, "is_top1": nothing.bool()}
    return SimpleNamespace(**made, log_sum_sq_probs=nothing if collision is None else collision.log())


# ---- DPO


@pytest.fixture
def dpo_trainer():
    known = {"disable_gradient_checkpointing": lambda *given: nullcontext(), "is_peft_model": lambda model: False}
    return peers.load("trl", "trainer/dpo_trainer.py", "DPOTrainer._compute_loss", **known)


def trl_dpo(functions, batch: dict, *types: str, weights=None, dtype: torch.dtype = torch.float64, **changed):
    usual = {"beta": 0.3, "label_smoothing": 0.0, "f_divergence_type": "reverse_kl", "f_alpha_divergence_coef": 0.5}
    usual |= {"ld_alpha": None, "use_weighting": False, "precompute_ref_logps": False, "_total_train_tokens": 0}
    args = SimpleNamespace(gradient_checkpointing_kwargs=None, discopop_tau=0.7)
    inputs = {"input_ids": batch["ids"], "completion_mask": batch["completion"], "attention_mask": batch["completion"]}
    reference = outputs(batch["ref_logprob"].to(dtype))

    def loss(logprob: torch.Tensor) -> torch.Tensor:
        state = {**usual, **changed, "args": args, "loss_types": types, "loss_weights": weights or [1.0] * len(types)}
        self = bound(functions, ref_model=lambda **given: reference, **state)
        found = outputs(logprob * batch["mask"], batch["collision"])
        return functions._compute_loss(self, lambda **given: found, inputs, False)

    return differentiate(loss, batch["logprob"].to(dtype))


SMOOTHED = ("exo_pair", "robust", "aot", "aot_unpaired")
OF_SCORES = ("sigmoid", "hinge", "ipo", "exo_pair", "robust", "discopop", "sigmoid_norm")
OF_LOGRATIOS = ("nca_pair", "bco_pair", "sppo_hard", "aot_unpaired", "apo_zero", "apo_down")


def dpo(loss_type: str, **options) -> preference.Preference:
    options |= {"label_smoothing": 0.1} if loss_type in SMOOTHED else {}
    return preference.dpo(loss_type, beta=0.3, discopop_tau=0.7, **options)


@pytest.mark.parametrize("loss_type", [*OF_SCORES, *OF_LOGRATIOS, "aot", "sft"])
def test_dpo(loss_type: str, dpo_trainer, batch: dict) -> None:
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    agree(ours(dpo(loss_type), batch), trl_dpo(dpo_trainer, batch, loss_type, label_smoothing=smoothing))


@pytest.mark.parametrize("link", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("loss_type", OF_SCORES)
def test_f_dpo(loss_type: str, link: str, dpo_trainer, batch: dict) -> None:
    settings = {"f_divergence_type": LINKS[link], "label_smoothing": 0.1 if loss_type in SMOOTHED else 0.0}
    settings |= {"f_alpha_divergence_coef": 0.3, "dtype": torch.float32 if link == "alpha" else torch.float64}
    expected = trl_dpo(dpo_trainer, batch, loss_type, **settings)
    found = ours(dpo(loss_type, f_divergence=link, f_alpha=0.3), batch, settings["dtype"])
    agree(found, expected, 1e-5 if link == "alpha" else 1e-12)  # TRL's alpha takes nothing wider than float32


@pytest.mark.parametrize("link", ["forward_kl", "js", "alpha"])
@pytest.mark.parametrize("loss_type", [*OF_LOGRATIOS, "aot"])
def test_losses_of_trl_that_know_no_f_divergence(loss_type: str, link: str, dpo_trainer, batch: dict) -> None:
    """They read log-ratios whatever the divergence, where ours read scores; aot, which has none, refuses it."""
    smoothing = 0.1 if loss_type in SMOOTHED else 0.0
    options = {"f_divergence_type": LINKS[link], "label_smoothing": smoothing, "dtype": torch.float32}
    expected = trl_dpo(dpo_trainer, batch, loss_type, **options)
    agree(ours(dpo(loss_type), batch, torch.float32), expected, 1e-5)
    if loss_type == "aot":
        with pytest.raises(ValueError, match="link"):
            dpo("aot", f_divergence=link)
    else:
        found = ours(dpo(loss_type, f_divergence=link), batch, torch.float32)
        assert not torch.allclose(found[1], expected[1], rtol=1e-3)


def test_mpo(dpo_trainer, batch: dict) -> None:
    types, weights = ("sigmoid", "bco_pair", "sft"), [0.8, 0.2, 1.0]
    expected = trl_dpo(dpo_trainer, batch, *types, weights=weights)
    agree(ours(preference.mpo(tuple(weights), beta=0.3, nll_average="token"), batch), expected)
    agree(ours(preference.dpo(types, loss_weights=weights, beta=0.3), batch), expected)


@pytest.mark.parametrize("ld_alpha", [0.0, 0.4])
def test_ld_dpo(ld_alpha: float, dpo_trainer, batch: dict) -> None:
    expected = trl_dpo(dpo_trainer, batch, "sigmoid", ld_alpha=ld_alpha)
    agree(ours(preference.ld_dpo(ld_alpha, beta=0.3), batch), expected)


@pytest.mark.parametrize("loss_type", ["sigmoid", "ipo", "apo_down"])
def test_wpo(loss_type: str, dpo_trainer, batch: dict) -> None:
    agree(ours(dpo(loss_type, wpo=True), batch), trl_dpo(dpo_trainer, batch, loss_type, use_weighting=True))


# ---- KTO


@pytest.mark.parametrize("labels", [[1, 0, 0, 1, 1, 0], [1] * 6, [0] * 6])
@pytest.mark.parametrize("loss_type, kl_is_positive", [("kto", True), ("kto", False), ("apo_zero_unpaired", False)])
def test_kto(loss_type: str, kl_is_positive: bool, labels: list, batch: dict) -> None:
    known = {"disable_gradient_checkpointing": lambda *given: nullcontext(), "is_peft_model": lambda model: False}
    names = ["KTOTrainer._compute_loss", "KTOTrainer._compute_kl_logps"]
    functions = peers.load("trl", "trainer/kto_trainer.py", *names, **known)
    desirable = torch.tensor(labels).bool()
    unrelated = -torch.rand(2, S, T - 1)  # the policy's, the reference's
    unrelated[int(kl_is_positive)] *= 1.5
    inputs = {"input_ids": batch["ids"], "completion_mask": batch["completion"], "attention_mask": batch["completion"]}
    inputs |= {f"KL_{name}": x + (name == "input_ids") for name, x in inputs.items()} | {"label": torch.tensor(labels)}
    usual = {"beta": 0.3, "desirable_weight": 1.2, "undesirable_weight": 0.7, "precompute_ref_logps": False}
    usual |= {"loss_type": loss_type, "calculate_KL": loss_type == "kto", "_total_train_tokens": 0}
    usual["args"] = SimpleNamespace(gradient_checkpointing_kwargs=None)

    def model(logprob: torch.Tensor, of_unrelated: torch.Tensor):
        found = {True: outputs(logprob * batch["mask"]), False: outputs(of_unrelated)}
        return lambda input_ids, **given: found[input_ids is batch["ids"]]

    def expected(logprob: torch.Tensor) -> torch.Tensor:
        state = {"ref_model": model(batch["ref_logprob"], unrelated[1]), **usual}
        self = bound(functions, "_compute_kl_logps", **state)
        return functions._compute_loss(self, model(logprob, unrelated[0]), inputs, False)

    method = {"kto": preference.kto, "apo_zero_unpaired": preference.apo_zero_unpaired}[loss_type]
    kl = {"kl": (unrelated[0] - unrelated[1]).sum(1).mean()} if loss_type == "kto" else {}

    def found(logprob: torch.Tensor) -> torch.Tensor:
        given = {"ref_logprob": batch["ref_logprob"], "mask": batch["mask"], "desirable": desirable, **kl}
        return method(0.3, desirable_weight=1.2, undesirable_weight=0.7).from_logprobs(logprob=logprob, **given).loss

    agree(differentiate(found, batch["logprob"]), differentiate(expected, batch["logprob"]))


# ---- without a reference: these trainers make log-probabilities themselves, from logits


@pytest.fixture
def softmax():
    known = {"is_triton_available": lambda: False}
    return peers.load("trl", "trainer/utils.py", "selective_log_softmax", **known).selective_log_softmax


def from_logits(method, batch: dict, logits: torch.Tensor):
    """Our value and gradient on logits [S, T, V]."""

    def loss(logits: torch.Tensor) -> torch.Tensor:
        logprob = logits[:, :-1].log_softmax(-1).gather(-1, batch["ids"][:, 1:, None])[..., 0]
        return method.from_logprobs(logprob=logprob, mask=batch["mask"]).loss

    return differentiate(loss, logits)


def trl_from_logits(functions, batch: dict, logits: torch.Tensor, **state):
    """Of CPO and ORPO."""
    labels = torch.where(batch["completion"] == 1, batch["ids"], -100)
    inputs = {"concatenated_labels": labels, "concatenated_input_ids": batch["ids"]}
    inputs["concatenated_attention_mask"] = (torch.arange(T) <= torch.tensor(LENGTHS)[:, None]).long()
    state |= {"is_encoder_decoder": False, "pad_token_id": 0, "padding_value": 0}
    state |= {"get_batch_logps": functions.get_batch_logps, "concatenated_inputs": lambda *given, **also: inputs}
    methods = [name for name in ("concatenated_forward", "cpo_loss", "odds_ratio_loss") if hasattr(functions, name)]

    def loss(logits: torch.Tensor) -> torch.Tensor:
        self = bound(functions, *methods, **state)
        given = (self, lambda *given, **also: SimpleNamespace(logits=logits), {"chosen_labels": labels[: S // 2]})
        return functions.get_batch_loss_metrics(*given)[0]

    return differentiate(loss, logits)


CPO = {
    "cpo": ("sigmoid", {}, preference.cpo(beta=0.3, alpha=0.7)),
    "smoothed": ("sigmoid", {"label_smoothing": 0.1}, preference.cpo(beta=0.3, alpha=0.7, label_smoothing=0.1)),
    "hinge": ("hinge", {}, preference.cpo("hinge", beta=0.3, alpha=0.7)),
    "ipo": ("ipo", {}, preference.cpo("ipo", beta=0.3, alpha=0.7)),
    "simpo": ("simpo", {"cpo_alpha": 0}, preference.simpo(beta=0.3)),
    "cpo_simpo": ("simpo", {}, preference.simpo(beta=0.3, alpha=0.7)),
    "alphapo": ("simpo", {"cpo_alpha": 0, "alpha": 0.25}, preference.alphapo(0.25, beta=0.3)),
}


@pytest.mark.parametrize("name", CPO)
def test_cpo(name: str, softmax, batch: dict) -> None:
    loss_type, changed, method = CPO[name]
    methods = ("cpo_loss", "get_batch_logps", "concatenated_forward", "get_batch_loss_metrics")
    names = [f"CPOTrainer.{name}" for name in methods]
    known = {"selective_log_softmax": softmax, "nn": torch.nn}
    functions = peers.load("trl", "experimental/cpo/cpo_trainer.py", *names, **known)
    logits = torch.randn(S, T, 11)
    state = {"beta": 0.3, "cpo_alpha": 0.7, "alpha": 0.0, "label_smoothing": 0.0, "simpo_gamma": 0.5}
    expected = trl_from_logits(functions, batch, logits, **{**state, "loss_type": loss_type, **changed})
    agree(from_logits(method, batch, logits), expected)


@pytest.mark.parametrize("prompt", [1, 2])
def test_orpo(prompt: int, softmax, batch: dict) -> None:
    """TRL's likelihood is also that of the prompt, whose first token nothing predicts; its odds are float32's."""
    methods = ("odds_ratio_loss", "get_batch_logps", "concatenated_forward", "get_batch_loss_metrics")
    names = ["log1mexp", *(f"ORPOTrainer.{name}" for name in methods)]
    known = {"selective_log_softmax": softmax, "nn": torch.nn, "is_torch_xla_available": lambda: False}
    functions = peers.load("trl", "experimental/orpo/orpo_trainer.py", *names, **known)
    logits = torch.randn(S, T, 11)
    everything = batch["mask"]
    batch["completion"][:, :prompt] = 0
    batch["completion"][4, 1] = 1  # of one token: without it the sequence is empty, where TRL's average is NaN
    batch["mask"] = batch["completion"][:, 1:].bool()
    expected = trl_from_logits(functions, batch, logits, beta=0.3)
    if prompt == 1:
        agree(from_logits(preference.orpo(0.3), batch, logits), expected, 1e-5)
    odds = preference.Preference(preference.orpo(0.3).terms[1:])
    nll = preference.Preference(preference.orpo(0.3).terms[:1])
    both = zip(from_logits(odds, batch, logits), from_logits(nll, {**batch, "mask": everything}, logits))
    agree([x + y for x, y in both], expected, 1e-5)


TPO = {"sigmoid": {"label_smoothing": 0.1}, "hinge": {}, "ipo": {}, "tpo-l": {"gamma": 0.4}}


@pytest.mark.parametrize("alpha", [0.0, 0.7])
@pytest.mark.parametrize("loss_type", TPO)
def test_tpo(loss_type: str, alpha: float, softmax, batch: dict) -> None:
    def both(logits, index, row_mask, **also):
        return softmax(logits, index, row_mask=row_mask), torch.zeros(index.shape)

    path, known = "experimental/tpo/tpo_trainer.py", {"selective_log_softmax_and_entropy": both}
    functions = peers.load("trl", path, "TPOTrainer._compute_loss", **known)
    inputs = {"input_ids": batch["ids"], "completion_mask": batch["completion"], "attention_mask": batch["completion"]}
    state = {"beta": 0.3, "tpo_l_gamma": 0.4, "tpo_alpha": alpha, "loss_type": loss_type}
    state |= {"label_smoothing": TPO[loss_type].get("label_smoothing", 0.0), "_total_train_tokens": 0}

    def loss(logits: torch.Tensor) -> torch.Tensor:
        self = bound(functions, **state)
        return functions._compute_loss(self, lambda **given: SimpleNamespace(logits=logits), inputs, False)

    logits = torch.randn(S, T, 11)
    method = preference.tpo(loss_type, beta=0.3, alpha=alpha, **TPO[loss_type])
    agree(from_logits(method, batch, logits), differentiate(loss, logits))
