"""The table of a result file: ``python -m benchmarks.report benchmarks/results/FILE.json``."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
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


def operation_summary(samples: dict[str, list[float]]) -> dict[str, dict[str, float]]:
    """Medians of the samples in seconds, and medians of ours to each peer's round by round."""
    peers = [name for name in samples if name != "logitless"]
    return {
        "medians": {name: median(values) for name, values in samples.items()},
        "ratios": {f"logitless/{peer}": median(ratios(samples, "logitless", peer)) for peer in peers},
    }


def table(result: dict) -> str:
    """Markdown: a line per case and per operation, with what was measured, its target and whether it was reached."""
    size = result["size"]
    commit = result["commit"][:12] + (" (dirty)" if result["dirty"] else "")
    head = (
        f"{result['device']}, {result['threads']} threads of {result['cores']} cores, load {result['load']}, "
        f"N={size['tokens']} H={size['hidden']} V={size['vocab']}, backend {result['backend']} "
        f"({result['instruction_set'] or 'no extension'}), torch {result['versions']['torch']}, "
        f"Python {result['versions']['python']}, commit {commit}, {result['date']}"
    )
    tables = []
    if result["cases"]:
        tables.append(_table_of_cases(result["cases"]))
    if result.get("operations"):
        tables.append(_table_of_operations(result["operations"]))
    return "\n\n".join([head, *tables])


def _table_of_cases(cases: list[dict]) -> str:
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
    legend = (
        "Ratios: medians over rounds of one process. products: the bare products as one would write them;\n"
        "products_into: the same into existing outputs; torch: materialised logits. beyond: the peak memory of one\n"
        "call beyond inputs, gradients (counted once) and accumulators."
    )
    return _markdown(columns, map(_line, cases)) + "\n\n" + legend


def _table_of_operations(operations: list[dict]) -> str:
    columns = ("operation", "size", "median", "peer", "its median", "/ peer (min-max)", "target", "reached")
    lines = [_operation_line(operation, peer) for operation in operations for peer in _peers(operation)]
    return _markdown(columns, lines)


def _peers(operation: dict) -> list[str]:
    return [name for name in operation["medians"] if name != "logitless"]


def _operation_line(operation: dict, peer: str) -> tuple[str, ...]:
    contender, bound = operation["against"]
    medians, found = operation["medians"], operation["ratios"][f"logitless/{peer}"]
    spread = ratios(operation["samples"], "logitless", peer)
    target = (f"{bound:.2f}", _mark(found <= bound)) if peer == contender else ("-", "-")
    return (
        operation["name"],
        operation["size"],
        f"{1e3 * medians['logitless']:.2f} ms",
        peer,
        f"{1e3 * medians[peer]:.2f} ms",
        f"{found:.3f} ({min(spread):.3f}-{max(spread):.3f})",
        *target,
    )


def _markdown(columns: tuple[str, ...], lines: Iterable[tuple[str, ...]]) -> str:
    rows = [columns, *lines]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    padded = [[cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in rows]
    text = ["| " + " | ".join(cells) + " |" for cells in padded]
    rule = "|" + "|".join("-" * (width + 2) for width in widths) + "|"
    return "\n".join([text[0], rule, *text[1:]])


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
