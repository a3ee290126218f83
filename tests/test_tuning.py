"""Run-time tuning: asked for, remembered, and of no consequence for results."""

from __future__ import annotations

import json

import pytest

from logitless.backends import tuning

CANDIDATES = ((1024, 4), (2048, 8), (2048, 4))


@pytest.fixture(autouse=True)
def _empty_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tuning, "_known", {})


def test_the_fastest_candidate_is_found_once_and_kept(monkeypatch):
    ran = []
    monkeypatch.setattr(tuning, "seconds", lambda run: run())

    def run(candidate):
        ran.append(candidate)
        return {1024: 3.0, 2048: 2.0}[candidate[0]] + candidate[1] / 10

    assert tuning.fastest("card, statistics", CANDIDATES, run) == (2048, 4)
    assert ran == list(CANDIDATES)
    tuning._known.clear()  # as in another process
    assert tuning.fastest("card, statistics", CANDIDATES, run) == (2048, 4)
    assert ran == list(CANDIDATES)
    assert tuning.fastest("another card, statistics", CANDIDATES, run) == (2048, 4)
    assert len(ran) == 6 and len(json.loads(tuning.store().read_text())) == 2


@pytest.mark.parametrize("content", ["", "{", '{"card": [7, 7]}'])
def test_a_broken_or_outdated_file_is_replaced(content, monkeypatch):
    monkeypatch.setattr(tuning, "seconds", lambda run: run())
    tuning.store().parent.mkdir()
    tuning.store().write_text(content)
    assert tuning.fastest("card", CANDIDATES, lambda candidate: -candidate[0]) == (2048, 8)
    assert json.loads(tuning.store().read_text()) == {"card": [2048, 8]}


def test_it_is_off_unless_asked_for(monkeypatch):
    monkeypatch.delenv("LOGITLESS_AUTOTUNE", raising=False)
    assert not tuning.wanted()
    monkeypatch.setenv("LOGITLESS_AUTOTUNE", "1")
    assert tuning.wanted()
