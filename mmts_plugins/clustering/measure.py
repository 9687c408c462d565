"""What ``mmts stability`` says: how much of a recipe, or of finished tables, is chance."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from itertools import combinations
from typing import Any

import pyarrow.compute as pc

from .. import losses
from ..data.source import Source
from ..errors import TableError
from ..presets import presets
from ..tables import ClusterTable
from . import stability
from .estimate import Recipe, resolve
from .prepare import Embedding, prepare, read


def of_recipe(
    source: Source, how: Embedding, recipe: Recipe, keep_blank: bool, preset_name: str
) -> tuple[dict[str, Any], list[str]]:
    """How much of what a recipe gives is chance: numbers, and lines that say them.

    Args:
        source, how, recipe, keep_blank: as for :func:`.make.from_captions`.
        preset_name: whose shifts tell how far temperatures move.
    """
    data = prepare(how, recipe, read(source, how, keep_blank), source.data)
    recipe = resolve(data.points, recipe)
    preset = presets()[preset_name]
    measured = stability.of_recipe(data.points, data.weight, recipe, data.hashes, (preset.shift_min, preset.shift_max))
    measured.update(recipe=recipe.record(), encoder=data.encoder, preset=preset_name)
    facts = [("recipe", f"{recipe.describe()}, {data.encoder}")]
    if measured["ari"] is not None:
        facts += [
            ("ARI", f"{measured['ari']:.3f} between single runs"),
            ("single runs", f"rank correlation {measured['spearman_between_seeds']:.3f} between two seeds"),
            ("halves of the runs", f"rank correlation {measured['spearman_between_halves']:.3f}"),
        ]
    facts += [
        (
            "disjoint seeds",
            f"rank correlation {measured['spearman_disjoint_seeds']:.3f} between this recipe and itself",
        ),
        (_what(preset_name), _moved(measured["moved_seeds"], "with other seeds")),
    ]
    if measured["moved_data_halves"] is None:
        facts.append(("halves of the data", "not measured: too few captions in either half for as many clusters"))
    else:
        facts += [
            ("halves of the data", f"rank correlation {measured['spearman_data_halves']:.3f}"),
            ("", _moved(measured["moved_data_halves"], "between halves of the data")),
        ]
    facts.append(("verdict", measured["verdict"]))
    return measured, [f"{name:<20} {value}" for name, value in facts]


def of_tables(paths: Sequence[str], preset_name: str) -> tuple[dict[str, Any], list[str]]:
    """How finished tables of the same captions differ; of a single one, what was measured when it was made.

    Raises:
        TableError: they cannot be read or compared.
    """
    loaded = [ClusterTable.load(path) for path in paths]
    if len(loaded) == 1:
        stored = loaded[0].info.get("stability")
        if stored is None:
            raise TableError(
                f"{paths[0]}: its stability was not measured when it was made; name a second table of the same "
                "captions, or measure the recipe: mmts stability DATA ..."
            )
        return stored, [f"{name:<24} {value}" for name, value in stored.items()]
    pairs = {}
    lines = [f"{'tables':<48} {'ARI':>6} {'rank':>6}   {_what(preset_name)} moves"]
    for (path_a, a), (path_b, b) in combinations(zip(paths, loaded), 2):
        pair = _compare(a, b, preset_name)
        pairs[f"{path_a} {path_b}"] = pair
        gap = pair["moved"]
        lines.append(
            f"{path_a + '  ' + path_b:<48} {pair['ari']:>6.3f} {pair['spearman']:>6.3f}   "
            f"mean {gap['mean']:.4f}, 95% below {gap['high']:.4f}, of {gap['span']:.4f}"
        )
    return {"pairs": pairs, "preset": preset_name}, lines


def _compare(a: ClusterTable, b: ClusterTable, preset_name: str) -> dict[str, Any]:
    place = pc.index_in(a.keys, value_set=b.keys)
    if place.null_count or len(a) != len(b):
        raise TableError(
            f"{a.source} and {b.source} are not of the same captions: {place.null_count} of {len(a)} keys of the first "
            f"are missing in the second, which has {len(b)}"
        )
    rows = place.to_numpy()
    preset, weight = presets()[preset_name], a.count.astype(float)
    frequency = b.frequency[rows]
    return {
        "ari": stability.adjusted_rand_index(a.cluster, b.cluster[rows], weight),
        "spearman": stability.spearman(a.frequency, frequency, weight),
        "moved": asdict(stability.moved(a.frequency, frequency, weight, preset.shift_min, preset.shift_max)),
    }


def _what(preset_name: str) -> str:
    return losses.kind(presets()[preset_name].loss).number


def _moved(gap: dict[str, float], when: str) -> str:
    return f"moves by {gap['mean']:.4f} {when} (95% below {gap['high']:.4f}; shifts span {gap['span']:.4f})"
