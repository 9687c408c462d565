"""VAST on SSv2-LT, the rows of the paper's Tables 7 and 8: cluster, train, evaluate. See README.md."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from vast_runs import Example, parser, run

from mmts_plugins.errors import MMTSError

INFONCE = ("--loss", "mmts-infonce")
TABLE_7 = {
    "vast": (),
    "ts": (*INFONCE, "--mmts-no-shifts"),
    "td": (*INFONCE, "--mmts-no-schedule"),
    "ts-td": INFONCE,
}
TABLE_8 = {
    f"{low}-{high}-alpha-{alpha}": (
        *(*INFONCE, "--mmts-shift-min", low, "--mmts-shift-max", high, "--mmts-alpha", alpha),
    )
    for low, high in (("0.05", "0.09"), ("0.06", "0.10"), ("0.07", "0.11"))
    for alpha in ("0.02", "0.04", "0.06", "0.08")
}


def main() -> int:
    flags = parser(__doc__, [*TABLE_7, *TABLE_8], "ssv2_lt_runs")
    config = Path(__file__).resolve().parent / "retrieval-ssv2-lt.json"
    flags.add_argument("--config", type=Path, default=config, help="VAST's configuration")
    flags.set_defaults(rows=list(TABLE_7))
    args = flags.parse_args()
    table = ("--label-column", "template", "--column", "video_id")
    training = ("--learning_rate", "2e-5", "--checkpointing", "true", "--first_eval", "false")
    return run(Example(args.config, {**TABLE_7, **TABLE_8}, table, ("--mmts-key", "id"), training), args)


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MMTSError as error:
        sys.exit(f"error: {error}")
