"""Two ranks that reduce a tensor together; then one of them fails."""

import os

import deepspeed
import torch

deepspeed.init_distributed()
deepspeed.comm.inference_all_reduce(torch.ones(64))
if os.environ["RANK"] == "1":
    raise RuntimeError("this rank fails")
deepspeed.comm.barrier()
