"""The paper's Table 4 from finished evaluations: mean and deviation over seeds, in Markdown, JSON and CSV."""

from __future__ import annotations

import csv
import io
import json
import math
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import Any, Optional

from .._files import replacing
from ..errors import MMTSError, one_line, reading, shown
from ..fields import NUMBER, TEXT, Field
from ..markdown import padded
from .plan import Plan

GROUPS = ("all", "head", "mid", "tail")
NAME = "compare"
FINISHED = "finished"  # trained and evaluated
_NAME, _NUMBER = Field(TEXT, longest=200), Field(NUMBER)
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


def summary(values: Values, baseline: str) -> dict[str, Any]:
    """``[variant][metric][group]``: ``mean``, ``sd`` over seeds (n - 1; None for one seed), ``values`` by seed, and the
    same of the ``difference`` to the baseline, seed by seed, over the seeds that both have."""
    result: dict[str, Any] = {}
    for variant, metrics in values.items():
        result[variant] = {}
        for name, groups in metrics.items():
            result[variant][name] = {}
            for group, by_seed in groups.items():
                entry = _moments(by_seed)
                base = values[baseline].get(name, {}).get(group, {})
                paired = {seed: value - base[seed] for seed, value in by_seed.items() if seed in base}
                if variant != baseline and paired:
                    entry["difference"] = _moments(paired)
                result[variant][name][group] = entry
    return result


def _moments(by_seed: dict[int, float]) -> dict[str, Any]:
    numbers = list(by_seed.values())
    return {
        "mean": statistics.fmean(numbers),
        "sd": statistics.stdev(numbers) if len(numbers) > 1 else None,
        "values": {str(seed): value for seed, value in by_seed.items()},
    }


def markdown(plan: Plan, found: dict[str, Any], table_metrics: Optional[list[str]] = None) -> str:
    """Tables of means and deviations in per cent (ranks as they are), and of the differences to the first variant."""
    metrics = table_metrics or _usual(found)
    groups = [g for g in GROUPS if any(g in groups for of in found.values() for groups in of.values())]
    lines: list[str] = []
    for group in groups:
        if len(groups) > 1:
            lines += [*([""] if lines else []), f"**{group}**", ""]
        rows = [["", "seeds", *(one_line(name).replace("|", "\\|") for name in metrics)]]
        for variant, of_metric in found.items():
            entries = [of_metric.get(name, {}).get(group) for name in metrics]
            rows.append([variant, _seeds(entries), *(_cell(e, n) for e, n in zip(entries, metrics))])
        for variant in plan.variants[1:]:
            entries = [found[variant].get(name, {}).get(group, {}).get("difference") for name in metrics]
            if any(entries):
                cells = (_cell(entry, name, sign="+") for entry, name in zip(entries, metrics))
                rows.append([f"{variant} − {plan.variants[0]}", _seeds(entries), *cells])
        lines += padded(rows)
    return "\n".join(lines) + "\n"


def _seeds(entries: list[Optional[dict[str, Any]]]) -> str:
    return str(len({seed for entry in entries if entry for seed in entry["values"]}))


def _usual(found: dict[str, Any]) -> list[str]:
    names = list(dict.fromkeys(name for metrics in found.values() for name in metrics))
    return [name for name in names if name.endswith(_SHOWN)] or names


def _cell(entry: Optional[dict[str, Any]], name: str, sign: str = "") -> str:
    if not entry:
        return "–"
    scale = 1 if "rank" in name else 100
    text = f"{round(scale * entry['mean'], 1) + 0:{sign}.1f}"  # + 0: no -0.0
    return text if entry["sd"] is None else f"{text} ± {scale * entry['sd']:.1f}"


def write(plan: Plan, state: dict[str, Any]) -> str:
    """Write ``compare.md``, ``compare.json`` and ``compare.csv`` of what is there; the Markdown is returned."""
    values = collect(plan, {name for name, known in state.items() if known["status"] == FINISHED})
    found = summary(values, plan.variants[0])
    for name in plan.metrics:
        if any(found.values()) and not any(name in metrics for metrics in found.values()):
            known = sorted({name for metrics in found.values() for name in metrics})
            raise MMTSError(f"metrics: no evaluation holds {name!r}; they hold {', '.join(known)}")
    text = markdown(plan, found, plan.metrics)
    document = {
        "format": 1,
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
    return text
