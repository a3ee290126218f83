"""The table of a result file: ``python -m benchmarks.report benchmarks/results/FILE.json``."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from statistics import median


def ratios(samples: dict[str, list[float]], a: str, b: str) -> list[float]:
    """a / b, round by round."""
    return [x / y for x, y in zip(samples[a], samples[b], strict=True)]


def summary(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of the samples in seconds, and medians of their ratios round by round."""
    wanted = [(a, b) for a in samples for b in ("products", "products_into") if not a.startswith("products")]
    wanted += [("logitless", peer) for peer in samples if peer != "logitless" and not peer.startswith("products")]
    return {
        "medians": {name: median(values) for name, values in samples.items()},
        "ratios": {f"{a}/{b}": median(ratios(samples, a, b)) for a, b in wanted},
    }


def table(result: dict) -> str:
    """Markdown: one line per case, with what was measured, its target and whether it was reached."""
    size = result["size"]
    commit = result["commit"][:12] + (" (dirty)" if result["dirty"] else "")
    head = (
        f"{result['device']}, {result['threads']} threads of {result['cores']} cores, load {result['load']}, "
        f"N={size['tokens']} H={size['hidden']} V={size['vocab']}, backend {result['backend']} "
        f"({result['instruction_set'] or 'no extension'}), torch {result['versions']['torch']}, "
        f"Python {result['versions']['python']}, commit {commit}, {result['date']}"
    )
    columns = (
        "case",
        "products",
        "median",
        "GFLOP/s",
        "/ products (min-max)",
        "/ products_into",
        "torch / products",
        "/ torch",
        "target",
        "reached",
        "beyond MB",
        "workspace MB",
        "<= +32 MB",
        "torch beyond MB",
    )
    lines = [columns, *(_line(case) for case in result["cases"])]
    widths = [max(len(line[i]) for line in lines) for i in range(len(columns))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in lines]
    text = ["| " + " | ".join(cells) + " |" for cells in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    legend = (
        "Ratios: medians over rounds of one process. products: the bare products as one would write them;\n"
        "products_into: the same into existing outputs; torch: materialised logits. beyond: the peak memory of one\n"
        "call beyond inputs, gradients (counted once) and accumulators."
    )
    return "\n".join([head, "", text[0], rule, *text[1:], "", legend])


def _line(case: dict) -> tuple[str, ...]:
    found = case["ratios"]
    contender, bound = case["against"]
    spread = ratios(case["samples"], "logitless", "products")
    return (
        case["name"],
        f"{len(case['products'])}G",
        f"{1e3 * case['medians']['logitless']:.1f} ms",
        f"{case['flops'] / case['medians']['logitless'] / 1e9:.0f}",
        f"{found['logitless/products']:.3f} ({min(spread):.2f}-{max(spread):.2f})",
        f"{found['logitless/products_into']:.3f}",
        f"{found['torch/products']:.2f}",
        f"{found['logitless/torch']:.2f}",
        f"{contender} x {bound:.2f}",
        _mark(found[f"logitless/{contender}"] <= bound),
        *_memory(case["memory"]),
    )


def _memory(memory: dict[str, dict | None]) -> tuple[str, str, str, str]:
    ours, torch = memory.get("logitless"), memory.get("torch")
    if ours is None:
        return "-", "-", "-", "-"
    return (
        f"{ours['beyond'] / 1e6:.0f}",
        f"{ours['workspace'] / 1e6:.0f}",
        _mark(ours["beyond"] <= ours["bound"]),
        "-" if torch is None else f"{torch['beyond'] / 1e6:.0f}",
    )


def _mark(reached: bool) -> str:
    return "yes" if reached else "NO"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("result", type=Path, nargs="+")
    for path in parser.parse_args().result:
        print(table(json.loads(path.read_text())), end="\n\n")


if __name__ == "__main__":
    main()
