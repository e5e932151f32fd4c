"""What growing a cache costs here, and which r follows.

`model` is the paper's arithmetic, `geometry` the shape of a model's K and V, `measure` the
stopwatch, `cache` the file that keeps its figures, `calibration` turns figures into costs and
"auto" into a policy, `spectrum` lays out every r beside the chosen one.
"""
