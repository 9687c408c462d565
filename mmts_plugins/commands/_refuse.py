"""Refusing flags that would do nothing."""

from __future__ import annotations

import argparse
from collections.abc import Sequence

from ..errors import ConfigError

_SPELT = {"data": "DATA", "clusters": "-k"}


def refuse_given(args: argparse.Namespace, names: Sequence[str], why: str) -> None:
    """Raise a ConfigError for the first of the flags (by their names in ``args``) that was given."""
    for name in names:
        value = getattr(args, name, None)
        if value is not None and value is not False and value != []:
            flag = _SPELT.get(name, "--" + name.replace("_", "-"))
            raise ConfigError(f"{flag} has no effect {why}; drop one of the two")
