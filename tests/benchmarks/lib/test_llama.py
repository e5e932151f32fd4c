"""The random Llama: bytes, products, and one set of weights in both forms."""

from dataclasses import replace

import pytest
import torch

from benchmarks.lib.llama import GQA, MHA, TINY, DrawnRows, RandomLlama, drawn_tokens


def test_bytes_and_products() -> None:
    assert MHA.row_bytes == 8 * 32 * 64 * 2 * 2
    assert 0.9e9 < MHA.weight_bytes < 1.2e9
    assert replace(MHA, dtype="float32").row_bytes == 2 * MHA.row_bytes
    embedding = 2 * 32000 * 2048
    assert MHA.step_bytes(8, 100) == MHA.weight_bytes - embedding + 800 * MHA.row_bytes
    weights = (MHA.weight_bytes - embedding) // 2
    assert MHA.step_flops(1, 0) == 2 * weights
    assert GQA.step_flops(3, 10) - GQA.step_flops(3, 0) == 4 * 8 * 16 * 128 * 10 * 3


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_module_and_folder_have_the_same_weights(dtype: str) -> None:
    from transformers import LlamaForCausalLM

    model = RandomLlama(replace(TINY, dtype=dtype), 64, seed=3)
    loaded = LlamaForCausalLM.from_pretrained(model.folder(), dtype=getattr(torch, dtype))
    ours = model.module.state_dict()
    for name, weight in loaded.state_dict().items():
        assert torch.equal(weight, ours[name]), name
        assert weight.dtype == getattr(torch, dtype)
    assert sum(weight.numel() for weight in ours.values() if weight.dim() > 1) == TINY.num_weights
    ids = drawn_tokens(TINY.vocabulary, 2, 9)
    with torch.inference_mode():
        assert torch.equal(loaded(ids).logits, model.module(ids).logits)
    folder = model.folder()
    model.close()
    model.close()
    assert not folder.exists()


def test_what_is_drawn_is_the_same_every_time() -> None:
    positions, tokens = torch.arange(7), drawn_tokens(512, 1, 7)[0]
    first, second = (DrawnRows(2, 32, torch.bfloat16).rows(1, positions, tokens) for _ in range(2))
    for a, b in zip(first, second, strict=True):
        assert a.shape == (7, 2, 32)
        assert torch.equal(a, b)
    other = DrawnRows(2, 32, torch.bfloat16).rows(0, positions, tokens)
    assert not torch.equal(first[0], other[0]), "layers differ"
    assert not torch.equal(first[0], first[1]), "keys are not values"
