"""The tables of docs/results.md: differences seed by seed, of pilots and comparisons or of what their runs gave.

    python tables.py InfoNCE=pilots/youcook2/mmts-infonce max-margin=pilots/youcook2/mmts-max-margin --save youcook2.csv
    python tables.py youcook2.csv        # the same table, from what every run gave
    python tables.py youcook2.csv flickr8k.csv --minus "TS 1 period=TS"        # of several, one difference a row

The first row of numbers is the first variant's mean in per cent; all others are mean differences in points with the 95%
interval of Student's t over seeds, bold where it leaves zero out. The rows at the end are the method over its controls.
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
from pathlib import Path

from mmts_plugins.compare.plan import BOTH, CONSTANT, SHUFFLED
from mmts_plugins.evaluation.seeds import difference

GROUPS = ("all", "head", "middle", "tail")
Values = dict[tuple[str, str, str], dict[str, dict[int, float]]]
"""``[loss, metric, group][variant][seed]``, in the order of columns and rows."""


def of_documents(named: dict[str, Path], metrics: list[str]) -> Values:
    """What pilots (``pilot.json``) or comparisons (``compare.json``) hold."""
    found: Values = {}
    for loss, folder in named.items():
        (path,) = (folder / name for name in ("pilot.json", "compare.json") if (folder / name).exists())
        document = json.loads(path.read_text(encoding="utf-8"))["metrics"]
        for metric in metrics:
            for group in GROUPS:
                for variant, entry in document.items():
                    if (values := entry.get(metric, {}).get(group, {}).get("values")) is not None:
                        own = found.setdefault((loss, metric, group), {})
                        own[variant] = {int(seed): value for seed, value in values.items()}
    return found


def save(values: Values, path: Path) -> None:
    """A line for each run: loss, metric, variant, seed, and the value of each group."""
    rows: dict[tuple[str, str, str, int], dict[str, float]] = {}
    for (loss, metric, group), variants in values.items():
        for variant, seeds in variants.items():
            for seed, value in seeds.items():
                rows.setdefault((loss, metric, variant, seed), {})[group] = value
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["loss", "metric", "variant", "seed", *GROUPS])
        writer.writerows([*key, *(groups.get(group, "") for group in GROUPS)] for key, groups in rows.items())


def of_runs(path: Path) -> Values:
    """What :func:`save` wrote."""
    found: Values = {}
    with path.open(newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            for group in GROUPS:
                if row[group]:
                    own = found.setdefault((row["loss"], row["metric"], group), {}).setdefault(row["variant"], {})
                    own[int(row["seed"])] = float(row[group])
    return found


def beside(paths: list[Path]) -> Values:
    """Several saved files; the name of each stands before its losses."""
    return {(f"{path.stem} {loss}", *rest): own for path in paths for (loss, *rest), own in of_runs(path).items()}


def pairs_table(values: Values, groups: list[str], pairs: list[tuple[str, str]]) -> str:
    """Markdown: a row for each pair of variants, a column for each loss, metric and group."""
    columns = {key: variants for key, variants in values.items() if key[2] in groups}
    rows = [[f"{one} − {other}", *(_difference(variants, one, other) for variants in columns.values())]
            for one, other in pairs]  # fmt: skip
    return _markdown(["", *(_title(key) for key in columns)], rows)


def table(values: Values, groups: list[str]) -> str:
    """Markdown: a row for each variant, a column for each loss, metric and group."""
    columns = {key: variants for key, variants in values.items() if key[2] in groups}
    names = [list(variants) for variants in columns.values()]
    rows = [_row(*dict.fromkeys(row)) for row in zip(*names)]

    def differences(head: str, one: int, other: int) -> list[str]:
        return [head, *(_difference(values, own[one], own[other]) for values, own in zip(columns.values(), names))]

    first = [f"{100 * statistics.fmean(each[own[0]].values()):.1f}" for each, own in zip(columns.values(), names)]
    lines = [[rows[0], *first], *(differences(name, place, 0) for place, name in enumerate(rows) if place)]
    for place, name in enumerate(rows):
        for control in (CONSTANT, SHUFFLED):
            if name.startswith(BOTH) and (other := name.replace(BOTH, control, 1)) in rows:
                lines.append(differences(f"{name} − {control}", place, rows.index(other)))
    return _markdown(["", *(_title(key) for key in columns)], lines)


def _markdown(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, ["---"] * len(head), *rows])


def _row(first: str, *others: str) -> str:
    """``constant 0.05`` of one loss and ``constant 0.17`` of another are ``constant 0.05 / 0.17``."""
    before = first.rpartition(" ")[0] + " "
    return " / ".join([first, *(other[len(before) :] if other.startswith(before) else other for other in others)])


def _title(key: tuple[str, str, str]) -> str:
    return ", ".join(part.replace("_to_", " → ").replace("_R@", " R@").replace("_", " ") for part in key)


def _difference(variants: dict[str, dict[int, float]], one: str, other: str) -> str:
    seeds = [seed for seed in variants[one] if seed in variants[other]]
    found = difference([100 * (variants[one][seed] - variants[other][seed]) for seed in seeds])
    mean, low, high = (None if each is None else round(each, 2) + 0.0 for each in found[:1] + found[2:4])  # no -0.00
    text = f"{mean:+.2f}" + ("" if low is None else f" [{low:+.2f}, {high:+.2f}]")
    return f"**{text}**" if found.seen else text


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="+", help="LOSS=FOLDER of pilots or comparisons, or a saved file")
    parser.add_argument("--metric", action="append", help="default: text_to_other_R@10; may be given again")
    parser.add_argument("--group", action="append", choices=GROUPS, help="default: all and tail; may be given again")
    parser.add_argument(
        "--minus", action="append", metavar="ONE=OTHER", help="a row with this difference, and no others"
    )
    parser.add_argument("--save", type=Path, metavar="FILE", help="what every run gave, as CSV")
    args = parser.parse_args()
    named = dict(each.split("=", 1) for each in args.what if "=" in each)
    if named:
        values = of_documents({name: Path(path) for name, path in named.items()}, args.metric or ["text_to_other_R@10"])
    else:
        paths = [Path(each) for each in args.what]
        values = beside(paths) if len(paths) > 1 else of_runs(paths[0])
    if args.save is not None:
        save(values, args.save)
    groups = args.group or ["all", "tail"]
    if args.minus:
        pairs = [(one, other) for one, _, other in (each.partition("=") for each in args.minus)]
        print(pairs_table(values, groups, pairs))
    else:
        print(table(values, groups))


if __name__ == "__main__":
    main()
