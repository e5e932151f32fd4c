"""Helpers of the tests: references, tiny models, engines, servers, scripts of other processes."""
