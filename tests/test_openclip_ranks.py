"""The real OpenCLIP trainer on two gloo ranks, under torchrun where that may matter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import reference
import torch
from conftest import REPOSITORY, SIGLIP, openclip_flags, run_python, write_model
from forked import run_forked

pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")

TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
# No random crop: then an epoch's batches depend on the epoch alone, and a resumed run can be compared to the bit.
PLAIN_CROP = {"aug_cfg": ["scale=(1.0, 1.0)", "ratio=(1.0, 1.0)"]}


def flags(model, data, logs, **changes) -> list[str]:
    given = {
        "train_data": data.csv,
        "dataset_type": "csv",
        "loss": "mmts",
        "mmts_clusters": data.table,
        "batch_size": 6,
    }
    return openclip_flags(model, logs, **{**given, **PLAIN_CROP, **changes})


def recorded(target: Path, arguments: list[str], expect: int = 0, **environment: str) -> list[dict[str, np.ndarray]]:
    script = REPOSITORY / "tests" / "recorded_openclip.py"
    done = run_forked(script, target, *arguments, ranks=2, armed=True, **environment)
    assert (done.returncode == 0) == (expect == 0), done.stdout[-3000:]
    return [dict(np.load(f"{target}-{rank}.npz")) for rank in range(2)]


def check(ranks, local: bool, total: int, data) -> None:
    frequency = pq.read_table(data.table)["frequency"].to_pylist()
    known = {f: reference.temperature([f], frequency, 0, 0.05, 0.10, 0, 1)[0] for f in frequency}
    for call in range(len(ranks[0]["loss"])):
        images, texts, tau = (
            torch.from_numpy(np.concatenate([rank[name][call] for rank in ranks]))
            for name in ("image", "text", "temperature")
        )
        step = int(ranks[0]["step"][call])
        base = 0.02 * np.cos(2 * np.pi * step / (total / 5))
        assert all(min(abs(t - base - shift) for shift in known.values()) < 1e-9 for t in tau.tolist())
        n = len(images) // 2
        for rank in range(2):
            rows = slice(rank * n, (rank + 1) * n)
            if local:
                expected = (
                    reference.info_nce_rows(images[rows], texts, tau[rows], rank * n).mean()
                    + reference.info_nce_rows(texts[rows], images, tau[rows], rank * n).mean()
                ) / 2
            else:
                expected = reference.info_nce(images, texts, tau)
            assert ranks[rank]["loss"][call] == pytest.approx(float(expected), rel=1e-6)


@pytest.mark.parametrize(
    "options",
    [{}, {"local_loss": True, "gather_with_grad": True}, {"accum_freq": 2, "gather_with_grad": True}],
    ids=["plain", "local-with-grad", "accumulated"],
)
def test_every_step_equals_the_reference(options, small_model, data, tmp_path):
    ranks = recorded(tmp_path / "run", flags(small_model, data, tmp_path / "logs", **options))
    accumulated = options.get("accum_freq", 1)
    total = 2 * (4 // accumulated)
    assert ranks[0]["step"].tolist() == [step for step in range(total) for _ in range(accumulated)]
    assert ranks[0]["image"].shape[1] == 6 * accumulated
    check(ranks, bool(options.get("local_loss")), total, data)


def test_an_architecture_of_siglips(data, tmp_path):
    """Its bias is no part of a softmax, and DDP wants a gradient for it all the same."""
    model = write_model(tmp_path / "siglip", **SIGLIP)
    ranks = recorded(tmp_path / "run", flags(model, data, tmp_path / "logs", epochs=1))
    check(ranks, local=False, total=4, data=data)
    assert len(ranks[0]["loss"]) == 4


def on_spheres(ranks, m: int) -> None:
    """Every feature of every call has ``m`` parts, each of length ``1 / sqrt(m)``."""
    for name in ("image", "text"):
        features = np.stack([rank[name] for rank in ranks])
        lengths = np.linalg.norm(features.reshape(*features.shape[:-1], m, -1), axis=-1)
        np.testing.assert_allclose(lengths, m**-0.5, atol=1e-6)


def test_class_tokens_on_two_ranks(small_model, data, tmp_path):
    """Equal to the reference; both ranks end alike; killed and resumed equals uninterrupted; MM-TS or not."""
    ours = {"mmts_product_sphere": "4,4", "mmts_class_tokens": True, "gather_with_grad": True}
    whole = recorded(tmp_path / "whole", flags(small_model, data, tmp_path / "a", **ours))
    check(whole, local=False, total=8, data=data)
    on_spheres(whole, 4)
    arguments = flags(small_model, data, tmp_path / "b", **ours)
    recorded(tmp_path / "first", arguments, expect=9, TEST_DIE_BEFORE_EPOCH="1")
    recorded(tmp_path / "second", [*arguments, "--resume", "latest"])
    states = [torch.load(tmp_path / f"{name}/run/checkpoints/epoch_2.pt", weights_only=True) for name in "ab"]
    one, other = (state["state_dict"] for state in states)
    assert one["module.mmts_product_sphere"].tolist() == [4, 4, 0]
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    # without a loss of ours, and resumed by one process without a flag
    plain = flags(small_model, data, tmp_path / "c", **ours, loss=None, mmts_clusters=None)
    script = REPOSITORY / "tests" / "recorded_openclip.py"
    done = run_forked(script, tmp_path / "plain", *plain, ranks=2, armed=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("MM-TS: features on Multi(4, 4)") == 1
    given = {"loss": None, "mmts_clusters": None, "epochs": 3, "name": "one"}
    resume = ["--resume", str(tmp_path / "c/run/checkpoints/epoch_2.pt")]
    arguments = flags(small_model, data, tmp_path / "c", **given)
    done = run_forked(script, tmp_path / "one", *arguments, *resume, armed=True)
    assert done.returncode == 0, done.stdout[-3000:]
    assert "MM-TS: features on Multi(4, 4), as the checkpoint says" in done.stdout


def test_killed_and_resumed_equals_uninterrupted(small_model, data, tmp_path):
    whole = recorded(tmp_path / "whole", flags(small_model, data, tmp_path / "a"))
    arguments = flags(small_model, data, tmp_path / "b")
    first = recorded(tmp_path / "first", arguments, expect=9, TEST_DIE_BEFORE_EPOCH="1")
    second = recorded(tmp_path / "second", [*arguments, "--resume", "latest"])
    for rank in range(2):
        assert first[rank]["step"].tolist() + second[rank]["step"].tolist() == list(range(8))
        losses = np.concatenate([first[rank]["loss"], second[rank]["loss"]])
        np.testing.assert_array_equal(losses, whole[rank]["loss"])


def test_started_as_the_readme_says_one_rank_logs(small_model, data, tmp_path):
    shim = str(REPOSITORY / "tests" / "shim")
    arguments = flags(small_model, data, tmp_path, epochs=1)
    done = run_python(*TORCHRUN, "-m", "--", "open_clip_train.main", *arguments, PYTHONPATH=shim)
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.count("MM-TS step ") == 4
    assert done.stdout.count("MM-TS: mmts-infonce: alpha 0.04 over 4 steps") == 1


def test_ranks_with_different_tables_stop(small_model, data, tmp_path):
    from mmts_plugins.tables import ClusterTable

    table = ClusterTable.load(data.table)
    for rank in range(2):
        folder = tmp_path / str(rank)
        folder.mkdir()
        ClusterTable.build(table.keys, table.cluster, table.frequency + rank).save(folder / "t.parquet")
    chooser = tmp_path / "train.py"
    chooser.write_text(
        "import os, runpy, sys, sitecustomize\n"
        "sys.argv = [a.replace('RANK', os.environ['RANK']) for a in sys.argv]\n"
        "runpy.run_module('open_clip_train.main', run_name='__main__', alter_sys=True)\n"
    )
    arguments = flags(small_model, data, tmp_path / "logs", mmts_clusters=f"{tmp_path}/RANK/t.parquet")
    done = run_python(*TORCHRUN, "--", chooser, *arguments, PYTHONPATH=str(REPOSITORY / "tests" / "shim"))
    assert done.returncode != 0
    assert "mmts: error: ranks 0 and 1 differ in table_hash" in done.stdout
    assert not list(tmp_path.rglob("mmts.yaml"))
    assert not list(tmp_path.rglob("*.pt"))
