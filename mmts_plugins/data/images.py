"""Images and video frames to embeddings: a timm model or an OpenCLIP image tower (the paper's visual row, Table 6)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Optional

import numpy as np

from ..device import pick_device
from ..errors import ConfigError, MMTSError, cause, reading, shown
from .encoders import TIMM, checked, digest, openclip_name

_OPENCLIP = "openclip:"
_SUFFIXES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def stamped(paths: Sequence[str], root: Optional[str], source: str) -> list[str]:
    """``PATH|size and time``: names an image, and changes when it does; of a folder those of its frames.

    Raises:
        MMTSError: a file is missing, or a folder holds no image.
    """
    stamps = []
    for number, name in enumerate(paths, 1):
        path = Path(root or "", name)
        if not os.path.exists(path):
            raise MMTSError(
                f"{source}: image {number}: no file {shown(str(path))}; paths are relative to the working folder, or "
                "to --image-root FOLDER"
            )
        with reading(path, "cannot be read as an image"):
            facts = [(file.stat().st_size, file.stat().st_mtime_ns) for file in _frames(path)]
        stamps.append(f"{path}|{facts}")
    return stamps


def _frames(path: Path) -> list[Path]:
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.iterdir() if file.suffix.lower() in _SUFFIXES)
    if not files:
        raise MMTSError(f"{path}: the folder holds no image (expected the frames of one video)")
    return files


class ImageEncoder:
    """Embeds images, and folders of frames as the mean over a few of them, evenly spaced.

    Args:
        name: ``timm:MODEL`` (its pretrained weights), ``timm:MODEL/CHECKPOINT``, or ``openclip:...`` as for text.
        frames: of a folder, at most so many.
        batch_size, device: ``None`` takes the GPU if there is one, and bfloat16 there.
    """

    def __init__(self, name: str, frames: int = 8, batch_size: int = 64, device: Optional[str] = None) -> None:
        if not name.startswith((TIMM, _OPENCLIP)):
            raise ConfigError(
                f"--encoder {name} does not read images; with --images take timm:MODEL or openclip:MODEL/PRETRAINED"
            )
        self.name, self.frames, self.batch_size = name, frames, batch_size
        self._device = pick_device(device)
        self._model: Any = None

    def identity(self) -> str:
        """What the embeddings depend on beside the images."""
        model, pretrained = openclip_name(self.name.partition(":")[2])
        weights = model[len("local-dir:") :] if model.startswith("local-dir:") else pretrained
        stamp = digest(Path(weights)) if weights and os.path.exists(weights) else ""
        return f"image {self.name} {stamp} {self.frames} {self._device.type}"

    def encode(self, stamps: Sequence[str]) -> np.ndarray:
        """``[n, d]`` float32 for :func:`stamped` images.

        Raises:
            ConfigError: the model cannot be loaded.
            MMTSError: an image cannot be read, or what the model gives is no embedding.
        """
        import torch

        if self._model is None:
            self._model = self._load()
        model, transform = self._model
        pictures: list[Any] = []
        owners: list[int] = []
        total: Any = None

        def flush() -> None:
            nonlocal total
            with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=self._device.type == "cuda"):
                vectors = model(torch.stack(pictures).to(self._device)).float().cpu().numpy()
            vectors = checked(vectors, [stamps[owner].rpartition("|")[0] for owner in owners], f"--encoder {self.name}")
            if total is None:
                total = np.zeros((len(stamps), vectors.shape[1]), np.float32)
            np.add.at(total, owners, vectors)
            pictures.clear()
            owners.clear()

        share = np.zeros(len(stamps), np.float32)
        for row, stamp in enumerate(stamps):
            files = _frames(Path(stamp.rpartition("|")[0]))
            chosen = np.unique(np.linspace(0, len(files) - 1, min(self.frames, len(files))).astype(int))
            share[row] = len(chosen)
            for place in chosen:
                with reading(files[place], "cannot be read as an image"):
                    pictures.append(transform(_opened(files[place])))
                owners.append(row)
                if len(pictures) == self.batch_size:
                    flush()
        if pictures:
            flush()
        mean: np.ndarray = total / share[:, None]
        return mean

    def _load(self) -> tuple[Any, Any]:
        try:
            if self.name.startswith(TIMM):
                import timm
                from timm.data import config, transforms_factory

                model_name, _, checkpoint = self.name[len(TIMM) :].partition("/")
                model: Any = timm.create_model(model_name, pretrained=not checkpoint, checkpoint_path=checkpoint or "")
                model.reset_classifier(0)
                transform = transforms_factory.create_transform(**config.resolve_model_data_config(model))
                return model.to(self._device).eval(), transform
            import open_clip

            model_name, pretrained = openclip_name(self.name[len(_OPENCLIP) :])
            model, _, transform = open_clip.create_model_and_transforms(
                model_name, pretrained or None, device=self._device
            )
            return model.eval().encode_image, transform
        except ImportError as error:
            raise MMTSError(
                f"--encoder {self.name} needs {error.name}: pip install 'mmts-plugins[openclip]'"
            ) from error
        except Exception as error:  # hub clients and model files raise every kind
            raise ConfigError(f"--encoder {self.name} cannot be loaded: {cause(error)}") from error


def _opened(path: Path) -> Any:
    from PIL import Image

    with Image.open(path) as image:
        return image.convert("RGB")
