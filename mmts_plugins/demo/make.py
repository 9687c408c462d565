"""The demo: digits written, a table made, OpenCLIP trained plain and with the schedule, both compared."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import shutil
import sys
import time
from pathlib import Path

from .._files import replacing, writing
from ..errors import MMTSError
from ..processes import run_logged, shown
from ..versions import installed_version

EXTRAS = "pip install 'mmts-plugins[openclip,cluster,report]'"
NEEDED = ("open_clip", "open_clip_train", "sklearn", "pandas", "PIL", "tqdm", "matplotlib")
MARKER = ".mmts-demo"
FINISHED = "results.json"
# All that a demo writes, and so all that --force removes: a file that somebody put beside it stays.
WRITTEN = (FINISHED, "results.md", "report.html", "clusters.parquet", "data", "model", "runs",
           "temperatures.png", "cluster_sizes.png", "accuracy.png")  # fmt: skip
STEPS = 5

MODEL = {
    "model_cfg": {
        "embed_dim": 64,
        "vision_cfg": {"image_size": 32, "patch_size": 4, "layers": 3, "width": 64, "head_width": 16},
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "layers": 2, "width": 64, "heads": 4},
    },
    "preprocess_cfg": {"size": [32, 32]},
}


def make(output: Path, seed: int = 0, epochs: int = 40, batch_size: int = 64, force: bool = False) -> None:
    """Train plain and with the schedule, compare, and write what came out.

    Args:
        output: the folder to write.
        seed: of the data and of both runs.
        epochs, batch_size: of each run.
        force: replace a finished demo in the folder.

    Raises:
        MMTSError: a package is missing, a number is out of range, the folder is not free, or a run failed.
    """
    started = time.monotonic()
    missing = [name for name in NEEDED if importlib.util.find_spec(name) is None]
    if missing:
        raise MMTSError(f"the demo needs {', '.join(missing)}: {EXTRAS}")
    if epochs < 1 or batch_size < 2 or not 0 <= seed < 2**32:
        raise MMTSError("--epochs must be at least 1, --batch-size at least 2, --seed at least 0 and below 2^32")
    folder = output.resolve()
    prepare(folder, force)
    # More threads gain nothing on a model this small, and cost much where other jobs want the cores too.
    os.environ.setdefault("OMP_NUM_THREADS", "1")

    from ..report.plots import own_style
    from . import data, report
    from .evaluate import evaluate
    from .train import train

    step(1, f"write long-tail handwritten digits to {output / 'data'}")
    parts = data.write(folder, seed)
    images = sum(map(len, parts.train.values()))
    if batch_size > images:
        raise MMTSError(f"--batch-size {batch_size} is more than the {images} training images")
    (folder / "model").mkdir()
    (folder / "model" / "open_clip_config.json").write_text(json.dumps(MODEL, indent=2) + "\n", encoding="utf-8")
    print("  digit            " + "".join(f"{digit:>5}" for digit in parts.order))
    print("  training images  " + "".join(f"{len(parts.train[digit]):>5}" for digit in parts.order))
    print(f"  held-out images  {''.join(f'{len(parts.held_out[digit]):>5}' for digit in parts.order)}")

    step(2, "make the cluster table")
    cluster = [sys.executable, "-m", "mmts_plugins", "cluster", "data/train.tsv", "-o", "clusters.parquet"]
    cluster += ["--column", data.CAPTION_KEY, "--label-column", data.LABEL_KEY]
    print("  $ " + shown(cluster), flush=True)
    run_logged(cluster, folder)

    # Adam's settings are given because OpenCLIP guesses them from the letters "vit" in the model's name or path.
    flags = ["--model", "local-dir:model", "--train-data", "data/train.tsv", "--dataset-type", "csv"]
    flags += ["--batch-size", str(batch_size), "--lr", "1e-3", "--beta1", "0.9", "--beta2", "0.98"]
    flags += ["--eps", "1e-6", "--wd", "0.1", "--warmup", "30", "--aug-cfg", "scale=(0.9, 1.0)"]
    flags += ["--precision", "fp32", "--workers", "0", "--device", "cpu", "--seed", str(seed)]
    flags += ["--save-frequency", "0", "--log-every-n-steps", "2"]
    step(3, "train plain CLIP with OpenCLIP's trainer")
    plain = train("plain", flags, folder, epochs)
    step(4, "train the same with --loss mmts")
    mmts = train("mmts", flags, folder, epochs, ["--loss", "mmts", "--mmts-clusters", "clusters.parquet"])

    step(5, "compare on the balanced held-out images")
    model = f"local-dir:{folder / 'model'}"
    outcome = report.Outcome(
        seed=seed,
        epochs=epochs,
        split=parts,
        plain=evaluate(model, plain.checkpoint, folder, parts),
        mmts=evaluate(model, mmts.checkpoint, folder, parts),
        plain_run=plain,
        mmts_run=mmts,
        cluster_command=shown(cluster),
        seconds=time.monotonic() - started,
        versions=versions(),
    )
    with own_style():
        report.write(folder, outcome)
    with replacing(folder / FINISHED) as temporary:
        temporary.write_text(json.dumps(outcome.as_json(), indent=2) + "\n", encoding="utf-8")
    print(f"\n{outcome.table()}\n{outcome.caveat()}\n\nDone in {outcome.seconds:.0f} s.")
    print(f"Read {output / 'report.html'}; numbers: {output / FINISHED}, {output / 'results.md'}")


def step(number: int, what: str) -> None:
    """Announce a step."""
    print(f"[{number}/{STEPS}] {what}", flush=True)


def prepare(folder: Path, force: bool) -> None:
    """Make the folder ready to write: new, empty, or with the remains of an earlier demo removed.

    Raises:
        MMTSError: something else is in the way, or a finished demo is and ``force`` is not given.
    """
    if folder.exists() and not folder.is_dir():
        raise MMTSError(f"{folder} is a file; choose another --output")
    if folder.is_dir() and any(folder.iterdir()):
        if not (folder / MARKER).is_file():
            raise MMTSError(f"{folder} is not empty and not the folder of a demo; choose another --output")
        if (folder / FINISHED).exists() and not force:
            raise MMTSError(f"{folder} holds a finished demo; replace it with --force or choose another --output")
    with writing(folder, "cannot write there"):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / MARKER).touch()
    for name in WRITTEN:
        path = folder / name
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def versions() -> dict[str, str]:
    """What the numbers depend on."""
    from .. import __version__

    packages = ("open_clip_torch", "torch", "scikit-learn", "numpy")
    found = {name: installed_version(name) or "unknown" for name in packages}
    return {"mmts-plugins": __version__, "python": platform.python_version(), **found}
