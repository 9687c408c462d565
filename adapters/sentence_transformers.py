"""sentence-transformers' conventions translated to the core: its losses, whose one scale becomes a column.

Imports without sentence-transformers and patches nothing; :mod:`mmts_plugins.patches.trainer` calls it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any, Optional

from torch import Tensor, nn

from ..errors import ConfigError
from ..tables.index import KeyLookup
from .trainer import Places, Start, TrainerAdapter, TrainerSession, beginning

_SCALES = {"MultipleNegativesRankingLoss", "CachedMultipleNegativesRankingLoss"}
_TEMPERATURES = {"GISTEmbedLoss", "CachedGISTEmbedLoss"}
_TRANSPOSED = "MultipleNegativesSymmetricRankingLoss"


class SentenceTransformers(TrainerAdapter):
    """A script or notebook with a ``SentenceTransformerTrainer``, 3.4 and newer."""

    name = "sentence-transformers"
    title = "sentence-transformers"

    def owns(self, trainer: Any) -> bool:
        return isinstance(getattr(trainer, "loss", None), (nn.Module, dict)) and hasattr(trainer, "collect_features")

    def check(self, trainer: Any) -> None:
        super().check(trainer)
        for loss in losses_of(trainer):
            check_loss(loss)

    def session(self, start: Start, batch: Mapping[str, Any]) -> TrainerSession:
        return SentenceTransformersSession(start)


ADAPTER = SentenceTransformers()


class SentenceTransformersSession(TrainerSession):
    """MM-TS in one call of its ``train()``."""

    def __init__(self, start: Start) -> None:
        super().__init__(ADAPTER, start, lambda table: Places(start.lookup or KeyLookup(table)))
        self.judge_batches("training texts", beginning)
        card = getattr(start.trainer.model, "model_card_data", None)
        for name in ("non_default_hyperparameters", "all_hyperparameters"):
            values = getattr(card, name, None)
            if isinstance(values, dict):
                values["mmts" + (f" ({start.data_set})" if start.data_set else "")] = self.tau.describe()

    def step_of(self, trainer: Any, model: Any, batch: dict[str, Any]) -> AbstractContextManager[None]:
        tau = self.temperatures(self.samples_of(batch))
        self.loss_taken()
        loss = trainer.loss
        return by_row(loss[batch["dataset_name"]] if isinstance(loss, dict) else loss, tau)


def losses_of(trainer: Any) -> list[nn.Module]:
    """A trainer's loss, or one for each of its data sets."""
    return list(trainer.loss.values()) if isinstance(trainer.loss, dict) else [trainer.loss]


def _names(module: nn.Module) -> set[str]:
    return {each.__name__ for each in type(module).__mro__}


def _scaled(module: nn.Module) -> Optional[str]:
    """The attribute that scales a loss's similarities; ``None`` of any other module."""
    names = _names(module)
    if names & _SCALES and not isinstance(getattr(type(module), "scale", None), property):
        return "scale"
    return "temperature" if names & _TEMPERATURES else None


def check_loss(loss: nn.Module) -> None:
    """See that a loss, or one inside it, takes a column in the place of its scale.

    Raises:
        ConfigError: none does.
    """
    known = ", ".join(sorted(_SCALES | _TEMPERATURES))
    for module in loss.modules():
        names = _names(module)
        if "cross_encoder" in type(module).__module__ and (names & _SCALES):
            raise ConfigError(
                f"{type(module).__name__} of a cross-encoder scores pairs, not embeddings: it has no rows"
            )
        if _TRANSPOSED in names and not names & _SCALES:
            raise ConfigError(
                f"{type(module).__name__} of this version scales once for both directions, so columns would get the "
                "rows' temperatures: use MultipleNegativesRankingLoss with both directions, of 5.3 or newer"
            )
    if not any(_scaled(module) for module in loss.modules()):
        raise ConfigError(f"{type(loss).__name__} has no temperature by row; known: {known}, and what wraps them")


@contextmanager
def by_row(loss: nn.Module, tau: Tensor) -> Iterator[None]:
    """A loss, and every one inside it, with a column ``[n, 1]`` in the place of its one number, for one step.

    Its own code stays: it multiplies (or divides) matrices whose rows are this rank's anchors.
    """
    with ExitStack() as after:
        for module in loss.modules():
            attribute = _scaled(module)
            if attribute is not None:
                column = (1 / tau if attribute == "scale" else tau)[:, None].float()
                _put(after, module, attribute, column)
            if hasattr(module, "mini_batch_size") and hasattr(module, "calculate_loss"):
                _put(after, module, "calculate_loss", _at_once(module, len(tau)))
        yield


def _put(after: ExitStack, module: nn.Module, name: str, value: Any) -> None:
    own = name in module.__dict__
    before = module.__dict__.get(name)
    module.__dict__[name] = value
    after.callback(lambda: module.__dict__.__setitem__(name, before) if own else module.__dict__.pop(name, None))


def _at_once(module: Any, rows: int) -> Callable[..., Any]:
    """A cached loss embeds in parts, and takes its loss in parts of as many rows, which no whole column fits."""
    calculate = module.calculate_loss

    def whole(*args: Any, **options: Any) -> Any:
        part, module.mini_batch_size = module.mini_batch_size, max(rows, module.mini_batch_size)
        try:
            return calculate(*args, **options)
        finally:
            module.mini_batch_size = part

    return whole
