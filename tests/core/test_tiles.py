"""Items of matrix registers on every machine: the shipped code over emulated registers.

Where the processor has such registers, `test_attention.py` runs the same code on them.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings

from bmc_core import native
from tests.support.emulation import Modules, UnavailableError, build, emulated, run_sanitized
from tests.support.reference import Case, Inputs, assert_matches_reference, cases

pytestmark = pytest.mark.build
BFLOAT16 = torch.bfloat16

# Small enough to be run without optimization: what decides about addresses, once each.
SANITIZED = """
import torch
from torch import bfloat16, float8_e4m3fn, float8_e5m2
from tests.support.reference import Case, assert_matches_reference
def check(*lengths, **changes):
    seq_lens, query_lens = lengths
    case = Case(seq_lens, query_lens, **{"dtype": bfloat16, "head_size": 32, **changes})
    assert_matches_reference(case)
for group in (1, 4, 16, 17, 33, 160, 161, 192, 256):
    check([70], [1], query_heads=group, kv_heads=1)
for length in (1, 31, 32, 33, 255, 256, 257):
    check([length, 40], [1, 1], query_heads=8, kv_heads=2, head_size=64)
check([300], [40], query_heads=4, kv_heads=1, sliding_window=20)
check([300, 90], [20, 3], query_heads=4, kv_heads=1, first_rows=[295, 33])
check([90], [90], query_heads=2, kv_heads=1, causal=False, sinks=True, logits_soft_cap=5.0)
check([2100], [1], query_heads=4, kv_heads=1, sinks=True)
for cache_dtype in (float8_e4m3fn, float8_e5m2):
    check([100], [1], query_heads=2, kv_heads=1, cache_dtype=cache_dtype)
    check([100], [5], query_heads=8, kv_heads=2, cache_dtype=cache_dtype, alibi=True)
check([50], [3], dtype=torch.float32, block_size=48)
check([50], [3], block_size=48, head_size=48)
print("all cases are right")
"""


@pytest.fixture(scope="module")
def modules(tmp_path_factory: pytest.TempPathFactory) -> Modules:
    try:
        return build(tmp_path_factory.mktemp("emulated"))
    except UnavailableError as error:
        pytest.skip(str(error))


@pytest.fixture
def kernels(modules: Modules):
    with emulated(modules.plain):
        assert native.usable_isas() == ["emulated_tiles"]
        yield


@settings(max_examples=30, deadline=None, derandomize=True)
@given(case=cases(dtypes=(torch.bfloat16,)))
def test_matches_reference(modules: Modules, case: Case) -> None:
    with emulated(modules.plain):
        assert_matches_reference(case)


@pytest.mark.parametrize("group", [3, 4, 16, 17, 32, 33, 128, 160, 161, 192, 256])
def test_group_sizes(kernels: None, group: int) -> None:
    assert_matches_reference(
        Case(seq_lens=[300, 40], query_lens=[1, 2], query_heads=group, kv_heads=1, dtype=BFLOAT16)
    )


@pytest.mark.parametrize("length", [1, 31, 32, 33, 255, 256, 257, 511, 513])
def test_lengths_around_a_step(kernels: None, length: int) -> None:
    assert_matches_reference(
        Case(seq_lens=[length], query_lens=[min(length, 40)], query_heads=8, dtype=BFLOAT16)
    )


def test_split_shares_are_merged(kernels: None) -> None:
    case = Case(
        seq_lens=[1100], query_lens=[1], query_heads=192, kv_heads=1, dtype=BFLOAT16, sinks=True
    )
    inputs = Inputs(case)
    items = inputs.batch().plan(1, 192, 1, 0).work_items()
    if native.num_threads() > 1:
        assert all(split_group >= 0 for *_, split_group in items)
    assert_matches_reference(case)


def test_memory_and_arithmetic_are_sound(modules: Modules) -> None:
    """Under the address and undefined-behavior sanitizers; the tensors' memory is watched too."""
    if modules.sanitized is None:
        pytest.skip("the compiler has no address and undefined-behavior sanitizers")
    ran = run_sanitized(modules.sanitized, SANITIZED)
    assert ran.returncode == 0, ran.stderr[:6000]
    assert "all cases are right" in ran.stdout
