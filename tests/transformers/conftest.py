"""Both layouts of a cache, one after the other."""

import pytest


@pytest.fixture(params=["rows", "packed"])
def layout(request) -> str:
    return request.param
