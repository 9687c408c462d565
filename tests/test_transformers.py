"""transformers' own Trainer, in a user's script: every micro-step's loss against one written out in float64."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import reference
import torch
from conftest import REPOSITORY, host_folders, run_python
from forked import HUGGING_FACE, preload, run_forked

pytest.importorskip("transformers", reason="needs the extra: pip install 'mmts-plugins[transformers]'")
pytest.importorskip("accelerate", reason="needs: pip install 'transformers[torch]'")

import hf_train
import transformers
from transformers import PreTrainedTokenizerFast, Trainer, TrainingArguments

import mmts_plugins
from mmts_plugins.adapters.transformers import Tokens, check_contrastive
from mmts_plugins.errors import ConfigError, SeamError, TableError
from mmts_plugins.tables import ClusterTable

preload(*HUGGING_FACE)
SCRIPT = REPOSITORY / "tests" / "hf_train.py"
DRIVER = REPOSITORY / "tests" / "recorded_hf.py"
COUNT = {noun: 18 if noun == "tree" else 6 for noun in hf_train.NOUNS}
OLD = host_folders("transformers")


@pytest.fixture(scope="module")
def table(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("hf") / "t.parquet"
    counts = list(COUNT.values())
    ClusterTable.build([f"a photo of the {noun} [EOS]" for noun in COUNT], range(6), counts, counts).save(path)
    return path


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Path:
    return hf_train.tokenizer_of(tmp_path_factory.mktemp("tokenizer"))


def words(folder: Path, tokenizer: Path, *more: object) -> list[object]:
    return ["--tokenizer", tokenizer, "--output_dir", folder, "--use_cpu", "true", "--per_device_train_batch_size", 8,
            "--num_train_epochs", 2, "--learning_rate", "1e-2", "--logging_steps", 1, "--report_to", "none",
            "--save_steps", 3, "--disable_tqdm", "true", "--seed", 7, *more]  # fmt: skip


def trained(*command: object, expect: int = 0, fresh: bool = False, ranks: int = 0, old: Any = None,
            **environment: str) -> str:  # fmt: skip
    if old is not None:  # of before torch 2.6, which resumes with its generators' states
        environment |= {"PYTHONPATH": str(old), "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "1"}
    if fresh or old is not None:
        done = run_python(*command, **environment)
    else:
        done = run_forked(*command, ranks=ranks, armed=True, **environment)
    assert done.returncode == expect, done.stdout[-3000:]
    return done.stdout


def losses(out: str) -> list[float]:
    return [float(value) for value in re.search(r"LOSS \[(.*)\]", out)[1].split(",")]


def weights(folder: Path, rank: int = 0) -> dict[str, torch.Tensor]:
    found = torch.load(folder / f"final-{rank}.pt", weights_only=True)
    assert len(found) > 20
    return found


def equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, other[name]) for name, value in one.items())


def check(ranks: list[dict[str, np.ndarray]], total: int, parts: int = 1, together: bool = False) -> None:
    """The loss of each rank's rows, or of all ranks' together, from its embeddings and what its captions are."""
    every = [float(count) for count in COUNT.values()]
    for call, step in enumerate(ranks[0]["step"].tolist()):
        rows = []
        for rank in ranks:
            tau = reference.temperature(rank["frequency"][call], every, 0.04, 0.05, 0.10, step, total / 5)
            np.testing.assert_allclose(rank["tau"][call], tau, rtol=0, atol=1e-7)
            rows.append((rank["image"][call], rank["text"][call], tau))
        if together:
            rows = [tuple(np.concatenate(each) for each in zip(*rows))] * len(ranks)
        for rank, (images, texts, tau) in zip(ranks, rows):
            expected = reference.info_nce(*map(torch.from_numpy, (images, texts, tau)))
            assert rank["loss"][call] == pytest.approx(float(expected), rel=1e-6)
    assert ranks[0]["step"].tolist() == [step for step in range(total) for _ in range(parts)]


CASES = {
    "plain": ((), 1),
    "accumulated by 2": (("--gradient_accumulation_steps", 2), 2),
    "accumulated by 3": (("--gradient_accumulation_steps", 3), 3),
    "bf16": (("--bf16", "true"), 1),
    "dual encoder, padded to the longest": (("--kind", "dual", "--padding", "longest"), 1),
    "compiled": (("--torch_compile", "true", "--torch_compile_backend", "eager"), 1),
}


@pytest.mark.parametrize(("more", "parts"), CASES.values(), ids=CASES)
def test_every_micro_step_equals_float64(more, parts, table, tokenizer, tmp_path):
    given = words(tmp_path, tokenizer, *more, "--loss", "mmts", "--mmts-clusters", table)
    out = trained(DRIVER, tmp_path / "record", *given)
    record = dict(np.load(tmp_path / "record-0.npz"))
    check([record], 12 // parts, parts)
    logged = losses(out)
    assert logged == pytest.approx(record["loss"].reshape(-1, parts).mean(1).tolist(), rel=1e-2)
    mean = sum(count * (0.05 + (count - 6) / 12 * 0.05) for count in COUNT.values()) / sum(COUNT.values())
    scale = 1 / (mean + 0.02 * np.cos(2 * np.pi * record["step"] / (12 // parts / 5)))
    np.testing.assert_allclose(record["scale"], scale, rtol=1e-6, err_msg="checkpoints carry the scale of the step")


@pytest.mark.parametrize("old", OLD, ids=lambda folder: folder.name)
def test_an_older_transformers_equals_float64_and_resumes(old, table, tokenizer, tmp_path):
    given = words(tmp_path / "a", tokenizer, "--loss", "mmts", "--mmts-clusters", table)
    whole = losses(trained(DRIVER, tmp_path / "record", *given, "--gradient_accumulation_steps", 2, old=old))
    check([dict(np.load(tmp_path / "record-0.npz"))], 6, 2)
    assert f"host_version: {old.name.rpartition('-')[2]}" in (tmp_path / "a/mmts.yaml").read_text()
    resume = ("--gradient_accumulation_steps", 2, "--resume", tmp_path / "a/checkpoint-3")
    assert losses(trained(SCRIPT, *given, *resume, old=old))[-3:] == whole[-3:]
    assert len(whole) == 6


@pytest.mark.parametrize("gather", [False, True], ids=["local", "gathered"])
def test_two_ranks_equal_float64_and_end_alike(gather, table, tokenizer, tmp_path):
    # Without its own search for weights that got no gradient: all must have one.
    given = words(tmp_path, tokenizer, "--loss", "mmts", "--mmts-clusters", table, *(["--mmts-gather"] * gather),
                  "--ddp_find_unused_parameters", "false")  # fmt: skip
    out = trained(DRIVER, tmp_path / "record", *given, ranks=2)
    check([dict(np.load(tmp_path / f"record-{rank}.npz")) for rank in range(2)], 6, together=gather)
    assert equal(weights(tmp_path), weights(tmp_path, 1))
    assert out.count("MM-TS: mmts-infonce: alpha 0.04") == 1


def test_accelerate_launch(table, tokenizer, tmp_path):
    # Its way of starting several processes without MPI; the script says that they are on the CPU.
    launch = ("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--num_machines", 1,
              "--mixed_precision", "no", "--dynamo_backend", "no")  # fmt: skip
    out = trained(*launch, SCRIPT, *words(tmp_path, tokenizer, "--loss", "mmts", "--mmts-clusters", table), fresh=True)
    assert len(losses(out)) == 6
    assert out.count("MM-TS: mmts-infonce: alpha 0.04 over 6 steps") == 1
    assert equal(weights(tmp_path), weights(tmp_path, 1))


def test_a_script_that_does_not_ask_is_as_without_us(table, tokenizer, tmp_path):
    plain = trained(SCRIPT, *words(tmp_path / "plain", tokenizer), MMTS="0", fresh=True)
    armed = trained(SCRIPT, *words(tmp_path / "armed", tokenizer), MMTS="1", fresh=True)
    assert losses(plain) == losses(armed)
    assert len(losses(plain)) == 12
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "armed"))
    assert "MM-TS" not in armed
    given = ("--loss", "mmts", "--mmts-clusters", table, "--trainer", "OwnTrainer")
    ours = trained(SCRIPT, *words(tmp_path / "ours", tokenizer, *given), fresh=True)
    launcher = ("-m", "mmts_plugins", "run", SCRIPT)
    launched = trained(*launcher, *words(tmp_path / "run", tokenizer, *given), MMTS="0", fresh=True)
    assert losses(launched) == losses(ours) != losses(plain)
    assert "'mmts/tau_mean'" in ours


def test_resumed_equals_uninterrupted_and_other_settings_are_refused(table, tokenizer, tmp_path):
    given = words(tmp_path, tokenizer, "--loss", "mmts", "--mmts-clusters", table)
    whole = losses(trained(SCRIPT, *given))
    ends = weights(tmp_path)
    again = (*given, "--resume", tmp_path / "checkpoint-6")
    assert losses(trained(SCRIPT, *again))[-6:] == whole[-6:]
    assert equal(ends, weights(tmp_path))
    refused = trained(SCRIPT, *again, "--mmts-alpha", "0.02", expect=1)
    assert refused.splitlines()[-1].startswith("mmts: error: ")
    assert "alpha was 0.04 and is 0.02" in refused


def trainer_of(
    folder: Path, tokenizer: Path, kind: str = "clip", made: Any = Trainer, padding: str = "max_length", **settings: Any
) -> Any:
    words = PreTrainedTokenizerFast.from_pretrained(tokenizer)
    given = {"per_device_train_batch_size": 8, "num_train_epochs": 1, "use_cpu": True, "report_to": "none"}
    given |= {"disable_tqdm": True, "save_strategy": "no", "logging_steps": 1, "remove_unused_columns": False}
    args = TrainingArguments(output_dir=str(folder), **{**given, **settings})
    model = hf_train.model_of(kind)
    data = hf_train.Pairs(words)
    return made(model=model, args=args, train_dataset=data, data_collator=hf_train.Collate(words, padding))


def test_a_constant_column_equals_the_scalar_of_the_host(table, tokenizer, tmp_path):
    """Also: several trainings in one process, as Optuna's; and what was replaced is back."""
    found = []
    for ours in (True, False, True):
        trainer = trainer_of(tmp_path, tokenizer)
        trainer.model.logit_scale.requires_grad_(False)
        trainer.model.logit_scale.fill_(float(np.log(1 / 0.07)))
        if ours:
            name = str(tokenizer)
            mmts_plugins.enable(trainer, table, alpha=0.0, shift_min=0.07, shift_max=0.07, tokenizer=name)
        trainer.train()
        assert "get_train_dataloader" not in vars(trainer)
        assert not trainer.model._forward_hooks
        found.append([each["loss"] for each in trainer.state.log_history if "loss" in each])
    assert len(found[0]) == 6
    assert found[0] == found[2] == pytest.approx(found[1], rel=1e-5)


def test_captions_as_the_data_set_has_them(table, tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, tokenizer)
    mmts_plugins.enable(trainer, table, column="caption")
    trainer.train()
    by_text = [each["loss"] for each in trainer.state.log_history if "loss" in each]
    assert "get_train_dataloader" not in vars(trainer)
    other = trainer_of(tmp_path, tokenizer)
    mmts_plugins.enable(other, table, tokenizer=str(tokenizer))
    other.train()
    assert by_text == [each["loss"] for each in other.state.log_history if "loss" in each]
    wrong = trainer_of(tmp_path, tokenizer)
    mmts_plugins.enable(wrong, table, column="title")
    with pytest.raises(ConfigError, match=r"column 'title' holds no text \(its columns: image, caption; a Trainer"):
        wrong.train()


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_on_either_side_and_texts_that_are_cut(side, table, tmp_path):
    folder = hf_train.tokenizer_of(tmp_path / "tokenizer", padding_side=side)
    trainer = trainer_of(tmp_path, folder, padding="longest")
    long = ClusterTable.build([f"a photo of the {noun} [EOS]" + " a" * 9 for noun in COUNT], range(6),
                              list(COUNT.values()), list(COUNT.values()))  # fmt: skip
    long.save(tmp_path / "long.parquet")
    mmts_plugins.enable(trainer, table, tokenizer=str(folder), missing="error")
    trainer.train()
    assert len([each for each in trainer.state.log_history if "mmts/tau_mean" in each]) == 6
    trainer = trainer_of(tmp_path, folder)
    mmts_plugins.enable(trainer, tmp_path / "long.parquet", tokenizer=str(folder))
    with pytest.raises(TableError, match=r"\(0% found\), for example '?a photo of the"):
        trainer.train()


@pytest.mark.parametrize("side", ["left", "right"])
def test_texts_longer_than_those_of_the_first_batch(side, tmp_path):
    """A batch that is filled up to its own longest text does not tell where texts are cut."""
    folder = hf_train.tokenizer_of(tmp_path / "tokenizer", padding_side=side)
    keys = ["a dog [EOS]", "a photo of the cat [EOS]", "a photo of the dog of a cat [EOS]"]
    made = ClusterTable.build(keys, range(3), [1, 2, 3], [1, 2, 3])
    words = PreTrainedTokenizerFast.from_pretrained(folder)
    trainer = trainer_of(tmp_path, folder)

    def tokens(texts: list[str], **options: Any) -> torch.Tensor:
        return words(texts, return_tensors="pt", truncation=True, max_length=hf_train.LENGTH, **options)["input_ids"]

    unpadded, padded = tokens(keys[:1]), tokens(keys[:1], padding="max_length")
    found = Tokens(made, trainer, str(folder), unpadded)
    assert found(unpadded).tolist() == found(padded).tolist() == [0]
    assert found(tokens(keys, padding="longest")).tolist() == [0, 1, 2]
    fixed = Tokens(made, trainer, str(folder), padded)
    assert fixed(tokens(keys, padding="max_length")).tolist() == [0, 1, 2]
    assert found(tokens(["a tree [EOS]"])).tolist() == [3]
    assert found.text(padded[0]).split() == ["a", "dog"]


def test_a_schedule_alone_needs_no_texts(tokenizer, tmp_path):
    trainer = trainer_of(tmp_path, tokenizer)
    mmts_plugins.enable(trainer, no_shifts=True)
    trainer.train()
    logged = [each for each in trainer.state.log_history if "loss" in each]
    assert logged[0]["mmts/tau_mean"] == pytest.approx(0.075 + 0.02)


class Broken(Trainer):
    def compute_loss(self, model, inputs, **rest):
        raise RuntimeError("stumbles")


def test_what_is_refused(table, tokenizer, tmp_path):
    def fails(error: Any, match: str, kind: str = "clip", made: Any = Trainer, **fields: Any) -> None:
        trainer = trainer_of(tmp_path, tokenizer, kind, made)
        mmts_plugins.enable(trainer, table, **{"tokenizer": str(tokenizer), **fields})
        with pytest.raises(error, match=match) as caught:
            trainer.train()
        assert "\n" not in str(caught.value)
        assert not trainer.model._forward_hooks

    fails(ConfigError, "no softmax over rows", kind="siglip")
    fails(SeamError, "OwnLoss takes another than the model's", made=hf_train.OwnLoss)
    fails(RuntimeError, "stumbles", made=Broken)
    fails(ConfigError, "--mmts-tokenizer: no tokenizer can be loaded from 'nowhere'", tokenizer="nowhere")
    fails(ConfigError, "the model does not say where it was loaded from", tokenizer=None)
    with pytest.raises(ConfigError, match="scales similarities by row; use --loss mmts-infonce"):
        mmts_plugins.enable(trainer_of(tmp_path, tokenizer), table, loss="mmts-max-margin")
    trainer = trainer_of(tmp_path, tokenizer)
    trainer.args._n_gpu = 2
    with pytest.raises(ConfigError, match="one process with several GPUs"):
        mmts_plugins.enable(trainer, table)
    trainer = trainer_of(tmp_path, tokenizer)
    trainer.accelerator.state.distributed_type = transformers.trainer.DistributedType.DEEPSPEED
    try:
        with pytest.raises(ConfigError, match="DEEPSPEED was never run"):
            mmts_plugins.enable(trainer, table)
    finally:
        trainer.accelerator.state.distributed_type = transformers.trainer.DistributedType.NO


def test_what_a_models_output_must_be():
    images, texts = (torch.nn.functional.normalize(torch.randn(5, 4), dim=1) for _ in range(2))
    logits = 7 * texts @ images.T
    own = torch.arange(5)
    loss = (torch.nn.functional.cross_entropy(logits, own) + torch.nn.functional.cross_entropy(logits.T, own)) / 2
    check_contrastive(images, texts, {"loss": loss, "logits_per_text": logits})
    with pytest.raises(ConfigError, match="no softmax over rows"):
        check_contrastive(images, texts, {"loss": 1.05 * loss, "logits_per_text": logits})
    with pytest.raises(ConfigError, match="not L2-normalised"):
        check_contrastive(2 * images, texts, {"loss": loss, "logits_per_text": logits})
    with pytest.raises(ConfigError, match="no logits_per_text"):
        check_contrastive(images, texts, {"loss": loss})


@pytest.mark.parametrize("started", ["bin/mmts", "mmts_plugins/__main__.py", "open_clip_train/main.py",
                                     "scripts/main_lavila_pretrain.py", "train.py", "run.py"])  # fmt: skip
def test_flags_of_another_program_are_left_where_they_are(started):
    """A library of its own may import the trainer before it reads its command line."""
    code = (
        f"import sys; sys.argv = ['/somewhere/{started}', '--loss', 'mmts', '--mmts-no-shifts']; "
        "import mmts_plugins; mmts_plugins.install(); import transformers.trainer; print(sys.argv[1:])"
    )
    out = run_python("-c", code).stdout
    kept = "['--loss', 'mmts', '--mmts-no-shifts']" if "/" in started else "[]"
    assert out.splitlines()[0] == kept, out


def test_flags_that_no_trainer_took_are_told(table, tmp_path):
    script = tmp_path / "own_loop.py"
    script.write_text("import sys\nfrom transformers import Trainer\nprint('trained', sys.argv[1:])\n")
    done = run_python(script, "--loss", "mmts", "--mmts-clusters", table)
    assert "trained []" in done.stdout
    assert "mmts: warning: --loss was taken, but no Trainer trained in this process" in done.stdout
    done = run_python(script, "--loss", "mmts")
    assert done.returncode == 1
    assert "needs the cluster table of the training captions" in done.stdout.splitlines()[-1]
