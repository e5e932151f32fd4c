"""Residency is measured beside the steps, and not at every step."""

import gc
import threading
import time
import weakref
from collections.abc import Callable

import torch

from bmc_core.machine.memory import PAGE
from bmc_vllm.memory import KVPoolMemory
from bmc_vllm.residency import ResidencyMeter

PAGES = 64


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.002)


def shared_pool() -> tuple[KVPoolMemory, torch.Tensor]:
    memory = KVPoolMemory(PAGES * PAGE, shared=True)
    return memory, memory.map()


def test_many_steps_are_measured_once() -> None:
    memory, _ = shared_pool()
    reports: list[int] = []
    meter = ResidencyMeter(memory, reports.append)
    for _ in range(1000):
        meter.changed()
    wait_until(lambda: bool(reports))
    for _ in range(1000):
        meter.changed()
    time.sleep(0.1)
    assert reports == [0]


def test_the_last_change_is_seen_without_another_step() -> None:
    memory, pool = shared_pool()
    reports: list[int] = []
    meter = ResidencyMeter(memory, reports.append, seconds=0.05)
    meter.changed()
    wait_until(lambda: bool(reports))
    pool[: 3 * PAGE] = 1
    meter.changed()
    wait_until(lambda: reports[-1] == 3 * PAGE)


def test_without_a_step_nothing_is_measured() -> None:
    memory, _ = shared_pool()
    reports: list[int] = []
    meter = ResidencyMeter(memory, reports.append, seconds=0)
    time.sleep(0.05)
    assert reports == []
    meter.changed()
    wait_until(lambda: bool(reports))
    time.sleep(0.05)
    assert reports == [0]


def test_a_step_waits_for_no_measurement() -> None:
    memory, _ = shared_pool()
    entered, go_on = threading.Event(), threading.Event()

    def report(resident: int) -> None:
        entered.set()
        go_on.wait(10)

    meter = ResidencyMeter(memory, report, seconds=0)
    meter.changed()
    assert entered.wait(10)
    start = time.monotonic()
    meter.changed()
    assert time.monotonic() - start < 1
    go_on.set()


def test_the_thread_ends_with_the_pool() -> None:
    memory, pool = shared_pool()
    others = set(threading.enumerate())
    meter = ResidencyMeter(memory, lambda resident: None, seconds=60)
    meter.changed()
    ours = set(threading.enumerate()) - others
    assert ours
    gone = weakref.ref(memory)
    del memory, pool, meter
    wait_until(lambda: (gc.collect(), gone() is None)[1])
    wait_until(lambda: not any(thread.is_alive() for thread in ours))
