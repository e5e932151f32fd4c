"""Sets the drafting steps of each engine step by hand, and notes what became of the drafts."""

import pickle
from collections.abc import Callable
from typing import Any

from vllm import LLM

from tests.support.engines import scheduler, worker


class Steering:
    """Takes the scheduler's place in choosing drafting steps; acceptance is counted.

    Args:
        steps: drafting steps for the n-th engine step.

    Attributes:
        drafts: (engine step, request, draft tokens verified, accepted), in the order of the steps.
        forwards: rows of each forward pass of the draft model, by engine step.
        outputs: the worker's output of each engine step.
        taken: what the worker drafted, by engine step.
        preempted: requests, in the order in which they lost their blocks.
    """

    def __init__(self, llm: LLM, steps: Callable[[int], int]) -> None:
        self.step = 0
        self.drafts: list[tuple[int, str, int, int]] = []
        self.forwards: dict[int, list[int]] = {}
        self.outputs: list[Any] = []
        self.taken: list[Any] = []
        self.preempted: list[str] = []
        self._wrap(scheduler(llm), steps)
        model = getattr(worker(llm).model_runner.drafter, "model", None)
        if model is not None:
            model.register_forward_pre_hook(self._note_forward, with_kwargs=True)

    def accepted(self, since: int = 0, before: int = 10**9) -> tuple[int, int]:
        """Draft tokens accepted and verified in engine steps `since` to `before`."""
        found = [(a, d) for step, _, d, a in self.drafts if since <= step < before]
        return sum(a for a, _ in found), sum(d for _, d in found)

    def _note_forward(self, module: Any, args: Any, kwargs: Any) -> None:
        rows = len(kwargs["input_ids"] if "input_ids" in kwargs else args[0])
        self.forwards.setdefault(self.step, []).append(rows)

    def _wrap(self, target: Any, steps: Callable[[int], int]) -> None:
        schedule, update = target.schedule, target.update_from_output
        stats, take = target.make_spec_decoding_stats, target.update_draft_token_ids
        preempt = target._preempt_request

        def scheduled(*args: Any, **kwargs: Any) -> Any:
            output = schedule(*args, **kwargs)
            if output.total_num_scheduled_tokens:
                self.step += 1
                output.num_spec_tokens_to_schedule = steps(self.step)
            return output

        def updated(scheduled: Any, output: Any) -> Any:
            self.outputs.append(output)
            return update(scheduled, output)

        def counted(*args: Any, **kwargs: Any) -> Any:
            given = {**dict(zip(STATS, args, strict=False)), **kwargs}
            drafted, accepted = given["num_draft_tokens"], given["num_accepted_tokens"]
            self.drafts.append((self.step, given["request_id"], drafted, accepted))
            return stats(*args, **kwargs)

        def took(drafts: Any) -> None:
            # As it comes out of another process; the worker's own lists go on changing.
            self.taken.append(pickle.loads(pickle.dumps(drafts)))
            take(drafts)

        def preempts(request: Any, *args: Any, **kwargs: Any) -> Any:
            self.preempted.append(request.request_id)
            return preempt(request, *args, **kwargs)

        target.schedule, target.update_from_output = scheduled, updated
        target.make_spec_decoding_stats, target.update_draft_token_ids = counted, took
        target._preempt_request = preempts


STATS = (
    "spec_decoding_stats",
    "num_draft_tokens",
    "num_accepted_tokens",
    "num_invalid_spec_tokens",
    "request_id",
)
