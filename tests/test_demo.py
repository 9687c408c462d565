"""``mmts demo``: its data, its page, what it refuses, and one short run of the real thing."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import run_python
from pages import assert_self_contained

from mmts_plugins import processes
from mmts_plugins.cli import main
from mmts_plugins.config import Config
from mmts_plugins.demo import data, make, report, train
from mmts_plugins.demo.evaluate import Scores
from mmts_plugins.errors import MMTSError
from mmts_plugins.record import record, write_record
from mmts_plugins.tables import ClusterTable

for package in ("sklearn", "matplotlib", "PIL", "pandas", "tqdm"):
    if importlib.util.find_spec(package) is None:
        pytest.skip(f"{package} is not installed", allow_module_level=True)

TARGET = np.arange(1800) % 10


# --- data -----------------------------------------------------------------------------------------------------------


def test_split_is_disjoint_balanced_and_long_tailed() -> None:
    parts = data.split(TARGET, seed=3)
    rows = np.concatenate([*parts.train.values(), *parts.held_out.values()])
    assert len(set(rows.tolist())) == len(rows)
    assert all((TARGET[rows] == digit).all() for of in (parts.train, parts.held_out) for digit, rows in of.items())
    assert {len(rows) for rows in parts.held_out.values()} == {data.HELD_OUT}
    sizes = [len(parts.train[digit]) for digit in parts.order]
    assert sizes == sorted(sizes, reverse=True)
    assert (sizes[0], sizes[-1]) == (data.HEAD, data.TAIL)
    assert sorted(digit for digits in parts.groups().values() for digit in digits) == list(range(10))


def test_split_follows_the_seed() -> None:
    one, same, other = (data.split(TARGET, seed) for seed in (0, 0, 1))
    assert one.order == same.order != other.order
    assert all((one.train[digit] == same.train[digit]).all() for digit in range(10))


def test_written_files_are_what_openclip_reads(tmp_path: Path) -> None:
    from PIL import Image

    parts = data.write(tmp_path, seed=0)
    again = tmp_path / "again"
    data.write(again, seed=0)
    for name, rows_of in (("train", parts.train), ("val", parts.held_out)):
        text = (tmp_path / "data" / f"{name}.tsv").read_text()
        assert text == (again / "data" / f"{name}.tsv").read_text()
        header, *lines = (line.split("\t") for line in text.splitlines())
        assert header == ["filepath", "title", "digit"]
        assert len(lines) == sum(map(len, rows_of.values()))
        for path, caption, digit in lines:
            assert caption in data.captions_of(int(digit))
            with Image.open(tmp_path / path) as image:
                assert (image.mode, image.size) == ("RGB", (32, 32))
        assert {caption for _, caption, _ in lines} == {c for digit in range(10) for c in data.captions_of(digit)}


# --- the trainer ----------------------------------------------------------------------------------------------------


def test_progress_is_read_from_openclips_log() -> None:
    line = (
        "2026-11-22,18:04:33 | INFO | Train Epoch: 39 [448/478 (50%)] Data (t): 0.027 Batch (t): 0.100, 637.216/s, "
        "637.216/s/gpu LR: 0.000000 Logit Scale: 14.484 Contrastive_loss: 2.3289 (2.2004) Loss: 1.5000 (2.2004)\n"
    )
    assert train.parse_progress(line) == train.Progress(39.5, 14.484, 1.5)
    diverged = train.parse_progress(line.replace("1.5000", "nan"))
    assert diverged is not None
    assert np.isnan(diverged.loss)
    assert train.parse_progress("2026-11-22,18:04:33 | INFO | Start epoch 3\n") is None


def test_a_failing_step_shows_the_end_of_its_output(tmp_path: Path) -> None:
    code = "import sys; [print('line', i) for i in range(99)]; sys.exit('disk is full')"
    with pytest.raises(MMTSError) as error:
        processes.run_logged([sys.executable, "-c", code], tmp_path)
    assert str(error.value).startswith("exit code 1 from: python -c")
    assert "line 98" in str(error.value)
    assert "line 9\n" not in str(error.value)
    assert str(error.value).endswith("disk is full")


def test_a_trainer_that_leaves_no_checkpoint_has_failed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(train, "TRAINER", "this")  # prints a poem and exits with 0
    with pytest.raises(MMTSError, match=r"ended without writing .*epoch_1\.pt"):
        train.train("plain", [], tmp_path, epochs=1)


# --- the folder -----------------------------------------------------------------------------------------------------


def test_a_foreign_folder_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    with pytest.raises(MMTSError, match="not the folder of a demo"):
        make.prepare(tmp_path, force=True)
    (tmp_path / "file").touch()
    with pytest.raises(MMTSError, match="is a file"):
        make.prepare(tmp_path / "file", force=True)
    assert {path.name for path in tmp_path.iterdir()} == {"data", "file"}


def test_a_finished_demo_is_replaced_only_on_request(tmp_path: Path) -> None:
    make.prepare(tmp_path, force=False)
    (tmp_path / "runs" / "plain").mkdir(parents=True)
    make.prepare(tmp_path, force=False)  # unfinished: nothing is lost
    assert not (tmp_path / "runs").exists()
    (tmp_path / "results.json").touch()
    (tmp_path / "my notes.txt").touch()
    with pytest.raises(MMTSError, match="--force"):
        make.prepare(tmp_path, force=False)
    make.prepare(tmp_path, force=True)
    assert {path.name for path in tmp_path.iterdir()} == {make.MARKER, "my notes.txt"}


def test_missing_packages_are_named_before_any_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(make, "NEEDED", ("json", "no_such_package"))
    assert main(["demo", "--output", str(tmp_path / "out")]) == 2
    assert f"the demo needs no_such_package: {make.EXTRAS}" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys; from mmts_plugins.commands import demo; import mmts_plugins.demo.make; "
        "print([name for name in ('torch', 'sklearn', 'matplotlib', 'pandas') if name in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


# --- the report -----------------------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tmp_path: Path) -> report.Outcome:
    """A finished comparison, without the training."""
    parts = data.split(TARGET, seed=0)
    digits = [digit for digit in range(10) for _ in data.TEMPLATES]
    ClusterTable.build(
        [caption for digit in range(10) for caption in data.captions_of(digit)],
        digits,
        [len(parts.train[digit]) for digit in digits],
    ).save(tmp_path / "clusters.parquet")
    runs = []
    for name in ("plain", "mmts"):
        checkpoint = tmp_path / "runs" / name / "checkpoints" / "epoch_2.pt"
        log = [train.Progress(epochs, 14.3, 2.0) for epochs in (0.5, 2.0)]
        runs.append(train.TrainingRun(name, f"python -m x --name '{name}' <&>", checkpoint, 12.34, log))
    config = Config("mmts-infonce", 0.04, 0.05, 0.10, "clusters.parquet")
    write_record(runs[1].checkpoint.parent / "mmts.yaml", record(config, 100, None, "open_clip_torch", "3.3.0"))

    def scores(share: float) -> Scores:
        recall = {way: {1: share, 5: 0.5, 10: 1.0} for way in ("image_to_text", "text_to_image")}
        return Scores(recall, share, dict.fromkeys(("head", "middle", "tail"), share), dict.fromkeys(range(10), share))

    return report.Outcome(0, 2, parts, scores(0.25), scores(0.2), *runs, "mmts cluster", 30.0, {"torch": "2"})


def test_report_is_one_self_contained_page(outcome: report.Outcome, tmp_path: Path) -> None:
    report.write(tmp_path, outcome)
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page, pictures=3)
    assert "&lt;&amp;&gt;" in page
    assert not re.search(r"\$\w", page)
    for name in ("temperatures", "cluster_sizes", "accuracy"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    assert not list(tmp_path.glob(".*.tmp"))


def test_report_describes_the_schedule_that_was_used(outcome: report.Outcome, tmp_path: Path) -> None:
    table = ClusterTable.load(tmp_path / "clusters.parquet")
    said = report.plot_temperatures(tmp_path / "t.png", table, outcome.mmts_run, outcome.plain_run)
    assert "over 100 steps, 5 cosine periods" in said
    assert "largest cluster 0.080 to 0.120" in said  # 0.10 and 0.05 are the shifts, 0.04 the amplitude
    assert "smallest cluster 0.030 to 0.070" in said


def test_a_plain_run_that_diverged_is_drawn_too(outcome: report.Outcome, tmp_path: Path) -> None:
    table = ClusterTable.load(tmp_path / "clusters.parquet")
    for log in ([train.Progress(1.0, 0.0, 2.0), train.Progress(2.0, float("nan"), 2.0)], [train.Progress(0.0, 1, 2)]):
        plain = dataclasses.replace(outcome.plain_run, progress=log)
        assert "over 100 steps" in report.plot_temperatures(tmp_path / "t.png", table, outcome.mmts_run, plain)


def test_table_shows_differences_in_points(outcome: report.Outcome) -> None:
    lines = outcome.table().splitlines()
    assert len({len(line) for line in lines}) == 1
    assert [cell.strip() for cell in lines[2].split("|")[1:-1]] == ["image → text R@1", "25.0", "20.0", "-5.0"]
    assert [cell.strip() for cell in lines[3].split("|")[1:-1]] == ["image → text R@5", "50.0", "50.0", "+0.0"]


# --- the numbers ------------------------------------------------------------------------------------------------------


def test_evaluation_measures_each_digit_and_direction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that is right but for one image of 0, which looks like a 1, and both of 9, which look like 8."""
    torch = pytest.importorskip("torch")
    from mmts_plugins.demo.evaluate import evaluate
    from mmts_plugins.evaluation import model

    digit_of = {caption: digit for digit in range(10) for caption in data.captions_of(digit)}
    looks_like = {(0, 1): 1, (9, 0): 8, (9, 1): 8}
    rows = [(digit, number) for number in (1, 0) for digit in (3, 9, 1, 0, 2, 4, 8, 7, 6, 5)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "val.tsv").write_text(
        "filepath\ttitle\tdigit\n" + "".join(f"{digit}_{number}\tx\t{digit}\n" for digit, number in rows)
    )

    def load(name: str, checkpoint: Path) -> tuple[str, Path, str]:
        return name, checkpoint, "tokenizer"

    def encode(name: str, checkpoint: Path, tokenizer: str, images: list, captions: list) -> tuple:
        assert (name, checkpoint) == ("the model", tmp_path / "epoch_1.pt")
        drawn = [tuple(map(int, image.relative_to(tmp_path).name.split("_"))) for image in images]
        return (torch.eye(10)[[looks_like.get(each, each[0]) for each in drawn]],
                torch.eye(10)[[digit_of[caption] for caption in captions]])  # fmt: skip

    monkeypatch.setattr(model, "load_model", load)
    monkeypatch.setattr(model, "encode", encode)
    parts = data.Split([0, 1, 2, 3, 4, 5, 6, 7, 8, 9], {}, {})
    scores = evaluate("the model", tmp_path / "epoch_1.pt", tmp_path, parts)
    # Ties are misses: 1 ties with the 0 that looks like it, 8 with both 9; the 9s are behind everything.
    assert scores.recall["image_to_text"] == pytest.approx({1: 17 / 20, 5: 17 / 20, 10: 17 / 20})
    assert scores.recall["text_to_image"] == pytest.approx({1: 7 / 10, 5: 9 / 10, 10: 9 / 10})
    assert scores.digits == pytest.approx({0: 0.5, **dict.fromkeys(range(1, 9), 1.0), 9: 0.0})
    assert scores.accuracy == pytest.approx(0.85)
    assert scores.groups == pytest.approx({"head": 2.5 / 3, "middle": 1, "tail": 2 / 3})


def test_the_results_name_each_number(outcome: report.Outcome, tmp_path: Path) -> None:
    digits = {digit: digit / 10 for digit in range(10)}
    recall = {"image_to_text": {1: 0.1, 5: 0.2, 10: 0.3}, "text_to_image": {1: 0.4, 5: 0.5, 10: 0.6}}
    mmts = Scores(recall, 0.7, {"head": 0.01, "middle": 0.02, "tail": 0.03}, digits)
    found = dataclasses.replace(outcome, mmts=mmts)
    assert [(name, value) for name, _, value in found.rows()][:7] == [
        ("image → text R@1", 0.1), ("image → text R@5", 0.2), ("image → text R@10", 0.3),
        ("text → image R@1", 0.4), ("text → image R@5", 0.5), ("text → image R@10", 0.6),
        ("accuracy, all digits", 0.7),
    ]  # fmt: skip
    order, sizes = outcome.split.order, [len(outcome.split.train[digit]) for digit in outcome.split.order]
    assert (sizes[0], sizes[-1]) == (140, 7)
    assert [(name, value) for name, _, value in found.rows()][7:] == [
        (f"accuracy, head: {order[0]}, {order[1]}, {order[2]} (140–{sizes[2]} images)", 0.01),
        (f"accuracy, middle: {', '.join(map(str, order[3:7]))} ({sizes[3]}–{sizes[6]} images)", 0.02),
        (f"accuracy, tail: {order[7]}, {order[8]}, {order[9]} ({sizes[7]}–7 images)", 0.03),
    ]
    assert found.as_json()["mmts"]["digits"] == digits
    assert found.as_json()["mmts"]["config"]["alpha"] == 0.04
    said = report.plot_accuracy(tmp_path / "a.png", found)
    assert f": {order[0]}: 25.0 and {10.0 * order[0]:.1f}; {order[1]}: 25.0 and {10.0 * order[1]:.1f};" in said


def test_the_record_of_an_older_run_lies_among_its_checkpoints(outcome: report.Outcome) -> None:
    checkpoint = outcome.mmts_run.checkpoint
    assert report.record_beside(checkpoint) == checkpoint.parent / "mmts.yaml"
    (checkpoint.parent / "mmts.yaml").rename(checkpoint.parent.parent / "mmts.yaml")
    assert report.record_beside(checkpoint) == checkpoint.parent.parent / "mmts.yaml"
    assert outcome.as_json()["mmts"]["config"]["alpha"] == 0.04


# --- the whole --------------------------------------------------------------------------------------------------------


def test_demo_end_to_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Both trainers are started, as a user's demo does; the table is made here, and the evaluation is known."""
    for package in ("open_clip", "open_clip_train"):
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"{package} is not installed")
    out = tmp_path / "out"
    really, evaluated = processes.run_logged, []

    def run_logged(words: list[str], folder: Path, *given: object, **named: object) -> None:
        if words[:4] == [sys.executable, "-m", "mmts_plugins", "cluster"]:
            with monkeypatch.context() as inside:
                inside.chdir(folder)
                assert main(words[3:]) == 0
        else:
            really(words, folder, *given, **named)

    def evaluate(model: str, checkpoint: Path, folder: Path, parts: data.Split) -> Scores:
        evaluated.append(checkpoint.relative_to(folder).as_posix())
        assert checkpoint.is_file()
        share = 0.25 * len(evaluated)
        recall = {way: {1: share, 5: share, 10: share} for way in ("image_to_text", "text_to_image")}
        return Scores(recall, share, dict.fromkeys(parts.groups(), share), dict.fromkeys(range(10), share))

    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for module in (make, train):
        monkeypatch.setattr(module, "run_logged", run_logged)
    monkeypatch.setattr("mmts_plugins.demo.evaluate.evaluate", evaluate)
    assert main(["demo", "--output", str(out), "--epochs", "1", "--seed", "1"]) == 0
    said = capsys.readouterr().out
    assert evaluated == ["runs/plain/checkpoints/epoch_1.pt", "runs/mmts/checkpoints/epoch_1.pt"]
    assert re.search(r"accuracy, tail: .* \|       25.0 \|  50.0 \|      \+25.0 \|", said)
    results = json.loads((out / "results.json").read_text())
    assert results["mmts"]["config"]["loss"] == "mmts-infonce"
    assert results["mmts"]["config"]["total_steps"] == 478 // 64
    assert (results["plain"]["accuracy"], results["mmts"]["accuracy"]) == (0.25, 0.5)
    assert "--loss" not in results["plain"]["command"]
    assert "--loss mmts --mmts-clusters clusters.parquet" in results["mmts"]["command"]
    assert_self_contained((out / "report.html").read_text(encoding="utf-8"), pictures=3)
    assert main(["demo", "--output", str(out)]) == 2
    assert "--force" in capsys.readouterr().err
