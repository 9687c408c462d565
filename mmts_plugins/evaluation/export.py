"""A trained model as a TorchScript file."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Optional

import torch

from .. import load_model
from .._files import PathLike, replacing
from ..errors import MMTSError, reading
from ..geometry import INNER

_ONE_LINER = "F.normalize(x.unflatten(-1, ({m}, {n})), dim=-1).flatten(-2) / {m} ** 0.5"


def export(checkpoint: PathLike, model: Optional[str], output: Path) -> list[str]:
    """Write the file, whole or not at all.

    Args:
        checkpoint, model: as :func:`mmts_plugins.load_model` takes them.

    Returns:
        What to tell the user, in lines.

    Raises:
        MMTSError: the model cannot be loaded or traced, or what was traced does not give its features.
    """
    net, _, tokenizer = load_model(str(checkpoint), model)
    size = net.visual.image_size
    height, width = size if isinstance(size, (tuple, list)) else (size, size)
    draw = torch.Generator().manual_seed(0)
    images = [torch.randn(count, 3, height, width, generator=draw) for count in (2, 3)]
    texts = [tokenizer([f"a photo of {count} things"] * count) for count in (2, 3)]

    module = _Exported(net)
    with reading(checkpoint, "cannot be traced"), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of the tracer: what it writes is compared below, with another batch size
        traced = torch.jit.trace_module(module, {"encode_image": images[0], "encode_text": texts[0]})
        for name, given in (("encode_image", images[1]), ("encode_text", texts[1])):
            expected = getattr(module, name)(given)
            difference = float((getattr(traced, name)(given) - expected).abs().max())
            if not difference <= 1e-5:
                raise MMTSError(f"{checkpoint}: the traced {name} differs from the model's by {difference:g}")
        with replacing(output) as temporary:
            torch.jit.save(traced, str(temporary))
    geometry = getattr(net, "mmts_geometry", None)
    lines = [f"Written to {output}: torch.jit.load(...) has encode_image [N, 3, {height}, {width}] and encode_text "
             f"[N, {texts[0].shape[1]}]"]  # fmt: skip
    if geometry is not None:
        lines.append(f"features on {geometry}; logit scale {float(net.logit_scale.exp()):.4g}")
    if geometry is not None and geometry.distance == INNER and not geometry.class_tokens:
        one_liner = _ONE_LINER.format(m=geometry.m, n=geometry.n)
        lines.append(f"or, in code that has the plain model and these weights: x = {one_liner}")
    return lines


class _Exported(torch.nn.Module):
    """The two encoders under names that a trace keeps."""

    def __init__(self, model: torch.nn.Module) -> None:
        super().__init__()
        self.model = model

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.encode_image(image, normalize=True)  # type: ignore[operator]
        return found

    def encode_text(self, text: torch.Tensor) -> torch.Tensor:
        found: torch.Tensor = self.model.encode_text(text, normalize=True)  # type: ignore[operator]
        return found
