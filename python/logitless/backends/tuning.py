"""Run-time tuning of Triton kernels, off unless ``LOGITLESS_AUTOTUNE=1``.

The first launch of a kernel on a device at a vocabulary size times its candidates, and the winner is kept in
``tiles.json`` in the user's cache folder (``$XDG_CACHE_HOME/logitless``, by default ``~/.cache/logitless``): later
processes with the same setting read it. The file may be deleted at any time.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path

Candidate = tuple[int, int]


def wanted() -> bool:
    return os.environ.get("LOGITLESS_AUTOTUNE") == "1"


def store() -> Path:
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(base) / "logitless" / "tiles.json"


def seconds(run: Callable[[], object]) -> float:
    """Median over some 20 ms of runs on a GPU."""
    import triton.testing

    return triton.testing.do_bench(run, warmup=5, rep=20, return_mode="median") / 1e3


def fastest(key: str, candidates: Sequence[Candidate], run: Callable[[Candidate], object]) -> Candidate:
    """The candidate that was, or now is, measured fastest under ``key``. ``run`` must leave its inputs as they were."""
    kept = _read()
    if tuple(kept.get(key, ())) not in candidates:
        times = {candidate: seconds(lambda candidate=candidate: run(candidate)) for candidate in candidates}
        kept = _read() | {key: min(times, key=times.get)}
        path = store()
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_suffix(f".{os.getpid()}")
        part.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n")
        part.replace(path)  # whole or not at all
        _known.update(kept)
    return tuple(kept[key])


_known: dict[str, Candidate] = {}


def _read() -> dict[str, Candidate]:
    if not _known:
        try:
            _known.update(json.loads(store().read_text()))
        except (OSError, ValueError):
            return {}
    return dict(_known)
