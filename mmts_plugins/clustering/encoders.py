"""Text to embeddings: any sentence-transformers or Hugging Face encoder, or TF-IDF where no hub can be reached."""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np

from ..errors import ConfigError, MMTSError

TFIDF = "tfidf"
_HF = "hf:"


def public_name(encoder: str) -> str:
    """The encoder as a table that is shared may name it: of a local folder the last part."""
    prefix, name = (_HF, encoder[len(_HF) :]) if encoder.startswith(_HF) else ("", encoder)
    return prefix + (Path(name).resolve().name if Path(name).exists() else name)


def packages(encoder: str) -> tuple[str, ...]:
    """The distributions whose versions decide what ``encode`` returns, beside NumPy and scikit-learn."""
    return () if encoder == TFIDF else ("sentence-transformers", "transformers", "torch")


def encode(
    encoder: str, captions: Sequence[str], batch_size: int = 256, device: Optional[str] = None, seed: int = 0
) -> np.ndarray:
    """``[n, d]`` float32 embeddings, as the encoder gives them (not normalised by us).

    Args:
        encoder: a sentence-transformers model by name or folder, ``hf:`` and any Hugging Face encoder (mean pooling),
            or ``tfidf``.
        captions: each is embedded once, so pass distinct ones.
        batch_size, device: of the neural encoders; ``None`` takes the GPU if there is one.
        seed: of the random projection in ``tfidf``.

    Raises:
        ConfigError: the encoder cannot be loaded or run here. Never another encoder instead.
    """
    if encoder == TFIDF:
        return _tfidf(captions, seed)
    import torch

    model = _load(encoder, device)
    try:
        embeddings = model.encode(list(captions), batch_size=batch_size, show_progress_bar=True, convert_to_numpy=True)
    except torch.cuda.OutOfMemoryError as error:
        raise ConfigError(f"--encoder {encoder}: out of GPU memory at --batch-size {batch_size}; lower it") from error
    return np.asarray(embeddings, np.float32)


def _load(encoder: str, device: Optional[str]) -> Any:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError as error:
        raise MMTSError(
            f"--encoder {encoder} needs sentence-transformers ({error}): pip install 'mmts-plugins[cluster]', "
            "or use --encoder tfidf"
        ) from error
    _check_device(device)
    name = encoder[len(_HF) :] if encoder.startswith(_HF) else encoder
    try:
        if encoder.startswith(_HF):
            return SentenceTransformer(modules=_mean_pooled(name), device=device)
        return SentenceTransformer(name, device=device)
    except Exception as error:  # hub clients and model files raise every kind
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
        raise ConfigError(
            f"--encoder {encoder} cannot be loaded: {reason}. Ways out: give the folder of a downloaded model "
            f"(--encoder ./FOLDER); where there is a network, run `hf download {name}` (formerly huggingface-cli) and "
            "bring the cache along (HF_HOME); give embeddings you have (--embeddings FILE.npy); or use --encoder "
            "tfidf, which needs no model"
        ) from error


def _check_device(device: Optional[str]) -> None:
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch built without that backend
            reason = str(error).strip().splitlines()[0]
            raise ConfigError(f"--device {device} cannot be used here: {reason}") from error


def _mean_pooled(name: str) -> list[Any]:
    try:
        modules: Any = import_module("sentence_transformers.sentence_transformer.modules")
    except ModuleNotFoundError:  # the older name of the same module, and of the method below
        modules = import_module("sentence_transformers.models")
    transformer = modules.Transformer(name)
    dimension = getattr(transformer, "get_embedding_dimension", None) or transformer.get_word_embedding_dimension
    return [transformer, modules.Pooling(dimension(), pooling_mode="mean")]


def _tfidf(captions: Sequence[str], seed: int) -> np.ndarray:
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import Normalizer

    try:
        features = TfidfVectorizer(sublinear_tf=True, dtype=np.float32).fit_transform(captions)
    except ValueError as error:
        raise ConfigError(f"--encoder tfidf finds no words of two letters or more in the captions: {error}") from error
    width = features.shape[1]
    if width < 2:
        raise ConfigError("--encoder tfidf finds a single word in all the captions; use another --encoder")
    reduced = TruncatedSVD(min(256, width - 1), random_state=seed).fit_transform(features)
    return cast(np.ndarray, Normalizer(copy=False).fit_transform(reduced))
