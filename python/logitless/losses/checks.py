"""Checks of arguments that losses share, beside those of tensors and numbers in :mod:`logitless.logits`."""

from __future__ import annotations

from logitless.logits import check_number


def check_range(name: str, value: object, low: float = 0.0, high: float = 1.0) -> None:
    check_number(name, value)
    if not low <= value <= high:
        raise ValueError(f"{name}: must lie in [{low:g}, {high:g}], got {value}")


def check_count(name: str, value: object, most: int | None = None) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: an integer, got {type(value).__name__}")
    if value < 1 or (most is not None and value > most):
        raise ValueError(f"{name}: must be at least 1{'' if most is None else f' and at most {most}'}, got {value}")


def check_choice(name: str, value: object, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name}: one of {', '.join(choices)}, got {value!r}")
