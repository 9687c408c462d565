"""What the documents say: their examples run, their links lead somewhere, their commands exist."""

from __future__ import annotations

import doctest
import importlib
from operator import attrgetter

import pytest

# -- docstrings --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "least"),
    [
        ("schedule:CosineSchedule", 4),
        ("functional:info_nce", 6),
        ("functional:max_margin", 6),
        ("clusters:cluster_shift", 2),
        ("clusters:ClusterTable.build", 6),
    ],
)
def test_examples_of_docstrings(name, least):
    module, _, path = name.partition(":")
    documented = attrgetter(path)(importlib.import_module(f"mmts_plugins.{module}"))
    (found,) = doctest.DocTestFinder(recurse=False).find(documented, name, module=False, globs={})
    said: list[str] = []
    failed, ran = doctest.DocTestRunner().run(found, out=said.append)
    assert not failed, "".join(said)
    assert ran >= least
