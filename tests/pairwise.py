"""Covering arrays: few cases in which every pair of levels of any two factors occurs together."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable


def pairwise(factors: dict[str, list], valid: Callable[[dict], bool], seed: int = 0) -> list[dict]:
    """Cases {factor: level} that together hold every pair of levels that a valid case holds; greedy, deterministic."""
    rng = random.Random(seed)
    names = list(factors)
    missing = {
        ((a, i), (b, j))
        for a, b in itertools.combinations(names, 2)
        for i in range(len(factors[a]))
        for j in range(len(factors[b]))
    }
    cases = []
    failures = 0
    while missing and failures < 200:
        seeds = rng.sample(sorted(missing), min(8, len(missing)))
        best, covered = None, set()
        for pair in seeds:
            for _ in range(12):
                levels = {name: rng.randrange(len(factors[name])) for name in names} | dict(pair)
                case = {name: factors[name][level] for name, level in levels.items()}
                if not valid(case):
                    continue
                pairs = set(itertools.combinations([(name, levels[name]) for name in names], 2)) & missing
                if len(pairs) > len(covered):
                    best, covered = case, pairs
        if best is None:
            failures += 1
            continue
        cases.append(best)
        missing -= covered
    return cases


def sample(factors: dict[str, list], valid: Callable[[dict], bool], count: int, seed: int = 1) -> list[dict]:
    """``count`` valid cases at random."""
    rng = random.Random(seed)
    draw = iter(lambda: {name: rng.choice(levels) for name, levels in factors.items()}, None)
    return list(itertools.islice(filter(valid, draw), count))
