"""Packed linear layers: same results, same state, and undone completely."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from bmc_transformers import disable, enable
from bmc_transformers.linears import PackedLinear, pack_linears, unpack_linears
from tests.support.architectures import DECODER, build, expected, generated, prompt

# Largest difference allowed between a packed and a plain product, relative to the largest result.
TOLERANCE = {torch.float32: 1e-6, torch.bfloat16: 8e-3}


@pytest.fixture(params=TOLERANCE, ids=str)
def dtype(request) -> torch.dtype:
    return request.param


def layers(dtype: torch.dtype = torch.float32) -> torch.nn.Sequential:
    torch.manual_seed(1)
    return torch.nn.Sequential(
        torch.nn.Linear(64, 48), torch.nn.GELU(), torch.nn.Linear(48, 32, bias=False)
    ).to(dtype)


def assert_close(actual: torch.Tensor, wanted: torch.Tensor) -> None:
    error = (actual - wanted).abs().max() / wanted.abs().max()
    assert error <= TOLERANCE[wanted.dtype]


@pytest.mark.parametrize("shape", [(1, 1), (8, 1), (2, 5), (3, 100), (7,)])
@torch.no_grad()
def test_same_results(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    model, plain = layers(dtype), layers(dtype)
    assert pack_linears(model) == 2
    rows = torch.randn(*shape, 64).to(dtype)
    assert_close(model(rows), plain(rows))
    with torch.inference_mode():
        assert_close(model(rows), plain(rows))


def test_greedy_tokens_and_state_of_a_model() -> None:
    model = build("llama")
    count, size = sum(1 for _ in model.parameters()), model.num_parameters()
    state = copy.deepcopy(model.state_dict())
    enable(model, 16, pack_linears=True)
    packed = [module for module in model.modules() if type(module) is PackedLinear]
    assert len(packed) == 2 * 7 + 1
    assert torch.equal(generated(model, {"inputs": prompt()}).sequences, expected("llama", "plain"))
    assert sum(1 for _ in model.parameters()) == count
    assert model.num_parameters() == size
    assert (model.dtype, model.device.type) == (torch.float32, "cpu")
    assert list(model.state_dict()) == list(state)
    assert all(torch.equal(model.state_dict()[name], state[name]) for name in state)
    disable(model)


def test_weights_are_held_once() -> None:
    model = layers()
    weight = model[0].weight
    pack_linears(model)
    assert weight.numel() == 0
    assert model[0].weight.shape == (48, 64)
    unpack_linears(model)
    assert model[0].weight is weight
    assert weight.shape == (48, 64)


def test_what_is_saved_and_loaded_is_plain(dtype: torch.dtype) -> None:
    model, plain = layers(dtype), layers(dtype)
    pack_linears(model)
    rows = torch.randn(3, 64).to(dtype)
    for tensor, wanted in zip(
        model.state_dict().values(), plain.state_dict().values(), strict=True
    ):
        assert torch.equal(tensor, wanted)
    double = {name: 2 * tensor for name, tensor in plain.state_dict().items()}
    for one in (model, plain):
        one.load_state_dict(double)
    assert type(model[0]) is PackedLinear
    assert model[0].weight.is_mkldnn
    with torch.no_grad():
        assert_close(model(rows), plain(rows))
    with pytest.raises(RuntimeError, match="size mismatch"):
        model.load_state_dict({**double, "0.weight": torch.zeros(3, 3)})
    assert model[0].weight.is_mkldnn


def test_save_pretrained(tmp_path) -> None:
    model = build("llama")
    state = copy.deepcopy(model.state_dict())
    enable(model, 16, pack_linears=True).save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(loaded.state_dict()[name], state[name]) for name in state)


def test_copies_and_pickles_are_packed_by_themselves(dtype: torch.dtype) -> None:
    model = layers(dtype)
    pack_linears(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    rows = torch.randn(3, 64).to(dtype)
    for twin in (copy.deepcopy(model), torch.load(file, weights_only=False)):
        assert twin[0].weight.is_mkldnn
        with torch.no_grad():
            assert torch.equal(twin(rows), model(rows))
        unpack_linears(twin)
        assert type(twin[0]) is torch.nn.Linear
        assert twin[0].weight.requires_grad
    assert model[0].weight.is_mkldnn


def test_other_dtypes_and_devices_are_followed(caplog) -> None:
    model = layers()
    pack_linears(model)
    model.to(torch.bfloat16)
    assert model[0].weight.is_mkldnn
    assert model[0].weight.dtype == torch.bfloat16
    model.to(torch.float64)
    assert not model[0].weight.is_mkldnn
    assert "no longer packed, because its weight is torch.float64" in caplog.text
    assert model(torch.randn(2, 64, dtype=torch.float64)).dtype == torch.float64
    unpack_linears(model)
    assert type(model[0]) is torch.nn.Linear
    pack_linears(model := layers())
    model.to("meta")
    assert model[0].weight.device.type == "meta"


def test_what_is_left_alone() -> None:
    class Parallel(torch.nn.Linear):
        pass

    model = layers().append(Parallel(32, 8)).append(torch.nn.Linear(8, 8).half())
    shared = torch.nn.Linear(64, 48)
    shared.weight = model[0].weight
    model.append(shared)
    patched = torch.nn.Linear(8, 8)
    patched.forward = lambda rows: rows
    model.append(patched)
    assert pack_linears(model) == 1
    assert [type(module) is PackedLinear for module in model] == [False, False, True] + 4 * [False]
    tied = LlamaForCausalLM(LlamaConfig(**DECODER | {"tie_word_embeddings": True}))
    pack_linears(tied)
    assert type(tied.lm_head) is torch.nn.Linear
    assert tied.lm_head.weight is tied.model.embed_tokens.weight


def test_nothing_to_pack_is_said(caplog) -> None:
    assert pack_linears(torch.nn.Sequential(torch.nn.GELU())) == 0
    assert "nothing to pack in Sequential" in caplog.text


def test_going_back_through_packed_weights_is_refused() -> None:
    model = layers()
    pack_linears(model)
    out = model(torch.randn(2, 64))
    with pytest.raises(RuntimeError, match="BMC keeps no gradients"):
        out.sum().backward()
    unpack_linears(model)
    model(torch.randn(2, 64)).sum().backward()
    assert model[0].weight.grad is not None


def test_hooks_stay() -> None:
    model = layers()
    seen = []
    model[0].register_forward_hook(lambda module, rows, out: seen.append(out.shape))
    pack_linears(model)
    with torch.no_grad():
        model(torch.randn(2, 64))
    assert seen == [(2, 48)]
