"""The folders and prompts of a case's target and draft.

Promises that the models of one pair of a run are held at a time, and that the epsilon of a pair is
found once. Knows nothing of systems.
"""

from __future__ import annotations

import gc
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from benchmarks.engines.speculating.base import DRAFT, Setup
from benchmarks.lib.chain import ChainLlama, copying_prompts, hard_prompts, tuned
from benchmarks.speculation.cases import COPIED, DEMO, MIXED, PLAIN, Case, Pair

QUESTION = "Write a function that reads a file and returns its lines."
ROWS_BESIDE = 512
"""That a model is told to expect beside prompts and new tokens."""


def rows_of(cases: Sequence[Case]) -> int:
    """Longest sequence of the cases."""
    return max(case.rows + 2 * case.new for case in cases) + ROWS_BESIDE


class Models:
    """Targets and drafts of a run. Close it."""

    def __init__(self) -> None:
        self._stack = ExitStack()
        self._epsilons: dict[Pair, float] = {}

    def close(self) -> None:
        self._stack.close()

    def setup(self, cases: Sequence[Case]) -> Setup:
        """For cases of one pair; what was made for others before is gone."""
        self._stack.close()
        gc.collect()
        pair = cases[0].pair
        widest = (max(getattr(case, name) for case in cases) for name in ("batch", "rows", "new"))
        batch, rows, new = widest
        most = max(case.max_draft_tokens for case in cases)
        if pair.shape is DEMO:
            folder = demo()
            return Setup(
                folder / "target", folder / "draft", "bfloat16", DRAFT, most, batch, rows, new,
                2 * DEMO.row_bytes, 2 * DEMO.weight_bytes,
            )  # fmt: skip
        target = self._target(pair, rows_of(cases))
        draft = target.draft(wrong=pair.wrong) if pair.method == DRAFT else None
        models = [target, *([] if draft is None else [draft])]
        for model in models:
            self._stack.callback(model.close)
        row_bytes, weight_bytes = (
            sum(getattr(model.shape, name) for model in models)
            for name in ("row_bytes", "weight_bytes")
        )
        return Setup(
            target, draft, pair.shape.dtype, pair.method, most, batch, rows, new, row_bytes,
            weight_bytes,
        )  # fmt: skip

    def _target(self, pair: Pair, rows: int) -> ChainLlama:
        chain = ChainLlama(pair.shape, rows, draft_layers=pair.draft_layers)
        if not pair.tuned:
            return chain
        if pair not in self._epsilons:
            self._epsilons[pair] = tuned(chain, pair.acceptance).epsilon
            gc.collect()  # its hooks hold a module in a circle
        return ChainLlama(
            pair.shape, rows, draft_layers=pair.draft_layers, epsilon=self._epsilons[pair]
        )

    def epsilon(self, pair: Pair) -> float | None:
        return self._epsilons.get(pair)


def demo() -> Path:
    """The demo model, made now if it is not there: two minutes."""
    from tools.demo import model

    return model.ensure()


def prompts(case: Case) -> list[list[int]]:
    """Of a case; mixed ones copy in turns."""
    if case.pair.shape is DEMO:
        return [_question()]
    size = (case.pair.shape.vocabulary, case.batch, case.rows)
    if case.text == PLAIN:
        return copying_prompts(*size, case.pair.acceptance)
    found = hard_prompts(*size)
    if case.text == MIXED:
        found[::2] = copying_prompts(*size, COPIED)[::2]
    return found


def _question() -> list[int]:
    """As the server's chat endpoint makes it."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo() / "target")
    messages = [{"role": "user", "content": QUESTION}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])
