"""The arguments of ``mmts analyze``."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import Any

from ..data.forms import FORMATS
from ..errors import ConfigError, MMTSError, shown
from ._numbers import positive, seed

_DESCRIPTION = """\
What a temperature does to a model, as Sun & Li (TMLR 2024) look at it. Of any OpenCLIP checkpoint and pairs of images
and captions, or of saved features: a PNG, analysis.json and report.html in a folder.
"""
_WHAT = {
    "equilibrium": "where the loss is in equilibrium, by batch size and share of wrong pairs (Fig. 1)",
    "distances": "histograms of similarities of positive and negative pairs, and within a modality (Fig. 8)",
    "landscape": "the loss around the weights and its gradient's norm, at several temperatures (Fig. 4)",
    "probe": "accuracy of a linear classifier on the image tower's output",
}
_EXAMPLES = {
    "equilibrium": "mmts analyze equilibrium test.tsv --checkpoint logs/run/checkpoints/epoch_30.pt -o equilibrium\n"
    "  mmts analyze equilibrium --image-features images.npy --text-features texts.npy --batches-of 1024 8192 -o e",
    "distances": "mmts analyze distances test.tsv --model ViT-B-32 --pretrained laion2b_s34b_b79k -o distances",
    "landscape": "mmts analyze landscape train.tsv --checkpoint epoch_30.pt --scales 1 10 100 -o landscape",
    "probe": "mmts analyze probe train.tsv --test val.tsv --label-column label --checkpoint epoch_30.pt -o probe",
}


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``analyze`` with the sub-parsers of ``mmts``."""
    whole: argparse.ArgumentParser = commands.add_parser(
        "analyze", help=help, description=_DESCRIPTION, epilog="How to read each: docs/temperature.md."
    )
    whats = whole.add_subparsers(title="analyses", metavar="WHAT", required=True)
    for what, about in _WHAT.items():
        parser = whats.add_parser(
            what,
            allow_abbrev=False,
            help=about,
            description=f"Measures {about}.",
            epilog=f"examples:\n  {_EXAMPLES[what]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        _source(parser, features=what in ("equilibrium", "distances"))
        _OWN[what](parser.add_argument_group("what is measured").add_argument)
        add = parser.add_argument_group("output").add_argument
        add("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
        add("--force", action="store_true", help="replace an analysis in DIR")
        parser.set_defaults(run=run, what=what)
    return whole


def _source(parser: argparse.ArgumentParser, features: bool) -> None:
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?" if features else None, metavar="DATA", help="images and captions, as mmts eval reads them")
    add("--format", default="auto", choices=FORMATS, metavar="FORMAT", help="default: by what the file holds")
    add("--image-column", "--csv-img-key", metavar="NAME", help="default: filepath, image or another usual name")
    add("--column", "--csv-caption-key", metavar="NAME", help="of the captions; default: title or another usual name")
    add("--separator", "--csv-separator", default="\t", metavar="CHAR", help="of a CSV; default: tab")
    add("--image-root", metavar="DIR", help="where relative image paths start; default: the current folder")
    add("--split", default="test", help="of a Karpathy file; default: test")
    add("--sample", type=positive, default=0, metavar="N", help="pairs to take, drawn with --seed; default: all")
    add("--seed", type=seed, default=0, metavar="S", help="of all that is drawn; default: 0")
    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="OpenCLIP's --model; default: what params.txt beside the checkpoint says")
    add("--checkpoint", metavar="FILE", help="epoch_K.pt of OpenCLIP's trainer")
    add("--pretrained", metavar="TAG", help="OpenCLIP's --pretrained")
    add("--batch-size", type=positive, default=256, metavar="N", help="pairs encoded at once; default: 256")
    add("--device", metavar="NAME", help="default: a GPU if there is one")
    if features:
        add = parser.add_argument_group("saved features instead of a model (.npy or .safetensors)").add_argument
        add("--image-features", metavar="FILE", help="[N, D]")
        add("--text-features", metavar="FILE", help="[N, D]; row i belongs to row i")


def _equilibrium(add: Any) -> None:
    add("--batches-of", nargs="+", type=positive, default=[], metavar="B",
        help="batch sizes; default: 64, 256, 1024 and 4096, those there are pairs for")  # fmt: skip
    add("--shuffled", nargs="+", type=_share, default=[0.0, 0.1, 0.3], metavar="P",
        help="shares of the pairs that get one another's captions; default: 0 0.1 0.3")  # fmt: skip
    add("--batches", type=positive, default=4, metavar="K", help="of each size, at most; default: 4")
    add("--from", dest="low", type=_above, default=1.0, metavar="S", help="lowest logit scale; default: 1")
    add("--to", dest="high", type=_above, default=200.0, metavar="S", help="highest logit scale; default: 200")
    add("--points", type=positive, default=41, metavar="T", help="logit scales between; default: 41")


def _distances(add: Any) -> None:
    add("--bins", type=positive, default=200, metavar="N", help="default: 200")


def _landscape(add: Any) -> None:
    add("--scales", nargs="+", type=_above, default=[1.0, 10.0, 100.0], metavar="S", help="default: 1 10 100")
    add("--pairs", type=positive, default=256, metavar="N", help="of the batch; default: 256 (the paper: 1024)")
    add("--grid", type=_odd, default=15, metavar="G", help="places along a direction, odd; default: 15")
    add("--gradient-grid", type=_odd, default=7, metavar="G", help="of the gradient's norm, odd; default: 7")
    add("--radius", type=_above, default=1.0, metavar="R", help="largest multiple of a direction; default: 1")


def _probe(add: Any) -> None:
    add("--test", required=True, metavar="DATA", help="images to test on, read as the first")
    add("--label-column", required=True, metavar="NAME", help="class of each row; of a WebDataset: cls")
    add("--solver", choices=("lbfgs", "sgd"), default="lbfgs", help="sgd: as in the paper, without augmentation")
    add("--epochs", type=positive, default=100, metavar="N", help="default: 100")
    add("--decay", type=_share, default=1e-4, metavar="L", help="weight decay of lbfgs; default: 1e-4")


_OWN = {"equilibrium": _equilibrium, "distances": _distances, "landscape": _landscape, "probe": _probe}


def _above(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1e6:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not between 0 and 1,000,000")
    return value


def _share(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not between 0 and 1")
    return value


def _odd(text: str) -> int:
    value = positive(text)
    if value % 2 == 0 or value > 501:
        raise argparse.ArgumentTypeError(f"{shown(text)} is not an odd number up to 501: the middle place is the model")
    return value


def run(args: argparse.Namespace) -> int:
    """Measure and write."""
    from ..report.plots import check_matplotlib, own_style
    from ..report.write import check_folder

    check_matplotlib()
    check_folder(args.output, args.force)
    saved = getattr(args, "image_features", None)
    if saved and (args.data or args.model or args.checkpoint or args.pretrained):
        raise ConfigError("--image-features takes the place of DATA and of a model: leave them out")
    if not saved and getattr(args, "text_features", None):
        raise ConfigError("--text-features goes with --image-features")
    if not saved and args.data is None:
        raise ConfigError(f"no data given: mmts analyze {args.what} DATA --checkpoint ..., or --image-features")
    if args.what == "equilibrium" and not args.low < args.high:
        raise ConfigError(f"--from {args.low:g} is not below --to {args.high:g}")
    if args.what == "equilibrium" and args.points < 2:
        raise ConfigError("--points 1: a curve has two or more")
    try:
        from ..analysis import look
        from ..evaluation import sets
        from ..evaluation.model import find_model
    except ImportError as error:
        raise MMTSError(f"mmts analyze needs {error.name}: pip install 'mmts-plugins[openclip,report]'") from error
    model = args.model
    if model is None and args.checkpoint is not None:
        model = find_model(args.checkpoint)[0]

    def reading(data: str) -> sets.Reading:
        return sets.Reading(
            data=data, format=args.format, image_column=args.image_column, caption_column=args.column,
            separator=args.separator, label_column=getattr(args, "label_column", None), image_root=args.image_root,
            split=args.split, captions_per_image=1, captions=args.what != "probe",
        )  # fmt: skip

    source = look.Source(
        None if args.data is None else reading(args.data), model, args.checkpoint, args.pretrained, saved,
        getattr(args, "text_features", None), args.batch_size, args.device, args.sample, args.seed,
    )  # fmt: skip
    with own_style():
        if args.what == "equilibrium":
            step = math.log(args.high / args.low) / (args.points - 1)
            scales = [args.low * math.exp(step * number) for number in range(args.points)]
            written = look.look_at_equilibrium(
                source, args.output, scales, args.batches_of, args.shuffled, args.batches
            )
        elif args.what == "distances":
            written = look.look_at_distances(source, args.output, args.bins)
        elif args.what == "landscape":
            written = look.look_at_landscape(
                source, args.output, args.scales, args.pairs, args.grid, args.gradient_grid, args.radius
            )
        else:
            written = look.look_by_probe(source, reading(args.test), args.output, args.solver, args.epochs, args.decay)
    print("\n".join(f"Written to {path}" for path in written))
    return 0
