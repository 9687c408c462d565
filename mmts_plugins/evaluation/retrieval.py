"""Image-text retrieval and zero-shot accuracy as papers report them, from features.

With one kind of relevance everything reduces to one number per query, its rank (:func:`ranks`): recall@k is the share
of ranks below k, and zero-shot accuracy is recall@1 with one candidate per class. With graded relevance
(EPIC-KITCHENS-100) each query has an average precision and an nDCG (:func:`graded`). Scores are formed in blocks of
queries, never Q x C.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Optional

import torch
import torch.nn.functional as F

from ..errors import MMTSError

KS = (1, 5, 10)
TIE = 1e-6
"""Cosine similarities closer than this are ties: float32 cannot tell them apart, and a matrix product may give equal
columns results that differ in the last bits."""
Relevancy = Callable[[int, int], torch.Tensor]
"""``relevancy(start, stop)`` gives ``[stop - start, C]`` numbers in ``[0, 1]``: how relevant each candidate is to these
queries, 1 for a candidate that says the same."""
Similarity = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""``[B, D]`` queries and ``[C, D]`` candidates to ``[B, C]`` scores, higher where more alike."""
_BLOCK = 2**21  # scores held at once: 8 MB in float32


def ranks(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    query_labels: torch.Tensor,
    candidate_labels: torch.Tensor,
    block_size: Optional[int] = None,
    similarity: Similarity = F.linear,
) -> torch.Tensor:
    """Zero-based rank of each query's best relevant candidate; a candidate is relevant if its label is the query's.

    Ties are settled against the model: the rank counts the irrelevant candidates that score at least as high (up to
    :data:`TIE`), so a model that maps everything to one point gets a recall of 0, not of 1.

    Args:
        queries: ``[Q, D]``, L2-normalised.
        candidates: ``[C, D]``, L2-normalised.
        query_labels: ``[Q]`` integers.
        candidate_labels: ``[C]`` integers.
        block_size: queries compared at once; memory is ``block_size * C`` scores. By default some 2 million scores.
        similarity: of a model that compares by something else than inner products; features as it takes them.

    Returns:
        ``[Q]`` int64 on the CPU.

    Raises:
        MMTSError: shapes do not fit, a feature is not finite, or a query has no relevant candidate.
    """
    for name, features, labels in (("queries", queries, query_labels), ("candidates", candidates, candidate_labels)):
        if features.ndim != 2 or labels.shape != features.shape[:1]:
            raise MMTSError(f"{name}: {tuple(labels.shape)} labels for features of shape {tuple(features.shape)}")
        _check_finite(name, features)
    if similarity is F.linear:
        _check_widths(queries, candidates)
    block_size = block_size or _block_size(candidates)
    orphans = ~torch.isin(query_labels, candidate_labels)
    if orphans.any():
        raise MMTSError(f"{int(orphans.sum())} of {len(queries)} queries have no relevant candidate")
    # Filled in place: small results kept between large blocks would leave holes that the C allocator cannot give back.
    result = torch.empty(len(queries), dtype=torch.int64)
    for start in range(0, len(queries), block_size):
        stop = start + block_size
        scores = similarity(queries[start:stop], candidates)
        relevant = query_labels[start:stop, None] == candidate_labels
        best = scores.masked_fill(~relevant, -torch.inf).amax(1, keepdim=True)
        result[start:stop] = ((scores >= best - TIE) & ~relevant).sum(1)
    return result


def graded(
    queries: torch.Tensor,
    candidates: torch.Tensor,
    relevancy: Relevancy,
    block_size: Optional[int] = None,
    similarity: Similarity = F.linear,
) -> dict[str, torch.Tensor]:
    """Average precision and nDCG of every query with graded relevance, as EPIC-KITCHENS-100 evaluates retrieval.

    With ``r_1, r_2, ...`` the relevancies of the candidates in the order of their scores (Damen et al., *Rescaling
    Egocentric Vision*, multi-instance retrieval; code by Wray et al.):

    - ``AP``: the mean over the places k with ``r_k = 1`` of the precision ``(r_1 + ... + r_k) / k``. The precision adds
      up the graded relevancies, as the published evaluation code does; for relevancies of 0 and 1 it is the usual
      average precision.
    - ``AP_binary``: the same with every relevancy below 1 taken as 0.
    - ``nDCG``: ``sum_k r_k / log2(k + 1)`` over the first K places, divided by its value in the ideal order; K is the
      query's own number of candidates with a relevancy above 0.

    Ties are settled against the model, as in :func:`ranks`: a candidate is ranked as if it scored higher by
    ``TIE * (1 - relevancy)``.

    Args:
        queries: ``[Q, D]``, L2-normalised.
        candidates: ``[C, D]``, L2-normalised.
        relevancy: see :data:`Relevancy`.
        block_size: queries compared at once; by default some half a million scores, each of about 100 bytes.
        similarity: as in :func:`ranks`.

    Returns:
        ``{"AP": [Q], "AP_binary": [Q], "nDCG": [Q]}``, float64 on the CPU.

    Raises:
        MMTSError: a feature is not finite, a relevancy is not in ``[0, 1]`` or of another shape, or a query has no
            candidate of relevancy 1.
    """
    for name, features in (("queries", queries), ("candidates", candidates)):
        _check_finite(name, features)
    _check_widths(queries, candidates)
    block_size = block_size or _block_size(candidates, _BLOCK // 4)
    divisor = torch.arange(1, len(candidates) + 1, dtype=torch.float64)
    discount = 1 / torch.log2(divisor + 1)
    result = {name: torch.empty(len(queries), dtype=torch.float64) for name in ("AP", "AP_binary", "nDCG")}
    for start in range(0, len(queries), block_size):
        block = queries[start : start + block_size]
        stop = start + len(block)
        grades = relevancy(start, stop).cpu().double()
        _check_grades(grades, (len(block), len(candidates)), start)
        scores = similarity(block, candidates).cpu().double() + TIE * (1 - grades)
        # Least relevant first, then a stable sort by score: what still ties exactly goes against the model too.
        ideal, by_grade = grades.sort(dim=1)
        order = by_grade.gather(1, scores.gather(1, by_grade).sort(dim=1, descending=True, stable=True).indices)
        ranked, ideal = grades.gather(1, order), ideal.flip(1)
        full = ranked == 1
        for name, gain in (("AP", ranked), ("AP_binary", full.double())):
            precision = gain.cumsum(1).div_(divisor)
            result[name][start:stop] = (precision * full).sum(1) / full.sum(1)
        counted = discount * (ideal > 0)
        result["nDCG"][start:stop] = (ranked * counted).sum(1) / (ideal * counted).sum(1)
    return result


def _check_grades(grades: torch.Tensor, shape: tuple[int, int], start: int) -> None:
    if grades.shape != shape:
        raise MMTSError(f"relevancy: the block from row {start} has shape {tuple(grades.shape)}, expected {shape}")
    if not ((grades >= 0) & (grades <= 1)).all():
        raise MMTSError("relevancy: holds a value that is not between 0 and 1")
    orphans = ~(grades == 1).any(dim=1)
    if orphans.any():
        first = start + int(orphans.int().argmax())
        raise MMTSError(
            f"relevancy: query {first} (counting from 0) has no candidate of relevancy 1: no average precision"
        )


def _check_finite(name: str, features: torch.Tensor) -> None:
    if not all(torch.isfinite(part).all() for part in features.split(4096)):
        raise MMTSError(f"{name}: a feature is not a finite number; did the training diverge?")


def _check_widths(queries: torch.Tensor, candidates: torch.Tensor) -> None:
    if queries.shape[1:] != candidates.shape[1:]:
        raise MMTSError(f"queries of shape {tuple(queries.shape)} for candidates of shape {tuple(candidates.shape)}")


def _block_size(candidates: torch.Tensor, scores: int = _BLOCK) -> int:
    return max(1, scores // max(1, len(candidates)))


def recall_at(rank: torch.Tensor, ks: Sequence[int] = KS) -> dict[int, float]:
    """``{k: share of queries with a relevant candidate among the first k}``."""
    return {k: (rank < k).double().mean().item() for k in ks}


def image_text_recall(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    text_image: torch.Tensor,
    ks: Sequence[int] = KS,
) -> dict[str, dict[int, float]]:
    """Recall@k both ways for images with one or more captions each.

    An image counts as found if *any* of its captions is among the first k; a caption, if its image is.

    Args:
        image_features: ``[N, D]``, L2-normalised.
        text_features: ``[M, D]``, L2-normalised.
        text_image: ``[M]``, the row of the image that each caption describes. Every image needs a caption.
        ks: the cut-offs.

    Returns:
        ``{"image_to_text": {k: recall}, "text_to_image": {k: recall}}``, recalls in ``[0, 1]``.
    """
    images = torch.arange(len(image_features), device=text_image.device)
    return {
        "image_to_text": recall_at(ranks(image_features, text_features, images, text_image), ks),
        "text_to_image": recall_at(ranks(text_features, image_features, text_image, images), ks),
    }


def class_embeddings(text_features: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """``[num_classes, D]``: the normalised mean of each class's prompts, the usual template ensemble."""
    total = text_features.new_zeros(num_classes, text_features.shape[1])
    return F.normalize(total.index_add(0, labels, text_features), dim=1)


def mean_over(prompts: int, similarity: Similarity = F.linear) -> Similarity:
    """The mean of the similarities to each class's ``prompts`` (Sun & Li, Sec. 4.1), given as ``[C, prompts * D]``.

    By inner products this is the product with the mean of the prompts, not normalised.
    """

    def similarities(queries: torch.Tensor, candidates: torch.Tensor) -> torch.Tensor:
        each = candidates.unflatten(1, (prompts, -1)).flatten(0, 1)
        return similarity(queries, each).unflatten(1, (-1, prompts)).mean(2)

    return similarities


def zero_shot_accuracy(
    image_features: torch.Tensor, class_features: torch.Tensor, labels: torch.Tensor
) -> torch.Tensor:
    """Share of each class's images whose nearest class embedding is their own.

    Args:
        image_features: ``[N, D]``, L2-normalised.
        class_features: ``[C, D]``, L2-normalised, see :func:`class_embeddings`.
        labels: ``[N]`` in ``[0, C)``.

    Returns:
        ``[C]`` float64; NaN for a class without images.
    """
    return class_means(class_ranks(image_features, class_features, labels) == 0, labels, len(class_features))


def class_ranks(
    image_features: torch.Tensor,
    class_features: torch.Tensor,
    labels: torch.Tensor,
    similarity: Similarity = F.linear,
) -> torch.Tensor:
    """``[N]`` zero-based rank of each image's own class among all; arguments as :func:`zero_shot_accuracy`."""
    classes = torch.arange(len(class_features), device=labels.device)
    return ranks(image_features, class_features, labels, classes, similarity=similarity)


def class_means(values: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """``[num_classes]`` float64: the mean of ``values`` (``[N]``) in each class; NaN for a class without any."""
    labels = labels.cpu()
    total = torch.bincount(labels, weights=values.cpu().double(), minlength=num_classes)
    return total / torch.bincount(labels, minlength=num_classes)
