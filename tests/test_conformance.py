"""What every host does alike: one suite over all of them, the built-in ones and a third party's.

OpenCLIP is the real trainer; AVION and VAST are stand-ins with their signatures and loops (the real ones are compared
with them where a checkout is at hand); tiny_trainer is ``examples/third_party/tiny_host``.
"""

from __future__ import annotations

import ast
import io
import os
import re
import subprocess
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Optional

import numpy as np
import pytest
import test_avion
import test_third_party
import test_vast
import torch
import yaml
from conftest import REPOSITORY, Data, openclip_flags, write_model
from forked import one_rank, run_forked
from ranks import on_ranks

from mmts_plugins.cli import main
from mmts_plugins.config import Config, of_options
from mmts_plugins.errors import ConfigError, SeamError, TableError
from mmts_plugins.hosts import Adapter, Facts, Session
from mmts_plugins.hosts.registry import adapters, hosts
from mmts_plugins.options import COMMON, split_flags
from mmts_plugins.preview import adapter_of
from mmts_plugins.record import check_resume, record, write_record
from mmts_plugins.tables import CAPTION, ClusterTable, LargeTable, streamed
from mmts_plugins.tables.index import KeyLookup

Done = subprocess.CompletedProcess[str]
LAUNCHER = ("-m", "mmts_plugins", "run")


@dataclass(frozen=True)
class Rig:
    """A host ready to train: what is given to its launcher, where its run goes, and with which flags a run goes on."""

    name: str
    command: tuple[object, ...]
    folder: Path
    table: Path
    total: int
    preview: tuple[object, ...] = ()
    variables: tuple[tuple[str, str], ...] = ()
    again: Optional[tuple[object, ...]] = None
    written: str = "mmts.yaml"

    def run(self, *flags: object, launcher: tuple[str, ...] = LAUNCHER, **more: str) -> Done:
        variables = {"PYTHONPATH": str(REPOSITORY), **one_rank(), **dict(self.variables), **more}
        return run_forked(*launcher, *self.command, *flags, **variables)

    def results(self) -> dict[str, str]:
        """What a run has left, to the bit: tensors by file and name, and files that hold no times. Moved away."""
        found: dict[str, str] = {}
        for path in sorted(self.folder.rglob("*")):
            name = str(path.relative_to(self.folder))
            if path.suffix in (".pt", ".pth"):
                _tensors(name, torch.load(path, weights_only=False), found)
            elif path.suffix in (".json", ".jsonl", ".txt"):
                found[name] = path.read_text().replace(str(self.folder), "")
        self.folder.rename(self.folder.with_name(f"before-{time.monotonic_ns()}"))
        return found

    def show(self, *flags: object) -> Done:
        given = ("schedule", "--host", self.name, "--total-steps", self.total, *self.preview, *flags)
        if self.name == "tiny":  # known to another path only
            return run_forked("-m", "mmts_plugins", *given, **{"PYTHONPATH": str(REPOSITORY), **dict(self.variables)})
        said = io.StringIO()
        with redirect_stdout(said), redirect_stderr(said):
            code = main([str(word) for word in given])
        return subprocess.CompletedProcess(given, code, said.getvalue())

    @property
    def record(self) -> dict:
        return yaml.safe_load((self.folder / self.written).read_text())


def _tensors(name: str, value: object, found: dict[str, str]) -> None:
    if isinstance(value, torch.Tensor):
        found[name] = value.detach().reshape(-1).contiguous().view(torch.uint8).numpy().tobytes().hex()
    elif isinstance(value, (dict, list, tuple)):
        for key, each in value.items() if isinstance(value, dict) else enumerate(value):
            _tensors(f"{name}/{key}", each, found)


def _openclip(folder: Path) -> Rig:
    data = Data(folder)
    model = write_model(folder / "model")
    given = openclip_flags(model, folder / "logs", train_data=data.csv, dataset_type="csv", epochs=1)
    return Rig("openclip", ("-m", "open_clip_train.main", *given), folder / "logs" / "run", data.table, 6,
                again=("--resume", "latest"))  # fmt: skip


def _avion(folder: Path) -> Rig:
    metadata = test_avion.write_metadata(folder / "EPIC_train.csv", test_avion.CLASSES)
    sizes = {caption: 1.0 + i**2 for i, caption in enumerate(test_avion.NARRATIONS)}
    ClusterTable.build(list(sizes), range(len(sizes)), list(sizes.values())).save(folder / "clusters.parquet")
    script = test_avion.STAND_IN / "scripts" / test_avion.SCRIPT
    given = (script, "--train-metadata", metadata, "--val-metadata", metadata, "--output-dir", folder / "out")
    path = os.pathsep.join((str(REPOSITORY), str(test_avion.STAND_IN)))
    return Rig(
        "avion",
        given,
        folder / "out",
        folder / "clusters.parquet",
        12,
        ("--train-metadata", metadata),
        (("PYTHONPATH", path),),
        again=(),  # where its folder holds a checkpoint
    )


def _vast(folder: Path) -> Rig:
    data = test_vast.Set(folder)
    script = test_vast.STAND_IN / "run.py"
    given = (script, "--local_rank", 0, "--train_txt", data.txt, "--output_dir", folder / "out")
    return Rig("vast", given, folder / "out", data.table, test_vast.TOTAL, again=("--resume",), written="log/mmts.yaml")


def _tiny(folder: Path, installed: Path) -> Rig:
    (folder / "captions.txt").write_text("\n".join(test_third_party.CAPTIONS * 2) + "\n")
    known = test_third_party.FREQUENCY
    ClusterTable.build(list(known), range(len(known)), list(known.values())).save(folder / "clusters.parquet")
    given = ("-m", "tiny_trainer", "--captions", folder / "captions.txt", "--output", folder / "out")
    path = os.pathsep.join((str(installed), str(REPOSITORY)))
    return Rig("tiny", given, folder / "out", folder / "clusters.parquet", 6, (), (("PYTHONPATH", path),))


def _transformers(folder: Path) -> Rig:
    import hf_train

    keys = [f"a photo of the {noun} [EOS]" for noun in hf_train.NOUNS]
    counts = [6, 6, 6, 6, 6, 18]
    ClusterTable.build(keys, range(6), counts, counts).save(folder / "clusters.parquet")
    given = ("--tokenizer", hf_train.tokenizer_of(folder / "tokenizer"), "--output_dir", folder / "out", "--use_cpu",
             "true", "--num_train_epochs", 1, "--report_to", "none", "--save_strategy", "epoch")  # fmt: skip
    return Rig(
        "transformers", (REPOSITORY / "tests/hf_train.py", *given), folder / "out", folder / "clusters.parquet", 6
    )


def _sentence_transformers(folder: Path) -> Rig:
    import st_train

    keys, counts = [f"a photo of the {noun}" for noun in st_train.NOUNS], [6, 6, 6, 6, 6, 18]
    ClusterTable.build(keys, range(6), counts, counts).save(folder / "clusters.parquet")
    script = (REPOSITORY / "tests/st_train.py", "--output", folder / "out", "--epochs", 1)
    return Rig("sentence-transformers", script, folder / "out", folder / "clusters.parquet", 6)


installed = test_third_party.installed
RIGS = ("openclip", "avion", "vast", "tiny")
LIBRARIES = {"transformers": _transformers, "sentence-transformers": _sentence_transformers}
"""Hosts that scripts of the users' own import, some seconds a run: what their own modules test is left out here."""


@pytest.fixture(params=[*RIGS, *LIBRARIES])
def any_rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param in LIBRARIES:
        for name in ("transformers", "sentence_transformers", "datasets", "accelerate"):
            pytest.importorskip(name, reason="needs the extras transformers and sentence-transformers")
        yield LIBRARIES[request.param](tmp_path)
    else:
        yield from _rig(request, tmp_path)


@pytest.fixture(params=RIGS)
def rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    yield from _rig(request, tmp_path)


def _rig(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Rig]:
    if request.param == "openclip":
        pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")
        yield _openclip(tmp_path)
    elif request.param == "tiny":
        yield _tiny(tmp_path, request.getfixturevalue("installed"))
    else:
        yield {"avion": _avion, "vast": _vast}[request.param](tmp_path)


GOOD = {
    "ablations": ("--mmts-no-schedule", "--mmts-missing", "mean"),
    "no shifts, but a table": ("--mmts-no-shifts", "--mmts-num-oscillations", "2"),
    "controls": ("--mmts-no-shifts", "--mmts-mean-matched", "--mmts-start-phase", "0.5"),
    "the other loss": ("--loss", "mmts-max-margin", "--mmts-alpha", "0.2", "--mmts-diagnostics-every", "0"),
}
BAD = {
    "typo": ("--mmts-alhpa", "1"),
    "loss": ("--loss", "mmts-infonec"),
    "guard": ("--mmts-alpha", "9"),
    "preset": ("--mmts-preset", "clip"),
    "both": ("--mmts-period", "3", "--mmts-num-oscillations", "2"),
    "no table": ("--mmts-clusters", "gone.parquet"),
    "nothing to shuffle": ("--mmts-no-shifts", "--mmts-shuffle-shifts", "1"),
    "margins draw nothing": ("--loss", "mmts-max-margin", "--mmts-itm-temperature", "mmts"),
    "another host's": ("--mmts-distribution", "noun", "--mmts-key", "id"),
}


@pytest.mark.parametrize("flags", GOOD.values(), ids=GOOD)
def test_the_preview_is_the_run(any_rig: Rig, flags: tuple[str, ...]) -> None:
    rig = any_rig
    loss = () if "--loss" in flags else ("--loss", "mmts")
    given = (*loss, "--mmts-clusters", rig.table, *flags)
    done, shown = rig.run(*given), rig.show(*given)
    if rig.name in LIBRARIES and "mmts-max-margin" in flags:
        assert done.returncode != 0
        assert last_error(done) == last_error(shown)
        return
    assert done.returncode == 0, done.stdout[-2000:]
    assert shown.returncode == 0, shown.stdout
    lines = dict(line.split(None, 1) for line in shown.stdout.splitlines() if len(line.split(None, 1)) == 2)
    record = rig.record
    assert record["total_steps"] == rig.total
    assert record["table_hash"] is not None, "the hash of a table that was given is not recorded"
    for name in ("loss", "preset", "missing", "distribution", "cluster_of", "key", "itm_temperature"):
        assert lines.get(name) == record.get(name), name
    for name in ("alpha", "shift_min", "shift_max"):
        assert float(lines[name]) == record[name]
    assert float(lines.get("start_phase", 0)) == record["start_phase"]
    for name in ("no_schedule", "no_shifts", "mean_matched"):
        assert (lines.get(name) == "yes") == record[name]
    assert done.stdout.count("MM-TS: ") >= 2, "no banner"
    assert re.search(rf"MM-TS: {record['loss']}: ", done.stdout)


@pytest.mark.parametrize("flags", BAD.values(), ids=BAD)
def test_the_preview_refuses_what_the_run_refuses(rig: Rig, flags: tuple[str, ...]) -> None:
    loss = () if "--loss" in flags else ("--loss", "mmts")
    table = () if "--mmts-clusters" in flags else ("--mmts-clusters", rig.table)
    given = (*loss, *table, *flags)
    done, shown = rig.run(*given), rig.show(*given)
    assert done.returncode != 0, done.stdout[-1000:]
    assert shown.returncode == 2, shown.stdout
    assert last_error(done) == last_error(shown)
    assert not (rig.folder / rig.written).exists()


def test_shuffled_shifts(any_rig: Rig, tmp_path: Path) -> None:
    rig = any_rig
    table = ClusterTable.load(rig.table)
    alike = ClusterTable.build(table.keys, table.cluster, np.arange(1.0, len(table) + 1), None, table.kind)
    alike.save(tmp_path / "alike.parquet")
    said = []
    for seed in ("1", "2"):
        done = rig.run("--loss", "mmts", "--mmts-clusters", tmp_path / "alike.parquet", "--mmts-shuffle-shifts", seed)
        assert done.returncode == 0, done.stdout[-2000:]
        assert f", shuffled (seed {seed}); mean" in done.stdout
        assert rig.record["shuffle_shifts"] == int(seed)
        assert rig.record["table_hash"] == alike.content_hash
        said.append(rig.results())
    assert said[0] != said[1]


def last_error(done: Done) -> str:
    line = done.stdout.splitlines()[-1]
    assert line.startswith("mmts: error: "), done.stdout[-2000:]
    return line


def test_a_run_that_goes_on_compares(rig: Rig) -> None:
    if rig.again is None:
        pytest.skip(f"{rig.name} does not resume")
    given = ("--loss", "mmts", "--mmts-clusters", rig.table)
    assert rig.run(*given, "--mmts-alpha", "0.03").returncode == 0
    again = rig.run(*given, *rig.again, "--mmts-alpha", "0.02")
    assert again.returncode != 0, again.stdout[-2000:]
    assert "alpha was 0.03 and is 0.02" in last_error(again)


def test_without_our_flags_the_host_is_its_own(rig: Rig) -> None:
    assert rig.run(launcher=(), MMTS="0").returncode == 0
    plain = rig.results()
    assert len(plain) > 0
    assert rig.run().returncode == 0
    armed = rig.results()
    assert armed == plain
    assert rig.run("--loss", "mmts", "--mmts-no-shifts").returncode == 0
    ours = rig.results()
    assert {name: ours.get(name) for name in plain} != plain, "nothing that our loss changes was compared"


@pytest.mark.parametrize(("missing", "expected"), [("tail", 0), ("mean", None), ("error", "stops")])
def test_samples_that_the_table_lacks(any_rig: Rig, missing: str, expected: object, tmp_path: Path) -> None:
    rig = any_rig
    table = ClusterTable.load(rig.table)
    keep = np.arange(len(table)) != int(np.argmin(table.count))
    few = ClusterTable.build(
        [key for key, kept in zip(table.keys.to_pylist(), keep) if kept],
        table.cluster[keep],
        table.frequency[keep],
        table.count[keep],
    )
    few.save(tmp_path / "few.parquet")
    done = rig.run("--loss", "mmts", "--mmts-clusters", tmp_path / "few.parquet", "--mmts-missing", missing)
    if expected == "stops":
        assert done.returncode != 0
        assert "--mmts-missing error" in last_error(done)
    else:
        assert done.returncode == 0, done.stdout[-2000:]
        assert f"they get the {missing} shift (--mmts-missing)" in done.stdout


# -- of the contract itself --------------------------------------------------------------------------------------------


class Plain(Adapter):
    name, title, loss = "plain", "Plain", "mmts-infonce"
    default_presets = {"mmts-infonce": "clip-cc3m", "mmts-max-margin": "avion-max-margin"}  # noqa: RUF012


def session(folder: Path, *flags: str, rank: int = 0, ranks: int = 1, **more: object) -> Session:
    given, _ = split_flags(["--loss", "mmts", "--mmts-no-shifts", *flags])
    facts = Facts(10, torch.device("cpu"), folder=folder, rank=rank, world_size=ranks, **more)
    return Session(Plain(), Plain().resolve(given), facts)


def of_two_ranks(rank: int, world_size: int, folder: str, field: str) -> str:
    flags = {"alpha": ("--mmts-alpha", f"0.0{rank + 1}"), "missing": ("--mmts-missing", ("tail", "mean")[rank])}
    try:
        session(Path(folder), *flags[field], rank=rank, ranks=world_size)
    except ConfigError as error:
        return str(error)
    return "started"


@pytest.mark.parametrize("field", ["alpha", "missing"])
def test_ranks_that_differ_stop_on_every_rank(field: str, tmp_path: Path) -> None:
    said = on_ranks(2, of_two_ranks, str(tmp_path), field)
    assert len(said) == 2
    assert said[0] == said[1]
    assert said[0].startswith(f"ranks 0 and 1 differ in {field}: ")


def test_a_step_has_its_clock_and_its_loss(tmp_path: Path) -> None:
    features = torch.nn.functional.normalize(torch.randn(4, 3), dim=1)
    run = session(tmp_path)
    with pytest.raises(SeamError, match="no clock"):
        run.loss(features, features, run.temperatures(["a"] * 4))
    run = session(tmp_path)
    run.at_step(0)
    run.at_step(0)
    with pytest.raises(SeamError, match="step 0 went by without the MM-TS loss"):
        run.at_step(1)
    run = session(tmp_path)
    run.losses_per_step = 1
    for step in range(2):
        run.at_step(step)
        assert float(run.loss(features, features, run.temperatures(["a"] * 4))) > 0
    with pytest.raises(SeamError, match="no clock"):
        run.loss(features, features, run.temperatures(["a"] * 4))


def test_without_shifts_nothing_is_looked_up_nor_judged(tmp_path: Path) -> None:
    """The table is recorded; that it knows none of the samples does not matter."""
    ClusterTable.build(["a", "b"], [0, 1], [3, 4]).save(tmp_path / "t.parquet")
    run = session(tmp_path, "--mmts-clusters", str(tmp_path / "t.parquet"), "--mmts-missing", "error")
    assert run.table is not None
    assert run.index is None
    run.judge_batches("training captions")
    run.at_step(0)
    assert run.temperatures(["nobody's"] * 3).tolist() == pytest.approx([0.075 + 0.02] * 3)
    run.judge_now()


def test_a_run_needs_a_step(tmp_path: Path) -> None:
    given, _ = split_flags(["--loss", "mmts", "--mmts-no-shifts"])
    with pytest.raises(ConfigError, match="the run has no optimizer step: take more data"):
        Session(Plain(), Plain().resolve(given), Facts(0, torch.device("cpu"), longer="take more data"))


def test_records_of_every_host_have_the_same_fields() -> None:
    fields = set()
    for adapter in adapters():
        config = adapter.resolve({"loss": "mmts", "mmts_no_shifts": True}).config
        fields.add(tuple(record(config, 10, None, adapter.title, "1")))
    assert len(fields) == 1
    assert {"distribution", "cluster_of", "key", "itm_temperature", "diagnostics_every"} < set(fields.pop())


@pytest.mark.parametrize("name", ["openclip", "avion", "avion-pretraining", "vast", "gram"])
def test_large_tables_are_not_loaded_and_give_the_same_shifts(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = [f"caption {i}" for i in range(300)]
    ClusterTable.build(keys, [i % 7 for i in range(300)], [float(1 + i % 7) for i in range(300)]).save(tmp_path / "t")
    flags, _ = split_flags(["--loss", "mmts", "--mmts-clusters", str(tmp_path / "t")])
    held = adapter_of(name).resolve(flags).table
    assert isinstance(held, ClusterTable)
    monkeypatch.setattr(streamed, "LARGE_FROM", 100)
    seen = adapter_of(name).resolve(flags).table
    assert isinstance(seen, LargeTable)
    assert seen.content_hash == held.content_hash
    found, mapped = KeyLookup(held), KeyLookup(seen)
    wanted = [*keys[::17], "another", ""]
    np.testing.assert_array_equal(
        np.append(found.frequencies, np.nan)[found(wanted)], np.append(mapped.frequencies, np.nan)[mapped(wanted)]
    )
    assert (mapped(wanted)[-2:] == mapped.missing).all()


def test_an_old_record_without_the_tables_hash_goes_on(tmp_path: Path) -> None:
    """Under ``--mmts-no-shifts`` some hosts did not record the hash of a table that was given; it moves nothing."""
    flags, _ = split_flags(["--loss", "mmts", "--mmts-no-shifts"])
    config = Plain().resolve(flags).config
    write_record(tmp_path / "mmts.yaml", record(config, 10, None, "Plain", ""))
    check_resume(tmp_path / "mmts.yaml", record(config, 10, "1" * 32, "Plain", ""), allow_change=False)
    shifted = Config.of({**config.values, "no_shifts": False})
    write_record(tmp_path / "mmts.yaml", record(shifted, 10, None, "Plain", ""))
    with pytest.raises(ConfigError, match="table_hash was None"):
        check_resume(tmp_path / "mmts.yaml", record(shifted, 10, "1" * 32, "Plain", ""), allow_change=False)


def test_names_of_before_still_work() -> None:
    from mmts_plugins import presets, registry
    from mmts_plugins.losses import InfoNCELoss, MaxMarginLoss

    assert presets.presets() == presets.PRESETS
    assert registry.hosts() == hosts()
    assert {InfoNCELoss.__name__, MaxMarginLoss.__name__} == {"InfoNCELoss", "MaxMarginLoss"}


def test_every_adapter_is_filled_in() -> None:
    seen: dict[str, str] = {}
    common = of_options(COMMON)
    for adapter in adapters():
        adapter.check_fields()
        assert re.fullmatch(r"[a-z][a-z-]*", adapter.name)
        assert adapter.name not in seen
        seen[adapter.name] = adapter.title
        for option in adapter.options:
            assert option.name not in common
        for loss in ("mmts-infonce", "mmts-max-margin"):
            if (
                adapter.name not in ("gram", "lightning", "transformers", "sentence-transformers")
                or loss == "mmts-infonce"
            ):
                config = adapter.resolve({"loss": loss, "mmts_no_shifts": True}).config
                assert config.preset is not None
    assert {*("openclip", "avion", "avion-pretraining", "vast", "gram", "lightning", "transformers"),
            "sentence-transformers"} == set(seen)  # fmt: skip


def test_a_table_of_classes_is_refused_where_samples_have_captions(tmp_path: Path) -> None:
    ClusterTable.build(["1", "2"], [0, 1], [3, 4], kind="class").save(tmp_path / "classes.parquet")
    assert ClusterTable.load(tmp_path / "classes.parquet").kind != CAPTION
    flags, _ = split_flags(["--loss", "mmts", "--mmts-clusters", str(tmp_path / "classes.parquet")])
    for name in ("openclip", "vast", "gram", "avion-pretraining", "transformers", "sentence-transformers"):
        with pytest.raises(TableError, match="a table of class"):
            adapter_of(name).resolve(flags)


# -- the stand-ins are what they stand for -----------------------------------------------------------------------------

CHECKOUTS = {"AVION": ("AVION_ROOT", test_avion.STAND_IN), "VAST": ("VAST_ROOT", test_vast.STAND_IN)}


@pytest.mark.parametrize("host", CHECKOUTS)
def test_stand_ins_have_the_signatures_of_the_real_ones(host: str) -> None:
    variable, stand_in = CHECKOUTS[host]
    if variable not in os.environ:
        pytest.skip(f"set {variable} to a checkout of {host}")
    (known,) = (each for each in hosts() if each.name == host)
    compared = 0
    for seam in known.seams:
        parameters = []
        for root in (Path(os.environ[variable]), stand_in):
            path = root / (seam.module.replace(".", "/") + ".py")
            parameters.append(_parameters(path, seam.attribute) if path.exists() else None)
        if None not in parameters:
            compared += 1
            missing = [name for name in seam.parameters if name not in parameters[0]]
            assert not missing, f"{seam} of the real {host} has no {missing}"
            assert [name for name in parameters[0] if name in seam.parameters] == [
                name for name in parameters[1] if name in seam.parameters
            ]
    assert compared >= 4


def _parameters(path: Path, attribute: str) -> Optional[list[str]]:
    """Of a function or method, from its source: the real hosts need more to be imported than to be read."""
    body = ast.parse(path.read_text()).body
    found = None
    for name in attribute.split("."):
        found = next((each for each in body if getattr(each, "name", None) == name), None)
        if found is None:
            return None
        body = found.body
    return [each.arg for each in found.args.args + found.args.kwonlyargs]
