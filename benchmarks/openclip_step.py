"""What MM-TS costs a step of the real OpenCLIP trainer: plain and ``--loss mmts`` in turns, same seed, same data.

    python benchmarks/openclip_step.py --data train.tsv --clusters clusters.parquet --model ViT-S-16 --batch-size 128

The ratio is that of the median step times (OpenCLIP's own ``Batch (t)``) of each pair of runs; the median over rounds
is printed with the range.
"""

from __future__ import annotations

import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile


def step_times(arguments: list[str], logs: str, name: str) -> list[float]:
    command = [sys.executable, "-m", "mmts_plugins", "run", "-m", "open_clip_train.main", *arguments]
    command += ["--logs", logs, "--name", name, "--save-frequency", "0"]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    if done.returncode:
        sys.exit(done.stdout[-3000:])
    times = [float(match) for match in re.findall(r"Batch \(t\): ([0-9.]+)", done.stdout)]
    return times[1:]  # the first interval warms up


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, help="CSV in OpenCLIP's form")
    parser.add_argument("--clusters", required=True)
    parser.add_argument("--model", required=True)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    args, rest = parser.parse_known_args()
    host = ["--train-data", args.data, "--dataset-type", "csv", "--model", args.model, "--batch-size", args.batch_size]
    host += ["--epochs", 1, "--workers", 0, "--precision", "fp32", "--log-every-n-steps", 20, *rest]
    ratios = []
    with tempfile.TemporaryDirectory() as logs:
        for number in range(args.rounds):
            plain = step_times([*map(str, host)], logs, f"plain-{number}")
            ours = step_times(
                [*map(str, host), "--loss", "mmts", "--mmts-clusters", args.clusters], logs, f"mmts-{number}"
            )
            ratios.append(statistics.median(ours) / statistics.median(plain))
            print(
                f"round {number}: plain {1000 * statistics.median(plain):.1f} ms, MM-TS "
                f"{1000 * statistics.median(ours):.1f} ms a step, ratio {ratios[-1]:.3f}",
                flush=True,
            )
    print(f"ratio {statistics.median(ratios):.3f} (from {min(ratios):.3f} to {max(ratios):.3f})")


if __name__ == "__main__":
    main()
