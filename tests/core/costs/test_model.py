"""The analytical model against brute force: every token of a generation, one by one."""

import math

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bmc_core.costs.model import (
    TOLERANCE,
    Costs,
    Prediction,
    Workload,
    best_draft_tokens,
    best_growths,
    best_rows,
    growing_policy,
    predict,
    tokens_per_step,
)
from bmc_core.policy import BMCPolicy

COPY, ROW, READ, ALLOC = 5e-6, 2e-6, 1e-6, 3e-5

policies = st.one_of(
    st.integers(1, 300).map(lambda r: BMCPolicy(r=r)),
    st.integers(1, 40).map(lambda count: BMCPolicy(T=count)),
    st.floats(0.1, 20).map(lambda c: BMCPolicy.growing(c=c)),
    st.just(BMCPolicy("auto")),
)


def enumerate_tokens(policy: BMCPolicy, work: Workload, costs: Costs, limit: int) -> Prediction:
    """What `predict` says, by walking every step."""
    multiple, growths = work.row_multiple, 0
    copied = copy_seconds = padding = read = step_seconds = spare = most = 0.0

    def hold(held: int, needed: int) -> int:
        return math.ceil(policy.rows_to_hold(held, needed, limit) / multiple) * multiple

    capacity = hold(0, work.prompt_rows)
    for step in range(work.steps):
        valid = work.length(step)
        if work.needed(step) > capacity:
            capacity = hold(capacity, work.needed(step))
            growths += 1
            copied += valid
            copy_seconds += costs.growth_seconds(valid)
        free = capacity - valid - work.draft_tokens - 1
        spare += free
        most = max(most, free)
        padding += costs.c_row * free
        read += costs.c_read * (valid + work.draft_tokens + 1)
        step_seconds += costs.step_seconds(work.batch_size * (work.draft_tokens + 1))
    mean = max(0.0, spare) / work.steps if work.steps else 0.0
    return Prediction(
        growths, copied, copy_seconds, max(0.0, padding), read, step_seconds, mean, most
    )


@given(
    policies,
    st.integers(0, 700),
    st.integers(0, 700),
    st.sampled_from([1, 16]),
    st.integers(0, 5),
    st.floats(0, 1),
)
@example(BMCPolicy(r=1), 0, 8, 1, 1, 1e-9)  # lengths within rounding of whole rows
@example(BMCPolicy(r=7), 100, 700, 1, 3, 1 - 2.0**-40)
def test_prediction_is_the_sum_over_all_tokens(
    policy: BMCPolicy, prompt: int, new: int, multiple: int, drafts: int, acceptance: float
) -> None:
    work = Workload(prompt, new, 2, drafts, acceptance, multiple)
    costs = Costs(COPY, ROW, READ, ALLOC, step_curve=((1, 1e-3), (16, 2e-3)))
    expected = enumerate_tokens(policy, work, costs, work.limit)
    assert predict(policy, work, costs) == pytest.approx(expected, rel=1e-6, abs=1e-9)


@given(st.integers(0, 700), st.integers(0, 700), st.integers(0, 5), st.floats(0, 1))
def test_steps_keep_all_new_rows(prompt: int, new: int, drafts: int, acceptance: float) -> None:
    """The fewest steps that keep N rows on average; each has room for its length and k + 1 rows."""
    work = Workload(prompt, new, 1, drafts, acceptance)
    kept = tokens_per_step(drafts, acceptance)
    assert (work.steps - 1) * kept - 1e-6 < new <= work.steps * kept + 1e-6
    for step in {0, 1, work.steps // 2, max(0, work.steps - 1)} & set(range(work.steps)):
        rows = prompt + step * kept + drafts + 1
        assert min(rows, work.limit) - 1e-6 <= work.needed(step) <= min(rows + 1, work.limit)


@given(st.integers(1, 200), st.integers(0, 50), st.integers(1, 2000))
def test_number_of_growths(r: int, chunks: int, new: int) -> None:
    """After a prompt that fills its chunks: ceil(N/r) growths; from nothing as well."""
    work = Workload(chunks * r, new)
    assert predict(BMCPolicy(r=r), work, Costs(COPY)).growths == math.ceil(new / r)


@given(st.integers(1, 50), st.integers(1, 100), st.integers(0, 20))
def test_closed_form_of_whole_chunks(growths: int, r: int, chunks: int) -> None:
    """The formula in the module docstring, term by term, where r divides P and N."""
    new, prompt = growths * r, chunks * r
    result = predict(BMCPolicy(r=r), Workload(prompt, new), Costs(COPY, ROW, READ, ALLOC))
    copies = growths * (ALLOC + COPY * prompt) + COPY * new * (growths - 1) / 2
    assert result.copy_seconds == pytest.approx(copies)
    assert result.padding_seconds == pytest.approx(ROW * new * (r - 1) / 2)
    assert result.copied_rows == pytest.approx(growths * prompt + new * (growths - 1) / 2)
    assert result.seconds == pytest.approx(
        copies + ROW * new * (r - 1) / 2 + READ * (new * prompt + new * (new + 1) / 2)
    )


@settings(max_examples=40, deadline=None)
@given(
    st.integers(0, 400),
    st.integers(1, 400),
    st.floats(1e-7, 1e-4),
    st.floats(1e-7, 1e-4),
    st.floats(0, 1e-3),
)
def test_best_rows_is_near_the_best_of_all(
    prompt: int, new: int, copy: float, row: float, alloc: float
) -> None:
    """Of all r from 1 to P + N none is much better: the grid's steps of 19 % cost little."""
    work, costs = Workload(prompt, new), Costs(copy, row, 0.0, alloc)

    def seconds(r: int) -> float:
        return predict(BMCPolicy(r=r), work, costs).seconds

    least = min(seconds(r) for r in range(1, prompt + new + 1))
    assert seconds(best_rows(work, costs)) <= 1.2 * least


@given(st.integers(1, 6), st.floats(0.05, 20))
def test_best_growths_follow_the_square_root(power: int, ratio: float) -> None:
    """P = 0: T* = sqrt(N c_row / c_copy)."""
    new = 400 * 4**power
    growths = best_growths(Workload(0, new), Costs(COPY, ratio * COPY))
    assert growths == pytest.approx(math.sqrt(new * ratio))


@given(st.integers(0, 2000), st.integers(500, 4000), st.floats(0, 1e-3))
def test_best_growths_is_the_minimum_of_the_continuous_cost(
    prompt: int, new: int, alloc: float
) -> None:
    costs = Costs(COPY, ROW, 0.0, alloc)

    def cost(growths: float) -> float:
        copies = growths * (alloc + COPY * prompt) + COPY * new * growths / 2
        return copies + ROW * new**2 / (2 * growths)

    best = best_growths(Workload(prompt, new), costs)
    for factor in (0.9, 1.1):
        assert best == 1.0 or cost(best) < cost(best * factor)
    assert best >= 1.0


def test_free_padding_holds_the_least_reserve_within_the_tolerance() -> None:
    work, costs = Workload(256, 2048), Costs(COPY, 0.0, READ)
    r = best_rows(work, costs)
    least = predict(BMCPolicy.up_front(), work, costs).cache_seconds
    assert r < work.limit / 2
    assert predict(BMCPolicy(r=r), work, costs).cache_seconds <= (1 + TOLERANCE) * least
    assert predict(BMCPolicy(r=r // 2), work, costs).cache_seconds > (1 + TOLERANCE) * least
    assert best_rows(work, Costs(COPY)) == work.limit
    assert best_rows(work, Costs(0.0, 0.0, READ)) == 1


def test_free_growths_and_free_padding() -> None:
    assert best_rows(Workload(0, 100), Costs(0.0, ROW)) == 1
    assert best_rows(Workload(10, 0), Costs(COPY, ROW)) == 10
    assert best_rows(Workload(0, 0), Costs(COPY, ROW)) == 1
    assert best_growths(Workload(0, 100), Costs(0.0, ROW)) == 100


def test_rows_of_the_native_layout_are_whole_tiles() -> None:
    for new in (30, 100, 1000):
        r = best_rows(Workload(7, new, row_multiple=16), Costs(COPY, ROW))
        assert r % 16 == 0 or r == 7 + new


@pytest.mark.parametrize("new", [300, 3000, 30000])
def test_growing_is_near_the_best_in_hindsight(new: int) -> None:
    costs = Costs(COPY, ROW, 0.0, ALLOC)
    work = Workload(0, new)
    best = predict(BMCPolicy(r=best_rows(work, costs)), work, costs).seconds
    growing = predict(growing_policy(costs), work, costs, know_limit=False).seconds
    assert growing < 1.1 * best


def test_growing_where_padding_is_free_stays_within_a_multiple_of_the_tolerance() -> None:
    costs = Costs(COPY, 0.0, READ)
    for new in (2000, 20000):
        result = predict(growing_policy(costs), Workload(0, new), costs, know_limit=False)
        assert result.copy_seconds < 2 * TOLERANCE * result.read_seconds
    assert growing_policy(Costs(0.0)) == BMCPolicy.growing()


def test_growth_curve_is_read_between_and_beyond_its_points() -> None:
    costs = Costs(0.0, growth_curve=((10, 1.0), (20, 2.0), (40, 8.0)))
    assert [costs.growth_seconds(n) for n in (0, 10, 15, 30, 40, 80)] == [1, 1, 1.5, 5, 8, 16]
    linear = Costs(0.0, growth_curve=((1, 1.0), (101, 101.0)))
    assert linear.mean_growth_seconds(10, 90) == pytest.approx(50)
    assert Costs(2.0, c_alloc=1.0).mean_growth_seconds(10, 90) == 101


@given(st.integers(0, 8), st.floats(0, 1))
def test_tokens_per_step(drafts: int, acceptance: float) -> None:
    """Mean over the number of accepted draft tokens."""
    chances = [acceptance**i * (1 - acceptance) for i in range(drafts)] + [acceptance**drafts]
    mean = sum(chance * (i + 1) for i, chance in enumerate(chances))
    assert tokens_per_step(drafts, acceptance) == pytest.approx(mean)


def test_drafts_shorten_the_generation() -> None:
    costs = Costs(COPY, ROW, READ, step_curve=((1, 1e-3), (16, 1.5e-3)))
    plain = predict(BMCPolicy(r=64), Workload(0, 640), costs)
    drafted = predict(BMCPolicy(r=64), Workload(0, 640, 1, 4, 0.8), costs)
    assert drafted.seconds < plain.seconds
    assert drafted.growths >= plain.growths, "the last step needs room for its drafts too"
    assert drafted.padding_seconds < plain.padding_seconds / 2, "fewer steps read the padding"
    nothing = predict(BMCPolicy(r=64), Workload(0, 640, 1, 4, 0.0), costs)
    assert nothing.read_seconds > plain.read_seconds


def test_draft_length_follows_the_price_of_rows() -> None:
    cheap = Costs(COPY, c_read=READ, step_curve=((1, 1e-3), (16, 1.01e-3)))
    dear = Costs(COPY, c_read=0.0, step_curve=((1, 1e-3), (2, 2e-3)))
    work = Workload(100, 100, 1, acceptance=0.8)
    assert best_draft_tokens(work, cheap) > 5
    assert best_draft_tokens(work, cheap, spare_rows=4) == 3
    assert best_draft_tokens(work, cheap, spare_rows=0) == 0
    assert best_draft_tokens(work, dear) == 0
    assert best_draft_tokens(Workload(100, 100), cheap) == 0, "nothing is accepted"


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: Costs(-1.0), "c_copy=-1.0"),
        (lambda: Costs(0.0, float("nan")), "c_row=nan"),
        (lambda: Costs(0.0, growth_curve=((1, 1.0), (1, 2.0))), "growth_curve=.*rising rows"),
        (lambda: Costs(0.0, step_curve=((1, -1.0),)), "step_curve=.*seconds >= 0"),
        (lambda: Workload(-1, 1), "prompt_rows=-1"),
        (lambda: Workload(1, 1, 0), "batch_size=0"),
        (lambda: Workload(1, 1, acceptance=1.5), "acceptance=1.5: expected 0 to 1"),
    ],
)
def test_bad_values_are_named(build, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build()
