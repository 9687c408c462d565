"""The arguments of ``mmts report``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ..errors import ConfigError
from ..presets import presets


def add_parser(commands: Any, help: str = "") -> argparse.ArgumentParser:
    """Register ``report`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "report",
        allow_abbrev=False,
        help=help,
        description="Writes report.html (one file, nothing fetched) and its plots as PNGs. Of cluster tables: the long "
        "tail, shifts and temperatures under a preset, the largest and smallest clusters with their telling words, "
        "duplicates, stability, a map of the captions. Of runs (folders with an mmts.yaml in or below them, or plain "
        "runs of a host to compare with): config, schedule, losses, metrics, differences, and a fragment for a model "
        "card.",
        epilog="For example: mmts report clusters.parquet --encoder sentence-transformers/all-MiniLM-L6-v2 -o report, "
        "or: mmts report logs/plain logs/mmts -o report",
    )
    add = parser.add_argument
    add(
        "inputs",
        nargs="+",
        metavar="INPUT",
        help="cluster tables (Parquet, class_id,count CSV, annotations in EK-100's form), or folders of runs",
    )
    add("-o", "--output", required=True, type=Path, metavar="DIR", help="folder to write")
    add("--force", action="store_true", help="replace a report in DIR")
    add = parser.add_argument_group("tables").add_argument
    add("--preset", metavar="NAME",
        help=f"shifts and amplitude to show: {', '.join(presets())}; default: the first for temperatures, of classes "
        "the first for margins")  # fmt: skip
    add("--distribution", metavar="CLASSES", help="of annotations that hold several kinds of classes, only these")
    add("--embeddings", metavar="FILE", help=".npy or .safetensors, a row for each key of the table, for the map")
    add("--encoder", metavar="NAME", help="embed a sample of the captions for the map, as in mmts cluster")
    add("--projection", choices=("tsne", "umap"), default="tsne", help="of the map (default: tsne)")
    add("--sample", type=int, default=2000, metavar="N", help="captions on the map (default: 2000)")
    add("--seed", type=int, default=0, metavar="S", help="of the sample and the map (default: 0)")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Write the page."""
    from ..report import write
    from ..report.plots import check_matplotlib, own_style
    from ..report.table import Options

    check_matplotlib()
    write.check_folder(args.output, args.force)
    if args.sample < 1 or not 0 <= args.seed < 2**32:
        raise ConfigError("--sample must be at least 1, --seed at least 0 and below 2^32")
    options = Options(
        args.preset,
        args.embeddings,
        args.encoder,
        args.projection,
        args.sample,
        args.seed,
        args.distribution,
    )
    with own_style():
        written = write.report(args.inputs, args.output, options)
    print("\n".join(f"Written to {path}" for path in written))
    return 0
