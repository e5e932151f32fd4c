"""Requests drawn from a seed: lengths within what the load and the model allow."""

import pytest

from benchmarks.lib.load import Load, Requests

MIXED = Load("mixed", 8, 4096)


@pytest.mark.parametrize("rows", [16, 64, 300, 391, 1000, 2048])
def test_requests_fit_the_model(rows: int) -> None:
    load = MIXED.within(rows)
    requests = Requests(load)
    for drawn in (requests.draw() for _ in range(100)):
        assert drawn.prompt
        assert drawn.outputs
        assert len(drawn.prompt) + drawn.outputs <= rows


def test_a_load_that_fits_stays_as_it_is() -> None:
    assert MIXED.within(2048) == MIXED
    assert Requests(MIXED.within(4096)).draw() == Requests(MIXED).draw()


def test_prompts_are_as_long_as_asked() -> None:
    requests = Requests(MIXED)
    lengths = [len(requests.draw().prompt) for _ in range(300)]
    assert min(lengths) >= 200
    assert 1400 < max(lengths) <= 1500
