"""The arguments of ``mmts stability``."""

from __future__ import annotations

import argparse
import json
from typing import Any

from .._files import replacing, writing
from ..errors import MMTSError
from ..presets import presets
from . import _recipe
from ._refuse import refuse_given

_DESCRIPTION = """\
Measure how much of the estimated frequencies, and so of the temperatures, is chance.

For a recipe (DATA and the flags of mmts cluster) the estimate is made again with disjoint seeds, and once on either of
two random halves of the training samples. For finished tables of the same captions the tables are compared.
"""

_EXAMPLES = """\
examples:
  a recipe, before choosing one:
    mmts stability train.tsv --runs 20
    mmts stability train.tsv --estimator radius

  tables of the same captions: other seeds, another encoder, another k:
    mmts stability --table a.parquet b.parquet

  what mmts cluster measured when it made a table:
    mmts stability --table clusters.parquet
"""


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``stability`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "stability",
        help=help,
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    _recipe.add_input(parser)
    _recipe.add_recipe(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--table", nargs="+", metavar="TABLE", help="compare finished tables instead of measuring a recipe")
    add("--tables", dest="table", nargs="+", help=argparse.SUPPRESS)  # its name in 0.1's first days
    add("--preset", choices=tuple(presets()), default="clip-cc3m",
        help="whose shifts tell how far temperatures move; default: clip-cc3m")  # fmt: skip
    add("-o", "--output", metavar="FILE", help="write the numbers as JSON, too")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write if asked to."""
    if args.table:
        refuse_given(args, (*_recipe.INPUT, *_recipe.ENCODING, *_recipe.RECIPE, "embeddings", "tensor"), "with --table")
    else:
        args.class_counts = args.label_column = None
        _recipe.check_flags(args)
    try:
        from ..clustering import measure

        if args.table:
            measured, lines = measure.of_tables(args.table, args.preset)
        else:
            source, how, recipe = _recipe.source_of(args), _recipe.embedding_of(args), _recipe.recipe_of(args)
            measured, lines = measure.of_recipe(source, how, recipe, bool(args.keep_blank), args.preset)
    except ImportError as error:
        raise MMTSError(f"mmts stability needs {error.name or error}: pip install 'mmts-plugins[cluster]'") from error
    print("\n".join(lines))
    if args.output:
        with writing(args.output, "cannot be written (-o/--output)"), replacing(args.output) as temporary:
            temporary.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0
