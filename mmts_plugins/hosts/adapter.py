"""A host's conventions, and the one road from flags to what a run does: taken by runs and previews alike."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Optional

from .. import losses
from ..config import Config, merge
from ..errors import ConfigError, TableError, shown
from ..options import ALLOW_CHANGE, COMMON, Option
from ..presets import Preset
from ..tables import CAPTION, ClusterTable, Table, open_table
from .logs import HostLog, RunFolder

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Resolved:
    """What a run will do.

    Attributes:
        config: checked.
        table: where shifts come from; ``None`` under ``--mmts-no-shifts`` without one, or while it is still to be made.
        allow_change: on resume, go on although the record differs.
    """

    config: Config
    table: Optional[Table]
    allow_change: bool = False

    @cached_property
    def shifted(self) -> Optional[Table]:
        """The table, where samples get its shifts, shuffled where it is to be; a run under ``--mmts-no-shifts`` only
        records which it was given.

        Raises:
            TableError: it is to be shuffled and cannot be.
        """
        if self.config.no_shifts:
            return None
        if self.table is None or self.config.shuffle_shifts is None:
            return self.table
        return self.table.shuffled(self.config.shuffle_shifts)

    @property
    def described(self) -> Optional[Table]:
        """The table whose frequencies tell of the run: :attr:`shifted`, or the one whose mean every sample gets."""
        return self.table if self.shifted is None else self.shifted


class Adapter:
    """A host's conventions: fill in the attributes, and override what differs. :meth:`resolve` is given.

    Attributes:
        name: the one spelling, as in ``mmts schedule --host NAME``.
        title: as users write it, for messages.
        recorded: as ``mmts.yaml`` has it; default: the title.
        loss: what ``--loss mmts`` means here.
        presets: the paper's for this host, by name. The first for a loss is the default of runs with that loss.
        default_presets: for losses without one of its own, another host's.
        options: flags that only this host knows.
        defaults: of options, and of common fields where this host's differ from :class:`Config`'s.
        counted_in: the host's own flag that names a file it can count a table in; empty where there is none.
        log_files: the host's own files that :meth:`read_log` reads, for messages.
        log_folders: folders inside a run's folder in which the host's files lie.
        loss_hint: what to say beside the losses there are, where ``--loss`` is given another.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    recorded: ClassVar[str] = ""
    loss: ClassVar[str]
    presets: ClassVar[Mapping[str, Preset]] = {}
    default_presets: ClassVar[Mapping[str, str]] = {}
    options: ClassVar[tuple[Option, ...]] = ()
    defaults: ClassVar[Mapping[str, Any]] = {}
    counted_in: ClassVar[str] = ""
    log_files: ClassVar[tuple[str, ...]] = ()
    log_folders: ClassVar[tuple[str, ...]] = ()
    loss_hint: ClassVar[str] = ""

    # -- fill in, where the host needs it -----------------------------------------------------------------------------

    def open_table(self, path: str) -> Table:
        """The table of ``--mmts-clusters``; here one of captions.

        Raises:
            TableError: it cannot be read, or its keys are not what this host's samples have.
        """
        table = open_table(path)
        if table.kind != CAPTION:
            raise TableError(
                f"{path}: a table of class ids, but {self.title}'s samples are found by caption; make one of captions "
                "(mmts cluster CAPTIONS, with --label-column for class labels)"
            )
        return table

    def settle(self, config: Config) -> Config:
        """The configuration with what depends on other fields filled in, before a table is opened.

        Raises:
            ConfigError: a combination that has no meaning here.
        """
        return config

    def fit(self, config: Config, table: Table, flags: Mapping[str, Any]) -> Config:
        """The configuration with what depends on the table filled in; ``flags`` as given.

        Raises:
            TableError: a table to which a flag does not fit.
        """
        return config

    def counts(self, config: Config) -> bool:
        """Whether a run without ``--mmts-clusters`` counts its table itself."""
        return False

    def count(self, config: Config, table: Optional[Table], path: str) -> Optional[Table]:
        """The table that a run makes of the file of :attr:`counted_in`, and of ``table`` where there is one.

        Raises:
            TableError: it cannot be counted.
        """
        return table

    def classes_in(self, path: str, columns: Sequence[str]) -> dict[str, Callable[[], ClusterTable]]:
        """The tables that a run can count in a CSV file of these columns, by name; none in a foreign one.

        Raises:
            TableError: when called: it cannot be counted.
        """
        return {}

    def read_log(self, run: RunFolder) -> HostLog:
        """What the host's own files in a run's folder tell; nothing where it is another host's."""
        return HostLog({}, {}, ())

    # -- given --------------------------------------------------------------------------------------------------------

    def check_fields(self) -> None:
        """Of an adapter by somebody else: that it is filled in.

        Raises:
            TypeError: naming the attribute that is not what it should be.
        """
        common = {option.name for option in COMMON}
        for name in ("name", "title", "loss"):
            if not isinstance(getattr(self, name, None), str):
                raise TypeError(f"its Adapter is not filled in: {name}")
        for option in self.options:
            if not isinstance(option, Option) or option.name in common:
                raise TypeError(f"its Adapter has an option that is none, or that every host has: {shown(option)}")

    def default_preset(self, loss: str) -> str:
        """The preset of a run that names none."""
        own = {preset.loss: name for name, preset in reversed(list(self.presets.items()))}
        chosen = own.get(loss) or self.default_presets.get(loss)
        if chosen is None:  # a loss of a third party: values of the same kind of number
            number = losses.kind(loss).number
            every = {**self.default_presets, **own}
            chosen = next(name for known, name in every.items() if losses.kind(known).number == number)
        return chosen

    def resolve(self, flags: Mapping[str, Any], counted_in: Optional[str] = None, with_table: bool = True) -> Resolved:
        """:meth:`preview`, for a run: what the configuration warns of is logged."""
        resolved = self.preview(flags, counted_in, with_table)
        for warning in resolved.config.warnings():
            logger.warning("MM-TS: %s", warning)
        return resolved

    def preview(self, flags: Mapping[str, Any], counted_in: Optional[str] = None, with_table: bool = True) -> Resolved:
        """Flags, from :func:`.options.split_flags`, to what a run does. Nothing is written, nothing of the host needed.

        Args:
            counted_in: the file that the host's own flag :attr:`counted_in` names, where that is known already.
            with_table: open the table; otherwise there is none, as while it is still to be made.

        Raises:
            ConfigError, TableError: what would stop the run.
        """
        config = self.settle(Config.of(merge(flags, self)))
        table: Optional[Table] = None
        if config.clusters is not None and with_table:
            table = self.open_table(config.clusters)
            config = self.fit(config, table, flags)
        if config.clusters is None and config.reads_table and not self.counts(config):
            raise ConfigError(
                "--loss mmts needs the cluster table of the training captions: --mmts-clusters FILE "
                "(make it with: mmts cluster CAPTIONS -o FILE), or --mmts-no-shifts for the schedule alone"
            )
        if counted_in is not None:
            if not self.counted_in:
                raise ConfigError(f"{counted_in}: {self.title} counts no classes; it takes --mmts-clusters")
            if config.reads_table and with_table:
                table = self.count(config, table, counted_in)
        resolved = Resolved(config, table, bool(flags.get(ALLOW_CHANGE)))
        if config.shuffle_shifts is not None:
            _ = resolved.shifted  # says here, not when training starts, that this table cannot be shuffled
        return resolved
