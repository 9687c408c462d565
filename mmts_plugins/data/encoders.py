"""Captions to embeddings: sentence-transformers, any Hugging Face encoder, an OpenCLIP text tower, or no model."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Sequence
from importlib import import_module
from pathlib import Path
from typing import Any, Optional, cast

import numpy as np

from ..errors import ConfigError, MMTSError, cause, reading, shown

TFIDF = "tfidf"
HASHING = "hashing"
_HASHING_WIDTH = 256
_HF = "hf:"
_OPENCLIP = "openclip:"
TIMM = "timm:"  # images only, see images.py
# Scripts that put no spaces between words: Chinese, Japanese, Thai, Lao, Burmese and Khmer.
_UNSPACED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORDS = rf"[{_UNSPACED}]|(?:(?![{_UNSPACED}])\w){{2,}}"
"""What ``hashing`` and ``tfidf`` count: words of two letters and more, as scikit-learn does, and there characters."""
_PREFIXES = (_HF, _OPENCLIP, TIMM)


def _split(encoder: str) -> tuple[str, str]:
    """Prefix and name."""
    for prefix in _PREFIXES:
        if encoder.startswith(prefix):
            return prefix, encoder[len(prefix) :]
    return "", encoder


def public_name(encoder: str) -> str:
    """The encoder as a table that is shared may name it: of a local folder or checkpoint the last part."""
    prefix, name = _split(encoder)
    if prefix in (_OPENCLIP, TIMM):
        model, pretrained = openclip_name(name)
        scheme, _, path = model.partition(":") if model.startswith("local-dir:") else ("", "", model)
        parts = [f"{scheme}:{Path(path).resolve().name}" if scheme else model]
        return prefix + "/".join(parts + [Path(pretrained).name] * bool(pretrained))
    return prefix + (Path(name).resolve().name if os.path.exists(name) else name)


def packages(encoder: str) -> tuple[str, ...]:
    """The distributions whose versions decide what ``encode`` returns, beside NumPy."""
    if encoder in (TFIDF, HASHING):
        return ("scikit-learn",)
    return ("open_clip_torch", "torch") if encoder.startswith(_OPENCLIP) else (
        "sentence-transformers", "transformers", "torch")  # fmt: skip


def openclip_name(name: str) -> tuple[str, str]:
    """``MODEL/PRETRAINED`` to its two parts; ``local-dir:FOLDER`` and ``hf-hub:NAME`` are a model with its weights."""
    if name.startswith(("local-dir:", "hf-hub:")):
        return name, ""
    model, _, pretrained = name.partition("/")
    return model, pretrained


class TextEncoder:
    """Embeds captions one by one (not ``tfidf``, which looks at all of them). The model is loaded at the first need.

    Args:
        name: a sentence-transformers model by name or folder; ``hf:NAME``, any Hugging Face encoder with mean pooling;
            ``openclip:MODEL/PRETRAINED`` (a tag or a checkpoint file), ``openclip:local-dir:FOLDER`` or
            ``openclip:hf-hub:NAME``, an OpenCLIP text tower; or ``hashing``, 256 signed hashed word counts
            (no model: tens of thousands of captions a second and core, grouped by word and not by meaning).
        batch_size, device: of the neural encoders; ``None`` takes the GPU if there is one, and bfloat16 there.
    """

    def __init__(self, name: str, batch_size: int = 256, device: Optional[str] = None) -> None:
        self.name, self.batch_size, self.device = name, batch_size, device
        self._model: Any = None

    def identity(self) -> Optional[str]:
        """What the embeddings depend on beside the captions, by content; ``None`` where that cannot be told."""
        prefix, name = _split(self.name)
        if self.name == HASHING:
            return f"{HASHING}-{_HASHING_WIDTH}-2"  # 1 took a text without spaces for one word
        weights: Optional[str]
        if prefix == _OPENCLIP:
            model, pretrained = openclip_name(name)
            local = model[len("local-dir:") :] if model.startswith("local-dir:") else pretrained
            weights = digest(Path(local)) if os.path.exists(local) else (None if "hf-hub:" in model else pretrained)
            if weights is not None:
                weights = f"{'' if model.startswith('local-dir:') else model} {weights}"
        else:
            weights = digest(Path(name)) if os.path.isdir(name) else _hub_commit(name)
        return None if weights is None else f"{prefix}{weights} {'bf16' if self._half() else 'fp32'}"

    def encode(self, captions: Sequence[str], progress: bool = False) -> np.ndarray:
        """``[n, d]`` float32 embeddings, as the encoder gives them (not normalised by us).

        Raises:
            ConfigError: the encoder cannot be loaded or run here. Never another encoder instead.
            MMTSError: what it gives is no embedding (:func:`checked`).
        """
        if self.name == HASHING:
            return _hashing(captions)
        import torch

        if self._model is None:
            self._model = self._load()
        flag = f"--encoder {self.name}"
        try:
            with reading(flag, "cannot embed these captions (does its tokenizer fit its weights?)", ConfigError):
                vectors = self._model(list(captions), progress)
        except ConfigError as error:
            if isinstance(error.__cause__, torch.cuda.OutOfMemoryError):
                raise ConfigError(f"{flag}: out of GPU memory at --batch-size {self.batch_size}; lower it") from error
            raise
        return checked(vectors, captions, flag)

    def _half(self) -> bool:
        import torch

        return (self.device or ("cuda" if torch.cuda.is_available() else "cpu")).startswith("cuda")

    def _load(self) -> Any:
        _check_device(self.device)
        prefix, name = _split(self.name)
        needs = "open_clip_torch" if prefix == _OPENCLIP else "sentence-transformers"
        extra = "openclip" if prefix == _OPENCLIP else "cluster"
        try:
            import_module("open_clip" if prefix == _OPENCLIP else "sentence_transformers")
        except ImportError as error:
            raise MMTSError(
                f"--encoder {self.name} needs {needs} ({error}): pip install 'mmts-plugins[{extra}]', "
                "or use --encoder tfidf"
            ) from error
        try:
            return self._openclip(name) if prefix == _OPENCLIP else self._sentence_transformer(prefix, name)
        except Exception as error:  # hub clients and model files raise every kind
            reason = ((str(error).strip().splitlines() or [""])[0].rstrip(".") or type(error).__name__)[:200]
            raise ConfigError(
                f"--encoder {self.name} cannot be loaded: {reason}. Ways out: give the folder of a downloaded model "
                f"(--encoder ./FOLDER); where there is a network, run `hf download {name}` (formerly huggingface-cli) "
                "and bring the cache along (HF_HOME); give embeddings you have (--embeddings FILE.npy); or use "
                "--encoder tfidf, which needs no model"
            ) from error

    def _sentence_transformer(self, prefix: str, name: str) -> Any:
        from sentence_transformers import SentenceTransformer

        if prefix == _HF:
            model = SentenceTransformer(modules=_mean_pooled(name), device=self.device)
        else:
            model = SentenceTransformer(name, device=self.device)
        if self._half():
            model = model.bfloat16()

        def encode(captions: list[str], progress: bool) -> np.ndarray:  # sorts by length itself
            vectors = model.encode(
                captions, batch_size=self.batch_size, show_progress_bar=progress, convert_to_tensor=True
            )
            array: np.ndarray = vectors.float().cpu().numpy()
            return array

        return encode

    def _openclip(self, name: str) -> Any:
        import open_clip
        import torch

        from ..device import pick_device

        device = pick_device(self.device)
        model_name, pretrained = openclip_name(name)
        if not pretrained and not model_name.startswith(("local-dir:", "hf-hub:")):
            raise ConfigError(
                f"no weights named: openclip:{model_name}/PRETRAINED, a tag of open_clip.list_pretrained() or a file"
            )
        model = open_clip.create_model(model_name, pretrained or None, device=device).eval()
        tokenize = open_clip.get_tokenizer(model_name)

        @torch.inference_mode()
        def encode(captions: list[str], progress: bool) -> np.ndarray:
            parts = []
            with torch.autocast("cuda", torch.bfloat16, enabled=device.type == "cuda"):
                for start in range(0, len(captions), self.batch_size):
                    tokens = tokenize(captions[start : start + self.batch_size]).to(device)
                    parts.append(model.encode_text(tokens, normalize=True).float().cpu().numpy())
            return np.concatenate(parts)

        return encode


def checked(vectors: Any, inputs: Sequence[str], label: str) -> np.ndarray:
    """``vectors`` if they are embeddings: ``[len(inputs), d >= 1]`` finite numbers.

    Raises:
        MMTSError: they are not; it names the first input without one.
    """
    array = np.asarray(vectors)
    if array.ndim != 2 or len(array) != len(inputs) or not array.shape[1] or array.dtype.kind not in "fiu":
        raise MMTSError(
            f"{label} gives an array {list(array.shape)} of {array.dtype} for {len(inputs)} inputs, not one embedding "
            "each; use another encoder"
        )
    finite = np.isfinite(array).all(axis=1)
    if not finite.all():
        first = inputs[int(np.argmin(finite))]
        raise MMTSError(f"{label} gives a NaN or an infinity for {shown(first)}; remove it, or use another encoder")
    return array


def encode(encoder: str, captions: Sequence[str], seed: int = 0) -> np.ndarray:
    """``[n, D]`` embeddings of captions by any of the encoders, in memory.

    Raises:
        ConfigError, MMTSError: the encoder cannot be loaded or finds nothing to encode.
    """
    return tfidf(captions, seed) if encoder == TFIDF else TextEncoder(encoder).encode(captions)


def digest(path: Path) -> str:
    """A hash of a file's content, or of the names and contents of all files below a folder.

    Raises:
        MMTSError: one of them cannot be read.
    """
    found = hashlib.blake2b(digest_size=16)
    with reading(path, "cannot be read"):
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                name = os.fsencode(file.relative_to(path))
                # With lengths: where a name ends and a content begins is part of what is hashed.
                found.update(len(name).to_bytes(8, "little") + name + file.stat().st_size.to_bytes(8, "little"))
                with file.open("rb") as stream:
                    for block in iter(lambda: stream.read(1 << 20), b""):
                        found.update(block)
    return found.hexdigest()


def _hub_commit(name: str) -> Optional[str]:
    """The commit of a hub model in the local cache."""
    try:
        from huggingface_hub import try_to_load_from_cache
    except ImportError:
        return None
    for repository in (name, f"sentence-transformers/{name}"):
        try:
            file = try_to_load_from_cache(repository, "config.json")
        except (ValueError, OSError):  # not a name that the hub, or a file, could have
            return None
        if isinstance(file, str):
            return f"{repository}@{Path(file).parent.name}"
    return None


def _check_device(device: Optional[str]) -> None:
    import torch

    if device is not None:
        try:
            torch.empty(0, device=device)
        except Exception as error:  # RuntimeError, or AssertionError from a torch built without that backend, or others
            reason = (cause(error).splitlines() or [""])[0]
            raise ConfigError(f"--device {device} cannot be used here: {reason}") from error


def _mean_pooled(name: str) -> list[Any]:
    try:
        modules: Any = import_module("sentence_transformers.sentence_transformer.modules")
    except ModuleNotFoundError:  # the older name of the same module, and of the method below
        modules = import_module("sentence_transformers.models")
    transformer = modules.Transformer(name)
    dimension = getattr(transformer, "get_embedding_dimension", None) or transformer.get_word_embedding_dimension
    return [transformer, modules.Pooling(dimension(), pooling_mode="mean")]


def _hashing(captions: Sequence[str]) -> np.ndarray:
    from sklearn.feature_extraction.text import HashingVectorizer

    # Signed hashing into few columns is a random projection of the bag of words that needs no pass over the data.
    vectorizer = HashingVectorizer(
        n_features=_HASHING_WIDTH, stop_words="english", dtype=np.float32, token_pattern=_WORDS
    )
    return cast(np.ndarray, vectorizer.transform(captions).toarray())


def unspaced(captions: Sequence[str]) -> int:
    """How many captions are, in part, in a script without spaces."""
    found = re.compile(f"[{_UNSPACED}]")
    return sum(found.search(caption) is not None for caption in captions)


def tfidf(captions: Sequence[str], seed: int) -> np.ndarray:
    """``[n, <= 256]`` float32, unit length: TF-IDF of the words, reduced by a random projection drawn with ``seed``."""
    from sklearn.decomposition import TruncatedSVD
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.preprocessing import Normalizer

    try:
        features = TfidfVectorizer(sublinear_tf=True, dtype=np.float32, token_pattern=_WORDS).fit_transform(captions)
    except ValueError as error:
        raise ConfigError(f"--encoder tfidf finds no words of two letters or more in the captions: {error}") from error
    width = features.shape[1]
    if width < 2:
        raise ConfigError("--encoder tfidf finds a single word in all the captions; use another --encoder")
    reduced = TruncatedSVD(min(256, width - 1), random_state=seed).fit_transform(features)
    return cast(np.ndarray, Normalizer(copy=False).fit_transform(reduced))
