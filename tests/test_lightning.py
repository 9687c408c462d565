"""lightly's losses in Lightning's own trainer: every batch's loss against one written out in float64."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, run_python

pytest.importorskip("pytorch_lightning", reason="needs the extra: pip install 'mmts-plugins[lightning]'")
pytest.importorskip("lightly", reason="needs the extra: pip install 'mmts-plugins[lightning]'")

from pl_train import CLASSES, SimCLR, fit

from mmts_plugins import MMTSCallback
from mmts_plugins.errors import ConfigError, MMTSError, SeamError, TableError
from mmts_plugins.tables import ClusterTable

SHIFTS = {"alpha": 0.7, "shift_min": 0.45, "shift_max": 0.65}
COUNTS = [CLASSES.count(number) for number in range(4)]


@pytest.fixture(scope="module")
def classes(tmp_path_factory) -> Path:
    """Four classes, one of which the table calls 10: their ids need not be without a gap."""
    path = tmp_path_factory.mktemp("pl") / "classes.parquet"
    ClusterTable.build(["0", "1", "2", "3", "10"], range(5), [*COUNTS, 6], [*COUNTS, 6], kind="class").save(path)
    return path


@pytest.fixture(scope="module")
def names(tmp_path_factory) -> Path:
    """The same, of file names."""
    path = tmp_path_factory.mktemp("pl") / "names.parquet"
    keys = [f"{number:02}.png" for number in range(48)]
    ClusterTable.build(keys, CLASSES, [COUNTS[each] for each in CLASSES], [1] * 48).save(path)
    return path


def nt_xent(one: torch.Tensor, two: torch.Tensor, tau: torch.Tensor) -> float:
    """Every view of every sample, one at a time, against the other views of all."""
    views = F.normalize(torch.cat((one, two)), dim=1)
    rows = []
    for i, view in enumerate(views):
        others = [j for j in range(len(views)) if j != i]
        logits = views[others] @ view / tau[i % len(one)]
        own = others.index((i + len(one)) % len(views))
        rows.append(torch.logsumexp(logits, 0) - logits[own])
    return float(torch.stack(rows).mean())


def decoupled(one: torch.Tensor, two: torch.Tensor, tau: torch.Tensor) -> float:
    """As lightly has it: the pair itself is no negative, and each side's negatives are of either view."""
    one, two = F.normalize(one, dim=1), F.normalize(two, dim=1)
    rows = []
    for first, second in ((one, two), (two, one)):
        for i, view in enumerate(first):
            others = [j for j in range(len(first)) if j != i]
            negatives = torch.cat((first[others], second[others])) @ view / tau[i]
            rows.append(torch.logsumexp(negatives, 0) - second[i] @ view / tau[i])
    return float(torch.stack(rows).mean())


def temperatures(targets: Any, step: int, total: int) -> torch.Tensor:
    frequency = [COUNTS[target] for target in targets]
    return torch.from_numpy(reference.temperature(frequency, COUNTS, 0.7, 0.45, 0.65, step, total / 5))


CASES = {
    "plain": ("NTXentLoss", nt_xent, 1),
    "accumulated by 2": ("NTXentLoss", nt_xent, 2),
    "accumulated by 3": ("NTXentLoss", nt_xent, 3),
    "decoupled": ("DCLLoss", decoupled, 1),
}


@pytest.mark.parametrize(("kind", "loss", "parts"), CASES.values(), ids=CASES)
def test_every_batch_equals_float64(kind, loss, parts, classes, tmp_path, capsys):
    module = SimCLR(kind)
    fit(tmp_path, module, [MMTSCallback(classes, **SHIFTS)], accumulate_grad_batches=parts)
    assert module.calls["step"] == [step for step in range(12 // parts) for _ in range(parts)]
    for one, two, target, step, value in zip(
        *(module.calls[name] for name in ("one", "two", "target", "step", "loss"))
    ):
        tau = temperatures(target, step, 12 // parts)
        assert value == pytest.approx(loss(torch.from_numpy(one), torch.from_numpy(two), tau), rel=1e-6)
    assert isinstance(module.criterion.temperature, float)
    assert not module.criterion._forward_pre_hooks
    assert capsys.readouterr().out.count(f"MM-TS: mmts-infonce: alpha 0.7 over {12 // parts} steps") == 1
    assert len((tmp_path / "mmts.jsonl").read_text().splitlines()) == 12 // parts


def test_a_memory_bank(classes, tmp_path):
    torch.manual_seed(0)
    module = SimCLR(memory_bank_size=(32, 16))
    banks = []
    forward = module.criterion.memory_bank.forward

    def recording(*args: Any, **kwargs: Any) -> Any:
        found = forward(*args, **kwargs)
        banks.append(found[1].double())
        return found

    module.criterion.memory_bank.forward = recording
    fit(tmp_path, module, [MMTSCallback(classes, **SHIFTS)])
    assert len(banks) == 12
    calls = module.calls
    for call, bank in enumerate(banks):
        one, two = (F.normalize(torch.from_numpy(calls[name][call]), dim=1) for name in ("one", "two"))
        logits = torch.cat(((one * two).sum(1, keepdim=True), one @ bank), 1)
        tau = temperatures(calls["target"][call], calls["step"][call], 12)
        expected = float(F.cross_entropy(logits / tau[:, None], torch.zeros(8, dtype=torch.long)))
        assert calls["loss"][call] == pytest.approx(expected, rel=1e-6)


def test_by_file_name_by_class_and_by_a_function_are_one(classes, names, tmp_path):
    def run(name: str, *args: Any, **fields: Any) -> list[float]:
        module = SimCLR()
        fit(tmp_path / name, module, [MMTSCallback(*args, **SHIFTS, **fields)])
        return module.calls["loss"]

    by_class = run("a", classes)
    assert len(by_class) == 12
    # A class that the table calls 10, of 6 samples, is the rarest there, as the class 3 is: the same shifts.
    assert by_class == run("b", names, key="filename") == run("c", names, key=lambda batch: batch[2])
    assert by_class == run("d", classes, key=lambda batch: [str(each) for each in batch[1].tolist()])


def test_without_a_table_it_is_the_schedule_of_kukleva_and_others(tmp_path):
    module = SimCLR()
    from pytorch_lightning.loggers import CSVLogger

    trainer = fit(tmp_path, module, [MMTSCallback()], logger=CSVLogger(tmp_path))
    with open(Path(trainer.log_dir) / "metrics.csv") as file:
        logged = [float(row["mmts/tau_mean"]) for row in csv.DictReader(file) if row["mmts/tau_mean"]]
    expected = [0.1 + 0.9 * (1 + np.cos(2 * np.pi * step / (12 / 5))) / 2 for step in range(12)]
    assert logged == pytest.approx(expected)
    assert yaml.safe_load((Path(trainer.log_dir) / "mmts.yaml").read_text())["no_shifts"] is True


def test_classes_that_the_table_lacks(tmp_path):
    """They get the tail's shift, also where they lie beyond its classes."""
    ClusterTable.build(["0", "1"], range(2), [6, 30], [6, 30], kind="class").save(tmp_path / "two.parquet")
    module = SimCLR()
    fit(tmp_path, module, [MMTSCallback(tmp_path / "two.parquet", **SHIFTS)])
    calls = module.calls
    for call, step in enumerate(calls["step"]):
        frequency = [{1: 30}.get(target, 6) for target in calls["target"][call].tolist()]
        tau = torch.from_numpy(reference.temperature(frequency, [30, 6], 0.7, 0.45, 0.65, step, 12 / 5))
        one, two = (torch.from_numpy(calls[name][call]) for name in ("one", "two"))
        assert calls["loss"][call] == pytest.approx(nt_xent(one, two, tau), rel=1e-6)
    assert len(calls["loss"]) == 12


def test_not_asked_for_and_a_constant_column(tmp_path):
    losses = []
    for callbacks in ([], [MMTSCallback(alpha=0.0, shift_min=0.5, shift_max=0.5)]):
        module = SimCLR(temperature=0.5)
        fit(tmp_path / str(len(losses)), module, callbacks)
        losses.append(module.calls["loss"])
    assert len(losses[0]) == 12
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)


def test_resumed_equals_uninterrupted_and_other_settings_are_refused(classes, tmp_path):
    from pytorch_lightning.callbacks import ModelCheckpoint

    whole = SimCLR()
    saving = ModelCheckpoint(dirpath=tmp_path, filename="{epoch}", save_top_k=-1)
    fit(tmp_path, whole, [MMTSCallback(classes, **SHIFTS), saving])
    checkpoint = tmp_path / "epoch=0.ckpt"
    resumed = SimCLR()
    fit(tmp_path / "b", resumed, [MMTSCallback(classes, **SHIFTS)], resume=checkpoint)
    assert resumed.calls["step"] == list(range(6, 12))
    assert resumed.calls["loss"] == whole.calls["loss"][6:]
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name])
    with pytest.raises(ConfigError, match=r"of the checkpoint: the resumed run differs: alpha was 0.7 and is 0.6"):
        fit(tmp_path / "c", SimCLR(), [MMTSCallback(classes, **{**SHIFTS, "alpha": 0.6})], resume=checkpoint)
    fit(tmp_path / "d", SimCLR(), [MMTSCallback(classes, **{**SHIFTS, "alpha": 0.6}, allow_config_change=True)],
        resume=checkpoint)  # fmt: skip
    plain = ModelCheckpoint(dirpath=tmp_path / "plain", filename="{epoch}", save_top_k=-1)
    fit(tmp_path / "plain", SimCLR(), [plain])
    with pytest.raises(ConfigError, match="the checkpoint was not trained with MM-TS"):
        fit(tmp_path / "e", SimCLR(), [MMTSCallback(classes, **SHIFTS)], resume=tmp_path / "plain/epoch=0.ckpt")


def test_two_ranks_that_gather_equal_float64(classes, tmp_path):
    done = run_python(REPOSITORY / "tests" / "pl_train.py", tmp_path, "--table", classes)
    assert done.returncode == 0, done.stdout[-3000:]
    ranks = [dict(np.load(tmp_path / f"rank-{rank}.npz")) for rank in range(2)]
    assert ranks[0]["step"].tolist() == list(range(6))
    np.testing.assert_array_equal(ranks[0]["weight"], ranks[1]["weight"])
    assert done.stdout.count("MM-TS: mmts-infonce: alpha 0.7 over 6 steps") == 1
    for step in range(6):
        one, two = (torch.from_numpy(np.concatenate([rank[name][step] for rank in ranks])) for name in ("one", "two"))
        tau = temperatures(np.concatenate([rank["target"][step] for rank in ranks]), step, 6)
        together = (ranks[0]["loss"][step] + ranks[1]["loss"][step]) / 2  # each rank's rows against everybody's
        assert together == pytest.approx(nt_xent(one, two, tau), rel=1e-6)


class Unused(SimCLR):
    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        return self.network(batch[0][0]).square().mean()


class Stumbling(SimCLR):
    def training_step(self, batch: Any, number: int) -> torch.Tensor:
        raise RuntimeError("stumbles")


class Another(SimCLR):
    def __init__(self) -> None:
        super().__init__("VICRegLoss")


def test_what_is_refused(classes, names, tmp_path):
    def fails(error: type[Exception], match: str, *args: Any, module: Any = None, **fields: Any) -> None:
        module = SimCLR() if module is None else module
        with pytest.raises(error, match=match) as caught:
            fit(tmp_path, module, [MMTSCallback(*args, **{**SHIFTS, **fields})])
        assert "\n" not in str(caught.value)
        assert not isinstance(getattr(module.criterion, "temperature", None), torch.Tensor)

    fails(SeamError, "step 0 went by without the MM-TS loss", classes, module=Unused())
    fails(RuntimeError, "stumbles", classes, module=Stumbling())
    fails(ConfigError, "Another has no loss that is known", classes, module=Another())
    fails(ConfigError, "key='label': a batch has no classes or names there", classes, key="label")
    fails(TableError, r"\(0% found\)", names, key="target")
    fails(ConfigError, "so the table would change nothing", classes, shift_max=0.45)
    fails(ConfigError, "lightly's losses have a temperature", classes, loss="mmts-max-margin")
    fails(MMTSError, "no such cluster table", tmp_path / "nowhere.parquet")
    with pytest.raises(ConfigError, match="the run has no end"):
        fit(tmp_path, SimCLR(), [MMTSCallback(classes, **SHIFTS)], max_epochs=-1)
