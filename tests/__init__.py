"""Tests of every package; `tests.support` has what several of them use."""
