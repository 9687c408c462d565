"""Stability against cost of every way to estimate how common a caption is, on real captions.

    python benchmarks/stability.py --data FOLDER --encoder FOLDER_OR_NAME --output stability

FOLDER holds youcook2/descs_cap_train.json, ek100/train_narrations_partly_imputed.csv, flickr8k/train.tsv and
cc3m/validation.tsv; what is missing is skipped with a message. Cost is process CPU time of one estimate, embedding
excluded. Writes stability.json and the table as stability.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmts_plugins.clustering import build, stability
from mmts_plugins.clustering.estimate import Recipe, estimate, resolve
from mmts_plugins.data import cache, encoders
from mmts_plugins.data.captions import read_samples
from mmts_plugins.data.source import Source
from mmts_plugins.presets import presets
from mmts_plugins.tables.hashing import hash_strings

SETS = {
    "YouCook2": Source("youcook2/descs_cap_train.json"),
    "EK-100": Source("ek100/train_narrations_partly_imputed.csv", column="narration", separator=","),
    "CC3M validation": Source("cc3m/validation.tsv", column="0", header=False),
    "Flickr8k": Source("flickr8k/train.tsv"),
}
RECIPES = [
    Recipe(runs=1),
    Recipe(runs=5),
    Recipe(runs=20),
    Recipe(runs=5, clusters=50),
    Recipe(estimator="radius"),
    Recipe(estimator="radius", references=4096),
    Recipe(estimator="knn"),
    Recipe(estimator="knn", references=4096),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True, type=Path)
    parser.add_argument("--encoder", required=True)
    parser.add_argument("--output", default="stability", help="prefix of the .json and .md files")
    args = parser.parse_args()
    encoder = encoders.TextEncoder(args.encoder)
    preset = presets()["clip-cc3m"]
    results = []
    for name, source in SETS.items():
        path = args.data / source.data
        if not path.exists():
            print(f"{name}: no file {path}, left out", file=sys.stderr)
            continue
        keys, rows = build.distinct(read_samples(replace(source, data=str(path))).captions)
        weight, hashes = np.bincount(rows).astype(float), hash_strings(keys)
        points = cache.embed(encoder.encode, encoder.identity(), keys, name)
        for recipe in RECIPES:
            recipe = resolve(points, replace(recipe, threads=1))
            start = time.process_time()
            estimate(points, weight, recipe, hashes, with_cluster=False)
            seconds = time.process_time() - start
            measured = stability.of_recipe(points, weight, recipe, hashes, (preset.shift_min, preset.shift_max))
            sampled = recipe.estimator != "kmeans" and recipe.references < len(points)
            what = recipe.describe() + (f", {recipe.references:,} references" if sampled else "")
            results.append({"set": name, "captions": len(keys), "recipe": what, "seconds": seconds, **measured})
            print(_row(results[-1]), flush=True)
    Path(f"{args.output}.json").write_text(json.dumps(results, indent=1))
    Path(f"{args.output}.md").write_text("\n".join([*_head(), *map(_row, results)]) + "\n")


def _head() -> list[str]:
    columns = ["captions of", "estimate", "CPU s", "ARI", "seeds", "data halves", "moved by seeds", "by data"]
    return ["| " + " | ".join(columns) + " |", "| --- | --- |" + " ---: |" * (len(columns) - 2)]


def _row(result: dict[str, object]) -> str:
    def number(value: object, form: str) -> str:
        return "" if value is None else format(value, form)

    span = result["moved_seeds"]["span"]  # type: ignore[index]
    cells = [
        str(result["set"]),
        str(result["recipe"]),
        number(result["seconds"], ".1f"),
        number(result["ari"], ".2f"),
        number(result["spearman_disjoint_seeds"], ".2f"),
        number(result["spearman_data_halves"], ".2f"),
        number(result["moved_seeds"]["mean"] / span, ".1%"),  # type: ignore[index]
        number(result["moved_data_halves"]["mean"] / span, ".1%"),  # type: ignore[index]
    ]
    return "| " + " | ".join(cells) + " |"


if __name__ == "__main__":
    main()
