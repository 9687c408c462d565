"""``mmts schedule``, ``mmts plot schedule`` and ``mmts report``: numbers, pages, and what they refuse."""

from __future__ import annotations

import csv
import html
import json
import math
import os
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Data, openclip_flags, run_python
from pages import assert_self_contained

from mmts_plugins.adapters import avion
from mmts_plugins.cli import main
from mmts_plugins.config import Config
from mmts_plugins.errors import ConfigError, MMTSError
from mmts_plugins.options import split_flags
from mmts_plugins.presets import presets
from mmts_plugins.preview import Preview, adapter_of, named_table
from mmts_plugins.record import record, write_record
from mmts_plugins.report import concepts, logs, plots, run, schedule, table
from mmts_plugins.report.page import escaped, slugs
from mmts_plugins.tables import ClusterTable
from mmts_plugins.temperature import Temperatures

pytest.importorskip("matplotlib")

TAIL = 0.03  # the lowest temperature of the preset clip-cc3m
NOUNS = [f"noun{letter}" for letter in "abcdefgh"]


def long_tail(path: Path, **info: Any) -> ClusterTable:
    """320 samples in 8 clusters, each named by its own word; some captions occur several times."""
    keys, cluster, count = [], [], []
    for place, word in enumerate(NOUNS):
        for number in range(24 - 2 * place):
            keys.append(f"take the {word} from shelf {'abcdefghijklmnopqrstuvwxyz'[number]}x <script>{number}</script>")
            cluster.append(place)
            count.append(2 if number < 8 else 1)
    sizes = np.bincount(cluster, weights=count)
    made = ClusterTable.build(keys, cluster, sizes[cluster], count, info=info)
    made.save(path)
    return ClusterTable.load(path)


# --- where a run's temperatures go ------------------------------------------------------------------------------------


def test_a_plan_gives_the_temperatures_of_the_run(data: Data) -> None:
    found = ClusterTable.load(data.table)
    config = Config("mmts-infonce", 0.04, 0.05, 0.10, str(data.table))
    tau = Temperatures(config, found, found.frequency, 100, torch.device("cpu"))
    preview = Preview(vars(config), 100, found)
    assert preview.shifts["head"] == pytest.approx(tau.head_shift)
    assert preview.shifts["tail"] == pytest.approx(tau.tail_shift)
    assert (preview.shifts["rarest"], preview.shifts["most common"]) == pytest.approx((0.05, 0.10))
    assert list(preview.shifts.values()) == sorted(preview.shifts.values())
    steps = np.arange(100)
    assert preview.base(steps) == pytest.approx([tau.schedule.offset(step) for step in range(100)])
    assert preview.extremes == {"start": 0, "trough": 10, "peak": 20, "end": 99}


@pytest.mark.parametrize("total", [1, 2, 3, 12])
def test_extremes_lie_inside_short_runs(total: int) -> None:
    preview = Preview.of_preset("clip-cc3m", total)
    base = preview.base(np.arange(total))
    assert preview.extremes["end"] == total - 1
    assert base[preview.extremes["trough"]] == pytest.approx(base.min())
    assert preview.extremes["trough"] <= preview.extremes["peak"] < total


def test_a_plan_may_break_a_guard_and_says_so() -> None:
    assert Preview.of_preset("clip-cc3m", 10).problem is None
    broken = Preview.of_preset("clip-cc3m", 10, alpha=0.1)
    assert broken.problem is not None
    assert "must stay above zero" in broken.problem
    with pytest.raises(ConfigError, match="at least one optimizer step"):
        Preview.of_preset("clip-cc3m", 0)
    with pytest.raises(ConfigError, match="unknown preset 'clip'"):
        Preview.of_preset("clip", 10)


def test_schedule_counts_as_the_host_would(tmp_path: Path) -> None:
    counts = tmp_path / "counts.csv"
    counts.write_text("class_id,count\n0,30\n1,5\n")
    flags = split_flags(["--loss", "mmts", "--mmts-clusters", str(counts)])[0]
    found = adapter_of("avion").resolve(flags).table
    assert found is not None
    assert found.content_hash == avion.load_classes(str(counts)).content_hash


def test_a_warning_is_printed_once() -> None:
    given = ("schedule", "--host", "openclip", "--total-steps", "100", "--mmts-no-shifts", "--mmts-alpha", "0.14")
    said = run_python("-m", "mmts_plugins", *given).stdout
    assert said.count("a logit scale of 200") == 1


def test_schedule_prints_config_and_extremes(data: Data, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--host", "openclip", "--total-steps", "1000", "--mmts-clusters", str(data.table)]) == 0
    lines = {line.split()[0]: line.split()[1:] for line in capsys.readouterr().out.splitlines() if line}
    assert lines["loss"] == ["mmts-infonce"]
    assert lines["period"][:2] == ["200", "steps:"]
    assert lines["6"] == ["captions", "in", "4", "clusters,", "48", "samples"]
    assert [lines["trough"][0], lines["trough"][1], lines["trough"][2]] == ["100", "-0.0200", f"{TAIL:.4f}"]
    assert [lines["peak"][0], lines["peak"][-1]] == ["200", "0.1200"]


def test_schedule_counts_classes_and_warns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    metadata = tmp_path / "train.csv"
    metadata.write_text("narration_id,verb_class,noun_class\na,0,3\nb,0,3\nc,1,4\n")
    asked = ["schedule", "--host", "avion", "--total-steps", "10", "--train-metadata", str(metadata)]
    assert main([*asked, "--mmts-distribution", "verb_noun", "--loss", "mmts-infonce", "--mmts-preset",
                 "avion-max-margin"]) == 0  # fmt: skip
    out = capsys.readouterr().out
    assert "2 classes in 2 clusters, 3 samples" in out
    assert "warning: preset avion-max-margin was chosen for mmts-max-margin" in out


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--host", "openclip", "--mmts-clusters", "gone.parquet"], "gone.parquet: no such cluster table"),
        (["--host", "openclip"], "needs the cluster table"),
        (["--host", "openclip", "--mmts-no-shifts", "--mmts-alpha", "0.2"], "must stay above zero"),
        (["--host", "openclip", "--mmts-no-shifts", "--mmts-distribution", "noun"], "is for AVION"),
        (["--host", "openclip", "--mmts-no-shifts", "--train-metadata", "x.csv"], "OpenCLIP counts no classes"),
        (["--host", "avion", "--train-metadata", "x.csv"], "x.csv: cannot be read"),
        (
            ["--host", "clip", "--mmts-no-shifts"],
            "no adapter; choose from avion, avion-pretraining, gram, lightning, openclip, sentence-transformers, "
            "transformers, vast",
        ),
    ],
)
def test_schedule_refuses(argv: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["schedule", "--total-steps", "10", *argv]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_schedule_refuses_a_table_of_classes_for_openclip(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "classes.parquet"
    ClusterTable.build(["0", "1"], [0, 1], [3, 4], kind="class").save(path)
    assert main(["schedule", "--host", "openclip", "--total-steps", "9", "--mmts-clusters", str(path)]) == 2
    assert "samples are found by caption" in capsys.readouterr().err


def test_a_recorded_table_is_taken_only_if_it_is_the_runs(tmp_path: Path) -> None:
    made = long_tail(tmp_path / "clusters.parquet")
    beside = tmp_path / "logs" / "run" / "checkpoints" / "mmts.yaml"
    found, why = named_table({"clusters": "clusters.parquet", "table_hash": made.content_hash}, beside)
    assert found is not None
    assert (found.content_hash, why) == (made.content_hash, "")
    found, why = named_table({"clusters": "clusters.parquet", "table_hash": "other"}, beside)
    assert found is None
    assert "another content hash" in why
    assert named_table({"clusters": "gone.parquet"}, beside) == (None, "gone.parquet is not found from here")


# --- mmts plot schedule -----------------------------------------------------------------------------------------------


def drawn(preview: Preview, draw: Any) -> list[Any]:
    _, (axes,) = plots.new_figure(3)
    draw(axes, preview)
    return list(axes.get_lines())


def test_plot_schedule_writes_a_picture_and_says_what_it_shows(
    data: Data, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "new" / "s.png"
    saved = tmp_path / "mmts.yaml"
    write_record(
        saved, record(Config("mmts-max-margin", 0.2, 0.17, 0.3, str(data.table)), 70, None, "AVION", "checkout")
    )
    assert main(["plot", "schedule", "--preset", "clip-cc3m", "--config", str(saved), "-o", str(out)]) == 0
    said = capsys.readouterr().out
    assert "clip-cc3m: temperature 0.03 (rarest, at the lowest) to 0.12 (most common, at the highest)" in said
    assert f"weighs {math.exp(-0.1 / 0.03):.1%} of it at the lowest, {math.exp(-0.1 / 0.12):.1%} at the highest" in said
    assert f"{saved}: margin 0.07" in said
    assert f"Written to {out}" in said
    assert out.read_bytes().startswith(b"\x89PNG")


def test_plot_schedule_takes_a_configs_own_length_and_table(data: Data, tmp_path: Path) -> None:
    saved = tmp_path / "mmts.yaml"
    write_record(
        saved, record(Config("mmts-infonce", 0.04, 0.05, 0.1, str(data.table)), 70, None, "open_clip_torch", "3.3.0")
    )
    (preview,) = schedule.previews([], [str(saved)], None, None, {}, 1000)
    assert preview.total_steps == 70
    assert preview.schedule.period == 14
    assert "head" in preview.shifts
    (preview,) = schedule.previews([], [str(saved)], None, 100, {"period": 50.0, "alpha": 0.02}, 1000)
    assert (preview.total_steps, preview.schedule.period, preview.schedule.alpha) == (100, 50, 0.02)


def test_values_that_break_a_guard_are_marked() -> None:
    preview = Preview.of_preset("clip-cc3m", 100, alpha=0.12)
    red = [
        line for line in drawn(preview, schedule.draw_run) if line.get_color() == plots.FORBIDDEN and line.get_alpha()
    ]
    marked = np.concatenate([line.get_ydata() for line in red])
    expected = np.concatenate([preview.base(np.arange(100)) + shift for shift in preview.shifts.values()])
    assert np.sort(marked[~np.isnan(marked)]) == pytest.approx(np.sort(expected[expected <= 0]))
    assert (expected <= 0).any()
    assert "A run refuses this: the lowest temperature of the run is -0.01" in schedule.say(preview)
    calm = drawn(Preview.of_preset("clip-cc3m", 100), schedule.draw_run)
    assert all(np.isnan(line.get_ydata()).all() for line in calm if line.get_color() == plots.FORBIDDEN)


def test_weights_of_negatives_are_the_losses_own() -> None:
    similarity = torch.tensor([0.9, 0.3, 0.25, -0.1], dtype=torch.float64)  # of the positive, and of three negatives
    for line in drawn(Preview.of_preset("clip-cc3m", 100), schedule.draw_weights):
        tau = float(line.get_label().rsplit(" ", 1)[1])
        scores = similarity.clone().requires_grad_()
        torch.nn.functional.cross_entropy((scores / tau)[None], torch.tensor([0])).backward()
        weight = scores.grad[2] / scores.grad[1]
        assert np.interp(-0.05, *line.get_data()) == pytest.approx(weight.item(), rel=1e-3)
    steps = drawn(Preview.of_preset("avion-max-margin", 100), schedule.draw_weights)
    for line in steps:
        gap, weight = line.get_data()
        assert gap[weight > 0].min() == pytest.approx(-float(line.get_label().rsplit(" ", 1)[1]), abs=1e-3)
    assert len(steps) == 4


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--preset", "clip"], "unknown preset 'clip'"),
        (["-o", "schedule.pdf"], "names a .png file"),
        (["--period", "3", "--num-oscillations", "4"], "not both"),
        (["--alpha", "nan"], "alpha is nan"),
        (["--table", "gone.parquet"], "gone.parquet: no such cluster table"),
        (["--config", "gone.yaml"], "gone.yaml: cannot read"),
        (["--total-steps", "0"], "at least one optimizer step"),
        (["--total-steps", "9" * 400], "--total-steps is <a whole number of"),
        (["--shift-min", "nan"], "--shift-min is nan: it must be a finite number"),
        (["--shift-max", "1e300"], "--shift-max is 1e+300: it must be at most 10000"),
        (["--period", "1e-9"], "--period is 1e-09: it must be 1e-06 or above"),
    ],
)
def test_plot_schedule_refuses(
    argv: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["plot", "schedule", *argv]) == 2
    assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_plot_schedule_draws_every_panel(data: Data, tmp_path: Path, figures: dict[str, Any]) -> None:
    changes = ["--shift-min", "0.06", "--shift-max", "0.2", "--alpha", "0.1", "--num-oscillations", "2"]
    argv = ["plot", "schedule", "--preset", "clip-cc3m", "vast-clip", "--total-steps", "41", *changes]
    assert main([*argv, "-o", str(tmp_path / "s.png")]) == 0
    axes = figures["s.png"].axes
    assert len(axes) == 6
    base = 0.05 * np.cos(2 * np.pi * np.arange(41) / 20.5)
    for panel in axes:
        lines = {line.get_label(): line for line in panel.get_lines()}
        if panel.get_ylabel() == "base":
            assert next(iter(panel.get_lines())).get_ydata() == pytest.approx(base)
        elif panel.get_ylabel() == "temperature":
            assert lines["rarest"].get_ydata() == pytest.approx(base + 0.06)
            assert lines["most common"].get_ydata() == pytest.approx(base + 0.2)
        else:
            assert set(lines) == {"rarest, lowest: 0.01", "rarest, highest: 0.11", "most common, lowest: 0.15",
                                  "most common, highest: 0.25"}  # fmt: skip
    assert sorted(panel.get_ylabel() for panel in axes) == [
        "base", "base", "temperature", "temperature", *["weight relative to the hardest"] * 2]  # fmt: skip
    titles = [part._suptitle.get_text() for part in figures["s.png"].subfigs]
    assert titles == [f"{name}: mmts-infonce, alpha 0.1, shifts 0.06 to 0.2" for name in ("clip-cc3m", "vast-clip")]


def test_somebodys_style_changes_nothing(tmp_path: Path) -> None:
    """A matplotlibrc that sets type with TeX, which is not installed, or that is huge."""
    import matplotlib

    argv = ["plot", "schedule", "-o", str(tmp_path / "s.png")]
    assert main(argv) == 0
    before = (tmp_path / "s.png").read_bytes()
    with matplotlib.rc_context({"text.usetex": True, "font.size": 40, "axes.facecolor": "black"}):
        assert main(argv) == 0
        assert matplotlib.rcParams["font.size"] == 40
    assert (tmp_path / "s.png").read_bytes() == before


# --- mmts report TABLE ------------------------------------------------------------------------------------------------


def report(*argv: object) -> int:
    return main(["report", *map(str, argv)])


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def text_of(folder: Path) -> str:
    """The page's text as a reader sees it."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page_of(folder).split("<body>")[1])).split())


def test_report_of_a_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = long_tail(tmp_path / "t.parquet", source="train.tsv")
    out = tmp_path / "out"
    assert report(tmp_path / "t.parquet", "-o", out) == 0
    assert f"Written to {out / 'report.html'}" in capsys.readouterr().out
    assert_self_contained(page_of(out), pictures=2)
    assert "<script>" not in page_of(out)
    text = text_of(out)
    assert "most common, rarest 32 and 18 samples" in text
    assert "Not measured." in text
    assert "mmts stability train.tsv --runs 20" in text
    assert "64 of 200 samples (32.0%) repeat an earlier caption" in text
    assert "#1: nouna" in text
    assert "#8: nounh" in text
    assert made.content_hash in text
    rows = list(csv.DictReader((out / "clusters.csv").open(encoding="utf-8")))
    sizes = made.sizes
    for row, size in zip(rows, sizes):
        shift = 0.05 + (size - sizes.min()) / (sizes.max() - sizes.min()) * 0.05
        assert float(row["shift"]) == pytest.approx(shift, abs=1e-6)
        assert float(row["highest"]) - float(row["lowest"]) == pytest.approx(presets()["clip-cc3m"].alpha)
        assert int(row["samples"]) == size
        assert row["words"].split()[0] == NOUNS[int(row["cluster"])]
    assert len(rows) == 8


def cells_of(page: str, after: str) -> list[list[str]]:
    """The rows of the first table behind ``after``."""
    body = page.split(after)[1].split("<tbody>")[1].split("</tbody>")[0]
    return [[html.unescape(cell) for cell in re.findall("<td>(.*?)</td>", row)] for row in body.split("</tr>")[:-1]]


@pytest.fixture
def figures(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Every figure that is written, by the name of its file."""
    kept: dict[str, Any] = {}
    for module in (run, table, schedule):
        monkeypatch.setattr(module, "save", lambda figure, path: (kept.update({path.name: figure}),
                                                                  plots.save(figure, path)))  # fmt: skip
    return kept


def test_report_of_a_table_that_can_be_reckoned_by_hand(tmp_path: Path, figures: dict[str, Any]) -> None:
    """100 samples in clusters of 40, 30, 20 and 10; a third is 33 1/3 of them. Cluster 7 is the most common."""
    keys, cluster, count = [], [], []
    for size, number in ((10, 2), (40, 7), (20, 0), (30, 5)):  # one caption of all but one sample, and one of one
        keys += [f"word{number} often", f"word{number} once"]
        cluster += [number, number]
        count += [size - 1, 1]
    sizes = np.bincount(cluster, weights=count)
    ClusterTable.build(keys, cluster, sizes[cluster], count).save(tmp_path / "t.parquet")
    out = tmp_path / "out"
    assert report(tmp_path / "t.parquet", "-o", out) == 0
    page = page_of(out)
    assert cells_of(page, "<h1>") == [
        ["samples", "100"], ["distinct captions", "8"], ["clusters", "4"],
        ["most common, rarest", "40 and 10 samples"], ["imbalance", "4 to 1"],
        ["half of the samples", "in the 2 most common (50%)"],
    ]  # fmt: skip
    # Means of thirds: 40; 6 2/3 of 40 and 26 2/3 of 30; 3 1/3 of 30, 20 of 20 and 10 of 10.
    assert cells_of(page, "Shift and temperature") == [
        ["most common", "40", "0.1000", "0.0800", "0.1200"],
        ["head third", "40", "0.1000", "0.0800", "0.1200"],
        ["middle third", "32", "0.0867", "0.0667", "0.1067"],
        ["tail third", "18", "0.0633", "0.0433", "0.0833"],
        ["rarest", "10", "0.0500", "0.0300", "0.0700"],
    ]
    assert "shifts 0.05 to 0.1 (Eq. 6), alpha 0.04: every temperature moves by 0.02 up and down" in page
    assert re.findall("<h3>(.*?)</h3>", page) == [
        f"#{place}: word{number}, often, once" for place, number in enumerate((7, 5, 0, 2), 1)]  # fmt: skip
    assert "40 samples, frequency 40; shift 0.1000, temperature 0.0800 to 0.1200" in page
    assert "10 samples, frequency 10; shift 0.0500, temperature 0.0300 to 0.0700" in page
    assert "92 of 100 samples (92.0%) repeat an earlier caption; 4 captions occur more than once." in page
    assert cells_of(page, "repeat an earlier caption") == [
        ["word7 often", "39"], ["word5 often", "29"], ["word0 often", "19"], ["word2 often", "9"]]  # fmt: skip
    assert list(csv.reader((out / "clusters.csv").open(encoding="utf-8"))) == [
        ["cluster", "frequency", "samples", "keys", "shift", "lowest", "highest", "words"],
        ["7", "40", "40", "2", "0.100000", "0.080000", "0.120000", "word7 often once"],
        ["5", "30", "30", "2", "0.083333", "0.063333", "0.103333", "word5 often once"],
        ["0", "20", "20", "2", "0.066667", "0.046667", "0.086667", "word0 often once"],
        ["2", "10", "10", "2", "0.050000", "0.030000", "0.070000", "word2 often once"],
    ]
    text = html.unescape(page)
    assert "40 samples for the most common of 4 clusters down to 10; the most common third of them hold 70%" in text
    assert ("shift 0.100 for the most common samples, 0.083 for the median one, 0.050 for the rarest, each moving by "
            "0.02 up and down") in text  # fmt: skip
    top, bottom = figures["long_tail.png"].axes
    steps = top.collections[0].get_paths()[0].vertices
    assert {tuple(point) for point in steps} >= {(0.5, 40), (1.5, 40), (1.5, 30), (2.5, 20), (3.5, 10), (4.5, 10)}
    assert bottom.get_lines()[0].get_xydata().tolist() == [[0, 0], [25, 40], [50, 70], [75, 90], [100, 100]]
    line = figures["temperatures.png"].axes[0].get_lines()[0]
    assert np.interp([10, 50, 80, 95], *line.get_data()) == pytest.approx([0.1, 0.25 / 3, 0.2 / 3, 0.05])
    band = figures["temperatures.png"].axes[0].collections[0].get_paths()[0].vertices
    assert (band[:, 1].min(), band[:, 1].max()) == pytest.approx((0.03, 0.12))


def test_frequencies_of_several_clusterings_are_means_over_samples() -> None:
    made = ClusterTable.build(["a", "b", "c"], [4, 1, 4], [10.0, 30.0, 40.0], [3, 5, 1])
    found = concepts.Concepts.of(made, np.array([0.1, 0.3, 0.4]))
    assert (found.ids.tolist(), found.samples.tolist()) == ([1, 4], [5, 4])
    assert found.frequency.tolist() == [30, (3 * 10 + 40) / 4]
    assert found.shift == pytest.approx([0.3, (3 * 0.1 + 0.4) / 4])
    assert found.place.tolist() == [1, 0, 1]
    assert found.members(1).tolist() == [0, 2]


def test_telling_words_are_weighed_by_hand() -> None:
    """dog: all 4 of cluster 0, and 1 of 4 in cluster 1; a: 7 of 8; in a cluster there are 9 words on average."""
    made = ClusterTable.build(["a dog", "dog run", "A cat  ran", "old dog", "a car 42 x"], [0, 0, 1, 1, 1],
                              [4, 4, 4, 4, 4], [3, 1, 2, 1, 1])  # fmt: skip
    groups = concepts.Concepts.of(made, made.frequency)
    # "a" and "x" are single letters and 42 is a number: no words. Words: dog 4 + 1, run 1, cat 2, ran 2, old 1, car 1.
    average = (5 + 1 + 2 + 2 + 1 + 1) / 2
    weights = {"cat": 2 / 4 * math.log(1 + average / 2), "dog": 1 / 4 * math.log(1 + average / 5),
               "old": 1 / 4 * math.log(1 + average / 1)}  # fmt: skip
    assert weights["cat"] > weights["old"] > weights["dog"]
    assert concepts.telling_words(made, groups, []) == [["dog", "run"], ["cat", "ran", "car", "old", "dog"]]
    assert concepts.telling_words(made, groups, [], many=3)[1] == ["cat", "ran", "car"]
    assert concepts.examples(made, np.array([0, 1, 2, 3, 4]), 3) == ["a dog", "A cat ran", "a car 42 x"]
    # "often" is in both samples and elsewhere, "seldom" in one: which is first depends on the average, 6 and not 12.
    made = ClusterTable.build(["often seldom", "often", "often aa bb cc", "often dd ee ff gg"], [0, 0, 1, 1], [2.0] * 4)
    assert concepts.telling_words(made, concepts.Concepts.of(made, made.frequency), [])[0] == ["seldom", "often"]
    assert concepts.shortened("x" * 300) == "x" * 300
    assert concepts.shortened("x" * 301) == "x" * 299 + "…"


def test_tables_of_one_name_are_written_side_by_side(tmp_path: Path) -> None:
    for folder, counts in (("a", "7,1\n8,2\n"), ("b", "7,10\n8,30\n9,2\n")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "$c$.csv").write_text("class_id,count\n" + counts)
    assert report(tmp_path / "a" / "$c$.csv", tmp_path / "b" / "$c$.csv", "-o", tmp_path / "out") == 0
    written = {path.name: len(path.read_text().splitlines()) for path in (tmp_path / "out").glob("*.csv")}
    assert written == {"clusters__c_.csv": 3, "clusters__c__2.csv": 4}


def test_metadata_that_is_odd_is_shown_in_a_few_words(tmp_path: Path) -> None:
    deep: Any = 1
    for _ in range(12):
        deep = {"x": deep}
    long_tail(tmp_path / "t.parquet", runs=3, source="a b;c<i>", deep=deep, many=["x"] * 10**5, name="two\nlines",
              stability={"verdict": ["x"] * 10**5, "deep": deep, "ok": 0.5})  # fmt: skip
    assert report(tmp_path / "t.parquet", "-o", tmp_path / "out") == 0
    assert len(page_of(tmp_path / "out")) < 400_000
    rows = dict(cells_of(page_of(tmp_path / "out"), "How the table was made"))
    assert (rows["runs"], rows["name"]) == ("3", "two lines")
    assert len(rows["many"]) < 100
    long_tail(tmp_path / "u.parquet", source="a b;c<i>")
    assert report(tmp_path / "u.parquet", "-o", tmp_path / "other") == 0
    assert "mmts stability &#x27;a b;c&lt;i&gt;&#x27; --runs 20" in page_of(tmp_path / "other")


def test_report_shows_the_stability_that_was_measured(tmp_path: Path) -> None:
    long_tail(
        tmp_path / "t.parquet", stability={"verdict": "steady <enough>", "runs": 3, "ari": 0.53251, "halves": None}
    )
    assert report(tmp_path / "t.parquet", "-o", tmp_path / "out") == 0
    text = text_of(tmp_path / "out")
    assert "steady <enough>" in text
    assert "ari 0.5325" in text
    assert "halves" not in text
    assert "Not measured." not in text


def test_report_draws_a_map_of_given_embeddings(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    made = long_tail(tmp_path / "t.parquet")
    points = np.random.default_rng(0).normal(size=(8, 16))[made.cluster] * 5
    points += np.random.default_rng(1).normal(size=points.shape)
    np.save(tmp_path / "e.npy", points.astype(np.float32))
    asked = [tmp_path / "t.parquet", "-o", tmp_path / "out", "--embeddings", tmp_path / "e.npy", "--sample", 60]
    assert report(*asked) == 0
    assert_self_contained(page_of(tmp_path / "out"), pictures=3)
    assert "t-SNE of 60 captions" in text_of(tmp_path / "out")
    shown = table._shown("t", made, table.Options())
    options = table.Options(embeddings=str(tmp_path / "e.npy"), sample=60)
    found = table._project(shown, options)
    assert isinstance(found, table.Points)
    # Clusters that lie apart lie apart on the map: a point's nearest neighbour is of its own cluster.
    distance = np.linalg.norm(found.where[:, None] - found.where, axis=2)
    np.fill_diagonal(distance, np.inf)
    place = made.cluster[found.rows]
    assert (place[distance.argmin(1)] == place).mean() > 0.8


def test_report_embeds_a_sample_itself(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    long_tail(tmp_path / "t.parquet")
    asked = [tmp_path / "t.parquet", "-o", tmp_path / "out", "--encoder", "tfidf", "--sample", 40]
    assert report(*asked) == 0
    assert "t-SNE of 40 captions" in text_of(tmp_path / "out")
    assert (tmp_path / "out" / "map.png").read_bytes().startswith(b"\x89PNG")


def test_telling_words_are_those_of_the_cluster_and_not_of_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = long_tail(tmp_path / "t.parquet")
    groups = concepts.Concepts.of(made, made.frequency)
    assert [words[0] for words in concepts.telling_words(made, groups, [0])] == NOUNS
    monkeypatch.setattr(concepts, "_KEYS_READ", 10)  # a sample: the shown clusters are read all the same
    assert concepts.telling_words(made, groups, [0, 7])[7][0] == NOUNS[7]


def test_report_of_classes_overlays_distributions(tmp_path: Path) -> None:
    (tmp_path / "noun.csv").write_text("class_id,count\n7,1\n0,3617\n2,40\n")
    (tmp_path / "ann.csv").write_text("narration_id,verb_class,noun_class\n" + "".join(
        f"n,{i % 3},{i % 5}\n" for i in range(40)))  # fmt: skip
    out = tmp_path / "out"
    assert report(tmp_path / "noun.csv", tmp_path / "ann.csv", "-o", out, "--preset", "avion-clip") == 0
    assert_self_contained(page_of(out), pictures=2)
    text = text_of(out)
    for name in ("noun.csv", "ann.csv: noun", "ann.csv: verb", "ann.csv: verb_noun"):
        assert name in text
    rows = list(csv.DictReader((out / "clusters_noun.csv").open(encoding="utf-8")))
    assert [(row["class"], row["samples"]) for row in rows] == [("0", "3617"), ("2", "40"), ("7", "1")]
    assert (rows[0]["shift"], rows[-1]["shift"]) == ("0.200000", "0.050000")
    assert len(list(csv.DictReader((out / "clusters_ann_verb_noun.csv").open(encoding="utf-8")))) == 15
    only = tmp_path / "only"
    assert report(tmp_path / "ann.csv", "-o", only, "--distribution", "verb") == 0
    assert "ann.csv: verb " in text_of(only) + " "
    assert "noun" not in text_of(only)


def test_report_of_tables_at_the_edges(tmp_path: Path) -> None:
    ClusterTable.build(["x y", "y z"], [0, 1], [5.0, 5.0]).save(tmp_path / "flat.parquet")
    ClusterTable.build(["42 !"], [9], [1.0]).save(tmp_path / "one.parquet")
    for name in ("flat", "one"):
        assert report(tmp_path / f"{name}.parquet", "-o", tmp_path / name) == 0
        assert "Every caption occurs once" in text_of(tmp_path / name)
    assert "#1: no words" in text_of(tmp_path / "one")
    assert [row["shift"] for row in csv.DictReader((tmp_path / "flat" / "clusters.csv").open())] == ["0.075000"] * 2


def test_report_refuses_before_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = long_tail(tmp_path / "t.parquet")
    np.save(tmp_path / "short.npy", np.ones((3, 4), np.float32))
    np.save(tmp_path / "nan.npy", np.full((len(made), 4), np.nan, np.float32))
    (tmp_path / "foreign.csv").write_text("a,b\n1,2\n")
    (tmp_path / "torn.parquet").write_bytes((tmp_path / "t.parquet").read_bytes()[:300])
    (tmp_path / "noun.csv").write_text("class_id,count\n7,1\n")
    (tmp_path / "empty").mkdir()
    good, out = tmp_path / "t.parquet", tmp_path / "out"
    for argv, message in [
        ([tmp_path / "gone"], "gone: no such table or run"),
        ([tmp_path / "foreign.csv"], "neither counts"),
        ([tmp_path / "torn.parquet"], "not a readable Parquet file"),
        ([tmp_path / "empty"], "not a training run"),
        ([good, tmp_path / "empty"], "two reports"),
        ([good, "--preset", "clip"], "unknown --preset 'clip'"),
        ([good, "--embeddings", tmp_path / "short.npy"], "3 rows for the 136 keys"),
        ([good, "--embeddings", tmp_path / "nan.npy"], "nan.npy"),
        ([good, "--embeddings", tmp_path / "short.npy", "--encoder", "tfidf"], "not both"),
        ([good, good, "--embeddings", tmp_path / "short.npy"], "belongs to one table"),
        ([tmp_path / "noun.csv", "--encoder", "tfidf"], "no captions to embed"),
        ([good, "--sample", 0], "--sample must be at least 1"),
        ([good, "--seed", 2**32], "--seed at least 0 and below 2^32"),
    ]:
        assert report(*argv, "-o", out) == 2, argv
        assert message in capsys.readouterr().err
        assert not out.exists()
    assert report(good, "-o", tmp_path / "noun.csv") == 2
    assert "is a file" in capsys.readouterr().err


def test_a_report_is_replaced_only_on_request(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "c.csv").write_text("class_id,count\n7,1\n8,2\n")
    assert report(tmp_path / "c.csv", "-o", tmp_path) == 0
    assert report(tmp_path / "c.csv", "-o", tmp_path) == 2
    assert "--force" in capsys.readouterr().err
    assert report(tmp_path / "c.csv", "-o", tmp_path, "--force") == 0


def test_plots_without_matplotlib_name_the_extra(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    (tmp_path / "c.csv").write_text("class_id,count\n7,1\n8,2\n")
    for argv in (["plot", "schedule", "-o", tmp_path / "s.png"], ["report", tmp_path / "c.csv", "-o", tmp_path / "r"]):
        assert main([*map(str, argv)]) == 2
        assert "pip install 'mmts-plugins[report]'" in capsys.readouterr().err
    assert {path.name for path in tmp_path.iterdir()} == {"c.csv"}


def test_the_command_line_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mmts_plugins.commands import plot, report, schedule; "
        "print([name for name in ('torch', 'sklearn', 'matplotlib', 'pyarrow') if name in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


# --- reading runs -----------------------------------------------------------------------------------------------------


ODD_NAMES = ["$x_1^2$", "_hidden", "a\\b {c} $", "<b>&\"'", "新しい実行", "two\nlines \u202e", "x" * 120, "y" * 120,
             " ", "café", "cafe\u0301", os.fsdecode(b"caf\xe9")]  # fmt: skip


def score(value: float, **thirds: float) -> dict[str, Any]:
    """As ``mmts eval`` writes it."""

    def bounded(number: float) -> dict[str, float]:
        return {"value": number, "low": number - 0.05, "high": number + 0.05, "n": 100}

    return {**bounded(value), **{name: bounded(each) for name, each in thirds.items()}}


def make_run(folder: Path, made: Path, off: float = 0.0, skip: Sequence[str] = (), **changes: Any) -> Path:
    """A run's folder as OpenCLIP and we leave it, with a log of every tenth step."""
    values = {"alpha": 0.04, "shift_min": 0.05, "shift_max": 0.1, **changes}
    config = Config("mmts-infonce", clusters=str(made), **values)
    found = ClusterTable.load(made)
    preview = Preview(vars(config), 100, found)
    tail, middle, head = (preview.shifts.get(name, 0.075) for name in ("tail", "middle", "head"))
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    write_record(checkpoints / "mmts.yaml", record(config, 100, found.content_hash, "open_clip_torch", "3.3.0"))
    lines = []
    for step in range(0, 100, 10):
        base = preview.schedule.offset(step)
        line = {"step": step, "total_steps": 100, "epoch": step / 50, "loss": 4 - step / 50, "tau_base": base + off,
                "tau_head": base + head, "tau_middle": base + middle,
                "tau_tail": base + tail, "hit_rate": 1.0, "loss_head": 4.0, "loss_tail": 3.0,
                "alignment": 1 - step / 100}  # fmt: skip
        lines.append(json.dumps({name: value for name, value in line.items() if name not in skip}))
    (checkpoints / "mmts.jsonl").write_text("\n".join(lines) + "\n")
    (folder / "params.txt").write_text(f"batch_size: 8\nepochs: 2\nlr: {changes.get('alpha', 0.1)}\nname: {folder}\n",
                                       errors="surrogateescape")  # fmt: skip
    recall = score(0.4, head=0.5, mid=0.4, tail=0.3)
    metrics = {"image_to_text_R@1": recall, "image_to_text_median_rank": score(3.0)}
    (folder / "mmts_eval.json").write_text(json.dumps({"format": 1, "metrics": metrics}))
    return folder


OPENCLIP_LOG = (
    "2026-11-22,18:04:33 | INFO | Train Epoch: 0 [ 8/48 (50%)] LR: 0.1 Logit Scale: 14.286 Loss: 2.5000 (2.5)\n"
    "2026-11-22,18:04:34 | INFO | Train Epoch: 1 [48/48 (100%)] LR: 0.1 Logit Scale: 20.000 Loss: 1.5000 (2.2)\n"
)


def make_plain(folder: Path) -> Path:
    """A plain OpenCLIP run's folder, with its own evaluation."""
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "out.log").write_text(OPENCLIP_LOG)
    (folder / "params.txt").write_text("batch_size: 8\nepochs: 2\nlr: 0.1\n")
    (folder / "checkpoints" / "results.jsonl").write_text(
        '{"image_to_text_R@1": 0.1, "epoch": 1, "num_samples": 48}\n'
        '{"image_to_text_R@1": 0.3, "clip_val_loss": 2.0, "epoch": 2, "num_samples": 48}\n'
    )
    return folder


@pytest.fixture
def made(tmp_path: Path) -> Path:
    long_tail(tmp_path / "clusters.parquet")
    return tmp_path / "clusters.parquet"


def test_logs_are_read_as_they_were_left(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    log = folder / "checkpoints" / "mmts.jsonl"
    with log.open("a") as file:  # resumed from step 80, then killed while writing, after it diverged
        file.write('{"step": 80, "total_steps": 100, "tau_base": 0.5, "loss": 9.0}\n')
        file.write('{"step": 95, "total_steps": 100, "loss": NaN}\n{"step": 9')
    found = logs.read_run(folder)
    assert found.series["loss"][[0, -2, -1]].tolist() == [[0, 4.0], [80, 9.0], [90, 2.2]]
    assert found.series["tau_base"][-2].tolist() == [80, 0.5]
    assert found.steps.tolist() == list(range(0, 100, 10))
    assert len(found.series["tau_head"]) == 10  # the later line of step 80 has none, and takes nothing from the first
    assert any("1 line(s) could not be read" in note for note in found.notes)
    assert any("from step 95 on: the training diverged" in note for note in found.notes)
    for inside in (folder / "checkpoints", folder / "checkpoints" / "mmts.yaml"):
        again = logs.read_run(inside)
        assert (again.name, again.metrics.keys()) == ("a", found.metrics.keys())


def test_a_half_line_takes_nothing_with_it(made: Path, tmp_path: Path) -> None:
    """A killed run's last line has no end, and older versions wrote on behind it."""
    folder = make_run(tmp_path / "a", made)
    log = folder / "checkpoints" / "mmts.jsonl"
    log.write_text('{"step": 0, "loss": 4.0}\n{"step": 10, "lo{"step": 20, "loss": 3.0}\n\0\0\n{"step": 30, "loss": 2.')
    found = logs.read_run(folder)
    assert found.series["loss"].tolist() == [[0, 4.0], [20, 3.0]]
    assert found.notes == ["mmts.jsonl: 3 line(s) could not be read and were left out"]


def test_the_record_is_found_beside_params_txt_and_among_older_checkpoints(made: Path, tmp_path: Path) -> None:
    old, new, both = (make_run(tmp_path / name, made) for name in ("old", "new", "both"))
    for name in ("mmts.yaml", "mmts.jsonl"):
        (new / "checkpoints" / name).rename(new / name)
    (both / "checkpoints" / "mmts.yaml").rename(both / "mmts.yaml")  # resumed after an update
    (both / "checkpoints" / "mmts.yaml").write_text("alpha: 9\n")
    (both / "mmts.jsonl").write_text('{"step": 90, "total_steps": 100, "loss": 0.5}\n')
    expected = logs.read_run(old)
    assert (expected.record["alpha"], len(expected.series["loss"])) == (0.04, 10)
    for given in (new, new / "mmts.yaml", new / "checkpoints", both):
        found = logs.read_run(given)
        assert {**found.record, "clusters": ""} == {**expected.record, "clusters": ""}, given
        assert found.record_path == found.record_path.parent / "mmts.yaml"
        assert found.record_path.parent.name == found.name == given.relative_to(tmp_path).parts[0]
        assert found.series["loss"][:9].tolist() == expected.series["loss"][:9].tolist()
        assert found.series["loss"][9].tolist() == [90, 0.5 if given == both else 2.2]
        assert found.notes == []
    assert report(old, new, both, "-o", tmp_path / "out") == 0
    assert text_of(tmp_path / "out").count("is the configured cosine at all 10 logged steps") == 3


LOG = "2026 | INFO | Train Epoch: {} [ 8/48 ({}%)] LR: 0.1 Logit Scale: {} Loss: {} (2.5)\n"


@pytest.mark.parametrize(
    ("line", "series"),
    [
        (LOG.format(0, 50, "0.000", "2.5"), {"loss": [[50, 2.5]]}),  # one over nothing is no temperature
        (LOG.format(0, 50, "nan", "3.5"), {"loss": [[50, 3.5]]}),
        (LOG.format(0, 50, "20", "inf"), {"learned_temperature": [[50, 0.05]]}),
        (LOG.format(0, 50, "20", "1e300"), {"learned_temperature": [[50, 0.05]]}),
        (LOG.format(0, 50, "1.2.3", "2.5"), {}),
        (LOG.format(0, 50, "20", "n-a"), {}),
        (LOG.format("9" * 5000, 50, "20", "2.5"), {}),
        (LOG.format(0, "9" * 5000, "20", "2.5"), {}),
        (LOG.format(0, 50, "2" * 5000, "2.5"), {"loss": [[50, 2.5]]}),
        (LOG.format("٣", 50, "20", "2.5"), {}),
        ("Train Epoch: 1 [(" * 100_000 + "\n", {}),
    ],
)
def test_a_line_that_is_odd_costs_itself_alone(line: str, series: dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "params.txt").write_text("epochs: 1\n")
    (tmp_path / "out.log").write_bytes(b"\x00\xff\n" + line.encode() + LOG.format(1, 0, "10.0", "1.5").encode())
    found = logs.read_run(tmp_path).series
    expected = {"loss": [[100, 1.5]], "learned_temperature": [[100, 0.1]]}
    assert {name: values.tolist() for name, values in found.items()} == {
        name: series.get(name, []) + last for name, last in expected.items()
    }


def test_a_resumed_log_goes_on_where_it_was_resumed(tmp_path: Path) -> None:
    epochs = ((0, 50, 4.0), (1, 50, 3.0), (1, 90, 9.0), (1, 0, 3.5), (1, 50, 2.5), (2, 0, 2.0))
    lines = [LOG.format(epoch, percent, "20", loss) for epoch, percent, loss in epochs]
    (tmp_path / "out.log").write_text("".join(lines))
    (tmp_path / "params.txt").write_text("epochs: ²\n")
    assert logs.read_run(tmp_path).series["loss"].tolist() == [[25, 4.0], [50, 3.5], [75, 2.5], [100, 2.0]]


def test_steps_and_values_that_are_none_are_left_out(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    lines = [{"step": 0, "total_steps": 10, "loss": 1, "x\ny": 2, "flag": True, "text": "1", "deep": [[1]]},
             {"step": 1.5, "loss": 7}, {"step": -1, "loss": 7}, {"step": 10**30, "loss": 7}, {"step": "2", "loss": 7},
             {"step": True, "loss": 7}, {"loss": 7}, {"step": 5.0, "loss": 10**400}, [1], 3,
             {"step": 99, "loss": 2, "total_steps": 10}]  # fmt: skip
    (folder / "checkpoints" / "mmts.jsonl").write_text(
        "\n".join([*(json.dumps(line) for line in lines), "[" * 100_000, '{"step": ' + "9" * 5000 + "}"])
    )
    found = logs.read_run(folder)
    assert {name: values.tolist() for name, values in found.series.items()} == {
        "loss": [[0, 1], [99, 2]], "x y": [[0, 2]]}  # fmt: skip
    assert found.notes == ["mmts.jsonl: 10 line(s) could not be read and were left out",
                           "the loss is not a finite number from step 5 on: the training diverged"]  # fmt: skip


def test_the_middle_third_as_it_was_called_before(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    (folder / "checkpoints" / "mmts.jsonl").write_text('{"step": 5, "total_steps": 10, "loss_mid": 2, "mid_tau": 1}\n')
    entry = {"value": 0.5, "head": {"value": 0.6}, "mid": {"value": 0.4}, "tail": {"value": 0.2}}
    (folder / "mmts_eval.json").write_text(json.dumps({"metrics": {"R@1": entry}}))
    found = logs.read_run(folder)
    assert {name for name in found.series if "mid" in name} == {"loss_middle", "mid_tau"}
    assert {third: score.value for third, score in found.metrics["R@1"].thirds.items()} == {
        "head": 0.6, "middle": 0.4, "tail": 0.2}  # fmt: skip


def test_a_record_that_is_odd_is_shown_and_draws_nothing(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    path = folder / "checkpoints" / "mmts.yaml"
    good = path.read_text()
    for changes, said in [
        ("alpha: .nan\n", "'alpha' is nan: it must be a finite number"),
        ("alpha: 1.0e+300\n", "'alpha' is 1e+300: it must be at most 10000"),
        ("total_steps: 1.0e+400\n", "'total_steps' is inf: it must be a whole number"),
        ("shift_min: [1]\n", "'shift_min' is '[1]': it must be a number"),
        ("clusters: 7\n", "'clusters' is 7: it must be text"),
        ("shift_min: 0.5\n", "shift_min 0.5 is above shift_max 0.1"),
        ("period: 0\n", "'period' is 0: it must be 1e-06 or above"),
        ("2001-01-01: 2002-02-02\n3: {x: 1}\n", ""),
    ]:
        name = changes.split(":")[0] + ":"
        path.write_text("".join(line for line in good.splitlines(True) if not line.startswith(name)) + changes)
        out = tmp_path / "out"
        assert report(folder, "-o", out, "--force") == 0
        assert ("does not describe a schedule" in text_of(out)) == bool(said)
        assert said in text_of(out)
        assert (out / "model_card.md").is_file()
    assert "2001-01-01 2002-02-02" in text_of(out)
    assert "3 {'x': 1}" in text_of(out)
    path.write_text(good + "x: [")
    with pytest.raises(ConfigError, match=r"mmts\.yaml"):
        logs.read_run(folder)


def test_results_that_are_odd_are_notes(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    for name, text in {
        "deep": "[" * 100_000,
        "list": '{"metrics": [1]}',
        "no": "{}",
        "null": "null",
        "bytes": "\0",
    }.items():
        (folder / f"mmts_eval_{name}.json").write_text(text)
    (folder / "mmts_eval_bytes.json").write_bytes(b"\xff\xfe")
    (folder / "mmts_eval_folder.json").mkdir()
    (folder / ".mmts_eval.json.x1y2.tmp").write_text('{"metrics": {"stale": 1}}')  # of a command that was killed
    entries = {"nan": math.nan, "huge": 10**400, "a\nb": 1, "none": None, "text": "1", "list": [1], "flag": True,
               "upside": {"value": 0.5, "low": 0.9, "high": 0.1}, "half": {"value": 0.5, "low": 0.4}}  # fmt: skip
    (folder / "mmts_eval.json").write_text(json.dumps({"metrics": entries}))
    found = logs.read_run(folder)
    assert {name: metric.score for name, metric in found.metrics.items()} == {
        "eval: a b": logs.Score(1.0), "eval: upside": logs.Score(0.5), "eval: half": logs.Score(0.5)}  # fmt: skip
    assert found.notes[:2] == ["mmts_eval.json: eval: nan is not a finite number and was left out",
                               "mmts_eval.json: eval: huge is not a finite number and was left out"]  # fmt: skip
    refused = [note.split(": not a result of mmts eval: ") for note in found.notes[2:]]
    assert [name for name, _ in refused] == [f"mmts_eval_{name}.json" for name in (
        "bytes", "deep", "folder", "list", "no", "null")]  # fmt: skip
    assert all(why.endswith("; left out") for _, why in refused)


def test_a_plain_openclip_run_is_read(tmp_path: Path) -> None:
    found = logs.read_run(make_plain(tmp_path / "plain"))
    assert found.series["loss"].tolist() == [[25, 2.5], [100, 1.5]]
    assert found.series["learned_temperature"][-1].tolist() == [100, 0.05]
    assert found.metrics["image_to_text_R@1"].score == logs.Score(0.3)
    assert set(found.metrics) == {"image_to_text_R@1", "clip_val_loss"}
    assert any("no mmts.yaml" in note for note in found.notes)


def test_an_avion_run_is_read(tmp_path: Path) -> None:
    (tmp_path / "log.txt").write_text(
        '{"train_loss": 0.5, "test_avg_map": 20.0, "epoch": 0}\n{"train_loss": 0.2, "test_avg_map": 30.5, "epoch": 1}\n'
    )
    found = logs.read_run(tmp_path)
    assert found.series["loss"].tolist() == [[50, 0.5], [100, 0.2]]
    assert found.metrics["test_avg_map"].score.value == 30.5
    assert run.shown_score("test_avg_map", found.metrics["test_avg_map"].score) == "30.5"


def test_damaged_evaluations_are_notes(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "a", made)
    (folder / "mmts_eval_torn.json").write_text('{"metrics": {')
    (folder / "mmts_eval_test.json").write_text(json.dumps({"metrics": {
        "text_to_image_R@1": {**score(0.2), "tail": {"value": None, "low": None, "high": None, "n": 0}}}}))  # fmt: skip
    found = logs.read_run(folder)
    assert any("mmts_eval_torn.json: not a result" in note for note in found.notes)
    assert found.metrics["test: text_to_image_R@1"].thirds == {}
    assert found.metrics["eval: image_to_text_R@1"].thirds["tail"] == logs.Score(0.3, 0.25, 0.35)


# --- mmts report RUN --------------------------------------------------------------------------------------------------


def test_report_of_two_runs(made: Path, tmp_path: Path) -> None:
    one = make_run(tmp_path / "one", made)
    two = make_run(tmp_path / "two|<i>", made, alpha=0.02)
    (two / "mmts_eval.json").write_text(json.dumps({"metrics": {"image_to_text_R@1": score(0.45, head=0.5, tail=0.4)}}))
    out = tmp_path / "out"
    assert report(one, two, "-o", out) == 0
    assert_self_contained(page_of(out), pictures=5)
    assert "<i>" not in page_of(out)
    text = text_of(out)
    assert "one: the base temperature that training logged is the configured cosine at all 10 logged steps" in text
    assert "image to text R@1 40.0 [35.0, 45.0] 45.0 [40.0, 50.0] +5.0" in text
    assert "image to text median rank 3 [2.95, 3.05] – –" in text
    assert "two|<i> lacks image to text median rank: not compared." in text
    differences = text.split("Differences between the runs")[1].split("For a model card")[0]
    assert "alpha 0.04 0.02" in differences
    assert "host: lr 0.1 0.02" in differences
    assert "shift_min" not in differences
    assert "host: name" not in differences
    assert "136 captions 8 200 18 to 32" in text
    assert {path.name for path in out.glob("*.png")} == {
        f"{name}.png" for name in ("schedule", "loss", "diagnostics", "metrics", "thirds")
    }
    card = (out / "model_card_one.md").read_text()
    assert "| alpha | 0.04 |" in card
    assert "| clusters | clusters.parquet |" in card  # without the folders of this machine
    assert (
        "| image to text R@1 | 40.0 [35.0, 45.0] | 50.0 [45.0, 55.0] | 40.0 [35.0, 45.0] | 30.0 [25.0, 35.0] |" in card
    )
    assert "@article{sheludzko2026mmts," in card
    assert (out / "model_card_two_i_.md").exists()


def test_figures_of_runs_hold_what_was_configured_and_logged(
    made: Path, tmp_path: Path, figures: dict[str, Any]
) -> None:
    one, two = make_run(tmp_path / "one", made), make_run(tmp_path / "two", made, alpha=0.02)
    lower = {"image_to_text_R@1": score(0.3, head=0.45, tail=0.1)}
    (two / "mmts_eval.json").write_text(json.dumps({"metrics": lower}))
    assert report(one, two, "-o", tmp_path / "out") == 0
    preview = Preview(vars(Config("mmts-infonce", 0.04, 0.05, 0.1, str(made))), 100, ClusterTable.load(made))

    upper = figures["schedule.png"].axes[0]
    lines = {line.get_label(): line for line in upper.get_lines()}
    for name in ("head", "middle", "tail"):
        expected = preview.base(np.arange(100)) + preview.shifts[name]
        assert lines[f"{name} third"].get_ydata() == pytest.approx(expected)
        assert lines[f"{name} third"].get_xdata().tolist() == list(range(100))
    dots = [line for line in upper.get_lines() if line.get_marker() == "."]
    for line, name in zip(dots, ("head", "middle", "tail")):
        assert line.get_xdata() == pytest.approx(np.arange(0, 100, 10))
        assert line.get_ydata() == pytest.approx(preview.base(np.arange(0, 100, 10)) + preview.shifts[name])
        assert line.get_color() == lines[f"{name} third"].get_color()
    assert len(dots) == 3

    over, by_third, _ = figures["loss.png"].axes
    assert [line.get_label() for line in over.get_lines()] == ["one", "two"]
    assert over.get_lines()[0].get_xydata().tolist() == [[step, 4 - step / 50] for step in range(0, 100, 10)]
    assert {line.get_label(): line.get_ydata()[0] for line in by_third.get_lines()} == {"head": 4.0, "tail": 3.0}

    alignment, hit_rate = figures["diagnostics.png"].axes
    assert (alignment.get_title(loc="left"), hit_rate.get_title(loc="left")) == ("alignment", "hit rate")
    assert alignment.get_lines()[1].get_ydata()[3] == pytest.approx(0.7)

    bars = figures["metrics.png"].axes[0].containers
    assert [container.get_label() for container in bars] == ["one", "two"]
    assert [container[0].get_xdata()[0] for container in bars] == pytest.approx([40, 30])
    assert bars[1][2][0].get_segments()[0][:, 0] == pytest.approx([25, 35])
    thirds = figures["thirds.png"].axes[0].containers
    assert [list(container[0].get_ydata()) for container in thirds] == [pytest.approx([50, 40, 30]),
                                                                        pytest.approx([45, 10])]  # fmt: skip
    assert [list(container[0].get_xdata()) for container in thirds] == [pytest.approx([-0.06, 0.94, 1.94]),
                                                                        pytest.approx([0.06, 2.06])]  # fmt: skip


def texts_of(figure: Any) -> list[str]:
    """Everything written in a figure, as a reader sees it; none of it may be a formula."""
    from matplotlib import cbook
    from matplotlib.text import Text

    figure.canvas.draw()
    found = [text.get_text() for text in figure.findobj(Text) if text.get_text().strip()]
    assert not [text for text in found if cbook.is_math_text(text)]
    return [text.replace(r"\$", "$") for text in found]


@pytest.mark.filterwarnings("error")
def test_report_of_odd_names(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One page of twelve runs whose names are formulas, HTML, hidden labels, of other scripts, alike, or no text."""
    figures: dict[str, list[str]] = {}
    legends: dict[str, list[str]] = {}

    def save(figure: Any, path: Path) -> None:
        figures[path.name] = texts_of(figure)
        legends[path.name] = [text.get_text() for legend in figure.legends for text in legend.get_texts()]
        plots.save(figure, path)

    monkeypatch.setattr(run, "save", save)
    folders = [make_run(tmp_path / name, made, alpha=0.001 * place) for place, name in enumerate(ODD_NAMES, 1)]
    metric = {"$R$_<i>@1: `x`|*y* mAP": score(0.4), "_mAP": score(0.2)}
    for folder in folders:
        (folder / "mmts_eval.json").write_text(json.dumps({"metrics": metric}))
        (folder / "params.txt").write_text("data: <script>$x$\u2028\n")
        with (folder / "checkpoints" / "mmts.jsonl").open("a") as log:
            log.write('{"step": 90, "$y$": 1}\n{"step": 95, "$y$": 2}\n')
    out = tmp_path / "out"
    assert report(*folders, "-o", out) == 0
    page = (out / "report.html").read_bytes().decode("utf-8")
    for forbidden in ("<i>", "<b>", "<script>", "\udce9"):
        assert forbidden not in page
    shown = ["$x_1^2$", "_hidden", "a\\b {c} $", "<b>&\"'", "新しい実行", "two lines \\u202e", "x" * 120, "y" * 120,
             "run", "café", "cafe\u0301", "caf\\udce9"]  # fmt: skip
    heads = html.unescape(page.split("<h2>Configuration</h2>")[1].split("</thead>")[0])
    assert re.findall("<th>(.*?)</th>", heads) == ["", *shown]
    labels = [*shown[:4], r"\u65b0\u3057\u3044\u5b9f\u884c", shown[5], "x" * 13 + "…" + "x" * 26,
              "y" * 13 + "…" + "y" * 26, *shown[8:]]  # fmt: skip
    labels[1] = " _hidden"  # legends leave out what starts with an underscore
    for name in ("loss.png", "metrics.png", "diagnostics.png"):
        assert [label.replace(r"\$", "$") for label in legends[name]] == labels, name
    assert {label for label in labels if label.strip()} <= set(figures["schedule.png"])
    assert " $R$ <i>@1: `x`|*y* mAP".strip() in [text.strip() for text in figures["metrics.png"]]
    assert "$y$" in figures["diagnostics.png"]
    cards = sorted(path.name for path in out.glob("model_card_*.md"))
    assert len(cards) == len(ODD_NAMES)
    assert {"model_card__x_1_2_.md", f"model_card_{'x' * 48}.md", "model_card_caf_udce9.md"} <= set(cards)
    card = (out / "model_card__x_1_2_.md").read_text(encoding="utf-8")
    assert r"| \$R\$ \<i\>@1: \`x\`\|\*y\* mAP | 40.0 [35.0, 45.0] |" in card


def test_report_of_many_values_and_metrics(made: Path, tmp_path: Path) -> None:
    """A figure has its limits, and says what it leaves out; tables hold everything."""
    folder = make_run(tmp_path / "one", made)
    lines = [json.dumps({"step": step, **{f"value{number:03d}": step for number in range(300)}}) for step in (1, 2)]
    (folder / "mmts.jsonl").write_text("\n".join(lines))
    metrics = {f"set{number}: R@1": number / 300 for number in range(300)}
    (folder / "mmts_eval.json").write_text(json.dumps({"metrics": metrics}))
    assert report(folder, "-o", tmp_path / "out") == 0
    page = page_of(tmp_path / "out")
    assert "value020, value021; the first 24 of 302 values." in page
    assert "set99: R@1 one 33.0; the first 100 of 300 metrics." in page
    assert "<td>set299: R@1</td><td>99.7</td>" in page


def test_a_figure_of_many_runs_leaves_some_out(tmp_path: Path) -> None:
    runs = [logs.TrainingLog(str(number), {}, None, {"learned_temperature": np.array([[0, 0.1], [100, 0.2]])},
                             np.empty(0), {}, {}) for number in range(30)]  # fmt: skip
    said = run.plot_schedule(tmp_path / "s.png", runs, [None] * 30)
    assert said is not None
    assert said.startswith("the first 24 of 30 runs; 0: one learned temperature, 0.2000 at the end; 1: ")
    assert "23: one" in said
    assert "24: one" not in said


def test_text_for_figures_and_file_names() -> None:
    assert plots.literal("a$b") == r"a\$b"
    assert plots.literal("_a\n$1 $2") == r" _a \$1 \$2"
    assert plots.literal("0123456789" * 3, 12) == "0123…3456789"
    assert plots.literal("é→新\ud83d") == r"é→\u65b0\ud83d"
    assert slugs(["a b", "a_b", "A b", "a_b_2", "x" * 90, "/../", ""]) == [
        "a_b", "a_b_2", "A_b_3", "a_b_2_2", "x" * 48, "_.._", ""]  # fmt: skip
    assert escaped("a<b>&\"'\0\x1b\ud83d\n\tü") == "a&lt;b&gt;&amp;&quot;&#x27;\\x00\\x1b\\ud83d\n\tü"


def test_a_report_is_whole_or_the_one_before(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever a killed or failing command left, the page is a whole one, and the next command is not disturbed."""
    folder, out = make_run(tmp_path / "one", made), tmp_path / "out"
    assert report(folder, "-o", out) == 0
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    written: list[str] = []
    whole = plots.save

    def fails(figure: Any, path: Path) -> None:
        if written:
            raise OSError(28, "No space left on device", str(path))
        written.append(path.name)
        whole(figure, path)

    with monkeypatch.context() as inside:
        inside.setattr(run, "save", fails)
        assert report(folder, "-o", out, "--force") == 2
    assert written == ["schedule.png"]
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    for name in (".report.html.a1.tmp", ".schedule.png.b2.tmp", ".model_card.md.c3.tmp"):
        (out / name).write_text("half")
    assert report(folder, "-o", out, "--force") == 0
    for name, content in before.items():
        assert (out / name).read_bytes() == content, name


def test_report_compares_with_a_plain_run_and_names_what_is_none(made: Path, tmp_path: Path) -> None:
    ours, plain = make_run(tmp_path / "ours", made), make_plain(tmp_path / "plain")
    (tmp_path / "photos").mkdir()
    (tmp_path / "photos" / "cat.jpg").touch()
    out = tmp_path / "out"
    assert report(plain, ours, tmp_path / "photos", "-o", out) == 0
    text = text_of(out)
    assert "photos: not a training run" in text
    assert "(found: cat.jpg)" in text
    assert "plain: no mmts.yaml: trained without MM-TS" in text
    assert "image to text R@1 30.0 40.0 [35.0, 45.0] +10.0" in text
    assert "Without MM-TS, or without its mmts.yaml: plain." in text
    assert [path.name for path in out.glob("*.md")] == ["model_card_ours.md"]


def test_a_plain_run_that_keeps_its_table_is_a_run(tmp_path: Path) -> None:
    long_tail(make_plain(tmp_path / "plain") / "clusters.parquet")
    assert report(tmp_path / "plain", "-o", tmp_path / "out") == 0
    assert "Training run: plain" in text_of(tmp_path / "out")


def test_report_of_a_plain_run_alone_is_the_page_of_what_there_is(tmp_path: Path) -> None:
    assert report(make_plain(tmp_path / "plain"), "-o", tmp_path / "out") == 0
    assert_self_contained(page_of(tmp_path / "out"), pictures=4)
    text = text_of(tmp_path / "out")
    assert "No run has an mmts.yaml." in text
    assert "None of the runs has a cluster table" in text
    assert not list((tmp_path / "out").glob("*.md"))


def test_report_sees_a_schedule_that_was_not_followed(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", made, off=0.004)
    assert report(folder, "-o", tmp_path / "out") == 0
    assert "NOT the configured cosine: at step 0 it is 0.0040 away" in text_of(tmp_path / "out")
    folder = make_run(tmp_path / "two", made)
    with (folder / "checkpoints" / "mmts.jsonl").open("a") as log:
        log.write('{"step": 70, "tau_base": 0.5}\n')  # where the cosine is -0.02
    assert report(folder, "-o", tmp_path / "other") == 0
    off = 0.5 - 0.02 * math.cos(2 * math.pi * 70 / 20)
    assert f"NOT the configured cosine: at step 70 it is {off:.4f} away" in text_of(tmp_path / "other")


def test_model_cards_tell_ablations_apart(made: Path, tmp_path: Path) -> None:
    told = {
        "both": ({}, "was the sum of a cosine over the run and a shift"),
        "ics": ({"no_schedule": True}, "(shifts alone)"),
        "ts": ({"no_shifts": True}, "(schedule alone)"),
    }
    for name, (changes, expected) in told.items():
        assert expected in run.model_card(logs.read_run(make_run(tmp_path / name, made, **changes)))


def test_what_is_nought_is_shown_where_it_says_something(made: Path, tmp_path: Path) -> None:
    card = run.model_card(logs.read_run(make_run(tmp_path / "one", made, shuffle_shifts=0, alpha=0.0)))
    assert "(a control: the shifts were shuffled)" in card
    for expected in ("| shuffle_shifts | 0 |", "| alpha | 0 |"):
        assert expected in card
    for nothing in ("start_phase", "no_shifts", "mean_matched", "distribution"):
        assert nothing not in card


def test_what_was_logged_once_is_drawn_too(made: Path, tmp_path: Path, figures: dict[str, Any]) -> None:
    folder = make_run(tmp_path / "one", made)
    log = folder / "checkpoints" / "mmts.jsonl"
    every = [json.loads(line) for line in log.read_text().splitlines()]
    for line in every[1:]:
        del line["loss_head"]
    log.write_text("".join(json.dumps(line) + "\n" for line in every))
    assert report(folder, "-o", tmp_path / "out") == 0
    head, tail = figures["loss.png"].axes[1].get_lines()
    assert (head.get_label(), head.get_xydata().tolist(), head.get_marker()) == ("head", [[0, 4.0]], ".")
    assert (tail.get_label(), len(tail.get_xydata()), tail.get_marker()) == ("tail", 10, "")


def test_report_of_the_mean_without_the_runs_table(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", made, no_shifts=True, mean_matched=True)
    made.unlink()
    assert report(folder, "-o", tmp_path / "out") == 0
    assert f"the cluster table cannot be shown: {made} is not found from here" in text_of(tmp_path / "out")


def test_report_without_the_runs_table(made: Path, tmp_path: Path) -> None:
    folder = make_run(tmp_path / "one", made)
    made.unlink()
    assert report(folder, "-o", tmp_path / "a") == 0
    assert "the cluster table cannot be shown" in text_of(tmp_path / "a")
    ClusterTable.build(["other"], [0], [1.0]).save(made)
    assert report(folder, "-o", tmp_path / "b") == 0
    assert "another content hash" in text_of(tmp_path / "b")
    (folder / "checkpoints" / "mmts.yaml").write_text("loss: mmts-infonce\n")
    assert report(folder, "-o", tmp_path / "c") == 0
    assert "does not describe a schedule" in text_of(tmp_path / "c")


def test_report_of_runs_with_little_in_their_logs(made: Path, tmp_path: Path) -> None:
    bare = make_run(
        tmp_path / "bare", made, skip=("loss", "loss_head", "loss_tail", "tau_base", "alignment", "hit_rate")
    )
    (bare / "mmts_eval.json").unlink()
    assert report(bare, "-o", tmp_path / "out") == 0
    text = text_of(tmp_path / "out")
    assert_self_contained(page_of(tmp_path / "out"), pictures=1)
    for said in ("no losses were found", "no metrics were found", "None of the runs has metrics"):
        assert said in text


def test_report_of_a_real_run(small_model: str, data: Data, tmp_path: Path) -> None:
    pytest.importorskip("open_clip_train")
    argv = openclip_flags(small_model, tmp_path / "logs", train_data=data.csv, val_data=data.csv, dataset_type="csv",
                          loss="mmts", mmts_clusters=data.table)  # fmt: skip
    done = run_python("-m", "mmts_plugins", "run", "-m", "open_clip_train.main", *argv)
    assert done.returncode == 0, done.stdout
    assert report(tmp_path / "logs" / "run", "-o", tmp_path / "out") == 0
    text = text_of(tmp_path / "out")
    assert "total_steps 12" in text
    assert "6 captions 4 48" in text
    found = logs.read_run(tmp_path / "logs" / "run")
    assert 0 < found.metrics["image_to_text_R@10"].score.value <= 1
    assert len(found.series["loss"]) == 12
    assert "learned_temperature" not in found.series
    with pytest.raises(MMTSError, match="not a training run"):
        logs.read_run(data.folder)


def test_learned_temperatures(tmp_path):
    """Fig. 3 and Table 7: where each scale starts and ends, and from which epoch on it stands still."""
    from mmts_plugins.report.temperatures import learned

    def run(name: str, scales: list[float], *settings: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        lines = []
        for epoch, scale in enumerate(scales):
            lines.append(
                f"2026-01-01,00:00:00 | INFO | Train Epoch: {epoch} [48/48 (100%)] Data (t): 0.1 Batch (t): 0.1, 1/s "
                f"LR: 0.1 Logit Scale: {scale:.3f} Contrastive_loss: 1.0 (1.0) Loss: 1.0 (1.0)"
            )
        (folder / "out.log").write_text("\n".join(lines) + "\n")
        (folder / "params.txt").write_text("\n".join([f"epochs: {len(scales)}", *settings]) + "\n")
        return folder

    still = run("still", [14.3, 20, 30, 30.3, 30.5, 30.6])
    moving = run("moving", [14.3, 20, 30, 40, 50, 60])
    clamped = run("clamped", [14.3, 60, 99, 100, 100, 100])
    sphere = run("sphere", [8, 16, 17, 17.1, 17.1, 17.1], "mmts_product_sphere: 8,8", "mmts_max_logit_scale: None")
    low = run("low", [8, 16, 16, 16, 16, 16], "mmts_product_sphere: 8,8", "mmts_max_logit_scale: 2.0")
    found = {path.name: learned(logs.read_run(path)) for path in (still, moving, clamped, sphere, low)}
    assert {name: each.still for name, each in found.items()} == {
        "still": 3, "moving": None, "clamped": 3, "sphere": 3, "low": 2}  # fmt: skip
    assert [name for name, each in found.items() if each.clamped] == ["clamped", "low"]
    assert (found["sphere"].last, found["sphere"].factor) == (pytest.approx(17.1), 8)
    assert main(["report", *map(str, (still, clamped, sphere)), "-o", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "report.html").read_text()
    assert (tmp_path / "page" / "temperatures.png").exists()
    assert "Learned temperatures" in page
    assert "17.1 (t = 2.138)" in page
    assert "clamped: the scale ends at its clamp" in page
    assert "still: the scale ends" not in page
