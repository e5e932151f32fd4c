"""What the controller itself takes: microseconds a step, without any model."""

from __future__ import annotations

import random
import time

from benchmarks.lib.timing import Timing, summary
from bmc_core.speculation import DraftRequest, SpeculationController, StepCosts, StepTimes

REQUESTS = 64
MAX_DRAFT_TOKENS = 8
WARM_STEPS, STEPS = 50, 300
COSTS = StepCosts(
    forward=((1, 0.050), (16, 0.055), (64, 0.120), (576, 0.900)),
    attention=((1, 1e-6), (5, 1.6e-6), (9, 2.6e-6)),
    draft=((1, 0.004), (64, 0.012)),
    sampler=((1, 1e-4), (576, 5e-3)),
    draft_overhead=0.001,
)
"""Of a target with a draft at a tenth of its cost, in proportions of a machine of two cores."""


def measure() -> Timing:
    """Of a step of `REQUESTS` requests whose acceptance differs: the length of drafting, those of
    verification, and what is learned of both."""
    rng = random.Random(0)
    controller = SpeculationController(COSTS, max_draft_tokens=MAX_DRAFT_TOKENS)
    acceptance = [rng.random() for _ in range(REQUESTS)]
    seconds = [_step(controller, acceptance, rng, step) for step in range(WARM_STEPS + STEPS)]
    return summary(seconds[WARM_STEPS:])


def _step(
    controller: SpeculationController, acceptance: list[float], rng: random.Random, step: int
) -> float:
    """Seconds in the controller; who draws and counts is not timed."""
    contexts = [500 + 20 * number + step for number in range(REQUESTS)]
    requests = [DraftRequest(n, rows, MAX_DRAFT_TOKENS) for n, rows in enumerate(contexts)]
    start = time.perf_counter()
    steps = controller.draft_steps(requests)
    lengths = controller.verified_lengths(requests, [steps] * REQUESTS)
    seconds = time.perf_counter() - start
    accepted = [_accepted(share, n, rng) for share, n in zip(acceptance, lengths, strict=True)]
    times = StepTimes(0.06 + 1e-4 * sum(lengths), 1e-3, 0.005 * steps, steps)
    start = time.perf_counter()
    for number, (proposed, right) in enumerate(zip(lengths, accepted, strict=True)):
        if proposed:
            controller.observe_acceptance(number, proposed, right)
    controller.observe_step(lengths, contexts, times)
    return seconds + time.perf_counter() - start


def _accepted(share: float, proposed: int, rng: random.Random) -> int:
    count = 0
    while count < proposed and rng.random() < share:
        count += 1
    return count
