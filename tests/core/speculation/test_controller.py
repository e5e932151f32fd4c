"""The controller's calls: limits, parking, probes, fixed lengths, memory."""

import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bmc_core.speculation import DraftRequest, SpeculationController, StepCosts, StepTimes
from bmc_core.speculation.parking import MOST_REST
from tests.support.speculation import COSTS, FREE


def controller(costs: StepCosts | None = COSTS, most: int = 8, **options) -> SpeculationController:
    return SpeculationController(costs, max_draft_tokens=most, **options)


def batch(size: int, limit: int = 8, drafter: str = "") -> list[DraftRequest]:
    return [DraftRequest(i, 1000, limit, drafter) for i in range(size)]


def play(steered, requests, accepted, steps: int) -> list[tuple[int, list[int]]]:
    """(K, lengths) of steps whose drafts are right to the length `accepted(request)`."""
    seen = []
    for _ in range(steps):
        k = steered.draft_steps(requests)
        lengths = steered.verified_lengths(requests, [k] * len(requests))
        for request, length in zip(requests, lengths, strict=True):
            if length:
                right = min(length, accepted(request.request_id))
                steered.observe_acceptance(request.request_id, length, right, request.drafter)
        seen.append((k, lengths))
    return seen


def test_what_is_right_grows_to_the_maximum_and_what_is_wrong_is_parked() -> None:
    assert play(controller(), batch(1), lambda _: 8, 40)[-1] == (8, [8])
    steered = controller()
    seen = play(steered, batch(1), lambda _: 0, 30)
    assert seen[0][0] > 0, "hope"
    assert all(k == 0 for k, _ in seen[8:]), "a few rejections park it"
    assert steered.parked_steps >= 22


def test_newcomers_start_parked() -> None:
    steered = controller()
    play(steered, batch(4), lambda _: 0, 30)
    for i in range(4):
        steered.forget(i)
    requests = [DraftRequest(f"new {i}", 1000, 8) for i in range(4)]
    assert sum(k > 0 for k, _ in play(steered, requests, lambda _: 0, 100)) <= 4


@pytest.mark.parametrize("size", [1, 8])
def test_probes_grow_rare(size) -> None:
    steered = controller()
    seen = play(steered, batch(size), lambda _: 0, 3000)
    asked = [step for step, (k, _) in enumerate(seen) if k]
    assert sum(step >= 1500 for step in asked) <= 8
    assert sum(step >= 32 for step in asked) >= 1, "it is asked again"


@pytest.mark.parametrize("size", [1, 8])
def test_acceptance_that_comes_back_is_found(size) -> None:
    steered = controller()
    play(steered, batch(size), lambda _: 0, 200)
    # Eight have many rows to catch up on: a probe waits longer for them.
    seen = play(steered, batch(size), lambda _: 8, 300 if size == 1 else MOST_REST + 50)
    first = next(step for step, (k, _) in enumerate(seen) if k)
    assert seen[-1][0] >= 4
    assert all(k > 0 for k, _ in seen[first + 10 :])


def test_a_smaller_batch_wakes_what_did_not_pay_in_a_large_one() -> None:
    """Eight requests fill the free rows, one does not."""
    steered = controller()
    chance = random.Random(0)
    large = play(steered, batch(16), lambda _: int(chance.random() < 0.45), 100)
    assert large[-1][0] == 0
    small = play(steered, batch(1), lambda _: int(chance.random() < 0.45), 4)
    assert small[0][0] > 0


def test_free_drafts_are_always_made_and_verified_where_they_pay() -> None:
    steered = controller(FREE, 16)
    requests = batch(8, limit=16, drafter="ngram")
    seen = play(steered, requests, lambda i: 16 if i == 3 else 0, 80)
    assert {k for k, _ in seen} == {16}
    copier = [lengths[3] for _, lengths in seen]
    others = [sum(lengths) - lengths[3] for _, lengths in seen]
    assert copier[-1] == 16
    assert sum(others[20:]) <= 0.1 * 60 * 7


def test_no_draft_no_length() -> None:
    steered = controller(FREE, 16)
    requests = batch(3, limit=16)
    steered.draft_steps(requests)
    lengths = steered.verified_lengths(requests, [0, 5, 0])
    assert lengths[0] == lengths[2] == 0 < lengths[1] <= 5
    assert steered.verified_lengths(requests, [0, 0, 0]) == [0, 0, 0]
    assert steered.draft_steps([]) == 0
    assert steered.verified_lengths([], []) == []


def test_a_free_drafter_beside_a_draft_model() -> None:
    """The copier's matches cost no draft steps: they go on when the draft model is parked."""
    steered = controller(COSTS, 16)
    copier, other = DraftRequest("c", 1000, 16, "ngram"), DraftRequest("o", 1000, 16, "draft")
    seen = []
    for _ in range(60):
        steps = steered.draft_steps([copier, other])
        lengths = steered.verified_lengths([copier, other], [16, steps])
        if lengths[0]:
            steered.observe_acceptance("c", lengths[0], lengths[0], "ngram")
        if lengths[1]:
            steered.observe_acceptance("o", lengths[1], 0, "draft")
        seen.append((steps, lengths))
    assert sum(steps > 0 for steps, _ in seen[20:]) <= 3
    assert seen[-1][1] == [16, 0]


def test_no_probe_of_a_draft_model_whose_requests_have_no_room() -> None:
    steered = controller(COSTS, 16)
    play(steered, batch(2, drafter="draft"), lambda _: 0, 100)
    probes = steered.probes
    requests = [DraftRequest(0, 1000, 16, "ngram"), DraftRequest(1, 1000, 0, "draft")]
    assert all(k == 0 for k, _ in play(steered, requests, lambda _: 0, 1000))
    assert steered.probes == probes


@pytest.mark.parametrize("costs", [COSTS, FREE, None])
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_no_length_exceeds_a_limit_or_what_is_at_hand(costs, data) -> None:
    fixed = data.draw(st.booleans())
    steered = controller(costs, 6, fixed_length=fixed)
    chance = random.Random(data.draw(st.integers(0, 99)))
    ids: list[int] = []
    for step in range(60):
        if chance.random() < 0.3:
            ids.append(step)
        if ids and chance.random() < 0.2:
            steered.forget(ids.pop(chance.randrange(len(ids))))
        requests = [
            DraftRequest(i, chance.randrange(4000), chance.randrange(9), chance.choice("ab"))
            for i in ids
        ]
        k = steered.draft_steps(requests)
        assert 0 <= k <= 6
        free = costs is FREE and not fixed
        assert free or k <= max((r.limit for r in requests), default=0)
        at_hand = [chance.randrange(10) for _ in requests]
        lengths = steered.verified_lengths(requests, at_hand)
        for request, length, available in zip(requests, lengths, at_hand, strict=True):
            assert 0 <= length <= min(6, request.limit, available)
            steered.observe_acceptance(
                request.request_id, length, chance.randint(0, length), request.drafter
            )
        times = StepTimes(chance.random(), chance.random(), chance.random(), k)
        steered.observe_step(lengths, [r.context_rows for r in requests], times)
    assert sum(steered.chosen) > 0 or not ids


def test_a_fixed_length_is_what_was_given_within_limits() -> None:
    steered = controller(COSTS, 5, fixed_length=True)
    requests = [DraftRequest("a", 10, 8), DraftRequest("b", 10, 3)]
    for _ in range(20):
        assert steered.draft_steps(requests) == 5
        assert steered.verified_lengths(requests, [5, 5]) == [5, 3]
        steered.observe_acceptance("a", 5, 0)
        steered.observe_acceptance("b", 3, 0)
    assert steered.chosen == [0, 0, 0, 20, 0, 20]
    assert steered.draft_steps([DraftRequest("b", 10, 0)]) == 0


def test_without_room_nothing_is_drafted_and_nothing_parked() -> None:
    steered = controller()
    for _ in range(50):
        assert steered.draft_steps(batch(4, limit=0)) == 0
    assert steered.parked_steps == 0
    assert steered.draft_steps(batch(4)) > 0


def test_the_same_calls_give_the_same_lengths() -> None:
    first, second = (play(controller(), batch(8), lambda i: i, 200) for _ in range(2))
    assert first == second


def test_without_costs_a_rule_of_thumb_serves_and_the_clock_corrects_it() -> None:
    steered = controller(None)
    assert steered.draft_steps(batch(1)) > 0
    assert play(steered, batch(1), lambda _: 8, 40)[-1] == (8, [8])
    dear = controller(None)
    requests = batch(1)
    chance = random.Random(0)
    for _ in range(60):
        k = dear.draft_steps(requests)
        lengths = dear.verified_lengths(requests, [k])
        if lengths[0]:
            dear.observe_acceptance(0, lengths[0], int(chance.random() < 0.6))
        dear.observe_step(lengths, [1000], StepTimes(1.0, 0.0, 1.0 * k, k))
    assert dear.draft_steps(requests) == 0, "a draft step takes as long as the target's"


def test_costs_that_come_later_count() -> None:
    steered = controller(None)
    play(steered, batch(1), lambda _: 8, 10)
    dear = StepCosts(COSTS.forward, COSTS.attention, ((1, 1.0),))
    steered.set_costs(dear)
    assert steered.draft_steps(batch(1)) == 0


def test_memory_follows_the_requests_that_live() -> None:
    steered = controller()
    for i in range(400):
        requests = [DraftRequest(j, 1000, 8) for j in range(i, i + 8)]
        k = steered.draft_steps(requests)
        for request, length in zip(
            requests, steered.verified_lengths(requests, [k] * 8), strict=True
        ):
            steered.observe_acceptance(request.request_id, length, length)
        steered.forget(i)
    assert steered._acceptance.slots <= 32


def test_bad_maximum_is_named() -> None:
    with pytest.raises(ValueError, match="max_draft_tokens=-1: expected an int >= 0"):
        controller(most=-1)
    none = controller(most=0)
    assert none.draft_steps(batch(2)) == 0
    assert none.verified_lengths(batch(2), [3, 3]) == [0, 0]
