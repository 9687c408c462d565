"""The sub-command ``mmts cluster``. Heavy packages are imported when it runs, so that ``--help`` stays fast."""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from .. import __version__
from .._files import check_writable
from ..errors import ConfigError, MMTSError, one_line, shown

if TYPE_CHECKING:
    import numpy as np

    from ..clusters import ClusterTable
    from ..data.rows import Rows
    from ..data.source import Source
    from .estimate import Recipe

DEFAULT_RUNS = 20

_DESCRIPTION = """\
Make the cluster table that MM-TS training reads: which caption belongs to which cluster, and how common it is.

The captions of the training set are embedded once and clustered with K-Means. A caption in a large cluster gets a
high temperature in training, one in a small cluster a low one. Where the data set has class labels, or you have
embeddings, the table is made from those instead. Embeddings are kept in $MMTS_CACHE: another k or seed embeds nothing.
"""

_EXAMPLES = """\
examples:
  an OpenCLIP CSV (tab, columns filepath and title) and an OpenCLIP tar set; quote the braces:
    mmts cluster train.tsv -o clusters.parquet
    mmts cluster 'cc3m/{00000..00331}.tar' -o clusters.parquet

  comma-separated, another caption column; one K-Means run, as in the paper, instead of the mean over several:
    mmts cluster train.csv --separator , --column caption --runs 1 -o clusters.parquet

  CC3M as published (a TSV without a header: caption, URL), with the paper's encoder for it:
    mmts cluster Train_GCC-training.tsv --no-header --column 0 --encoder hf:distilbert-base-uncased -o clusters.parquet

  VAST annotations (field desc or caption), on a machine without a network or a model:
    mmts cluster descs_cap_train.json --encoder tfidf -o clusters.parquet

  an OpenCLIP text tower; embeddings you have, one row per caption of the file (a .npy file, or a folder of them):
    mmts cluster train.tsv --encoder openclip:ViT-B-32/laion2b_s34b_b79k -o clusters.parquet
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
    "no_cache": False,
    "images": None,
    "image_root": None,
    "frames": 8,
    "tensor": None,
    "estimator": "kmeans",
    "clusters": 200,
    "runs": DEFAULT_RUNS,
    "algorithm": "sample",
    "fit_rows": 256,
    "radius": None,
    "neighbours": 50,
    "references": 32_768,
    "seed": 0,
    "threads": 2,
}
INPUT = ("data", "train_data", "column", "label_column", "keep_blank")
ENCODING = ("encoder", "batch_size", "no_cache", "images", "image_root", "frames")
_MOST = 2**31 - 1  # of a number given by a flag: seeds beyond it are not all packages'
_DENSITY = ("radius", "neighbours", "references")
RECIPE = ("estimator", "clusters", "runs", "seed", "threads", "algorithm", "fit_rows", *_DENSITY)


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
    add_input(parser)
    add = parser.add_argument_group("class labels instead of clustering").add_argument
    add("--class-counts", metavar="FILE", help="CSV class_id,count: a table of classes, without DATA")
    add("--label-column", metavar="COL[,COL2]",
        help="count the classes in this column of DATA (several are joined: 6_0); alone it gives a table of classes, "
        "with --column a table of captions")  # fmt: skip
    add_recipe(parser)
    add = parser.add_argument_group("output").add_argument
    add("-o", "--output", required=True, metavar="FILE", help="the table (Parquet)")
    add("--force", action="store_true", help="replace an existing FILE")

    add = parser.add_argument_group("scale").add_argument
    add("--engine", choices=("local", "ray"), default="local",
        help="ray: Parquet or WebDataset of any size on Ray Data; -o names a folder, and a killed run goes on where it "
        "was; see docs/scale.md")  # fmt: skip
    add("--workers", type=_positive, metavar="N", help="processes of --engine ray; default: all CPUs")
    parser.set_defaults(run=run)
    return parser


def add_input(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the captions are."""
    add = parser.add_argument_group("input").add_argument
    add("data", nargs="?", metavar="DATA",
        help="file with the captions of the training set; for Parquet also a folder or a quoted glob pattern, for "
        "WebDataset a path, a quoted brace pattern or several joined with '::' (OpenCLIP's --train-data)")  # fmt: skip
    add("--train-data", metavar="DATA", help="the same, under OpenCLIP's name")
    add("--format", "--dataset-type", default="auto", choices=("auto", "csv", "text", "json", "parquet", "webdataset"),
        help="default: by the extension (.csv .tsv .txt .json .jsonl .parquet .tar)")  # fmt: skip
    add("--column", "--csv-caption-key", metavar="NAME",
        help="column of the captions; default: title (CSV), desc or caption (JSON), "
        "title, caption, text or desc (Parquet); of WebDataset the suffix of the captions; default: txt")  # fmt: skip
    add("--separator", "--csv-separator", default="\t", metavar="CHAR",
        help="of a CSV, handed to pandas as OpenCLIP does; default: tab, also for .csv; of several characters (also "
        "'\\t' as two) it is a regular expression, and quotes stay in the captions")  # fmt: skip
    add("--no-header", action="store_true", help="the CSV has no header: --column 0 is its first column")
    add("--keep-blank", action="store_true", default=None,
        help="keep samples whose caption is blank, as one caption, instead of stopping")  # fmt: skip


def add_recipe(parser: argparse.ArgumentParser) -> None:
    """The flags that say how captions are embedded and how their frequency is estimated."""
    add = parser.add_argument_group("embeddings").add_argument
    add("--encoder", metavar="NAME",
        help=f"default: {_DEFAULTS['encoder']}; a sentence-transformers model by name or folder, hf:NAME for any "
        "Hugging Face encoder (mean pooling), openclip:MODEL/PRETRAINED for an OpenCLIP text tower, hashing (hashed "
        "words, no model, very fast), or tfidf (no model)")  # fmt: skip
    add("--batch-size", type=_positive, metavar="N", help=f"of the encoder; default: {_DEFAULTS['batch_size']}")
    add("--device", metavar="NAME", help="such as cuda:0 or cpu; default: a GPU if there is one")
    add("--no-cache", action="store_true", default=None, help="neither read nor keep embeddings in $MMTS_CACHE")
    add("--images", metavar="COLUMN",
        help="embed the images that this column of DATA names instead of the captions (a folder: the frames of a "
        "video), with --encoder timm:MODEL or openclip:MODEL/PRETRAINED; the table stays keyed by caption")  # fmt: skip
    add(
        "--image-root", metavar="FOLDER", help="what the paths of --images are relative to; default: the working folder"
    )
    add("--frames", type=_positive, metavar="N", help=f"of a folder at most N; default: {_DEFAULTS['frames']}")
    add("--embeddings", metavar="FILE",
        help=".npy or .safetensors [samples, dimensions] to use instead, or a folder of .npy parts in the order of "
        "their names; rows in the order of DATA")  # fmt: skip
    add("--tensor", metavar="NAME", help="which tensor of a .safetensors file that holds several")

    add = parser.add_argument_group("estimating how common a caption is").add_argument
    add("--estimator", choices=("kmeans", "radius", "knn"),
        help="kmeans: the size of the caption's cluster (default, as the paper); radius: samples within a cosine "
        "radius; knn: nearness of the nearest samples")  # fmt: skip
    add("-k", "--clusters", type=_positive, metavar="K", help=f"default: {_DEFAULTS['clusters']}, as the paper")
    add("--runs", type=_runs, metavar="R",
        help=f"average over R seeds; default: {_DEFAULTS['runs']} (the paper: 1)")  # fmt: skip
    add("--seed", type=_seed, metavar="S", help=f"of the first run; default: {_DEFAULTS['seed']}")
    add("--algorithm", choices=("sample", "lloyd", "sklearn", "faiss"),
        help="of K-Means; sample (default): fitted on a weighted sample, then one pass over all; lloyd: all captions "
        "in every iteration; sklearn, faiss: those packages")  # fmt: skip
    add("--fit-rows", type=_positive, metavar="N",
        help=f"captions per cluster in the sample; default: {_DEFAULTS['fit_rows']}")  # fmt: skip
    add("--radius", type=float, metavar="COS",
        help="of --estimator radius; default: such that there are samples/K neighbours on average")  # fmt: skip
    add("--neighbours", type=_positive, metavar="N", help=f"of --estimator knn; default: {_DEFAULTS['neighbours']}")
    add("--references", type=_positive, metavar="N",
        help=f"a density compares with at most N captions; default: {_DEFAULTS['references']}")  # fmt: skip
    add("--threads", type=_threads, metavar="N",
        help=f"default: {_DEFAULTS['threads']}; another number may round otherwise and give another table")  # fmt: skip


def run(args: argparse.Namespace) -> int:
    """Make, write and describe the table."""
    check_flags(args)
    _check_output(args.output, args.force, folder=args.engine == "ray")
    try:
        if args.engine == "ray":
            return _run_on_ray(with_defaults(args))
        table = _make(with_defaults(args))
    except ImportError as error:
        raise MMTSError(f"mmts cluster needs {error.name or error}: pip install 'mmts-plugins[cluster]'") from error
    table.save(args.output)

    from .summary import summarise

    print(summarise(table, args.output))
    return 0


def _run_on_ray(args: argparse.Namespace) -> int:
    from ..data import encoders
    from ..data.captions_parquet import failed_downloads
    from . import ray_engine
    from .stages import Job

    source, recipe = source_of(args), recipe_of(args)
    if source.resolved_format() not in ("webdataset", "parquet"):
        warn([f"{source.data}: only Parquet and WebDataset are read in parallel and in bounded memory"])
    failed = failed_downloads(source)
    warn([failed] if failed else [])
    job = Job(f"{args.output.rstrip('/')}.work", source, args.encoder, args.batch_size, args.device, not args.no_cache,
              bool(args.keep_blank), recipe)  # fmt: skip
    info = _info("k-means", source.data, packages=("ray", "torch", *encoders.packages(args.encoder)),
                 encoder=encoders.public_name(args.encoder), column=args.column, **recipe.record())  # fmt: skip
    measured = ray_engine.build(job, args.output, info, args.workers)
    print(f"stability: {measured['verdict']}\nWritten to {args.output}, a folder of Parquet parts.")
    return 0


def with_defaults(args: argparse.Namespace) -> argparse.Namespace:
    """Every flag that was not given at its default."""
    given = {name: value for name in _DEFAULTS if (value := getattr(args, name)) is not None}
    return argparse.Namespace(**{**vars(args), **_DEFAULTS, **given})


def _make(args: argparse.Namespace) -> ClusterTable:
    from ..data.captions import read_samples, refuse_blank
    from ..data.classes import class_table, read_class_counts

    if args.class_counts:
        if not Path(args.class_counts).exists():
            raise MMTSError(f"{args.class_counts}: no such file (--class-counts)")
        ids, count, notes = read_class_counts(args.class_counts)
        warn(notes)
        return class_table(ids, count, _info("class counts", args.class_counts))
    source = source_of(args)
    if args.label_column:
        return _from_labels(args, source)
    _say(f"reading {source.data}")
    samples = read_samples(source, [args.images] if args.images else ())
    refuse_blank(samples.captions, source.data, args.keep_blank)
    warn(samples.notes)
    about = {"source": _name(source.data), "column": samples.column}
    return _from_clusters(args, samples.captions, about, samples.labels)


def source_of(args: argparse.Namespace) -> Source:
    """What the input flags name."""
    from ..data.source import Source

    return Source(args.train_data or args.data, args.format, args.column, args.separator, not args.no_header)


def _from_labels(args: argparse.Namespace, source: Source) -> ClusterTable:
    import numpy as np

    from ..data.captions import read_samples
    from ..data.classes import class_table
    from . import build

    samples = read_samples(source, args.label_column.split(","), captions=args.column is not None)
    warn(samples.notes)
    info = _info("labels", source.data, column=samples.column, label_column=args.label_column)
    if args.column is None:
        ids, rows = build.distinct(samples.labels)
        return class_table(ids, np.bincount(rows), info)
    table, several = build.labelled_table(samples.captions, samples.labels, info)
    if several:
        warn([f"{source.data}: {several} captions occur under several labels; each takes its commonest"])
    return table


@dataclass(frozen=True)
class Prepared:
    """Captions, embedded: what every estimate starts from.

    Attributes:
        keys: ``[M]`` the distinct captions.
        count: ``[M]`` int64, how many samples each has.
        points: ``[n, d]`` one row per distinct caption, or per sample where embeddings were given.
        rows: ``[n]`` the key of each row (with ``point``: of each sample).
        weight: ``[n]`` float64, samples per row.
        hashes: ``[n]`` uint64 by which samples of rows are drawn.
        encoder: as a table names it.
        packages: the distributions whose versions matter.
        point: ``[samples]`` the row of each sample where rows are images; ``None``: a row belongs to one key.
    """

    keys: list[str]
    count: np.ndarray
    points: Rows
    rows: np.ndarray
    weight: np.ndarray
    hashes: np.ndarray
    encoder: str
    packages: tuple[str, ...]
    point: Optional[np.ndarray] = None


def prepare(args: argparse.Namespace, captions: Sequence[str], source: str, images: Sequence[str] = ()) -> Prepared:
    """Embed what the flags say, or read the embeddings that they name."""
    import numpy as np

    from ..data import cache, encoders
    from ..data.embeddings import read_embedding_parts
    from ..data.rows import Rows
    from . import build
    from .sampling import caption_hashes

    keys, rows = build.distinct(captions)
    count = np.bincount(rows)
    if args.clusters > len(keys):
        raise ConfigError(
            f"{len(keys)} distinct captions cannot make {args.clusters} clusters; lower -k/--clusters (a tenth of the "
            "captions or less)"
        )
    if args.embeddings:
        points = read_embedding_parts(args.embeddings, args.tensor)
        if len(points) != len(captions):
            raise ConfigError(
                f"{args.embeddings}: {len(points)} rows for {len(captions)} captions of {source}; "
                "--embeddings needs one row per caption, repeated ones too, in the order of the file"
            )
        return Prepared(keys, count, points, rows, np.ones(len(points)), np.arange(len(points), dtype=np.uint64),
                        f"embeddings {_name(args.embeddings)}", ())  # fmt: skip
    if images:
        return _prepare_images(args, keys, rows, count, images, source)
    _say(f"embedding {len(keys):,} distinct captions with {args.encoder}")
    if args.encoder == encoders.TFIDF:
        points = Rows(encoders.tfidf(keys, args.seed))
    else:
        encoder = encoders.TextEncoder(args.encoder, args.batch_size, args.device)
        identity = None if args.no_cache else encoder.identity()
        points = cache.embed(encoder.encode, identity, keys, f"--encoder {args.encoder}")
    return Prepared(keys, count, points, np.arange(len(keys)), count.astype(float), caption_hashes(keys),
                    encoders.public_name(args.encoder), encoders.packages(args.encoder))  # fmt: skip


def _prepare_images(
    args: argparse.Namespace, keys: list[str], rows: np.ndarray, count: np.ndarray, images: Sequence[str], source: str
) -> Prepared:
    import numpy as np

    from ..data import cache
    from ..data.encoders import public_name
    from ..data.images import ImageEncoder, stamped
    from . import build
    from .sampling import caption_hashes

    encoder = ImageEncoder(args.encoder, args.frames, min(args.batch_size, 64), args.device)
    paths, point = build.distinct(images)
    stamps = stamped(paths, args.image_root, source)
    _say(f"embedding {len(paths):,} distinct images with {args.encoder}")
    identity = None if args.no_cache else encoder.identity()
    points = cache.embed(encoder.encode, identity, stamps, f"--encoder {args.encoder}")
    packages = ("timm", "torch") if args.encoder.startswith("timm:") else ("open_clip_torch", "torch")
    return Prepared(keys, count, points, rows, np.bincount(point).astype(float), caption_hashes(paths),
                    f"images {public_name(args.encoder)}", packages, point)  # fmt: skip


def recipe_of(args: argparse.Namespace) -> Recipe:
    """What the flags of :func:`add_recipe` say."""
    from .estimate import Recipe

    names = [field.name for field in fields(Recipe)]
    return Recipe(**{name: getattr(args, name) for name in names})


def _from_clusters(
    args: argparse.Namespace, captions: Sequence[str], about: dict[str, Any], images: Sequence[str]
) -> ClusterTable:
    from . import build, stability
    from .estimate import estimate, resolve

    data = prepare(args, captions, about["source"], images)
    recipe = resolve(data.points, recipe_of(args))
    _say(f"{recipe.describe()}, over {len(data.points):,} embeddings of {data.points.width} dimensions")
    done = estimate(data.points, data.weight, recipe, data.hashes)
    backend = {"sklearn": ("scikit-learn",), "faiss": ("faiss-cpu",)}.get(recipe.algorithm, ("torch",))
    info = _info("k-means" if recipe.estimator == "kmeans" else "density",
                 packages=dict.fromkeys((*backend, *data.packages)), encoder=data.encoder, **recipe.record(),
                 unique=len(data.keys), duplicates=len(captions) - len(data.keys),
                 stability=stability.of_runs(done, data.weight, recipe), **about)  # fmt: skip
    cluster, frequency = done.cluster, done.frequency
    if data.point is not None:
        cluster, frequency = cluster[data.point], frequency[data.point]
    return build.clustered_table(data.keys, data.rows, data.count, cluster, frequency, info)


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or that would do nothing."""

    def refuse(names: Sequence[str], why: str) -> None:
        for name in names:
            if getattr(args, name) is not None:
                flag = "DATA" if name == "data" else "--" + name.replace("_", "-")
                raise ConfigError(f"{flag} has no effect {why}; drop one of the two")

    if args.class_counts:
        refuse((*INPUT, "embeddings", "tensor", "device", *ENCODING, *RECIPE), "with --class-counts")
        return
    if args.data is not None:
        refuse(("train_data",), "beside DATA")
    elif args.train_data is None:
        raise ConfigError("no captions given: mmts cluster DATA -o FILE (or --class-counts); see mmts cluster --help")
    if args.label_column:
        refuse(("embeddings", "tensor", "device", "keep_blank", *ENCODING, *RECIPE),
               "with --label-column, which makes no clusters")  # fmt: skip
        return
    if args.embeddings:
        refuse(ENCODING, "with --embeddings")
    else:
        refuse(("tensor",), "without --embeddings")
    if args.images is None:
        refuse(("image_root", "frames"), "without --images")
    elif args.encoder is None:
        raise ConfigError("--images needs an encoder of images: --encoder timm:MODEL or openclip:MODEL/PRETRAINED")
    ray = getattr(args, "engine", "local") == "ray"
    if ray and (args.embeddings or args.images or args.encoder == "tfidf" or args.algorithm not in (None, "sample")):
        raise ConfigError(
            "--engine ray embeds captions one by one and fits on a sample: not with --embeddings, --images, "
            "--encoder tfidf or another --algorithm"
        )
    if ray and args.estimator not in (None, "kmeans"):
        raise ConfigError(f"--engine ray has --estimator kmeans only, not {args.estimator}")
    if not ray and getattr(args, "workers", None) is not None:
        raise ConfigError("--workers has no effect without --engine ray; drop one of the two")
    estimator = args.estimator or _DEFAULTS["estimator"]
    wanted = {"kmeans": (), "radius": ("radius", "references"), "knn": ("neighbours", "references")}[estimator]
    refuse([name for name in _DENSITY if name not in wanted], f"with --estimator {estimator}")
    if args.radius is not None and not -1 < args.radius <= 1:
        raise ConfigError(f"--radius {args.radius} is not a cosine similarity: above -1, at most 1")


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


def _info(method: str, source: str = "", packages: Iterable[str] = (), **more: Any) -> dict[str, Any]:
    versions = {name: _version(name) for name in ("numpy", *packages)}
    return {
        "method": method,
        "source": _name(source),
        **more,
        "versions": {"mmts-plugins": __version__, "python": sys.version.split()[0], **versions},
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }


def _version(package: str) -> Optional[str]:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:  # faiss-gpu for faiss-cpu, or a checkout on the path
        return None


def _name(data: str) -> str:
    """The file's name alone: parents, commands and signed URLs are nobody's business in a table that is shared."""
    return data.rsplit("/", 1)[-1].partition("?")[0]


def _whole(least: int, most: int) -> Callable[[str], int]:
    def number(text: str) -> int:
        value = int(text) if re.fullmatch("[0-9]{1,10}", text) else -1
        if not least <= value <= most:
            raise argparse.ArgumentTypeError(f"{shown(text)} is not a whole number from {least} to {most}")
        return value

    return number


_positive, _seed = _whole(1, _MOST), _whole(0, _MOST)
_runs, _threads = _whole(1, 10_000), _whole(1, 1024)  # of each there is something in memory


def _say(line: str) -> None:
    print(line, file=sys.stderr)


def warn(notes: Iterable[str]) -> None:
    """Say what is odd about the input, before the long work."""
    for note in notes:
        _say(f"warning: {one_line(note)}")
