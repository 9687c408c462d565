"""transformers' conventions translated to the core: a model of two towers, whose own loss is replaced at its output.

Imports without transformers and patches nothing; :mod:`mmts_plugins.patches.trainer` calls it.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from typing import Any, ClassVar, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..config import Config
from ..distributed import first_on_node
from ..errors import ConfigError, SeamError, cause, one_line, shown
from ..fields import SWITCH, TEXT, Field
from ..options import Option
from ..tables import Table
from ..tables.index import KeyLookup, TokenLookup
from .trainer import Places, Start, TrainerAdapter, TrainerSession, beginning

_OTHERS = ("image_embeds", "video_embeds", "audio_embeds")
_TEXTS = "text_embeds"
_UNUSUAL = 1e5  # of a tokenizer's longest text: it does not say


class Transformers(TrainerAdapter):
    """A script or notebook with a ``Trainer`` and a CLIP-like model, transformers 4.46 and newer."""

    name = "transformers"
    title = "transformers"
    options: ClassVar[tuple[Option, ...]] = (
        *TrainerAdapter.options,
        Option(
            "tokenizer",
            Field(TEXT, null=True),
            "transformers: what the texts were tokenized with, a name or a folder (default: the trainer's, or the "
            "model's)",
            "NAME",
        ),
        Option("gather", Field(SWITCH, null=True), "transformers: negatives of all ranks; its own loss has one rank's"),
    )

    def owns(self, trainer: Any) -> bool:
        return hasattr(trainer, "compute_loss") and not hasattr(trainer, "collect_features")

    def check(self, trainer: Any) -> None:
        super().check(trainer)
        kind = str(getattr(getattr(trainer, "accelerator", None), "distributed_type", "")).rpartition(".")[2]
        if kind in ("DEEPSPEED", "FSDP", "MEGATRON_LM", "XLA"):
            raise ConfigError(f"{kind} was never run with --loss mmts under a Trainer: launch with torchrun for DDP")

    def by_text(self, config: Config) -> bool:
        return config.own["column"] is not None

    def session(self, start: Start, batch: Mapping[str, Any]) -> TrainerSession:
        return TransformersSession(start, batch)


ADAPTER = Transformers()


class TransformersSession(TrainerSession):
    """MM-TS in one call of its ``train()``.

    Args:
        start: the call.
        batch: of the first step; it tells how long texts are.

    Raises:
        ConfigError: as :class:`.TrainerSession`; or captions cannot be found by what the batch holds.
    """

    def __init__(self, start: Start, batch: Mapping[str, Any]) -> None:
        self._by_text = ADAPTER.by_text(start.resolved.config)
        self._trainer, self._tokens = start.trainer, None

        def index(table: Table) -> Any:
            if self._by_text:
                return Places(start.lookup or KeyLookup(table))
            name = start.resolved.config.own["tokenizer"]
            self._tokens = Tokens(table, start.trainer, name, _input_ids(batch))
            return self._tokens

        super().__init__(ADAPTER, start, index)
        self.judge_batches("training texts", beginning if self._tokens is None else self._tokens.text)
        everyone = self.config.own["gather"]
        rank, ranks = (self.facts.rank, self.facts.world_size) if everyone else (0, 1)
        self._module = self.config.kind.module(False, ranks > 1, rank, ranks)
        model = start.trainer.model
        scales = [weight for name, weight in model.named_parameters() if name.rpartition(".")[2] == "logit_scale"]
        self._scale = scales[0] if len(scales) == 1 and scales[0].numel() == 1 else None
        # DDP expects a gradient for every parameter: what only the host's loss reads stays in the graph, with zero.
        self._unused = [weight for weight in model.parameters() if weight.numel() == 1 and weight.requires_grad]
        self._checked = self._used = False
        self._loss: Optional[Tensor] = None

    def at_step(self, step: int) -> None:
        super().at_step(step)
        if self._scale is not None:  # a true scale in checkpoints; the loss itself does not read it
            with torch.no_grad():
                self._scale.fill_(-math.log(self.tau.mean_temperature))

    def step_of(self, trainer: Any, model: Any, batch: dict[str, Any]) -> AbstractContextManager[None]:
        if self._by_text:
            samples = self.samples_of(batch)
        elif self.index is None:  # every sample gets the same: they are counted
            samples = next(value for value in batch.values() if isinstance(value, Tensor) and value.ndim)
        else:
            samples = _input_ids(batch)
        return self._replacing(model, self.temperatures(samples))

    @contextmanager
    def _replacing(self, model: nn.Module, tau: Tensor) -> Iterator[None]:
        self._loss = None

        def replace(module: nn.Module, inputs: Any, kwargs: Any, output: Any) -> Any:
            if self._loss is not None or not torch.is_grad_enabled():
                return output
            self._loss = self._loss_of(output, tau)
            output["loss"] = self._loss
            return output

        hook = model.register_forward_hook(replace, with_kwargs=True)
        try:
            yield
        finally:
            hook.remove()

    def _loss_of(self, output: Any, tau: Tensor) -> Tensor:
        images, texts = embeddings_of(output)
        if len(images) != len(tau):
            raise ConfigError(f"{len(tau)} texts and {len(images)} images in a batch: it has no pairs, row by row")
        if not self._checked and len(images) > 1:
            check_contrastive(images, texts, output)
            self._checked = True
        self.loss_taken()
        self.watch(images, texts, tau)
        loss: Tensor = self._module(images, texts, tau)
        for weight in self._unused:
            loss = loss + 0.0 * weight.sum()
        return loss

    def step_done(self, value: Tensor) -> None:
        """See once that the host's step gave back our loss: a class of the user's may take another."""
        if self._used:
            return
        self._used = True
        ours = math.nan if self._loss is None else float(self._loss.detach())
        parts = getattr(
            self._trainer, "current_gradient_accumulation_steps", self._trainer.args.gradient_accumulation_steps
        )
        if not any(math.isclose(float(value), each, rel_tol=1e-3) for each in (ours, ours / parts)):
            raise SeamError(
                f"transformers {self.facts.host_version}: the loss of the first step is {float(value):.4g}, and the "
                f"MM-TS loss of its model's output {ours:.4g}: {type(self._trainer).__name__} takes another than the "
                "model's, so the schedule would not apply"
            )


def _input_ids(batch: Mapping[str, Any]) -> Tensor:
    found = batch.get("input_ids")
    if not isinstance(found, Tensor) or found.ndim != 2:
        raise ConfigError(
            f"the batch has no input_ids (its keys: {', '.join(map(str, batch))}), by which captions are found; name "
            "the data set's column of raw captions: --mmts-column NAME"
        )
    return found


def embeddings_of(output: Any) -> tuple[Tensor, Tensor]:
    """``[n, D]`` of the pictures (or videos, or sounds) and of the texts that a model gave back.

    Raises:
        ConfigError: it is no model of two towers, or it was not asked for its loss.
    """
    if not isinstance(output, dict) or output.get("loss") is None:
        raise ConfigError(
            "the model's output is no dict with a loss (return_dict=False, or a batch without return_loss=True): there "
            "is no contrastive loss to schedule"
        )
    name = next((each for each in _OTHERS if output.get(each) is not None), None)
    if name is None or output.get(_TEXTS) is None:
        raise ConfigError(
            f"the model's output has no {_TEXTS} beside one of {', '.join(_OTHERS)} (it has {', '.join(output)}): it "
            "is no model of two towers"
        )
    return output[name], output[_TEXTS]


def check_contrastive(images: Tensor, texts: Tensor, output: Any) -> None:
    """See that a model's own loss is InfoNCE of its embeddings, at the scale that its logits have.

    Args:
        images, texts: ``[n, D]``.
        output: of the model, with ``loss`` and ``logits_per_text``.

    Raises:
        ConfigError: it is another, such as SigLIP's, or its embeddings are not normalised.
    """
    with torch.no_grad():
        images, texts = images.double(), texts.double()
        logits = output.get("logits_per_text")
        if logits is None or logits.shape != (len(texts), len(images)):
            raise ConfigError("the model's output has no logits_per_text, by which its loss could be known")
        lengths = torch.cat((images, texts)).norm(dim=1)
        if not torch.allclose(lengths, torch.ones_like(lengths), atol=2e-2):
            raise ConfigError("the model's embeddings are not L2-normalised, so its loss is not of cosines")
        similarity = texts @ images.T
        scale = (similarity * logits).sum() / similarity.square().sum()
        own = torch.arange(len(texts), device=texts.device)
        expected = (F.cross_entropy(scale * similarity, own) + F.cross_entropy(scale * similarity.T, own)) / 2
        theirs = float(output["loss"])
        if not abs(float(expected) - theirs) <= 0.02 * abs(theirs) + 1e-4:
            raise ConfigError(
                f"the model's own loss is {theirs:.4g}, and InfoNCE of its embeddings {float(expected):.4g}: no "
                "softmax over rows (SigLIP's has none), so it has no temperature by row"
            )


class Tokens:
    """Finds the table's captions as a batch has them: by the host's tokenizer, cut where its texts are.

    Args:
        table: of captions.
        trainer: the host's.
        tokenizer: a name or a folder; default: the trainer's own, else the model's.
        first: ``[n, L]`` token ids of the first batch.

    Raises:
        ConfigError: the tokenizer cannot be loaded.
    """

    def __init__(self, table: Table, trainer: Any, tokenizer: Optional[str], first: Tensor) -> None:
        self._tokenizer = _tokenizer_of(trainer, tokenizer)
        self._pad_id = -1 if self._tokenizer.pad_token_id is None else int(self._tokenizer.pad_token_id)
        self._left = getattr(self._tokenizer, "padding_side", "right") == "left"
        # Filled up to a fixed length, as run_clip.py does, that is also where texts are cut; else the tokenizer says.
        longest = int(getattr(self._tokenizer, "model_max_length", 0) or 0)
        is_fixed = bool((first[:, 0 if self._left else -1] == self._pad_id).all())
        self._length = first.shape[1] if is_fixed or not 0 < longest < _UNUSUAL else max(longest, first.shape[1])
        args = trainer.args
        self._device = torch.device(args.device)
        with first_on_node(args.local_process_index, args.world_size > 1):
            self._found = TokenLookup(table, self._of_texts, self._pad_id, self._device)
        self.frequencies = self._found.frequencies

    def _of_texts(self, texts: list[str]) -> Tensor:
        options = {"truncation": True, "max_length": self._length, "padding": "max_length", "return_tensors": "pt"}
        if self._pad_id < 0:
            options.pop("padding")  # such a tokenizer cannot fill up; then every text is of one length
        return self._aligned(self._tokenizer(texts, **options)["input_ids"])

    def _aligned(self, tokens: Tensor) -> Tensor:
        """``[n, L]`` with the padding behind the text."""
        if not self._left:
            return tokens
        order = (tokens == self._pad_id).byte().argsort(dim=1, stable=True)
        return tokens.gather(1, order)

    def __call__(self, tokens: Tensor) -> Tensor:
        return self._found(self._aligned(tokens.to(self._device, non_blocking=True)))

    def text(self, row: Tensor) -> str:
        """``[L]`` token ids as the text they were, for messages."""
        return str(self._tokenizer.decode(row.tolist(), skip_special_tokens=True))


def _tokenizer_of(trainer: Any, name: Optional[str]) -> Any:
    own = getattr(trainer, "processing_class", None)
    own = getattr(own, "tokenizer", own)  # of a processor
    if name is None and callable(own) and hasattr(own, "pad_token_id"):
        return own
    found = name or getattr(trainer.model, "name_or_path", "")
    try:
        from transformers import AutoTokenizer

        if not found:
            raise ValueError("the model does not say where it was loaded from")
        return AutoTokenizer.from_pretrained(found)
    except Exception as error:  # of many kinds: files, the network, another library that is missing
        raise ConfigError(
            one_line(
                f"--mmts-tokenizer: no tokenizer can be loaded from {shown(found)}: {cause(error)}; name the one that "
                "the texts were tokenized with, or the data set's column of raw captions (--mmts-column)"
            )
        ) from None
