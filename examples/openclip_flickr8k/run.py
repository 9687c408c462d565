"""Cluster captions, train OpenCLIP plain and with MM-TS, compare image-text retrieval. See README.md."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pandas as pd
import torch

from mmts_plugins._files import replacing
from mmts_plugins.demo.report import comparison_table, plot_cluster_sizes, plot_temperatures, recall_rows
from mmts_plugins.demo.train import TrainingRun, train
from mmts_plugins.errors import MMTSError
from mmts_plugins.evaluation.model import encode, load_model
from mmts_plugins.evaluation.retrieval import image_text_recall
from mmts_plugins.processes import run_logged, shown
from mmts_plugins.tables import ClusterTable

SMALL_MODEL = Path(__file__).resolve().parent / "small_resnet"


class Pairs(NamedTuple):
    """Images, captions, and the row of each caption's image."""

    images: list[Path]
    captions: list[str]
    image_of: torch.Tensor


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--data-dir", type=Path, required=True, help="folder that relative paths start from")
    parser.add_argument("--train", default="train.tsv", help="training CSV, as OpenCLIP reads it")
    parser.add_argument("--test", default="test.tsv", help="CSV of the images and captions to retrieve")
    parser.add_argument("--csv-separator", default="\t", help="separator of both files")
    parser.add_argument("--csv-img-key", default="filepath", help="column of image paths")
    parser.add_argument("--csv-caption-key", default="title", help="column of captions")
    parser.add_argument("--image-id-key", help="column that tells which captions share an image; none: the path")
    parser.add_argument("--output", type=Path, default=Path("flickr8k_runs"), help="folder for everything written")
    parser.add_argument("--model", default=f"local-dir:{SMALL_MODEL}", help="OpenCLIP's --model")
    parser.add_argument("--pretrained", help="OpenCLIP's --pretrained")
    parser.add_argument("--encoder", default="tfidf", help="how captions are embedded: tfidf, or a sentence encoder")
    parser.add_argument("-k", type=int, default=200, help="number of clusters")
    parser.add_argument("--epochs", type=int, default=3, help="epochs of each run")
    parser.add_argument("--batch-size", type=int, default=128, help="batch size")
    parser.add_argument("--lr", type=float, default=1e-3, help="learning rate")
    parser.add_argument("--warmup", type=int, default=100, help="warm-up steps")
    parser.add_argument("--precision", default="fp32", help="OpenCLIP's --precision")
    parser.add_argument("--workers", type=int, default=1, help="data-loading processes")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu or cuda")
    parser.add_argument("--seed", type=int, default=0, help="seed of the clustering and of both runs")
    parser.add_argument("--mmts", default="", help='more of our flags, e.g. "--mmts-alpha 0.02"')
    return parser.parse_args()


def read_pairs(args: argparse.Namespace) -> Pairs:
    """The images and captions to retrieve. Image files are found from ``--data-dir``, as the trainer finds them."""
    path = args.data_dir / args.test
    if not path.is_file():
        raise MMTSError(f"{path}: no such file (--data-dir, --test)")
    frame = pd.read_csv(path, sep=args.csv_separator)
    group = args.image_id_key or args.csv_img_key
    for column in (args.csv_img_key, args.csv_caption_key, group):
        if column not in frame:
            raise MMTSError(f"{path}: no column {column!r} (found: {', '.join(map(str, frame.columns))})")
    image_of, _ = pd.factorize(frame[group])
    images = [args.data_dir / image for image in frame.drop_duplicates(group)[args.csv_img_key]]
    return Pairs(images, frame[args.csv_caption_key].astype(str).tolist(), torch.from_numpy(image_of))


def evaluate(run: TrainingRun, pairs: Pairs, args: argparse.Namespace) -> dict[str, dict[int, float]]:
    """Recall both ways of a trained model."""
    model, preprocess, tokenizer = load_model(args.model, run.checkpoint, args.device, args.pretrained)
    image_features, text_features = encode(
        model, preprocess, tokenizer, pairs.images, pairs.captions, args.batch_size, args.device
    )
    return image_text_recall(image_features, text_features, pairs.image_of)


def main() -> int:
    args = parse_args()
    pairs = read_pairs(args)  # first: a wrong column name should not cost a training run
    output = args.output.resolve()
    output.mkdir(parents=True, exist_ok=True)
    table = output / "clusters.parquet"

    cluster = [sys.executable, "-m", "mmts_plugins", "cluster", args.train, "-o", str(table), "--force"]
    cluster += ["--separator", args.csv_separator, "--column", args.csv_caption_key]
    cluster += ["--encoder", args.encoder, "-k", str(args.k), "--seed", str(args.seed)]
    print("$", shown(cluster))
    started = time.monotonic()
    run_logged(cluster, args.data_dir, lambda line: print("  " + line, end=""))
    clustering_seconds = time.monotonic() - started

    # Adam's settings are given because OpenCLIP guesses them from the letters "vit" in the model's name or path.
    flags = ["--train-data", args.train, "--dataset-type", "csv", "--csv-separator", args.csv_separator]
    flags += ["--csv-img-key", args.csv_img_key, "--csv-caption-key", args.csv_caption_key]
    flags += ["--model", args.model, *(["--pretrained", args.pretrained] if args.pretrained else [])]
    flags += ["--batch-size", str(args.batch_size), "--lr", str(args.lr), "--beta1", "0.9", "--beta2", "0.98"]
    flags += ["--eps", "1e-6", "--wd", "0.2", "--warmup", str(args.warmup), "--precision", args.precision]
    flags += ["--workers", str(args.workers), "--device", args.device, "--seed", str(args.seed)]
    flags += ["--save-frequency", "0", "--log-every-n-steps", "10"]
    variants = {"plain": [], "mmts": ["--loss", "mmts", "--mmts-clusters", str(table), *args.mmts.split()]}
    stamp = time.strftime("%Y%m%d-%H%M%S")  # OpenCLIP refuses to reuse a run's name

    results: dict[str, Any] = {"seed": args.seed, "epochs": args.epochs, "clustering_seconds": clustering_seconds}
    runs, recalls = {}, {}
    for variant, mmts_flags in variants.items():
        name = f"{variant}-{stamp}"
        runs[variant] = run = train(name, flags, args.data_dir, args.epochs, mmts_flags, str(output / "runs"))
        recalls[variant] = evaluate(run, pairs, args)
        results[variant] = {"command": run.command, "seconds": run.seconds, "recall": recalls[variant]}
    clusters = ClusterTable.load(table)
    plot_cluster_sizes(output / "cluster_sizes.png", clusters, runs["mmts"])
    plot_temperatures(output / "temperatures.png", clusters, runs["mmts"], runs["plain"])
    with replacing(output / "results.json") as temporary:
        temporary.write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")
    compared = comparison_table(recall_rows(recalls["plain"], recalls["mmts"]))
    with replacing(output / "results.md") as temporary:
        temporary.write_text(compared, encoding="utf-8")
    print(compared)
    print(f"Trained in {results['plain']['seconds']:.0f} s (plain) and {results['mmts']['seconds']:.0f} s (MM-TS).")
    print("One seed: another one can change the differences, and their sign.")
    print(f"Written to {args.output}: results.json, results.md, cluster_sizes.png, temperatures.png")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MMTSError as error:
        sys.exit(f"error: {error}")
