"""The sub-command ``mmts stability``: how much of a table is chance. Heavy packages are imported when it runs."""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from itertools import combinations
from typing import TYPE_CHECKING, Any

from .. import losses
from .._files import replacing, writing
from ..errors import ConfigError, MMTSError, TableError
from ..presets import presets
from . import command

if TYPE_CHECKING:
    from ..clusters import ClusterTable

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
    mmts stability --tables a.parquet b.parquet

  what mmts cluster measured when it made a table:
    mmts stability --tables clusters.parquet
"""


def add_parser(subparsers: Any) -> argparse.ArgumentParser:
    """Register ``stability`` with the sub-parsers of ``mmts``."""
    parser: argparse.ArgumentParser = subparsers.add_parser(
        "stability",
        help="how much of a cluster table is chance: rank correlation between seeds, between halves of the data",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    command.add_input(parser)
    command.add_recipe(parser)
    add = parser.add_argument_group("what is measured").add_argument
    add("--tables", nargs="+", metavar="TABLE", help="compare finished tables instead of measuring a recipe")
    add("--preset", choices=tuple(presets()), default="clip-cc3m",
        help="whose shifts tell how far temperatures move; default: clip-cc3m")  # fmt: skip
    add("-o", "--output", metavar="FILE", help="write the numbers as JSON, too")
    parser.set_defaults(run=run)
    return parser


def run(args: argparse.Namespace) -> int:
    """Measure, print, and write if asked to."""
    if args.tables:
        given = [name for name in (*command.INPUT, *command.ENCODING, *command.RECIPE, "embeddings", "tensor")
                 if getattr(args, name, None) is not None]  # fmt: skip
        if given:
            flag = "DATA" if given[0] == "data" else "--" + given[0].replace("_", "-")
            raise ConfigError(f"{flag} has no effect with --tables; drop one of the two")
        measured, lines = _tables(args.tables, args.preset)
    else:
        measured, lines = _recipe(args)
    print("\n".join(lines))
    if args.output:
        with writing(args.output, "cannot be written (-o/--output)"), replacing(args.output) as temporary:
            temporary.write_text(json.dumps(measured, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return 0


def _recipe(args: argparse.Namespace) -> tuple[dict[str, Any], list[str]]:
    args.class_counts = args.label_column = None
    command.check_flags(args)
    options = command.with_defaults(args)
    try:
        from ..data.captions import read_samples, refuse_blank
        from . import stability
        from .estimate import resolve

        source = command.source_of(options)
        samples = read_samples(source, [options.images] if options.images else ())
        refuse_blank(samples.captions, source.data, options.keep_blank)
        command.warn(samples.notes)
        data = command.prepare(options, samples.captions, source.data, samples.labels)
        recipe = resolve(data.points, command.recipe_of(options))
        preset = presets()[args.preset]
        measured = stability.of_recipe(
            data.points, data.weight, recipe, data.hashes, (preset.shift_min, preset.shift_max)
        )
    except ImportError as error:
        raise MMTSError(f"mmts stability needs {error.name or error}: pip install 'mmts-plugins[cluster]'") from error
    measured.update(recipe=recipe.record(), encoder=data.encoder, preset=args.preset)
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
        (_what(args.preset), _moved(measured["moved_seeds"], "with other seeds")),
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


def _tables(paths: list[str], preset_name: str) -> tuple[dict[str, Any], list[str]]:
    from ..clusters import ClusterTable

    tables = [ClusterTable.load(path) for path in paths]
    if len(tables) == 1:
        stored = tables[0].info.get("stability")
        if stored is None:
            raise TableError(
                f"{paths[0]}: its stability was not measured when it was made; name a second table of the same "
                "captions, or measure the recipe: mmts stability DATA ..."
            )
        return stored, [f"{name:<24} {value}" for name, value in stored.items()]
    pairs = {}
    lines = [f"{'tables':<48} {'ARI':>6} {'rank':>6}   {_what(preset_name)} moves"]
    for (path_a, a), (path_b, b) in combinations(zip(paths, tables), 2):
        pair = _compare(a, b, preset_name)
        pairs[f"{path_a} {path_b}"] = pair
        gap = pair["moved"]
        lines.append(
            f"{path_a + '  ' + path_b:<48} {pair['ari']:>6.3f} {pair['spearman']:>6.3f}   "
            f"mean {gap['mean']:.4f}, 95% below {gap['high']:.4f}, of {gap['span']:.4f}"
        )
    return {"pairs": pairs, "preset": preset_name}, lines


def _compare(a: ClusterTable, b: ClusterTable, preset_name: str) -> dict[str, Any]:
    import pyarrow.compute as pc

    from . import stability

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
