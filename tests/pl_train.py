"""A user's script: SimCLR of lightly's parts on noise, in Lightning's trainer; with the callback if it is asked for."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from lightly import loss as losses_of
from torch import nn

CLASSES = [0] * 20 + [1] * 12 + [2] * 10 + [3] * 6


class Views(torch.utils.data.Dataset):
    def __len__(self) -> int:
        return len(CLASSES)

    def __getitem__(self, index: int) -> tuple[Any, int, str]:
        made = torch.Generator().manual_seed(index)
        views = [torch.randn(3, 8, 8, generator=made) for _ in range(2)]
        return views, CLASSES[index], f"{index:02}.png"


class SimCLR(pl.LightningModule):
    def __init__(self, kind: str = "NTXentLoss", **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.network = nn.Sequential(nn.Flatten(), nn.Linear(192, 32), nn.ReLU(), nn.Linear(32, 16))
        self.criterion = getattr(losses_of, kind)(**options)
        self.calls: dict[str, list[Any]] = {"one": [], "two": [], "loss": [], "target": [], "step": []}

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        (one, two), target, _ = batch
        one, two = self.network(one), self.network(two)
        loss = self.criterion(one, two)
        for name, value in (("one", one), ("two", two)):
            self.calls[name].append(value.detach().double().numpy())
        self.calls["loss"].append(float(loss.detach()))
        self.calls["target"].append(target.numpy())
        self.calls["step"].append(self.trainer.global_step)
        return loss

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)


class InOrder(torch.utils.data.Sampler):
    """Shuffled by the epoch alone, so that a resumed run sees what the whole one saw."""

    def __init__(self) -> None:
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(CLASSES)

    def __iter__(self) -> Any:
        return iter(torch.randperm(len(CLASSES), generator=torch.Generator().manual_seed(self.epoch)).tolist())


def fit(folder: Path, module: Any, callbacks: list[Any], resume: Any = None, **options: Any) -> Any:
    given = {"max_epochs": 2, "log_every_n_steps": 1, "accelerator": "cpu", "devices": 1, "logger": False}
    given |= {"enable_progress_bar": False, "enable_model_summary": False, **options}
    trainer = pl.Trainer(default_root_dir=folder, callbacks=callbacks, **given)
    ranks = trainer.world_size > 1
    loader = torch.utils.data.DataLoader(Views(), batch_size=8, sampler=None if ranks else InOrder(), shuffle=ranks)
    trainer.fit(module, loader, ckpt_path=resume)
    return trainer


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--table")
    args = parser.parse_args()
    callbacks = []
    if args.table:
        from mmts_plugins import MMTSCallback

        callbacks = [MMTSCallback(args.table, alpha=0.7, shift_min=0.45, shift_max=0.65)]
    module = SimCLR(gather_distributed=True)
    pl.seed_everything(1)
    fit(args.folder, module, callbacks, devices=2, strategy="ddp")
    rank = os.environ.get("LOCAL_RANK", "0")
    weight = module.network[1].weight.detach().numpy()
    np.savez(args.folder / f"rank-{rank}.npz", weight=weight, **module.calls)
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


if __name__ == "__main__":
    main()
