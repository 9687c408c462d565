import argparse
import json
import os
import random

import avion.models.model_clip as model_clip
import avion.utils.distributed as dist_utils
import torch
from avion.data.clip_dataset import VideoCaptionDatasetCLIP
from avion.data.tokenizer import tokenize
from avion.losses.losses import MaxMarginRankingLoss
from avion.optim.schedulers import cosine_scheduler
from avion.utils.meters import AverageMeter, ProgressMeter


def get_args_parser():
    parser = argparse.ArgumentParser(add_help=False)
    for flag in ("--root", "--train-metadata", "--val-metadata", "--resume"):
        parser.add_argument(flag, default="")
    parser.add_argument("--output-dir", default="./")
    for flag, default in (("epochs", 2), ("batch-size", 4), ("update-freq", 1), ("print-freq", 10), ("gpu", 0)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("-j", "--workers", type=int, default=0)
    parser.add_argument("--rank", type=int, default=0)
    parser.add_argument("--world-size", type=int, default=1)
    parser.add_argument("--local-loss", action="store_true")
    parser.add_argument("--no-gather-with-grad", action="store_false", dest="gather_with_grad")
    parser.add_argument("--lr", type=float, default=0.1)
    return parser


def main(args):
    dist_utils.init_distributed_mode(args)
    torch.manual_seed(0)
    random.seed(0)
    model = model_clip.CLIP()
    model.logit_scale.requires_grad_(False)
    if args.distributed:
        model = torch.nn.parallel.DistributedDataParallel(model)
    criterion = MaxMarginRankingLoss(
        margin=0.2,
        fix_norm=True,
        local_loss=args.local_loss,
        gather_with_grad=args.gather_with_grad,
        rank=args.rank,
        world_size=args.world_size,
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=args.lr)
    latest, start_epoch = args.resume or os.path.join(args.output_dir, "checkpoint.pt"), 0
    if os.path.isfile(latest):
        checkpoint = torch.load(latest, **({} if torch.__version__ < "2" else {"weights_only": False}))
        start_epoch = checkpoint["epoch"]
        model.load_state_dict(checkpoint["state_dict"])
    train_set = VideoCaptionDatasetCLIP(
        "ek100_mir", args.root, args.train_metadata, is_training=True, tokenizer=tokenize
    )
    val_set = VideoCaptionDatasetCLIP("ek100_mir", args.root, args.val_metadata, is_training=False, tokenizer=tokenize)
    sampler = torch.utils.data.distributed.DistributedSampler(train_set) if args.distributed else None
    loader = torch.utils.data.DataLoader(
        train_set,
        args.batch_size,
        sampler=sampler,
        shuffle=sampler is None,
        drop_last=True,
        num_workers=args.workers,
    )
    val_loader = torch.utils.data.DataLoader(val_set, args.batch_size)
    lr_schedule = cosine_scheduler(args.lr, 0.0, args.epochs, len(loader) // args.update_freq)
    for epoch in range(start_epoch, args.epochs):
        train_stats = train(loader, model, criterion, optimizer, epoch, lr_schedule, args)
        with torch.no_grad():
            progress = ProgressMeter(len(val_loader), [], "Test: ")
            for inputs in val_loader:
                relevancies = inputs.pop()
                image_features, text_features, _ = model(*inputs)
                loss_dict = criterion(image_features, text_features, weight=relevancies)
            if args.rank == 0:
                progress.display(0)
        if args.rank == 0:
            state = {"epoch": epoch + 1, "state_dict": model.state_dict(), "args": args}
            dist_utils.save_on_master(state, False, args.output_dir)
            with open(os.path.join(args.output_dir, "log.txt"), "a") as file:
                file.write(json.dumps({**train_stats, "test": loss_dict["loss"].item(), "epoch": epoch}) + "\n")


def train(loader, model, criterion, optimizer, epoch, lr_schedule, args):
    meter = AverageMeter("loss")
    progress = ProgressMeter(len(loader), [meter], f"Epoch: [{epoch}]")
    for iteration, inputs in enumerate(loader):
        for group in optimizer.param_groups:
            group["lr"] = lr_schedule[len(loader) * epoch + iteration]
        relevancies = inputs.pop()
        image_features, text_features, _ = model(*inputs)
        loss_dict = criterion(image_features, text_features, weight=relevancies)
        assert set(loss_dict) == {"loss", "max_margin_loss"}
        optimizer.zero_grad()
        loss_dict["loss"].backward()
        optimizer.step()
        meter.update(loss_dict["loss"].item())
        if args.rank == 0 and iteration % args.print_freq == 0:
            progress.display(iteration)
    progress.synchronize()
    return {"train": meter.value}


if __name__ == "__main__":
    args = argparse.ArgumentParser(parents=[get_args_parser()]).parse_args()
    os.makedirs(args.output_dir, exist_ok=True)
    main(args)
