"""What every benchmark needs: options, timing, ceilings, a random model, records, goals, workers.

Knows no benchmark: nothing here imports a command, or an engine.
"""
