"""The EPIC-KITCHENS-100 rows of the paper's Tables 4 and 5, in an unmodified checkout of AVION. See README.md."""

from __future__ import annotations

import argparse
import csv
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

EPOCHS = 100  # of AVION's script
TOTAL_BATCH = 512
MARGIN, TEMPERATURE = "0.2", "0.07"  # AVION's own: of its max-margin loss, and of the checkpoints it starts from


class Row(NamedTuple):
    """A row of a table of the paper, and the flags that make it."""

    where: str
    flags: tuple[str, ...]


def constant(loss: str, value: str, *more: str) -> tuple[str, ...]:
    """Every sample at the same value, around which the schedule moves unless it is off."""
    return ("--loss", loss, "--mmts-no-shifts", "--mmts-shift-min", value, "--mmts-shift-max", value, *more)


ROWS = {
    "mi-mm": Row("Table 4, MI-MM (AVION itself)", ()),
    "mi-mm-ts": Row("Table 4, MI-MM w/ TS", constant("mmts-max-margin", MARGIN)),
    "mi-mm-ics": Row("Table 4, MI-MM w/ ICS", ("--loss", "mmts-max-margin", "--mmts-no-schedule")),
    "mi-mm-ts-ics": Row("Table 4, MI-MM w/ TS&ICS; the paper's row of Table 2; Table 5, nouns", ("--loss", "mmts")),
    "clip": Row("Table 4, CLIP", constant("mmts-infonce", TEMPERATURE, "--mmts-no-schedule")),
    "clip-ts": Row("Table 4, CLIP w/ TS", constant("mmts-infonce", TEMPERATURE)),
    "clip-ics": Row("Table 4, CLIP w/ ICS", ("--loss", "mmts-infonce", "--mmts-no-schedule")),
    "clip-ts-ics": Row("Table 4, CLIP w/ TS&ICS", ("--loss", "mmts-infonce")),
    "verbs": Row("Table 5, verbs", ("--loss", "mmts", "--mmts-distribution", "verb")),
    "verbs-nouns": Row("Table 5, verbs & nouns", ("--loss", "mmts", "--mmts-distribution", "verb_noun")),
}


def parse_args() -> argparse.Namespace:
    rows = "\n".join(f"  {name:<14}{row.where}" for name, row in ROWS.items())
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"rows:\n{rows}\n\nWhatever follows -- goes to AVION's script.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("row", choices=ROWS, metavar="ROW", help="which row to train, see below")
    parser.add_argument(
        "--avion", type=Path, required=True, help="checkout of AVION, its decord built (docs/INSTALL.md)"
    )
    parser.add_argument("--videos", type=Path, required=True, help="EK-100 in 15-second chunks, as AVION prepares it")
    parser.add_argument("--annotations", type=Path, required=True, help="folder retrieval_annotations of EK-100")
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="AVION's ViT-B pre-trained with LaViLa's captions"
    )
    parser.add_argument("--output", type=Path, default=Path("runs/avion"), help="a folder in it is made for the row")
    parser.add_argument(
        "--gpus", type=int, choices=(1, 2, 4, 8), default=8, help="of this node; 8 x 64 = 4 x 128 samples"
    )
    parser.add_argument("--dry-run", action="store_true", help="check paths, print command, config and schedule, stop")
    words = sys.argv[1:]
    end = words.index("--") if "--" in words else len(words)
    args = parser.parse_args(words[:end])
    args.more = words[end + 1 :]
    return args


def main() -> int:
    args = parse_args()
    for name in ("avion", "videos", "annotations", "checkpoint", "output"):
        setattr(args, name, getattr(args, name).resolve())
    row = ROWS[args.row]
    command = torchrun(args, row)
    missing = [path for path in needed(args) if not path.exists()]
    print(f"{args.row}: {row.where}\n\ncd {args.avion}\n{shlex.join(command)}\n", flush=True)
    for path in missing:
        print(f"missing: {path}", file=sys.stderr)
    status = show_schedule(args, row)
    if args.dry_run or missing or status:
        return int(bool(missing) or status != 0)
    (args.output / args.row).mkdir(parents=True, exist_ok=True)
    return subprocess.run(command, cwd=args.avion, env=environment(args), check=False).returncode


def needed(args: argparse.Namespace) -> list[Path]:
    """What the run reads: a missing file would be noticed only after AVION has built its model."""
    split = [args.annotations / f"EPIC_100_retrieval_{name}.csv" for name in ("train", "train_sentence", "test")]
    relevancy = args.annotations / "relevancy"
    return [
        args.avion / "scripts" / "main_lavila_finetune_mir.py",
        args.avion / "third_party" / "decord" / "python",
        args.videos,
        *split,
        args.annotations / "EPIC_100_retrieval_test_sentence.csv",
        *(relevancy / f"caption_relevancy_EPIC_100_retrieval_{name}.pkl" for name in ("train", "test")),
        args.checkpoint,
    ]


def torchrun(args: argparse.Namespace, row: Row) -> list[str]:
    """AVION's own command for EK-100 (its docs/MODEL_ZOO.md), and the flags of the row."""
    test = args.annotations / "EPIC_100_retrieval_test.csv"
    relevancy = args.annotations / "relevancy" / "caption_relevancy_EPIC_100_retrieval_test.pkl"
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={args.gpus}", "--"]
    command += ["scripts/main_lavila_finetune_mir.py", "--root", args.videos, "--train-metadata", train_metadata(args)]
    command += ["--val-metadata", test, "--relevancy-path", relevancy, "--pretrain-model", args.checkpoint]
    command += ["--video-chunk-length", "15", "--use-flash-attn", "--grad-checkpointing", "--use-fast-conv1"]
    command += ["--fused-decode-crop", "--use-multi-epochs-loader", "--batch-size", TOTAL_BATCH // args.gpus]
    command += ["--epochs", EPOCHS, "--output-dir", args.output / args.row, *row.flags, *args.more]
    return [str(word) for word in command]


def train_metadata(args: argparse.Namespace) -> Path:
    path: Path = args.annotations / "EPIC_100_retrieval_train.csv"
    return path


def environment(args: argparse.Namespace) -> dict[str, str]:
    paths = [str(args.avion), str(args.avion / "third_party" / "decord" / "python"), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}


def show_schedule(args: argparse.Namespace, row: Row) -> int:
    """The row's config and temperatures, as the run will resolve them: 0 where it would start."""
    if not row.flags or not train_metadata(args).exists():
        print("AVION's own loss: no schedule" if not row.flags else "no schedule without the training annotations")
        return 0
    with train_metadata(args).open(newline="", encoding="utf-8") as file:
        samples = sum(1 for _ in csv.DictReader(file))
    per_gpu = -(-samples // args.gpus)
    steps = per_gpu // (TOTAL_BATCH // args.gpus) * EPOCHS
    command = [sys.executable, "-m", "mmts_plugins", "schedule", "--host", "avion", "--total-steps", steps]
    command += ["--train-metadata", train_metadata(args), *row.flags]
    return subprocess.run([str(word) for word in command], check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
