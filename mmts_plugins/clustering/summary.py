"""What ``mmts cluster`` prints about the table it made."""

from __future__ import annotations

import shlex
import shutil

import numpy as np

from ..tables import CAPTION, ClusterTable

_SHOWN = 5
_EXAMPLES = 3


def summarise(table: ClusterTable, path: str) -> str:
    """The table in numbers and examples, and the next command to type."""
    sizes = table.sizes  # descending, see build.by_size
    samples, head = int(table.count.sum()), -(-len(sizes) // 3)
    captions = table.kind == CAPTION
    groups = "clusters" if captions else "classes"
    facts = [("samples", f"{samples:,}")]
    if captions:
        facts.append(("unique captions", f"{len(table):,}  ({samples - len(table):,} duplicates)"))
    facts += [
        (groups, f"{len(sizes):,}"),
        ("largest, smallest", f"{sizes[0]:,} and {sizes[-1]:,} samples, imbalance {sizes[0] / sizes[-1]:.1f}"),
        ("head third", f"the {head:,} largest {groups} hold {sizes[:head].sum() / samples:.1%} of the samples"),
    ]
    if not np.array_equal(table.frequency, sizes[table.cluster]):
        facts.append(("frequency", f"{table.frequency.min():,.1f} to {table.frequency.max():,.1f}{_why(table)}"))
    if "stability" in table.info:
        facts.append(("stability", table.info["stability"]["verdict"]))
    lines = [f"{name:<18} {value}" for name, value in facts]

    members = np.argsort(table.cluster, kind="stable")
    ends = np.cumsum(np.bincount(table.cluster))
    width = shutil.get_terminal_size((120, 24)).columns
    large = range(min(_SHOWN, len(sizes)))
    small = range(max(_SHOWN, len(sizes) - _SHOWN), len(sizes))
    for title, shown in (("largest", large), ("smallest", small)):
        if shown:
            lines += ["", f"{len(shown)} {title} {groups}"]
        for cluster in shown:
            inside = members[ends[cluster - 1] if cluster else 0 : ends[cluster]]
            # Spread over the cluster: neighbours in the file often describe the same image.
            spread = np.linspace(0, len(inside) - 1, min(_EXAMPLES, len(inside))).astype(int)
            start = f"{sizes[cluster]:>10,}  "
            for key in table.keys.take(inside[spread]).to_pylist():
                lines.append((start + _printable(key, width - len(start))).rstrip())
                start = " " * len(start)

    lines += ["", f"Written to {path}. Next, with your training command:"]
    lines += [f"  ... --loss mmts --mmts-clusters {shlex.quote(path)}"]
    return "\n".join(lines)


def _why(table: ClusterTable) -> str:
    runs = table.info.get("runs", 1)
    what = {"radius": "samples within the radius", "knn": "nearness"}.get(table.info.get("estimator", ""))
    return f", {what}" if what else f", mean cluster size over {runs} runs" if runs > 1 else ""


def _printable(text: str, width: int) -> str:
    line = " ".join("".join(char if char.isprintable() else " " for char in text).split())
    return line if len(line) <= width else line[: max(width - 3, 0)] + "..."
