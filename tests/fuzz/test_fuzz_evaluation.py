"""What ``mmts eval`` and ``mmts report`` read: logs, records, results, checkpoints, features, sets, classes."""

from __future__ import annotations

import io
import json
import math
import pickle
import re
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from fuzzing import fuzz, survives
from hypothesis import strategies as st

from mmts_plugins.errors import ConfigError
from mmts_plugins.evaluation import evaluate, model, relevancy, sets
from mmts_plugins.hosts import registry
from mmts_plugins.report import logs, page, plots, run, table

SINGLE = st.one_of(
    st.none(), st.booleans(), st.integers(), st.sampled_from([10**400, -1, 2**63, 2**31, 10**20, 0]), st.floats(),
    st.text(max_size=12), st.sampled_from(["\ud800", "\0", "$x$", "<i>", "a\nb", "1e400", "nan", "²", "x" * 5000]),
)  # fmt: skip
ANYTHING = st.recursive(
    SINGLE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=8,
)
NUMBERS = st.sampled_from(
    ["0", "0.000", "1", "14.286", "nan", "inf", "-1", "1e5", "1.2.3", "9" * 400, "x", "", "٣", "-"]
)

PIECES = [b"\0", b"\xff", b"\n", b'"', b"[" * 2000, b"9" * 5000, b"NaN", b"1e999", b"\\ud800", b"$", b"\t"]


@st.composite
def damaged(draw: st.DrawFn, good: bytes) -> bytes:
    """Valid bytes with some of them changed, cut, doubled or put in; sometimes nothing but garbage."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=200))
    found = bytearray(good)
    for _ in range(draw(st.integers(1, 4))):
        where = draw(st.integers(0, len(found)))
        how = draw(st.integers(0, 3))
        if how == 0 and where < len(found):
            found[where] = draw(st.integers(0, 255))
        elif how == 1:
            del found[where : where + draw(st.integers(1, 40))]
        elif how == 2:
            found[where:where] = draw(st.binary(max_size=8) | st.sampled_from(PIECES))
        else:
            del found[where:]
    return bytes(found)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    registry.adapters()  # imports torch, which no case is to be charged with
    return tmp_path_factory.mktemp("fuzzed")


def check(found: Optional[logs.TrainingLog]) -> None:
    """Numbers that can be drawn, and text that can be shown."""
    if found is None:
        return
    for name, values in found.series.items():
        assert name.isprintable()
        assert values.dtype == np.float64
        assert values.ndim == 2
        assert values.shape[1] == 2
        assert np.isfinite(values).all()
    assert len(found.steps) == len(found.series.get("tau_base", ()))
    for name, metric in found.metrics.items():
        assert name.isprintable()
        for score in (metric.score, *metric.thirds.values()):
            assert all(value is None or math.isfinite(value) for value in (score.value, score.low, score.high))
    for text in (found.name, found.host, *found.settings, *found.settings.values()):
        assert text.isprintable()


# --- training runs ----------------------------------------------------------------------------------------------------

LINE = "2026 | INFO | Train Epoch: {} [ 8/48 ({}%)] LR: 0.1 Logit Scale: {} Loss: {} (2.5)"
TRUTH = [(epoch, LINE.format(epoch, 0, "20.000", f"{4 - epoch}")) for epoch in (1, 2, 3)]


@fuzz(st.lists(st.one_of(
    st.tuples(NUMBERS, NUMBERS, NUMBERS, NUMBERS).map(lambda each: LINE.format(*each)),
    st.text(max_size=200), st.just("Train Epoch: 1 [(" * 50_000), damaged(TRUTH[0][1].encode()).map(repr)),
    max_size=4))  # fmt: skip
def test_a_hosts_log(folder: Path, lines: list[str]) -> None:
    """Whatever stands between them, the lines of a run that went on are read."""
    mixed = "\n".join([*lines, *(line for _, line in TRUTH)])
    (folder / "out.log").write_text(mixed, encoding="utf-8", errors="surrogatepass")
    found = survives(lambda: logs.read_run(folder))
    (folder / "out.log").unlink()
    check(found)
    known = found.series["loss"][-3:, 1].tolist()
    assert known == [3, 2, 1], found.series["loss"]
    assert found.series["learned_temperature"][-3:, 1].tolist() == [0.05] * 3


@fuzz(st.dictionaries(st.sampled_from(["step", "total_steps", "loss", "tau_base", "epoch", "$x$", "a\nb"]), ANYTHING),
      st.lists(st.text(max_size=60) | damaged(b'{"step": 5, "loss": 1.0}').map(str), max_size=3),
      st.booleans())  # fmt: skip
def test_our_log(folder: Path, odd: dict[str, Any], garbage: list[str], torn: bool) -> None:
    """Lines that nobody damaged keep their values, unless a later line of that step has another."""
    truth = {step: {"step": step, "total_steps": 100, "loss": step / 7, "tau_base": step / 9} for step in (0, 10, 20)}
    lines = [json.dumps(odd), *garbage, *map(json.dumps, list(truth.values())[:2])]
    text = "\n".join(lines) + "\n" + ('{"step": 15, "lo' if torn else "") + json.dumps(truth[20]) + "\n"
    (folder / "mmts.jsonl").write_text(text, encoding="utf-8", errors="surrogatepass")
    found = survives(lambda: logs.read_run(folder))
    check(found)
    steps = found.steps.tolist()
    for step, values in truth.items():
        assert step in steps
        assert values["tau_base"] == found.series["tau_base"][steps.index(step), 1]
        assert values["loss"] in found.series["loss"][:, 1]
    (folder / "mmts.jsonl").unlink()


RECORD = (
    b"# written by mmts-plugins; compared on resume\nloss: mmts-infonce\nalpha: 0.04\nshift_min: 0.05\nshift_max: 0.1\n"
    b"clusters: null\nnum_oscillations: 5.0\nperiod: 20.0\nno_schedule: false\nno_shifts: true\ntotal_steps: 100\n"
    b"table_hash: null\nhost: open_clip_torch\nhost_version: 3.3.0\n"
)


@fuzz(st.one_of(
    damaged(RECORD),
    st.tuples(st.sampled_from(["alpha", "shift_min", "period", "num_oscillations", "total_steps", "clusters", "loss",
                               "host", "no_shifts", "2001-99-99", "[1]", "x"]), ANYTHING)
    .map(lambda pair: RECORD + f"{pair[0]}: {json.dumps(pair[1])}\n".encode())))  # fmt: skip
def test_a_record_and_its_page(folder: Path, content: bytes) -> None:
    """The schedule that is drawn is the recorded one, or none; the page and the card can be written."""
    (folder / "mmts.yaml").write_bytes(content)
    found = survives(lambda: logs.read_run(folder))
    (folder / "mmts.yaml").unlink()
    check(found)
    if found is None or not found.record:
        return
    plan, notes = survives(lambda: run._preview(found))
    if plan is None:
        assert any("does not describe a schedule" in note for note in notes)
    else:
        for name in ("alpha", "shift_min", "shift_max"):
            assert plan.values[name] == found.record[name]
            assert math.isfinite(plan.values[name])
        assert np.isfinite(plan.base(np.array([0, plan.total_steps - 1]))).all()
        assert all(math.isfinite(shift) for shift in plan.shifts.values())
    made = page.Page(found.name)
    survives(lambda: run._configuration(made, [found]))
    survives(lambda: run._differences(made, [found, found]))
    survives(lambda: made.write(folder / "page.html"))
    survives(lambda: run.model_card(found).encode("utf-8"))


@fuzz(st.dictionaries(st.text(max_size=20), ANYTHING, max_size=5),
      st.none() | damaged(b'{"metrics": {"R@1": {"value": 0.5, "low": 0.4, "high": 0.6}}}'))  # fmt: skip
def test_results(folder: Path, entries: dict[str, Any], content: Optional[bytes]) -> None:
    """A number that is there is the metric; nothing else becomes one."""
    (folder / "mmts_eval.json").write_bytes(json.dumps({"metrics": entries}).encode() if content is None else content)
    found = survives(lambda: logs.read_run(folder))
    (folder / "mmts_eval.json").unlink()
    check(found)
    if content is None:
        metrics = found.metrics if found is not None else {}
        usual = {name for name in entries if name.isprintable() and name == " ".join(name.split())}
        for name in usual & set(metrics):
            entry = entries[name]["value"] if isinstance(entries[name], dict) else entries[name]
            assert metrics[name].score.value == float(entry)
        for name in usual - set(metrics):
            entry = entries[name]
            assert isinstance(entry, bool) or not isinstance(entry, (int, float)) or not abs(entry) <= 1e30


@fuzz(st.text(max_size=60), st.integers(12, 60))
def test_text_of_others(text: str, longest: int) -> None:
    from matplotlib import cbook

    literal = survives(lambda: plots.literal(text, longest))
    assert not cbook.is_math_text(literal)
    assert literal.isprintable()
    assert not literal.startswith("_")
    assert len(literal.replace("\\$", "$")) <= longest + 1
    assert all(ord(each) in plots._glyphs() for each in literal)
    escaped = survives(lambda: page.escaped(text))
    assert not re.search(r"[<>\"'\x00-\x08\x0b-\x1f\x7f]", escaped)
    escaped.encode("utf-8")
    (name, again) = page.slugs([text, text])
    assert name != again
    assert len(f".model_card_{again}.md.12345678.tmp".encode()) < 255
    assert "/" not in name


@fuzz(ANYTHING)
def test_metadata_of_a_table(value: Any) -> None:
    assert len(survives(lambda: table._plain(value))) <= 480


# --- checkpoints and features -----------------------------------------------------------------------------------------


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("bombed", "w"))


def saved(value: Any, zipped: bool = True) -> bytes:
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=zipped)
    return stream.getvalue()


WEIGHTS = {"epoch": 1, "state_dict": {"visual.proj": torch.ones(2, 3), "logit_scale": torch.ones(())}}
CHECKPOINTS = [saved(WEIGHTS), saved(WEIGHTS, zipped=False), pickle.dumps(Bomb()), saved([Bomb()]),
               saved({"state_dict": Bomb()}, zipped=False)]  # fmt: skip


@fuzz(st.sampled_from(CHECKPOINTS).flatmap(damaged) | ANYTHING.map(saved) | st.sampled_from(CHECKPOINTS))
def test_a_checkpoint(folder: Path, content: bytes) -> None:
    """Never code; what is taken is a mapping of names to tensors."""
    path = folder / "epoch_1.pt"
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)

        def weights() -> Any:
            with model.reading(path, "cannot be loaded"):
                model._check_weights(str(path))
                return torch.load(path, weights_only=True)

        found = survives(weights)
    assert not (folder / "bombed").exists()
    if found is not None:
        state = found.get("state_dict", found)
        assert state
        assert all(isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in state.items())


def npy(points: np.ndarray) -> bytes:
    stream = io.BytesIO()
    np.save(stream, points)
    return stream.getvalue()


def safetensors(points: np.ndarray) -> bytes:
    from safetensors.numpy import save

    return bytes(save({"features": points}))


@fuzz(st.sampled_from(["<f4", "<f8", "<f2", "<i4", "<c8", "<U3"]), st.sampled_from([".npy", ".safetensors"]), st.data())
def test_features(folder: Path, kind: str, suffix: str, data: st.DataObject) -> None:
    """What is taken is finite and of length 1; undamaged it is the direction of every row."""
    points = np.arange(1, 13).reshape(4, 3).astype(kind)
    good = (npy if suffix == ".npy" or kind in ("<c8", "<U3") else safetensors)(points)
    content = data.draw(st.just(good) | damaged(good))
    path = folder / f"f{suffix}"
    path.write_bytes(content)
    found = survives(lambda: evaluate.read_features(str(path), "--image-features"))
    if found is not None:
        assert found.dtype == torch.float32
        assert found.norm(dim=1).tolist() == pytest.approx([1] * len(found), abs=1e-5)
    if content == good and kind not in ("<c8", "<U3"):
        expected = points.astype(float) / np.linalg.norm(points.astype(float), axis=1, keepdims=True)
        assert found.numpy() == pytest.approx(expected, abs=1e-3 if kind == "<f2" else 1e-6)


@fuzz(st.integers(-1040, 1020), st.integers(-1040, 1020), st.booleans())
def test_features_of_any_magnitude(folder: Path, one: int, other: int, single: bool) -> None:
    points = np.array([[3.0, 4.0], [-4.0, 3.0]]) * [[2.0**one], [2.0**other]]
    with np.errstate(over="ignore", under="ignore"):
        points = points.astype(np.float32) if single else points
    np.save(folder / "m.npy", points)
    found = survives(lambda: evaluate.read_features(str(folder / "m.npy"), "--image-features"))
    smallest = 2.0 ** (-145 if single else -1066)  # digits are left
    if np.isfinite(points).all() and np.abs(points).min() > smallest:
        assert found.tolist() == [pytest.approx([0.6, 0.8], abs=0.1), pytest.approx([-0.8, 0.6], abs=0.1)]


# --- sets, classes, relevancies ---------------------------------------------------------------------------------------

KARPATHY = [{"split": "test", "filename": f"{n}.jpg", "sentences": [{"raw": f"image {n}, {k}"} for k in range(2)]}
            for n in range(3)]  # fmt: skip


@fuzz(st.sampled_from(["split", "filename", "filepath", "sentences", "raw"]), ANYTHING, st.booleans())
def test_a_karpathy_file(folder: Path, name: str, value: Any, dropped: bool) -> None:
    """One image is changed: the others are as they were, or nothing is taken."""
    images = json.loads(json.dumps(KARPATHY))
    target = images[1]["sentences"][0] if name == "raw" else images[1]
    if dropped:
        target.pop(name, None)
    else:
        target[name] = value
    (folder / "k.json").write_text(json.dumps({"images": images}))
    found = survives(lambda: sets.read(sets.Reading(str(folder / "k.json"))))
    if found is not None:
        for row in (0, 2):
            where = found.images.index(Path(f"{row}.jpg"))
            assert [found.captions[each] for each in found.image_rows[where]][:2] == [
                f"image {row}, 0",
                f"image {row}, 1",
            ]
            assert [found.caption_group[each] for each in found.image_rows[where]] == [found.image_group[where]] * len(
                found.image_rows[where])  # fmt: skip
        "\0".join(found.captions).encode()


FORMS = {
    ".json": json.dumps({"images": KARPATHY}).encode(),
    ".jsonl": b"\n".join(json.dumps({"filepath": f"{n}.png", "caption": f"text {n}"}).encode() for n in range(4)),
    ".tsv": "\n".join(["filepath\ttitle\tlabel", *(f"{n}.png\ttext {n} é\t{n % 2}" for n in range(4))]).encode(),
}


@fuzz(st.sampled_from(sorted(FORMS)), st.data(), st.sampled_from(["\t", ",", "\\t", "(", "", "\0", "é"]), st.booleans())
def test_a_damaged_set(folder: Path, suffix: str, data: st.DataObject, separator: str, labels: bool) -> None:
    path = folder / f"set{suffix}"
    path.write_bytes(data.draw(damaged(FORMS[suffix])))
    asked = sets.Reading(str(path), separator=separator, label_column="label" if labels else None)
    found = survives(lambda: sets.read(asked))
    if found is not None:
        assert len(found.images) == len(found.image_group) == len(found.image_rows) > 0
        assert len(found.captions) == len(found.caption_group)
        "\0".join(found.captions).encode()


@fuzz(st.text(max_size=60) | damaged(b"dog\ncat\nold tree\n").map(lambda x: x.decode("latin-1")),
      st.lists(st.sampled_from(["dog", "cat", "0", "1", "9", "x" * 5000, "$"]), min_size=1, max_size=4))  # fmt: skip
def test_classes_and_templates(folder: Path, text: str, labels: list[str]) -> None:
    path = folder / "classes.txt"
    path.write_text(text, encoding="utf-8", errors="surrogatepass")
    names = survives(lambda: evaluate._lines(str(path), "--classes"))
    prompts = survives(lambda: evaluate._prompts(str(path), ["dog"]))
    assert prompts is None or all("{}" not in each for each in prompts)
    if names is not None:
        found = survives(lambda: evaluate._label_numbers(labels, names, str(path)))
        if found is not None:
            assert [names[number] if set(labels) <= set(names) else str(number) for number in found.tolist()] == labels


@fuzz(damaged(b"0\n1\n1\n2\n") | st.lists(SINGLE.map(str), max_size=5).map(lambda x: "\n".join(x).encode(
    "utf-8", "surrogatepass")))  # fmt: skip
def test_whose_caption(folder: Path, content: bytes) -> None:
    (folder / "owner.txt").write_bytes(content)
    found = survives(lambda: evaluate._read_index(str(folder / "owner.txt"), 4, 3))
    if found is not None:
        assert set(found.tolist()) == {0, 1, 2}
        assert len(found) == 4


MATRIX = np.array([[1, 0.5, 0], [0.25, 1, 0]])


@fuzz(st.sampled_from([".csv", ".npy"]), st.data())
def test_a_relevancy(folder: Path, suffix: str, data: st.DataObject) -> None:
    from mmts_plugins.evaluation.retrieval import graded

    good = npy(MATRIX) if suffix == ".npy" else b"1,0.5,0\n0.25,1,0\n"
    content = data.draw(st.just(good) | damaged(good))
    (folder / f"r{suffix}").write_bytes(content)
    both = survives(lambda: relevancy.read_matrix(str(folder / f"r{suffix}"), 2, 3))
    if both is None:
        return
    found = survives(lambda: graded(torch.eye(2, 3), torch.eye(3), both.of_images))
    assert found is None or all(((values >= 0) & (values <= 1)).all() for values in found.values())
    if content == good:
        assert both.of_images(0, 2).tolist() == MATRIX.tolist()


EK100 = (b'narration_id,narration,verb_class,noun_class,all_noun_classes\nP1,take plate,0,2,"[2]"\n'
         b'P2,take cup,0,13,"[2, 13]"\nP3,stir,10,34,[34]\n')  # fmt: skip


@fuzz(damaged(EK100))
def test_annotations(folder: Path, content: bytes) -> None:
    (folder / "ek.csv").write_bytes(content)
    found = survives(lambda: relevancy.read_ek100(str(folder / "ek.csv"), None))
    if found is not None:
        own = survives(lambda: found.relevancy().of_texts(0, len(found.captions)))
        assert ((own >= 0) & (own <= 1)).all()
        assert (own[np.arange(len(found.captions)), found.clip_of] == 1).all()


@fuzz(damaged(b"class_id,count\n7,1\n0,3617\n2,40\n"))
def test_counts_of_a_report(folder: Path, content: bytes) -> None:
    (folder / "c.csv").write_bytes(content)
    survives(lambda: table.read(str(folder / "c.csv")))


def test_what_is_raised_here_is_seen() -> None:
    """The harness itself: one of our errors is survived, nothing else is."""

    def fails() -> None:
        raise ValueError("not ours")

    def refuses() -> None:
        raise ConfigError("some file: refused")

    assert survives(refuses) is None
    with pytest.raises(ValueError, match="not ours"):
        survives(fails)
