"""What the speculation benchmark measures: models, prompts and systems. Plain data only."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from benchmarks.engines.speculating.base import AUTO, DEFAULT, DRAFT, NGRAM, NONE, Length
from benchmarks.lib.llama import LlamaShape

SMALL = LlamaShape("small", 8, 512, 8, 8, 64, intermediate=1408, vocabulary=8192, dtype="float32")
MHA = LlamaShape("mha", 8, 2048, 32, 32, 64, vocabulary=8192)
DEEP = replace(MHA, name="deep mha", layers=20)
GQA = LlamaShape("gqa 4:1", 6, 4096, 32, 8, 128, intermediate=11008, vocabulary=8192)

PLAIN, HARD, MIXED, CHAT = "plain", "hard", "mixed", "chat"
"""Prompts: that hold what the model says; hard tokens; both in turns; a question in words."""
COPIED = 0.9
"""Acceptance of the plain half of mixed prompts."""
DEMO = LlamaShape("demo", 4, 256, 4, 2, 64, intermediate=704, vocabulary=10240)
"""Of `tools/demo`'s target; the case says where it is from."""

Systems = tuple[tuple[str, tuple[Length, ...]], ...]


@dataclass(frozen=True)
class Pair:
    """A target and where its draft tokens come from.

    Attributes:
        acceptance: of a draft token after hard tokens; of an n-gram draft token, by the prompts.
        draft_layers: of the target's layers.
        wrong: the draft's next token is always another one.
    """

    shape: LlamaShape
    method: str
    acceptance: float
    draft_layers: int = 1
    wrong: bool = False

    @property
    def tuned(self) -> bool:
        """Whether an epsilon must be found."""
        return self.method == DRAFT and not self.wrong and self.shape is not DEMO


@dataclass(frozen=True)
class Case:
    """Prompts of one kind, continued by several systems.

    Attributes:
        rows: of each of `batch` prompts. new: tokens that each gets in a turn.
        systems: each with the draft lengths that it is tried with.
    """

    name: str
    pair: Pair
    text: str
    batch: int
    rows: int
    new: int
    systems: Systems

    @property
    def max_draft_tokens(self) -> int:
        lengths = [n for _, found in self.systems for n in found if isinstance(n, int)]
        return max(8 if self.pair.method == DRAFT else 16, *lengths, 0)


def bmc(*lengths: int) -> Systems:
    return (("bmc_vllm", (NONE, *lengths, AUTO)),)


def both(*lengths: int) -> Systems:
    return (("cpu_attn", (NONE, *lengths)), *bmc(*lengths))


def hugging_face(ours: str, theirs: str, *lengths: int) -> Systems:
    return ((theirs, (NONE, DEFAULT, *lengths)), (ours, (NONE, *lengths, AUTO)))


_SMALL_NGRAM = Pair(SMALL, NGRAM, 0.7)
_NGRAM = Pair(MHA, NGRAM, 0.6)
_SHARED = Pair(MHA, NGRAM, 0.7)
_WIDE = Pair(GQA, NGRAM, 0.7)
_DRAFT = Pair(DEEP, DRAFT, 0.7)
_UNEVEN = Pair(DEEP, DRAFT, 0.4)
_WRONG = Pair(MHA, DRAFT, 0.0, wrong=True)
_DEMO = Pair(DEMO, DRAFT, 0.0)

_QUICK_SYSTEMS: Systems = (("cpu_attn", (4,)), ("bmc_vllm", (NONE, AUTO)))
QUICK = (
    Case("transformers small draft 1 x 512", Pair(SMALL, DRAFT, 0.7), HARD, 1, 512, 64,
         hugging_face("bmc", "dynamic", 4)),
    Case("small ngram 1 x 512", _SMALL_NGRAM, PLAIN, 1, 512, 96, _QUICK_SYSTEMS),
    Case("small ngram 4 x 512", _SMALL_NGRAM, PLAIN, 4, 512, 96, _QUICK_SYSTEMS),
)  # fmt: skip
FULL = (
    Case("transformers draft 1 x 2000", _DRAFT, HARD, 1, 2000, 96,
         hugging_face("bmc", "dynamic", 2, 4, 6)),
    Case("deepspeed draft 1 x 2000", _DRAFT, HARD, 1, 2000, 96,
         hugging_face("bmc_deepspeed", "deepspeed", 2, 4, 6)),
    Case("mha ngram 4 x 2000", _SHARED, PLAIN, 4, 2000, 96, both(2, 4, 8)),
    Case("gqa ngram 1 x 8000", _WIDE, PLAIN, 1, 8000, 96, both(2, 4, 8)),
    Case("ngram 1 x 512", _NGRAM, PLAIN, 1, 512, 200, bmc(2, 4, 8, 16)),
    Case("draft 1 x 512", _DRAFT, HARD, 1, 512, 128, bmc(1, 2, 4, 6)),
    Case("draft 8 x 512", _DRAFT, HARD, 8, 512, 96, bmc(1, 2, 4)),
    Case("mixed draft 4 x 512", _UNEVEN, MIXED, 4, 512, 96, bmc(1, 2, 4, 8)),
    Case("mixed ngram 4 x 512", _NGRAM, MIXED, 4, 512, 200, bmc(2, 4, 8, 16)),
    Case("mixed ngram 8 x 512", _NGRAM, MIXED, 8, 512, 200, bmc(2, 4, 8, 16)),
    Case("always wrong 1 x 256", _WRONG, HARD, 1, 256, 512, bmc()),
    Case("always wrong 8 x 256", _WRONG, HARD, 8, 256, 512, bmc()),
    Case("demo chat", _DEMO, CHAT, 1, 64, 256, bmc(1, 2, 4)),
)  # fmt: skip
CONTROLLER = "controller, 64 requests"
"""Its microseconds a step; measured in every run that does not leave it out."""


def select(cases: tuple[Case, ...], only: str | None) -> tuple[list[Case], bool]:
    """The cases whose name contains a match, and whether the controller is timed.

    Raises:
        ValueError: `only` is no regular expression or matches none.
    """
    if only is None:
        return list(cases), True
    try:
        chosen = [case for case in cases if re.search(only, case.name)]
        controller = re.search(only, CONTROLLER) is not None
    except re.error as error:
        raise ValueError(f"--only is {only!r}, no regular expression: {error}") from None
    if not chosen and not controller:
        names = [*(case.name for case in cases), CONTROLLER]
        raise ValueError(f"--only is {only!r}; allowed: part of one of {names}")
    return chosen, controller
