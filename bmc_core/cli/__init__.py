"""The command line `python -m bmc_core`: one module a command, what they share in `options`."""
