"""The hit-rate guard: what is decided depends on the share of samples found, and on nothing else."""

from __future__ import annotations

import re

import pytest
import torch
from ranks import on_ranks

from mmts_plugins.errors import TableError
from mmts_plugins.hits import ENOUGH, HitGuard, judge

CPU = torch.device("cpu")


def guard(missing: str = "tail", rank: int = 0, world_size: int = 1) -> tuple[HitGuard, list[str]]:
    warnings: list[str] = []
    text = lambda row: f"caption {int(row[0])}"  # noqa: E731
    return HitGuard("captions", "t.parquet", missing, text, warnings.append, CPU, rank, world_size), warnings


def stream(share: float, seed: int, n: int = 8192) -> torch.Tensor:
    """Whether each sample is missing, at random; ``share`` of them are known."""
    return torch.rand(n, generator=torch.Generator().manual_seed(seed)) >= share


def outcome(missed: torch.Tensor, batch: int, epochs: tuple[int, ...] = (), **how) -> tuple[str, int]:
    """``stops``, ``warns`` or ``trains``, and how many samples this rank had seen when that was decided."""
    judging, warnings = guard(**how)
    for start in range(0, len(missed), batch):
        rows = torch.arange(start, start + batch)[:, None]
        try:
            judging.add(missed[start : start + batch], rows)
            if start + batch in epochs:
                judging.conclude()
        except TableError:
            return "stops", start + batch
        if warnings:
            return "warns", start + batch
    return "trains", len(missed)


@pytest.mark.parametrize(
    ("found", "said"),
    [(100, "trains"), (99, "trains"), (98, "warns"), (51, "warns"), (50, "warns"), (49, "stops"), (0, "stops")],
)
def test_thresholds_are_exact(found, said):
    given = (100 - found, 100, "100 captions", "t.parquet", "tail", ["a", "b", "c", "d"])
    message = f"{100 - found} of 100 captions are not in t.parquet ({found}% found), for example 'a'; 'b'; 'c'"
    if said == "stops":
        with pytest.raises(TableError) as stopped:
            judge(*given)
        assert str(stopped.value) == f"{message}. Was the table made from other captions, classes or annotations?"
    else:
        warning = f"{message}; they get the tail shift (--mmts-missing)"
        assert judge(*given) == (warning if said == "warns" else None)


def test_shares_are_not_rounded_up():
    with pytest.raises(TableError, match=r"1 of 1000 .*\(99% found\) \(--mmts-missing error; tail or mean would"):
        judge(1, 1000, "1000 captions", "t.parquet", "error")
    with pytest.raises(TableError, match=r"\(49% found by id\)\. Was .* annotations\? Its keys are ids\."):
        judge(501, 1000, "1000 captions", "t.parquet", "tail", found_by="id", hint=" Its keys are ids.")
    assert judge(0, 1000, "1000 captions", "t.parquet", "error") is None


@pytest.mark.parametrize(("share", "said"), [(0.0, "stops"), (0.4, "stops"), (0.65, "warns"), (1.0, "trains")])
def test_no_seed_and_no_batch_size_moves_the_decision(share, said):
    for seed in range(10):
        for batch in (2, 16, 100, 4096):
            assert outcome(stream(share, seed), batch)[0] == said


def test_nothing_is_decided_on_a_few_samples():
    first_missed = torch.arange(4096) < 300  # as a sorted file has it: 71% of the first 1,024 are known
    assert outcome(first_missed, 2) == ("warns", ENOUGH)
    assert outcome(first_missed, 1000) == ("warns", 2000)  # looked at after 1, 2, 4, ... batches
    assert outcome(torch.arange(4096) < 600, 2) == ("stops", ENOUGH)


def test_a_short_epoch_is_judged_whole():
    missed = torch.arange(40) % 5 < 3  # 40% known
    assert outcome(missed, 4, epochs=(40,)) == ("stops", 40)
    assert outcome(~missed, 4, epochs=(40,)) == ("warns", 40)
    assert outcome(~missed, 4) == ("trains", 40)  # the run goes on: not yet judged


def test_examples_are_captions_that_were_missed():
    judging, warnings = guard()
    missed = torch.zeros(100, dtype=torch.bool)
    missed[[7, 31, 50, 99]] = True
    for start in range(0, 100, 10):
        judging.add(missed[start : start + 10], torch.arange(start, start + 10)[:, None])
    judging.conclude()
    said = "4 of the first 100 captions are not in t.parquet (96% found), for example 'caption 7'; 'caption 31'; "
    assert warnings == [said + "'caption 50'; they get the tail shift (--mmts-missing)"]
    with pytest.raises(TableError, match=r"1024 of the first 1024 .* for example 'a'; 'a'; 'a'\. Was"):
        HitGuard("captions", "t", "tail", str, print, CPU).add(torch.ones(1024, dtype=torch.bool), ["a"] * 1024)


def test_once_judged_nothing_is_counted():
    judging, warnings = guard()
    judging.add(torch.zeros(ENOUGH, dtype=torch.bool), torch.zeros(ENOUGH, 1))
    judging.add(None, None)  # type: ignore[arg-type]  # not looked at
    judging.conclude()
    assert warnings == []


@pytest.mark.parametrize("at", [0, 3, 1023, 1024, 5000, 8190])
def test_error_means_the_whole_run(at):
    missed = torch.zeros(8192, dtype=torch.bool)
    assert outcome(missed, 4, epochs=(8192,), missing="error") == ("trains", 8192)
    missed[at] = True
    said, when = outcome(missed, 4, epochs=(8192,), missing="error")
    assert said == "stops"
    assert at < when <= at + 2 * 128 * 4 + 4  # two looks later at most
    assert outcome(missed, 4, missing="tail")[0] == "trains"


def _ranks(rank: int, world_size: int, share: float, missing: str) -> tuple[str, int, str]:
    """Rank 1 misses everything that is missed, rank 0 nothing: alone they would decide otherwise."""
    judging, warnings = guard(missing, rank, world_size)
    for batch in range(1, 600):
        missed = torch.rand(4, generator=torch.Generator().manual_seed(batch)) >= share
        try:
            judging.add(missed if rank else torch.zeros(4, dtype=torch.bool), torch.full((4, 1), rank))
        except TableError as error:
            return "stops", batch, str(error)
    return "warns" if warnings else "trains", batch, "".join(warnings)


@pytest.mark.parametrize(
    ("share", "missing", "said", "when"),
    [(-1, "error", ("stops", "stops"), 1), (0.2, "tail", ("warns", "trains"), 599), (1, "error", ("trains",) * 2, 599)],
)
def test_ranks_decide_together(share, missing, said, when):
    found = on_ranks(2, _ranks, share, missing)
    assert tuple(rank[0] for rank in found) == said
    assert {rank[1] for rank in found} == {when}
    if said[0] == "stops":
        assert found[0][2] == found[1][2]
        assert found[0][2].startswith(
            "4 of the first 8 captions are not in t.parquet (50% found), for example 'caption 1'"
        )
    if said[0] == "warns":
        misses, samples = map(int, re.findall(r"(\d+) of the first (\d+) captions", found[0][2])[0])
        assert samples == 1024
        assert misses == sum(
            int((torch.rand(4, generator=torch.Generator().manual_seed(batch)) >= share).sum())
            for batch in range(1, 129)
        )
        assert "for example 'caption 1'" in found[0][2]
