"""From what a user asks for to a pilot that can run: the host, the variants, the features in files."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

from ..data.classes import load_table
from ..data.encoders import TFIDF
from ..data.source import Source
from ..errors import ConfigError
from ..losses import kind
from ..preview import adapter_of
from ..processes import cores
from ..tables import CAPTION, ClusterTable
from . import data
from .run import Variant, grid, pilot, usual
from .train import Settings, resolve


@dataclass(frozen=True)
class Wanted:
    """What ``mmts pilot`` was asked for; the names are those of its flags."""

    source: Source
    texts: data.Side
    others: data.Side
    test: Optional[Source]
    test_texts: data.Side
    test_others: data.Side
    group: Optional[str]
    image_root: Optional[str]
    keep_blank: bool
    hold_out: float
    tables: dict[str, str]
    loss: str
    host: str
    more: str
    axes: dict[str, list[str]]
    own: list[Variant]
    seeds: list[int]
    settings: Settings
    budget: float
    jobs: Optional[int]


def start(wanted: Wanted, output: Path, force: bool = False) -> int:
    """Make the features, unless they are there, and run; see :func:`.run.pilot`.

    Raises:
        ConfigError, MMTSError: what keeps it from starting, before anything is written.
    """
    adapter = adapter_of(wanted.host)
    if wanted.loss != "mmts":
        kind(wanted.loss)
    loss = adapter.loss if wanted.loss == "mmts" else wanted.loss
    variants = [
        *usual(loss, wanted.tables, wanted.more, plain_is_learned=not kind(loss).is_margin),
        *grid(loss, wanted.tables, wanted.more, wanted.axes),
        *wanted.own,
    ]
    names = [variant.name for variant in variants]
    if len(set(names)) < len(names):
        raise ConfigError(f"two variants have one name: {', '.join(names)}")
    tables = {name: _table(path) for name, path in wanted.tables.items()}
    for variant in variants:
        resolve(adapter, variant.words(0))
    if wanted.test is not None and TFIDF in {side.encoder for side in (wanted.texts, wanted.others) if not side.file}:
        raise ConfigError(
            "--encoder tfidf is fitted to the texts it is given, so those of --test would be of another space; take "
            "--encoder hashing or a sentence encoder"
        )
    train = data.read(wanted.source, wanted.texts, wanted.others, wanted.group, wanted.keep_blank, wanted.image_root)
    if wanted.test is None:
        train, test = data.split(train, wanted.hold_out)
    else:
        test = data.read(
            wanted.test, wanted.test_texts, wanted.test_others, wanted.group, wanted.keep_blank, wanted.image_root
        )
    data.common_width([train, test])
    features = data.digest(train, test)
    if force and (output / "runs").is_dir():
        shutil.rmtree(output / "runs")
    data.refuse_others(output, features)
    about = {
        "data": wanted.source.data,
        "test": f"{wanted.hold_out:g} of it" if wanted.test is None else wanted.test.data,
        "texts": wanted.texts.file or wanted.texts.encoder,
        "others": wanted.others.file or wanted.others.encoder,
        "pairs": len(train),
        "test pairs": len(test),
        "thirds by": next(iter(wanted.tables.values())),
        "host": adapter.name,
        "features": features,
    }
    data.store(output / data.FOLDER, train, test, next(iter(tables.values())), about)
    jobs = wanted.jobs or cores()
    return pilot(output, adapter, variants, wanted.seeds, wanted.settings, wanted.budget, jobs)


def _table(path: str) -> ClusterTable:
    table = load_table(path)
    if table.kind != CAPTION:
        raise ConfigError(
            f"{path}: a table of classes; a pilot finds samples by their captions (mmts cluster --column)"
        )
    return table
