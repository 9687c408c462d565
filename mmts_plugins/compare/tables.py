"""The paper's Table 4 from finished evaluations: mean and deviation over seeds, in Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any, Optional

from .._files import replacing
from ..errors import MMTSError, one_line, reading, shown
from ..evaluation.seeds import LEVEL, Difference, difference
from ..fields import NUMBER, TEXT, Field
from ..markdown import padded
from . import picture
from .plan import Plan

GROUPS = ("all", "head", "middle", "tail")
NAME = "compare"
FINISHED = "finished"  # trained and evaluated
_NAME, _NUMBER = Field(TEXT, longest=200), Field(NUMBER)
_PANELS, _BESIDE = 4, ("_R@5", "_R@10", "_top5", "_class_mean")  # of the picture: more would be too narrow
_BOUNDS = ("mean", "low", "high")
_SHOWN = ("_R@1", "_R@5", "_R@10", "_mAP", "_nDCG", "_top1", "_top5", "_class_mean")

Values = dict[str, dict[str, dict[str, dict[int, float]]]]
"""``[variant][metric][group][seed]``."""


def collect(plan: Plan, finished: Collection[str]) -> Values:
    """The values of the evaluations that have ended.

    Args:
        plan: whose.
        finished: the names of their runs; a file of another may be half written.

    Raises:
        MMTSError: a file is damaged, see :func:`metrics`.
    """
    values: Values = {variant: {} for variant in plan.variants}
    for run in plan.runs:
        if run.name not in finished or not run.result.exists():
            continue
        for name, groups in metrics(run.result).items():
            for group, number in groups.items():
                values[run.variant].setdefault(name, {}).setdefault(group, {})[run.seed] = number
    return values


def metrics(path: Path) -> dict[str, dict[str, float]]:
    """``[metric][group]`` of an evaluation; what was not measured (null, NaN) is left out.

    Raises:
        MMTSError: the file is not of the form ``{"metrics": {name: number or {"value": number, "head": ...}}}``.
    """
    what = "not an evaluation with 'metrics', such as mmts eval writes (delete it to have it made again)"
    with reading(path, what):
        content = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(content, dict) or not isinstance(content.get("metrics"), dict):
        raise MMTSError(f"{path}: {what}: {shown(content)}")
    return metrics_of(content, str(path))


def metrics_of(content: dict[str, Any], path: str) -> dict[str, dict[str, float]]:
    """``[metric][group]`` of what an evaluation holds; ``path`` names it in messages.

    Raises:
        MMTSError: a metric is not of the form ``number or {"value": number, "head": ...}``.
    """
    found: dict[str, dict[str, float]] = {}
    for name, entry in content["metrics"].items():
        _NAME.check(f"{path}: the name of a metric", name, MMTSError)
        groups = entry if isinstance(entry, dict) else {"value": entry}
        parts = {"all": groups, **{group: groups.get(group) for group in GROUPS[1:]}}
        for group, part in parts.items():
            where = f"{path}: {group} of metric {shown(name)}"
            if part is not None and not isinstance(part, dict):
                raise MMTSError(f"{where} is {shown(part)}: it must be an object with a value")
            number = (part or {}).get("value")
            if number is None or (isinstance(number, float) and not math.isfinite(number)):
                continue
            found.setdefault(name, {})[group] = _NUMBER.check(where, number, MMTSError)
    return found


def summary(values: Values, contrasts: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """``[variant][metric][group]``: ``mean``, ``sd`` over seeds (n - 1; None for one seed), ``values`` by seed, and the
    ``differences`` to other variants, seed by seed over the seeds that both have, as :class:`.seeds.Difference`."""
    result: dict[str, Any] = {}
    for variant, metrics in values.items():
        result[variant] = {}
        for name, groups in metrics.items():
            result[variant][name] = {}
            for group, by_seed in groups.items():
                entry = _moments(by_seed)
                for other in (other for one, other in contrasts if one == variant):
                    base = values[other].get(name, {}).get(group, {})
                    paired = {str(seed): value - base[seed] for seed, value in by_seed.items() if seed in base}
                    if paired:
                        found = difference(list(paired.values()))._asdict()
                        entry.setdefault("differences", {})[other] = {**found, "values": paired}
                result[variant][name][group] = entry
    return result


def _moments(by_seed: dict[int, float]) -> dict[str, Any]:
    numbers = list(by_seed.values())
    return {
        "mean": statistics.fmean(numbers),
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": {str(seed): value for seed, value in by_seed.items()},
    }


_LEGEND = f"""\
Means ± standard deviations over seeds. Differences seed by seed, with the {LEVEL:.0%} interval of Student's t;
"none seen" where it holds zero. Of twenty such intervals of nothing, one leaves zero out by chance.
"""


def markdown(plan: Plan, found: dict[str, Any], table_metrics: Optional[list[str]] = None) -> str:
    """Tables of means and deviations in per cent (ranks as they are), and of the differences that the plan asks for."""
    metrics = table_metrics or _usual(found)
    groups = [g for g in GROUPS if any(g in groups for of in found.values() for groups in of.values())]
    lines: list[str] = []
    several = False
    for group in groups:
        if len(groups) > 1:
            lines += [*([""] if lines else []), f"**{group}**", ""]
        rows = [["", "seeds", *(one_line(name).replace("|", "\\|") for name in metrics)]]
        for variant, of_metric in found.items():
            entries = [of_metric.get(name, {}).get(group) for name in metrics]
            rows.append([variant, _seeds(entries), *(_cell(e, n) for e, n in zip(entries, metrics))])
        for variant, other in plan.contrasts:
            entries = [
                found[variant].get(name, {}).get(group, {}).get("differences", {}).get(other) for name in metrics
            ]
            if any(entries):
                several |= any(entry["low"] is not None for entry in entries if entry)
                cells = (_difference(entry, name) for entry, name in zip(entries, metrics))
                rows.append([f"{variant} − {other}", _seeds(entries), *cells])
        lines += padded(rows)
    return "\n".join(lines) + "\n" + (f"\n{_LEGEND}" if several else "")


def _seeds(entries: list[Optional[dict[str, Any]]]) -> str:
    return str(len({seed for entry in entries if entry for seed in entry["values"]}))


def _usual(found: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    return [name for name in names if name.endswith(_SHOWN)] or names


def _cell(entry: Optional[dict[str, Any]], name: str) -> str:
    if not entry:
        return "–"
    text = _number(entry["mean"], name)
    return text if entry["sd"] is None else f"{text} ± {_number(entry['sd'], name)}"


def _difference(entry: Optional[dict[str, Any]], name: str) -> str:
    if not entry:
        return "–"
    mean, low, high = (None if entry[each] is None else _number(entry[each], name, "+") for each in _BOUNDS)
    if low is None:
        return f"{mean}"
    seen = Difference(**{each: entry[each] for each in Difference._fields}).seen
    return f"{mean} [{low}, {high}]" + ("" if seen else " none seen")


def _number(value: float, name: str, sign: str = "") -> str:
    return f"{round((1 if 'rank' in name else 100) * value, 1) + 0:{sign}.1f}"  # + 0: no -0.0


def write(plan: Plan, state: dict[str, Any]) -> str:
    """Write ``compare.md``, ``.json``, ``.csv`` and, with matplotlib, ``.png``; the Markdown is returned."""
    values = collect(plan, {name for name, known in state.items() if known["status"] == FINISHED})
    found = summary(values, plan.contrasts)
    for name in plan.metrics:
        if any(found.values()) and not any(name in metrics for metrics in found.values()):
            known = sorted({name for metrics in found.values() for name in metrics})
            raise MMTSError(f"metrics: no evaluation holds {name!r}; they hold {', '.join(known)}")
    text = markdown(plan, found, plan.metrics)
    document = {
        "format": 2,  # 1 had one "difference", to the first variant, with its deviation
        "variants": plan.variants,
        "seeds": plan.seeds,
        "runs": {run.name: {"variant": run.variant, "seed": run.seed, **state.get(run.name, {})} for run in plan.runs},
        "metrics": found,
    }
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(["variant", "seed", "metric", "group", "value"])
    for variant, metrics in values.items():
        for name, groups in metrics.items():
            for group, by_seed in groups.items():
                writer.writerows([variant, seed, name, group, value] for seed, value in by_seed.items())
    contents = {"md": text, "json": json.dumps(document, indent=2) + "\n", "csv": table.getvalue()}
    for suffix, content in contents.items():
        with replacing(plan.output / f"{NAME}.{suffix}") as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    if picture.can_draw() and (panels := _panels(plan, found)):
        picture.draw(plan.output / f"{NAME}.png", panels, f"points over {plan.variants[0]}")
    return text


def _panels(plan: Plan, found: dict[str, Any]) -> list[picture.Panel]:
    """A panel for each of the table's metrics in per cent: what the others have over the first variant."""
    first, *others = plan.variants
    panels = []
    usual = _usual(found)
    for name in plan.metrics or [name for name in usual if not name.endswith(_BESIDE)] or usual:
        entries = {
            other: found[other].get(name, {}).get("all", {}).get("differences", {}).get(first) for other in others
        }
        if "rank" not in name and any(entries.values()):
            panels.append(picture.Panel(name.replace("_to_", " → "), entries))
    return panels[:_PANELS]
