"""Speculative decoding in the worker: what the model runner's drafter does, misses and takes.

`drafting` stands between runner and drafter, `rows` and `catch_up` keep a parked draft model's KV
cache whole, `lookup` drafts from the request's own text, `clock` times each step, and
`calibration` measures at the start what steps cost.
"""
