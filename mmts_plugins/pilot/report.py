"""What a pilot found: tables, a picture, a page, and the flags to train with."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Optional

from .._files import replacing
from ..compare import picture, tables
from ..compare.picture import Panel
from ..compare.plan import SHUFFLED
from ..evaluation.seeds import Difference, difference

if TYPE_CHECKING:
    from .run import Variant
    from .train import Settings

HINT = (
    "A pilot trains linear heads on features that never change. It is a hint for full training, not a proof: there "
    "the features move, and with them what a temperature does."
)


def write(
    folder: Path,
    variants: Sequence[Variant],
    seeds: Sequence[int],
    results: dict[tuple[str, int], dict[str, Any]],
    settings: Settings,
) -> str:
    """Write ``pilot.md``, ``pilot.json``, ``pilot.png`` and ``report.html``; the text to print is returned."""
    from .run import MAIN, plan_of, values_of

    plan = plan_of(folder, variants, seeds)
    found = tables.summary(values_of(variants, results), plan.contrasts)
    table = tables.markdown(plan, found, plan.metrics)
    verdict = judged(variants, found, MAIN)
    text = f"{table}\n{verdict}\n\n{HINT}\n"
    about = json.loads((folder / "features" / "about.json").read_text(encoding="utf-8"))
    document = {
        "format": 1,
        "about": about,
        "settings": vars(settings),
        "variants": {variant.name: variant.flags for variant in variants},
        "seeds": list(seeds),
        "metrics": found,
    }
    for name, content in (("pilot.md", text), ("pilot.json", json.dumps(document, indent=2) + "\n")):
        with replacing(folder / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")
    if picture.can_draw():
        draw(folder / "pilot.png", variants, found, MAIN)
        _page(folder, variants, table, verdict, about)
        text += f"\nWritten to {folder}: report.html, pilot.png, pilot.md, pilot.json"
    else:
        text += f"\nWritten to {folder}: pilot.md, pilot.json (a page and a picture need: pip install matplotlib)"
    return text


def judged(variants: Sequence[Variant], found: dict[str, Any], metric: str) -> str:
    """In words: what is better than the first variant and than its controls, and the flags to train with."""
    first = variants[0].name
    better: list[tuple[float, Variant]] = []
    lines: list[str] = []
    for variant in variants[1:]:
        differences = found[variant.name].get(metric, {}).get("all", {}).get("differences", {})
        against = {other: _difference(entry) for other, entry in differences.items()}
        own = against.get(first)
        if own is None or not own.seen or own.mean <= 0:
            continue
        controls = {other: each for other, each in against.items() if other != first}
        beaten = [other for other, each in controls.items() if each.seen and each.mean > 0]
        lines.append(f"- {variant.name}: {100 * own.mean:+.1f} points over {first}" + _beside(controls, beaten))
        # What a control reaches as well is the control's doing; controls themselves are nobody's method.
        if len(beaten) == len(controls) and not _is_fixed(variant) and not variant.name.startswith(SHUFFLED):
            better.append((own.mean, variant))
    if not lines:
        seeds = len(found[first].get(metric, {}).get("all", {}).get("values", {}))
        return f"No difference seen: in {metric}, over {seeds} seed(s), nothing beats {first} beyond its interval." + (
            " More seeds would narrow the intervals." if seeds < 8 else ""
        )
    text = "\n".join([f"Better than {first} in {metric}, beyond the interval:", "", *lines])
    if not better:
        return text + "\n\nNone of them is a method that its controls do not reach: nothing here speaks for one."
    best = max(better, key=lambda each: each[0])[1]
    rival = _best_fixed(variants[1:], found, metric)
    if rival is not None:
        apart = _between(found, metric, best.name, rival)
        if not (apart.seen and apart.mean > 0):
            return (
                f"{text}\n\nBut {rival} never moves and is as good ({best.name} over it: {100 * apart.mean:+.1f} "
                "points): nothing here speaks for more than another constant."
            )
    return f"{text}\n\nThe best of those that no control reaches, {best.name}:\n\n    {best.flags}"


def _is_fixed(variant: Variant) -> bool:
    """Whether every sample has one number all the time."""
    return {"--mmts-no-schedule", "--mmts-no-shifts"} <= set(variant.words(0))


def _best_fixed(variants: Sequence[Variant], found: dict[str, Any], metric: str) -> Optional[str]:
    means = {each.name: found[each.name][metric]["all"]["mean"] for each in variants if _is_fixed(each)}
    return max(means, key=lambda name: means[name]) if means else None


def _between(found: dict[str, Any], metric: str, one: str, other: str) -> Difference:
    values, base = (found[name][metric]["all"]["values"] for name in (one, other))
    return difference([values[seed] - base[seed] for seed in values if seed in base])


def _beside(controls: dict[str, Difference], beaten: list[str]) -> str:
    if not controls:
        return ""
    parts = [f"{other} {100 * each.mean:+.1f}" + ("" if other in beaten else ", none seen" if not each.seen else "")
             for other, each in controls.items()]  # fmt: skip
    return f" (over {'; over '.join(parts)})"


def _difference(entry: dict[str, Any]) -> Difference:
    return Difference(**{name: entry[name] for name in Difference._fields})


def draw(path: Path, variants: Sequence[Variant], found: dict[str, Any], metric: str) -> None:
    """Each variant's difference to the first with its interval, for all texts and for the three thirds."""
    from ..report import plots

    first, *rows = (variant.name for variant in variants)
    colours = {"all": picture.INK, "head": plots.HEAD, "middle": plots.MIDDLE, "tail": plots.TAIL}
    panels = [
        Panel(group, {name: _to(found, name, metric, group, first) for name in rows}, colours[group])
        for group in tables.GROUPS
        if group in found[first].get(metric, {})
    ]
    picture.draw(path, panels, f"{metric}, points over {first}")


def _to(found: dict[str, Any], name: str, metric: str, group: str, first: str) -> Optional[dict[str, Any]]:
    entry: Optional[dict[str, Any]] = found[name].get(metric, {}).get(group, {}).get("differences", {}).get(first)
    return entry


def _page(folder: Path, variants: Sequence[Variant], table: str, verdict: str, about: dict[str, Any]) -> None:
    from ..report import page

    flags = "\n".join(f"{variant.name}: {variant.flags or 'a learned temperature'}" for variant in variants)
    told = "\n".join(f"{name}: {value}" for name, value in about.items() if name != "notes")
    body = f"""<h1>Pilot</h1>
<p class="note">{page.escaped(HINT)}</p>
<pre>{page.escaped(verdict)}</pre>
{page.embedded(folder / "pilot.png", "differences to the first variant")}
<h2>All numbers</h2>
<pre>{page.escaped(table)}</pre>
<h2>The variants' flags</h2>
<pre>{page.escaped(flags)}</pre>
<h2>What it was made of</h2>
<pre>{page.escaped(told)}</pre>
{"".join(f"<p class='small'>{page.escaped(note)}</p>" for note in about.get("notes", []))}"""
    with replacing(folder / "report.html") as temporary:
        temporary.write_text(page.shell("Pilot", body), encoding="utf-8")
