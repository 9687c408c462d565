"""Multi-Modal Temperature and Margin Schedules (MM-TS, arXiv 2603.08202) as a plugin for contrastive trainers.

This module stays free of heavy imports: the start-up file imports it in every interpreter.
"""

from __future__ import annotations

__version__ = "0.1.0"

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Mapping
    from os import PathLike
    from typing import Any, Optional, Union

__all__ = ["MMTSCallback", "__version__", "enable", "install", "load_model", "uninstall"]


def install() -> None:
    """Arm the hooks of every host adapter in this process, before the host is imported.

    Only needed where the command line does not carry our flags: notebooks, tests, a script that calls a host's
    ``main([...])`` itself. Idempotent. Without ``--loss mmts`` a patched host still behaves as before.
    """
    from .hosts import registry

    registry.install_all()


def enable(trainer: Any, clusters: Union[str, PathLike[str], Mapping[str, Any], None] = None, **fields: Any) -> None:
    """Schedule a trainer object of a library, such as a ``SentenceTransformerTrainer``, from its next ``train()`` on.

    Args:
        trainer: made already.
        clusters: the cluster table's file; or, where the trainer has several data sets, one for each by name.
        fields: our other flags by their names in ``mmts.yaml``: ``alpha=0.02``, ``no_shifts=True``, ``column="text"``.

    Raises:
        ConfigError, TableError: what would stop a run with these flags; or the trainer is no known host's.
    """
    from .errors import ConfigError
    from .hosts import registry

    registry.install_all()
    flags = {"loss": fields.pop("loss", "mmts"), **{f"mmts_{name}": value for name, value in fields.items()}}
    if clusters is not None:
        each = {str(name): str(path) for name, path in clusters.items()} if hasattr(clusters, "items") else None
        flags["mmts_clusters"] = str(clusters) if each is None else each
    if not any(host.enable is not None and host.enable(trainer, flags) for host in registry.hosts()):
        raise ConfigError(f"{type(trainer).__name__} is no trainer that a host here knows; see: mmts doctor")


def uninstall() -> None:
    """Take every patch out again (those another tool has since wrapped are switched off in place, with a warning)."""
    from .hosts import registry

    registry.uninstall_all()


def load_model(
    path: Union[str, PathLike[str]], model: Optional[str] = None, device: str = "cpu"
) -> tuple[Any, Any, Any]:
    """An OpenCLIP model for a notebook, whatever its geometry: in evaluation mode, its transform and its tokenizer.

    Args:
        path: a checkpoint of OpenCLIP's trainer, or a folder with ``open_clip_config.json`` and weights.
        model: OpenCLIP's ``--model``; default: what ``params.txt`` of the checkpoint's run says.

    Raises:
        MMTSError: it cannot be loaded, in one line.
    """
    from .evaluation.model import find_model
    from .evaluation.model import load_model as load

    name, checkpoint = (model, path) if model is not None else find_model(path)
    return load(name, checkpoint, device)


def __getattr__(name: str) -> Any:
    if name == "MMTSCallback":  # made of a class of Lightning's, which is imported for nobody else
        from .patches.lightning import callback_class

        return callback_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
