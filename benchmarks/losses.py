"""Time and memory of the losses, forward and backward, against OpenCLIP's ClipLoss and the explicit forms.

    python benchmarks/losses.py                       # N = 256 ... 4096, time ratios and memory
    python benchmarks/losses.py --sizes 8192 16384 32768 65536 --only ours --rounds 0 --limit-gb 1
    python benchmarks/losses.py --output results      # results.json, results.md, results.png
    python benchmarks/losses.py --ranks 2 --sizes 1024 2048   # N of each rank; with what each rank sends

All implementations take turns, round by round, in one process; a ratio is the median over rounds of the paired ratios
of process CPU time (with one thread that hardly depends on other jobs of the machine). Memory is the peak of live bytes
in torch's CPU allocator during one forward and backward, inputs excluded, gradients included: a count. With ``--ranks``
every rank is a gloo process of this machine; what it sends is what it writes to its sockets, counted by the system.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor

from mmts_plugins.distributed import gather_rows
from mmts_plugins.functional import info_nce, max_margin
from mmts_plugins.losses import InfoNCELoss, MaxMarginLoss

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def naive_info_nce(images: Tensor, texts: Tensor, temperature: Tensor) -> Tensor:
    """Both matrices written out, each row divided by its temperature."""
    target = torch.arange(len(images))
    scale = 1 / temperature[:, None]
    return (
        F.cross_entropy(scale * (images @ texts.T), target) + F.cross_entropy(scale * (texts @ images.T), target)
    ) / 2


def naive_max_margin(images: Tensor, texts: Tensor, margin: Tensor) -> Tensor:
    """The authors' form in our words: every pair's positive, negative and margin spelt out as a column, the hinge taken
    of all of them, and again of those off the diagonal."""
    images, texts = F.normalize(images, dim=1), F.normalize(texts, dim=1)
    similarity = texts @ images.T
    n = len(similarity)
    positive = similarity.diag()[:, None].expand(n, n).contiguous().view(-1, 1)
    negatives = torch.cat([similarity.view(-1, 1), similarity.T.contiguous().view(-1, 1)])
    positives = torch.cat([positive, positive])
    margins = torch.cat([margin.repeat_interleave(n), margin.repeat_interleave(n)])[:, None]
    hinges = F.relu(margins - (positives - negatives))
    off_diagonal = torch.cat([1 - torch.eye(n).view(-1)] * 2).nonzero().flatten()
    positives, negatives, margins = (x.index_select(0, off_diagonal) for x in (positives, negatives, margins))
    hinges = F.relu(margins - (positives - negatives))
    return hinges.mean()


def clip_loss() -> Loss:
    from open_clip.loss import ClipLoss

    module = ClipLoss()
    scale = torch.tensor(1 / 0.07)
    return lambda images, texts, _: module(images, texts, scale)


def three_products(images: Tensor, texts: Tensor, _: Tensor) -> None:
    """The bound: similarities, and their product with either side."""
    n, d = images.shape
    if not hasattr(three_products, "buffers") or three_products.buffers[0].shape != (n, n):
        three_products.buffers = torch.empty(n, n), torch.empty(n, d)  # type: ignore[attr-defined]
    similarity, grad = three_products.buffers  # type: ignore[attr-defined]
    torch.mm(images, texts.T, out=similarity)
    torch.mm(similarity, texts, out=grad)
    torch.mm(similarity.T, images, out=grad)


def pairs(n: int, d: int, positive: float) -> tuple[Tensor, Tensor]:
    """Unit vectors whose pairs have about the similarity ``positive``, and whose negatives have none."""
    generator = torch.Generator().manual_seed(n)
    images = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    noise = F.normalize(torch.randn(n, d, generator=generator), dim=1)
    return images, F.normalize(positive * images + (1 - positive**2) ** 0.5 * noise, dim=1)


def implementations(dimension: int) -> dict[str, tuple[Loss, float, str, bool, int]]:
    """Name to (loss, similarity of pairs, kind of temperature, whether it is ours, N x N matrices it needs)."""
    return {
        "ClipLoss (OpenCLIP)": (clip_loss(), 0.3, "temperature", False, 5),
        "InfoNCE, explicit": (naive_info_nce, 0.3, "temperature", False, 5),
        "InfoNCE, one N x N kept": (
            lambda i, t, x: info_nce(i, t, x, memory_budget=1 << 62),
            0.3,
            "temperature",
            True,
            1,
        ),
        "InfoNCE, none kept": (lambda i, t, x: info_nce(i, t, x, memory_budget=0), 0.3, "temperature", True, 0),
        "max-margin, explicit": (naive_max_margin, 0.2, "margin", False, 27),
        "max-margin, 50% active": (max_margin, 0.2, "margin", True, 0),
        "max-margin, 1% active": (max_margin, 0.2 + 3.3 / dimension**0.5, "margin", True, 0),
        "three matrix products": (three_products, 0.3, "temperature", False, 1),  # type: ignore[dict-item]
    }


def inputs(n: int, dimension: int, positive: float, kind: str) -> tuple[Tensor, Tensor, Tensor]:
    images, texts = pairs(n, dimension, positive)
    low, high = (0.05, 0.10) if kind == "temperature" else (0.195, 0.205)
    return images.requires_grad_(), texts.requires_grad_(), torch.linspace(low, high, n)


def step(loss: Loss, images: Tensor, texts: Tensor, temperature: Tensor) -> None:
    images.grad = texts.grad = None
    if loss is three_products:
        with torch.no_grad():
            loss(images, texts, temperature)
    else:
        loss(images, texts, temperature).backward()


def peak_bytes(loss: Loss, *arguments: Tensor) -> tuple[int, float]:
    """Peak of live bytes that one forward and backward adds, and the CPU seconds it took."""
    from torch.profiler import ProfilerActivity, profile

    arguments[0].grad = arguments[1].grad = None
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        begin = time.process_time()
        loss(*arguments).backward()
        seconds = time.process_time() - begin
    live = peak = 0
    for event in sorted(
        (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"), key=lambda e: e.start_ns()
    ):
        live += event.nbytes()
        peak = max(peak, live)
    return peak, seconds


def measure(sizes: list[int], dimension: int, rounds: int, only: str, limit_gb: float) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for n in sizes:
        chosen = {
            name: (loss, inputs(n, dimension, positive, kind))
            for name, (loss, positive, kind, ours, squares) in implementations(dimension).items()
            if (only == "all" or ours) and squares * 4 * n * n < limit_gb * 2**30
        }
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        for number in range(rounds + 1 if rounds else 0):
            for name, (loss, arguments) in chosen.items():
                begin = time.process_time()
                step(loss, *arguments)
                if number:
                    seconds[name].append(time.process_time() - begin)
        for name, (loss, arguments) in chosen.items():
            row: dict[str, object] = {"n": n, "loss": name}
            if loss is not three_products:
                peak, once = peak_bytes(loss, *arguments)
                row["megabytes"] = peak / 2**20
            row["seconds"] = statistics.median(seconds[name] or [once])
            for key, other in (
                ("to ClipLoss", "ClipLoss (OpenCLIP)"),
                ("to explicit max-margin", "max-margin, explicit"),
                ("to three products", "three matrix products"),
            ):
                if rounds and other in seconds:
                    row[key] = statistics.median(a / b for a, b in zip(seconds[name], seconds[other]))
            rows.append(row)
            print(_line(row), flush=True)
    return rows


def _sent() -> int:
    """Bytes that this process has written: to sockets, as it writes no files meanwhile. Linux only."""
    text = Path("/proc/self/io").read_text()
    return int(text.split("wchar: ")[1].split()[0])


def _on_rank(rank: int, ranks: int, meeting: str, n: int, dimension: int, rounds: int) -> None:
    from open_clip.loss import ClipLoss

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=ranks)
    low, high = (0.05, 0.10), (0.195, 0.205)
    rows = []
    for local in (True, False):
        flags = {"local_loss": local, "gather_with_grad": True, "rank": rank, "world_size": ranks}
        clip, scale = ClipLoss(**flags), torch.tensor(1 / 0.07)
        chosen: dict[str, tuple[Loss, float, tuple[float, float]]] = {
            "ClipLoss (OpenCLIP)": (lambda i, t, _, clip=clip, scale=scale: clip(i, t, scale), 0.3, low),
            "InfoNCE": (InfoNCELoss(**flags), 0.3, low),
            "max-margin, 50% active": (MaxMarginLoss(**flags), 0.2, high),
            # What starting before the loss could hide at most, on a machine whose transfers cost its cores nothing.
            "gathering features, alone": (lambda _, t, __: gather_rows(t, ranks), 0.3, low),
        }
        seconds: dict[str, list[float]] = {name: [] for name in chosen}
        sent: dict[str, int] = {}
        for number in range(rounds + 1):
            for name, (loss, positive, (first, last)) in chosen.items():
                images, texts = (x[:n].clone().requires_grad_() for x in pairs(n + rank, dimension, positive))
                temperature = torch.linspace(first, last, n)
                dist.barrier()
                before, begin = _sent(), time.process_time()
                value = loss(images, texts, temperature)
                if value.requires_grad:
                    value.backward()
                if number:
                    seconds[name].append(time.process_time() - begin)
                sent[name] = _sent() - before
        clip_name = next(iter(chosen))
        for name in chosen:
            ratio = statistics.median(a / b for a, b in zip(seconds[name], seconds[clip_name]))
            share = sent[name] / sent[clip_name]
            rows.append([n, "yes" if local else "no", name, statistics.median(seconds[name]), ratio, sent[name], share])
    if rank == 0:
        for row in rows:
            print("| " + " | ".join(f"{x:.3f}" if isinstance(x, float) else str(x) for x in row) + " |", flush=True)
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # gloo's threads now and then abort an interpreter that shuts down in order


def measure_on_ranks(ranks: int, sizes: list[int], dimension: int, rounds: int) -> None:
    """With ``gather_with_grad``: seconds, their ratio to ClipLoss's, bytes that a rank sends, and their ratio."""
    columns = ("n per rank", "local_loss", "loss", "seconds", "to ClipLoss", "bytes sent", "to ClipLoss")
    print("| " + " | ".join(columns) + " |\n" + "| --- " * len(columns) + "|", flush=True)
    for n in sizes:
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_on_rank, (ranks, f"{folder}/meeting", n, dimension, rounds), nprocs=ranks)


COLUMNS = ("n", "loss", "seconds", "to ClipLoss", "to explicit max-margin", "to three products", "megabytes")


def _line(row: dict[str, object]) -> str:
    cells = [f"{row[c]:.3f}" if isinstance(row.get(c), float) else str(row.get(c, "")) for c in COLUMNS]
    return "| " + " | ".join(cells) + " |"


def plot(rows: list[dict[str, object]], path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.5), layout="constrained")
    for name in dict.fromkeys(str(row["loss"]) for row in rows):
        style = "--" if name.endswith(("(OpenCLIP)", "explicit", "products")) else "-"
        mine = [row for row in rows if row["loss"] == name]
        (line,) = left.plot([r["n"] for r in mine], [r["seconds"] for r in mine], style + "o", label=name, markersize=4)
        if "megabytes" in mine[0]:
            memory = [r["megabytes"] for r in mine]
            right.plot([r["n"] for r in mine], memory, style + "o", color=line.get_color(), markersize=4)
    left.set(
        xscale="log", yscale="log", xlabel="batch size N", ylabel="CPU seconds, forward and backward", title="Time"
    )
    right.set(xscale="log", yscale="log", xlabel="batch size N", ylabel="MiB beyond the inputs", title="Memory")
    for axes in (left, right):
        ticks = sorted({int(row["n"]) for row in rows})  # type: ignore[call-overload]
        axes.set_xticks(ticks, [f"{t:,}" for t in ticks], rotation=45)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    left.legend(fontsize=8)
    figure.savefig(path, dpi=150)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[256, 512, 1024, 2048, 4096], metavar="N")
    parser.add_argument("--dimension", type=int, default=512)
    parser.add_argument(
        "--rounds",
        type=int,
        default=5,
        help="counted rounds after one warm-up (default: 5); 0 takes the time of the one run that counts memory",
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--ranks", type=int, default=1, help="gloo processes of one thread each; the sizes are theirs")
    parser.add_argument("--only", choices=("all", "ours"), default="all")
    parser.add_argument(
        "--limit-gb", type=float, default=8, help="leave out what needs more than this for its N x N matrices"
    )
    parser.add_argument("--append", type=Path, help="rows of an earlier .json to plot and tabulate along")
    parser.add_argument("--output", type=Path, help="write OUTPUT.json, OUTPUT.md and OUTPUT.png")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.ranks > 1:
        measure_on_ranks(args.ranks, args.sizes, args.dimension, args.rounds)
        return
    print("| " + " | ".join(COLUMNS) + " |\n" + "| --- " * len(COLUMNS) + "|")
    rows = json.loads(args.append.read_text())["rows"] if args.append else []
    rows += measure(args.sizes, args.dimension, args.rounds, args.only, args.limit_gb)
    rows.sort(key=lambda row: int(row["n"]))
    if args.output:
        machine = {"machine": platform.machine(), "torch": torch.__version__, "threads": args.threads}
        args.output.with_suffix(".json").write_text(json.dumps({**machine, "rows": rows}, indent=1))
        table = ["| " + " | ".join(COLUMNS) + " |", "| --- " * len(COLUMNS) + "|", *map(_line, rows)]
        args.output.with_suffix(".md").write_text("\n".join(table) + "\n")
        plot(rows, args.output.with_suffix(".png"))


if __name__ == "__main__":
    main()
