"""Retrieval and zero-shot accuracy against a reference that sorts every list."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmts_plugins.errors import MMTSError
from mmts_plugins.retrieval import (
    class_embeddings,
    encode,
    image_text_recall,
    ranks,
    recall_at,
    zero_shot_accuracy,
)


def features(count: int, dimensions: int, seed: int) -> torch.Tensor:
    return F.normalize(torch.randn(count, dimensions, generator=torch.Generator().manual_seed(seed)), dim=1)


def reference_ranks(queries: np.ndarray, candidates: np.ndarray, query_labels: list, labels: list) -> list[int]:
    """Sort all candidates by score; among equal scores the irrelevant come first."""
    result = []
    for query, own in zip(queries, query_labels):
        listed = sorted((-round(float(query @ c), 5), label == own) for c, label in zip(candidates, labels))
        result.append([relevant for _, relevant in listed].index(True))
    return result


@pytest.mark.parametrize("block_size", [1, 7, 1000])
@pytest.mark.parametrize("seed", [0, 1])
def test_ranks_match_sorting_every_list(block_size: int, seed: int) -> None:
    queries, candidates = features(40, 8, seed), features(60, 8, seed + 10)
    candidates[20:40] = candidates[:20]  # ties, also between relevant and irrelevant
    labels = torch.arange(60) % 12
    query_labels = torch.arange(40) % 12
    expected = reference_ranks(queries.numpy(), candidates.numpy(), query_labels.tolist(), labels.tolist())
    assert ranks(queries, candidates, query_labels, labels, block_size).tolist() == expected


def test_a_collapsed_model_finds_nothing() -> None:
    one = F.normalize(torch.ones(50, 16), dim=1)
    result = image_text_recall(one, one, torch.arange(50))
    assert set(result["image_to_text"].values()) | set(result["text_to_image"].values()) == {0.0}


def test_ties_among_the_relevant_do_no_harm() -> None:
    queries = torch.eye(2)
    candidates = torch.eye(2).repeat_interleave(5, 0)
    assert ranks(queries, candidates, torch.arange(2), torch.arange(2).repeat_interleave(5)).tolist() == [0, 0]


def test_image_text_recall_counts_any_of_an_images_captions() -> None:
    images = torch.eye(3)
    texts = torch.stack([images[0], images[1], images[1], images[0], images[2]])  # the 4th describes image 1 badly
    result = image_text_recall(images, texts, torch.tensor([0, 1, 1, 1, 2]), ks=(1, 2, 3))
    # Image 0 ties with the badly described one's caption; images 1 and 2 have a caption of their own in front.
    assert result["image_to_text"] == {1: pytest.approx(2 / 3), 2: 1.0, 3: 1.0}
    # The bad caption: image 0 scores 1; images 1 and 2 tie at 0, and the tie goes against it.
    assert result["text_to_image"] == {1: pytest.approx(0.8), 2: pytest.approx(0.8), 3: 1.0}


def test_recall_at_is_a_share() -> None:
    assert recall_at(torch.tensor([0, 1, 4, 5, 9, 10])) == {
        1: pytest.approx(1 / 6),
        5: pytest.approx(3 / 6),
        10: pytest.approx(5 / 6),
    }


def test_zero_shot_accuracy_per_class() -> None:
    classes = torch.eye(4)
    labels = torch.tensor([0, 0, 1, 1, 1, 3])
    images = classes[torch.tensor([0, 1, 1, 1, 0, 3])]
    accuracy = zero_shot_accuracy(images, classes, labels)
    assert accuracy[[0, 1, 3]].tolist() == pytest.approx([1 / 2, 2 / 3, 1])
    assert accuracy[2].isnan()


def test_class_embeddings_are_normalised_means() -> None:
    prompts = features(6, 5, 0)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    expected = F.normalize(torch.stack([prompts[labels == c].mean(0) for c in range(2)]), dim=1)
    torch.testing.assert_close(class_embeddings(prompts, labels, 2), expected)


@pytest.mark.parametrize(
    ("queries", "labels", "message"),
    [
        (torch.full((2, 3), torch.nan), torch.tensor([0, 1]), "queries: a feature is not a finite number"),
        (torch.ones(2, 3), torch.tensor([0, 9]), "1 of 2 queries have no relevant candidate"),
        (torch.ones(2, 3), torch.tensor([0]), "queries: (1,) labels for features of shape (2, 3)"),
    ],
)
def test_bad_input_is_an_error(queries: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(MMTSError) as error:
        ranks(queries, torch.eye(3), labels, torch.arange(3))
    assert message in str(error.value)


class TwoTowers:
    """As much of an OpenCLIP model as :func:`encode` calls."""

    def eval(self) -> None:
        self.evaluating = True

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
        assert self.evaluating
        return images.flatten(1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return tokens.double()


def test_encode_keeps_the_order_over_batches(tmp_path: Path) -> None:
    image_module = pytest.importorskip("PIL.Image")
    paths = []
    for value in range(5):
        paths.append(tmp_path / f"{value}.png")
        image_module.new("L", (2, 1), (value + 1) * 10).save(paths[-1])

    def preprocess(image: object) -> torch.Tensor:
        values = torch.from_numpy(np.array(image, np.float32)).flatten()
        return torch.stack([values[0], torch.ones(())])

    def tokenizer(texts: object) -> torch.Tensor:
        return torch.tensor([[len(text), 1] for text in texts])  # type: ignore[attr-defined]

    images, texts = encode(TwoTowers(), preprocess, tokenizer, paths, ["a", "bb", "ccc"], batch_size=2)
    torch.testing.assert_close(images, F.normalize(torch.tensor([[10.0 * v, 1] for v in range(1, 6)]), dim=1))
    torch.testing.assert_close(texts, F.normalize(torch.tensor([[1.0, 1], [2, 1], [3, 1]]), dim=1))
    (tmp_path / "broken.png").write_bytes(b"not an image")
    with pytest.raises(MMTSError, match=r"broken\.png: cannot read the image"):
        encode(TwoTowers(), preprocess, tokenizer, [tmp_path / "broken.png"], ["a"])
