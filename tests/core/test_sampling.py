"""Drawing and verifying tokens in native code, against sorting and double precision."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bmc_core import native
from bmc_core.sampling import Drafts, RequestSettings, keep_top, sample, verify
from tests.support.sampling import drawn, kept, total_variation

ISAS = [isa for isa in native.usable_isas() if isa in ("portable", "avx2", "avx512")]
VOCABULARIES = (1, 255, 3000)


@pytest.fixture(params=ISAS, autouse=True)
def isa(request: pytest.FixtureRequest) -> Iterator[None]:
    with native.forced_isa(request.param):
        yield


def logits_of(rows: int, vocab: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(vocab)
    return (3 * torch.randn(rows, vocab, generator=generator)).to(dtype)


def seeds_of(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(0, 2**31, (count,), generator=torch.Generator().manual_seed(seed))


def repeated(value: float, rows: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.full((rows,), value, dtype=dtype)


def drafts_of(tokens: list[list[int]], probs: torch.Tensor | None = None) -> Drafts:
    """Draft tokens over logits whose rows lie request by request."""
    counts = torch.tensor([len(row) for row in tokens])
    ends = counts.cumsum(0)
    firsts = (counts + 1).cumsum(0) - counts - 1
    targets = [
        int(first) + i for first, row in zip(firsts, tokens, strict=True) for i in range(len(row))
    ]
    return Drafts(
        torch.tensor([token for row in tokens for token in row], dtype=torch.int32),
        ends.int(),
        torch.tensor(targets, dtype=torch.int32),
        (firsts + counts).int(),
        int(counts.max()),
        probs,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABULARIES)
def test_greedy_is_the_first_of_the_largest(vocab: int, dtype: torch.dtype) -> None:
    wide = logits_of(9, vocab + 3, dtype)
    rows = wide[:, :vocab]  # with a gap behind each row, as vLLM's are
    wide[:, vocab:] = 100.0
    rows[1, :] = 2.0
    rows[2, :] = -torch.inf
    expected = rows.argmax(dim=1).int()
    assert torch.equal(sample(rows, RequestSettings(None), None), expected)
    zero = RequestSettings(repeated(0.0, 9))
    assert torch.equal(sample(rows, zero, seeds_of(9)), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("vocab", VOCABULARIES)
@pytest.mark.parametrize(("top_k", "top_p"), [(0, 1.0), (3, 1.0), (0, 0.8), (40, 0.6)])
def test_draws_the_largest_of_value_and_noise(
    vocab: int, dtype: torch.dtype, top_k: int, top_p: float
) -> None:
    rows, seeds, temperature = logits_of(12, vocab, dtype), seeds_of(12), 0.7
    settings = RequestSettings(
        repeated(temperature, 12), repeated(top_k, 12, torch.int32), repeated(top_p, 12)
    )
    values = rows.float() / temperature
    expected = [
        drawn(row, int(seed), top_k, top_p) for row, seed in zip(values, seeds, strict=True)
    ]
    assert sample(rows, settings, seeds).tolist() == expected


@pytest.mark.parametrize("shape", ["flat", "peaked", "ties", "all equal", "masked"])
@pytest.mark.parametrize("vocab", [50, 20000])
def test_keeps_what_sorting_keeps(shape: str, vocab: int) -> None:
    row = logits_of(1, vocab)[0]
    if shape == "flat":
        row *= 0.1
    elif shape == "peaked":
        row[7] = 40.0
    elif shape == "ties":
        row = row.to(torch.bfloat16).float().mul(4).round().div(4)
    elif shape == "all equal":
        row[:] = -3.0
    else:
        row[vocab // 10 :] = -torch.inf
        row[:3] = -torch.finfo(torch.float32).max
    asked = [
        (0, 0.9),
        (0, 0.05),
        (0, 1e-6),
        (1, 1.0),
        (20, 1.0),
        (600, 1.0),
        (50, 0.9),
        (10**6, 0.999),
    ]
    rows = row.repeat(len(asked), 1)
    keep_top(
        rows,
        torch.tensor([k for k, _ in asked], dtype=torch.int32),
        torch.tensor([p for _, p in asked]),
    )
    for found, (top_k, top_p) in zip(rows, asked, strict=True):
        expected = kept(row, top_k, top_p)
        other = torch.isfinite(found) != expected
        # Where the sum reaches p within rounding, one token more or less.
        assert int(other.sum()) <= (top_p < 1), (top_k, top_p)
        assert torch.equal(found[expected & ~other], row[expected & ~other])


def test_the_drawn_follow_the_distribution() -> None:
    row, draws = 2 * logits_of(1, 40)[0], 40000
    rows = row.expand(draws, -1)
    settings = RequestSettings(repeated(2.0, draws), None, repeated(0.9, draws))
    scaled = row / 2
    scaled[~kept(scaled, 0, 0.9)] = -torch.inf
    tokens = sample(rows, settings, seeds_of(draws))
    assert total_variation(tokens, scaled.softmax(0)) < 0.015


def test_draft_tokens_are_kept_as_long_as_they_would_have_been_drawn() -> None:
    rows, seeds = logits_of(9, 300), seeds_of(9)
    settings = RequestSettings(torch.tensor([0.9, 0.0, 1.2]), None, torch.tensor([1.0, 1.0, 0.7]))
    alone = RequestSettings(
        settings.temperature.repeat_interleave(3), None, settings.top_p.repeat_interleave(3)
    )
    tokens = sample(rows, alone, seeds).view(3, 3).tolist()
    all_right = drafts_of([row[:2] for row in tokens])
    assert verify(rows, settings, all_right, seeds).tolist() == tokens
    (a, b, _), (c, _, _), (d, e, _) = tokens
    wrong = drafts_of([[a, b + 1], [c + 1, 0], [-1, e]])
    assert verify(rows, settings, wrong, seeds).tolist() == [[a, b, -1], [c, -1, -1], [d, -1, -1]]


def test_requests_have_as_many_draft_tokens_as_they_like() -> None:
    rows = logits_of(7, 300)
    best = rows.argmax(dim=1).tolist()
    drafts = drafts_of([best[:3], [], best[5:6]])
    tokens = verify(rows, RequestSettings(None), drafts, None)
    assert tokens.tolist() == [best[:4], [best[4], -1, -1, -1], [*best[5:7], -1, -1]]


@pytest.mark.parametrize("top_p", [1.0, 0.8])
def test_drawn_draft_tokens_leave_the_distribution_as_it_is(top_p: float) -> None:
    vocab, draws = 30, 40000
    row, other = 2 * logits_of(2, vocab)
    q = (0.5 * other + 0.5 * row).softmax(0)
    target = row.clone()
    target[~kept(row, 0, top_p)] = -torch.inf
    target = target.softmax(0)
    generator = torch.Generator().manual_seed(1)
    proposed = torch.multinomial(q, draws, replacement=True, generator=generator)
    ends = torch.arange(1, draws + 1, dtype=torch.int32)
    zeros = torch.zeros(draws, dtype=torch.int32)
    drafts = Drafts(proposed.int(), ends, zeros, zeros, 1, q.expand(draws, -1).contiguous())
    settings = RequestSettings(repeated(1.0, draws), None, repeated(top_p, draws))
    tokens = verify(row.view(1, -1), settings, drafts, seeds_of(2 * draws))
    accepted = tokens[:, 1] != -1
    assert float(accepted.float().mean()) == pytest.approx(
        float(torch.minimum(q, target).sum()), abs=0.01
    )
    assert total_variation(tokens[:, 0], target) < 0.015
    assert total_variation(tokens[accepted, 1], target) < 0.02
    assert bool((tokens[accepted, 0] == proposed[accepted]).all())


def test_the_same_on_any_number_of_threads() -> None:
    rows, seeds = logits_of(40, 3000), seeds_of(40)
    best = rows.argmax(dim=1).view(8, 5)[:, :4].tolist()
    settings = RequestSettings(repeated(0.3, 8), None, repeated(0.9, 8))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            found.append(verify(rows, settings, drafts_of(best), seeds))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_what_is_no_number_ends_nothing(value: float) -> None:
    rows = logits_of(4, 300)
    rows[1, 5] = rows[2, :] = value
    settings = RequestSettings(repeated(1.0, 4), repeated(5, 4, torch.int32), repeated(0.5, 4))
    tokens = sample(rows, settings, seeds_of(4))
    assert bool(((tokens >= 0) & (tokens < 300)).all())
    keep_top(rows, settings.top_k, settings.top_p)
    assert int(torch.isfinite(rows[0]).sum()) >= 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"ends": torch.tensor([2, 3], dtype=torch.int32)}, "of all draft tokens is 3; allowed: 4"),
        ({"ends": torch.tensor([3, 4], dtype=torch.int32)}, "of request 0 is 3; allowed: 0 to 2"),
        (
            {"target_rows": torch.tensor([0, 1, 6, 4], dtype=torch.int32)},
            "target row is 6; allowed",
        ),
        ({"bonus_rows": torch.tensor([2, -1], dtype=torch.int32)}, "bonus row is -1; allowed"),
        ({"bonus_rows": torch.tensor([2, 5])}, "bonus_rows has dtype torch.int64; allowed"),
        ({"probs": torch.zeros(4, 9)}, "probs has shape (4, 9)"),
    ],
)
def test_bad_drafts_are_refused(change: dict, words: str) -> None:
    drafts = drafts_of([[1, 2], [3, 4]])._replace(**change)
    with pytest.raises((TypeError, ValueError)) as refused:
        verify(logits_of(6, 300), RequestSettings(None), drafts, None)
    assert words in str(refused.value)


def test_bad_settings_are_refused() -> None:
    rows = logits_of(3, 300)
    with pytest.raises(ValueError, match="temperature has shape"):
        sample(rows, RequestSettings(torch.ones(2)), seeds_of(3))
    with pytest.raises(ValueError, match="seeds are missing"):
        sample(rows, RequestSettings(torch.ones(3)), None)
    with pytest.raises(TypeError, match="logits has dtype torch.float64"):
        sample(rows.double(), RequestSettings(None), None)
    with pytest.raises(ValueError, match="allowed: a contiguous last dimension"):
        sample(rows[:, ::2], RequestSettings(None), None)
    with pytest.raises(TypeError, match="logits has dtype torch.bfloat16"):
        keep_top(rows.bfloat16(), None, torch.ones(3))
    with pytest.raises(ValueError, match="allowed: rows apart"):
        keep_top(rows[:1].expand(3, -1), None, torch.ones(3))
