import os

import torch
import torch.distributed as dist

from .logger import LOGGER


def initialize(args):
    for folder in ("log", "ckpt"):
        os.makedirs(os.path.join(args.run_cfg.output_dir, folder), exist_ok=True)
    assert args.local_rank >= 0, "torch.cuda.set_device(-1) would fail"
    dist.init_process_group("gloo")
    torch.manual_seed(50)
    LOGGER.disabled = dist.get_rank() != 0
