"""An OpenCLIP model, trained or pretrained, and the features that it gives."""

from __future__ import annotations

import io
import logging
import pickle
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Optional, Union

import torch
import torch.nn.functional as F

from .._files import PathLike
from ..errors import MMTSError

Device = Union[str, torch.device]


@dataclass(frozen=True)
class TarImage:
    """An image inside an uncompressed tar, read only when it is opened."""

    tar: str
    offset: int
    size: int
    name: str

    def open(self) -> IO[bytes]:
        """The image's bytes as a file."""
        with open(self.tar, "rb") as file:
            file.seek(self.offset)
            return io.BytesIO(file.read(self.size))

    def __str__(self) -> str:
        return f"{self.tar}: {self.name}"


def load_model(
    model: str, checkpoint: Optional[PathLike], device: Device = "cpu", pretrained: Optional[str] = None
) -> tuple[Any, Callable, Callable]:
    """A model in evaluation mode, its validation transform and its tokenizer.

    Args:
        model: what ``--model`` was: a name, or ``local-dir:FOLDER``.
        checkpoint: written by OpenCLIP's trainer, opened with ``weights_only``; None for the pretrained weights as they
            are.
        device: where to put the model.
        pretrained: what ``--pretrained`` was; it also settles how images are normalised.

    Raises:
        MMTSError: there is no such model or file, or the checkpoint is not of this model.
    """
    import open_clip

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise MMTSError(f"{checkpoint}: no such checkpoint (--checkpoint)")
    with _explained(f"--model {model}: cannot be made"), _quiet():
        net, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained, load_weights=checkpoint is None, device=device
        )
        tokenizer = open_clip.get_tokenizer(model)
    if checkpoint is not None:
        with _explained(f"{checkpoint}: cannot be loaded into --model {model}"):
            open_clip.load_checkpoint(net, str(checkpoint), weights_only=True)
    return net.eval(), preprocess, tokenizer


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # "no weights found", on a model that is about to get them
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


@contextmanager
def _explained(what: str) -> Iterator[None]:
    """OpenCLIP's and torch's many kinds of errors as one line of ours."""
    try:
        yield
    except (RuntimeError, ValueError, OSError, KeyError, AssertionError, EOFError, pickle.UnpicklingError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
        raise MMTSError(f"{what}: {' '.join(lines[:2])[:300]}") from error


def encode_images(
    model: Any,
    preprocess: Callable[[Any], torch.Tensor],
    images: Sequence[Union[PathLike, TarImage]],
    batch_size: int = 256,
    device: Device = "cpu",
) -> torch.Tensor:
    """``[N, D]`` L2-normalised float32 features, on the CPU.

    Args:
        model: an OpenCLIP model, already on ``device`` and in evaluation mode.
        preprocess: the validation transform, PIL image to tensor.
        images: ``[N]`` paths, or images inside tars.
        batch_size: how many are encoded at once.
        device: where to compute.

    Raises:
        MMTSError: an image cannot be read, or there is none.
    """
    from PIL import Image

    def load(source: Union[PathLike, TarImage]) -> torch.Tensor:
        try:
            with Image.open(source.open() if isinstance(source, TarImage) else source) as image:
                return preprocess(image)
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # PIL's own for some broken PNGs
            raise MMTSError(f"{source}: cannot read the image: {error}") from error

    return _encoded(
        images, lambda batch: model.encode_image(torch.stack([load(i) for i in batch]).to(device)), batch_size, "images"
    )


def encode_texts(
    model: Any,
    tokenizer: Callable[[Sequence[str]], torch.Tensor],
    texts: Sequence[str],
    batch_size: int = 256,
    device: Device = "cpu",
) -> torch.Tensor:
    """``[M, D]`` L2-normalised float32 features of ``[M]`` strings, on the CPU; see :func:`encode_images`."""
    return _encoded(texts, lambda batch: model.encode_text(tokenizer(list(batch)).to(device)), batch_size, "captions")


def encode(
    model: Any,
    preprocess: Callable[[Any], torch.Tensor],
    tokenizer: Callable[[Sequence[str]], torch.Tensor],
    images: Sequence[Union[PathLike, TarImage]],
    captions: Sequence[str],
    batch_size: int = 256,
    device: Device = "cpu",
) -> tuple[torch.Tensor, torch.Tensor]:
    """Features of images and of captions, see :func:`encode_images` and :func:`encode_texts`."""
    return (
        encode_images(model, preprocess, images, batch_size, device),
        encode_texts(model, tokenizer, captions, batch_size, device),
    )


def _encoded(
    items: Sequence[Any], encoder: Callable[[Sequence[Any]], torch.Tensor], batch_size: int, what: str
) -> torch.Tensor:
    from tqdm import tqdm

    if not items:
        raise MMTSError(f"there are no {what} to encode")
    parts = []
    with torch.inference_mode(), tqdm(total=len(items), desc=f"  {what}", leave=False, disable=None) as bar:
        for start in range(0, len(items), batch_size):
            batch = items[start : start + batch_size]
            parts.append(F.normalize(encoder(batch).float(), dim=-1).cpu())
            bar.update(len(batch))
    return torch.cat(parts)
