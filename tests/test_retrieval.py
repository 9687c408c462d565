"""Retrieval and zero-shot accuracy against a reference that sorts every list."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmts_plugins.errors import MMTSError
from mmts_plugins.evaluation.model import encode
from mmts_plugins.evaluation.retrieval import (
    class_embeddings,
    class_means,
    class_ranks,
    graded,
    image_text_recall,
    ranks,
    recall_at,
    zero_shot_accuracy,
)

Case = Callable[[], tuple[torch.Tensor, torch.Tensor, torch.Tensor]]


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
        (torch.ones(2, 4), torch.tensor([0, 1]), "queries of shape (2, 4) for candidates of shape (3, 3)"),
    ],
)
def test_bad_input_is_an_error(queries: torch.Tensor, labels: torch.Tensor, message: str) -> None:
    with pytest.raises(MMTSError) as error:
        ranks(queries, torch.eye(3), labels, torch.arange(3))
    assert message in str(error.value)


class TwoTowers:
    """As much of an OpenCLIP model as :func:`encode` calls."""

    def encode_image(self, images: torch.Tensor) -> torch.Tensor:
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


# --- against torchmetrics ---------------------------------------------------------------------------------------------


def settled(scores: torch.Tensor, relevancy: torch.Tensor) -> torch.Tensor:
    """Scores without ties, in the order that settles ties against the model: what other implementations are given."""
    rows = []
    for row, grades in zip(scores.tolist(), relevancy.tolist()):
        order = sorted(range(len(row)), key=lambda c: (-round(row[c], 5), grades[c]))
        place = {candidate: position for position, candidate in enumerate(order)}
        rows.append([1 - place[candidate] / len(row) for candidate in range(len(row))])
    return torch.tensor(rows, dtype=torch.float64)


def random_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    relevancy = torch.tensor([0, 0, 0, 0.25, 0.5, 1])[torch.randint(6, (30, 50), generator=generator(5))]
    relevancy[:, 0] = 1
    return features(30, 8, 3), features(50, 8, 4), relevancy


def tied_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    queries, candidates, relevancy = random_case()
    candidates[10:] = candidates[torch.randint(10, (40,), generator=generator(6))]
    return queries, candidates, relevancy


def degenerate_case() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Everything in one point; queries with a single relevant candidate, and with nothing but relevant ones."""
    relevancy = torch.eye(6, 9)
    relevancy[0] = 1
    relevancy[1, 2:] = 0.5
    return F.normalize(torch.ones(6, 4), dim=1), F.normalize(torch.ones(9, 4), dim=1), relevancy


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CASES = pytest.mark.parametrize("case", [random_case, tied_case, degenerate_case])


@CASES
@pytest.mark.parametrize("block_size", [1, 7, None])
def test_graded_equals_torchmetrics(case: Case, block_size: Optional[int]) -> None:
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    queries, candidates, relevancy = case()
    ours = graded(queries, candidates, lambda start, stop: relevancy[start:stop], block_size)
    scores = settled(queries @ candidates.T, relevancy)
    for row, (preds, grades) in enumerate(zip(scores, relevancy)):
        precision = functional.retrieval_average_precision(preds, grades == 1)
        assert ours["AP_binary"][row].item() == pytest.approx(precision.item(), abs=1e-6)
        ndcg = functional.retrieval_normalized_dcg(preds, grades, top_k=int((grades > 0).sum()))
        assert ours["nDCG"][row].item() == pytest.approx(ndcg.item(), abs=1e-6)
    if case is not random_case:
        assert len(torch.unique(queries @ candidates.T)) < candidates.shape[0] * len(queries) / 2, "no ties were tried"


@CASES
def test_recall_equals_torchmetrics(case: Case) -> None:
    functional = pytest.importorskip("torchmetrics.functional.retrieval")
    queries, candidates, _ = case()
    labels = torch.randint(4, (len(candidates),), generator=generator(7))
    labels[:4] = torch.arange(4)
    query_labels = torch.arange(len(queries)) % 4
    relevant = query_labels[:, None] == labels
    scores = settled(queries @ candidates.T, relevant)
    ours = ranks(queries, candidates, query_labels, labels)
    for k in (1, 3, 5):
        hits = [functional.retrieval_hit_rate(p, r, top_k=k).item() for p, r in zip(scores, relevant)]
        assert (ours < k).double().tolist() == hits
    reciprocal = [functional.retrieval_reciprocal_rank(p, r).item() for p, r in zip(scores, relevant)]
    assert (1 / (ours + 1)).tolist() == pytest.approx(reciprocal, abs=1e-6)


@pytest.mark.parametrize("k", [1, 5])
@pytest.mark.parametrize("average", ["micro", "macro"])
def test_class_ranks_equal_torchmetrics_accuracy(k: int, average: str) -> None:
    functional = pytest.importorskip("torchmetrics.functional.classification")
    images, classes, labels = features(200, 8, 0), features(12, 8, 1), torch.arange(200).sqrt().long() % 12
    hits = class_ranks(images, classes, labels) < k
    ours = hits.double().mean() if average == "micro" else class_means(hits, labels, 12).nanmean()
    theirs = functional.multiclass_accuracy(images @ classes.T, labels, num_classes=12, average=average, top_k=k)
    assert ours.item() == pytest.approx(theirs.item(), abs=1e-6)


def test_graded_precision_adds_up_graded_relevancies() -> None:
    """As the published evaluation of EPIC-KITCHENS-100: by hand, for the order 0.5, 1, 0, 1."""
    queries, candidates = torch.eye(2)[:1], torch.tensor([[0.9, 0.0], [0.8, 0.0], [0.7, 0.0], [0.6, 0.0]])
    ours = graded(queries, candidates, lambda start, stop: torch.tensor([[0.5, 1.0, 0.0, 1.0]]))
    assert ours["AP"].item() == pytest.approx((1.5 / 2 + 2.5 / 4) / 2)
    assert ours["AP_binary"].item() == pytest.approx((1 / 2 + 2 / 4) / 2)
    ideal = 1 + 1 / np.log2(3) + 0.5 / 2
    assert ours["nDCG"].item() == pytest.approx((0.5 + 1 / np.log2(3)) / ideal)


def test_graded_equals_the_published_code() -> None:
    """AVION's own evaluation, imported from a checkout: ``AVION_ROOT``."""
    root = os.environ.get("AVION_ROOT")
    if not root:
        pytest.skip("set AVION_ROOT to a checkout of AVION")
    spec = importlib.util.spec_from_file_location("published", Path(root, "avion", "utils", "evaluation_ek100mir.py"))
    assert spec is not None
    assert spec.loader is not None
    published = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(published)
    queries, candidates, relevancy = random_case()
    relevancy[torch.arange(30), torch.arange(30)] = 1
    relevancy[0, 30:] = 1  # every candidate is somebody's
    similarity, grades = (queries @ candidates.T).numpy(), relevancy.numpy()
    to_right = graded(queries, candidates, lambda start, stop: relevancy[start:stop])
    to_left = graded(candidates, queries, lambda start, stop: relevancy.T[start:stop])
    for name, theirs in (("AP", published.get_mAP), ("nDCG", published.get_nDCG)):
        right, left, _ = theirs(similarity, grades)
        assert to_right[name].mean().item() == pytest.approx(right, abs=1e-7)
        assert to_left[name].mean().item() == pytest.approx(left, abs=1e-7)


@pytest.mark.parametrize(
    ("relevancy", "message"),
    [
        (torch.eye(3)[:2], "the block from row 0 has shape (2, 3), expected (3, 3)"),
        (torch.eye(3) * 2, "not between 0 and 1"),
        (torch.full((3, 3), torch.nan), "not between 0 and 1"),
        (torch.diag(torch.tensor([1, 0.5, 1])), "query 1 (counting from 0) has no candidate of relevancy 1"),
    ],
)
def test_a_bad_relevancy_is_an_error(relevancy: torch.Tensor, message: str) -> None:
    with pytest.raises(MMTSError) as error:
        graded(torch.eye(3), torch.eye(3), lambda start, stop: relevancy)
    assert message in str(error.value)


def peak_bytes(function: Callable[[], object]) -> int:
    """The most that the allocator held at once, whatever else this process holds."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        function()
    live = peak = 0
    events = (e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]")
    for event in sorted(events, key=lambda e: e.start_ns() if hasattr(e, "start_ns") else e.start_us()):
        live += event.nbytes()
        peak = max(peak, live)
    return peak


def test_memory_does_not_grow_with_queries_times_candidates() -> None:
    images, texts, owner = features(2000, 4, 0), features(10000, 4, 1), torch.arange(10000) // 5
    assert peak_bytes(lambda: image_text_recall(images, texts, owner)) < 4 * len(images) * len(texts) / 2
    some = images[:600]
    grades = (torch.arange(600)[:, None] == owner % 600).float()
    assert peak_bytes(lambda: graded(some, texts, lambda start, stop: grades[start:stop])) < 8 * 8 * 2**20
