"""sentence-transformers' own trainer: every micro-step's loss against one written out in float64.

In a script that does not know of us, and through ``mmts_plugins.enable``.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import REPOSITORY, host_folders, run_python
from forked import HUGGING_FACE, preload, run_forked

pytest.importorskip("sentence_transformers", reason="needs the extra: pip install 'mmts-plugins[cluster]'")
pytest.importorskip("datasets", reason="needs: pip install 'sentence-transformers[train]'")
pytest.importorskip("accelerate", reason="needs: pip install 'sentence-transformers[train]'")

import st_train
import transformers
from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer, SentenceTransformerTrainingArguments
from sentence_transformers import losses as losses_of

import mmts_plugins
from mmts_plugins.adapters.sentence_transformers import by_row
from mmts_plugins.adapters.trainer import captions
from mmts_plugins.errors import ConfigError, TableError
from mmts_plugins.tables import ClusterTable

preload(*HUGGING_FACE)
SCRIPT = REPOSITORY / "tests" / "st_train.py"
DRIVER = REPOSITORY / "tests" / "recorded_st.py"
COUNT = {noun: 18 if noun == "tree" else 6 for noun in st_train.NOUNS}


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("st") / "t.parquet"
    counts = list(COUNT.values())
    ClusterTable.build([f"a photo of the {noun}" for noun in COUNT], range(6), counts, counts).save(path)
    return path


def trained(folder: Path, *words: object, expect: int = 0, fresh: bool = False, ranks: int = 0,
            before: tuple[object, ...] = (), **environment: str) -> str:  # fmt: skip
    command = (*before, SCRIPT, "--output", folder, *words)
    if fresh:
        done = run_python(*command, **environment)
    else:
        done = run_forked(*command, ranks=ranks, armed=True, **environment)
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


def losses(out: str) -> list[float]:
    found = re.search(r"LOSS \[(.*)\]", out)[1]
    return [float(value) for value in found.split(",")]


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    return torch.load(folder / f"final-{rank}.pt", weights_only=True)


def temperature(nouns: list[str], step: int, total: int) -> torch.Tensor:
    shift = [0.05 + (COUNT[noun] - 6) / 12 * 0.05 for noun in nouns]
    return torch.tensor(shift, dtype=torch.float64) + 0.02 * np.cos(2 * np.pi * step / (total / 5))


def trainer_of(folder: Path, loss: Any = None, dataset: Any = None, **settings: Any) -> SentenceTransformerTrainer:
    model = st_train.model_of()
    given = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "learning_rate": 1e-2, "use_cpu": True}
    given |= {"logging_steps": 1, "report_to": ["none"], "disable_tqdm": True, "save_strategy": "no", **settings}
    args = SentenceTransformerTrainingArguments(output_dir=str(folder), **given)
    loss = losses_of.MultipleNegativesRankingLoss(model) if loss is None else loss(model)
    return SentenceTransformerTrainer(model=model, args=args, train_dataset=dataset or st_train.rows(), loss=loss)


CASES = {
    "pairs": ({}, {}, False),
    "hard negatives": ({}, {}, True),
    "accumulated by 2": ({}, {"gradient_accumulation_steps": 2}, False),
    "accumulated by 3": ({}, {"gradient_accumulation_steps": 3}, False),
    "bf16": ({}, {"bf16": True}, False),
    "both ways": ({"directions": ("query_to_doc", "doc_to_query"), "partition_mode": "per_direction"}, {}, False),
    "all directions": (
        {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")}, {}, False),
}  # fmt: skip


def expected(embeddings: list[torch.Tensor], tau: torch.Tensor, options: dict[str, Any]) -> float:
    queries, *docs = (F.normalize(each.double(), dim=1) for each in embeddings)
    n, own = len(queries), torch.arange(len(queries))
    every, column = torch.cat(docs), tau[:, None]
    mask = torch.zeros(n, n, dtype=torch.float64).masked_fill(torch.eye(n, dtype=torch.bool), -torch.inf)
    parts = {
        "query_to_doc": queries @ every.T / column,
        "query_to_query": queries @ queries.T / column + mask,
        "doc_to_query": docs[0] @ queries.T / column,
        "doc_to_doc": docs[0] @ every.T / column + mask.repeat(1, len(docs)),
    }
    chosen = [parts[name] for name in options.get("directions", ("query_to_doc",))]
    positive = parts["query_to_doc"][own, own]
    if options.get("partition_mode", "joint") == "joint":
        return float((torch.cat(chosen, 1).logsumexp(1) - positive).mean())
    return float((sum(each.logsumexp(1) for each in chosen) / len(chosen) - positive).mean())


@pytest.mark.parametrize(("options", "settings", "negatives"), CASES.values(), ids=CASES)
def test_every_micro_step_equals_float64(options, settings, negatives, table, tmp_path, monkeypatch):
    kind = losses_of.MultipleNegativesRankingLoss
    if not hasattr(kind, "compute_loss_from_embeddings"):
        pytest.skip("a sentence-transformers of before 5.3 has no embeddings to record")
    calls: list[tuple[list[torch.Tensor], float, Any]] = []
    compute = kind.compute_loss_from_embeddings

    def recording(loss: Any, embeddings: list[torch.Tensor], labels: Any) -> torch.Tensor:
        value = compute(loss, embeddings, labels)
        calls.append(([each.detach() for each in embeddings], float(value.detach()), loss.scale))
        return value

    monkeypatch.setattr(kind, "compute_loss_from_embeddings", recording)
    trainer = trainer_of(tmp_path, lambda model: kind(model, **options), st_train.rows(negatives), **settings)
    mmts_plugins.enable(trainer, table)
    seen = []
    step = type(trainer).training_step

    def watching(self: Any, model: Any, inputs: Any, *rest: Any) -> Any:
        seen.append((self.state.global_step, inputs["mmts_samples"].clone()))
        return step(self, model, inputs, *rest)

    monkeypatch.setattr(type(trainer), "training_step", watching)
    trainer.train()
    accumulation = settings.get("gradient_accumulation_steps", 1)
    total = 12 // accumulation
    assert [at for at, _ in seen] == [at for at in range(total) for _ in range(accumulation)]
    assert len(calls) == 12
    for (embeddings, value, scale), (at, samples) in zip(calls, seen):
        texts = [bytes(sample[1:].tolist()).rstrip(b"\0").decode() for sample in samples]
        tau = temperature([text.rsplit(" ", 1)[1] for text in texts], at, total)
        torch.testing.assert_close(1 / scale.double()[:, 0], tau, rtol=1e-6, atol=0)
        assert value == pytest.approx(expected(embeddings, tau, options), rel=2e-2 if "bf16" in settings else 1e-6)
    assert trainer.loss.scale == 20.0
    assert "get_train_dataloader" not in trainer.__dict__
    logged = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logged) == total
    assert all(each["mmts/hit_rate"] == 1 for each in logged)
    record = yaml.safe_load((tmp_path / "mmts.yaml").read_text())
    assert (record["host"], record["total_steps"], record["loss"]) == ("sentence-transformers", total, "mmts-infonce")
    lines = (tmp_path / "mmts.jsonl").read_text().splitlines()
    assert len(lines) == total


KINDS = [
    "CachedMultipleNegativesRankingLoss",
    "GISTEmbedLoss",
    "CachedGISTEmbedLoss",
    "MultipleNegativesRankingLoss:matryoshka",
]


def bert(folder: Path) -> SentenceTransformer:
    """A transformer as small as there is: some losses take no static model."""
    folder.mkdir()
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *st_train.WORDS[1:]]
    (folder / "vocab.txt").write_text("\n".join(words))
    tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    shape = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    torch.manual_seed(0)
    config = transformers.BertConfig(vocab_size=len(words), hidden_dropout_prob=0.0, **shape)
    transformers.BertModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return SentenceTransformer(str(folder), device="cpu")


@pytest.mark.parametrize("kind", KINDS)
def test_a_constant_column_is_the_scalar_and_attributes_come_back(kind, tmp_path):
    """Of every loss that is known, whatever wraps it."""
    name, wrapped = kind.split(":")[0], ":" in kind
    model = bert(tmp_path / "bert").eval()
    make = getattr(losses_of, name)
    arguments = (bert(tmp_path / "guide").eval(),) if "GIST" in name else ()
    loss = make(model, *arguments, **({"mini_batch_size": 3} if name.startswith("Cached") else {}))
    inner = loss
    if wrapped:
        loss = losses_of.MatryoshkaLoss(model, loss, matryoshka_dims=[16, 8])
    texts = [st_train.rows()[name][:8] for name in ("caption", "sentence")]
    tokenize = getattr(model, "preprocess", None) or model.tokenize

    def value() -> float:
        found = loss([tokenize(list(each)) for each in texts], torch.zeros(8))
        return float(sum(found.values()) if isinstance(found, dict) else found)

    scalar = inner.temperature if "GIST" in name else 1 / inner.scale
    before, attributes = value(), [dict(module.__dict__) for module in loss.modules()]
    with by_row(loss, torch.full((8,), scalar, dtype=torch.float64)):
        assert value() == pytest.approx(before, rel=1e-6)
    with by_row(loss, torch.full((8,), 3 * scalar, dtype=torch.float64)):
        assert value() != pytest.approx(before, rel=1e-3)
    with pytest.raises(RuntimeError, match="stumbles"), by_row(loss, torch.ones(8)):
        raise RuntimeError("stumbles")
    assert value() == pytest.approx(before, rel=1e-6)
    for module, was in zip(loss.modules(), attributes):
        assert module.__dict__.keys() == was.keys()
        assert all(module.__dict__[name] is value for name, value in was.items() if not name.startswith("_"))


def test_an_unmodified_script_and_a_run_that_does_not_ask(table, tmp_path):
    plain = trained(tmp_path / "plain", MMTS="0", fresh=True)
    armed = trained(tmp_path / "armed", MMTS="1", fresh=True)
    ours = trained(tmp_path / "ours", "--loss", "mmts", "--mmts-clusters", table, fresh=True)
    assert losses(plain) == losses(armed)
    assert len(losses(plain)) == len(losses(ours)) == 12
    assert losses(ours) != losses(plain)
    one, other = weights(tmp_path / "plain"), weights(tmp_path / "armed")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert "MM-TS: mmts-infonce: alpha 0.04 over 12 steps" in ours
    assert "'mmts/tau_mean'" in ours
    card = next((tmp_path / "ours").glob("checkpoint-*/README.md")).read_text()
    assert "- `mmts`: mmts-infonce: alpha 0.04 over 12 steps" in card
    assert "MM-TS" not in armed
    launched = trained(tmp_path / "run", "--loss", "mmts", "--mmts-clusters", table, "--workers", 2,
                       before=("-m", "mmts_plugins", "run"), MMTS="0", fresh=True)  # fmt: skip
    assert losses(launched) == losses(ours), "loaders in processes of their own"


def test_resumed_equals_uninterrupted_and_other_settings_are_refused(table, tmp_path):
    given = ("--loss", "mmts", "--mmts-clusters", table)
    whole = losses(trained(tmp_path / "a", *given))
    checkpoint = tmp_path / "a" / "checkpoint-6"
    out = trained(tmp_path / "a", *given, "--resume", checkpoint)
    assert losses(out)[-6:] == whole[-6:]
    refused = trained(tmp_path / "a", *given, "--resume", checkpoint, "--mmts-alpha", "0.02", expect=1)
    assert refused.splitlines()[-1].startswith("mmts: error: ")
    assert "alpha was 0.04 and is 0.02" in refused


@pytest.mark.parametrize("accumulation", [1, 2])
def test_two_ranks_end_alike(accumulation, table, tmp_path):
    given = ("--loss", "mmts", "--mmts-clusters", table, "--accumulation", accumulation)
    out = trained(tmp_path / "two", *given, ranks=2)
    assert out.count("MM-TS: mmts-infonce: alpha 0.04") == 1
    one, other = weights(tmp_path / "two"), weights(tmp_path / "two", 1)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert len((tmp_path / "two" / "mmts.jsonl").read_text().splitlines()) == (6 if accumulation == 1 else 4)


@pytest.mark.parametrize("old", host_folders("sentence-transformers"), ids=lambda folder: folder.name)
def test_an_older_version_equals_float64_and_resumes(old, table, tmp_path):
    older = {"PYTHONPATH": str(old), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    given = ("--loss", "mmts", "--mmts-clusters", table, "--accumulation", 2)
    out = run_python(DRIVER, tmp_path / "record", "--output", tmp_path / "a", *given, **older)
    assert out.returncode == 0, out.stdout[-3000:]
    record = dict(np.load(tmp_path / "record-0.npz"))
    assert record["step"].tolist() == [step for step in range(6) for _ in range(2)]
    for call, step in enumerate(record["step"].tolist()):
        nouns = [st_train.NOUNS[noun] for noun in record["noun"][call]]
        embeddings = [torch.from_numpy(each) for each in (record["anchor"][call], record["positive"][call])]
        assert record["loss"][call] == pytest.approx(expected(embeddings, temperature(nouns, step, 6), {}), rel=1e-6)
    assert f"host_version: {old.name.rpartition('-')[2]}" in (tmp_path / "a/mmts.yaml").read_text()
    again = trained(tmp_path / "a", *given, "--resume", tmp_path / "a/checkpoint-3", fresh=True, **older)
    base = [re.findall(r"'mmts/tau_base': '?([-\d.e]+)", text) for text in (out.stdout, again)]
    assert len(base[0]) == 6
    assert base[1] == base[0][3:]
    if not old.name.endswith("-3.4.1"):  # which by itself, without us, resumes with other batches
        assert losses(again)[-3:] == losses(out.stdout)[-3:]


def test_accelerate_launch(table, tmp_path):
    """Its way of starting several processes without MPI; the script says that they are on the CPU."""
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    out = trained(tmp_path, "--loss", "mmts", "--mmts-clusters", table, before=launch, fresh=True)
    assert out.count("MM-TS: mmts-infonce: alpha 0.04 over 6 steps") == 1
    assert len(losses(out)) == 6
    one, other = weights(tmp_path), weights(tmp_path, 1)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_two_ranks_that_gather_equal_float64(table, tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "--")
    given = ("--output", tmp_path / "a", "--loss", "mmts", "--mmts-clusters", table, "--gather")
    done = run_python(*torchrun, DRIVER, tmp_path / "record", *given)
    assert done.returncode == 0, done.stdout[-3000:]
    ranks = [dict(np.load(tmp_path / f"record-{rank}.npz")) for rank in range(2)]
    assert ranks[0]["step"].tolist() == list(range(6))
    for step in range(6):
        every = F.normalize(torch.from_numpy(np.concatenate([rank["positive"][step] for rank in ranks])), dim=1)
        for number, rank in enumerate(ranks):
            tau = temperature([st_train.NOUNS[noun] for noun in rank["noun"][step]], step, 6)
            scores = F.normalize(torch.from_numpy(rank["anchor"][step]), dim=1) @ every.T / tau[:, None]
            loss = float(F.cross_entropy(scores, torch.arange(8) + 8 * number))
            assert rank["loss"][step] == pytest.approx(loss, rel=1e-6)
    one, other = weights(tmp_path / "a"), weights(tmp_path / "a", 1)
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_two_trainings_in_one_process(table, tmp_path):
    """As Optuna trains: each call of train() is a run of its own."""
    for name in ("one", "two"):
        trainer = trainer_of(tmp_path / name, num_train_epochs=1)
        mmts_plugins.enable(trainer, table, alpha=0.02)
        for _ in range(2):
            trainer.train()
        assert len((tmp_path / name / "mmts.jsonl").read_text().splitlines()) == 12
        assert trainer.loss.scale == 20.0


def test_several_data_sets(table, tmp_path):
    from datasets import DatasetDict

    data = DatasetDict({"one": st_train.rows(), "two": st_train.rows()})
    trainer = trainer_of(tmp_path, dataset=data, num_train_epochs=1)
    loss = losses_of.MultipleNegativesRankingLoss(trainer.model)
    trainer = SentenceTransformerTrainer(
        model=trainer.model, args=trainer.args, train_dataset=data, loss={"one": loss, "two": loss}
    )
    mmts_plugins.enable(trainer, table)
    trainer.train()
    assert len([each for each in trainer.state.log_history if "mmts/tau_mean" in each]) == 12
    assert loss.scale == 20.0
    counts = [10, 2, 2, 2, 2, 2]
    keys = [f"a photo of the {noun}" for noun in st_train.NOUNS]
    ClusterTable.build(keys, range(6), counts, counts).save(tmp_path / "two.parquet")
    mmts_plugins.enable(trainer, {"one": table, "two": tmp_path / "two.parquet"}, alpha=0.0)
    trainer.state.log_history.clear()
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    assert len(logged) == 12
    first, second = ([each[f"mmts/{name}/tau_mean"] for each in logged if f"mmts/{name}/tau_mean" in each]
                     for name in ("one", "two"))  # fmt: skip
    # Each is reported for the steps since its last report; a tree is common in the first table, a dog in the second.
    assert np.mean(first) == pytest.approx(0.05 + 0.05 * 18 / 48, abs=1e-6)
    assert np.mean(second) == pytest.approx(0.05 + 0.05 * 6 / 48, abs=1e-6)
    assert len(first) == len(second) == 6
    assert sorted(path.name for path in tmp_path.glob("mmts-*/mmts.yaml")) == ["mmts.yaml"] * 2
    card = trainer.model.model_card_data.non_default_hyperparameters
    assert card["mmts (two)"].startswith("mmts-infonce: alpha 0 over 12 steps")
    mmts_plugins.enable(trainer, {"one": table})
    with pytest.raises(ConfigError, match="the data set 'two', for which there is no table; tables were given for one"):
        trainer.train()
    with pytest.raises(ConfigError, match="needs a trainer with a dict of data sets"):
        mmts_plugins.enable(trainer_of(tmp_path), {"one": table})


def test_another_column_and_a_table_that_does_not_fit(table, tmp_path):
    trainer = trainer_of(tmp_path / "a")
    mmts_plugins.enable(trainer, table, column="sentence")
    with pytest.raises(TableError, match=r"\(0% found\), for example .*seen today") as caught:
        trainer.train()
    assert trainer.loss.scale == 20.0
    assert "\n" not in str(caught.value)
    trainer = trainer_of(tmp_path / "b")
    mmts_plugins.enable(trainer, table, column="title")
    with pytest.raises(ConfigError, match="column 'title' holds no text"):
        trainer.train()
    assert captions([{"label": "x", "a": "b"}], None) == ["b"]


def test_what_is_refused(table, tmp_path):
    trainer = trainer_of(tmp_path, losses_of.CoSENTLoss)
    with pytest.raises(ConfigError, match="CoSENTLoss has no temperature by row"):
        mmts_plugins.enable(trainer, table)
    with pytest.raises(ConfigError, match="scales similarities by row; use --loss mmts-infonce"):
        mmts_plugins.enable(trainer_of(tmp_path), table, loss="mmts-max-margin")
    with pytest.raises(ConfigError, match="object is no trainer that a host here knows"):
        mmts_plugins.enable(object(), table)
    other = tmp_path / "other.py"
    other.write_text("print('trained')")
    done = run_python("-m", "mmts_plugins", "run", other, "--loss", "mmts", "--mmts-no-shifts")
    assert done.returncode == 2
    assert "no adapter for" in done.stdout
    assert sys.modules["sentence_transformers"] is not None


def test_a_schedule_alone(tmp_path):
    trainer = trainer_of(tmp_path)
    mmts_plugins.enable(trainer, no_shifts=True)
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    assert logged[0]["mmts/tau_mean"] == pytest.approx(0.075 + 0.02)
