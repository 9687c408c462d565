"""The arguments of ``mmts cluster``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from .._files import check_writable
from ..errors import ConfigError, MMTSError
from . import _recipe
from ._numbers import positive

_DESCRIPTION = """\
Make the cluster table that MM-TS training reads: which caption belongs to which cluster, and how common it is.

The captions of the training set are embedded once and clustered with K-Means. A caption in a large cluster gets a
high temperature in training, one in a small cluster a low one. Where the data set has class labels, or you have
embeddings, the table is made from those instead. Embeddings are kept in $MMTS_CACHE: another k or seed embeds nothing.
"""

_EXAMPLES = """\
examples:
  a CSV (tab, columns filepath and title) and the tars of a WebDataset; quote the braces:
    mmts cluster train.tsv -o clusters.parquet
    mmts cluster 'cc3m/{00000..00331}.tar' -o clusters.parquet

  comma-separated, another caption column; one K-Means run, as in the paper, instead of the mean over several:
    mmts cluster train.csv --separator , --column caption --runs 1 -o clusters.parquet

  CC3M as published (a TSV without a header), with the paper's encoder for it:
    mmts cluster Train_GCC-training.tsv --encoder hf:distilbert-base-uncased -o clusters.parquet

  COCO, Karpathy's splits, anything on the Hugging Face hub, any place of a JSON file; see docs/data.md:
    mmts cluster captions_train2017.json -o clusters.parquet
    mmts cluster dataset_flickr30k.json --split train -o clusters.parquet
    mmts cluster hf://datasets/OWNER/NAME/data --column text -o clusters.parquet
    mmts cluster annotations.json --column 'items[].captions[]' -o clusters.parquet

  annotations (field desc or caption), on a machine without a network or a model:
    mmts cluster descs_cap_train.json --encoder tfidf -o clusters.parquet

  a CLIP text tower; embeddings you have, one row per caption of the file (a .npy file, or a folder of them):
    mmts cluster train.tsv --encoder openclip:ViT-B-32/laion2b_s34b_b79k -o clusters.parquet
    mmts cluster captions.txt --embeddings captions.npy -o clusters.parquet

  class labels instead of clusters: published counts, labels counted per class, or per caption:
    mmts cluster --class-counts ek100_noun_freq.csv -o nouns.parquet
    mmts cluster EPIC_100_train.csv --separator , --label-column verb_class,noun_class -o actions.parquet
    mmts cluster EPIC_100_train.csv --separator , --label-column noun_class --column narration -o nouns.parquet
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``cluster`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "cluster",
        help=help,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _recipe.add_input(parser)
    add = parser.add_argument_group("class labels instead of clustering").add_argument
    add("--class-counts", metavar="FILE", help="CSV class_id,count: a table of classes, without DATA")
    add("--label-column", metavar="COL[,COL2]",
        help="count the classes in this column of DATA (several are joined: 6_0); alone it gives a table of classes, "
        "with --column a table of captions")  # fmt: skip
    _recipe.add_recipe(parser)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="FILE", help="the table (Parquet)")
    add("--force", action="store_true", help="replace an existing FILE")

    add = parser.add_argument_group("scale").add_argument
    add("--engine", choices=("local", "ray"), default="local",
        help="ray: Parquet or WebDataset of any size on Ray Data; -o names a folder, and a killed run goes on where it "
        "was; see docs/scale.md")  # fmt: skip
    add("--workers", type=positive, metavar="N", help="processes of --engine ray; default: all CPUs")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make, write and describe the table."""
    _recipe.check_flags(args)
    _check_output(args.output, args.force, folder=args.engine == "ray")
    try:
        from ..clustering import make

        if args.engine == "ray":
            how, recipe = _recipe.embedding_of(args), _recipe.recipe_of(args)
            print(make.on_ray(_recipe.source_of(args), how, recipe, bool(args.keep_blank), args.output, args.workers))
            return 0
        if args.class_counts:
            table = make.from_counts(args.class_counts)
        elif args.label_column:
            table = make.from_labels(_recipe.source_of(args), args.label_column)
        else:
            how, recipe = _recipe.embedding_of(args), _recipe.recipe_of(args)
            table = make.from_captions(_recipe.source_of(args), how, recipe, bool(args.keep_blank))
    except ImportError as error:
        raise MMTSError(f"mmts cluster needs {error.name or error}: pip install 'mmts-plugins[cluster]'") from error
    table.save(args.output)

    from ..clustering.summary import summarise

    print(summarise(table, args.output))
    return 0


def _check_output(output: str, force: bool, folder: bool) -> None:
    """Say before the long work, not after it, that the table cannot be written."""
    target = Path(output)
    if folder and target.is_dir() and not any(target.glob("part-*.parquet")) and any(target.iterdir()):
        raise ConfigError(f"{output}: a folder that is no cluster table; -o/--output names the folder of the table")
    if target.is_dir() and not folder:
        raise ConfigError(f"{output}: is a folder; -o/--output names the file of the table")
    if target.exists() and not force:
        raise ConfigError(f"{output}: exists already; pass --force to replace it, or another -o/--output")
    check_writable(output)
