"""A trainer that knows nothing of MM-TS: two linear towers on pairs of random images and words.

python -m tiny_trainer --captions captions.txt --epochs 2 --output run
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 16


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--captions", required=True, help="one caption a line")
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--output", default="run", help="folder of losses.json")
    return parser.parse_args(argv)


def learning_rate(step: int, total: int) -> float:
    return 0.1 * (1 - step / total)


def contrastive_loss(images: Tensor, texts: Tensor, captions: list[str]) -> Tensor:
    logits = images @ texts.T / 0.07
    target = torch.arange(len(captions))
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


def train(args: argparse.Namespace) -> list[float]:
    torch.manual_seed(0)
    captions = Path(args.captions).read_text().splitlines()
    words = {word: i for i, word in enumerate(sorted({word for line in captions for word in line.split()}))}
    images = torch.randn(len(captions), WIDTH)
    image_tower, text_tower = nn.Linear(WIDTH, WIDTH), nn.EmbeddingBag(len(words), WIDTH)
    optimizer = torch.optim.SGD([*image_tower.parameters(), *text_tower.parameters()])
    batches = len(captions) // args.batch_size
    losses = []
    for step in range(args.epochs * batches):
        optimizer.param_groups[0]["lr"] = learning_rate(step, args.epochs * batches)
        rows = range(step % batches * args.batch_size, (step % batches + 1) * args.batch_size)
        drawn = [captions[row] for row in rows]
        texts = torch.cat([text_tower(torch.tensor([[words[word] for word in text.split()]])) for text in drawn])
        loss = contrastive_loss(F.normalize(image_tower(images[list(rows)]), dim=1), F.normalize(texts, dim=1), drawn)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    Path(args.output).mkdir(parents=True, exist_ok=True)
    (Path(args.output) / "losses.json").write_text(json.dumps(losses))
    return losses


def main(argv: list[str] | None = None) -> None:
    print(f"last loss {train(parse(argv))[-1]:.4f}")


if __name__ == "__main__":
    import tiny_trainer  # as a module of its own, which `python -m` does not make it: there the seams are

    tiny_trainer.main()
