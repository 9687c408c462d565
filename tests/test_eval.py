"""``mmts eval``: the same numbers by every road, intervals and thirds against brute force, and what it refuses."""

from __future__ import annotations

import gzip
import importlib.util
import io
import json
import os
import pickle
import random
import tarfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any, Optional

import numpy as np
import pytest
import torch
from conftest import REPOSITORY, run_python

from mmts_plugins.cli import main
from mmts_plugins.errors import ConfigError, MMTSError
from mmts_plugins.evaluation import evaluate, frequency, relevancy, sets
from mmts_plugins.evaluation.statistics import Measure, Queries, class_mean, mean, median, summarise
from mmts_plugins.tables import CLASS, ClusterTable

for package in ("open_clip", "pandas", "sklearn", "tqdm", "PIL"):
    if importlib.util.find_spec(package) is None:  # importing them all takes seconds that most tests do not need
        pytest.skip(f"{package} is not installed", allow_module_level=True)

ANIMALS = ("dog", "cat", "sea", "old tree")


class Set:
    """Eight images with three captions each in every form, a small model's checkpoint, and its features."""

    def __init__(self, folder: Path, model: str) -> None:
        import open_clip
        from PIL import Image

        from mmts_plugins.evaluation.model import encode, load_model

        self.folder, self.model = folder, model
        self.checkpoint = folder / "run" / "checkpoints" / "epoch_1.pt"
        self.checkpoint.parent.mkdir(parents=True)
        torch.manual_seed(0)
        net = open_clip.create_model(model)
        torch.save({"epoch": 1, "state_dict": net.state_dict()}, self.checkpoint)
        draw = random.Random(1)
        self.images, self.captions, self.labels = [], [], []
        for number in range(8):
            path = folder / f"{number}.png"
            Image.frombytes("RGB", (16, 16), draw.randbytes(768)).save(path)
            self.images.append(path)
            self.labels.append(ANIMALS[number % 4])
            self.captions.append([f"a {word} {self.labels[-1]} {number}" for word in ("big", "wet", "grey")])
        self.texts = [caption for captions in self.captions for caption in captions]
        self._write()
        net, preprocess, tokenizer = load_model(model, self.checkpoint)
        images, texts = encode(net, preprocess, tokenizer, self.images, self.texts)
        np.save(folder / "images.npy", images.numpy())
        np.save(folder / "texts.npy", texts.numpy())
        np.save(folder / "owner.npy", np.arange(24) // 3)
        (folder / "owner.txt").write_text("".join(f"{number // 3}\n" for number in range(24)))
        keys = [caption for captions in self.captions[:6] for caption in captions]
        sizes = [10, 10, 5, 5, 2, 2]
        ClusterTable.build(keys, [i // 3 for i in range(18)], [sizes[i // 3] for i in range(18)]).save(
            folder / "t.parquet"
        )

    def _write(self) -> None:
        lines = ["filepath\ttitle\tlabel"]
        karpathy: dict[str, Any] = {
            "images": [
                {"split": "train", "filename": "x.jpg", "sentences": []},
                {"split": "val", "filename": "y.jpg", "sentences": [{"raw": "of another split"}]},
            ]
        }
        with tarfile.open(self.folder / "set.tar", "w") as tar:
            for path, captions, label in zip(self.images, self.captions, self.labels):
                lines += [f"{path}\t{caption}\t{label}" for caption in captions]
                sentences = [{"raw": caption} for caption in captions]
                karpathy["images"].append({"split": "test", "filename": path.name, "sentences": sentences})
                number = str(ANIMALS.index(label))
                for suffix, content in (("png", path.read_bytes()), ("txt", "\n".join(captions).encode()),
                                        ("cls", number.encode())):  # fmt: skip
                    member = tarfile.TarInfo(f"{path.stem}.{suffix}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
        (self.folder / "set.tsv").write_text("\n".join(lines) + "\n")
        (self.folder / "dataset.json").write_text(json.dumps(karpathy))
        (self.folder / "classes.txt").write_text("\n".join(ANIMALS) + "\n")

    def run(self, *arguments: object, name: Optional[str] = "out.json") -> dict[str, Any]:
        output = self.folder / (name or "run/mmts_eval.json")
        flags = ["-o", output, "--force"] if name else ["--force"]
        assert main([*map(str, ["eval", *arguments, "--resamples", 50, "--device", "cpu", *flags])]) == 0
        return json.loads(output.read_text())

    def from_model(self, *arguments: object, name: Optional[str] = "out.json") -> dict[str, Any]:
        return self.run(*arguments, "--model", self.model, "--checkpoint", self.checkpoint, name=name)

    def from_features(self, *arguments: object) -> dict[str, Any]:
        features = ("--image-features", self.folder / "images.npy", "--text-features", self.folder / "texts.npy")
        return self.run(*arguments, *features)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory, small_model: str) -> Set:
    return Set(tmp_path_factory.mktemp("set"), small_model)


def values(result: dict[str, Any]) -> dict[str, Any]:
    return {name: entry["value"] for name, entry in result["metrics"].items()}


# --- every road to the same numbers -----------------------------------------------------------------------------------


def test_every_form_of_a_set_gives_the_same_numbers(images: Set) -> None:
    from mmts_plugins.evaluation.retrieval import image_text_recall

    expected = images.from_model(images.folder / "set.tsv", name=None)
    features = [torch.from_numpy(np.load(images.folder / f"{name}.npy")) for name in ("images", "texts")]
    recall = image_text_recall(*features, torch.arange(24) // 3)
    for way, by_k in recall.items():
        for k, share in by_k.items():
            assert expected["metrics"][f"{way}_R@{k}"]["value"] == share
    assert 0 < expected["metrics"]["image_to_text_R@5"]["value"] < 1  # the comparison says something
    for result in (
        images.from_model(images.folder / "dataset.json", "--image-root", images.folder),
        images.from_model(images.folder / "set.tar"),
        images.from_features(images.folder / "set.tsv"),
        images.from_features("--text-image", images.folder / "owner.txt"),
        images.from_features("--text-image", images.folder / "owner.npy"),
    ):
        assert result["metrics"] == expected["metrics"]
        assert result["queries"] == {"image": {"n": 8}, "text": {"n": 24}}
    assert expected["checkpoint"] == str(images.checkpoint)
    assert expected["table_hash"] is None


def test_a_table_adds_thirds(images: Set) -> None:
    result = images.from_features(images.folder / "set.tsv", "--table", images.folder / "t.parquet")
    assert result["table_hash"] == ClusterTable.load(images.folder / "t.parquet").content_hash
    assert "6 of 24 captions are not in" in result["notes"][0]
    for kind, counts in result["queries"].items():
        assert sum(counts[third] for third in ("head", "middle", "tail")) == counts["n"], kind
    # "a big sea 6" is nearest to "a big sea 2", "... old tree 7" to "... old tree 3": both in the middle.
    assert result["queries"]["image"] == {"n": 8, "head": 2, "middle": 4, "tail": 2}
    entry = result["metrics"]["text_to_image_R@5"]
    parts = [entry[third] for third in ("head", "middle", "tail")]
    assert entry["value"] == pytest.approx(sum(part["value"] * part["n"] for part in parts) / 24)


def test_relevancy_of_pairs_is_reciprocal_rank(images: Set, tmp_path: Path) -> None:
    """With one relevant image per caption, AP is one over the rank; by two file formats."""
    matrix = (np.arange(8)[:, None] == np.arange(24) // 3).astype(float)
    np.save(tmp_path / "r.npy", matrix)
    np.savetxt(tmp_path / "r.csv", matrix, delimiter=",")
    results = [images.from_features("--relevancy", tmp_path / name) for name in ("r.npy", "r.csv")]
    assert results[0]["metrics"] == results[1]["metrics"]
    found, texts = (torch.from_numpy(np.load(images.folder / f"{name}.npy")) for name in ("images", "texts"))
    from mmts_plugins.evaluation.retrieval import ranks

    rank = ranks(texts, found, torch.arange(24) // 3, torch.arange(8)).double()
    metrics = results[0]["metrics"]
    assert metrics["text_to_image_mAP"]["value"] == pytest.approx((1 / (rank + 1)).mean().item())
    assert metrics["mean_mAP"]["value"] == pytest.approx(
        (metrics["text_to_image_mAP"]["value"] + metrics["image_to_text_mAP"]["value"]) / 2
    )
    assert metrics["mean_mAP"]["low"] is None


def test_zero_shot_by_names_by_numbers_and_from_features(images: Set, tmp_path: Path) -> None:
    from mmts_plugins.evaluation.model import encode_texts, load_model
    from mmts_plugins.evaluation.retrieval import class_embeddings

    templates = tmp_path / "templates.txt"
    templates.write_text("a photo of a {}\na {c}\n")
    common = ("--no-retrieval", "--classes", images.folder / "classes.txt")
    by_name = images.from_model(images.folder / "set.tsv", *common, "--label-column", "label", "--templates", templates)
    by_number = images.from_model(images.folder / "set.tar", *common, "--label-column", "cls", "--templates", templates)
    assert by_name["metrics"] == by_number["metrics"]
    net, _, tokenizer = load_model(images.model, images.checkpoint)
    prompts = [text for name in ANIMALS for text in (f"a photo of a {name}", f"a {name}")]
    classes = class_embeddings(encode_texts(net, tokenizer, prompts), torch.arange(8) // 2, 4)
    np.save(tmp_path / "classes.npy", classes.numpy())
    saved = images.run(images.folder / "set.tsv", *common, "--label-column", "label",
                       "--image-features", images.folder / "images.npy",
                       "--class-features", tmp_path / "classes.npy")  # fmt: skip
    assert values(saved) == pytest.approx(values(by_name))
    scores = torch.from_numpy(np.load(images.folder / "images.npy")) @ classes.T
    hits = (scores.argmax(1) == torch.arange(8) % 4).double()
    assert values(by_name) == {"zero_shot_top1": hits.mean().item(), "zero_shot_class_mean": hits.mean().item()}


def test_captions_shared_by_a_class_count_once(images: Set, tmp_path: Path) -> None:
    lines = ["filepath\ttitle\tlabel"]
    lines += [f"{path}\ta {label}\t{label}" for path, label in zip(images.images, images.labels)]
    (tmp_path / "shared.tsv").write_text("\n".join(lines) + "\n")
    result = images.from_model(tmp_path / "shared.tsv", "--match-column", "label")
    assert result["queries"] == {"image": {"n": 8}, "text": {"n": 4}}


def test_images_in_a_compressed_tar_are_refused(images: Set, capsys: pytest.CaptureFixture[str]) -> None:
    packed = images.folder / "set.tar.gz"
    packed.write_bytes(gzip.compress((images.folder / "set.tar").read_bytes()))
    flags = ["--model", images.model, "--checkpoint", str(images.checkpoint), "-o", str(images.folder / "no.json")]
    assert main(["eval", str(packed), *flags]) == 2
    assert "images are read from plain .tar files on a disk" in capsys.readouterr().err


def test_captions_per_image_takes_the_first(images: Set) -> None:
    result = images.from_model(images.folder / "set.tsv", "--captions-per-image", 2)
    assert result["queries"]["text"]["n"] == 16


# --- numbers known beforehand, from features --------------------------------------------------------------------------


def at(*degrees: float, lengths: Any = 1.0) -> np.ndarray:
    """Vectors in a plane: ranks follow from their angles, if their lengths do not matter."""
    angles = np.radians(degrees)
    return np.stack([np.cos(angles), np.sin(angles)], axis=1) * np.reshape(lengths, (-1, 1))


def measured(folder: Path, images: np.ndarray, texts: Optional[np.ndarray], *flags: object, rows: Any = (),
             columns: str = "filepath\ttitle", resamples: int = 0) -> dict[str, Any]:  # fmt: skip
    """``mmts eval`` of these features; ``rows`` make a DATA whose images nobody opens."""
    saved = []
    for name, values in (("image", images), ("text", texts)):
        if values is not None:
            np.save(folder / f"{name}.npy", values)
            saved += [f"--{name}-features", folder / f"{name}.npy"]
    if rows:
        (folder / "set.tsv").write_text("\n".join([columns, *("\t".join(row) for row in rows)]) + "\n")
        saved.insert(0, folder / "set.tsv")
    argv = [*saved, *flags, "--resamples", resamples, "-o", folder / "out.json", "--force"]
    assert main(["eval", *map(str, argv)]) == 0
    return json.loads((folder / "out.json").read_text())


IMAGES = (0, 40, 90)
TEXTS, OWNER = (10, 80, 30, 60), (0, 1, 1, 2)
ROWS = [(f"{owner}.png", f"text {number}") for number, owner in enumerate(OWNER)]
RANKS = {
    "image_to_text_R@1": 2 / 3, "image_to_text_R@5": 1, "image_to_text_R@10": 1, "image_to_text_mean_rank": 4 / 3,
    "image_to_text_median_rank": 1, "text_to_image_R@1": 1 / 2, "text_to_image_R@5": 1, "text_to_image_R@10": 1,
    "text_to_image_mean_rank": 3 / 2, "text_to_image_median_rank": 3 / 2,
}  # fmt: skip


def test_ranks_count_from_one_and_lengths_do_not_matter(tmp_path: Path) -> None:
    long, short = (1, 5, 0.2), (0.1, 10, 1, 3)
    assert values(measured(tmp_path, at(*IMAGES), at(*TEXTS), rows=ROWS)) == pytest.approx(RANKS)
    found = measured(tmp_path, at(*IMAGES, lengths=long), at(*TEXTS, lengths=short), rows=ROWS)
    assert values(found) == pytest.approx(RANKS)
    (tmp_path / "owner.txt").write_text("0\n1\n1\n2\n")
    flags = ("--text-image", tmp_path / "owner.txt")
    assert values(measured(tmp_path, at(*IMAGES, lengths=long), at(*TEXTS), *flags)) == pytest.approx(RANKS)
    # Of one power of two: without their lengths both are found, with them the longer text is the nearest to both.
    near = values(measured(tmp_path, at(0, 40), at(0, 40, lengths=(0.5, 1.25)), rows=[("a", "x"), ("b", "y")]))
    assert (near["image_to_text_R@1"], near["text_to_image_R@1"]) == (1, 1)


@pytest.mark.parametrize(
    "change",
    [
        lambda points: (points * [[1e30], [1e-30], [1]]).astype(np.float32),  # their squares are infinite, or nothing
        lambda points: points * [[1e300], [1e-300], [1]],
        lambda points: (points * 1e6).astype(np.int64),
        lambda points: (points * [[10], [1e-4], [1]]).astype(np.float16),
    ],
    ids=["float32", "float64", "whole", "float16"],
)
def test_features_may_be_of_any_magnitude(change: Callable[[np.ndarray], np.ndarray], tmp_path: Path) -> None:
    assert values(measured(tmp_path, change(at(*IMAGES)), at(*TEXTS), rows=ROWS)) == pytest.approx(RANKS)


def test_scaling_changes_no_digit_of_usual_features(tmp_path: Path) -> None:
    points = np.random.default_rng(0).normal(size=(50, 16)).astype(np.float32)
    np.save(tmp_path / "f.npy", points)
    expected = torch.nn.functional.normalize(torch.from_numpy(points), dim=1)
    assert torch.equal(evaluate.read_features(str(tmp_path / "f.npy"), "--x"), expected)


def bounds(of: np.ndarray, units: list[int], resamples: int, seed: int) -> tuple[float, float]:
    """The interval, drawn one unit at a time."""
    draw, means = np.random.default_rng(seed), []
    distinct = sorted(set(units))
    for _ in range(resamples):
        rows = [row for unit in draw.integers(len(distinct), size=len(distinct))
                for row, own in enumerate(units) if own == distinct[unit]]  # fmt: skip
        means.append(of[rows].mean())
    return float(np.quantile(means, 0.025)), float(np.quantile(means, 0.975))


def test_the_commands_intervals_draw_the_captions_of_an_image_together(tmp_path: Path) -> None:
    """40 hits of one image and 40 misses of another are two observations, not 80."""
    texts = at(*[1] * 40, *[2] * 40)
    rows = [(f"{number // 40}.png", f"text {number}") for number in range(80)]
    entry = measured(tmp_path, at(0, 90), texts, rows=rows, resamples=200)["metrics"]["text_to_image_R@1"]
    assert entry == {"value": 0.5, "low": 0.0, "high": 1.0, "n": 80}
    np.save(tmp_path / "r.npy", np.repeat(np.eye(2), 40, axis=1))  # graded: such families are not known
    graded = measured(tmp_path, at(0, 90), texts, "--relevancy", tmp_path / "r.npy", rows=rows, resamples=200)
    precision = np.array([1.0] * 40 + [0.5] * 40)
    entry = graded["metrics"]["text_to_image_mAP"]
    assert entry["value"] == 0.75
    assert (entry["low"], entry["high"]) == pytest.approx(bounds(precision, list(range(80)), 200, 0))
    assert 0.6 < entry["low"] < entry["high"] < 0.9


def test_the_commands_seed_is_the_bootstraps(tmp_path: Path) -> None:
    found = {}
    for seed in (0, 7):
        result = measured(tmp_path, at(*IMAGES), at(*TEXTS), "--seed", seed, rows=ROWS, resamples=15)
        assert result["bootstrap"] == {"resamples": 15, "seed": seed, "level": 0.95}
        entry = result["metrics"]["text_to_image_mean_rank"]
        found[seed] = (entry["low"], entry["high"])
        assert found[seed] == pytest.approx(bounds(np.array([1.0, 2, 1, 2]), list(OWNER), 15, seed))
    assert found[0] != found[7]


def test_an_image_is_as_common_as_its_captions_on_average(tmp_path: Path) -> None:
    """Its rarest caption is of the tail, its most common one of the head, their mean of the middle."""
    ClusterTable.build(["common", "usual", "rare"], [0, 1, 2], [30, 20, 10], [10, 10, 10]).save(tmp_path / "t.parquet")
    rows = [("a.png", "common"), ("a.png", "rare"), ("b.png", "rare"), ("c.png", "usual"), ("c.png", "common")]
    result = measured(tmp_path, at(0, 30, 60), at(0, 1, 30, 60, 61), "--table", tmp_path / "t.parquet", rows=rows)
    assert result["queries"] == {"image": {"n": 3, "head": 0, "middle": 2, "tail": 1},
                                 "text": {"n": 5, "head": 2, "middle": 1, "tail": 2}}  # fmt: skip
    # Image b (30 degrees) is found first by its caption; so are a and c.
    assert [result["metrics"]["image_to_text_R@1"][third]["n"] for third in ("head", "middle", "tail")] == [0, 2, 1]


def test_classes_of_a_table_beat_its_captions_and_each_side_has_its_own(tmp_path: Path) -> None:
    ClusterTable.build(["x", "y", "z"], [0, 1, 2], [30, 20, 10], [10, 10, 10], CLASS).save(tmp_path / "t.parquet")
    rows = [("a.png", "1", "x"), ("a.png", "2", "x"), ("b.png", "3", "z"), ("c.png", "4", "y"), ("c.png", "5", "y")]
    flags = ("--table", tmp_path / "t.parquet", "--label-column", "label")
    result = measured(tmp_path, at(0, 30, 60), at(0, 1, 30, 60, 61), *flags, rows=rows,
                      columns="filepath\ttitle\tlabel")  # fmt: skip
    assert result["queries"] == {"image": {"n": 3, "head": 1, "middle": 1, "tail": 1},
                                 "text": {"n": 5, "head": 2, "middle": 2, "tail": 1}}  # fmt: skip


@pytest.mark.parametrize("classes", [4, 5, 6, 7])
def test_zero_shot_places(classes: int, tmp_path: Path) -> None:
    """The image of class k has k classes that are nearer; class 0 has three more images, all right."""
    np.save(tmp_path / "classes.npy", at(*range(0, 10 * classes, 10)))
    (tmp_path / "names.txt").write_text("".join(f"name {number}\n" for number in range(classes)))
    labels = [*range(classes), 0, 0, 0]
    rows = [(f"{number}.png", f"name {label}") for number, label in enumerate(labels)]
    flags = ("--no-retrieval", "--classes", tmp_path / "names.txt", "--class-features", tmp_path / "classes.npy",
             "--label-column", "label")  # fmt: skip
    found = measured(tmp_path, at(*[-5] * len(rows)), None, *flags, rows=rows, columns="filepath\tlabel")
    expected = {"zero_shot_top1": 4 / len(rows), "zero_shot_class_mean": 1 / classes}
    if classes > 5:
        expected["zero_shot_top5"] = 8 / len(rows)
    assert values(found) == pytest.approx(expected)
    assert found["queries"] == {"image": {"n": len(rows)}}


def test_karpathys_split_is_the_one_asked_for(tmp_path: Path) -> None:
    images = [
        {"split": split, "filepath": "val2014", "filename": f"{split}.jpg", "sentences": [{"raw": f"a {split} image"}]}
        for split in ("train", "restval", "val", "test")
    ]
    images += [{"split": "val", "filename": "bare.jpg", "sentences": []}]
    (tmp_path / "k.json").write_text(json.dumps({"images": images}))
    for split in ("restval", "val", "test"):
        found = sets.read(sets.Reading(str(tmp_path / "k.json"), split=split, image_root="root"))
        assert found.images == [Path("root", "val2014", f"{split}.jpg")]
        assert found.captions == [f"a {split} image"]
    found = sets.read(sets.Reading(str(tmp_path / "k.json"), split="val"))
    assert found.notes == [f"{tmp_path / 'k.json'}: 1 images have no caption and are left out"]
    alone = sets.read(sets.Reading(str(tmp_path / "k.json"), split="val", captions=False))
    assert (len(alone.images), alone.captions) == (2, [])


def test_relevancy_is_read_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = np.random.default_rng(0).integers(0, 5, size=(4, 6)) / 4
    matrix[np.arange(4), np.arange(4)] = matrix[0, 4:] = 1
    np.save(tmp_path / "r.npy", matrix)
    np.savetxt(tmp_path / "r.csv", matrix, delimiter=",")
    for name in ("r.npy", "r.csv"):
        both = relevancy.read_matrix(str(tmp_path / name), 4, 6)
        for start, stop in ((0, 2), (1, 3), (3, 4)):
            assert both.of_images(start, stop).tolist() == matrix[start:stop].tolist()
            assert both.of_texts(start, stop).tolist() == matrix[:, start:stop].T.tolist()
    points = np.random.default_rng(1).normal(size=(10, 3))
    flags = ("--relevancy", tmp_path / "r.npy")
    whole = measured(tmp_path, points[:4], points[4:], *flags)
    monkeypatch.setattr("mmts_plugins.evaluation.retrieval._BLOCK", 4)
    assert measured(tmp_path, points[:4], points[4:], *flags)["metrics"] == whole["metrics"]


def test_the_separator_reaches_pandas_as_openclip_hands_it_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two characters, backslash and t, are a regular expression there, and quotes stay in the captions."""
    import pandas as pd

    text = 'filepath\ttitle\na.png\t"a dog, running"\nb.png\ta cat\n'
    (tmp_path / "q.tsv").write_text(text)
    for separator, expected in (("\\t", '"a dog, running"'), ("\t", "a dog, running")):
        trained_on = pd.read_csv(tmp_path / "q.tsv", sep=separator, engine="python")["title"].tolist()
        assert trained_on == [expected, "a cat"]
        assert sets.read(sets.Reading(str(tmp_path / "q.tsv"), separator=separator)).captions == trained_on
    asked: list[str] = []

    def read(reading: sets.Reading) -> None:
        asked.append(reading.separator)
        raise ConfigError("enough")

    monkeypatch.setattr(sets, "read", read)
    for flags in ([], ["--separator", "\\t"], ["--csv-separator", ","]):
        main(["eval", str(tmp_path / "q.tsv"), "--image-features", "i", "--text-features", "t", *flags])
    assert asked == ["\t", "\\t", ","]


def test_a_model_is_loaded_as_it_is_evaluated(small_model: str, tmp_path: Path) -> None:
    """Without dropout, with the transform that draws nothing at random, and with the checkpoint's weights."""
    import logging

    import open_clip
    from PIL import Image

    from mmts_plugins.evaluation.model import load_model

    torch.manual_seed(3)
    trained = open_clip.create_model(small_model).state_dict()
    torch.save({"state_dict": {f"module.{name}": value for name, value in trained.items()}}, tmp_path / "c.pt")
    net, preprocess, tokenizer = load_model(small_model, tmp_path / "c.pt")
    assert not net.training
    assert all(torch.equal(value, trained[name]) for name, value in net.state_dict().items())
    assert tokenizer(["a dog"]).shape == (1, 12)
    image = Image.frombytes("RGB", (24, 16), random.Random(0).randbytes(24 * 16 * 3))
    expected = torch.from_numpy(np.array(image.crop((4, 0, 20, 16)))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(preprocess(image), expected)
    assert logging.getLogger("anybody").isEnabledFor(logging.WARNING)


def test_the_printed_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    ClusterTable.build(["text 0", "text 1", "text 2", "text 3"], [0, 1, 2, 3], [5, 5, 5, 1]).save(
        tmp_path / "t.parquet"
    )
    measured(tmp_path, at(*IMAGES), at(*TEXTS), "--table", tmp_path / "t.parquet", rows=ROWS, resamples=50)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert lines[0] == ["%, ranks from 1", "all", "head", "middle", "tail"]
    table = {line[0]: line[1:] for line in lines if line}
    assert table["text → image R@5"] == ["100.0 [100.0, 100.0]", "–", "100.0 [100.0, 100.0]", "100.0"]
    assert table["image → text median rank"][2:] == ["1.0 [1.0, 1.0]", "2.0"]
    low, high = bounds(np.array([1.0, 1, 2]), [0, 1, 2], 50, 0)
    assert table["image → text mean rank"][0] == f"1.3 [{low:.1f}, {high:.1f}]"


# --- statistics -------------------------------------------------------------------------------------------------------


def test_the_interval_of_a_share_is_the_textbooks() -> None:
    hits = np.zeros(400)
    hits[:100] = 1
    entry = summarise([Measure("m", hits, mean, "q")], {"q": Queries(np.arange(400))}, 4000)["m"]
    error = 1.96 * np.sqrt(0.25 * 0.75 / 400)
    assert (entry["value"], entry["n"]) == (0.25, 400)
    assert entry["low"] == pytest.approx(0.25 - error, abs=0.005)
    assert entry["high"] == pytest.approx(0.25 + error, abs=0.005)


def test_captions_of_one_image_are_drawn_together() -> None:
    """Five equal captions per image say no more than one: the interval is that of the images."""
    hits = np.random.default_rng(0).integers(2, size=200).astype(float)
    one = summarise([Measure("m", hits, mean, "q")], {"q": Queries(np.arange(200))}, 500)["m"]
    five = summarise([Measure("m", hits.repeat(5), mean, "q")], {"q": Queries(np.arange(200).repeat(5))}, 500)["m"]
    assert {**five, "n": 200} == pytest.approx(one)


def test_intervals_follow_the_seed_and_may_be_left_out() -> None:
    measures = [Measure("m", np.arange(50.0), median, "q")]
    queries = {"q": Queries(np.arange(50), np.zeros(50, int))}
    one, same, other = (summarise(measures, queries, 100, seed)["m"] for seed in (0, 0, 1))
    assert one == same != other
    assert one["tail"] == {"value": None, "low": None, "high": None, "n": 0}
    assert one["head"] == {key: one[key] for key in ("value", "low", "high", "n")}
    assert summarise(measures, queries, 0)["m"]["low"] is None
    assert summarise(measures, {"q": Queries(np.zeros(50, int))}, 100)["m"]["low"] is None


def test_class_mean_weighs_classes_alike() -> None:
    rows = np.array([[0, 1], [0, 1], [0, 1], [2, 0]])
    assert class_mean(rows) == 0.5


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_thirds_are_those_of_the_training_samples(seed: int) -> None:
    random_ = np.random.default_rng(seed)
    sizes, count = random_.integers(1, 8, 40), random_.integers(1, 30, 40)
    table = ClusterTable.build([str(i) for i in range(40)], np.arange(40), sizes, count)
    everyone = np.sort(np.repeat(sizes, count))[::-1]
    asked = np.arange(0, 9.5, 0.5)
    for value, third in zip(asked, table.thirds(asked)):
        commoner, equal = (everyone > value).sum(), (everyone == value).sum()
        assert third == min(int(3 * (commoner + equal / 2) / len(everyone)), 2), value


def test_thirds_of_a_table_without_a_tail() -> None:
    assert ClusterTable.build(["a", "b"], [0, 1], [5, 5]).thirds(np.array([5, 6, 4])).tolist() == [1, 0, 2]


# --- frequencies ------------------------------------------------------------------------------------------------------


def test_an_unseen_caption_is_as_common_as_its_nearest() -> None:
    table = ClusterTable.build(["a dog runs", "the deep sea", "an old tree"], [0, 1, 2], [9, 4, 1])
    found, notes = frequency.of_captions(table, ["the deep sea", "deep sea", "one old tree", "a dog runs"])
    assert found.tolist() == [4, 4, 1, 9]
    assert notes[0].startswith("2 of 4 captions are not in")
    assert frequency.of_captions(table, ["a dog runs"])[1] == []


def test_nearest_is_by_angle_and_not_by_length(monkeypatch: pytest.MonkeyPatch) -> None:
    points = {"short": (1, 0), "long": (50, 50), "one": (2, 0.2), "two": (1, 3)}
    monkeypatch.setattr(frequency.encoders, "encode", lambda name, captions: [points[each] for each in captions])
    table = ClusterTable.build(["short", "long"], [0, 1], [9, 4])
    for block_size in (1, 2, 256):
        found, _ = frequency.of_captions(table, ["one", "long", "two", "one"], block_size=block_size)
        assert found.tolist() == [9, 4, 4, 9]


def test_an_unseen_class_belongs_to_the_tail() -> None:
    table = ClusterTable.build(["0", "1", "2"], [0, 1, 2], [9, 4, 2], [9, 4, 2], CLASS)
    found, notes = frequency.of_classes(table, ["0", "7", "2"])
    assert table.thirds(found).tolist() == [0, 2, 2]
    assert "1 samples are of classes" in notes[0]
    with pytest.raises(MMTSError, match="holds none of the 1 classes, such as 'dog'"):
        frequency.of_classes(table, ["dog"])


# --- EPIC-KITCHENS-100 ------------------------------------------------------------------------------------------------

EK100 = [
    ("P01_1", "take plate", 0, 2, [2]),
    ("P01_2", "take plates and cup", 0, 2, [2, 13]),
    ("P01_3", "take plate", 0, 2, [2]),
    ("P01_4", "stir", 10, 34, [34]),
    ("P01_5", "stir", 10, 12, [12]),  # its action has no narration of its own: becomes a caption all the same
]


@pytest.fixture
def annotations(tmp_path: Path) -> Path:
    lines = ["narration_id,narration,verb_class,noun_class,all_noun_classes"]
    lines += [f'{i},{text},{verb},{noun},"{nouns}"' for i, text, verb, noun, nouns in EK100]
    (tmp_path / "clips.csv").write_text("\n".join(lines) + "\n")
    return tmp_path / "clips.csv"


def test_ek100_relevancy_is_the_mean_of_two_intersections_over_unions(annotations: Path) -> None:
    found = relevancy.read_ek100(str(annotations), None)
    assert found.clip_of.tolist() == [0, 1, 3, 4]
    assert found.labels == ["2", "2", "2", "34", "12"]
    expected = np.zeros((5, 4))
    for row, (*_, verb, _, nouns) in enumerate(EK100):
        for column, (*_, other, _, others) in enumerate(EK100[i] for i in (0, 1, 3, 4)):
            shared = len(set(nouns) & set(others)) / len(set(nouns) | set(others))
            expected[row, column] = ((verb == other) + shared) / 2
    both = found.relevancy()
    np.testing.assert_allclose(both.of_images(0, 5).numpy(), expected)
    np.testing.assert_allclose(both.of_texts(1, 3).numpy(), expected.T[1:3])
    sentences = annotations.parent / "sentences.csv"
    sentences.write_text("narration_id,narration\nP01_4,stir\nP01_1,take plate\n")
    assert relevancy.read_ek100(str(annotations), str(sentences)).clip_of.tolist() == [3, 0]


def test_ek100_classes_may_have_any_number(annotations: Path) -> None:
    """2 and 34, or ten digits, or twenty: the relevancy is the same, and no memory is asked for."""
    text = annotations.read_text()
    expected = relevancy.read_ek100(str(annotations), None).relevancy().of_images(0, 5)
    annotations.write_text(text.replace("34", "9" * 20).replace(",10,", f",{'8' * 20},"))
    assert torch.equal(relevancy.read_ek100(str(annotations), None).relevancy().of_images(0, 5), expected)
    annotations.write_text(text.replace(",10,", ",ten,"))
    with pytest.raises(MMTSError, match="a verb_class is not a whole number"):
        relevancy.read_ek100(str(annotations), None)


def test_ek100_takes_a_text_for_each_clip_or_each_caption(annotations: Path) -> None:
    points = np.random.default_rng(0).normal(size=(5, 4))
    folder = annotations.parent
    np.save(folder / "all.npy", points + 0.1)
    np.save(folder / "some.npy", (points + 0.1)[[0, 1, 3, 4]])
    np.save(folder / "clips.npy", points)
    ClusterTable.build(["2", "34"], [0, 1], [9, 4], [9, 4], CLASS).save(folder / "nouns.parquet")
    results = []
    for name in ("all", "some"):
        flags = [
            "--ek100",
            annotations,
            "--image-features",
            folder / "clips.npy",
            "--text-features",
            folder / f"{name}.npy",
        ]
        flags += ["--table", folder / "nouns.parquet", "-o", folder / f"{name}.json", "--resamples", 20]
        assert main(["eval", *map(str, flags)]) == 0
        results.append(json.loads((folder / f"{name}.json").read_text()))
    assert results[0]["metrics"] == results[1]["metrics"]
    assert results[0]["queries"]["text"] == {"n": 4, "head": 0, "middle": 2, "tail": 2}


def test_the_published_ek100_set_has_3842_captions() -> None:
    folder = Path(os.environ.get("MMTS_DATA", REPOSITORY.parent / "shared" / "data"))
    path = folder / "ek100" / "EPIC_100_retrieval_test.csv"
    if not path.is_file():
        pytest.skip(f"no EPIC-KITCHENS-100 annotations at {path} (set MMTS_DATA)")
    found = relevancy.read_ek100(str(path), None)
    assert (len(found.labels), len(found.captions)) == (9668, 3842)
    own = found.relevancy().of_texts(0, 3842)[np.arange(3842), found.clip_of]
    assert (own == 1).all()


# --- what is refused --------------------------------------------------------------------------------------------------

REFUSED = {
    "nothing": ("", "nothing to evaluate: give --model and --checkpoint"),
    "no data": ("--model m --checkpoint {run}", "no data given"),
    "no checkpoint": ("{tsv} --model {model} --checkpoint nowhere.pt", "nowhere.pt: no such checkpoint"),
    "foreign checkpoint": ("{tsv} --model {model} --checkpoint {foreign}", "cannot be loaded into --model"),
    "code in checkpoint": ("{tsv} --model {model} --checkpoint {pickle}", "cannot be loaded into --model"),
    "no model": ("{tsv} --model no-such --checkpoint {run}", "--model no-such: cannot be made"),
    "no image": ("{lost} --model {model} --checkpoint {run}", "lost.png: cannot read the image"),
    "no column": ("{tsv} --image-column url --model {model} --checkpoint {run}", "no column 'url' (--image-column)"),
    "split": (
        "{json} --split dev --model {model} --checkpoint {run}",
        "no split 'dev' (--split); found: test, train, val",
    ),
    "text file": ("{owner} --model {model} --checkpoint {run}", "a text file names no images"),
    "pickled relevancy": ("{saved} --relevancy {pickle}.pkl", "a pickle can run any code when it is opened"),
    "relevancy shape": ("{saved} --relevancy {texts}", "expected [8, 24] for 8 images and 24 captions"),
    "whose captions": ("{saved}", "8 images and 24 captions: whose is each caption?"),
    "owner out of range": ("{saved} --text-image {far}", "numbers from 0 to 99 for 8 images"),
    "table alone": ("{saved} --table {table} --text-image {owner}", "--table needs DATA (or --ek100)"),
    "both": ("{tsv} {saved} --model m", "--model has no effect with --image-features"),
    "labels": ("{tsv} --classes {owner} --label-column label --model {model} --checkpoint {run}", "occurs twice"),
    "unlabelled": (
        "{tsv} --classes {owner} --model {model} --checkpoint {run}",
        "--classes needs DATA and --label-column",
    ),
    "template": (
        "{tsv} --classes {classes} --label-column label --templates {owner} --model {model} --checkpoint {run}",
        "needs one {} (or {c})",
    ),
    "exists": ("{saved} --text-image {owner} -o {tsv}", "exists already; pass --force"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused(
    case: str, images: Set, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    flags, message = REFUSED[case]
    torch.save({"state_dict": {"other": torch.zeros(2)}}, tmp_path / "foreign.pt")
    for name in ("bomb", "bomb.pkl"):
        (tmp_path / name).write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "far.txt").write_text("\n".join(["0", "99", *["1"] * 22]))
    (tmp_path / "lost.tsv").write_text("filepath\ttitle\nlost.png\ta dog\n")
    folder = images.folder
    places = {
        "tsv": folder / "set.tsv",
        "json": folder / "dataset.json",
        "run": images.checkpoint,
        "model": images.model,
        "foreign": tmp_path / "foreign.pt",
        "pickle": tmp_path / "bomb",
        "lost": tmp_path / "lost.tsv",
        "owner": folder / "owner.txt",
        "classes": folder / "classes.txt",
        "texts": folder / "texts.npy",
        "far": tmp_path / "far.txt",
        "table": folder / "t.parquet",
        "saved": f"--image-features {folder / 'images.npy'} --text-features {folder / 'texts.npy'}",
    }
    arguments = flags.format_map(places).split()
    before = sorted(tmp_path.iterdir())
    assert main(["eval", *arguments, *([] if "-o" in arguments else ["-o", "out.json"])]) == 2
    assert message in capsys.readouterr().err
    assert sorted(tmp_path.iterdir()) == before, "something was written, or a pickle was run"


class Stumble:
    """Unpickling it raises a TypeError, also under ``weights_only``, where OrderedDict may be called."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (OrderedDict, (1,))


CHECKPOINTS: dict[str, tuple[Callable[[Path], object], str]] = {
    "list": (lambda path: torch.save([1, 2], path), "holds [1, 2], not the weights of a model"),
    "empty": (lambda path: torch.save({}, path), "holds {}, not the weights of a model"),
    "empty weights": (lambda path: torch.save({"state_dict": {}}, path), "holds {}, not the weights"),
    "list of weights": (lambda path: torch.save({"state_dict": [torch.ones(1)]}, path), "not the weights of a model"),
    "no tensors": (lambda path: torch.save({"state_dict": {"visual.proj": 1}}, path), "'visual.proj' in it is not a"),
    "no names": (lambda path: torch.save({1: torch.ones(1)}, path), "1 in it is not a tensor with a name"),
    "nothing": (lambda path: path.write_bytes(b""), "cannot be loaded into --model"),
    "text": (lambda path: path.write_text("weights\n"), "cannot be loaded into --model"),
    "half": (lambda path: torch.save({"a": torch.ones(99)}, path) or os.truncate(path, 300), "cannot be loaded into"),
    "stumbles": (lambda path: path.write_bytes(pickle.dumps([Stumble(), Bomb()])), "cannot be loaded into --model"),
}


@pytest.mark.parametrize("case", CHECKPOINTS)
def test_a_checkpoint_is_weights_or_one_line(
    case: str, small_model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What does not open with ``weights_only`` never reaches OpenCLIP, which may open it without."""
    import open_clip

    from mmts_plugins.evaluation.model import load_model

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(open_clip, "load_checkpoint", lambda *_, **__: pytest.fail("OpenCLIP was given the file"))
    make, message = CHECKPOINTS[case]
    make(tmp_path / "epoch_1.pt")
    with pytest.raises(MMTSError) as error:
        load_model(small_model, tmp_path / "epoch_1.pt")
    assert message in str(error.value)
    assert str(error.value).startswith(str(tmp_path / "epoch_1.pt"))
    assert not (tmp_path / "bombed").exists()


FILES: dict[str, tuple[Callable[[Path], object], str, str]] = {
    "zero row": (lambda path: np.save(path, [[1.0, 0], [0, 0]]), "--image-features", "row 1 (counting from 0) is all"),
    "NaN": (lambda path: np.save(path, [[1.0, 0], [np.nan, 0]]), "--image-features", "row 1 (counting from 0) holds"),
    "infinite": (lambda path: np.save(path, [[np.inf, 0]]), "--image-features", "row 0 (counting from 0) holds"),
    "width": (lambda path: np.save(path, np.ones((4, 7))), "--text-features", "7 dimensions, but images.npy has 2"),
    "one row": (lambda path: np.save(path, np.ones(3)), "--image-features", "the shape is [3], expected"),
    "objects": (lambda path: np.save(path, np.array([Bomb()])), "--image-features", "cannot be read as .npy"),
    "words": (lambda path: path.write_text("one\ntwo"), "--text-image", "expected a whole number per line"),
    "huge": (lambda path: path.write_text("9" * 40), "--text-image", "expected a whole number per line"),
    "Latin-1": (lambda path: path.write_bytes(b"caf\xe9\n"), "--classes", "cannot be read as text (--classes)"),
    "matrix": (lambda path: path.write_text("1,x\n"), "--relevancy", "cannot be read as a matrix"),
}


@pytest.mark.parametrize("case", FILES)
def test_a_file_that_cannot_be_used_is_named(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    make, flag, message = FILES[case]
    suffix = {"--relevancy": ".csv"}.get(flag, ".npy" if "features" in flag else ".txt")
    path = tmp_path / f"bad{suffix}"
    make(path)
    np.save("images.npy", at(*IMAGES))
    np.save("texts.npy", at(*TEXTS))
    (tmp_path / "set.tsv").write_text("filepath\ttitle\n" + "".join("\t".join(row) + "\n" for row in ROWS))
    argv = {"--image-features": "images.npy", "--text-features": "texts.npy", flag: str(path)}
    if flag == "--classes":
        argv |= {"--class-features": "images.npy", "--label-column": "filepath"}
    data = [] if flag == "--text-image" else ["set.tsv"]
    before = sorted(tmp_path.iterdir())
    assert main(["eval", *data, *(word for pair in argv.items() for word in pair), "-o", "out.json"]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"mmts: error: {path}: ")
    assert message in said
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_half_a_character_in_a_caption_is_refused(tmp_path: Path) -> None:
    image = {"split": "test", "filename": "a.jpg", "sentences": [{"raw": "a ferry \ud83d in fog"}]}
    (tmp_path / "k.json").write_text(json.dumps({"images": [image]}))
    with pytest.raises(MMTSError, match="holds half a character"):
        sets.read(sets.Reading(str(tmp_path / "k.json")))


def test_the_output_is_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A full disk leaves the earlier file as it was, and the numbers on the screen."""
    measured(tmp_path, at(*IMAGES), at(*TEXTS), rows=ROWS)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(self: Path, *_: object, **__: object) -> None:
        with open(self, "w") as file:
            file.write('{"half')
        raise OSError(28, "No space left on device")

    capsys.readouterr()
    monkeypatch.setattr(Path, "write_text", full)
    argv = ["eval", tmp_path / "set.tsv", "--image-features", tmp_path / "image.npy", "--text-features",
            tmp_path / "text.npy", "--resamples", 0, "-o", tmp_path / "out.json", "--force"]  # fmt: skip
    assert main([*map(str, argv)]) == 2
    said = capsys.readouterr()
    assert "out.json: cannot be written: No space left on device; the numbers stand above" in said.err
    assert "| text → image R@1         | 50.0" in said.out
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_folder_that_cannot_be_written_is_told_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(evaluate, "evaluate", lambda _: pytest.fail("the work was begun"))
    argv = ["eval", "--image-features", "i", "--text-features", "t", "-o", str(tmp_path / "new" / "out.json")]
    assert main(argv) == 2
    assert f"cannot be written, {tmp_path} is not a writable folder" in capsys.readouterr().err


class Bomb:
    """Unpickling it makes a file."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (open, ("bombed", "w"))


def test_help_imports_nothing_heavy() -> None:
    code = (
        "import sys, mmts_plugins.commands.eval; "
        "print([name for name in ('torch', 'sklearn', 'pandas', 'open_clip') if name in sys.modules])"
    )
    assert run_python("-c", code).stdout.strip() == "[]"


def test_features_of_files_are_made_of_unit_length(tmp_path: Path) -> None:
    """The longer one is nearer by its product alone: lengths between one power of two and the next count too."""
    np.save(tmp_path / "f.npy", np.array([[0.75, 0.75], [0.5625, 0.0], [3.0, 4.0]]))
    found = evaluate.read_features(str(tmp_path / "f.npy"), "--image-features")
    np.testing.assert_allclose(found.numpy(), [[0.5**0.5, 0.5**0.5], [1, 0], [0.6, 0.8]], atol=1e-7)
