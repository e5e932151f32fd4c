"""Before DeepSpeed is imported: it looks for its accelerator then, and these tests are for CPUs."""

import os

os.environ.setdefault("DS_ACCELERATOR", "cpu")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
