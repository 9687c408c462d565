import os

import torch


def init_distributed_mode(args):
    args.distributed = "RANK" in os.environ
    if args.distributed:
        args.rank, args.world_size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        args.gpu = int(os.environ["LOCAL_RANK"])
        torch.distributed.init_process_group("gloo")


def save_on_master(state, is_best, output_dir):
    torch.save(state, f"{output_dir}/checkpoint.pt")
