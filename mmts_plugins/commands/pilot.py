"""The arguments of ``mmts pilot``."""

from __future__ import annotations

import argparse
from typing import Any

from ..errors import ConfigError
from ._numbers import whole
from ._recipe import add_input, source_of

_DESCRIPTION = """\
In ten minutes and without a GPU: does a schedule, do a table's shifts, help on your data? Trains two linear heads on
frozen features of any encoders, with the losses, the clock and the flags that a host would have, over several seeds: a
learned temperature (plain), the schedule (TS), the shifts (ICS), both, and the controls constant (the same mean
temperature) and shuffled (the table's shifts on the wrong captions). Prints what helps beyond its interval and beyond
its controls, for head, middle and tail, and the flags to train with. A hint for full training, not a proof. Killed and
called again it goes on; a seed gives the same numbers to the bit.
"""

_EXAMPLES = """\
examples:
  mmts cluster train.tsv -o clusters.parquet
  mmts pilot train.tsv --group image_id --images filepath --image-encoder timm:efficientnet_lite0 \\
      --table clusters.parquet -o pilot                     # images and captions, embedded here (and kept)
  mmts pilot train.tsv --texts texts.npy --others images.npy --group image_id --table clusters.parquet -o pilot
  mmts pilot pairs.csv --separator , --column text --other name --encoder hashing --table clusters.parquet -o pilot
  mmts pilot train.tsv ... --table k200=a.parquet --table radius=b.parquet -o pilot       # which table?
  mmts pilot train.tsv ... --grid num_oscillations=1,5 --grid alpha=0.02,0.04 -o pilot    # which schedule?
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``pilot`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "pilot",
        help=help,
        usage="mmts pilot DATA --table FILE -o DIR [options]",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add_input(parser)
    add = parser.add_argument_group("features, a row for each sample of DATA").add_argument
    add("--texts", metavar="FILE", help="of the captions: .npy or .safetensors; default: made by --encoder")
    add("--others", metavar="FILE", help="of what goes with them; instead of --images or --other")
    add("--encoder", metavar="NAME", default="sentence-transformers/all-MiniLM-L6-v2",
        help="of texts, as of mmts cluster; default: sentence-transformers/all-MiniLM-L6-v2")  # fmt: skip
    add("--images", metavar="COLUMN", help="the other side are the images that this column names")
    add("--image-encoder", metavar="NAME", help="timm:MODEL or openclip:MODEL/PRETRAINED")
    add("--image-root", metavar="FOLDER", help="what their paths are relative to; default: the working folder")
    add("--other", metavar="COLUMN", help="the other side is the text of this column")
    add("--group", metavar="COLUMN",
        help="samples of one thing (an image's id): right answers for one another, never on both sides of the "
        "split; default: the image, where the form of DATA says, else each sample by itself")  # fmt: skip
    add = parser.add_argument_group("test set").add_argument
    add("--test", metavar="DATA", help="instead of a part of DATA; of the same form")
    add("--test-texts", metavar="FILE", help="with --texts")
    add("--test-others", metavar="FILE", help="with --others")
    add("--hold-out", type=float, default=0.1, metavar="SHARE", help="of the groups, without --test; default: 0.1")
    add = parser.add_argument_group("what is tried").add_argument
    add("--table", action="append", required=True, metavar="[NAME=]FILE",
        help="cluster table of the captions; may be given several times")  # fmt: skip
    add("--loss", default="mmts-infonce", metavar="LOSS", help="mmts-infonce (default), mmts-max-margin, or another")
    add("--host", default="openclip", metavar="NAME", help="whose presets and flags; default: openclip")
    add("--mmts", default="", metavar="FLAGS", help='more of our flags for all variants, such as "--mmts-alpha 0.02"')
    add("--grid", action="append", default=[], metavar="NAME=V,V",
        help="further variants with both: values of a flag without --mmts-; several are crossed")  # fmt: skip
    add("--variant", action="append", default=[], metavar="NAME=FLAGS", help="a variant of your own")
    add("--seeds", type=whole(1, 1000), default=8, metavar="N", help="default: 8")
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=whole(1, 10_000), default=12, metavar="N", help="default: 12")
    add("--batch-size", type=whole(2, 1_000_000), default=512, metavar="N", help="default: 512")
    add("--dimensions", type=whole(1, 100_000), default=256, metavar="D", help="of the heads' output; default: 256")
    add("--learning-rate", type=float, default=1e-3, metavar="LR", help="of AdamW at its peak; default: 0.001")
    add("--device", default="cpu", metavar="NAME", help="default: cpu")
    add("--budget", type=float, default=10.0, metavar="MINUTES", help="no run starts that would not end; default: 10")
    add("--jobs", type=whole(1, 1024), default=None, metavar="N", help="runs at a time; default: the cores there are")
    parser.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="features, results, tables and report.html"
    )
    parser.add_argument("--force", action="store_true", help="drop the results of another pilot that are in DIR")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Embed, train, tabulate."""
    from pathlib import Path

    from ..pilot.start import start

    return start(_wanted(args), Path(args.output), args.force)


def _wanted(args: argparse.Namespace) -> Any:
    from dataclasses import replace

    from ..pilot.data import Side
    from ..pilot.run import Variant, parse_axes, parse_tables
    from ..pilot.start import Wanted
    from ..pilot.train import Settings

    source = source_of(args)
    if not source.data:
        raise ConfigError("which data? mmts pilot DATA --table FILE -o DIR")
    if args.weights is not None:
        raise ConfigError("--weights: a pilot draws every sample once an epoch; leave it out")
    given = [flag for flag in ("others", "images", "other") if getattr(args, flag) is not None]
    if len(given) != 1:
        raise ConfigError("what goes with the captions? one of --others FILE, --images COLUMN and --other COLUMN")
    if (args.images is None) != (args.image_encoder is None):
        raise ConfigError("--images COLUMN and --image-encoder NAME go together")
    if not 0 < args.hold_out < 1:
        raise ConfigError(f"--hold-out {args.hold_out:g}: a share above 0 and below 1")
    for flag in ("texts", "others"):
        if args.test is not None and (getattr(args, flag) is None) != (getattr(args, f"test_{flag}") is None):
            raise ConfigError(f"with --test, --{flag} and --test-{flag} go together")
        if args.test is None and getattr(args, f"test_{flag}") is not None:
            raise ConfigError(f"--test-{flag} goes with --test DATA")
    if not args.learning_rate > 0 or not args.budget > 0:
        raise ConfigError("--learning-rate and --budget are above 0")
    other = Side(None, args.image_encoder or args.encoder, args.images or args.other, args.images is not None)
    own = []
    for each in args.variant:
        name, equals, flags = each.partition("=")
        if not equals or not name.strip():
            raise ConfigError(f"--variant {each}: write NAME=FLAGS")
        own.append(Variant(name.strip(), flags.strip()))
    return Wanted(
        source=source,
        texts=Side(args.texts, args.encoder),
        others=replace(other, file=args.others),
        test=None if args.test is None else replace(source, data=args.test),
        test_texts=Side(args.test_texts, args.encoder),
        test_others=replace(other, file=args.test_others),
        group=args.group,
        image_root=args.image_root,
        keep_blank=args.keep_blank,
        hold_out=args.hold_out,
        tables=parse_tables(args.table),
        loss=args.loss,
        host=args.host,
        more=args.mmts,
        axes=parse_axes(args.grid),
        own=own,
        seeds=list(range(args.seeds)),
        settings=Settings(args.epochs, args.batch_size, args.dimensions, args.learning_rate, device=args.device),
        budget=args.budget,
        jobs=args.jobs,
    )
