"""The arguments of ``mmts eval``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any, Optional

from .._files import check_writable
from ..data.forms import FORMATS
from ..errors import ConfigError, MMTSError
from ._numbers import at_least
from ._refuse import refuse_given

FILE_NAME = "mmts_eval.json"
_MOST_RESAMPLES = 1_000_000

_whole, _positive = at_least(0, "is below zero"), at_least(1, "is not above zero")


def _draws(text: str) -> int:
    value = _whole(text)
    if value > _MOST_RESAMPLES:
        raise argparse.ArgumentTypeError(f"{value} is more than {_MOST_RESAMPLES:,}, which no interval needs")
    return value


_DESCRIPTION = """\
Evaluate a model as papers report it: image-text retrieval (R@1, 5, 10, mean and median rank), multi-instance mAP and
nDCG, zero-shot classification. Every number comes with a 95% bootstrap interval and, with --table, also for the head,
the middle and the tail third of the training samples.
"""

_EXAMPLES = """\
examples:
  a checkpoint of OpenCLIP's trainer, and a CSV with one line per caption (tab, columns filepath and title):
    mmts eval test.tsv --model ViT-B-32 --checkpoint logs/run/checkpoints/epoch_30.pt --table clusters.parquet

  Flickr30K and COCO in Karpathy's files, COCO with five captions per image (25,000 in all):
    mmts eval dataset_flickr30k.json --image-root flickr30k-images --model ViT-B-32 --checkpoint epoch_30.pt
    mmts eval dataset_coco.json --image-root coco --captions-per-image 5 --model ViT-B-32 --pretrained openai

  a WebDataset of images with .txt (one caption per line):
    mmts eval 'test/{0..9}.tar' --model ViT-B-32 --checkpoint epoch_30.pt

  zero-shot classification, classes one per line, the class of an image in the column "label":
    mmts eval val.tsv --classes classes.txt --label-column label --no-retrieval \\
        --model ViT-B-32 --checkpoint epoch_30.pt

  features of any model (rows of DATA in order; or say whose caption each text is: a number per line, from 0):
    mmts eval test.tsv --image-features images.npy --text-features texts.npy -o mmts_eval.json
    mmts eval --image-features images.npy --text-features texts.npy --text-image owner.txt -o mmts_eval.json

  EPIC-KITCHENS-100 multi-instance retrieval from features, by the frequency of a class; or with any relevancy matrix:
    mmts eval --ek100 EPIC_100_retrieval_test.csv --ek100-sentences EPIC_100_retrieval_test_sentence.csv \\
        --image-features clips.npy --text-features captions.npy --table nouns.parquet
    mmts eval --image-features images.npy --text-features texts.npy --relevancy relevancy.npy

What the numbers mean, ties, intervals and thirds: docs/evaluation.md.
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``eval`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "eval",
        help=help,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("data").add_argument
    add("data", nargs="?", metavar="DATA", help="images and captions, as mmts cluster reads them (docs/data.md): "
        "CSV/TSV, Parquet, JSON records, COCO or Karpathy files, tars of a WebDataset ...")  # fmt: skip
    add("--format", default="auto", choices=FORMATS, metavar="FORMAT",
        help=f"default: by what the file holds; one of {', '.join(FORMATS[1:])}")  # fmt: skip
    add("--image-column", "--csv-img-key", metavar="NAME", help="default: filepath, image or another usual name")
    add("--column", "--csv-caption-key", metavar="NAME",
        help="of the captions; default: title (CSV), desc or caption (JSON), title, caption, text or desc "
        "(Parquet)")  # fmt: skip
    add("--separator", "--csv-separator", default="\t", metavar="CHAR",
        help="of a CSV, given to pandas as in training: of several characters it is a regular expression; default: "
        "tab")  # fmt: skip
    add("--image-root", metavar="DIR", help="where relative image paths start; default: the current folder")
    add("--match-column", metavar="NAME",
        help="an image and a caption with the same value here belong together, and equal captions of one value count "
        "once; default: those of the same image")  # fmt: skip
    add("--label-column", metavar="COL[,COL2]",
        help="class of each row, for --classes and for a --table of classes; of a WebDataset: cls; with --ek100 "
        "default: noun_class")  # fmt: skip
    add("--split", default="test", help="of a Karpathy file; default: test")
    add(
        "--captions-per-image",
        type=_positive,
        metavar="N",
        help="take the first N captions of each image; default: all",
    )

    add = parser.add_argument_group("model").add_argument
    add("--model", metavar="NAME", help="OpenCLIP's --model: a name, or local-dir:FOLDER (with its weights, or with "
        "--checkpoint); default: what params.txt beside the checkpoint says")  # fmt: skip
    add("--checkpoint", metavar="FILE", help="epoch_K.pt of OpenCLIP's trainer")
    add("--pretrained", metavar="TAG", help="OpenCLIP's --pretrained, if the run had one; without --checkpoint these "
        "weights are evaluated")  # fmt: skip
    add("--batch-size", type=_positive, default=256, metavar="N", help="default: 256")
    add("--device", metavar="NAME", help="default: a GPU if there is one")

    add = parser.add_argument_group("saved features instead of a model (.npy or .safetensors)").add_argument
    add("--image-features", metavar="FILE", help="[N, D], a row per image (or clip), in the order of DATA")
    add("--text-features", metavar="FILE", help="[M, D], a row per caption")
    add("--class-features", metavar="FILE", help="[C, D], a row per line of --classes")
    add("--text-image", metavar="FILE",
        help="without DATA: the row of each caption's image, .npy or a number per line; default: row i belongs to "
        "row i")  # fmt: skip

    add = parser.add_argument_group("what is measured").add_argument
    add("--table", metavar="FILE", help="cluster table of the training set: adds head, middle and tail")
    add("--encoder", default="tfidf", metavar="NAME",
        help="finds the nearest caption of the table for one that it lacks; tfidf (default), or an encoder of mmts "
        "cluster")  # fmt: skip
    add("--relevancy", metavar="FILE", help=".npy or .csv [images, captions] in [0, 1]: mAP and nDCG instead of recall")
    add("--ek100", metavar="CSV", help="EPIC_100_retrieval_test.csv: the same, relevancy computed from its classes")
    add("--ek100-sentences", metavar="CSV", help="EPIC_100_retrieval_test_sentence.csv, for the order of text features")
    add("--classes", metavar="FILE",
        help="class names, one per line: adds zero-shot classification; the labels are these names, or line numbers "
        "from 0")  # fmt: skip
    add(
        "--templates",
        metavar="FILE",
        help="prompts, one per line, {} or {c} stands for the class; default: a photo of a {}.",
    )
    add("--average", default="features", choices=("features", "distances"),
        help="over templates: of features, as OpenCLIP does (default), or of distances, as Sun & Li do")  # fmt: skip
    add("--sub-spheres", type=_positive, metavar="K",
        help="of a model with a product sphere: use K of them, drawn with --seed (Sun & Li, App. H)")  # fmt: skip
    add("--no-retrieval", action="store_true", help="zero-shot classification only; DATA needs no captions")
    add(
        "--resamples", type=_draws, default=1000, metavar="B", help="bootstrap draws; default: 1000, 0 for no intervals"
    )
    add("--seed", type=_whole, default=0, metavar="S", help="of the bootstrap; default: 0")

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", metavar="FILE",
        help=f"default: {FILE_NAME} in the run's folder, if the checkpoint lies in its folder checkpoints, else in the "
        "current one")  # fmt: skip
    add("--force", action="store_true", help="replace an existing FILE")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Evaluate, print a table and write the numbers."""
    _check_flags(args)
    output = _output(args)
    try:
        from ..evaluation import evaluate

        asked = evaluate.Request(**{field.name: getattr(args, field.name) for field in fields(evaluate.Request)})
        result = evaluate.evaluate(asked)
    except ImportError as error:
        raise MMTSError(f"mmts eval needs {error.name}: pip install 'mmts-plugins[openclip,cluster]'") from error
    for note in result.notes:
        print(f"note: {note}", file=sys.stderr)
    evaluate.write(asked, result, output)
    print(evaluate.table(result))
    print(f"\nWritten to {output}")
    return 0


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or that would do nothing."""

    def refuse(names: str, why: str) -> None:
        refuse_given(args, names.split(), why)

    saved = args.image_features is not None
    if saved:
        refuse("model checkpoint pretrained sub_spheres", "with --image-features")
        if args.text_features is None and not args.no_retrieval:
            raise ConfigError("--image-features needs --text-features too (or --no-retrieval with --class-features)")
        if args.classes and not args.class_features:
            raise ConfigError("--classes with saved features needs --class-features, a row per class")
    else:
        refuse("text_features class_features text_image", "without --image-features")
        if args.model is None and args.checkpoint is not None:
            from ..evaluation.model import find_model

            args.model = find_model(args.checkpoint)[0]
        local = args.model is not None and args.model.startswith("local-dir:")
        if args.model is None or (args.checkpoint is None and args.pretrained is None and not local):
            raise ConfigError(
                "nothing to evaluate: give --model and --checkpoint (or --pretrained), or --image-features and "
                "--text-features; see mmts eval --help"
            )
        if args.data is None:
            raise ConfigError("no data given: mmts eval DATA --model ... --checkpoint ...; see mmts eval --help")
    if args.ek100:
        refuse("data relevancy text_image classes", "with --ek100")
        if not saved:
            raise ConfigError("--ek100 needs --image-features and --text-features: OpenCLIP does not encode videos")
    else:
        refuse("ek100_sentences", "without --ek100")
    if args.data is not None:
        refuse("text_image", "beside DATA, which says whose captions they are")
    else:
        refuse("label_column" if not args.ek100 else "", "without DATA")
    if args.relevancy:
        refuse("match_column text_image", "with --relevancy")
    if args.no_retrieval:
        refuse("relevancy ek100 text_features captions_per_image", "with --no-retrieval")
        if not args.classes:
            raise ConfigError("--no-retrieval leaves nothing to do without --classes")
    if args.classes:
        if args.data is None or args.label_column is None:
            raise ConfigError("--classes needs DATA and --label-column: which class is each image?")
    else:
        refuse("templates class_features", "without --classes")
    if args.class_features:
        refuse("templates", "with --class-features")
    if args.table and args.data is None and not args.ek100:
        raise ConfigError("--table needs DATA (or --ek100), whose captions or classes it is to be looked up by")


def _output(args: argparse.Namespace) -> Path:
    """Where to write; said before the long work, not after it, that it is impossible."""
    output = Path(args.output or _beside(args.checkpoint) or FILE_NAME)
    if output.is_dir():
        raise ConfigError(f"{output}: is a folder; -o/--output names the file to write")
    if output.exists() and not args.force:
        raise ConfigError(f"{output}: exists already; pass --force to replace it, or another -o/--output")
    check_writable(output)
    return output


def _beside(checkpoint: Optional[str]) -> Optional[Path]:
    folder = Path(checkpoint).absolute().parent if checkpoint else None
    return folder.parent / FILE_NAME if folder is not None and folder.name == "checkpoints" else None
