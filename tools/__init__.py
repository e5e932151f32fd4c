"""Developer tooling: set-up, server start and the demo model. Not part of the distribution."""
