"""What a loss is to everything around it: its name, what its number means, its module, how a batch is measured.

Imports no torch: flags are read before a trainer has imported it.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar, Optional

from ..errors import ConfigError, cause, one_line, shown

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

TEMPERATURE, MARGIN = "temperature", "margin"
GROUP = "mmts_plugins.losses"
PREFIX = "mmts-"
_BUILT_IN = {"mmts-infonce": f"{__package__}.infonce", "mmts-max-margin": f"{__package__}.max_margin"}


class LossKind:
    """A loss with one number per row. Fill in the attributes and :meth:`module`, :meth:`anchors`, :meth:`weight`.

    Attributes:
        name: what ``--loss`` is given; starts with ``mmts-``, so that no host mistakes it for a value of its own.
        number: what ``tau_i`` of Eq. 8 is to it: :data:`TEMPERATURE`, above zero, or :data:`MARGIN`, not below zero.
        weight_label, gap_label: axes of the plot of :meth:`weight`.
    """

    name: ClassVar[str]
    number: ClassVar[str]
    weight_label: ClassVar[str]
    gap_label: ClassVar[str]

    def module(
        self, local_loss: bool, gather_with_grad: bool, rank: int, world_size: int, label_smoothing: float = 0.0
    ) -> nn.Module:
        """The loss: ``forward(image_features [n, D], text_features [n, D], number [n])`` to a scalar.

        The flags mean what they mean in OpenCLIP's ``ClipLoss``.

        Raises:
            ConfigError: a flag that this loss does not know.
        """
        raise NotImplementedError

    def anchors(self, positive: Tensor, negatives: Sequence[Tensor], number: Tensor) -> dict[str, Tensor]:
        """Some anchors of a batch, one by one.

        Args:
            positive: ``[b]`` similarities of their pairs.
            negatives: image to text and text to image, each ``[b, N]``; the pair itself is ``-inf``.
            number: ``[b]`` temperatures or margins.

        Returns:
            ``loss`` ``[b]``, and whatever else :meth:`statistics` makes something of.
        """
        raise NotImplementedError

    def statistics(self, anchors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What else to show of all anchors ``[n]``, as scalars by name."""
        return {}

    def weight(self, gap: np.ndarray, number: float) -> Optional[np.ndarray]:
        """What a negative weighs in the gradient (paper, Fig. 1).

        Args:
            gap: how far its similarity lies above what :attr:`gap_label` says.
            number: the temperature or margin; may lie outside of what a run would take.
        """
        raise NotImplementedError

    @property
    def is_margin(self) -> bool:
        return self.number == MARGIN

    def forbids(self, lowest: float) -> bool:
        """Whether a run may not come down to this number."""
        return lowest < 0 if self.is_margin else lowest <= 0

    def __repr__(self) -> str:
        return f"<loss {self.name}>"


_loaded: dict[str, LossKind] = {}


def names() -> tuple[str, ...]:
    """All losses, built-in ones first."""
    return (*_BUILT_IN, *sorted({name for name, _, _ in _entry_points()} - set(_BUILT_IN)))


def choices() -> tuple[str, ...]:
    """What ``--loss`` may be given: :func:`names`, and ``mmts``, which each host reads as one of them."""
    return ("mmts", *names())


def kind(name: str) -> LossKind:
    """The loss of this name.

    Raises:
        ConfigError: there is none, or what a third party put there is none.
    """
    if name not in _loaded:
        if name in _BUILT_IN:
            _loaded[name] = import_module(_BUILT_IN[name]).KIND
        else:
            _loaded[name] = _third_party(name)
    return _loaded[name]


def broken() -> list[str]:
    """What is wrong with losses of third parties, a line each."""
    found = []
    for name, _, _ in _entry_points():
        try:
            kind(name)
        except ConfigError as error:
            found.append(str(error))
    return found


def _third_party(name: str) -> LossKind:
    for found, source, load in _entry_points():
        if found != name:
            continue
        try:
            each = load()
            if not isinstance(each, LossKind):
                raise TypeError(f"it is {shown(each)}, not a LossKind")
            if each.name != name or not name.startswith(PREFIX):
                raise TypeError(
                    f"its name is {shown(each.name)}: entry point and name are one, and start with {PREFIX}"
                )
            if each.number not in (TEMPERATURE, MARGIN):
                raise TypeError(f"its number is {shown(each.number)}, not {TEMPERATURE!r} or {MARGIN!r}")
        except (Exception, SystemExit) as error:
            raise ConfigError(
                one_line(f"the loss {name} ({source}) cannot be used: {type(error).__name__}: {cause(error)}")
            ) from error
        return each
    raise ConfigError(f"unknown --loss {shown(name)}; choose from {', '.join(choices())}")


def _entry_points() -> Sequence[tuple[str, str, Any]]:
    from ..hosts.registry import entry_points

    return entry_points(GROUP)
