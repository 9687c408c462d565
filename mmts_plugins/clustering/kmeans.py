"""K-Means in PyTorch: fitted on a weighted sample, then one streaming pass that assigns every row.

scikit-learn and faiss are choices for comparison. All of them minimise the weighted sum of squared distances and are
counted in samples: a row of weight 40 pulls like 40 rows and counts as 40.
"""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Optional

import numpy as np
import torch
from torch import Tensor

from ..data.rows import Rows
from ..device import pick_device
from ..errors import ConfigError, MMTSError
from .sampling import priorities, sample

ALGORITHMS = ("sample", "lloyd", "sklearn", "faiss")
FIT_ROWS = 256
ITERATIONS = 25

_BLOCK = 8192  # rows of one product with the centres
_SEEDING_ROWS = 32  # per centre: enough to start from, and it is Lloyd that decides
_FULL_ITERATIONS = 300  # scikit-learn's
_FULL_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Clustering:
    """What R runs of K-Means say about n rows.

    Attributes:
        labels: ``[R, n]`` the smallest unsigned integers that hold K, the row's cluster in each run.
        sizes: ``[R, K]`` float64, how many samples each cluster holds.
        inertia: ``[R]`` float64, weighted sum of squared distances to the nearest centre.
    """

    labels: np.ndarray
    sizes: np.ndarray
    inertia: np.ndarray

    @property
    def cluster(self) -> np.ndarray:
        """``[n]`` the row's cluster in the first run."""
        return self.labels[0]

    @property
    def frequency(self) -> np.ndarray:
        """``[n]`` float64: the size of the row's cluster, averaged over the runs."""
        return self.mean_size(range(len(self.labels)))

    def mean_size(self, runs: Iterable[int]) -> np.ndarray:
        """``[n]`` float64: the size of the row's cluster, averaged over some of the runs."""
        total = np.zeros(self.labels.shape[1])
        chosen = list(runs)
        for run in chosen:
            total += self.sizes[run][self.labels[run]]
        return total / len(chosen)


def cluster(
    points: Rows,
    weight: np.ndarray,
    clusters: int,
    runs: int = 1,
    seed: int = 0,
    threads: int = 2,
    algorithm: str = "sample",
    hashes: Optional[np.ndarray] = None,
    fit_rows: int = FIT_ROWS,
    device: Optional[str] = None,
) -> Clustering:
    """K-Means with the seeds ``seed .. seed + runs - 1``.

    Args:
        points: ``[n, d]`` finite.
        weight: ``[n]`` how many samples each row stands for.
        clusters: how many; every one of them ends up non-empty.
        threads: of the products. The same seed gives the same labels for the same number of threads on the same kind
            of CPU; another number may round otherwise and move rows that lie between two centres.
        algorithm: ``sample`` (k-means++ and at most 25 iterations on ``fit_rows`` rows per cluster), ``lloyd`` (the
            same on all rows, until it stands), ``sklearn`` or ``faiss``.
        hashes: ``[n]`` uint64, what the sample is drawn by (:func:`~..hashing.hash_strings`); default: row numbers.
        fit_rows: rows of the sample per cluster.
        device: of ``sample`` and ``lloyd``; ``None`` takes a GPU if there is one.

    Raises:
        ConfigError: ``points`` has fewer distinct rows than ``clusters``.
        MMTSError: the package of the algorithm is not installed.
    """
    fitted = fit_runs(points, weight, clusters, runs, seed, threads, algorithm, hashes, fit_rows, device)
    with torch_threads(threads):
        labels, inertia = assign(points, fitted, weight, device)
    sizes = np.stack([np.bincount(row, weights=weight, minlength=clusters) for row in labels])
    for run_sizes in sizes:
        if not run_sizes.all():
            raise too_few(int(np.count_nonzero(run_sizes)), clusters)
    return Clustering(labels, sizes, inertia)


def fit_runs(
    points: Rows, weight: np.ndarray, clusters: int, runs: int, seed: int, threads: int, algorithm: str,
    hashes: Optional[np.ndarray], fit_rows: int, device: Optional[str],
) -> np.ndarray:  # fmt: skip
    """``[R, K, d]`` float32 centres of each run; arguments as :func:`cluster`'s."""
    from tqdm import tqdm

    if clusters > len(points):
        raise too_few(len(points), clusters)
    hashes = np.arange(len(points), dtype=np.uint64) if hashes is None else hashes
    centres = np.empty((runs, clusters, points.width), np.float32)
    with torch_threads(threads):
        for run in tqdm(range(runs), desc="k-means", unit="run", file=sys.stderr, disable=runs == 1):
            number = seed + run
            if algorithm == "sklearn":
                centres[run] = _fit_sklearn(points, weight, clusters, number, threads)
            elif algorithm == "lloyd":
                centres[run] = _fit_lloyd(points, weight, clusters, number, hashes, device)
            else:
                chosen, counts = sample(priorities(hashes, weight, number), weight, fit_rows * clusters)
                fit_sample = _fit_faiss if algorithm == "faiss" else fit
                centres[run] = fit_sample(points.take(chosen), counts, clusters, number, device)
    return centres


def too_few(found: int, clusters: int) -> ConfigError:
    """The error for data that cannot fill the clusters."""
    return ConfigError(
        f"only {found} of {clusters} clusters hold a sample: too many embeddings are equal; "
        f"lower -k to {found} or less, or use an encoder that tells the captions apart"
    )


@contextmanager
def torch_threads(threads: int) -> Iterator[None]:
    """PyTorch's threads on the CPU, put back afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fit(
    points: np.ndarray, weight: np.ndarray, clusters: int, seed: int, device: Optional[str] = None,
    iterations: int = ITERATIONS,
) -> np.ndarray:  # fmt: skip
    """k-means++ and at most ``iterations`` of Lloyd over rows held in memory.

    Args:
        points: ``[m, d]`` float32, in random order (:func:`.sampling.sample`'s): the start is drawn from the first.
        weight: ``[m]``.

    Returns:
        ``[clusters, d]`` float32 centres; each has a row of ``points`` for which it is the nearest.

    Raises:
        ConfigError: fewer distinct rows than clusters.
    """
    x = torch.from_numpy(points).to(pick_device(device))
    w = torch.from_numpy(np.asarray(weight, np.float32)).to(x.device)
    start = min(len(x), _SEEDING_ROWS * clusters)
    centres = _plus_plus(x[:start], w[:start], clusters, np.random.default_rng(seed))
    # Far from the goal a part of the rows shows the way as well as all of them.
    early, part = iterations // 3, 2 * start
    if part < len(x):
        for _ in range(early):
            step = _Sums(centres)
            for offset in range(0, part, _BLOCK):
                end = min(offset + _BLOCK, part)
                step.add(x[offset:end], w[offset:end])
            centres = step.means()
        iterations -= early
    return _lloyd(Rows(points), [x], w, centres, iterations, 0.0).cpu().numpy()


def _plus_plus(x: Tensor, weight: Tensor, clusters: int, draw: np.random.Generator) -> Tensor:
    """Greedy k-means++: of a few rows drawn by their weighted squared distance, the one that lowers the sum most."""
    trials = 2 + int(np.log(clusters))
    norms = (x * x).sum(1)
    mass = weight.double().cpu().numpy()
    centres = [x[draw.choice(len(x), p=mass / mass.sum())]]
    nearest = _squared(x, norms, centres[0][None])[:, 0]
    for _ in range(1, clusters):
        cumulative = torch.cumsum((nearest * weight).double(), 0)
        drawn = torch.from_numpy(draw.random(trials)).to(x.device) * cumulative[-1]
        candidates = torch.searchsorted(cumulative, drawn).clamp_(max=len(x) - 1)
        distances = torch.minimum(_squared(x, norms, x[candidates]), nearest[:, None])
        best = int((weight @ distances).argmin())
        centres.append(x[candidates[best]])
        nearest = distances[:, best].contiguous()
    return torch.stack(centres)


def _squared(x: Tensor, norms: Tensor, centres: Tensor) -> Tensor:
    return torch.addmm((centres * centres).sum(1) + norms[:, None], x, centres.T, alpha=-2).clamp_(min=0)


def _nearest(x: Tensor, centres: Tensor, norms: Tensor) -> tuple[Tensor, Tensor]:
    """``[b]`` squared distance to the nearest centre, and which it is; ``norms``: ``[K]`` squared, of the centres."""
    score, label = torch.addmm(norms, x, centres.T, alpha=-2).min(1)
    return score + (x * x).sum(1), label


class _Sums:
    """What one pass over the data leaves for the next centres: weighted sums of the rows of each cluster."""

    def __init__(self, centres: Tensor) -> None:
        self.centres, self.norms = centres, (centres * centres).sum(1)
        self.sums = torch.zeros_like(centres, dtype=torch.float64)
        self.mass = torch.zeros(len(centres), dtype=torch.float64, device=centres.device)

    def add(self, x: Tensor, weight: Optional[Tensor]) -> None:
        label = torch.addmm(self.norms, x, self.centres.T, alpha=-2).min(1)[1]
        weighted = x if weight is None else x * weight[:, None]
        if x.is_cuda:  # index_add_ on a GPU adds in no fixed order
            share = torch.nn.functional.one_hot(label, len(self.centres)).to(x.dtype)
            self.sums += share.T @ weighted
        else:
            self.sums += torch.zeros_like(self.centres).index_add_(0, label, weighted)
        self.mass += torch.bincount(label, None if weight is None else weight.double(), minlength=len(self.centres))

    @property
    def empty(self) -> Tensor:
        """Which clusters hold no row."""
        return torch.nonzero(self.mass == 0).flatten()

    def means(self) -> Tensor:
        """``[K, d]``; an empty cluster keeps its centre."""
        means = (self.sums / self.mass[:, None]).to(self.centres.dtype)
        means[self.empty] = self.centres[self.empty]
        return means


def _farthest(blocks: Iterator[tuple[int, Tensor]], centres: Tensor, many: int) -> Tensor:
    """``[<= many, d]`` the rows farthest from their nearest centre, where an empty cluster may start anew."""
    norms = (centres * centres).sum(1)
    values, rows = torch.empty(0, device=centres.device), torch.empty(0, centres.shape[1], device=centres.device)
    for _, x in blocks:
        distance, _ = _nearest(x, centres, norms)
        values, rows = torch.cat([values, distance]), torch.cat([rows, x])
        top = values.argsort(descending=True, stable=True)[:many]
        values, rows = values[top], rows[top]
    return rows[values > 0]


def _lloyd(
    rows: Rows, held: list[Tensor], weight: Tensor, centres: Tensor, iterations: int, tolerance: float
) -> Tensor:
    """Lloyd's iterations over ``held`` (all rows on the device) or, if that is empty, over ``rows`` in a stream.

    Stops when nothing moves, or when the centres move less than ``tolerance`` allows (scikit-learn's measure).

    Raises:
        ConfigError: clusters stay empty, because there are fewer distinct rows than clusters.
    """
    equal = bool((weight == 1).all())
    best: Optional[Tensor] = None
    filled = 0
    for _ in range(iterations + 1):
        step = _Sums(centres)
        for start, x in _device_blocks(rows, held, centres.device):
            step.add(x, None if equal else weight[start : start + len(x)])
        empty = step.empty
        filled = max(filled, len(centres) - len(empty))
        moved = step.means()
        if len(empty):
            fresh = _farthest(_device_blocks(rows, held, centres.device), centres, len(empty))
            moved[empty[: len(fresh)]] = fresh
        else:
            best = centres
        shift = float(((moved - centres) ** 2).sum())
        if shift <= tolerance:
            break
        centres = moved
    if best is None:
        raise too_few(filled, len(centres))
    return best


def _device_blocks(rows: Rows, held: list[Tensor], device: torch.device) -> Iterator[tuple[int, Tensor]]:
    if held:
        for start in range(0, len(held[0]), _BLOCK):
            yield start, held[0][start : start + _BLOCK]
    else:
        for start, block in rows.blocks(_BLOCK):
            yield start, torch.from_numpy(block).to(device)


def _fit_lloyd(
    points: Rows, weight: np.ndarray, clusters: int, seed: int, hashes: np.ndarray, device: Optional[str]
) -> np.ndarray:
    """Lloyd over every row in a stream, stopping where scikit-learn's does."""
    chosen, counts = sample(priorities(hashes, weight, seed), weight, _SEEDING_ROWS * clusters)
    where = pick_device(device)
    start = torch.from_numpy(points.take(chosen)).to(where)
    centres = _plus_plus(
        start, torch.from_numpy(counts.astype(np.float32)).to(where), clusters, np.random.default_rng(seed)
    )
    tolerance = _FULL_TOLERANCE * float(start.var(0, unbiased=False).mean())
    w = torch.from_numpy(np.asarray(weight, np.float32)).to(where)
    return _lloyd(points, [], w, centres, _FULL_ITERATIONS, tolerance).cpu().numpy()


def assign(
    points: Rows, centres: np.ndarray, weight: np.ndarray, device: Optional[str] = None
) -> tuple[np.ndarray, np.ndarray]:
    """The nearest centre of every row in every run, in one streaming pass.

    Args:
        centres: ``[R, K, d]``.

    Returns:
        ``[R, n]`` labels of the smallest unsigned integer type, and ``[R]`` float64 weighted sums of squared distances.
    """
    where = pick_device(device)
    runs = [torch.from_numpy(np.ascontiguousarray(run, np.float32)).to(where) for run in centres]
    norms = [(run * run).sum(1) for run in runs]
    labels = np.empty((len(runs), len(points)), np.min_scalar_type(centres.shape[1] - 1))
    inertia = np.zeros(len(runs))
    for start, block in points.blocks(_BLOCK):
        x, end = torch.from_numpy(block).to(where), start + len(block)
        for run, centre in enumerate(runs):
            distance, label = _nearest(x, centre, norms[run])
            labels[run, start:end] = label.cpu().numpy()
            inertia[run] += float(distance.double().cpu().numpy() @ weight[start:end])
    return labels, inertia


def _fit_sklearn(points: Rows, weight: np.ndarray, clusters: int, seed: int, threads: int) -> np.ndarray:
    try:
        from sklearn.cluster import KMeans
        from sklearn.exceptions import ConvergenceWarning
        from threadpoolctl import threadpool_limits
    except ImportError as error:
        raise MMTSError(f"--algorithm sklearn needs {error.name}: pip install 'mmts-plugins[cluster]'") from error
    whole = points.take(np.arange(len(points)))
    model = KMeans(clusters, n_init=1, random_state=seed, algorithm="lloyd")
    # The k-means++ start makes thousands of small products: with threads of their own they take ten times as long.
    with threadpool_limits({"openmp": threads, "blas": 1}), warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # too few distinct points: said by the caller
        model.fit(whole, sample_weight=weight)
    return np.asarray(model.cluster_centers_, np.float32)


def _fit_faiss(points: np.ndarray, weight: np.ndarray, clusters: int, seed: int, device: Optional[str]) -> np.ndarray:
    try:
        import faiss
    except ImportError as error:
        raise MMTSError("--algorithm faiss needs faiss: pip install faiss-cpu (or faiss-gpu)") from error
    model = faiss.Kmeans(
        points.shape[1], clusters, niter=ITERATIONS, seed=seed, min_points_per_centroid=1,
        max_points_per_centroid=len(points), gpu=False,
    )  # fmt: skip
    model.train(points, weights=np.asarray(weight, np.float32))
    return np.asarray(model.centroids, np.float32).reshape(clusters, points.shape[1])
