"""The flags that ``mmts cluster`` and ``mmts stability`` share: where captions are, and how they become frequencies."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from ..data.forms import FORMATS
from ..errors import ConfigError
from ._numbers import positive, seed, whole
from ._refuse import refuse_given

if TYPE_CHECKING:
    from ..clustering.estimate import Recipe
    from ..clustering.prepare import Embedding
    from ..data.source import Source

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
    "runs": 20,
    "algorithm": "sample",
    "fit_rows": 256,
    "radius": None,
    "neighbours": 50,
    "references": 32_768,
    "seed": 0,
    "threads": 2,
}
INPUT = ("data", "train_data", "column", "split", "weights", "skip_damaged", "label_column", "keep_blank")
ENCODING = ("encoder", "batch_size", "no_cache", "images", "image_root", "frames")
_DENSITY = ("radius", "neighbours", "references")
RECIPE = ("estimator", "clusters", "runs", "seed", "threads", "algorithm", "fit_rows", *_DENSITY)

_runs, _threads = whole(1, 10_000), whole(1, 1024)  # of each there is something in memory


def add_input(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the captions are."""
    add = parser.add_argument_group("input").add_argument
    add("data", nargs="*", metavar="DATA",
        help="captions of the training set: files, folders, quoted glob or brace patterns, or URLs (s3:// "
        "hf://datasets/...); several, or joined with '::'; also compressed")  # fmt: skip
    add("--train-data", metavar="DATA", help="the same, under the name that a trainer has for it")
    add("--format", "--dataset-type", default="auto", choices=FORMATS, metavar="FORMAT",
        help=f"default: by what the files hold; one of {', '.join(FORMATS[1:])}; see docs/data.md")  # fmt: skip
    add("--column", "--csv-caption-key", metavar="NAME",
        help="column of the captions; default: a usual name (title, caption, text, desc ...); of JSON also a path, "
        "such as 'annotations[].caption'; of WebDataset the suffix (default: txt), or json.FIELD")  # fmt: skip
    add("--split", metavar="NAME[,NAME]",
        help="of a form with splits (Karpathy, MSR-VTT, YouCook2), or all; default: what is trained on")  # fmt: skip
    add("--weights", "--train-data-upsampling-factors", metavar="W::W",
        help="of several DATA, how often a sample of each counts, joined with '::'")  # fmt: skip
    add("--skip-damaged", action="store_true", default=None,
        help="leave out lines of JSON and the rest of tars that cannot be read, and count them")  # fmt: skip
    add("--separator", "--csv-separator", default="\t", metavar="CHAR",
        help="of a CSV, handed to pandas as in training; default: tab, also for .csv; of several characters (also "
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
    add("--batch-size", type=positive, metavar="N", help=f"of the encoder; default: {_DEFAULTS['batch_size']}")
    add("--device", metavar="NAME", help="such as cuda:0 or cpu; default: a GPU if there is one")
    add("--no-cache", action="store_true", default=None, help="neither read nor keep embeddings in $MMTS_CACHE")
    add("--images", metavar="COLUMN",
        help="embed the images that this column of DATA names instead of the captions (a folder: the frames of a "
        "video), with --encoder timm:MODEL or openclip:MODEL/PRETRAINED; the table stays keyed by caption")  # fmt: skip
    add(
        "--image-root", metavar="FOLDER", help="what the paths of --images are relative to; default: the working folder"
    )
    add("--frames", type=positive, metavar="N", help=f"of a folder at most N; default: {_DEFAULTS['frames']}")
    add("--embeddings", metavar="FILE",
        help=".npy or .safetensors [samples, dimensions] to use instead, or a folder of .npy parts in the order of "
        "their names; rows in the order of DATA")  # fmt: skip
    add("--tensor", metavar="NAME", help="which tensor of a .safetensors file that holds several")

    add = parser.add_argument_group("estimating how common a caption is").add_argument
    add("--estimator", choices=("kmeans", "radius", "knn"),
        help="kmeans: the size of the caption's cluster (default, as the paper); radius: samples within a cosine "
        "radius; knn: nearness of the nearest samples")  # fmt: skip
    add("-k", dest="clusters", type=positive, metavar="K", help=f"default: {_DEFAULTS['clusters']}, as the paper")
    add("--clusters", type=positive, help=argparse.SUPPRESS)  # before -k had one name
    add("--runs", type=_runs, metavar="R",
        help=f"average over R seeds; default: {_DEFAULTS['runs']} (the paper: 1)")  # fmt: skip
    add("--seed", type=seed, metavar="S", help=f"of the first run; default: {_DEFAULTS['seed']}")
    add("--algorithm", choices=("sample", "lloyd", "sklearn", "faiss"),
        help="of K-Means; sample (default): fitted on a weighted sample, then one pass over all; lloyd: all captions "
        "in every iteration; sklearn, faiss: those packages")  # fmt: skip
    add("--fit-rows", type=positive, metavar="N",
        help=f"captions per cluster in the sample; default: {_DEFAULTS['fit_rows']}")  # fmt: skip
    add("--radius", type=float, metavar="COS",
        help="of --estimator radius; default: such that there are samples/K neighbours on average")  # fmt: skip
    add("--neighbours", type=positive, metavar="N", help=f"of --estimator knn; default: {_DEFAULTS['neighbours']}")
    add("--references", type=positive, metavar="N",
        help=f"a density compares with at most N captions; default: {_DEFAULTS['references']}")  # fmt: skip
    add("--threads", type=_threads, metavar="N",
        help=f"default: {_DEFAULTS['threads']}; another number may round otherwise and give another table")  # fmt: skip


def check_flags(args: argparse.Namespace) -> None:
    """Refuse flags that contradict each other, or that would do nothing."""

    def refuse(names: Sequence[str], why: str) -> None:
        refuse_given(args, names, why)

    if args.class_counts:
        refuse((*INPUT, "embeddings", "tensor", "device", *ENCODING, *RECIPE), "with --class-counts")
        return
    if args.data:
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


def source_of(args: argparse.Namespace) -> Source:
    """What the input flags name."""
    from ..data.source import Source, weights_of

    return Source(
        args.train_data or "::".join(args.data),
        args.format,
        args.column,
        args.separator,
        not args.no_header,
        split=args.split,
        weights=() if args.weights is None else weights_of(args.weights),
        skip_damaged=bool(args.skip_damaged),
    )


def embedding_of(args: argparse.Namespace) -> Embedding:
    """How captions become embeddings."""
    from ..clustering.prepare import Embedding

    value = _given(args)
    return Embedding(
        encoder=value["encoder"],
        batch_size=value["batch_size"],
        device=args.device,
        cached=not args.no_cache,
        images=args.images,
        image_root=args.image_root,
        frames=value["frames"],
        embeddings=args.embeddings,
        tensor=args.tensor,
    )


def recipe_of(args: argparse.Namespace) -> Recipe:
    """How frequencies are estimated."""
    from dataclasses import fields

    from ..clustering.estimate import Recipe

    value = _given(args)
    return Recipe(**{field.name: value[field.name] for field in fields(Recipe)})


def _given(args: argparse.Namespace) -> dict[str, Any]:
    """Every flag that was not given at its default."""
    given = {name: value for name in _DEFAULTS if (value := getattr(args, name)) is not None}
    return {**_DEFAULTS, **given}
