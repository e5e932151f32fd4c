"""Ctrl-C while rows move."""

from __future__ import annotations

import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

from bmc_core.kv_store import KVStore, PackedStore, uninterrupted
from bmc_core.policy import BMCPolicy
from tests.support.stores import filled, random_rows


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("call", ["grow where they are", "grow elsewhere", "slide", "reorder"])
def test_an_interrupt_waits_until_rows_have_moved(
    store: KVStore, call: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A real SIGINT in the middle: it is raised, and every row is where it should be."""
    key = filled(store, rows=64).keys().clone()
    index = torch.tensor([2, 0, 1])
    if call == "grow elsewhere":
        store.append(*random_rows(3, 64))
        store.truncate(64)
        monkeypatch.setattr(store, "_grow_in_place", lambda *args: False, raising=False)
    owner: Any = torch if call == "reorder" else store
    name = {"slide": "_slide", "reorder": "index_select"}.get(call, "_hold")
    real = getattr(owner, name)

    def interrupted(*args: Any, **settings: Any) -> None:
        os.kill(os.getpid(), signal.SIGINT)
        real(*args, **settings)

    monkeypatch.setattr(owner, name, interrupted)
    handler = signal.getsignal(signal.SIGINT)
    calls = {
        "slide": lambda: store.append(*random_rows(3, 10), keep=16),
        "reorder": lambda: store.reorder(index),
    }
    with pytest.raises(KeyboardInterrupt):
        calls.get(call, lambda: store.append(*random_rows(3, 65)))()
    assert signal.getsignal(signal.SIGINT) is handler
    monkeypatch.setattr(owner, name, real)
    expected = {"slide": key[:, :, 48:], "reorder": key[index]}.get(call, key)
    assert torch.equal(store.keys()[:, :, : expected.shape[2]], expected)
    new, _ = pair = random_rows(3, 1)
    store.append(*pair)
    assert torch.equal(store.keys()[:, :, -1:], new)


@pytest.mark.usefixtures("interruptible")
@pytest.mark.parametrize("tensor", [1, 2])
def test_an_interrupt_among_the_first_tensors_leaves_a_store_that_works(
    store: KVStore, tensor: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules[type(store).__module__]
    real, made = module.new_tensor, []

    def interrupted(*args: Any, **settings: Any) -> torch.Tensor:
        made.append(args)
        if len(made) == tensor:
            os.kill(os.getpid(), signal.SIGINT)
        return real(*args, **settings)

    monkeypatch.setattr(module, "new_tensor", interrupted)
    with pytest.raises(KeyboardInterrupt):
        filled(store)
    assert store.length == 0
    assert store.num_bytes == store.counters.bytes_held
    assert filled(store).keys().shape[2] == 40
    store.release()
    assert store.counters.bytes_held == 0


def test_other_threads_have_no_interrupts_to_wait_for() -> None:
    with ThreadPoolExecutor(1) as pool:
        pool.submit(filled, PackedStore(BMCPolicy(r=16)), 2, 40).result()


@pytest.mark.usefixtures("interruptible")
def test_the_outermost_of_several_blocks_raises() -> None:
    done = []

    def both() -> None:
        with uninterrupted():
            with uninterrupted():
                os.kill(os.getpid(), signal.SIGINT)
                done.append("inner")
            done.append("outer")

    with pytest.raises(KeyboardInterrupt):
        both()
    assert done == ["inner", "outer"]


@pytest.mark.usefixtures("interruptible")
def test_an_ignored_interrupt_stays_ignored() -> None:
    """A job in the background: nobody is to be interrupted, and nothing is put in the way."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with uninterrupted():
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
