"""``logitless doctor`` and ``logitless plan``."""

from __future__ import annotations

import pytest
import torch

import logitless as ll
from logitless import cli
from logitless.engine import plan as planning

TOKENS, HIDDEN, TEACHER_HIDDEN, VOCAB = 6, 8, 5, 33
SIZES = ["plan", "--tokens", str(TOKENS), "--hidden", str(HIDDEN), "--vocab", str(VOCAB)]


def student(*, weight_grad: bool = True, dtype: torch.dtype = torch.float32) -> ll.LinearLogits:
    hidden = torch.randn(TOKENS, HIDDEN, dtype=dtype, requires_grad=True)
    return ll.LinearLogits(hidden, torch.randn(VOCAB, HIDDEN, dtype=dtype, requires_grad=weight_grad))


def teacher() -> ll.LinearLogits:
    return ll.LinearLogits(torch.randn(TOKENS, TEACHER_HIDDEN), torch.randn(VOCAB, TEACHER_HIDDEN))


def no_grad_logprobs() -> None:
    with torch.no_grad():
        ll.logprobs(student(), torch.arange(TOKENS))


# what is asked of the planner on the command line, and the call that it stands for
CALLS = {
    "--dtype fp32": lambda: ll.cross_entropy(student(), torch.arange(TOKENS)),
    "--dtype bf16": lambda: ll.cross_entropy(student(dtype=torch.bfloat16), torch.arange(TOKENS)),
    "--dtype fp64": lambda: ll.cross_entropy(student(dtype=torch.float64), torch.arange(TOKENS)),
    "--dtype fp32 --teacher-hidden 5": lambda: ll.divergence(student(), teacher(), "forward_kl"),
    "--dtype fp32 --teacher-hidden 5 --divergence jsd": lambda: ll.divergence(student(), teacher(), "jsd"),
    "--dtype fp32 --per-token --frozen-head": lambda: ll.logprobs(student(weight_grad=False), torch.arange(TOKENS)),
    "--dtype fp32 --per-token --no-grad": no_grad_logprobs,
    "--dtype fp32 --teacher-hidden 5 --per-token": lambda: ll.divergence(
        student(), teacher(), "forward_kl", reduction="none"
    ),
}


@pytest.mark.parametrize("options", CALLS)
def test_plan_asks_the_planner_what_the_engine_asks(options, monkeypatch, capsys):
    asked = []
    plan = planning.plan
    monkeypatch.setattr(planning, "plan", lambda *arguments: asked.append(arguments) or plan(*arguments))
    CALLS[options]()
    of, on = asked.pop(0)[:2]
    asked.clear()
    assert cli.main(SIZES + options.split()) == 0
    assert {arguments[:2] for arguments in asked} == {(of, on)}
    assert capsys.readouterr().out


def lines_of(out: str) -> list[str]:
    """The table's lines."""
    return [line for line in out.splitlines() if line.startswith(("* ", "  "))][1:]


def test_plan_shows_every_strategy_and_marks_what_auto_takes(capsys):
    assert cli.main([*SIZES, "--frozen-head", "--per-token", "--dtype", "fp32"]) == 0
    out = capsys.readouterr().out
    lines = lines_of(out)
    assert [line[2:].split()[0] for line in lines] == ["recompute", "stash", "frozen"]
    assert sum(line.startswith("* ") for line in lines) == 1
    assert f"hidden student {HIDDEN}" in out and "materialised logits in 32 bits: 1.547 KiB (student, gradient)" in out


def test_plan_says_what_does_not_fit(capsys):
    options = "--tokens 1024 --hidden 576 --vocab 49152 --dtype fp32 --per-token --frozen-head --workspace".split()
    assert cli.main(["plan", *options, "1MiB"]) == 0
    assert "does not fit" not in capsys.readouterr().out
    assert cli.main(["plan", *options, "150KiB"]) == 0  # one row takes 192 KiB
    lines = lines_of(capsys.readouterr().out)
    assert "  frozen     does not fit into 150 KiB" in lines
    assert any(line.startswith("* recompute") for line in lines)


def test_devices_have_cost_models(capsys):
    cli.main([*SIZES, "--threads", "3"])
    assert "cost model: cpu, 3 threads" in capsys.readouterr().out
    cli.main([*SIZES, "--device", "gpu"])
    assert "cost model: gpu" in capsys.readouterr().out


@pytest.mark.parametrize(
    "text, size", [("auto", None), ("4096", 4096), ("512MiB", 512 << 20), ("1.5gib", 3 << 29), ("2 GB", 2 * 10**9)]
)
def test_sizes(text, size):
    assert cli.parse_size(text) == size


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "required"),
        (["doctor", "--fast"], "unrecognized"),
        (["plan", "--tokens", "1"], "--hidden, --vocab"),
        ([*SIZES, "--tokens", "0"], "--tokens: a positive integer, got '0'"),
        ([*SIZES, "--tokens", "1e3"], "--tokens: a positive integer, got '1e3'"),
        ([*SIZES, "--dtype", "int8"], "--dtype"),
        ([*SIZES, "--divergence", "euclid"], "--divergence"),
        ([*SIZES, "--workspace", "12parsec"], "--workspace: a size such as 512MiB"),
        ([*SIZES, "--workspace", "-1"], "--workspace"),
        ([*SIZES, "--workspace", "0.1B"], "--workspace"),
        ([*SIZES, "--workspace", "7"], "workspace: 7 bytes are too few, this needs at least"),
    ],
)
def test_bad_input_is_refused(options, message, capsys):
    with pytest.raises(SystemExit) as refused:
        cli.main(options)
    assert refused.value.code == 2
    assert message in capsys.readouterr().err


def test_doctor_names_what_serves(monkeypatch, capsys):
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert f"logitless {ll.__version__}, torch {torch.__version__}" in out
    assert "no LOGITLESS_* variable is set" in out
    assert "check on cpu: cross-entropy and its gradients agree with torch" in out


def test_a_backend_that_cannot_serve_a_type_is_passed_over(monkeypatch):
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    monkeypatch.setattr(cli.cpu_backend, "PROBLEM", None)
    serving, reasons = cli.serving(torch.device("cpu"), torch.float32)
    assert serving == "cpu" and "torch: cpu comes first" in reasons
    serving, reasons = cli.serving(torch.device("cpu"), torch.float64)
    assert serving == "torch" and "cpu: not for float64 on cpu" in reasons


def test_doctor_says_why_the_extension_does_not_serve(monkeypatch, capsys):
    monkeypatch.delenv("LOGITLESS_BACKEND", raising=False)
    monkeypatch.setattr(cli.cpu_backend, "PROBLEM", "no compiler")
    assert cli.main(["doctor"]) == 0
    out = capsys.readouterr().out
    assert "extension: not loaded (no compiler)" in out and "torch (cpu: no compiler;" in out


def test_doctor_reports_what_is_forced(monkeypatch, capsys):
    monkeypatch.setenv("LOGITLESS_BACKEND", "torch")
    assert cli.main(["doctor"]) == 0
    assert "environment: LOGITLESS_BACKEND=torch" in capsys.readouterr().out
    monkeypatch.setenv("LOGITLESS_BACKEND", "abacus")
    assert cli.main(["doctor"]) == 1
    assert "check on cpu: failed: LOGITLESS_BACKEND='abacus': no such backend" in capsys.readouterr().out
