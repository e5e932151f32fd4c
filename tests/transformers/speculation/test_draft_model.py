"""What a draft model's doubts are worth."""

from __future__ import annotations

import pytest

from bmc_core.speculation import SpeculationController
from bmc_transformers import enable, speculation_stats
from bmc_transformers.speculation.draft_model import MOST_DOUBTS, Doubts
from tests.support.architectures import generated, prompt
from tests.support.drafts import pair


def test_doubts_end_drafts_until_they_are_known_to_be_unfounded() -> None:
    doubts = Doubts(always=False)
    for _ in range(7):
        doubts.observe(True)
        assert doubts.end_drafts
    doubts.observe(True)
    assert not doubts.end_drafts
    # Times change.
    for _ in range(2 * MOST_DOUBTS):
        doubts.observe(False)
    assert doubts.end_drafts


def test_doubts_that_always_count() -> None:
    doubts = Doubts(always=True)
    for _ in range(100):
        doubts.observe(True)
    assert doubts.end_drafts


@pytest.mark.parametrize(("setting", "rounds"), [("fixed", 60), ("auto", 8 + 104 // 7 + 1)])
def test_a_draft_model_that_doubts_what_is_right(
    setting: str, rounds: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its logits are flat: it never reaches the threshold, and is always right."""
    monkeypatch.setattr(SpeculationController, "draft_steps", lambda *_: 6)
    monkeypatch.setattr(SpeculationController, "verified_lengths", lambda self, _, made: made)
    target, same = pair(0.0)
    enable(target, 16, speculate=setting)
    same.generation_config.assistant_confidence_threshold = 0.999
    same.generation_config.num_assistant_tokens = 6
    generated(target, {"inputs": prompt(1), "assistant_model": same}, 120)
    stats = speculation_stats(target)
    assert stats.accepted_tokens == stats.draft_tokens
    # One draft token in each round, as long as doubts end them.
    assert stats.rounds == rounds
