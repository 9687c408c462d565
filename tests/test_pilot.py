"""``mmts pilot``: one code path with a host's run, the same to the bit, resumed, judged by its controls."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("scipy", reason="needs the extra: pip install 'mmts-plugins[cluster]'")

from mmts_plugins import cli
from mmts_plugins.adapters.openclip import ADAPTER
from mmts_plugins.clustering import build
from mmts_plugins.data.captions import read_samples
from mmts_plugins.data.rows import Rows
from mmts_plugins.data.source import Source
from mmts_plugins.errors import ConfigError
from mmts_plugins.hosts.session import Facts
from mmts_plugins.pilot import data, report, run
from mmts_plugins.pilot.run import MAIN, Variant, contrasts, grid, usual, values_of
from mmts_plugins.pilot.train import Heads, PilotSession, Settings, _Known, measure, resolve, train
from mmts_plugins.tables import ClusterTable

CONCEPTS = [40, 30, 20, 15, 10, 8, 6, 4, 3, 2, 1, 1]  # captions of each, twice said
QUICK = ("--epochs", "6", "--batch-size", "32", "--dimensions", "16", "--jobs", "2", "--learning-rate", "0.02",
         "--hold-out", "0.4")  # fmt: skip


@pytest.fixture(scope="module")
def inputs(tmp_path_factory) -> dict[str, Path]:
    """280 pairs of noisy features of twelve concepts, their captions, the image of each, and their table."""
    folder = tmp_path_factory.mktemp("pilot")
    draw = np.random.default_rng(0)
    concept = np.repeat(np.arange(12), [2 * each for each in CONCEPTS])
    draw.shuffle(concept)
    centres = draw.normal(size=(12, 24))
    own = centres[concept] + draw.normal(size=(len(concept), 24))
    texts, others = (own + 0.5 * draw.normal(size=own.shape) for _ in range(2))
    captions = [f"a thing {each} seen {number}" for number, each in enumerate(concept)]
    lines = [f"{number % 140}.png\t{caption}\tthe other {caption}" for number, caption in enumerate(captions)]
    (folder / "data.tsv").write_text("image\ttitle\tsecond\n" + "\n".join(lines) + "\n")
    np.save(folder / "texts.npy", texts.astype(np.float32))
    np.save(folder / "others.npy", others[:, :20].astype(np.float32))
    sizes = np.bincount(concept)[concept]
    ClusterTable.build(captions, concept, sizes, np.ones(len(concept))).save(folder / "t.parquet")
    return {name: folder / file for name, file in (
        ("data", "data.tsv"), ("texts", "texts.npy"), ("others", "others.npy"), ("table", "t.parquet"))}  # fmt: skip


def words(inputs: dict[str, Path], output: Path, *more: object) -> list[str]:
    given = [inputs["data"], "--group", "image", "--texts", inputs["texts"], "--others", inputs["others"],
             "--table", inputs["table"], "-o", output, *QUICK, *more]  # fmt: skip
    return ["pilot", *map(str, given)]


@pytest.fixture(scope="module")
def finished(inputs, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("finished") / "pilot"
    assert cli.main(words(inputs, folder, "--seeds", 2)) == 0
    return folder


def test_it_writes_and_prints_what_it_found(inputs, finished, capsys, tmp_path):
    document = json.loads((finished / "pilot.json").read_text())
    assert list(document["variants"]) == ["plain", "TS", "constant", "ICS", "shuffled", "TS&ICS"]
    assert document["seeds"] == [0, 1]
    assert document["about"]["pairs"] + document["about"]["test pairs"] == 280
    assert len(list((finished / "runs").glob("*.json"))) == 12
    for name in ("report.html", "pilot.png", "pilot.md"):
        assert (finished / name).stat().st_size > 500
    text = (finished / "pilot.md").read_text()
    assert all(f"**{third}**" in text for third in ("all", "head", "middle", "tail"))
    assert "| TS&ICS − shuffled | 2 " in text
    assert report.HINT in text
    # Said again it trains nothing and comes to the same.
    before = {path: path.stat().st_mtime_ns for path in (finished / "runs").iterdir()}
    assert cli.main(words(inputs, finished, "--seeds", 2)) == 0
    assert {path: path.stat().st_mtime_ns for path in (finished / "runs").iterdir()} == before
    out = capsys.readouterr()
    assert "12 of 12 runs are there" in out.err
    assert text.strip() in out.out


def test_a_small_table_is_recomputed_from_the_saved_runs(finished):
    """Every number of the tables is a mean, a deviation or a difference of the runs' own files."""
    document = json.loads((finished / "pilot.json").read_text())
    saved: dict[tuple[str, int], float] = {}
    for name, flags in document["variants"].items():
        for seed in document["seeds"]:
            file = run._place(finished, Variant(name, flags), seed)
            saved[name, seed] = json.loads(file.read_text())["metrics"][MAIN]["value"]
    assert len(set(saved.values())) > 3
    for name in document["variants"]:
        entry = document["metrics"][name][MAIN]["all"]
        assert entry["mean"] == pytest.approx(np.mean([saved[name, seed] for seed in (0, 1)]))
        for other, found in entry.get("differences", {}).items():
            each = [saved[name, seed] - saved[other, seed] for seed in (0, 1)]
            assert found["mean"] == pytest.approx(np.mean(each))
            assert found["se"] == pytest.approx(np.std(each, ddof=1) / np.sqrt(2))


def test_a_seed_is_the_same_to_the_bit_and_another_is_not(inputs, finished):
    settings = Settings(6, 32, 16, 0.02)
    flags = ["--loss", "mmts-infonce", "--mmts-clusters", str(inputs["table"])]
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        one, again, other = (train(finished / data.FOLDER, ADAPTER, flags, seed, settings) for seed in (0, 0, 1))
    finally:
        torch.set_num_threads(threads)
    assert one == again
    assert one["losses"] != other["losses"]
    variant = Variant("TS&ICS", f"--loss mmts-infonce  --mmts-clusters {inputs['table']}".replace("  ", " "))
    saved = json.loads(run._place(finished, variant, 0).read_text())
    assert saved["losses"] == one["losses"]
    assert saved["metrics"] == one["metrics"]


def test_a_seed_draws_heads_and_order(inputs, finished, monkeypatch):
    settings = Settings(6, 32, 16, 0.02)
    monkeypatch.setattr(torch, "manual_seed", lambda seed: torch.default_generator.manual_seed(5))  # the same heads
    one, other = (train(finished / data.FOLDER, ADAPTER, [], seed, settings)["losses"] for seed in (0, 1))
    assert one[0] != other[0]


def test_killed_and_started_again_it_goes_on(inputs, finished, tmp_path):
    folder = tmp_path / "pilot"
    command = [sys.executable, "-m", "mmts_plugins", *words(inputs, folder, "--seeds", 2)]
    started = subprocess.Popen(command, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL, start_new_session=True)
    deadline = time.monotonic() + 100
    while not list(folder.glob("runs/*.json")) and time.monotonic() < deadline:
        assert started.poll() is None
        time.sleep(0.02)
    os.killpg(started.pid, signal.SIGKILL)
    started.wait()
    there = {path.name: path.stat().st_mtime_ns for path in folder.glob("runs/*.json")}
    assert 0 < len(there) < 12
    assert cli.main(words(inputs, folder, "--seeds", 2)) == 0
    for path in (folder / "runs").iterdir():
        assert path.name not in there or path.stat().st_mtime_ns == there[path.name]
    one, other = (json.loads((each / "pilot.json").read_text()) for each in (folder, finished))
    assert one["metrics"] == other["metrics"]


def test_a_budget_ends_with_whole_seeds(inputs, tmp_path, capsys, monkeypatch):
    ticks = iter(range(0, 100_000, 5))
    monkeypatch.setattr(run, "_clock", lambda: next(ticks))  # five seconds pass at every look
    assert cli.main(words(inputs, tmp_path / "p", "--seeds", 3, "--budget", 1, "--jobs", 1)) == 1
    out = capsys.readouterr().out
    assert "The budget of 1 minutes was enough for 1 of 3 seeds; call again for more." in out
    assert json.loads((tmp_path / "p/pilot.json").read_text())["seeds"] == [0]
    monkeypatch.undo()
    assert cli.main(words(inputs, tmp_path / "p", "--seeds", 3)) == 0
    assert json.loads((tmp_path / "p/pilot.json").read_text())["seeds"] == [0, 1, 2]


@pytest.mark.parametrize("loss", ["mmts", "mmts-max-margin"])
def test_its_loss_and_temperatures_are_those_of_an_openclip_run(loss, tmp_path, monkeypatch):
    """What a real run recorded, put into a pilot's session: the same temperatures and the same loss, to the bit."""
    pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")
    import open_clip
    from conftest import CAPTIONS, Data, write_model
    from open_clip_train.main import main
    from test_openclip import Recorder, flags

    made = tmp_path / "data"
    made.mkdir()
    files, recorder = Data(made), Recorder(monkeypatch)
    main(flags(write_model(tmp_path / "model"), files, tmp_path / "logs", loss=loss))
    monkeypatch.undo()
    assert len(recorder.calls) == 12
    resolved = resolve(ADAPTER, ["--loss", loss, "--mmts-clusters", str(files.table)])
    facts = Facts(12, torch.device("cpu"))
    session = PilotSession(ADAPTER, resolved, facts, lambda table: _Known(table, CAPTIONS))
    known = {tuple(open_clip.tokenize([text], 12)[0].tolist()): row for row, text in enumerate(CAPTIONS)}
    for call in recorder.calls:
        session.at_step(call["step"])
        rows = torch.tensor([known[tuple(row.tolist())] for row in call["tokens"]])
        temperatures = session.temperatures(rows)
        assert torch.equal(temperatures, call["temperature"])
        value = session.loss(call["image"].float(), call["text"].float(), temperatures)
        assert float(value) == call["loss"]


def test_a_margin_and_variants_of_ones_own(inputs, tmp_path, capsys):
    more = ("--loss", "mmts-max-margin", "--seeds", 1, "--grid", "alpha=0.1,0.2", "--grid", "num_oscillations=1",
            "--variant", "low=--loss mmts-max-margin --mmts-no-shifts --mmts-start-phase 0.5",
            "--table", f"again={inputs['table']}")  # fmt: skip
    assert cli.main(words(inputs, tmp_path / "p", *more)) == 0
    document = json.loads((tmp_path / "p/pilot.json").read_text())
    names = ["plain", "TS", *(f"{each} {table}" for table in ("t", "again") for each in
                              ("constant", "ICS", "shuffled", "TS&ICS"))]  # fmt: skip
    assert list(document["variants"]) == [
        *names, "TS&ICS alpha 0.1 num_oscillations 1", "TS&ICS alpha 0.2 num_oscillations 1", "low"
    ]  # fmt: skip
    assert document["variants"]["plain"] == "--loss mmts-max-margin --mmts-no-schedule --mmts-no-shifts"
    values = {name: entry[MAIN]["all"]["mean"] for name, entry in document["metrics"].items()}
    assert values["TS&ICS t"] == values["TS&ICS again"]


def test_text_beside_text_embedded_here(inputs, tmp_path, capsys):
    given = ["pilot", inputs["data"], "--other", "second", "--encoder", "hashing", "--table", inputs["table"],
             "--test", inputs["data"], "-o", tmp_path / "p", "--seeds", 1, *QUICK[:-2]]  # fmt: skip
    assert cli.main([str(word) for word in given]) == 0
    about = json.loads((tmp_path / "p/pilot.json").read_text())["about"]
    assert (about["texts"], about["pairs"], about["test pairs"]) == ("hashing", 280, 280)
    given[given.index("hashing")] = "tfidf"
    assert cli.main([str(word) for word in given]) == 2
    assert "--encoder tfidf is fitted to the texts it is given" in capsys.readouterr().err


def test_captions_are_embedded_in_the_order_of_mmts_cluster(tmp_path, monkeypatch):
    """Or the cache, whose parts are named by their captions in order, would hold nothing for a pilot."""
    (tmp_path / "d.tsv").write_text("title\nb cat\na dog\nb cat\na bird\n")
    asked = []

    def embedded(encoder: str, captions: list[str]) -> Rows:
        asked.append(captions)
        return Rows(np.arange(len(captions), dtype=np.float32)[:, None])

    monkeypatch.setattr("mmts_plugins.data.embed.texts", embedded)
    source = Source(str(tmp_path / "d.tsv"))
    found = data.read(source, data.Side(None, "x"), data.Side(None, "x", "title"), None, False)
    samples = read_samples(source)
    prepared = build.distinct(samples.captions)[0]
    assert asked == [prepared, prepared] == [["b cat", "a dog", "a bird"]] * 2
    assert found.texts[:, 0].tolist() == [0, 1, 0, 2]


def test_groups_stay_on_one_side_and_are_right_for_one_another(inputs, finished):
    training, test, thirds = data.load(finished / data.FOLDER)
    assert not set(training.group.tolist()) & set(test.group.tolist())
    assert len(set(test.group.tolist())) == len(test) / 2
    assert len(thirds) == len(test)
    assert set(thirds.tolist()) == {0, 1, 2}


def test_its_temperatures_move(inputs, finished):
    """A schedule of another phase is another run, though its mean is the same."""
    settings = Settings(6, 32, 16, 0.02)
    one, other = (train(finished / data.FOLDER, ADAPTER, ["--loss", "mmts", "--mmts-no-shifts", *more], 0, settings)
                  for more in ((), ("--mmts-num-oscillations", "1")))  # fmt: skip
    assert one["losses"][0] == other["losses"][0]
    assert one["losses"][5] != other["losses"][5]


def test_a_learned_temperature_does_not_decay(finished):
    """As in CLIP: nothing pulls it where its gradient does not."""
    found = train(finished / data.FOLDER, ADAPTER, [], 0, Settings(6, 32, 16, learning_rate=1e-9, weight_decay=1e6))
    assert found["temperature"] == pytest.approx(0.07, rel=1e-5)


def test_recall_is_of_groups():
    """Three things with two texts each; the second's first text is taken for the first thing, all else is right."""
    things = np.eye(3, dtype=np.float32)
    texts = things[[0, 0, 0, 1, 2, 2]]
    pairs = data.Pairs(["x"] * 6, texts, things[[0, 0, 1, 1, 2, 2]], np.array([4, 4, 7, 7, 9, 9]))
    heads = Heads(3, 3, 3)
    with torch.no_grad():
        heads.text.weight.copy_(torch.eye(3))
        heads.other.weight.copy_(torch.eye(3))
    found = measure(heads, pairs, np.array([0, 0, 0, 1, 2, 2]), torch.device("cpu"))
    assert found["text_to_other_R@1"]["value"] == pytest.approx(5 / 6)
    assert found["text_to_other_R@1"]["head"]["value"] == pytest.approx(2 / 3)
    assert found["text_to_other_R@1"]["middle"]["value"] == 1
    # The first thing's nearest texts are three, of which one is another's: a tie, which counts against it.
    assert found["other_to_text_R@1"]["value"] == pytest.approx(2 / 3)


def results(**by_variant: list[float]) -> dict[tuple[str, int], dict[str, Any]]:
    return {(name.replace("_and_", "&"), seed): {"metrics": {MAIN: {"value": value}}}
            for name, values in by_variant.items() for seed, value in enumerate(values)}  # fmt: skip


def verdict(**by_variant: list[float]) -> str:
    fixed = " --mmts-no-schedule --mmts-no-shifts"
    variants = [Variant(name.replace("_and_", "&"), f"--flags-of-{name}" + fixed * name.startswith("constant"))
                for name in by_variant]  # fmt: skip
    found = report.tables.summary(values_of(variants, results(**by_variant)), contrasts(variants))
    return report.judged(variants, found, MAIN)


def test_what_it_says_of_numbers():
    noise = [0.001, -0.001, 0.002, -0.002]
    plain = [0.5 + each for each in noise]
    assert verdict(plain=plain, TS=[0.5 - each for each in noise]).startswith("No difference seen")
    assert verdict(plain=plain, TS=[0.5005 + 3 * each for each in noise]).startswith("No difference seen")
    said = verdict(plain=plain, TS=[0.53, 0.529, 0.531, 0.53])
    assert "- TS: +3.0 points over plain" in said
    assert said.endswith("--flags-of-TS")
    # What the control reaches as well is not the method's.
    said = verdict(plain=plain, shuffled=[0.53, 0.531, 0.529, 0.53], TS_and_ICS=[0.53, 0.529, 0.531, 0.53])
    assert "(over shuffled +0.0, none seen)" in said
    assert said.endswith("None of them is a method that its controls do not reach: nothing here speaks for one.")
    better = [0.55, 0.551, 0.549, 0.55]
    said = verdict(plain=plain, constant=plain[::-1], shuffled=[0.53, 0.531, 0.529, 0.53], TS_and_ICS=better)
    assert "(over constant +5.0; over shuffled +2.0)" in said
    assert "no control reaches, TS&ICS:\n\n    --flags-of-TS_and_ICS" in said
    # A constant of another height is nobody's control, and still the simpler thing.
    said = verdict(plain=plain, TS=[0.53, 0.529, 0.531, 0.53], constant_high=[0.54, 0.541, 0.539, 0.54])
    assert said.endswith("But constant_high never moves and is as good (TS over it: -1.0 points): nothing here speaks "
                         "for more than another constant.")  # fmt: skip
    said = verdict(plain=plain, TS=[0.55, 0.549, 0.551, 0.55], constant_high=[0.54, 0.541, 0.539, 0.54])
    assert said.endswith("--flags-of-TS")


def test_the_usual_variants_and_a_grid():
    assert [each.name for each in usual("mmts-infonce", {"a": "a.parquet"}, "", True)] == [
        "plain", "TS", "constant", "ICS", "shuffled", "TS&ICS"
    ]  # fmt: skip
    made = grid("mmts-infonce", {"a": "a b.parquet"}, "--mmts-alpha 0.02", {"period": ["4", "8"]})
    assert made[1] == Variant(
        "TS&ICS period 8",
        "--loss mmts-infonce --mmts-alpha 0.02 --mmts-clusters 'a b.parquet' --mmts-period 8",
    )
    assert made[1].words(0)[5] == "a b.parquet"
    assert not grid("mmts-infonce", {"a": "a"}, "", {})


def test_what_is_refused_before_anything_is_written(inputs, tmp_path, capsys):
    def refused(message: str, *more: object, drop: int = 0) -> None:
        given = words(inputs, tmp_path / "p", *more)
        assert cli.main(given[: len(given) - drop]) == 2
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert error.startswith("mmts: error: ")
        assert message in error
        assert not (tmp_path / "p").exists()

    refused("--mmts-alphaa; did you mean --mmts-alpha?", "--mmts", "--mmts-alphaa 3")
    refused("--lr: a variant of a pilot takes --loss and --mmts-* flags alone", "--variant", "x=--lr 3")
    refused("two variants have one name", "--variant", "TS=--loss mmts --mmts-no-shifts")
    refused("unknown --loss 'mmts-x'", "--loss", "mmts-x")
    refused("--host 'clip' has no adapter; choose from avion", "--host", "clip")
    refused("one of --others FILE, --images COLUMN and --other COLUMN", "--other", "second")
    refused("--images COLUMN and --image-encoder NAME go together", "--image-encoder", "timm:x")
    refused("--hold-out 1: a share above 0 and below 1", "--hold-out", 1)
    refused("--hold-out 0.01 leaves", "--hold-out", 0.01)
    refused("--weights: a pilot draws every sample once an epoch; leave it out", "--weights", "2")
    refused("--test-texts goes with --test DATA", "--test-texts", inputs["texts"])
    refused("with --test, --texts and --test-texts go together", "--test", inputs["data"])
    refused("write a flag without --mmts-, and values", "--grid", "alpha")
    refused("two tables are called 't'", "--table", inputs["table"])
    refused("no such cluster table", "--table", tmp_path / "nowhere.parquet")
    short = tmp_path / "short.npy"
    np.save(short, np.zeros((3, 4), np.float32))
    refused("3 rows for 280 samples", "--texts", short)
    classes = tmp_path / "classes.parquet"
    ClusterTable.build(["1", "2"], [0, 1], [3, 4], kind="class").save(classes)
    refused("a table of classes; a pilot finds samples by their captions", "--table", classes)


def test_another_pilots_results_are_not_mixed_in(inputs, finished, capsys, tmp_path):
    import shutil

    folder = tmp_path / "copy"
    shutil.copytree(finished, folder)
    assert cli.main(words(inputs, folder, "--seeds", 2, "--epochs", 7)) == 2
    assert "holds results of other features, tables or settings ('plain', seed 0)" in capsys.readouterr().err
    before = {path: path.read_bytes() for path in (folder / data.FOLDER).iterdir()}
    assert len(before) == 7
    assert cli.main([*words(inputs, folder, "--seeds", 2), "--hold-out", "0.3"]) == 2
    assert "settings (other features)" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in (folder / data.FOLDER).iterdir()} == before
    assert cli.main(words(inputs, folder, "--seeds", 1, "--epochs", 7, "--force")) == 0
    with pytest.raises(ConfigError, match="make 6 steps of"):
        run.pilot(folder, ADAPTER, [Variant("plain")], [0], Settings(1, 26), 1, 1)
