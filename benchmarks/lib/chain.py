"""A Llama whose greedy text is known, a draft for it, and prompts that it continues.

A random Llama neither copies nor agrees with anything, so this one is built. The row of token
`t + 1` in the output layer is the embedding of token `t`: the text counts upward, as long as the
layers between add little. The vocabulary has two halves, each counting in a circle:

    plain   long embeddings: nothing that the layers add changes the next token. A prompt that holds
            such a run is really continued by it, so n-gram finds the model's own text; a stray
            token after a share of 1 - a of the run makes each draft token right with probability a.
    hard    short embeddings: the layers from `draft_layers` on add noise that depends on the token,
            `epsilon` times their residual branches, and where it wins the text goes on at another
            hard token.

The draft is the first `draft_layers` layers with the same embedding and output layer: with epsilon
0 it is always right, and the larger epsilon the less often on the hard half; on the plain half it
is always right. `agreement` measures how often, and `tuned` finds the epsilon of a wanted share.

Promises that logits are not tied: next tokens of the plain half win by far more than bfloat16
rounds. Knows nothing of engines and clocks.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import replace

import torch

from benchmarks.lib.llama import WEIGHT_STD, LlamaShape, RandomLlama

PLAIN_NORM, HARD_NORM = 8.0, 1.0
"""Of embeddings, per element; the layers' input is normed, so both halves get the same noise."""
PLAIN_ROW = 0.5
"""Length of the output layer's rows of plain tokens, over that of hard ones: noise elects those."""
BASE_SCALE = 0.05
"""Of the residual branches of layers that the draft has as well."""
AGREEMENT_ROWS = 256
BISECTIONS = 9


class ChainLlama(RandomLlama):
    """The model, or its draft.

    Args:
        shape: of the target.
        draft_layers: that the draft has of them.
        epsilon: scale of the residual branches of all later ones.
        shift: added to the next token: a draft with shift 1 is always wrong.
        max_rows, seed: see `RandomLlama`.
    """

    def __init__(
        self,
        shape: LlamaShape,
        max_rows: int,
        *,
        draft_layers: int = 1,
        epsilon: float = 0.0,
        shift: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(shape, max_rows, seed)
        self.draft_layers = draft_layers
        self.epsilon = epsilon
        self.shift = shift

    def draft(self, *, wrong: bool = False) -> ChainLlama:
        """Its first layers. `wrong`: its next token is always another one."""
        shape = replace(self.shape, name=f"{self.shape.name} draft", layers=self.draft_layers)
        return ChainLlama(
            shape,
            self.max_rows,
            draft_layers=self.draft_layers,
            shift=int(wrong),
            seed=self.seed,
        )

    def weights(self) -> Iterator[tuple[str, torch.Tensor]]:
        embedding: torch.Tensor | None = None
        for name, weight in super().weights():
            if name == "model.embed_tokens.weight":
                embedding = weight / WEIGHT_STD
                yield name, embedding * self._norms(PLAIN_NORM, HARD_NORM, weight.dtype)
            elif name == "lm_head.weight":
                assert embedding is not None
                yield name, self._output_rows(embedding)
            elif name.endswith(("o_proj.weight", "down_proj.weight")):
                layer = int(name.split(".")[2])
                yield name, weight * (BASE_SCALE if layer < self.draft_layers else self.epsilon)
            else:
                yield name, weight

    def _norms(self, plain: float, hard: float, dtype: torch.dtype) -> torch.Tensor:
        """By token, `[vocabulary, 1]`."""
        norms = torch.full((self.shape.vocabulary, 1), hard, dtype=dtype)
        norms[: self.shape.vocabulary // 2] = plain
        return norms

    def _output_rows(self, embedding: torch.Tensor) -> torch.Tensor:
        halves = embedding.chunk(2)  # the second begins where `hard_tokens` does
        rows = torch.cat([half.roll(1 + self.shift, 0) for half in halves])
        rows = rows * (self.shape.hidden**-0.5)
        return rows * self._norms(PLAIN_ROW, 1.0, rows.dtype)


def hard_prompts(vocabulary: int, batch: int, rows: int, seed: int = 0) -> list[list[int]]:
    """Hard tokens at random, as many lists as sequences."""
    rng = random.Random(seed)
    return [[rng.randrange(vocabulary // 2, vocabulary) for _ in range(rows)] for _ in range(batch)]


def copying_prompts(
    vocabulary: int, batch: int, rows: int, acceptance: float, seed: int = 0
) -> list[list[int]]:
    """Prompts that hold what the model says next, with a stray token after a share of
    1 - `acceptance` of it: an n-gram draft token is right with that probability, independently.

    Of `rows` prompt tokens about `rows / (2 - acceptance)` are the model's text.
    """
    rng = random.Random(seed)
    half = vocabulary // 2
    prompts = []
    for number in range(batch):
        first = number * half // batch
        prompt: list[int] = []
        count = 0
        while len(prompt) < rows - 1:
            prompt.append((first + count) % half)
            count += 1
            if rng.random() > acceptance:
                prompt.append(rng.randrange(half, vocabulary))
        prompts.append([*prompt[: rows - 1], first])
    return prompts


def continuation(vocabulary: int, prompt: list[int], new: int) -> list[int]:
    """What the model says after a prompt that ends with a plain token."""
    return [(prompt[-1] + 1 + count) % (vocabulary // 2) for count in range(new)]


class _Scaled:
    """A chain's module whose later layers' residual branches are scaled while it runs."""

    def __init__(self, chain: ChainLlama) -> None:
        whole = ChainLlama(
            chain.shape, AGREEMENT_ROWS, draft_layers=chain.draft_layers, epsilon=1.0,
            seed=chain.seed,
        )  # fmt: skip
        self.module = whole.module
        self.epsilon = 0.0
        for layer in self.module.model.layers[chain.draft_layers :]:
            for branch in (layer.self_attn.o_proj, layer.mlp.down_proj):
                branch.register_forward_hook(lambda module, inputs, output: output * self.epsilon)
        vocabulary = chain.shape.vocabulary
        (prompt,) = hard_prompts(vocabulary, 1, AGREEMENT_ROWS, chain.seed + 1)
        self.tokens = torch.tensor([prompt])
        self.drafted = self._next(0.0)

    @torch.inference_mode()
    def _next(self, epsilon: float) -> torch.Tensor:
        self.epsilon = epsilon
        return self.module(input_ids=self.tokens, use_cache=False).logits.argmax(-1)

    def agreement(self, epsilon: float) -> float:
        return float((self._next(epsilon) == self.drafted).float().mean())


def agreement(chain: ChainLlama) -> float:
    """Share of hard tokens after which target and draft say the same."""
    return _Scaled(chain).agreement(chain.epsilon)


def tuned(chain: ChainLlama, wanted: float) -> ChainLlama:
    """The chain with the epsilon at which its draft is right on a share `wanted` of hard tokens,
    by bisection over one forward each.

    Raises:
        ValueError: `wanted` is not between 0 and 1.
    """
    if not 0 < wanted < 1:
        raise ValueError(f"wanted={wanted}; allowed: more than 0, less than 1")
    scaled = _Scaled(chain)
    low, high = 0.0, 0.1
    while scaled.agreement(high) > wanted:
        low, high = high, 2 * high
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        if scaled.agreement(middle) > wanted:
            low = middle
        else:
            high = middle
    return ChainLlama(
        chain.shape, chain.max_rows, draft_layers=chain.draft_layers,
        epsilon=(low + high) / 2, seed=chain.seed,
    )  # fmt: skip
