"""What the live statistics cost: one measurement against one InfoNCE step, forward and backward, in the same rounds.

    python benchmarks/live.py [--sizes 256 1024 4096] [--rounds 5]

Process CPU time, one thread. The loss is a small part of a training step, so the share of a whole step is less.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
import torch.nn.functional as F

from mmts_plugins.diagnostics import batch_statistics
from mmts_plugins.functional import info_nce

EVERY = 100  # --mmts-diagnostics-every's default


def cpu_seconds(action: Callable[[], object]) -> float:
    start = time.process_time()
    action()
    return time.process_time() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 1024, 4096], help="batch sizes")
    parser.add_argument("--dim", type=int, default=512, help="width of the features")
    parser.add_argument("--rounds", type=int, default=5, help="interleaved rounds; the median ratio counts")
    args = parser.parse_args()
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}, D = {args.dim}, one thread\n")
    print("| N | one measurement / one loss step | every 100 steps |\n| --- | --- | --- |")
    for n in args.sizes:
        images, texts = (F.normalize(torch.randn(n, args.dim), dim=1).requires_grad_() for _ in range(2))
        tau, third = torch.full((n,), 0.07), torch.arange(n) % 3

        def loss_step(images=images, texts=texts, tau=tau) -> None:
            info_nce(images, texts, tau).backward()

        def measure(images=images, texts=texts, tau=tau, third=third) -> None:
            batch_statistics("mmts-infonce", images.detach(), texts.detach(), tau, third)

        loss_step(), measure()  # warm
        ratio = statistics.median(cpu_seconds(measure) / cpu_seconds(loss_step) for _ in range(args.rounds))
        print(f"| {n:,} | {ratio:.2f} | {ratio / EVERY:.2%} of the loss |")


if __name__ == "__main__":
    main()
