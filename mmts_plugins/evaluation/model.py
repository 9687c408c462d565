"""An OpenCLIP model, trained or pretrained, and the features that it gives."""

from __future__ import annotations

import io
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Optional, Union

import torch
import torch.nn.functional as F

from .. import _startup
from .._files import PathLike
from ..errors import MMTSError, reading, shown
from ..geometry import EUCLIDEAN, INNER
from .retrieval import Similarity

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
    _startup.guard()  # weights that say what they are need its seams
    import open_clip

    if checkpoint is not None and not Path(checkpoint).is_file():
        raise MMTSError(f"{checkpoint}: no such checkpoint (--checkpoint)")
    with reading(f"--model {model}", "cannot be made"), _quiet():
        net, _, preprocess = open_clip.create_model_and_transforms(
            model, pretrained, load_weights=checkpoint is None, device=device
        )
        tokenizer = open_clip.get_tokenizer(model)
    if checkpoint is not None:
        with reading(checkpoint, f"cannot be loaded into --model {model}"):
            _check_weights(str(checkpoint))
            open_clip.load_checkpoint(net, str(checkpoint), weights_only=True)
    return net.eval(), preprocess, tokenizer


def find_model(path: PathLike) -> tuple[str, Optional[Path]]:
    """``--model`` and checkpoint of what a path names: a run's checkpoint, or a folder with ``open_clip_config.json``.

    Raises:
        MMTSError: it is neither.
    """
    path = Path(path)
    if path.is_dir() and (path / "open_clip_config.json").is_file():
        return f"local-dir:{path}", None
    if not path.is_file():
        raise MMTSError(f"{path}: no such checkpoint, and no folder with an open_clip_config.json")
    params = path.absolute().parent.parent / "params.txt"
    if params.is_file():
        with reading(params, "cannot be read"):
            for line in params.read_text(encoding="utf-8").splitlines():
                name, colon, value = line.partition(": ")
                if name == "model" and colon:
                    return value.strip(), path
    raise MMTSError(f"{path}: no params.txt in the folder above says which model this is: name it (--model)")


def similarity_of(model: Any) -> Similarity:
    """What a model was trained to compare by: inner products, or another distance of its geometry."""
    geometry = getattr(model, "mmts_geometry", None)
    if geometry is None or geometry.distance == INNER:
        return F.linear
    return lambda queries, candidates: -geometry.distances(queries, candidates)


def _check_weights(path: str) -> None:
    """See that a checkpoint opens with ``weights_only`` and holds weights.

    OpenCLIP opens it once more without where this raises a ``TypeError``, which the file can bring about; before
    torch 2.6 any code in it would then run.
    """
    if Path(path).suffix in (".safetensors", ".npz", ".npy"):
        return
    found = torch.load(path, map_location="cpu", weights_only=True)
    weights = found.get("state_dict", found) if isinstance(found, dict) else found
    if not isinstance(weights, dict) or not weights:
        raise MMTSError(f"{path}: holds {shown(weights)[:60]}, not the weights of a model (--checkpoint)")
    wrong = next((name for name, value in weights.items()
                  if not (isinstance(name, str) and isinstance(value, torch.Tensor))), None)  # fmt: skip
    if wrong is not None:
        raise MMTSError(f"{path}: {shown(wrong)} in it is not a tensor with a name (--checkpoint)")


@contextmanager
def _quiet() -> Iterator[None]:
    logging.disable(logging.WARNING)  # "no weights found", on a model that is about to get them
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def load_images(preprocess: Callable[[Any], torch.Tensor], images: Sequence[Union[PathLike, TarImage]]) -> torch.Tensor:
    """``[N, 3, H, W]`` of paths, or of images inside tars, as a model takes them.

    Raises:
        MMTSError: an image cannot be read.
    """
    from PIL import Image

    def load(source: Union[PathLike, TarImage]) -> torch.Tensor:
        with reading(source, "cannot read the image"):
            with Image.open(source.open() if isinstance(source, TarImage) else source) as image:
                return preprocess(image)

    return torch.stack([load(each) for each in images])


def encode_images(
    model: Any,
    preprocess: Callable[[Any], torch.Tensor],
    images: Sequence[Union[PathLike, TarImage]],
    batch_size: int = 256,
    device: Device = "cpu",
    normalize: bool = True,
) -> torch.Tensor:
    """``[N, D]`` float32 features, on the CPU: L2-normalised, but of a model that is trained in plain space.

    Args:
        model: an OpenCLIP model, already on ``device`` and in evaluation mode.
        preprocess: the validation transform, PIL image to tensor.
        images: ``[N]`` paths, or images inside tars.
        batch_size: how many are encoded at once.
        device: where to compute.
        normalize: otherwise as the model gives them.

    Raises:
        MMTSError: an image cannot be read, or there is none.
    """

    def encoder(batch: Sequence[Union[PathLike, TarImage]]) -> torch.Tensor:
        features = model.encode_image(load_images(preprocess, batch).to(device))
        return _placed(model, features) if normalize else features.float()

    return _encoded(images, encoder, batch_size, "images")


def encode_texts(
    model: Any,
    tokenizer: Callable[[Sequence[str]], torch.Tensor],
    texts: Sequence[str],
    batch_size: int = 256,
    device: Device = "cpu",
) -> torch.Tensor:
    """``[M, D]`` L2-normalised float32 features of ``[M]`` strings, on the CPU; see :func:`encode_images`."""

    def encoder(batch: Sequence[str]) -> torch.Tensor:
        return _placed(model, model.encode_text(tokenizer(list(batch)).to(device)))

    return _encoded(texts, encoder, batch_size, "captions")


def _placed(model: Any, features: torch.Tensor) -> torch.Tensor:
    """Normalised, but of a model that is trained in plain space."""
    geometry = getattr(model, "mmts_geometry", None)
    plain = geometry is not None and geometry.distance == EUCLIDEAN
    return features.float() if plain else F.normalize(features.float(), dim=-1)


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
            parts.append(encoder(batch).cpu())
            bar.update(len(batch))
    return torch.cat(parts)
