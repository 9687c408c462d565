"""K-Means: time and inertia against scikit-learn and faiss, and one pass over a file of CC3M's size.

    python benchmarks/clustering.py                                  # 100,000 x 384, k = 200, all in one run
    python benchmarks/clustering.py --file /tmp/points.npy           # 3.3 M x 768, float16 (5 GB), made first

One thread, process CPU time. Data: unit vectors around 2,000 centres of Zipf-distributed sizes. Ratios are to
scikit-learn's KMeans (Lloyd, n_init 1) of the same run. Memory is the peak of the process's own and mapped pages
(VmHWM) beyond what it was before the call.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import numpy as np

from mmts_plugins.clustering import kmeans
from mmts_plugins.data.rows import Rows

_CENTRES = 2000


def points(rows: int, width: int, seed: int = 0) -> np.ndarray:
    """``[rows, width]`` float32; the centres depend on the width alone."""
    fixed, draw = np.random.default_rng(width), np.random.default_rng(seed)
    centres = fixed.normal(size=(_CENTRES, width)).astype(np.float32)
    centres /= np.linalg.norm(centres, axis=1, keepdims=True)
    share = 1 / np.arange(1, _CENTRES + 1)
    x = centres[draw.choice(_CENTRES, rows, p=share / share.sum())]
    x += draw.standard_normal((rows, width), dtype=np.float32) * np.float32(0.5 / np.sqrt(width))
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def compare(rows: int, width: int, clusters: int, algorithms: list[str]) -> None:
    x = Rows(points(rows, width))
    weight = np.ones(rows)
    results = {}
    for name in algorithms:
        start = time.process_time()
        done = kmeans.cluster(x, weight, clusters, threads=1, algorithm=name)
        results[name] = time.process_time() - start, float(done.inertia[0])
        print(f"{name}: {results[name][0]:.1f} s", flush=True)
    seconds, inertia = results["sklearn"]
    print(
        f"\n{rows:,} x {width}, k = {clusters}\n| algorithm | CPU s | times faster | inertia |\n"
        "| --- | ---: | ---: | ---: |"
    )
    for name, (own, found) in results.items():
        print(f"| {name} | {own:.1f} | {seconds / own:.1f} | {found / inertia:.4f} |")


def stream(path: Path, rows: int, width: int, clusters: int) -> None:
    if not path.exists():
        target = np.lib.format.open_memmap(path, "w+", np.float16, (rows, width))
        for start in range(0, rows, 50_000):
            target[start : start + 50_000] = points(min(50_000, rows - start), width, seed=start + 1)
        del target
    x = Rows(np.load(path, mmap_mode="r"))
    before = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the high-water mark starts again from here
    start, wall = time.process_time(), time.time()
    done = kmeans.cluster(x, np.ones(len(x)), clusters, threads=1)
    print(
        f"{len(x):,} x {width}, k = {clusters}: {time.process_time() - start:.1f} s of CPU, {time.time() - wall:.0f} s "
        f"by the clock, {_memory('VmHWM') - before:.0f} MB more than before; largest cluster {done.sizes.max():,.0f}"
    )


def _memory(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) / 1024 for line in lines if line.startswith(field))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("-k", type=int, default=200)
    parser.add_argument("--algorithms", nargs="+", default=["sample", "faiss", "lloyd", "sklearn"])
    parser.add_argument("--file", type=Path, help="a .npy to stream; made if it is not there")
    args = parser.parse_args()
    if args.file:
        stream(args.file, args.rows or 3_300_000, args.width or 768, args.k)
    else:
        compare(args.rows or 100_000, args.width or 384, args.k, args.algorithms)


if __name__ == "__main__":
    main()
