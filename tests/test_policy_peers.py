"""Policy objectives against the functions of verl and TRL: value, and gradient with respect to log-probabilities."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from itertools import product
from types import SimpleNamespace

import pytest
import torch

import peers
from logitless.losses import policy
from logitless.losses.policy import Aggregation

LENGTHS = [5, 2, 0, 1, 4]
B, T = len(LENGTHS), 6
EMPTY_COUNTS = Aggregation("seq-mean-token-mean", count_empty=True)
EMPTY_COUNTS_SUM = Aggregation("seq-mean-token-sum", count_empty=True)


@pytest.fixture(autouse=True)
def _double() -> Iterator[None]:
    """For what the peers make of Python numbers."""
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def batch() -> dict[str, torch.Tensor]:
    """[B, T], gaps large enough that clips, masks and bounds act; entropies as float32 has them, which TRL rounds to.

    Advantages per sequence. A sequence without tokens has none: TRL's losses of sequences are not 0 there.
    """
    torch.manual_seed(12)
    made = {"logprob": -3 * torch.rand(B, T)}
    for name in ("old_logprob", "ref_logprob", "rollout_logprob"):
        made[name] = (made["logprob"] + 0.8 * torch.randn(B, T)).clamp(max=-0.01)
    made["entropy"] = torch.rand(B, T).float().double()
    made["mask"] = (torch.arange(T) < torch.tensor(LENGTHS)[:, None]).double()
    made["advantages"] = torch.randn(B) * (made["mask"].sum(1) > 0)
    return made


def per_token(batch: dict) -> dict:
    return {**batch, "advantages": 2 * torch.randn(B, T)}


def ours(objective, batch: dict, **options) -> list[torch.Tensor]:
    """Value, gradient on log-probabilities, and on entropies where the objective reads them."""
    wrt = [name for name in ("logprob", "entropy") if name in objective.statistics]
    known = objective.reads | {"mask", "entropy"}
    leaves = {name: batch[name].clone().requires_grad_() for name in wrt}
    given = {name: x for name, x in batch.items() if name in known} | leaves
    loss = objective.from_logprobs(**given, **options).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


def theirs(compute, batch: dict, wrt=("logprob",)) -> list[torch.Tensor]:
    leaves = {name: batch[name].clone().requires_grad_() for name in wrt}
    loss = compute({**batch, **leaves})
    return [loss.detach(), *torch.autograd.grad(loss, list(leaves.values()), materialize_grads=True)]


def agree(found: list, expected: list, rtol: float = 1e-12) -> None:
    assert expected[1].count_nonzero()
    for x, y in zip(found, expected, strict=True):
        torch.testing.assert_close(x, y, rtol=rtol, atol=1e-14)


# ---- verl

EPSILON = 3e-8  # its + 1e-8 in denominators


class Config(SimpleNamespace):
    """In the place of verl's configurations: attributes, and ``get``."""

    def get(self, name: str, default=None):
        return getattr(self, name, default)


def actor(**changed) -> Config:
    usual = {"clip_ratio": 0.2, "clip_ratio_low": None, "clip_ratio_high": None, "global_batch_info": {}}
    return Config(**{**usual, **changed})


LOSSES = "vanilla dppo_tv dppo_kl gspo sapo gpg clip_cov kl_cov geo_mean dro cispo reinforce".split()


@pytest.fixture
def verl() -> SimpleNamespace:
    functional = peers.load("verl", "utils/torch_functional.py", "masked_sum", "masked_mean", "clip_by_value")
    names = ["agg_loss", "kl_penalty", "kl_penalty_forward", "compute_value_loss"]
    names += [f"compute_policy_loss_{name}" for name in LOSSES]
    known = {"verl_F": functional, "ActorConfig": Config, "AlgoConfig": type(None)}
    return peers.load("verl", "trainer/ppo/core_algos.py", *names, **known)


def verl_loss(verl, name: str, batch: dict, mode: str, weights=None, **changed):
    """Value and gradient of a registered loss."""
    first = "rollout_log_prob" if name == "reinforce" else "old_log_prob"

    def compute(x: dict) -> torch.Tensor:
        advantages = x["advantages"] if x["advantages"].dim() == 2 else x["advantages"][:, None].expand(B, T)
        given = {"log_prob": x["logprob"], "advantages": advantages, "response_mask": x["mask"]}
        given |= {first: x["old_logprob"], "loss_agg_mode": mode, "rollout_is_weights": weights}
        return getattr(verl, f"compute_policy_loss_{name}")(**given, config=actor(**changed))[0]

    return theirs(compute, batch)


# name: verl's loss, its configuration, and ours
VERL = {
    "ppo": ("vanilla", {"clip_ratio_c": 1.5}, policy.ppo(dual=1.5)),
    "ppo_defaults": ("vanilla", {}, policy.ppo()),
    "dapo": ("vanilla", {"clip_ratio_high": 0.28, "clip_ratio_c": 1e9}, policy.dapo()),
    "dppo_tv": (
        "dppo_tv",
        {"clip_ratio_low": 0.1, "clip_ratio_high": 0.02, "clip_ratio": None, "clip_ratio_c": 1.2},
        policy.dppo_tv((0.1, 0.02), cap=1.2),
    ),
    "dppo_kl": ("dppo_kl", {"clip_ratio": 0.02, "clip_ratio_high": 0.05}, policy.dppo_kl((0.02, 0.05))),
    "gspo": ("gspo", {"clip_ratio": 0.1}, policy.gspo_token(0.1, aggregation="token-mean")),
    "gpg": ("gpg", {}, policy.gpg()),
    "reinforce": ("reinforce", {}, policy.reinforce(aggregation="token-mean")),
    "dro": ("dro", {"policy_loss": Config(dro_beta=0.3)}, policy.dro(0.3)),
    "cispo": ("cispo", {"clip_ratio_low": 0.3, "clip_ratio_high": 0.4}, policy.cispo(low=0.3, high=0.4)),
    "kl_cov": ("kl_cov", {"policy_loss": Config(kl_cov_ratio=0.3, ppo_kl_coef=0.5)}, policy.kl_cov(0.3, 0.5)),
    # all of the eligible tokens, since which of them are drawn is chance; and no token is clipped, see below
    "clip_cov": (
        "clip_cov",
        {"clip_ratio": 1e3, "policy_loss": Config(clip_cov_ratio=1, clip_cov_lb=0.1, clip_cov_ub=2)},
        policy.clip_cov(1, (0.1, 2), 1e3),
    ),
}


@pytest.mark.parametrize("name", VERL)
def test_verl(name: str, verl, batch: dict) -> None:
    loss, config, objective = VERL[name]
    batch = per_token(batch)
    agree(ours(objective, batch), verl_loss(verl, loss, batch, "token-mean", **config))


MODES = ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm")


@pytest.mark.parametrize("parallel", [False, True])
@pytest.mark.parametrize("mode", MODES)
def test_verl_aggregation(mode: str, parallel: bool, verl, batch: dict) -> None:
    """Also on one of four ranks, with the whole batch's numbers: the denominator is theirs over the ranks'."""
    batch = per_token(batch)
    info = {"loss_scale_factor": 7, "dp_size": 4, "batch_num_tokens": 50, "global_batch_size": 18} if parallel else {}
    norm = {"norm": info.get("loss_scale_factor", T)} if mode.endswith("norm") else {}
    objective = policy.dapo(aggregation=Aggregation(mode, **norm))
    options = {}
    if parallel and mode != "token-sum":  # a sum has no denominator: verl's ranks multiply by their number instead
        options["denominator"] = info["batch_num_tokens" if mode.startswith("token") else "global_batch_size"] / 4
    expected = verl_loss(verl, "vanilla", batch, mode, clip_ratio_high=0.28, clip_ratio_c=1e9, global_batch_info=info)
    if parallel and mode == "token-sum":
        expected = [x / 4 for x in expected]
    agree(ours(objective, batch, **options), expected, EPSILON)


@pytest.mark.parametrize(
    "name, loss, config, objective",
    [
        ("gspo", "gspo", {"clip_ratio": 0.1}, policy.gspo(0.1)),
        ("gspo_token", "gspo", {"clip_ratio": 0.1}, policy.gspo_token(0.1)),
        ("gmpo", "geo_mean", {"clip_ratio_low": 0.4, "clip_ratio_high": 0.3}, policy.gmpo((0.4, 0.3))),
        (
            "sapo",
            "sapo",
            {"tau_pos": 0.7, "tau_neg": 1.05},
            policy.sapo(0.7, aggregation="seq-mean-token-mean"),  # TRL counts empty sequences, verl does not
        ),
    ],
)
def test_verl_sequences(name: str, loss: str, config: dict, objective, verl, batch: dict) -> None:
    """Advantages per sequence; those of GSPO-token, SAPO and GMPO per token too."""
    for given in [batch] if name == "gspo" else [batch, per_token(batch)]:
        agree(ours(objective, given), verl_loss(verl, loss, given, "seq-mean-token-mean", **config), EPSILON)


def test_clip_cov_draws_among_all_tokens(verl, batch: dict) -> None:
    """verl's draw spares tokens that PPO clips: in the gradient no difference, their losses stay in the value."""
    batch = per_token(batch)
    objective = policy.clip_cov(1, (0.1, 2))
    config = {"policy_loss": Config(clip_cov_ratio=1, clip_cov_lb=0.1, clip_cov_ub=2)}
    found, expected = ours(objective, batch), verl_loss(verl, "clip_cov", batch, "token-mean", **config)
    agree(found[1:] * 2, expected[1:] * 2)
    assert found[0] != expected[0]


@pytest.mark.parametrize("estimator", ["k1", "abs", "k2", "k3", "k1+", "k2+", "k3+"])
def test_verl_kl(estimator: str, verl, batch: dict) -> None:
    clamp = (20, 10) if estimator == "k3" else (None, None)
    if estimator == "k3":
        batch["ref_logprob"][0, :3] = batch["logprob"][0, :3] + torch.tensor([2.0, 3.0, -25.0])  # beyond both bounds
    objective = policy.grpo(beta=0.3, kl=estimator.replace("k2+", "k2"), kl_clamp=clamp, aggregation="token-mean")

    def compute(x: dict) -> torch.Tensor:
        config = actor(clip_ratio_c=1e9)
        given = (x["old_logprob"], x["logprob"], x["advantages"][:, None].expand(B, T), x["mask"], "token-mean", config)
        kl = verl.kl_penalty(x["logprob"], x["ref_logprob"], estimator)
        return verl.compute_policy_loss_vanilla(*given)[0] + 0.3 * verl.agg_loss(kl, x["mask"], "token-mean")

    agree(ours(objective, batch), theirs(compute, batch))


@pytest.mark.parametrize("mode", ["token-mean", "seq-mean-token-mean"])
def test_verl_value_loss(mode: str, verl, batch: dict) -> None:
    values, returns, old = 2 * torch.randn(3, B, T)
    mask = batch["mask"]

    def found(x: dict) -> torch.Tensor:
        return policy.value_loss(x["values"], returns, old, mask=mask, aggregation=mode).loss

    def expected(x: dict) -> torch.Tensor:
        return verl.compute_value_loss(x["values"], returns, old, mask, 0.5, mode)[0]

    given = {"values": values}
    agree(theirs(found, given, given), theirs(expected, given, given), EPSILON)


# verl's rollout_is, its threshold and whether it normalises
CORRECTIONS = {
    "tis_token": ("token", 1.5, False, policy.tis(1.5)),
    "tis_sequence": ("sequence", 2.0, False, policy.tis(level="sequence")),
    "icepop": ("token", "0.5_1.8", False, policy.icepop(0.5, 1.8)),
    "mis_sequence": ("sequence", "0.2_3", False, policy.mis(low=0.2)),
    "normalised_token": ("token", 1.5, True, policy.tis(1.5, normalize=True)),
    "normalised_sequence": ("sequence", 1.5, True, policy.tis(1.5, level="sequence", normalize=True)),
}


@pytest.fixture
def rollout(verl) -> SimpleNamespace:
    names = ["_parse_rollout_is_threshold", "_parse_rollout_rs_thresholds", "SAFETY_BOUND"]
    names += ["SUPPORTED_ROLLOUT_RS_OPTIONS", "TOKEN_LEVEL_ROLLOUT_RS_OPTIONS"]
    names += ["compute_rollout_rejection_mask", "compute_rollout_correction_weights"]
    known = {"compute_rs_metrics": lambda **given: {}, "compute_is_metrics": lambda **given: {}}
    generic = {"Optional": None, "verl_F": verl.verl_F}
    return peers.load("verl", "trainer/ppo/rollout_corr_helper.py", *names, **known, **generic)


@pytest.mark.parametrize("name", CORRECTIONS)
def test_verl_importance_weights(name: str, verl, rollout, batch: dict) -> None:
    level, threshold, normalize, correction = CORRECTIONS[name]
    gap = batch["old_logprob"] - batch["rollout_logprob"]
    weights, _ = rollout.compute_rollout_correction_weights(gap, batch["mask"], level, threshold, normalize)
    expected = verl_loss(verl, "vanilla", batch, "token-mean", weights=weights)
    agree(ours(policy.ppo(correction=(correction,)), batch), expected, EPSILON)


def test_verl_bypass(verl, rollout, batch: dict) -> None:
    """No old policy: REINFORCE, weighted by the policy's own ratio to the rollout."""
    gap = batch["logprob"] - batch["rollout_logprob"]
    weights, _ = rollout.compute_rollout_correction_weights(gap, batch["mask"], "token", 1.5)
    expected = verl_loss(verl, "reinforce", batch, "seq-mean-token-sum", weights=weights)
    agree(ours(policy.reinforce(correction=(policy.tis(1.5, against="logprob"),)), batch), expected)


REJECTIONS = [*product(("token", "seq_sum", "seq_mean"), ("k1", "k2", "k3")), ("seq_max", "k2"), ("seq_max", "k3")]


@pytest.mark.parametrize("over, estimate", REJECTIONS)
def test_verl_rejection(over: str, estimate: str, verl, rollout, batch: dict) -> None:
    """verl takes what it rejects out of the mask, and thereby out of denominators and penalties."""
    gap = batch["old_logprob"] - batch["rollout_logprob"]
    high = {"token": 0.3, "seq_sum": 1.0, "seq_mean": 0.4, "seq_max": 0.8}[over]
    bounds, threshold = {"high": high}, high
    if estimate == "k1":  # verl's bounds are of the ratio
        bounds = {"low": -1.5, "high": high}
        threshold = f"{math.exp(-1.5)}_{math.exp(high)}"
    kept, _ = rollout.compute_rollout_rejection_mask(gap, batch["mask"], f"{over}_{estimate}", threshold)
    assert 0 < kept.sum() < batch["mask"].sum()
    objective = policy.ppo(correction=(policy.Rejection(estimate, over, **bounds),))
    expected = verl_loss(verl, "vanilla", {**batch, "mask": kept}, "token-mean")
    agree(ours(objective, batch, denominator=kept.sum()), expected)


# ---- TRL

METHODS = ("_compute_loss", "get_high_entropy_mask", "get_off_policy_mask", "get_gamma_weights")


@pytest.fixture
def trl() -> SimpleNamespace:
    names = [f"GRPOTrainer.{name}" for name in METHODS]
    return peers.load("trl", "trainer/grpo_trainer.py", *names, nanmin=torch.amin, nanmax=torch.amax)


def trainer(functions, logprob: torch.Tensor, entropy: torch.Tensor, **changed) -> SimpleNamespace:
    """What the functions read of a trainer, with the defaults of TRL but for the penalty to the reference: k3."""
    usual = {
        "loss_type": "grpo",
        "epsilon_low": 0.2,
        "epsilon_high": 0.2,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "max_completion_length": T,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "_entropy_bonus_enabled": False,
        "use_adaptive_entropy": False,
        "aux_loss_enabled": False,
        "current_gradient_accumulation_steps": 1,
        "accelerator": peers.Accelerator(),
        "model": SimpleNamespace(training=True),
        "_metrics": defaultdict(lambda: defaultdict(list)),
        "_get_per_token_logps_and_entropies": lambda *given, **also: (logprob, entropy, None),
    }
    arguments = {"delta": None, "use_bias_correction_kl": False, "steps_per_generation": 1}
    arguments |= {"sapo_temperature_pos": 1.0, "sapo_temperature_neg": 1.05}
    arguments |= {"vespo_k_pos": 2.0, "vespo_lambda_pos": 3.0, "vespo_k_neg": 3.0, "vespo_lambda_neg": 2.0}
    arguments |= {name: changed.pop(name) for name in list(changed) if name in arguments}
    made = SimpleNamespace(args=SimpleNamespace(**arguments), **{**usual, **changed})
    if hasattr(functions, "get_gamma_weights"):
        made.get_high_entropy_mask = partial(functions.get_high_entropy_mask, made)
        made.get_off_policy_mask, made.get_gamma_weights = functions.get_off_policy_mask, functions.get_gamma_weights
    return made


def trl_loss(functions, batch: dict, wrt=("logprob",), inputs=None, **changed) -> list[torch.Tensor]:
    def compute(x: dict) -> torch.Tensor:
        ids = torch.zeros(B, T, dtype=torch.int64)
        given = {"prompt_ids": ids[:, :1], "prompt_mask": ids[:, :1], "completion_ids": ids}
        given |= {"completion_mask": x["mask"], "advantages": x["advantages"]}
        given |= {"old_per_token_logps": x["old_logprob"], "ref_per_token_logps": x["ref_logprob"]}
        given |= {"num_items_in_batch": torch.tensor(50), "sampling_per_token_logps": x["rollout_logprob"]}
        self = trainer(functions, x["logprob"], x["entropy"], **changed)
        return functions._compute_loss(self, None, given | (inputs or {}))

    return theirs(compute, batch, wrt)


ITEMS = {"denominator": 50}
SEQUENCE = {"importance_sampling_level": "sequence", "epsilon_low": 0.1, "epsilon_high": 0.1}
# name: the trainer's settings, our objective and its options
TRL = {
    "grpo": ({}, policy.grpo(), {}),
    "bnpo": ({"loss_type": "bnpo"}, policy.bnpo(), {}),
    "dr_grpo": ({"loss_type": "dr_grpo", "max_completion_length": 9}, policy.dr_grpo(9), {}),
    "dapo": ({"loss_type": "dapo", "epsilon_high": 0.28}, policy.dapo(aggregation="dapo"), ITEMS),
    "cispo": ({"loss_type": "cispo", "epsilon_high": 1.4}, policy.cispo("trl", high=1.4, aggregation="dapo"), ITEMS),
    "sapo": ({"loss_type": "sapo", "sapo_temperature_pos": 0.8}, policy.sapo(0.8), {}),
    "vespo": ({"loss_type": "vespo"}, policy.vespo(aggregation="dapo"), ITEMS),
    "luspo": ({"loss_type": "luspo", **SEQUENCE}, policy.luspo(0.1), {}),
    "luspo_token": ({"loss_type": "luspo"}, policy.grpo(aggregation=EMPTY_COUNTS_SUM), {}),
    "gspo": (SEQUENCE, policy.gspo(0.1, aggregation=EMPTY_COUNTS), {}),
    "gspo_bnpo": ({"loss_type": "bnpo", **SEQUENCE}, policy.gspo(0.1, aggregation="bnpo"), {}),
    "two_sided": ({"delta": 1.5}, policy.two_sided(1.5), {}),
    "k3": ({"beta": 0.3}, policy.grpo(beta=0.3), {}),
    "ratio_k3": ({"beta": 0.3, "use_bias_correction_kl": True}, policy.grpo(beta=0.3, kl="ratio_k3"), {}),
    "luspo_k3": ({"loss_type": "luspo", "beta": 0.3, **SEQUENCE}, policy.luspo(0.1, beta=0.3), {}),
    "top_entropy": (
        {"top_entropy_quantile": 0.3, "beta": 0.3},
        policy.grpo(selection=(policy.TopEntropy(0.3),), beta=0.3),
        {},
    ),
    "opsm": ({"off_policy_mask_threshold": -0.4}, policy.grpo(correction=(policy.Opsm(-0.4),)), {}),
    "entropy": (
        {"loss_type": "bnpo", "_entropy_bonus_enabled": True, "entropy_coef": 0.1},
        policy.bnpo(entropy_coef=0.1),
        {},
    ),
}


@pytest.mark.parametrize("name", TRL)
def test_trl(name: str, trl, batch: dict) -> None:
    settings, objective, options = TRL[name]
    wrt = ("logprob", "entropy") if name == "entropy" else ("logprob",)
    found = ours(objective, batch, **options)
    agree(found[: 1 + len(wrt)], trl_loss(trl, batch, wrt, **settings))
    if name == "top_entropy":
        assert not found[2].count_nonzero()


def test_entropy_bonus_of_trl_is_a_mean_over_tokens(trl, batch: dict) -> None:
    """Whatever the aggregation of the rest: ours and verl's aggregate it alike."""
    settings = {"_entropy_bonus_enabled": True, "entropy_coef": 0.1}
    expected = trl_loss(trl, batch, ("logprob", "entropy"), **settings)
    found = ours(policy.grpo(entropy_coef=0.1), batch)
    agree(found[1:2] * 2, expected[1:2] * 2)
    torch.testing.assert_close(expected[2], -0.1 * batch["mask"] / sum(LENGTHS))
    weights = batch["mask"] / batch["mask"].sum(1, keepdim=True).clamp(min=1) / B
    torch.testing.assert_close(found[2], -0.1 * weights)


def test_correction_of_kl_is_by_the_ratio_of_tokens(trl, batch: dict) -> None:
    """TRL takes the objective's ratio, which at the level of sequences is no unbiased estimate, as it says itself."""
    given = {"beta": 0.3, "use_bias_correction_kl": True}
    with_kl, without = trl_loss(trl, batch, **given), trl_loss(trl, batch)
    options = {"aggregation": EMPTY_COUNTS}
    found = ours(policy.gspo(0.1, beta=0.3, kl="ratio_k3", **options), batch)
    gspo = trl_loss(trl, batch, **SEQUENCE)
    agree(found, [x + y - z for x, y, z in zip(gspo, with_kl, without)])
    assert not torch.allclose(found[1], trl_loss(trl, batch, **given, **SEQUENCE)[1], rtol=1e-3)


def inference_ratio(batch: dict, mode: str, low: float | None, high: float | None) -> dict:
    """TRL's weights for samples of an inference engine."""
    prefix = "vllm_importance_sampling"
    settings = {"mode": mode, "clip_min": low, "clip_max": high}
    self = SimpleNamespace(use_vllm=True, **{f"{prefix}_{name}": x for name, x in settings.items()})
    self.vllm_importance_sampling_correction = True
    given = {"self": self, "completion_mask": batch["mask"], "tool_mask": None}
    given |= {"old_per_token_logps": batch["old_logprob"], "sampling_per_token_logps": batch["rollout_logprob"]}
    name = "GRPOTrainer._generate_and_score_completions"
    found = peers.run_part("trl", "trainer/grpo_trainer.py", name, "torch.exp(logps_diff)", **given)
    return {"importance_sampling_ratio": found.vllm_importance_sampling_ratio}


@pytest.mark.parametrize("low", [None, 0.6])
@pytest.mark.parametrize("mode", ["token_truncate", "token_mask", "sequence_truncate", "sequence_mask"])
def test_trl_importance_sampling(mode: str, low: float | None, trl, batch: dict) -> None:
    level, bounded = mode.split("_")
    correction = policy.ImportanceCorrection(level, bounded, high=1.4, low=low)
    inputs = inference_ratio(batch, mode, low, 1.4)
    expected = trl_loss(trl, batch, inputs=inputs, beta=0.3, use_vllm=True)
    agree(ours(policy.grpo(correction=(correction,), beta=0.3), batch), expected)


def test_trl_importance_sampling_inside_vespo(trl, batch: dict) -> None:
    inputs = inference_ratio(batch, "token_truncate", None, 1e9)
    expected = trl_loss(trl, batch, inputs=inputs, loss_type="vespo", use_vllm=True)
    agree(ours(policy.vespo(rollout=True, aggregation="dapo"), batch, **ITEMS), expected)


@pytest.mark.parametrize("beta", [0.0, 0.3])
def test_trl_gmpo(beta: float, batch: dict) -> None:
    path = "experimental/gmpo/gmpo_trainer.py"
    functions = peers.load("trl", path, "GMPOTrainer._compute_loss", nanmin=torch.amin, nanmax=torch.amax)
    expected = trl_loss(functions, batch, epsilon_low=0.4, epsilon_high=0.3, beta=beta)
    agree(ours(policy.gmpo((0.4, 0.3), beta=beta), batch), expected)


def test_trl_rloo(batch: dict) -> None:
    path = "trainer/rloo_trainer.py"
    functions = peers.load("trl", path, "RLOOTrainer._compute_loss", nanmin=torch.amin, nanmax=torch.amax)
    old = (batch["old_logprob"] * batch["mask"]).sum(1)
    expected = trl_loss(functions, batch, inputs={"old_logps": old}, epsilon_low=0.3, epsilon_high=0.4)
    agree(ours(policy.rloo((0.3, 0.4)), batch), expected)
