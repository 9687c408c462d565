"""What the start-up file costs a Python that does not ask for us: its processor time, and its share of that of a bare
start, both in turns.

    python benchmarks/startup.py [--rounds 60]
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMED = """
import os, sys, time
sys.path.insert(0, {root!r})
before = time.process_time()
{start}
now = time.process_time()
print(now - before, now)
"""


def seconds(start: str, compiled: str) -> tuple[float, float]:
    """Of the statement, and of the whole process until then; byte code is kept, as after ``pip install``."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    out = subprocess.run(
        [sys.executable, "-S", "-c", TIMED.format(root=str(ROOT), start=start)],
        env={**environment, "PYTHONPYCACHEPREFIX": compiled}, stdout=subprocess.PIPE, text=True, check=True,
    ).stdout  # fmt: skip
    own, whole = map(float, out.split())
    return own, whole


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=60, help="starts of each, in turns; medians count")
    args = parser.parse_args()
    ours, bare = [], []
    with tempfile.TemporaryDirectory() as compiled:
        for _ in range(args.rounds):
            ours.append(seconds("import mmts_plugins._startup; mmts_plugins._startup.start()", compiled)[0])
            bare.append(seconds("pass", compiled)[1])
    own, whole = statistics.median(ours), statistics.median(bare)
    print(f"{1000 * own:.2f} ms, {own / whole:.2f} of a Python without site-packages ({1000 * whole:.1f} ms)")


if __name__ == "__main__":
    main()
