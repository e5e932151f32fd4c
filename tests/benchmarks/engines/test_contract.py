"""What `base.Engine` promises, of every engine in this process."""

import ctypes
import gc
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from benchmarks.engines import HUGGING_FACE, NAMES, Settings, make, transformers
from benchmarks.engines.base import Batch, Engine, Step, take_turns
from benchmarks.engines.transformers import Dynamic, twin
from benchmarks.lib import llama
from benchmarks.lib.llama import TINY, RandomLlama, drawn_tokens
from benchmarks.lib.timing import Budget

LARGEST = Batch(3, 40, 30)


@pytest.fixture(scope="module")
def model() -> RandomLlama:
    return RandomLlama(replace(TINY, dtype="float32"), 128)


@pytest.fixture(scope="module", params=HUGGING_FACE)
def engine(request: pytest.FixtureRequest, model: RandomLlama) -> Iterator[Engine]:
    engine = make(request.param, Settings(r=16))
    engine.start(model, LARGEST)
    yield engine
    engine.close()
    engine.close()


@pytest.fixture(scope="module")
def expected(model: RandomLlama) -> dict[str, object]:
    """DynamicCache's tokens after a prompt, and after drawn rows."""
    engine = Dynamic()
    engine.start(model, LARGEST)
    tokens = engine.generate(drawn_tokens(512, 2, 9), 12)
    engine.fill(Batch(2, 27, 12))
    logits = engine.logits()
    engine.step(8)
    return {"generated": tokens, "logits": logits, "tokens": engine.tokens()}


def test_names(engine: Engine) -> None:
    assert engine.name in NAMES
    assert engine.reference in NAMES
    assert engine.threads == torch.get_num_threads()
    assert engine.peer == (not engine.name.startswith("bmc"))


def test_a_generation_is_what_a_user_gets(engine: Engine, expected: dict) -> None:
    tokens = engine.generate(drawn_tokens(512, 2, 9), 12)
    assert tokens.shape == (2, 21)
    assert torch.equal(tokens, expected["generated"])


def test_filled_stepped_and_asked(engine: Engine, expected: dict) -> None:
    """The same rows give every engine the same logits and tokens, batch after batch."""
    engine.fill(Batch(3, 12, 5))
    assert engine.logits().shape == (3, 512)
    engine.fill(Batch(2, 27, 12))
    logits = engine.logits()
    assert logits.dtype == torch.float32
    torch.testing.assert_close(logits, expected["logits"], rtol=2e-3, atol=2e-3)
    steps = engine.step(8)
    assert len(steps) == 8
    assert all(step.seconds > 0 for step in steps)
    assert engine.tokens() == expected["tokens"]
    counted = engine.counted()
    # 27 rows in chunks of 16: the row after 32 makes the cache grow, in the fifth timed step.
    assert [step.grew for step in steps] == [counted is not None and i == 4 for i in range(8)]


def test_a_reference_replays_the_steps_of_another(engine: Engine, expected: dict) -> None:
    """The tokens of many steps, run through at once, end with the logits of the last step."""
    engine.fill(Batch(2, 27, 12))
    engine.step(9)
    logits = engine.logits()
    tokens = torch.tensor(engine.tokens())[:, :-1]
    replayed = engine.replay(tokens)
    torch.testing.assert_close(replayed, logits, rtol=2e-3, atol=2e-3)


def test_a_batch_is_given_back(engine: Engine) -> None:
    shape = replace(TINY, dtype="float32")
    batch = Batch(64, 1000, 8)
    engine.fill(batch)
    engine.step(1)
    filled = resident_bytes()
    engine.empty()
    engine.empty()
    assert filled - resident_bytes() > 0.9 * batch.sequences * batch.rows * shape.row_bytes
    engine.fill(Batch(1, 9, 2))
    engine.step(1)
    engine.empty()


def resident_bytes() -> int:
    gc.collect()
    # What the process has given back to the allocator is not resident for its sake.
    ctypes.CDLL(None).malloc_trim(0)
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_the_tables_of_drawn_rows_are_drawn_once(
    engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn = []
    right = llama.DrawnRows.__init__

    def counting(self, *arguments) -> None:
        drawn.append(arguments)
        right(self, *arguments)

    monkeypatch.setattr(llama.DrawnRows, "__init__", counting)
    transformers.drawn_rows.cache_clear()
    for _ in range(3):
        engine.fill(Batch(1, 9, 2))
    assert len(drawn) == 1


def test_a_twin_has_the_same_weights(model: RandomLlama) -> None:
    engine = Dynamic()
    engine.start(model, LARGEST)
    other = engine.model
    assert other is not model.module
    assert twin(model.module).lm_head is not model.module.lm_head
    pairs = zip(model.module.parameters(), other.parameters(), strict=True)
    assert all(a.data_ptr() == b.data_ptr() for a, b in pairs)


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(ValueError, match="engine 'x'; allowed: dynamic"):
        make("x", Settings())
    with pytest.raises(ValueError, match="llama_cpp_python"):
        make("llama_cpp", Settings())


class Counting(Dynamic):
    """Its steps take ten seconds of a clock that nothing else moves."""

    def __init__(self, name: str, turns: list[str], now: list[float]) -> None:
        self.name, self.turns, self.now = name, turns, now

    def step(self, count: int) -> list[Step]:
        self.turns.append(self.name)
        self.now[0] += 10.0 * count
        return [Step(10.0)] * count


def test_turns_end_with_the_budget_but_not_before_the_first() -> None:
    turns: list[str] = []
    now = [0.0]
    engines = {name: Counting(name, turns, now) for name in ("a", "b")}
    budget = Budget(50.0, lambda: now[0])
    steps, rounds = take_turns(engines, 10, lambda engine: 1, budget)
    # Each turn is a step that wakes the engine, whosever it is, and the one that is timed.
    assert turns == [name for name in "abba" for _ in range(2)]
    assert [len(found) for found in steps.values()] == [2, 2]
    assert rounds == 2
    late = take_turns(engines, 3, lambda e: 2, Budget(-1.0, lambda: now[0]))
    assert [len(found) for found in late.steps.values()] == [2, 2]
    assert late.rounds == 1


def test_no_garbage_is_collected_while_steps_are_timed() -> None:
    class Watching(Counting):
        def step(self, count: int) -> list[Step]:
            enabled.append(gc.isenabled())
            return super().step(count)

    enabled: list[bool] = []
    take_turns({"a": Watching("a", [], [0.0])}, 2, lambda engine: 1, Budget(None))
    assert enabled == [False] * 4
    assert gc.isenabled()
