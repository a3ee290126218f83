"""The terms of a problem by temperature, and the names of their statistics.

Terms at one temperature form a group. All groups read the same products: their logits differ by a factor. The first
group's statistics go by their plain names, the others' by ("group", number, name).
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from logitless.backends import Chunk
from logitless.engine import statistics
from logitless.engine.statistics import Statistics


@dataclass(frozen=True)
class Group:
    """The terms at one temperature."""

    temperature: float
    factor: float  # on the logits of the first group
    terms: tuple[int, ...]  # indices
    wanted: frozenset[str]
    picked: bool  # whether they read the logits at the teacher's ids
    rest: bool  # and the mass of all others
    generic: tuple[tuple, ...]  # keys of what generic kernels sum for them
    adjoint_generic: tuple[tuple, ...]  # and for the gradient of the teacher

    def at(self, *chunks: Chunk | None) -> list[Chunk | None]:
        """Chunks of the first group's temperature at this one's."""
        if self.factor == 1:
            return list(chunks)
        return [None if chunk is None else replace(chunk, outer=chunk.outer * self.factor) for chunk in chunks]


def grouped(terms: tuple) -> list[Group]:
    """The terms of a problem by temperature; functions of rows read the logits of the first group as they are."""
    temperatures = sorted({1.0 if term.calls_function else term.temperature for term in terms})
    if 1.0 in temperatures:
        temperatures.remove(1.0)
        temperatures.insert(0, 1.0)
    groups = []
    for temperature in temperatures:
        chosen = [(i, t) for i, t in enumerate(terms) if temperature == (1.0 if t.calls_function else t.temperature)]
        adjoints = [term.adjoint for _, term in chosen if term.adjoint is not None]
        groups.append(
            Group(
                temperature,
                temperatures[0] / temperature,
                tuple([i for i, _ in chosen]),
                frozenset().union(*(term.wanted for _, term in chosen)),
                any(term.topk is not None for _, term in chosen),
                any(term.needs_rest for _, term in chosen),
                _generic_keys(term for _, term in chosen),
                _generic_keys(adjoints),
            )
        )
    return groups


def _generic_keys(terms: Iterable) -> tuple[tuple, ...]:
    """What the generic kernel must evaluate for some terms, each once."""
    return tuple(sorted({key for term in terms for key in term.generic}, key=repr))


def key(group: int, name: object) -> object:
    """The key of a group's statistic among those of all groups."""
    return ("group", group, name) if group else name


def of_group(s: Statistics, group: int) -> Statistics:
    """Undoes :func:`key` for the statistics of one group."""
    if not group:
        return s
    return {key[2]: value for key, value in s.items() if isinstance(key, tuple) and key[:2] == ("group", group)}


def exchanged(s: Statistics) -> Statistics:
    """A group's statistics with student and teacher exchanged, sums of adjoints included."""
    adjoint = {key[1:]: value for key, value in s.items() if isinstance(key, tuple) and key[0] == "teacher"}
    return statistics.exchange(s) | adjoint
