"""The product sphere in OpenCLIP's models: conversion in place, the checkpoint's marker, the logit scale, distances.

A model is converted after OpenCLIP has made it, by giving it (and, with class tokens, its towers) a subclass of its own
class. Everything else that OpenCLIP does with models goes on: locking, checkpointing, compiling, DDP, FSDP.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..errors import ConfigError, SeamError, shown
from ..fields import NUMBER, SWITCH, TEXT, Field
from ..geometry import DISTANCES, EUCLIDEAN, INNER, euclidean, in_both_units, product_geodesic, product_normalize
from ..options import Option, flag_of

MARKER = "mmts_product_sphere"
"""The buffer ``[n, m, distance]`` by which a checkpoint says what it is. Without this plugin OpenCLIP refuses it."""
EXTRA, TEXT_TOKENS = "extra_class_embedding", "cls_emb"
"""Parameters: the vision tower's ``m - 1`` further tokens, flat, so that weight decay spares them; the text tower's
``m``, under the name by which OpenCLIP locks and groups the class tokens of text towers."""
CLAMP = 100.0  # OpenCLIP's own, of the logit scale

OPTIONS = (
    Option(
        "product_sphere",
        Field(TEXT, null=True),
        "features on M spheres of N numbers each, N * M being the model's embed_dim (Sun & Li, TMLR 2024)",
        "N,M",
    ),
    Option("class_tokens", Field(SWITCH, null=True), "with --mmts-product-sphere: a class token for each sphere"),
    Option(
        "distance",
        Field(TEXT, null=True, choices=DISTANCES),
        "what the loss compares by: inner products (default), or the paper's ablations",
    ),
    Option(
        "logit_scale",
        Field(NUMBER, null=True, above=0, most=1e4),
        "where the learned scale starts, in the paper's units: OpenCLIP's scale is M times that",
        "T",
    ),
    Option("fixed_logit_scale", Field(SWITCH, null=True), "do not learn the logit scale"),
    Option(
        "max_logit_scale",
        Field(NUMBER, null=True, above=0, most=1e4),
        f"where the logit scale is clamped, in the paper's units (default: OpenCLIP's {CLAMP:g} / M)",
        "T",
    ),
)
NAMES = tuple(option.name for option in OPTIONS)


@dataclass(frozen=True)
class Geometry:
    """Where features live: ``m`` spheres in ``n`` dimensions, or plain space, and what is compared there.

    Attributes:
        n: of a model that is not seen yet, ``None``: its whole width over ``m``.
        class_tokens: whether every sphere has a class token of its own, ``Multi(n, m)``.
    """

    n: Optional[int]
    m: int
    distance: str = INNER
    class_tokens: bool = False

    def __str__(self) -> str:
        if self.distance == EUCLIDEAN:
            return "plain space, Euclidean distance"
        name = "Multi" if self.class_tokens else "PS"
        return f"{name}({self.n}, {self.m})" + (f", {self.distance} distance" if self.distance != INNER else "")

    @property
    def factor(self) -> float:
        """OpenCLIP's logit scale over the paper's."""
        return float(self.m) if self.distance == INNER else 1.0

    def normalize(self, features: Tensor) -> Tensor:
        """``[..., n * m]`` features of a tower, as the model gives them."""
        return features if self.distance == EUCLIDEAN else product_normalize(features, self.m)

    def distances(self, images: Tensor, texts: Tensor) -> Tensor:
        """``[N, D]`` and ``[M, D]`` of :meth:`normalize` to ``[N, M]``, in float32 at least; not of inner products."""
        images, texts = (each if each.dtype == torch.float64 else each.float() for each in (images, texts))
        return euclidean(images, texts) if self.distance == EUCLIDEAN else product_geodesic(images, texts, self.m)


@dataclass(frozen=True)
class Request:
    """What the flags ask of the trained model.

    Attributes:
        geometry: ``None`` where only the logit scale is meant.
        logit_scale, max_logit_scale: in the paper's units.
    """

    geometry: Optional[Geometry] = None
    logit_scale: Optional[float] = None
    fixed_logit_scale: bool = False
    max_logit_scale: Optional[float] = None

    @property
    def factor(self) -> float:
        """OpenCLIP's logit scale over the paper's."""
        return 1.0 if self.geometry is None else self.geometry.factor


def request_of(values: Mapping[str, Any]) -> Optional[Request]:
    """Fields by name, as flags or ``mmts.yaml`` give them; ``None`` where none of them is set.

    Raises:
        ConfigError: a value or a combination that has no meaning, in one line.
    """
    given = {name: values[name] for name in NAMES if values.get(name)}
    if not given:
        return None
    n, m = _sphere(given["product_sphere"]) if "product_sphere" in given else (None, 1)
    distance, tokens = given.get("distance", INNER), "class_tokens" in given
    if tokens and m < 2:
        raise ConfigError(
            "--mmts-class-tokens gives every sphere a token: it goes with --mmts-product-sphere N,M and M of 2 or more"
        )
    if distance == EUCLIDEAN and n is not None:
        raise ConfigError(
            "--mmts-distance euclidean is of features that are not normalised (Table 1): drop --mmts-product-sphere"
        )
    scale = {name: given.get(name) for name in ("logit_scale", "max_logit_scale")}
    geometry = None if n is None and distance == INNER else Geometry(n, m, distance, tokens)
    return Request(geometry, fixed_logit_scale="fixed_logit_scale" in given, **scale)


def _sphere(text: str) -> tuple[int, int]:
    numbers = [part.strip() for part in text.split(",")]
    if len(numbers) != 2 or not all(number.isascii() and number.isdigit() and int(number) > 0 for number in numbers):
        raise ConfigError(f"--mmts-product-sphere {shown(text)}: expected N,M, two whole numbers above 0, such as 64,8")
    return int(numbers[0]), int(numbers[1])


def refuse(request: Request, args: Any, scheduled: Optional[str]) -> None:
    """Raise :class:`ConfigError` where OpenCLIP's own arguments rule out what is asked for.

    Args:
        args: OpenCLIP's, parsed.
        scheduled: the loss of ours that the run has, if any.
    """
    geometry = request.geometry
    for name, why in (
        ("torchscript", "it cannot script a converted model; use --torchcompile, and mmts export after training"),
        ("use_naflex", "its towers are others; train at one resolution"),
        ("distill_model", "the teacher's logits are those of another space"),
        ("distill_pretrained", "the teacher's logits are those of another space"),
        ("genlip", "a generative model has no contrastive features"),
        ("genlap", "a generative model has no contrastive features"),
    ):
        if getattr(args, name, None):
            raise ConfigError(f"--{name.replace('_', '-')} does not go with {_asked(request)}: {why}")
    coca = "coca" in str(args.model).lower()
    if geometry is not None and geometry.class_tokens and coca:
        raise ConfigError("--mmts-class-tokens does not go with CoCa, whose towers give their tokens to its decoder")
    scale = [name for name in ("logit_scale", "fixed_logit_scale", "max_logit_scale") if getattr(request, name)]
    if scheduled is not None and scale:
        raise ConfigError(f"{flag_of(scale[0])} does not go with --loss {scheduled}, which sets the temperature itself")
    if geometry is not None and geometry.distance != INNER:
        flag = f"--mmts-distance {geometry.distance}"
        if scheduled is not None:
            raise ConfigError(
                f"{flag} does not go with --loss {scheduled}, whose temperatures are of cosines; drop one"
            )
        if coca or getattr(args, "siglip", False):
            raise ConfigError(f"{flag} takes the place of CLIP's softmax loss: not with CoCa, and not with --siglip")
        if geometry.distance == EUCLIDEAN or geometry.m > 1:
            for name in ("val_data", "imagenet_val", "imagenet_v2"):
                if getattr(args, name, None):
                    raise ConfigError(
                        f"--{name.replace('_', '-')}: OpenCLIP ranks by inner products, not by {flag}; leave it out "
                        "and evaluate the checkpoint with mmts eval, which ranks as the model was trained"
                    )


def _asked(request: Request) -> str:
    if request.geometry is None:
        return "--mmts-logit-scale and its like"
    return "--mmts-product-sphere" if request.geometry.n is not None else "--mmts-distance"


# -- models -----------------------------------------------------------------------------------------------------------


def geometry_of(model: nn.Module) -> Optional[Geometry]:
    """Of a converted model; ``None`` of any other."""
    return getattr(model, "mmts_geometry", None)


def marked(state: Mapping[str, Any], prefix: str = "") -> Optional[Geometry]:
    """What the weights of a checkpoint say they are; ``None`` without the marker.

    Raises:
        ConfigError: a marker that no version of ours writes.
    """
    marker = state.get(prefix + MARKER)
    if marker is None:
        return None
    numbers = marker.flatten().tolist() if isinstance(marker, Tensor) and marker.numel() == 3 else []
    if len(numbers) != 3 or min(numbers[:2]) < 1 or not 0 <= numbers[2] < len(DISTANCES):
        raise ConfigError(f"the checkpoint's {MARKER} is {shown(numbers or marker)}: not one of this mmts-plugins")
    n, m, distance = map(int, numbers)
    return Geometry(n, m, DISTANCES[distance], f"{prefix}visual.{EXTRA}" in state)


def convert(model: nn.Module, geometry: Geometry) -> Geometry:
    """Put an OpenCLIP model's features into another geometry, in place; new weights come from torch's own generator,
    which is left as it was.

    Returns:
        The geometry with its ``n``.

    Raises:
        ConfigError: the model cannot have it.
    """
    there = geometry_of(model)
    width = _width(model)
    if geometry.n is None and width is not None:
        geometry = replace(geometry, n=width // geometry.m)
    if there is not None:
        if there != geometry:
            raise ConfigError(f"the weights that were loaded are of {there}, and the flags ask for {geometry}")
        return there
    if geometry.n is None or width != geometry.n * geometry.m:
        raise ConfigError(
            f"--mmts-product-sphere {geometry.n},{geometry.m}: {geometry.n} * {geometry.m} must be the model's "
            f"embed_dim, which is {width}"
        )
    if geometry.class_tokens:
        with torch.random.fork_rng(devices=[]):
            _add_tokens(model, geometry)
    _become(model, _EncodesInside if hasattr(model, "_encode_image") else _Encodes)
    model.mmts_geometry = geometry  # type: ignore[assignment]
    device = next(model.parameters()).device
    number = DISTANCES.index(geometry.distance)
    model.register_buffer(MARKER, torch.tensor([geometry.n, geometry.m, number], device=device))
    return geometry


def _width(model: Any) -> Optional[int]:
    text = getattr(model, "text", model)
    for owner, name in ((model, "embed_dim"), (getattr(model, "visual", None), "output_dim"), (text, "output_dim")):
        found = getattr(owner, name, None)
        if isinstance(found, int):
            return found
    projection = getattr(text, "text_projection", None)
    return int(projection.shape[-1]) if isinstance(projection, Tensor) else None


def _become(module: nn.Module, mixin: type) -> None:
    base = type(module)
    module.__class__ = _classes.setdefault(
        (mixin, base), type(f"ProductSphere{base.__name__}", (mixin, base), {"__module__": base.__module__})
    )


_classes: dict[tuple[type, type], type] = {}


def _add_tokens(model: Any, geometry: Geometry) -> None:
    visual, text = model.visual, getattr(model, "text", model)
    kinds = (type(visual).__name__, type(text).__name__)
    right = (
        kinds[0] == "VisionTransformer"
        and visual.attn_pool is None
        and visual.pool_type == "tok"
        and isinstance(visual.proj, nn.Parameter)
        and kinds[1] in ("CLIP", "TextTransformer")
        and isinstance(text.text_projection, nn.Parameter)
        and getattr(text, TEXT_TOKENS, None) is None
        and not getattr(text, "use_pad_mask", False)
    )
    if not right:
        raise ConfigError(
            "--mmts-class-tokens needs OpenCLIP's own vision transformer that pools its class token, and its own text "
            f"transformer with a linear projection; here they are {kinds[0]} and {kinds[1]} (without class tokens "
            "--mmts-product-sphere takes any model)"
        )
    n, m = geometry.n, geometry.m
    assert n is not None
    wide, proj = visual.class_embedding.shape[0], visual.proj
    extra = wide**-0.5 * torch.randn((m - 1) * wide)
    setattr(visual, EXTRA, nn.Parameter(extra.to(visual.class_embedding)))
    visual.proj = nn.Parameter((wide**-0.5 * torch.randn(wide, n)).to(proj))
    wide = text.text_projection.shape[0]
    tokens, projection = 0.02 * torch.randn(m * wide), wide**-0.5 * torch.randn(wide, n)
    text.__dict__.pop(TEXT_TOKENS, None)  # None, which would stand in the parameter's way
    text.register_parameter(TEXT_TOKENS, nn.Parameter(tokens.to(text.positional_embedding)))
    text.text_projection = nn.Parameter(projection.to(text.text_projection))
    if text.attn_mask is not None:  # causal, and longer by the tokens
        length = text.attn_mask.shape[0] + m
        text.register_buffer(
            "attn_mask", torch.full((length, length), float("-inf")).triu_(1).to(text.attn_mask), persistent=False
        )
    visual.mmts_tokens = text.mmts_tokens = m
    _become(visual, _GroupedVision if hasattr(visual, "layer_groups") else _Vision)
    if text is not model:
        _become(text, _Text)


class _Model:
    """What a converted model does otherwise: its features are on the product of spheres, whether asked for normalised
    ones or not, so that whoever normalises them once more changes nothing."""

    mmts_geometry: Geometry

    def _mmts_placed(self, features: Any) -> Any:
        if isinstance(features, tuple):  # CoCa gives its tokens too
            return (self.mmts_geometry.normalize(features[0]), *features[1:])
        return self.mmts_geometry.normalize(features)

    def _mmts_logits(self, images: Tensor, texts: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self
        alike = (
            images @ texts.T if self.mmts_geometry.distance == INNER else -self.mmts_geometry.distances(images, texts)
        )
        logits = model.logit_scale.exp() * alike
        if model.logit_bias is not None:
            logits = logits + model.logit_bias
        return logits, logits.T

    def get_logits(self, image: Any, text: Tensor) -> tuple[Tensor, Tensor]:
        model: Any = self
        return self._mmts_logits(model.encode_image(image), model.encode_text(text))

    def forward_intermediates(self, image: Any = None, text: Optional[Tensor] = None, **options: Any) -> dict[str, Any]:
        model: Any = super()
        own = text if hasattr(self, "mmts_tokens") else None
        given = {**options, "normalize": False, "output_logits": False}
        output: dict[str, Any] = model.forward_intermediates(image, None if own is not None else text, **given)
        if own is not None:
            output.update(_text_intermediates(self, own, options.get("text_indices"), options))
        for name in ("image_features", "text_features"):
            if name in output:
                output[name] = self._mmts_placed(output[name])
        if options.get("output_logits") and "image_features" in output and "text_features" in output:
            logits = self._mmts_logits(output["image_features"], output["text_features"])
            output["image_logits"], output["text_logits"] = logits
        return output

    def _load_from_state_dict(self, state_dict: Mapping[str, Any], prefix: str, *rest: Any) -> None:
        found, own = marked(state_dict, prefix), self.mmts_geometry
        if found != own:
            there = "has no product sphere" if found is None else f"is of {found}"
            raise ConfigError(
                f"the checkpoint {there}, and this run's model is of {own}: resume with the flags that it was trained "
                "with, or start from its weights with --pretrained"
            )
        parent: Any = super()
        parent._load_from_state_dict(state_dict, prefix, *rest)


class _Encodes(_Model):
    """Of OpenCLIP 3.x: what ``forward`` calls is what users call."""

    def encode_image(self, image: Any, normalize: bool = False) -> Any:
        parent: Any = super()
        return self._mmts_placed(parent.encode_image(image, normalize=False))

    def encode_text(self, text: Tensor, normalize: bool = False) -> Any:
        parent: Any = super()
        own = hasattr(self, "mmts_tokens")
        return self._mmts_placed(_text_features(self, text) if own else parent.encode_text(text, normalize=False))


class _EncodesInside(_Model):
    """Of OpenCLIP 4.x and of CoCa: both go through methods of their own. Only those may be overridden."""

    def _encode_image(self, image: Any, normalize: bool = False) -> Any:
        parent: Any = super()
        return self._mmts_placed(parent._encode_image(image, normalize=False))

    def _encode_text(self, text: Tensor, normalize: bool = False) -> Any:
        parent: Any = super()
        own = hasattr(self, "mmts_tokens")
        return self._mmts_placed(_text_features(self, text) if own else parent._encode_text(text, normalize=False))


class _Vision:
    """A vision transformer with ``m`` class tokens before its patches, all at the first one's position (App. H)."""

    mmts_tokens: int

    def _embeds(self, image: Tensor) -> Tensor:
        tower: Any = self
        parent: Any = super()
        x: Tensor = parent._embeds(image)
        extra = getattr(tower, EXTRA).view(1, self.mmts_tokens - 1, -1).to(x.dtype)
        extra = tower.ln_pre(extra + tower.positional_embedding[0].to(x.dtype))
        return torch.cat([x[:, :1], extra.expand(x.shape[0], -1, -1), x[:, 1:]], 1)

    def _global_pool(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x[:, : self.mmts_tokens], x[:, self.mmts_tokens :]

    def forward(self, image: Tensor) -> Any:
        parent: Any = super()
        output = parent.forward(image)
        if isinstance(output, tuple):
            return (output[0].flatten(1), *output[1:])
        return output.flatten(1)

    def forward_intermediates(self, image: Tensor, **options: Any) -> dict[str, Any]:
        tower: Any = self
        parent: Any = super()
        given = {**options, "output_fmt": "NLC", "output_extra_tokens": True}
        output: dict[str, Any] = parent.forward_intermediates(image, **given)
        name, more = "image_intermediates", self.mmts_tokens - 1  # the host takes the first token for the only one
        prefixes = [
            torch.cat([first, rest[:, :more]], 1) for first, rest in zip(output.pop(f"{name}_prefix"), output[name])
        ]
        output[name] = [each[:, more:] for each in output[name]]
        if options.get("output_fmt", "NCHW") == "NCHW":
            rows, columns = (size // patch for size, patch in zip(image.shape[-2:], tower.patch_size))
            output[name] = [each.transpose(1, 2).unflatten(2, (rows, columns)).contiguous() for each in output[name]]
        if options.get("output_extra_tokens"):
            output[f"{name}_prefix"] = prefixes
        if "image_features" in output:
            output["image_features"] = output["image_features"].flatten(1)
        return output

    def lock(self, *args: Any, **options: Any) -> None:
        tower: Any = self
        parent: Any = super()
        parent.lock(*args, **options)
        getattr(tower, EXTRA).requires_grad = tower.class_embedding.requires_grad

    def no_weight_decay(self) -> set[str]:
        parent: Any = super()
        return {*parent.no_weight_decay(), EXTRA}


class _GroupedVision(_Vision):
    """Of OpenCLIP 4.x, whose towers name their parts for locking and for layer-wise learning rates."""

    def layer_groups(self, *args: Any, **options: Any) -> list[tuple[str, list[Any]]]:
        tower: Any = self
        parent: Any = super()
        (name, members), *rest = parent.layer_groups(*args, **options)
        return [(name, [*members, getattr(tower, EXTRA)]), *rest]


class _Text:
    """A text tower of ``CustomTextCLIP`` with class tokens; ``CLIP`` itself is one of its own text."""

    def forward(self, text: Tensor) -> Any:
        return _text_features(self, text)

    def forward_intermediates(self, text: Tensor, indices: Any = None, **options: Any) -> dict[str, Any]:
        return _text_intermediates(self, text, indices, options)


def _ordered(tower: Any, text: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Embeddings of token ids ``[B, L]`` with the ``m`` class tokens: ``[B, L + m, W]``; the tokens' places ``[B, m]``;
    and the places of the text's own ``[B, L]``.

    In a causal tower class tokens stand right behind the text's last token: they see all of the text and nothing of its
    padding. Elsewhere they stand at the end, and see what every token sees.
    """
    dtype, m = tower.transformer.get_cast_dtype(), tower.mmts_tokens
    length = text.shape[1]
    x = tower.token_embedding(text).to(dtype) + tower.positional_embedding[:length].to(dtype)
    tokens = getattr(tower, TEXT_TOKENS).view(m, -1).to(dtype)
    kind = getattr(tower, "text_pool_type", None) or tower.pool_type
    own = torch.arange(length, device=text.device)
    among = torch.arange(m, device=text.device)
    if tower.attn_mask is None or kind not in ("argmax", "eos"):
        x = torch.cat([x, tokens.expand(x.shape[0], -1, -1)], 1)
        return x, (among + length).expand(x.shape[0], m), own.expand(x.shape[0], length)
    last = (text.argmax(1) if kind == "argmax" else (text == _eos(tower)).int().argmax(1))[:, None]
    # In the place of padding, which nobody looks at: cheaper than to move it, and its gradient with it.
    behind = torch.arange(length + m, device=text.device) - last - 1
    which = F.embedding(behind.clamp(0, m - 1), tokens)
    x = torch.where(((behind >= 0) & (behind < m))[..., None], which, F.pad(x, (0, 0, 0, m)))
    return x, last + 1 + among, torch.where(own <= last, own, own + m)


def _eos(tower: Any) -> int:
    return int(tower.text_eos_id if hasattr(tower, "text_eos_id") else tower.eos_id)


def _picked(x: Tensor, places: Tensor) -> Tensor:
    return x.gather(1, places[..., None].expand(-1, -1, x.shape[2]))


def _mask(tower: Any, length: int) -> Optional[Tensor]:
    return None if tower.attn_mask is None else tower.attn_mask[:length, :length]


def _projected(tower: Any, tokens: Tensor) -> Tensor:
    """``[B, m, W]`` as the transformer gives them to features ``[B, m * n]``; without a projection ``[B, m * W]``."""
    tokens = tower.ln_final(tokens)
    if tower.text_projection is not None:
        tokens = tokens @ tower.text_projection
    return tokens.flatten(1)


def _text_features(tower: Any, text: Tensor) -> Tensor:
    x, tokens, _ = _ordered(tower, text)
    x = tower.transformer(x, attn_mask=_mask(tower, x.shape[1]))
    return _projected(tower, _picked(x, tokens))


def _text_intermediates(tower: Any, text: Tensor, indices: Any, options: Mapping[str, Any]) -> dict[str, Any]:
    x, tokens, own = _ordered(tower, text)
    mask = _mask(tower, x.shape[1])
    x, layers = tower.transformer.forward_intermediates(
        x, attn_mask=mask, indices=indices, stop_early=bool(options.get("stop_early"))
    )
    if options.get("normalize_intermediates"):
        layers = [tower.ln_final(each) for each in layers]
    output: dict[str, Any] = {"text_intermediates": [_picked(each, own) for each in layers]}
    if options.get("text_output_extra_tokens") or options.get("output_extra_tokens"):
        output["text_intermediates_suffix"] = [_picked(each, tokens) for each in layers]
    if not options.get("intermediates_only"):
        output["text_features"] = _projected(tower, _picked(x, tokens))
    return output


def prepare(model: nn.Module, request: Optional[Request], args: Any) -> Optional[str]:
    """The model that a run is about to train: what the flags ask for, or else the checkpoint that it resumes.

    Args:
        args: OpenCLIP's, parsed.

    Returns:
        What was done, in one line; ``None`` where nothing was.

    Raises:
        ConfigError: the model cannot have it, or a remote checkpoint has it and no flag says so.
    """
    if request is None:
        resumed = _resumed(model, args)
        return None if resumed is None else f"features on {convert(model, resumed)}, as the checkpoint says"
    done = []
    if request.geometry is not None:
        geometry = convert(model, request.geometry)
        request = replace(request, geometry=geometry)
        done.append(f"features on {geometry}")
    return "; ".join([*done, set_scale(model, request)])


def _resumed(model: nn.Module, args: Any) -> Optional[Geometry]:
    path = getattr(args, "resume", None)
    there = geometry_of(model)
    if there is not None or not path:
        return there
    if not os.path.isfile(path):  # on other storage: looked at when it is loaded, which is too late to convert
        model.register_load_state_dict_pre_hook(_refuse_marked)
        return None
    try:
        found = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except Exception:  # whatever is wrong with it, OpenCLIP says when it resumes
        return None
    state = found.get("state_dict", found) if isinstance(found, dict) else {}
    return next((geometry for prefix in ("", "module.") if (geometry := marked(state, prefix))), None)


def _refuse_marked(_: nn.Module, state: Mapping[str, Any], prefix: str, *rest: Any) -> None:
    found = marked(state, prefix)
    if found is not None:
        flags = f"--mmts-product-sphere {found.n},{found.m}" + (" --mmts-class-tokens" if found.class_tokens else "")
        raise ConfigError(f"the resumed checkpoint is of {found}: say so, with {flags}")


def follow(model: nn.Module, state: dict[str, Any]) -> dict[str, Any]:
    """A model that is about to be given marked weights, converted to what they are; the weights, as it names them."""
    geometry = marked(state)
    if geometry is not None and geometry_of(model) is None:
        convert(model, geometry)
    if TEXT_TOKENS in state and hasattr(model, "text"):
        state = {f"text.{name}" if name == TEXT_TOKENS else name: value for name, value in state.items()}
    return state


# -- the logit scale --------------------------------------------------------------------------------------------------


def set_scale(model: Any, request: Request) -> str:
    """Where the model's logit scale starts, whether it is learned, where it is clamped; said in one line.

    Raises:
        ConfigError: it would start outside of its clamp.
    """
    factor = request.factor
    highest = CLAMP if request.max_logit_scale is None else factor * request.max_logit_scale
    with torch.no_grad():
        if request.logit_scale is not None:
            model.logit_scale.fill_(math.log(factor * request.logit_scale))
        start = float(model.logit_scale.exp().mean())
    if not 1 - 1e-6 <= start <= highest * (1 + 1e-6):
        flag = "--mmts-logit-scale" if request.logit_scale is not None else "the model's own logit scale"
        raise ConfigError(
            f"{flag}: {start / factor:g} is {start:g} in OpenCLIP's units, which it clamps to between 1 and "
            f"{highest:g}: {1 / factor:g} to {highest / factor:g} in the paper's; "
            + ("raise it" if start < 1 else "lower it, or raise --mmts-max-logit-scale")
        )
    if request.max_logit_scale is not None:
        model.logit_scale = _clamped_at(math.log(highest))(model.logit_scale.detach(), model.logit_scale.requires_grad)
    if request.fixed_logit_scale:
        model.logit_scale.requires_grad_(False)
    learned = "is fixed" if request.fixed_logit_scale else f"is learned, and stops at {in_both_units(highest, factor)}"
    return f"logit scale starts at {in_both_units(start, factor)}, {learned}"


def _clamped_at(limit: float) -> type:
    """OpenCLIP 3.x clamps the parameter where it trains, with a number of its own."""

    def clamp_(self: nn.Parameter, low: float, high: float) -> Tensor:
        return nn.Parameter.clamp_(self, low, limit)

    return type("LogitScale", (nn.Parameter,), {"clamp_": clamp_})


def highest_of(request: Request) -> Optional[float]:
    """The logarithm at which OpenCLIP 4.x shall clamp; ``None`` for its own."""
    if request.max_logit_scale is None:
        return None
    return math.log(request.factor * request.max_logit_scale)


# -- the loss of other distances --------------------------------------------------------------------------------------


def compare_by(loss: Any, geometry: Geometry, host_version: str = "") -> None:
    """Have OpenCLIP's ``ClipLoss`` form its logits from distances: ``-exp(logit_scale) * d(u, v)``, in place.

    Raises:
        SeamError: it is another loss.
    """
    if type(loss).__name__ != "ClipLoss" or not hasattr(loss, "get_logits"):
        raise SeamError(
            f"open_clip_torch {host_version}: --mmts-distance takes the place of ClipLoss's logits; this run has "
            f"{type(loss).__name__}"
        )
    loss.mmts_geometry = geometry
    base = type(loss)
    loss.__class__ = type("DistanceClipLoss", (_DistanceLoss, base), {"__module__": base.__module__})


class _DistanceLoss:
    mmts_geometry: Geometry

    def get_logits(
        self, image_features: Tensor, text_features: Tensor, logit_scale: Tensor, logit_bias: Optional[Tensor] = None
    ) -> tuple[Tensor, Tensor]:
        loss: Any = self
        images, texts = image_features, text_features
        if loss.world_size > 1:
            from open_clip.loss import gather_features

            images, texts = gather_features(
                images, texts, loss.local_loss, loss.gather_with_grad, loss.rank, loss.world_size
            )
        compare: Callable[[Tensor, Tensor], Tensor] = self.mmts_geometry.distances
        if loss.world_size > 1 and loss.local_loss:
            of_images, of_texts = compare(image_features, texts), compare(images, text_features).T
        else:
            of_images = compare(images, texts)
            of_texts = of_images.T
        bias = 0.0 if logit_bias is None else logit_bias
        return bias - logit_scale * of_images, bias - logit_scale * of_texts
