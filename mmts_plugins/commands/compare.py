"""The arguments of ``mmts compare``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError

_DESCRIPTION = """\
Train the same thing plain, with the temperature schedule (TS), with individual cluster shifts (ICS), with both, and
with two controls (constant: all samples at the mean that the table gives; shuffled: its shifts on the wrong captions),
over several seeds; evaluate each run; write the paper's Table 4 for your data: mean and deviation over seeds, and
differences seed by seed with 95% intervals, in Markdown, JSON and CSV. Trains nothing itself: your own commands are
run one after another, or under your scheduler. Call it again to go on where it stopped.
"""

_EXAMPLES = """\
a plan, compare.yaml (paths are relative to it):
  command: >-
    python train.py --train-data train.tsv --model ViT-B-32 --batch-size 256 --epochs 30 --seed {seed}
    --logs {output}/runs --name {run}
  clusters: clusters.parquet            # gives the six variants; or: variants: {plain: "", mine: --loss mmts ...}
  mmts: --mmts-preset clip-cc3m         # more flags for all but plain
  controls: true                        # false: without the two controls, the paper's four variants alone
  contrasts: {TS&ICS: [plain, constant]}                   # differences to show; default: all to plain, and more
  seeds: [0, 1, 2]
  done: "{output}/runs/{run}/checkpoints/epoch_30.pt"      # what a finished run leaves
  resume: --resume latest                                  # what the host is told when a run died
  eval: mmts eval test.tsv --model ViT-B-32 --checkpoint {done} --table clusters.parquet -o {result}

  {seed} {run} {variant} {output} {flags} {done} {result} {python} are filled in; {flags} goes to the end if not placed.
  Write {python} for the Python that runs mmts, where it is not the first in PATH.

examples:
  mmts compare compare.yaml -o comparison --dry-run       # only print the commands
  mmts compare compare.yaml -o comparison
  mmts compare compare.yaml -o comparison --launcher "srun --gres=gpu:8"
  mmts compare compare.yaml -o comparison --launcher "sbatch --gres=gpu:8 --wrap {command}" --no-wait
      (call the last again, with or without the launcher, when the jobs are done: it evaluates and writes the tables)

  the same without a file, the command behind --:
    mmts compare -o comparison --table clusters.parquet --seeds 0,1,2 --resume "--resume latest" \\
        --done "{output}/runs/{run}/checkpoints/epoch_30.pt" --eval "mmts eval test.tsv ... -o {result}" \\
        -- python train.py ... --seed {seed} --logs {output}/runs --name {run}
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``compare`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "compare",
        help=help,
        usage="mmts compare PLAN.yaml -o DIR [options] | mmts compare -o DIR [options] -- COMMAND",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("plan", nargs="*", metavar="PLAN.yaml", help="what to compare; or the host's command behind --")
    add("-o", "--output", required=True, metavar="DIR", help="state, logs, evaluations and tables")
    add("--launcher", metavar="PREFIX", help='put before every command, such as "srun ..."; or with {command} in it')
    add("--no-wait", action="store_true", help="the launcher returns at once: submit, and evaluate in a later call")
    add("--retry", action="store_true", help="submit again what was submitted and did not end with 0")
    add("--accept-done", action="store_true",
        help="take files that are there for those of finished runs: of runs by hand, or of a lost state")  # fmt: skip
    add("--dry-run", action="store_true", help="print the commands and write nothing")
    add = parser.add_argument_group("instead of a plan, or over it").add_argument
    add("--seeds", metavar="S,S", help="such as 0,1,2; default: 0")
    add("--table", metavar="FILE", help="cluster table: gives plain, constant, TS, ICS, shuffled and TS&ICS")
    add("--clusters", dest="table", help=argparse.SUPPRESS)  # its former name
    add("--mmts", metavar="FLAGS", help="more of our flags for all but plain")
    add("--done", metavar="PATH", help="the file that a finished run leaves")
    add("--resume", metavar="FLAGS", help="what the host is told when a run died")
    add("--eval", metavar="COMMAND", help="evaluates {done} and writes {result}")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Run, resume and tabulate; the exit status is 1 if a run failed."""
    from ..compare import plan as plans
    from ..compare import run as room

    over = {"clusters": args.table, "mmts": args.mmts, "done": args.done, "resume": args.resume, "eval": args.eval}
    given = {name: value for name, value in over.items() if value is not None}
    if args.seeds is not None:
        try:
            given["seeds"] = [int(seed) for seed in args.seeds.split(",")]
        except ValueError as error:
            raise ConfigError(f"--seeds {args.seeds}: expected whole numbers with commas, such as 0,1,2") from error
    plan = plans.make(room.content(args.plan, given), args.output)
    if args.no_wait and not args.launcher:
        raise ConfigError("--no-wait needs --launcher: without one, commands are run and waited for")
    plans.launched([], args.launcher)  # refused before anything is written
    if args.dry_run:
        print(room.commands(plan, args.launcher, not args.no_wait))
        return 0
    return room.compare(plan, args.output, args.launcher, not args.no_wait, args.retry, args.accept_done)
