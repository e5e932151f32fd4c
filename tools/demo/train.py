"""Train a small Llama against a deadline, on whatever CPU there is.

Promises to return within the budget (plus one step) with the learning rate run down to zero:
the schedule is a function of the share of the budget that is spent, not of a step count. Two
runs on equal machines therefore give like models, not equal ones.
"""

import contextlib
import ctypes
import time
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# `vllm bench latency` draws prompts from ids below 10 000, so a smaller vocabulary would make
# that command fail on the demo model.
VOCABULARY = 10_240
# Short enough to be seen about five times: in two minutes on two cores, knowing little text
# well reads more like Python than having met much text once.
CORPUS_CHARS = 700_000

_SHAPES = {  # hidden size, layers, query heads, KV heads, MLP size
    "target": (256, 4, 4, 2, 704),
    "draft": (128, 1, 4, 2, 384),
}
_HEAD_DIM = 64

# Most steps see short sequences; now and then there is a long one, so that attention also
# learns to stay calm far from the prompt. (sequences, rows)
_SHORT = (4, 256)
_LONG = (1, 1024)
_LONG_EVERY = 10
_LOSS_ROWS = 128  # rows of logits at a time: such a block stays in the cache
_MUON_LR = 0.02
_ADAM_LR = 6e-3


class Trained(NamedTuple):
    """A trained model with how it went."""

    model: LlamaForCausalLM
    steps: int
    tokens: int
    loss: float  # mean over the last tenth of the budget, nats per token


def model_config(name: str, tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Configuration of "target" or "draft"; both share the tokenizer and the head size."""
    hidden, layers, query_heads, kv_heads, mlp = _SHAPES[name]
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=mlp,
        num_hidden_layers=layers,
        num_attention_heads=query_heads,
        num_key_value_heads=kv_heads,
        head_dim=_HEAD_DIM,
        max_position_embeddings=4096,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def has_fast_bfloat16() -> bool:
    """True where bfloat16 matrix products run on the CPU's own instructions."""
    # Both names are private in this torch: without them float32 is used, which is always right.
    return any(
        getattr(torch.cpu, name, lambda: False)()
        for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    )


def keep_freed_memory() -> None:
    """Let glibc reuse the training buffers instead of returning them to the system every step.

    Page faults on buffers of tens of megabytes otherwise take a visible share of each step.
    """
    with contextlib.suppress(OSError, AttributeError):
        libc = ctypes.CDLL(None)
        libc.mallopt(-3, 1 << 30)  # M_MMAP_THRESHOLD
        libc.mallopt(-1, 1 << 30)  # M_TRIM_THRESHOLD


def learning_rate_share(spent: float) -> float:
    """One cycle: up over the first 5 % of the budget, then down to zero in a straight line."""
    warmup = 0.05
    return max(0.0, min(spent / warmup, (1 - spent) / (1 - warmup)))


def _optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for the embedding and the norms.

    In a few hundred steps Muon gets much further than AdamW alone (measured: 5.1 against 5.9
    nats per token after 25 s).
    """
    named = list(model.named_parameters())
    matrices = [p for name, p in named if p.ndim == 2 and "embed_tokens" not in name]
    others = [p for name, p in named if p.ndim != 2 or "embed_tokens" in name]
    return [
        torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=0.01),
        torch.optim.AdamW(others, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.01, fused=True),
    ]


def _backward(model: LlamaForCausalLM, rows: torch.Tensor, autocast: bool) -> float:
    """Forward and backward of one batch; `rows` is [sequences, length + 1] token ids.

    Returns the loss in nats per token. The loss over the vocabulary is most of the work of a
    model this small, so its gradient, softmax minus one-hot, is written out: a few passes over
    a block that stays in the cache, and one matrix product for each operand.
    """
    inputs, targets = rows[:, :-1], rows[:, 1:].flatten()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        hidden = model.model(input_ids=inputs, use_cache=False).last_hidden_state.flatten(0, 1)
    weight = model.lm_head.weight  # [vocabulary, hidden size], shared with the embedding
    dtype = torch.bfloat16 if autocast else torch.float32
    count, total = len(targets), 0.0
    with torch.no_grad():
        states, table = hidden.to(dtype), weight.to(dtype)
        grad = torch.empty(count, len(table), dtype=dtype)
        for start in range(0, count, _LOSS_ROWS):
            part = slice(start, start + _LOSS_ROWS)
            picked = targets[part, None]
            logits = (states[part] @ table.T).float()
            logits -= logits.amax(1, keepdim=True)
            total -= logits.gather(1, picked).sum().item()
            sums = logits.exp_().sum(1, keepdim=True)
            total += sums.log().sum().item()
            logits *= 1 / (sums * count)
            logits.scatter_add_(1, picked, torch.full((len(picked), 1), -1 / count))
            grad[part] = logits
        # The embedding's own gradient is added to this one by the backward pass below.
        weight.grad = (grad.T @ states).float()
        hidden_grad = (grad @ table).to(hidden.dtype)
    hidden.backward(hidden_grad)
    return total / count


def train(
    config: LlamaConfig, stream: torch.Tensor, seconds: float, name: str, seed: int = 0
) -> Trained:
    """Train a model of `config` on `stream` (1-D token ids) for `seconds` of wall-clock time."""
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    keep_freed_memory()
    autocast = has_fast_bfloat16()
    model = LlamaForCausalLM(config).train()
    optimizers = _optimizers(model)
    groups = [group for optimizer in optimizers for group in optimizer.param_groups]
    peaks = [group["lr"] for group in groups]
    steps = tokens = 0
    recent: list[float] = []  # losses of the last tenth of the budget
    start = time.monotonic()
    bar_format = "{desc}: {percentage:3.0f}%|{bar:30}| {n:.0f}/{total:.0f} s{postfix}"
    with tqdm(total=seconds, desc=f"training {name}", bar_format=bar_format, mininterval=1) as bar:
        while steps == 0 or time.monotonic() - start < seconds:
            spent = (time.monotonic() - start) / seconds
            for group, peak in zip(groups, peaks, strict=True):
                group["lr"] = peak * learning_rate_share(spent)
            sequences, length = _LONG if steps % _LONG_EVERY == _LONG_EVERY - 1 else _SHORT
            offsets = torch.randint(len(stream) - length, (sequences,), generator=generator)
            rows = stream[offsets[:, None] + torch.arange(length + 1)]
            loss = _backward(model, rows, autocast)
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
            steps += 1
            tokens += sequences * length
            if spent < 0.9:
                recent.clear()
            recent.append(loss)
            bar.set_postfix_str(f"step {steps}, loss {loss:.2f}", refresh=False)
            bar.update(min(time.monotonic() - start, seconds) - bar.n)
    return Trained(model.eval(), steps, tokens, sum(recent) / len(recent))


def complete(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, prompt: str, rows: int = 96
) -> str:
    """The prompt with what the model writes after it, drawn at a low temperature."""
    ids = torch.tensor([tokenizer(prompt)["input_ids"]])
    torch.manual_seed(0)
    untyped: Any = model  # transformers' own classes do not meet the self type of generate()
    out = untyped.generate(
        ids, max_new_tokens=rows, do_sample=True, temperature=0.6,
        eos_token_id=end_ids(tokenizer), pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    return str(tokenizer.decode(out[0], skip_special_tokens=True))


def end_ids(tokenizer: PreTrainedTokenizerFast) -> list[int]:
    """Tokens that end an answer: the end of a document and the end of a turn."""
    return [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<|end|>")]


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write a Hugging Face directory, the weights in bfloat16.

    Greedy decoding stays the default of `generate()`: no sampling settings are stored.
    """
    model.generation_config = GenerationConfig(
        eos_token_id=end_ids(tokenizer), pad_token_id=tokenizer.pad_token_id
    )
    module: torch.nn.Module = model  # transformers wraps `to` in a way that hides its types
    module.to(torch.bfloat16)
    model.save_pretrained(folder)
    # In tokenizer_config.json rather than a file of its own: every version reads that.
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    module.to(torch.float32)
