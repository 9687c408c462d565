"""What the examples for VAST share: the table, training and evaluation commands, their dry run, and the results."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Optional

from mmts_plugins.errors import ConfigError, MMTSError

_RECALL = re.compile(r"evaluation--(?P<name>\S+?)=+")


class Example(NamedTuple):
    """One of the paper's tables on VAST.

    Attributes:
        config: VAST's JSON, relative to the working folder, or absolute.
        rows: from a row's name to our flags; none for VAST as it is.
        table: flags of ``mmts cluster`` between the annotations and ``-o``.
        flags: of every scheduled row.
        training: VAST's own flags.
    """

    config: Path
    rows: Mapping[str, Sequence[str]]
    table: Sequence[str]
    flags: Sequence[str]
    training: Sequence[str]


def parser(description: Optional[str], rows: Sequence[str], output: str) -> argparse.ArgumentParser:
    """The flags that all examples have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    made.add_argument("--vast-root", type=Path, required=True, help="checkout of VAST")
    made.add_argument(
        "--work-dir", type=Path, help="folder with config, datasets and pretrained_weights; none: the checkout"
    )
    made.add_argument("--rows", nargs="+", choices=rows, default=rows, help="which rows of the table to train")
    made.add_argument("--pretrain-dir", default="output/vast/pretrain_vast", help="VAST's published model")
    made.add_argument("--output", type=Path, default=Path(output), help="folder for everything written")
    made.add_argument("--gpus", type=int, default=8, help="processes, one GPU each")
    made.add_argument("--port", type=int, default=9834, help="--master_port of torch.distributed.launch")
    made.add_argument("--vast", default="", help='more flags for VAST, e.g. "--train_epoch 10"')
    made.add_argument("--mmts", default="", help='more of our flags, e.g. "--mmts-num-oscillations 3"')
    made.add_argument("--dry-run", action="store_true", help="check paths, print configuration and schedule, stop")
    return made


def run(example: Example, args: argparse.Namespace) -> int:
    """Cluster, train, evaluate; or say what would be done.

    Raises:
        MMTSError: a path that is not there, or a command that fails.
    """
    work = (args.work_dir or args.vast_root).resolve()
    config = json.loads(_existing(work / example.config, "VAST's configuration").read_text(encoding="utf-8"))
    train = config["data_cfg"]["train"][0]
    annotations = _check_paths(work, args, config)
    output = args.output.resolve()
    table = output / "clusters.parquet"
    steps = _steps(train, annotations, args.vast)
    print(f"{annotations}: {steps} optimizer steps", flush=True)
    cluster = [*_MMTS, "cluster", str(annotations), *example.table, "-o", str(table)]
    if not args.dry_run:
        output.mkdir(parents=True, exist_ok=True)
    if not table.exists():
        _command(cluster, work, args.dry_run)
    for row in args.rows:
        ours = _flags(example, row, table, args.mmts)
        print(f"\n== {row}", flush=True)
        if args.dry_run and ours:
            to_come = [] if table.exists() else ["--no-table"]
            _command([*_MMTS, "schedule", "--host", "vast", "--total-steps", str(steps), *to_come, *ours], work)
        common = [*_launch(args), "--config", str(example.config)]
        training = [*example.training, "--pretrain_dir", args.pretrain_dir, *shlex.split(args.vast)]
        _command([*common, *training, "--output_dir", str(output / row), *ours], work, args.dry_run)
        # The last checkpoint: VAST's own "best" one is chosen on the very clips that it is judged by.
        testing = ["--mode", "testing", "--pretrain_dir", str(output / row), "--ret_bidirection_evaluation", "true"]
        evaluation = output / row / "evaluation"
        _command([*common, *shlex.split(args.vast), *testing, "--output_dir", str(evaluation)], work, args.dry_run)
        if not args.dry_run:
            print(recalls((evaluation / "log" / "log.txt").read_text(encoding="utf-8")))
    return 0


_MMTS = (sys.executable, "-m", "mmts_plugins")


def _flags(example: Example, row: str, table: Path, more: str) -> list[str]:
    ours = example.rows[row]
    if not ours:
        return []
    needs_table = [] if "--mmts-no-shifts" in ours else ["--mmts-clusters", str(table), *example.flags]
    return [*ours, *needs_table, *shlex.split(more)]


def _launch(args: argparse.Namespace) -> list[str]:
    launch = [sys.executable, "-m", "torch.distributed.launch", "--nnodes", "1", "--node_rank", "0"]
    script = str(args.vast_root.resolve() / "run.py")
    return [*launch, "--nproc_per_node", str(args.gpus), "--master_port", str(args.port), script]


def _existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise ConfigError(f"{path}: no such file or folder ({what})")
    return path


def _check_paths(work: Path, args: argparse.Namespace, config: dict[str, Any]) -> Path:
    """What VAST would miss after minutes; the training annotations."""
    _existing(args.vast_root / "run.py", "--vast-root must be a checkout of VAST")
    _existing(work / "pretrained_weights", "VAST's README says what belongs there")
    if args.pretrain_dir:
        _existing(work / args.pretrain_dir / "log" / "hps.json", "VAST's published model, --pretrain-dir")
    for part in ("train", "val"):
        for data in config["data_cfg"][part]:
            for field in ("txt", "vision", "audio"):
                if field in data:
                    _existing(work / data[field], f"{field!r} of {data['name']}, {part}")
    return work / config["data_cfg"]["train"][0]["txt"]


def _steps(train: dict[str, Any], annotations: Path, vast: str) -> int:
    """As VAST counts them: whole batches of an epoch, times epochs."""
    given = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    given.add_argument("--train_epoch", type=float, default=train.get("epoch"))
    given.add_argument("--train_batch_size", type=int, default=train["batch_size"])
    given.add_argument("--num_train_steps", type=int, default=0)
    values, _ = given.parse_known_args(shlex.split(vast))
    samples = len(json.loads(annotations.read_text(encoding="utf-8")))
    return values.num_train_steps or int(samples // values.train_batch_size * values.train_epoch)


def _command(command: Sequence[str], folder: Path, only_print: bool = False) -> None:
    print("$ " + shlex.join(command), flush=True)
    if not only_print and subprocess.run(command, cwd=folder, check=False).returncode:
        raise MMTSError(f"failed, see above: {shlex.join(command[:6])} ...")


def recalls(log: str) -> str:
    """R@1/5/10 from VAST's log: ``ret_itc`` is without refinement, ``ret_itm`` with it."""
    lines, name = [], ""
    for line in log.splitlines():
        found = _RECALL.search(line)
        name = found["name"] if found else name
        for way, label in (("video", "text to video"), ("txt", "video to text")):
            value = re.search(rf"'{way}_recall': '([\d./]+)'", line)
            if value and name:
                refined = "with" if "_itm_" in name else "without"
                lines.append(f"{label}, {refined} refinement: R@1/5/10 {value[1]}")
    return "\n".join(lines) or "no recall in VAST's log"
