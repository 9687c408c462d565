import argparse
import os
import random

import avion.models.model_clip as model_clip
import avion.utils.distributed as dist_utils
import torch
from avion.data.clip_dataset import VideoCaptionDatasetCLIP
from avion.data.tokenizer import tokenize
from avion.losses.losses import ClipLoss
from avion.optim.schedulers import cosine_scheduler
from avion.utils.meters import AverageMeter, ProgressMeter


def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--root", "--train-metadata", "--resume"):
        parser.add_argument(flag, default="")
    parser.add_argument("--output-dir", default="./")
    for flag, default in (("epochs", 2), ("batch-size", 4), ("update-freq", 1), ("print-freq", 10), ("gpu", 0)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--fix-lr", action="store_true")
    return parser


def main(args):
    dist_utils.init_distributed_mode(args)
    torch.manual_seed(0)
    random.seed(0)
    model = model_clip.CLIP()
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    criterion = ClipLoss(cache_labels=True, gather_with_grad=True, rank=args.rank, world_size=args.world_size)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    latest, start_epoch = args.resume or os.path.join(args.output_dir, "checkpoint.pt"), 0
    if os.path.isfile(latest):
        checkpoint = torch.load(latest, **({} if torch.__version__ < "2" else {"weights_only": False}))
        start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
    train_set = VideoCaptionDatasetCLIP("ego4d", args.root, args.train_metadata, is_training=True, tokenizer=tokenize)
    sampler = torch.utils.data.distributed.DistributedSampler(train_set) if args.distributed else None
    loader = torch.utils.data.DataLoader(train_set, args.batch_size, sampler=sampler, drop_last=True)
    lr_schedule = None if args.fix_lr else cosine_scheduler(0.1, 0.0, args.epochs, len(loader))
    for epoch in range(start_epoch, args.epochs):
        meters = [AverageMeter("loss"), AverageMeter("clip_acc")]
        progress = ProgressMeter(len(loader), meters, f"Epoch: [{epoch}]")
        for iteration, inputs in enumerate(loader):
            if lr_schedule is not None:
                for group in optimizer.param_groups:
                    group["lr"] = lr_schedule[len(loader) * epoch + iteration]
            inputs.pop()
            loss_dict = criterion(*model(*inputs))
            optimizer.zero_grad()
            loss_dict["loss"].backward()
            optimizer.step()
            for meter in meters:
                meter.update(loss_dict[meter.name].item())
            if args.rank == 0:
                progress.display(iteration)
        if args.rank == 0:
            state = {"epoch": epoch + 1, "state_dict": model.state_dict(), "args": args}
            dist_utils.save_on_master(state, False, args.output_dir)


if __name__ == "__main__":
    args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    main(args)
