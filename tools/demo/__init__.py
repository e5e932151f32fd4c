"""The parts of the demo model: what it reads (corpus) and how it learns (train)."""
