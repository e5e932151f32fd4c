"""Programs that run as child processes, see `benchmarks.children`.

Those for peers are run by path in the peer's own Python environment, where nothing of this project
is importable but what lies beside them.
"""
