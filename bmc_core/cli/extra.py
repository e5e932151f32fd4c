"""Which extra of the distribution the command line needs."""

EXTRA = 'pip install "bmc-llm[cli]"'
