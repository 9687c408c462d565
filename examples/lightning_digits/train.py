"""SimCLR of lightly's parts on scikit-learn's handwritten digits, made long-tailed, in Lightning's own trainer.

    python train.py --output runs/plain
    python train.py --output runs/ts --schedule                      # the schedule of Kukleva et al. (2023)
    python train.py --output runs/mmts --schedule --table classes.parquet

``--write FILE`` writes the training images' classes for ``mmts cluster --label-column class``, and stops.
"""

from __future__ import annotations

import argparse
import csv
import json
import random
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from lightly.loss import NTXentLoss
from sklearn.datasets import load_digits
from torch import nn

from mmts_plugins import MMTSCallback


def samples() -> tuple[tuple[torch.Tensor, list[int]], tuple[torch.Tensor, torch.Tensor]]:
    """Training images, of which digit d has a share of 0.75 ** d; 30 images of each digit are held out."""
    digits, draw = load_digits(), random.Random(0)
    images = torch.from_numpy(digits.images).float().sub(8).div(8)[:, None]
    kept: list[int] = []
    held: list[int] = []
    for digit in range(10):
        own = [i for i, label in enumerate(digits.target) if label == digit]
        draw.shuffle(own)
        held += own[:30]
        kept += own[30 : 30 + round((len(own) - 30) * 0.75**digit)]
    labels = torch.from_numpy(digits.target)
    return (images[kept], labels[kept].tolist()), (images[held], labels[held])


class Views(torch.utils.data.Dataset):
    """Two views of an image: shifted by a pixel, scaled, with noise. Batches as lightly's: views, targets, names."""

    def __init__(self, images: torch.Tensor, classes: list[int]) -> None:
        self.images, self.classes = images, classes

    def __len__(self) -> int:
        return len(self.classes)

    def view(self, image: torch.Tensor) -> torch.Tensor:
        down, right = torch.randint(-1, 2, (2,)).tolist()
        image = image.roll((down, right), (1, 2)) * (0.7 + 0.6 * torch.rand(1))
        return image + 0.3 * torch.randn_like(image)

    def __getitem__(self, index: int) -> tuple[list[torch.Tensor], int, str]:
        image = self.images[index]
        return [self.view(image), self.view(image)], self.classes[index], f"{index}.png"


class SimCLR(pl.LightningModule):
    def __init__(self, temperature: float) -> None:
        super().__init__()
        self.backbone = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1), nn.ReLU(), nn.Conv2d(16, 32, 3, stride=2, padding=1), nn.ReLU(),
            nn.Flatten(), nn.Linear(512, 64),
        )  # fmt: skip
        self.head = nn.Sequential(nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
        self.criterion = NTXentLoss(temperature=temperature)

    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        (one, two), _, _ = batch
        return self.criterion(self.head(self.backbone(one)), self.head(self.backbone(two)))

    def configure_optimizers(self) -> Any:
        return torch.optim.Adam(self.parameters(), lr=2e-3)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, default=Path("runs/digits"))
    parser.add_argument("--write", type=Path, help="write the training images' classes as CSV, and stop")
    parser.add_argument("--schedule", action="store_true", help="a temperature that moves, with mmts-plugins")
    parser.add_argument("--table", help="of mmts cluster, for a shift by class")
    parser.add_argument("--temperature", type=float, default=0.2, help="of the plain run; default: 0.2")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    (images, classes), (held, labels) = samples()
    if args.write:
        with args.write.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("class",), *([each] for each in classes)])
        print(f"{len(classes)} images: {args.write}")
        return
    shifts = {"alpha": 0.7, "shift_min": 0.45, "shift_max": 0.65} if args.table else {}
    callbacks = [MMTSCallback(args.table, key="target", **shifts)] if args.schedule else []
    pl.seed_everything(args.seed)
    module = SimCLR(args.temperature)
    loader = torch.utils.data.DataLoader(Views(images, classes), batch_size=128, shuffle=True, drop_last=True)
    trainer = pl.Trainer(
        default_root_dir=args.output, max_epochs=args.epochs, callbacks=callbacks, accelerator="cpu", devices=1,
        logger=pl.loggers.CSVLogger(args.output), enable_checkpointing=False, log_every_n_steps=5,
    )  # fmt: skip
    trainer.fit(module, loader)
    module.eval()
    with torch.no_grad():
        known, unknown = (nn.functional.normalize(module.backbone(each), dim=1) for each in (images, held))
    nearest = torch.tensor(classes)[(unknown @ known.T).argmax(dim=1)]
    right = nearest == labels
    thirds = {"head": labels < 3, "middle": (labels >= 3) & (labels < 7), "tail": labels >= 7}
    found = {name: round(100 * float(right[part].float().mean()), 1) for name, part in thirds.items()}
    found = {"all": round(100 * float(right.float().mean()), 1), **found}
    (args.output / "accuracy.json").write_text(json.dumps(found))
    print(f"nearest neighbour on {len(labels)} images: {found}")


if __name__ == "__main__":
    main()
