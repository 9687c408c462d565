"""VAST on YouCook2, the rows of the paper's Table 9: cluster, train, evaluate. See README.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vast_runs import Example, parser, run

from mmts_plugins.errors import MMTSError

CLIP, MIMM = ("--loss", "mmts-infonce"), ("--loss", "mmts-max-margin")
TS, ICS = "--mmts-no-shifts", "--mmts-no-schedule"
ROWS = {
    "clip": (),
    "clip-ts": (*CLIP, TS),
    "clip-ics": (*CLIP, ICS),
    "clip-ts-ics": CLIP,
    "mimm": (*MIMM, TS, ICS),  # neither: one constant margin, 0.2
    "mimm-ts": (*MIMM, TS),
    "mimm-ics": (*MIMM, ICS),
    "mimm-ts-ics": MIMM,
}


def main() -> int:
    flags = parser(__doc__, list(ROWS), "youcook2_runs")
    flags.add_argument("--encoder", default="sentence-transformers/all-MiniLM-L6-v2", help="for the captions")
    flags.add_argument("-k", type=int, default=200, help="number of clusters")
    flags.add_argument("--embeddings", help=".npy of visual features, a row per annotation (the paper's Table 6)")
    flags.add_argument("--config", type=Path, default=Path("config/vast/finetune_cfg/retrieval-youcook.json"))
    args = flags.parse_args()
    table, keys = ["--encoder", args.encoder], []
    if args.embeddings:
        table, keys = ["--column", "video_id", "--embeddings", args.embeddings], ["--mmts-key", "id"]
    table += ["-k", str(args.k)]
    training = ("--learning_rate", "3e-5", "--checkpointing", "true", "--first_eval", "false")
    return run(Example(args.config, ROWS, table, keys, training), args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MMTSError as error:
        sys.exit(f"error: {error}")
