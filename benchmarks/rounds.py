"""Times of contenders, round by round in one process: each round times all of them in turn, ours last."""

from __future__ import annotations

from collections.abc import Callable
from time import perf_counter

from torch import Tensor

Run = Callable[[], object]


def timed(benchmark, contenders: dict[str, Run], ours: Run, clear: Run, rounds: int) -> dict[str, list[float]] | None:
    """Seconds of each contender and of "logitless"; the first round is a warm-up. None where nothing is measured.

    ``clear`` drops the gradients, outside the clock.
    """
    samples: dict[str, list[float]] = {name: [] for name in contenders}

    def time_the_others() -> None:
        for name, contender in contenders.items():
            clear()
            start = perf_counter()
            kept = contender()  # freed after the clock has stopped, as gradients are
            samples[name].append(perf_counter() - start)
            del kept
        clear()

    benchmark.pedantic(ours, setup=time_the_others, rounds=rounds, warmup_rounds=1)
    if benchmark.disabled:
        return None
    return {name: values[1:] for name, values in samples.items()} | {"logitless": list(benchmark.stats.stats.data)}


def difference(a: Tensor, b: Tensor) -> float:
    """The largest one, relative to the largest element of b."""
    return ((a.float() - b.float()).abs().max() / b.float().abs().max()).item()
