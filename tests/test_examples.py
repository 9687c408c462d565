"""Examples that need no download, each as its README tells, but shorter: plain, then with the table made of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from conftest import REPOSITORY
from forked import HUGGING_FACE, preload, run_forked

preload(*HUGGING_FACE, "torchmetrics")

EXAMPLES = {  # what they need; the flags of a short run; mmts cluster's; those of the scheduled run
    "sentence_transformers_docstrings": (
        ("sentence_transformers", "datasets", "accelerate"),
        ("--output", "{out}", "--epochs", "1"),
        ("--column", "text", "--separator", ",", "--encoder", "hashing", "--runs", "1"),
        ("--loss", "mmts", "--mmts-clusters", "{table}"),
    ),
    "transformers_digits": (
        ("transformers", "accelerate"),
        ("--output_dir", "{out}", "--num_train_epochs", "1"),
        ("--column", "caption", "--encoder", "tfidf", "-k", "10"),
        ("--loss", "mmts", "--mmts-clusters", "{table}", "--mmts-column", "caption"),
    ),
    "lightning_digits": (
        ("pytorch_lightning", "lightly"),
        ("--output", "{out}", "--epochs", "1"),
        ("--label-column", "class"),
        ("--schedule", "--table", "{table}"),
    ),
}


@pytest.mark.parametrize(("name", "given"), EXAMPLES.items(), ids=EXAMPLES)
def test_an_example_runs_plain_and_scheduled(name, given, tmp_path):
    needs, short, cluster, scheduled = given
    for package in needs:
        pytest.importorskip(package, reason=f"the example needs {package}")
    script, table = REPOSITORY / "examples" / name / "train.py", tmp_path / "t.parquet"

    def run(*words: object) -> str:
        done = run_forked(*words, armed=True)
        assert done.returncode == 0, done.stdout[-3000:]
        return done.stdout

    run(script, "--write", tmp_path / "data.csv")
    run("-m", "mmts_plugins", "cluster", tmp_path / "data.csv", *cluster, "-o", table)
    found = []
    for which, more in (("plain", ()), ("mmts", scheduled)):
        out = tmp_path / which
        text = run(script, *(word.format(out=out, table=table) for word in (*short, *more)))
        assert ("MM-TS: mmts-infonce: alpha " in text) == (which == "mmts")
        (result,) = Path(out).glob("*.json")
        found.append(json.loads(result.read_text()))
        assert 0 < next(iter(found[-1].values())) <= 100
    assert (tmp_path / "mmts" / "mmts.yaml").exists() or list((tmp_path / "mmts").rglob("mmts.yaml"))
    words = (REPOSITORY / "examples" / name / "README.md").read_text()
    assert all(flag in words for flag in (*cluster, *scheduled) if flag.startswith("--"))
