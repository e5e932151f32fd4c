"""Threads: Python's own that call at the same time, and OpenMP's that outlive a call."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch

from bmc_core import native
from bmc_core.attention import paged_attention
from tests.support.reference import Case, Inputs

ROOT = Path(__file__).resolve().parents[2]

# A pool of eight threads, then a growth that has work for three of them.
THREADS_AFTER_A_GROWTH = """
import os, time, torch
from bmc_core import native
torch.set_num_threads(8)
def threads():
    return len(os.listdir("/proc/self/task"))
key = torch.zeros(4096, 8, 64)
from bmc_core.attention import write_kv
write_kv(key, key, torch.zeros(128, 8, 32, 128), torch.arange(4096))
before = threads()
memory = torch.zeros(4 << 20, dtype=torch.uint8)
native.module().grow_in_place(memory.data_ptr(), 4 << 20, 2, 800 << 10, 800 << 10, 2 << 20)
time.sleep(0.3)
print(before, threads())
"""

# Slots that change between the check and the write: at worst some other row of the cache.
CHANGING_SLOTS = """
import threading, time, torch
from bmc_core.attention import write_kv
key = torch.zeros(20000, 2, 32)
cache = torch.zeros(1250, 2, 16, 64)
good = torch.arange(20000)
bad = good + 2**45
slots = good.clone()
done = False
def change():
    while not done:
        slots.copy_(bad)
        slots.copy_(good)
        time.sleep(1e-4)
other = threading.Thread(target=change)
other.start()
refused = 0
written = 0
end = time.monotonic() + 2
while time.monotonic() < end:
    try:
        write_kv(key, key, cache, slots)
        written += 1
    except IndexError:
        refused += 1
done = True
other.join()
print("written" if written else "never written")
"""


def run(program: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", program]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


@pytest.mark.skipif(not os.path.isdir("/proc/self/task"), reason="counts threads in /proc")
def test_a_growth_keeps_the_pool_of_threads() -> None:
    """The pool is torch's too: a smaller team would end threads that its next operation needs."""
    ran = run(THREADS_AFTER_A_GROWTH)
    assert ran.returncode == 0, ran.stderr
    before, after = map(int, ran.stdout.split())
    assert before >= 8
    assert after == before


def test_slots_that_change_during_a_write_stay_in_the_cache() -> None:
    ran = run(CHANGING_SLOTS)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert ran.stdout.strip() == "written"


def test_two_threads_in_one_batch() -> None:
    """The second one is refused; the first, and every later call, are right."""
    inputs = Inputs(Case(seq_lens=[3000], query_lens=[200], query_heads=8, kv_heads=1))
    with native.forced_isa("portable"):
        batch = inputs.batch()
        expected = inputs.run(batch)
        outcomes: list[torch.Tensor | RuntimeError] = []
        together = threading.Barrier(2)

        def attend() -> None:
            out = torch.empty_like(inputs.query)
            together.wait()
            try:
                paged_attention(inputs.query, inputs.kv_cache, batch, out, scale=inputs.scale)
                outcomes.append(out)
            except RuntimeError as error:
                outcomes.append(error)

        for _ in range(50):
            threads = [threading.Thread(target=attend) for _ in range(2)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
            if any(isinstance(outcome, RuntimeError) for outcome in outcomes):
                break
        refused = [outcome for outcome in outcomes if isinstance(outcome, RuntimeError)]
        assert len(refused) == 1
        assert "in use by another thread; make one AttentionBatch for each thread" in str(*refused)
        for outcome in outcomes:
            if isinstance(outcome, torch.Tensor):
                torch.testing.assert_close(outcome, expected)
        torch.testing.assert_close(inputs.run(batch), expected)


def test_a_refused_call_frees_the_batch() -> None:
    inputs = Inputs(Case(seq_lens=[40], query_lens=[1]))
    batch = inputs.batch()
    expected = inputs.run(batch)
    whole = inputs.kv_cache
    inputs.kv_cache = whole[:1]
    for _ in range(2):
        with pytest.raises(IndexError, match="block table holds block id"):
            inputs.run(batch)
    inputs.kv_cache = whole
    assert torch.equal(inputs.run(batch), expected)
