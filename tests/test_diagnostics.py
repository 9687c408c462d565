"""What a run shows: batch statistics against their definitions, reports in steps and in the file."""

from __future__ import annotations

import json
import math
import os

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from ranks import on_ranks
from resolving import INFONCE, MAX_MARGIN, resolve

from mmts_plugins.diagnostics import Diagnostics, Meter, batch_statistics
from mmts_plugins.functional import info_nce, max_margin
from mmts_plugins.schedule import CosineSchedule
from mmts_plugins.tables import ClusterTable
from mmts_plugins.temperature import Temperatures


def features(n: int = 300, dim: int = 16, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(n, dim, generator=generator, dtype=torch.float64)
    texts = images + 0.5 * torch.randn(n, dim, generator=generator, dtype=torch.float64) + 0.3
    return F.normalize(images, dim=1), F.normalize(texts, dim=1)


def defined(images: torch.Tensor, texts: torch.Tensor, tau: torch.Tensor) -> dict[str, float]:
    """The definitions, an anchor or a pair at a time."""
    scores, n = (images @ texts.T).numpy(), len(images)
    off = ~np.eye(n, dtype=bool)
    gaussian = [np.exp(-2 * torch.cdist(rows, rows).numpy() ** 2)[off].mean() for rows in (images, texts)]
    logs = []
    for i in range(n):
        row, column = np.delete(scores[i], i), np.delete(scores[:, i], i)
        negative = np.exp(row / tau[i].item()).sum() + np.exp(column / tau[i].item()).sum()
        logs.append(scores[i, i] / tau[i].item() - math.log(negative))
    return {
        "positive_similarity": scores.diagonal().mean(),
        "negative_similarity": scores[off].mean(),
        "similarity_gap": scores.diagonal().mean() - scores[off].mean(),
        "alignment": ((images - texts) ** 2).sum(1).mean().item(),
        "uniformity": np.log(gaussian).mean(),
        "modality_gap": (images.mean(0) - texts.mean(0)).norm().item(),
        "equilibrium": math.exp(np.mean(logs)),
    }


@pytest.mark.parametrize("kind", [INFONCE, MAX_MARGIN])
def test_statistics_equal_their_definitions(kind):
    images, texts = features()
    tau = torch.linspace(0.05, 0.3, len(images), dtype=torch.float64)
    third = torch.arange(len(images)) % 3
    found = batch_statistics(kind, 3 * images, 0.2 * texts, tau, third)
    expected = defined(images, texts, tau)
    if kind == MAX_MARGIN:
        assert "equilibrium" not in found
        del expected["equilibrium"]
    for name, value in expected.items():
        assert found[name].item() == pytest.approx(value, abs=1e-9), name
    # Every third has as many anchors, so the mean of their losses is the loss.
    mean = torch.stack([found[f"loss_{name}"] for name in ("head", "middle", "tail")]).mean()
    loss = info_nce if kind == INFONCE else max_margin
    assert mean.item() == pytest.approx(loss(images, texts, tau).item(), abs=1e-9)


def test_an_anchor_counts_to_its_own_third():
    images, texts = features(12)
    tau = torch.full((12,), 0.1, dtype=torch.float64)
    third = torch.tensor([0] * 5 + [2] * 7)
    found = batch_statistics(INFONCE, images, texts, tau, third)
    logits = images @ texts.T / 0.1
    each = (F.cross_entropy(logits, torch.arange(12), reduction="none")
            + F.cross_entropy(logits.T, torch.arange(12), reduction="none")) / 2  # fmt: skip
    assert found["loss_head"].item() == pytest.approx(each[:5].mean().item(), abs=1e-12)
    assert found["loss_tail"].item() == pytest.approx(each[5:].mean().item(), abs=1e-12)
    assert math.isnan(found["loss_middle"])


def _on_rank(rank: int, world_size: int) -> dict[str, float]:
    images, texts = features(64)
    rows = slice(rank * 64 // world_size, (rank + 1) * 64 // world_size)
    tau, third = torch.full((64,), 0.1, dtype=torch.float64), torch.arange(64) % 3
    found = batch_statistics(INFONCE, images[rows], texts[rows], tau[rows], third[rows], rank, world_size)
    return {name: value.item() for name, value in found.items()}


def test_two_ranks_measure_the_whole_batch():
    one = _on_rank(0, 1)
    two = on_ranks(2, _on_rank)
    for name in ("positive_similarity", "negative_similarity", "uniformity", "modality_gap"):
        assert [ranked[name] for ranked in two] == pytest.approx([one[name]] * 2, abs=1e-12)
    assert math.prod(ranked["equilibrium"] for ranked in two) ** 0.5 == pytest.approx(one["equilibrium"], rel=1e-12)


def tau(kind: str = INFONCE, **flags) -> Temperatures:
    table = ClusterTable.build(
        [str(i) for i in range(9)], [0, 0, 0, 1, 1, 1, 2, 2, 2], [90, 90, 90, 30, 30, 30, 3, 3, 3]
    )
    given = {"loss": kind, "mmts_clusters": "table.parquet", **flags}
    return Temperatures(resolve(given), table, np.array([3.0, 30.0, 90.0]), 100, torch.device("cpu"))


def test_thirds_are_told_by_the_shift():
    run = tau()
    assert run.third(run.shift(torch.tensor([2, 1, 0, 0]))).tolist() == [0, 1, 2, 2]
    alone = tau(mmts_no_shifts=True)
    assert alone.third(alone.shift(torch.tensor([0, 1]))).tolist() == [1, 1]


def test_meter_reads_what_was_seen_and_starts_anew():
    # Frequencies 90, 30 and 3 of three samples each: under clip-cc3m 0.10, 0.05 + 27/87 * 0.05 and 0.05.
    run, meter = tau(), Meter()
    run.step = 30
    base, middle = 0.02 * math.cos(2 * math.pi * 30 / 20), 0.05 + 0.05 * 27 / 87
    shift = run.shift(torch.tensor([2, 1, 0, 3]))
    meter.update(shift[:2], torch.tensor([False, False]))
    meter.update(shift[2:], torch.tensor([False, True]))
    assert base == -0.02
    assert meter.read(run) == pytest.approx(
        {
            "tau_base": base,
            "tau_mean": base + (0.10 + middle + 0.05 + 0.05) / 4,
            "tau_min": base + 0.05,
            "tau_max": base + 0.10,
            "tau_head": base + 0.10,
            "tau_middle": base + middle,
            "tau_tail": base + 0.05,
            "hit_rate": 0.75,
            "phase": 0.5,
            "scale_mean": 1 / (base + (0.10 + middle + 0.05 + 0.05) / 4),
        },
        abs=1e-12,
    )
    meter.update(shift[:1], torch.tensor([False]))
    again = meter.read(run)
    assert again["hit_rate"] == 1
    of_now = {"mean": 0.10, "min": 0.10, "max": 0.10, "head": 0.10, "middle": middle, "tail": 0.05}
    assert {name: again[f"tau_{name}"] - base for name in of_now} == pytest.approx(of_now, abs=1e-12)


@pytest.mark.parametrize(
    ("missing", "expected"), [("tail", 0.05), ("error", 0.05), ("mean", (0.10 + 0.05 + 27 / 87 * 0.05 + 0.05) / 3)]
)
def test_what_an_absent_caption_gets(missing, expected):
    run = tau(mmts_missing=missing)
    assert run.shift(torch.tensor([run.missing])).item() == pytest.approx(expected, abs=1e-12)
    assert run.mean_shift == pytest.approx((0.10 + 0.05 + 27 / 87 * 0.05 + 0.05) / 3, abs=1e-12)


def test_schedule_at_known_steps():
    schedule = CosineSchedule(0.04, 20)
    assert [schedule.phase(step) for step in (0, 5, 10, 15, 20, 25)] == [0, 0.25, 0.5, 0.75, 0, 0.25]
    offsets = [schedule.offset(step) for step in (0, 5, 10, 15, 20, 40)]
    assert offsets == pytest.approx([0.02, 0, -0.02, 0, 0.02, 0.02], abs=1e-15)


@pytest.mark.parametrize("step", [0, 10, 5])
def test_thirds_are_told_at_any_base(step, tmp_path):
    """Losses of head, middle and tail, each of anchors that differ."""
    run = tau(mmts_diagnostics_every=5)
    run.step = step
    assert run.base == pytest.approx(0.02 * math.cos(2 * math.pi * step / 20))
    images, texts = features(9, seed=3)
    temperature = run.shift(torch.tensor([2, 2, 2, 1, 1, 1, 0, 0, 3])) + run.base
    Diagnostics(run, None, tmp_path / "mmts.jsonl").watch(images, texts, temperature)
    found = json.loads((tmp_path / "mmts.jsonl").read_text())
    logits = images @ texts.T / temperature[:, None]
    columns = texts @ images.T / temperature[:, None]
    each = sum(F.cross_entropy(rows, torch.arange(9), reduction="none") for rows in (logits, columns)) / 2
    for name, rows in (("head", slice(0, 3)), ("middle", slice(3, 6)), ("tail", slice(6, 9))):
        assert found[f"loss_{name}"] == pytest.approx(each[rows].mean().item(), abs=1e-7)
    assert len({round(found[f"loss_{name}"], 4) for name in ("head", "middle", "tail")}) == 3


def test_reports_go_to_the_log_and_the_file(tmp_path):
    run, seen = tau(mmts_diagnostics_every=10), []
    live = Diagnostics(run, lambda values, step: seen.append((step, values)), tmp_path / "mmts.jsonl")
    images, texts = features(9)
    for step in (0, 5, 10, 10, 11):
        run.step = step
        live.watch(images, texts, run.shift(torch.arange(9) // 3) + run.base)
    assert [step for step, _ in seen] == [0, 10]
    lines = [json.loads(line) for line in (tmp_path / "mmts.jsonl").read_text().splitlines()]
    assert [(line["step"], line["total_steps"]) for line in lines] == [(0, 100), (10, 100)]
    assert lines[0]["loss_head"] == pytest.approx(seen[0][1]["loss_head"], abs=1e-7)
    live.report({"tau_base": 0.5, "loss_middle": math.nan})
    assert json.loads((tmp_path / "mmts.jsonl").read_text().splitlines()[-1]) == {
        "step": 11,
        "total_steps": 100,
        "tau_base": 0.5,
    }


def test_other_ranks_are_quiet_and_zero_measures_nothing(tmp_path):
    run = tau()
    Diagnostics(run, None, tmp_path / "other.jsonl", rank=1).report({"tau_base": 0.1})
    off = tau(mmts_diagnostics_every=0)
    Diagnostics(off, None, tmp_path / "off.jsonl").watch(*features(9), torch.full((9,), 0.1))
    assert not list(tmp_path.iterdir())


def written(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_a_torn_line_swallows_nothing(tmp_path):
    """A killed run leaves half a line, or none at all, or one without its end."""
    path, run = tmp_path / "mmts.jsonl", tau()
    line = '{"step": 7, "total_steps": 100, "tau_base": 0.25}'
    for left in ("", line + "\n", line, line[:20], line + "\n" + line[:-1]):
        path.write_text(left)
        Diagnostics(run, None, path).report({"tau_base": 0.5})
        Diagnostics(run, None, path).report({"tau_base": 0.75})
        lines = path.read_text().splitlines()
        assert [json.loads(each)["tau_base"] for each in lines[-2:]] == [0.5, 0.75]
        assert lines[:-2] == left.splitlines()


def test_a_log_that_cannot_be_written_does_not_end_the_run(tmp_path, caplog):
    path, run, shown = tmp_path / "mmts.jsonl", tau(), []
    live = Diagnostics(run, lambda values, step: shown.append(step), path)
    live.report({"tau_base": 0.1})
    path.rename(tmp_path / "kept")
    path.mkdir()  # stands for a full or read-only disk, which the superuser of a test machine does not meet
    for run.step in (1, 2, 3):
        live.report({"tau_base": 0.1})
    (warning,) = caplog.messages
    assert warning.startswith(
        f"MM-TS: {path}: cannot be written: Is a directory. Training goes on; the values from step 1"
    )
    path.rmdir()
    for run.step in (4, 5):
        live.report({"tau_base": 0.1})
    assert caplog.messages[1:] == [f"MM-TS: {path}: written again; 3 lines are missing"]
    assert shown == [0, 1, 2, 3, 4, 5]
    assert [line["step"] for line in written(path)] == [4, 5]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full")
def test_a_full_disk(tmp_path, caplog):
    (tmp_path / "mmts.jsonl").symlink_to("/dev/full")
    Diagnostics(tau(), None, tmp_path / "mmts.jsonl").report({"tau_base": 0.1})
    assert "cannot be written: No space left on device" in caplog.text


def test_schedules_that_hardly_move_are_told():
    def said(**flags) -> list[str]:
        return tau(**flags).warnings()

    assert said() == said(mmts_period=2) == said(mmts_period=200) == said(mmts_alpha=0, mmts_period=1) == []
    names = " (--mmts-period, --mmts-num-oscillations)"
    assert said(mmts_num_oscillations=100) == [f"a period of 1 steps: fewer than two steps see no cosine{names}"]
    assert said(mmts_period=400) == [f"the run of 100 steps sees 25.0% of a period{names}"]
    still = "nothing is scheduled: every sample gets 0.075 at every step"
    assert said(mmts_no_shifts=True) == said(mmts_no_schedule=True) == []
    assert said(mmts_no_shifts=True, mmts_no_schedule=True) == said(mmts_no_shifts=True, mmts_alpha=0) == [still]
    assert said(mmts_alpha=0, mmts_shift_min=0.075, mmts_shift_max=0.075) == [still]
    alike = ClusterTable.build(["a", "b"], [0, 1], [5, 5])
    given = resolve({"loss": INFONCE, "mmts_clusters": "t"})
    run = Temperatures(given, alike, np.array([5.0]), 100, torch.device("cpu"))
    assert run.warnings() == ["the table knows one frequency: every sample has the shift 0.075"]
