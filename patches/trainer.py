"""The seams of Hugging Face's Trainer, of which each host that builds on it has its own: it trains in scripts and
notebooks of the users' own.

* Importing a module of the trainer's takes our flags out of ``sys.argv``, before the script parses it.
* ``Trainer.train`` begins and ends a run; where captions are raw strings, the train data loader's collator finds them.
* ``Trainer.training_step`` is a micro-step.
* ``Trainer.log``: our values join the host's, on their way to every logger.

Not patched: models, losses' code, data sets, the optimizer, evaluation. Trainers of another host are passed through.
"""

from __future__ import annotations

import atexit
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from types import ModuleType
from typing import TYPE_CHECKING, Any, Optional
from weakref import WeakKeyDictionary

from .._startup import asks_for_us
from ..errors import ConfigError
from ..hosts.host import Host, Seam
from ..options import split_flags

if TYPE_CHECKING:
    from ..adapters.trainer import Start, TrainerAdapter, TrainerSession
    from ..hosts.adapter import Resolved

_flags: dict[str, Any] = {}
"""What was taken off the command line of this process, for whichever host's trainer is made."""
_trained = False


class _Run:
    """One call of ``train()``, with one table for all, named ``""``, or with one for each data set."""

    def __init__(self, starts: Mapping[str, Start]) -> None:
        self.starts = starts
        self.sessions: dict[str, TrainerSession] = {}

    def begin(self, adapter: TrainerAdapter, batch: Mapping[str, Any]) -> None:
        """At the first step, when the host knows how many there are: on every rank in the same order."""
        self.sessions = {name: adapter.session(start, batch) for name, start in self.starts.items()}


class TrainerSeams:
    """The functions of one host. Made without an import of torch.

    Args:
        adapter: makes its adapter.
        elsewhere: a module whose import says that the flags may be another host's; empty: they are this one's.
    """

    version: Callable[[], str]
    """Of the host, once it is made of these."""

    def __init__(self, adapter: Callable[[], TrainerAdapter], elsewhere: str = "") -> None:
        self._adapter, self._elsewhere = adapter, elsewhere
        self._resolved: Optional[Resolved] = None
        self._enabled: WeakKeyDictionary[Any, dict[str, Resolved]] = WeakKeyDictionary()
        self._runs: WeakKeyDictionary[Any, _Run] = WeakKeyDictionary()

    def seams(self) -> tuple[Seam, ...]:
        return (
            Seam("transformers.trainer", "Trainer.train", ("resume_from_checkpoint",), self._train),
            Seam("transformers.trainer", "Trainer.training_step", ("model", "inputs"), self._training_step),
            Seam("transformers.trainer", "Trainer.log", ("logs",), self._log),
        )

    def take_flags(self, _: ModuleType) -> None:
        """After a module was imported that a script imports before it parses its command line.

        Raises:
            ConfigError, TableError: what would stop the run.
        """
        if asks_for_us(sys.argv[1:]) and not _starts_another():
            found, rest = split_flags(sys.argv[1:], self._adapter().options)
            _flags.update(found)
            sys.argv[1:] = rest
        if _flags and self._elsewhere not in sys.modules:
            self._by_flags()
            atexit.unregister(_tell_untrained)
            atexit.register(_tell_untrained)

    def _by_flags(self) -> Resolved:
        if self._resolved is None:
            self._resolved = self._adapter().resolve(_flags)
        return self._resolved

    def enable(self, trainer: Any, flags: Mapping[str, Any]) -> bool:
        """Schedule a trainer that is there already; whether it is one of this host's.

        Raises:
            ConfigError, TableError: what would stop a run with these flags.
        """
        if "transformers" not in sys.modules or not self._adapter().owns(trainer):
            return False
        self._adapter().check(trainer)
        tables = flags.get("mmts_clusters")
        each = tables if isinstance(tables, Mapping) else {"": tables}
        by_set = (getattr(trainer, name, None) for name in ("train_dataset", "loss"))
        if "" not in each and not all(isinstance(value, Mapping) for value in by_set):
            raise ConfigError("a table for each data set needs a trainer with a dict of data sets and one of losses")
        self._enabled[trainer] = {
            name: self._adapter().resolve({**flags, **({} if path is None else {"mmts_clusters": path})})
            for name, path in each.items()
        }
        return True

    def _train(self, original: Callable[..., Any], trainer: Any, *args: Any, **kwargs: Any) -> Any:
        global _trained
        if not (_flags or trainer in self._enabled) or not self._adapter().owns(trainer):
            return original(trainer, *args, **kwargs)
        every = self._enabled.get(trainer) or {"": self._by_flags()}
        _trained = True
        adapter = self._adapter()
        adapter.check(trainer)
        from ..adapters.trainer import Collator, Start
        from ..tables.index import KeyLookup

        resumed = kwargs.get("resume_from_checkpoint", args[0] if args else None)
        if resumed is True:
            from transformers.trainer_utils import get_last_checkpoint

            resumed = get_last_checkpoint(trainer.args.output_dir)
        config = next(iter(every.values())).config
        by_text = adapter.by_text(config)
        lookups = {
            name: KeyLookup(resolved.shifted) if by_text and resolved.shifted is not None else None
            for name, resolved in every.items()
        }
        run = self._runs[trainer] = _Run(
            {
                name: Start(resolved, trainer, resumed or None, self.version(), lookups[name], name)
                for name, resolved in every.items()
            }
        )
        loader = trainer.get_train_dataloader

        def with_captions() -> Any:
            own = trainer.data_collator
            trainer.data_collator = Collator(own, lookups, config.own["column"])
            try:
                return loader()
            finally:
                trainer.data_collator = own

        if by_text:
            trainer.get_train_dataloader = with_captions
        try:
            result = original(trainer, *args, **kwargs)
            for session in run.sessions.values():
                session.judge_now()
            return result
        finally:
            trainer.__dict__.pop("get_train_dataloader", None)
            self._runs.pop(trainer, None)

    def _training_step(
        self, original: Callable[..., Any], trainer: Any, model: Any, inputs: Any, *args: Any, **kwargs: Any
    ) -> Any:
        run = self._runs.get(trainer)
        if run is None:
            return original(trainer, model, inputs, *args, **kwargs)
        from ..adapters.trainer import data_set_of

        if not run.sessions:
            run.begin(self._adapter(), inputs)
        session = run.sessions[data_set_of(inputs, run.sessions)]
        session.at_step(int(trainer.state.global_step))
        with session.step_of(trainer, model, inputs):
            value = original(trainer, model, inputs, *args, **kwargs)
        session.step_done(value)
        return value

    def _log(
        self, original: Callable[..., Any], trainer: Any, logs: dict[str, float], *rest: Any, **kwargs: Any
    ) -> Any:
        run = self._runs.get(trainer)
        if run is not None and "loss" in logs:
            for data_set, session in run.sessions.items():
                prefix = f"mmts/{data_set}/" if data_set else "mmts/"
                logs = {**logs, **{prefix + name: value for name, value in session.report(line=False).items()}}
        return original(trainer, logs, *rest, **kwargs)


def host(
    name: str,
    package: str,
    versions: str,
    imported: Sequence[str],
    adapter: Callable[[], TrainerAdapter],
    elsewhere: str = "",
) -> Host:
    """A host that builds on the Trainer.

    Args:
        name: also of its distribution.
        package: what a script that has it imports.
        versions: that were run.
        imported: modules of which a script imports one before it parses its command line.
        adapter: makes its adapter.
        elsewhere: as of :class:`TrainerSeams`.
    """
    seams = TrainerSeams(adapter, elsewhere)
    made = Host(
        name=name,
        distribution=name,
        package=package,
        versions=versions,
        seams=seams.seams(),
        adapters=lambda: (adapter(),),
        imported_as=package,
        on_import=dict.fromkeys(imported, seams.take_flags),
        enable=seams.enable,
    )
    seams.version = made.version
    return made


def _starts_another() -> bool:
    """Whether this process starts something that takes our flags itself, and imports a trainer for other reasons."""
    from ..hosts.registry import hosts

    started = os.path.abspath(sys.argv[0] or ".").replace(os.sep, "/")
    if started.endswith(("/mmts", "/mmts.exe", "/mmts_plugins/__main__.py")):
        return True  # our own command line, whose encoders import much
    others = [host for host in hosts() if host.start_modules]
    modules = {name for host in others for name in host.start_modules or () if not name.endswith(".py")}
    return any(host.starts(started, as_module=False) for host in others) or any(
        started.endswith("/" + name.replace(".", "/") + ".py") for name in modules
    )


def _tell_untrained() -> None:
    if not _trained and not hasattr(sys, "last_type"):  # a script that fails says why
        with suppress(OSError, ValueError):
            print(
                "mmts: warning: --loss was taken, but no Trainer trained in this process: what it trained by other "
                "means, it trained without MM-TS",
                file=sys.stderr,
                flush=True,
            )
