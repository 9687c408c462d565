"""Synthetic captions of any number, for runs at scale: common and rare concepts, Zipf-distributed, in words.

python benchmarks/scale.py captions --rows 2000000 --output captions.parquet
mmts cluster captions.parquet --engine ray --encoder hashing -o clusters
python benchmarks/scale.py table --rows 100000000 --output big          # a finished table, keyed by captions
python benchmarks/scale.py start --table big                            # time and memory of a run's start-up
"""

from __future__ import annotations

import argparse
import os
import resource
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

_SYLLABLES = [a + b for a in "bcdfghklmnprstvw" for b in ("a", "e", "i", "o", "u", "an", "er", "il")]
_PART = 1_000_000


def words(many: int) -> np.ndarray:
    """``[many]`` distinct pronounceable words."""
    n = len(_SYLLABLES)
    return np.array([_SYLLABLES[i % n] + _SYLLABLES[i // n % n] + _SYLLABLES[i // n // n] for i in range(many)])


def captions(rows: int, seed: int) -> pa.Array:
    """Eight words each: two of the concept, one attribute, the rest from a large vocabulary."""
    draw = np.random.default_rng(seed)
    vocabulary = words(20_000)
    concept = np.minimum(draw.zipf(1.3, rows), 2000)
    parts = [vocabulary[concept], vocabulary[2000 + concept], vocabulary[4000 + draw.integers(0, 50, rows)]]
    parts += [vocabulary[5000 + np.minimum(draw.zipf(1.2, rows), 14_999)] for _ in range(4)]
    return pa.array([" ".join(row) for row in zip(*(part.tolist() for part in parts))])


def write_captions(rows: int, output: str) -> None:
    with pq.ParquetWriter(output, pa.schema([("caption", pa.string())])) as writer:
        for start in range(0, rows, 100_000):
            writer.write_table(pa.table({"caption": captions(min(100_000, rows - start), start)}))


def write_table(rows: int, output: str) -> None:
    """A table of distinct keys with 200 cluster sizes, in parts as ``--engine ray`` writes them."""
    from mmts_plugins.tables import ClusterTable

    sizes = np.sort(np.random.default_rng(0).zipf(1.3, 200).clip(1, 10_000))[::-1].astype(float) * 100
    parts = -(-rows // _PART)
    for part in range(parts):
        numbers = np.arange(part * _PART, min((part + 1) * _PART, rows))
        keys = pa.array([f"a photo of item {number:,} on a table" for number in numbers.tolist()])
        cluster = (numbers * 7919 % 200).astype(np.int32)
        ClusterTable.build(keys, cluster, sizes[cluster], info={"parts": parts}).save(
            Path(output) / f"part-{part:06d}.parquet", {"clusters": 200, "samples": rows, "parts": parts}
        )


def start(table: str) -> None:
    """What a host does at its start: open the table, build or map the index, look a batch up."""
    import torch

    from mmts_plugins.tables import open_table
    from mmts_plugins.tables.index import TokenLookup

    def tokenizer(texts: list[str]) -> torch.Tensor:
        # Fixed-width bytes: a stand-in that costs little, so that what is measured is the table and the index.
        packed = np.array([text.encode()[:64] for text in texts], "S64").view(np.uint8).reshape(len(texts), 64)
        return torch.from_numpy(packed.astype(np.int64))

    before, began = _anonymous(), time.time()
    opened = open_table(table)
    lookup = TokenLookup(opened, tokenizer, 0, torch.device("cpu"))
    print(f"started in {time.time() - began:.1f} s: {len(opened):,} keys, hash {opened.content_hash}")
    batch = tokenizer(
        [f"a photo of item {number:,} on a table" for number in range(0, len(opened), len(opened) // 1024)]
    )
    began = time.time()
    index = lookup(batch)
    print(f"a batch of {len(batch)} in {1000 * (time.time() - began):.2f} ms; found {(index < lookup.missing).sum()}")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    print(
        f"memory of this process: {_anonymous() - before:.0f} MB more of its own than after imports; peak {peak:.0f} MB"
    )


def _anonymous() -> float:
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) / 1024 for line in file if line.startswith("RssAnon"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    for name in ("captions", "table"):
        command = commands.add_parser(name)
        command.add_argument("--rows", type=int, required=True)
        command.add_argument("--output", required=True)
    commands.add_parser("start").add_argument("--table", required=True)
    args = parser.parse_args()
    if args.command == "start":
        start(args.table)
    else:
        (write_captions if args.command == "captions" else write_table)(args.rows, args.output)


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
