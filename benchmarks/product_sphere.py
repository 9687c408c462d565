"""What a training step costs with a product sphere, and with a class token for each sphere, against the plain model.

    python benchmarks/product_sphere.py                     # ViT-B/16's widths and token counts, 4 layers, 16 tokens
    python benchmarks/product_sphere.py --layers 12 --batch-size 8 --output results.json

The three models take turns, round by round, in one process, in an order that changes; a ratio is the median over rounds
of the paired ratios of process CPU time (with one thread that hardly depends on other jobs of the machine). A step is
forward, OpenCLIP's own loss, backward; the optimizer is the same for all and is left out, which makes ratios larger.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import time
from pathlib import Path

import open_clip
import torch

from mmts_plugins.adapters.openclip_geometry import Geometry, convert


def model_of(args: argparse.Namespace, geometry: Geometry | None) -> torch.nn.Module:
    torch.manual_seed(0)
    vision = {"image_size": 224, "patch_size": 16, "width": 768, "head_width": 64, "layers": args.layers}
    text = {"context_length": 77, "vocab_size": 49408, "width": 512, "heads": 8, "layers": args.layers}
    model = open_clip.CLIP(512, vision, text, output_dict=True)
    if geometry is not None:
        convert(model, geometry)
    return model.train()


def step(model: torch.nn.Module, loss: torch.nn.Module, images: torch.Tensor, texts: torch.Tensor) -> float:
    model.zero_grad(set_to_none=True)
    start = time.process_time()
    loss(**model(images, texts)).backward()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", type=int, default=4, help="of each tower; default: 4 (ViT-B/16 has 12)")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--spheres", type=int, default=16)
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    n, m = 512 // args.spheres, args.spheres
    models = {
        "plain": model_of(args, None),
        f"PS({n}, {m})": model_of(args, Geometry(n, m)),
        f"Multi({n}, {m})": model_of(args, Geometry(n, m, class_tokens=True)),
    }
    images = torch.randn(args.batch_size, 3, 224, 224)
    texts = open_clip.tokenize([f"a photo of number {i}" for i in range(args.batch_size)])
    loss = open_clip.ClipLoss()
    for model in models.values():
        step(model, loss, images, texts)
    times: dict[str, list[float]] = {name: [] for name in models}
    draw = random.Random(0)
    for _ in range(args.rounds):
        for name in draw.sample(list(models), len(models)):
            times[name].append(step(models[name], loss, images, texts))
    ratios = {
        name: statistics.median(one / plain for one, plain in zip(each, times["plain"])) for name, each in times.items()
    }
    for name, ratio in ratios.items():
        print(f"{name:14} {ratio:.3f} of plain, {statistics.median(times[name]):.2f} s a step")
    if args.output:
        found = {"ratios": ratios, "seconds": times, "torch": torch.__version__, "machine": platform.machine(),
                 "layers": args.layers, "batch_size": args.batch_size, "rounds": args.rounds}  # fmt: skip
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
