"""The sub-command ``mmts cluster``. Heavy packages are imported when it runs, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConfigError, MMTSError

if TYPE_CHECKING:
    from ..clusters import ClusterTable
    from .sources import Source

_DESCRIPTION = """\
Make the cluster table that MM-TS training reads: which caption belongs to which cluster, and how common it is.

The captions of the training set are embedded once and clustered with K-Means. A caption in a large cluster gets a
high temperature in training, one in a small cluster a low one. Where the data set has class labels, or you have
embeddings, the table is made from those instead.
"""

_EXAMPLES = """\
examples:
  an OpenCLIP CSV (tab, columns filepath and title) and an OpenCLIP tar set; quote the braces:
    mmts cluster train.tsv -o clusters.parquet
    mmts cluster 'cc3m/{00000..00331}.tar' -o clusters.parquet

  comma-separated, another caption column; sizes averaged over 3 K-Means runs (steadier on small sets):
    mmts cluster train.csv --separator , --column caption --runs 3 -o clusters.parquet

  CC3M as published (a TSV without a header: caption, URL), with the paper's encoder for it:
    mmts cluster Train_GCC-training.tsv --no-header --column 0 --encoder hf:distilbert-base-uncased -o clusters.parquet

  VAST annotations (field desc or caption), on a machine without a network or a model:
    mmts cluster descs_cap_train.json --encoder tfidf -o clusters.parquet

  embeddings you have, one row per caption of the file:
    mmts cluster captions.txt --embeddings captions.npy -o clusters.parquet

  class labels instead of clusters: published counts, labels counted per class, or per caption:
    mmts cluster --class-counts ek100_noun_freq.csv -o nouns.parquet
    mmts cluster EPIC_100_train.csv --separator , --label-column verb_class,noun_class -o actions.parquet
    mmts cluster EPIC_100_train.csv --separator , --label-column noun_class --column narration -o nouns.parquet
"""

# Also tells a flag that was given from one that was not: giving one that would do nothing is an error.
_DEFAULTS: dict[str, Any] = {
    "encoder": "sentence-transformers/all-MiniLM-L6-v2",
    "batch_size": 256,
    "device": None,
    "tensor": None,
    "clusters": 200,
    "runs": 1,
    "seed": 0,
    "threads": 2,
}
_INPUT = ("data", "train_data", "column", "label_column")
_ENCODING = ("encoder", "batch_size", "device")
_KMEANS = ("clusters", "runs", "seed", "threads")


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``cluster`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "cluster",
        help="make the cluster table from captions, labels or embeddings (once, before training)",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument_group("input").add_argument
    add("data", nargs="?", metavar="DATA",
        help="file with the captions of the training set; for WebDataset a path, a quoted brace pattern or several "
        "joined with '::', as OpenCLIP's --train-data")  # fmt: skip
    add("--train-data", metavar="DATA", help="the same, under OpenCLIP's name")
    add("--format", "--dataset-type", default="auto", choices=("auto", "csv", "text", "json", "parquet", "webdataset"),
        help="default: by the extension (.csv .tsv .txt .json .jsonl .parquet .tar)")  # fmt: skip
    add("--column", "--csv-caption-key", metavar="NAME",
        help="column of the captions; default: title (CSV), desc or caption (JSON), "
        "title, caption, text or desc (Parquet)")  # fmt: skip
    add("--separator", "--csv-separator", default="\\t", metavar="CHAR",
        help="of a CSV; default: tab, also for .csv, as in OpenCLIP")  # fmt: skip
    add("--no-header", action="store_true", help="the CSV has no header: --column 0 is its first column")

    add = parser.add_argument_group("class labels instead of clustering").add_argument
    add("--class-counts", metavar="FILE", help="CSV class_id,count: a table of classes, without DATA")
    add("--label-column", metavar="COL[,COL2]",
        help="count the classes in this column of DATA (several are joined: 6_0); alone it gives a table of classes, "
        "with --column a table of captions")  # fmt: skip

    add = parser.add_argument_group("embeddings").add_argument
    add("--encoder", metavar="NAME",
        help=f"default: {_DEFAULTS['encoder']}; a sentence-transformers model by name or folder, hf:NAME for any "
        "Hugging Face encoder (mean pooling), or tfidf, which needs no model")  # fmt: skip
    add("--batch-size", type=_positive, metavar="N", help=f"of the encoder; default: {_DEFAULTS['batch_size']}")
    add("--device", metavar="NAME", help="of the encoder, such as cuda:0 or cpu; default: a GPU if there is one")
    add("--embeddings", metavar="FILE",
        help=".npy or .safetensors [samples, dimensions] to cluster instead, rows in the order of DATA")  # fmt: skip
    add("--tensor", metavar="NAME", help="which tensor of a .safetensors file that holds several")

    add = parser.add_argument_group("K-Means").add_argument
    add("-k", "--clusters", type=_positive, metavar="K", help=f"default: {_DEFAULTS['clusters']}, as the paper")
    add("--runs", type=_positive, metavar="R",
        help=f"average cluster sizes over R seeds; default: {_DEFAULTS['runs']}, as the paper; 3 or more are steadier "
        "on sets under 100,000 captions")  # fmt: skip
    add("--seed", type=int, metavar="S", help=f"of the first run; default: {_DEFAULTS['seed']}")
    add("--threads", type=_positive, metavar="N",
        help=f"default: {_DEFAULTS['threads']}; more are faster, but then a seed may not repeat exactly")  # fmt: skip

    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="FILE", help="the table (Parquet)")
    add("--force", action="store_true", help="replace an existing FILE")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Make, write and describe the table."""
    _check_flags(args)
    _check_output(args.output, args.force)
    given = {name: value for name in _DEFAULTS if (value := getattr(args, name)) is not None}
    options = argparse.Namespace(**{**vars(args), **_DEFAULTS, **given})
    try:
        table, notes = _make(options)
    except ImportError as error:
        raise MMTSError(f"mmts cluster needs {error.name}: pip install 'mmts-plugins[cluster]'") from error
    for note in notes:
        _say(f"warning: {note}")
    table.save(args.output)

    from .summary import summarise

    print(summarise(table, args.output))
    return 0


def _make(args: argparse.Namespace) -> tuple[ClusterTable, list[str]]:
    from . import build
    from .sources import Source, read_class_counts, read_samples

    if args.class_counts:
        ids, count, notes = read_class_counts(args.class_counts)
        return build.class_table(ids, count, _info("class counts", args.class_counts)), notes
    separator = args.separator.replace("\\t", "\t")
    source = Source(args.train_data or args.data, args.format, args.column, separator, not args.no_header)
    if args.label_column:
        return _from_labels(args, source)
    _say(f"reading {source.data}")
    samples = read_samples(source)
    table = _from_clusters(args, samples.captions, {"source": _name(source.data), "column": samples.column})
    return table, samples.notes


def _from_labels(args: argparse.Namespace, source: Source) -> tuple[ClusterTable, list[str]]:
    import numpy as np

    from . import build
    from .sources import read_samples

    samples = read_samples(source, args.label_column.split(","), captions=args.column is not None)
    info = _info("labels", source.data, column=samples.column, label_column=args.label_column)
    if args.column is None:
        ids, rows = build.distinct(samples.labels)
        return build.class_table(ids, np.bincount(rows), info), samples.notes
    table, several = build.labelled_table(samples.captions, samples.labels, info)
    if several:
        samples.notes.append(f"{source.data}: {several} captions occur under several labels; each takes its commonest")
    return table, samples.notes


def _from_clusters(args: argparse.Namespace, captions: Sequence[str], about: dict[str, Any]) -> ClusterTable:
    import numpy as np

    from . import build, encoders, kmeans
    from .sources import check_finite, read_embeddings

    keys, rows = build.distinct(captions)
    count = np.bincount(rows)
    if args.clusters > len(keys):
        raise ConfigError(
            f"{len(keys)} distinct captions cannot make {args.clusters} clusters; lower -k/--clusters (a tenth of the "
            "captions or less)"
        )
    if args.embeddings:
        points = read_embeddings(args.embeddings, args.tensor)
        if len(points) != len(captions):
            raise ConfigError(
                f"{args.embeddings}: {len(points)} rows for {len(captions)} captions of {about['source']}; "
                "--embeddings needs one row per caption, repeated ones too, in the order of the file"
            )
        weight, encoder = np.ones(len(points)), f"embeddings {_name(args.embeddings)}"
        packages: tuple[str, ...] = ()
    else:
        _say(f"embedding {len(keys):,} distinct captions with {args.encoder}")
        points = encoders.encode(args.encoder, keys, args.batch_size, args.device, args.seed)
        check_finite(points, f"the embeddings of {args.encoder}")
        weight, encoder = count.astype(float), encoders.public_name(args.encoder)
        packages = encoders.packages(args.encoder)
        rows = np.arange(len(keys))
    _say(f"clustering {len(points):,} embeddings of {points.shape[1]} dimensions into {args.clusters} clusters")
    clustering = kmeans.cluster(points, weight, args.clusters, args.runs, args.seed, args.threads)
    info = _info("k-means", packages=("scikit-learn", *packages), k=args.clusters, encoder=encoder, seed=args.seed,
                 runs=args.runs, threads=args.threads, unique=len(keys), duplicates=len(captions) - len(keys),
                 **about)  # fmt: skip
    return build.clustered_table(keys, rows, count, clustering, info)


def _check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or that would do nothing."""

    def refuse(names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(args, name) is not None:
                flag = "DATA" if name == "data" else "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} has no effect {why}; drop one of the two")

    if args.class_counts:
        refuse((*_INPUT, "embeddings", "tensor", *_ENCODING, *_KMEANS), "with --class-counts")
        return
    if args.data is not None:
        refuse(("train_data",), "beside DATA")
    elif args.train_data is None:
        raise ConfigError("no captions given: mmts cluster DATA -o FILE (or --class-counts); see mmts cluster --help")
    if args.label_column:
        refuse(("embeddings", "tensor", *_ENCODING, *_KMEANS), "with --label-column, which makes no clusters")
    elif args.embeddings:
        refuse(_ENCODING, "with --embeddings")
    else:
        refuse(("tensor",), "without --embeddings")


def _check_output(output: str, force: bool) -> None:
    """Say before the long work, not after it, that the table cannot be written."""
    target = Path(output)
    if target.is_dir():
        raise ConfigError(f"{output}: is a folder; -o/--output names the file of the table")
    if target.exists() and not force:
        raise ConfigError(f"{output}: exists already; pass --force to replace it, or another -o/--output")
    folder = target.absolute().parent
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir() or not os.access(folder, os.W_OK):
        raise ConfigError(f"{output}: cannot be written, {folder} is not a writable folder (-o/--output)")


def _info(method: str, source: str = "", packages: Sequence[str] = (), **more: Any) -> dict[str, Any]:
    versions = {name: metadata.version(name) for name in ("numpy", *packages)}
    return {
        "method": method,
        "source": _name(source),
        **more,
        "versions": {"mmts-plugins": __version__, "python": sys.version.split()[0], **versions},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _name(data: str) -> str:
    """The file's name alone: folders, commands and signed URLs are nobody's business in a table that is shared."""
    return data.rsplit("/", 1)[-1].partition("?")[0]


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above zero")
    return value


def _say(line: str) -> None:
    print(line, file=sys.stderr)
