"""Time and memory of ``mmts cluster`` on JSON lines, plain and gzipped, one after the other in one run.

python benchmarks/reading.py [--captions 2000000]
"""

from __future__ import annotations

import argparse
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

WORDS = ("dog", "cat", "boat", "river", "kite", "man", "woman", "red", "old", "street", "bridge", "car", "tree", "sea")


def write(folder: Path, many: int) -> list[Path]:
    """The same lines, of some ten words, plain and gzipped."""
    draw = random.Random(0)
    plain, packed = folder / "captions.jsonl", folder / "captions.jsonl.gz"
    with plain.open("wt") as one, gzip.open(packed, "wt", compresslevel=3) as other:
        for number in range(many):
            caption = f"{' '.join(draw.choices(WORDS, k=8))} {number % (many // 2)}"
            line = json.dumps({"image": f"{number}.jpg", "caption": caption}) + "\n"
            one.write(line)
            other.write(line)
    return [plain, packed]


def measure(path: Path, folder: Path) -> tuple[float, float]:
    """Seconds and peak gigabytes of making a table, in a process of its own and without a cache of before."""
    command = [sys.executable, "-m", "mmts_plugins", "cluster", str(path), "--encoder", "hashing", "-k", "50"]
    command += ["--runs", "1", "--force", "-o", str(folder / "table.parquet")]
    environment = {**os.environ, "MMTS_CACHE": str(folder / f"cache-{path.suffix}")}
    started = time.monotonic()
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"{path.name}: mmts cluster ended with {status}")
    return time.monotonic() - started, used.ru_maxrss * 1024 / 1e9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--captions", type=int, default=2_000_000, metavar="N")
    many = parser.parse_args().captions
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        seconds = []
        for path in write(folder, many):
            took, peak = measure(path, folder)
            seconds.append(took)
            print(f"{path.name}: {many:,} captions, {took:.1f} s, {peak:.2f} GB at the peak", flush=True)
        print(f"gzipped / plain: {seconds[1] / seconds[0]:.2f}")


if __name__ == "__main__":
    main()
