"""Shared fixtures. OpenCLIP is patched in this process from the start, as the start-up file would do."""

from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import settings

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")

import mmts_plugins

REPOSITORY = Path(__file__).resolve().parent.parent

mmts_plugins.install()
settings.register_profile("long", max_examples=int(os.environ.get("MMTS_FUZZ_EXAMPLES", "5000")), deadline=None)


def pytest_terminal_summary(terminalreporter):
    fuzzing = sys.modules.get("fuzzing")  # not a conftest of its own in tests/fuzz: it would take this one's name
    if fuzzing is not None:
        cases, refused = fuzzing.tally["cases"], fuzzing.tally["refused"]
        terminalreporter.write_line(f"fuzzing: {cases} cases, {refused} of them refused in one line")


def shared_folder(name: str, what: str) -> Path:
    """The folder that ``MMTS_NAME`` names, or ``shared/name`` beside the repository; the test skips without it."""
    variable = f"MMTS_{name.upper()}"
    folder = Path(os.environ.get(variable, REPOSITORY.parent / "shared" / name))
    if not folder.is_dir():
        pytest.skip(f"no {what} at {folder} (set {variable})")
    return folder


def host_folders(distribution: str) -> list[Path]:
    """Older versions of a host, each in a folder of its own that ``make hosts`` made in the environment."""
    folders = (Path(sys.prefix) / "hosts").glob(f"{distribution}-*")
    return sorted(folders, key=lambda folder: [int(part) for part in folder.name.rpartition("-")[2].split(".")])


@pytest.fixture(scope="session")
def golden() -> Path:
    """Numbers computed with the authors' code."""
    return shared_folder("golden", "golden numbers")


@pytest.fixture(autouse=True)
def _own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("MMTS_CACHE", str(tmp_path / "cache"))


@pytest.fixture(autouse=True, scope="module")
def _own_logging():
    """OpenCLIP's trainer sets the level of every logger of the process, and the root's handlers, for good."""
    root, known = logging.getLogger(), logging.root.manager.loggerDict
    level, handlers = root.level, list(root.handlers)
    levels = {name: each.level for name, each in known.items() if isinstance(each, logging.Logger)}
    yield
    root.setLevel(level)
    root.handlers[:] = handlers
    for name, each in known.items():
        if isinstance(each, logging.Logger):
            each.setLevel(levels.get(name, logging.NOTSET))


@pytest.fixture(scope="session")
def small_model(tmp_path_factory) -> str:
    """``--model`` for a ViT as small as OpenCLIP builds one."""
    return write_model(tmp_path_factory.mktemp("model"))


def write_model(folder: Path, **changes: object) -> str:
    config = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 16, "layers": 1, "width": 16, "head_width": 8, "patch_size": 8},
        "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
        **changes,
    }
    preprocess = {"mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5]}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "open_clip_config.json").write_text(json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}))
    model = f"local-dir:{folder}"
    if "multimodal_cfg" in changes:  # OpenCLIP leaves one parameter of a CoCa's decoder as its memory was: NaN at times
        import open_clip
        import torch

        coca = open_clip.create_model(model)
        torch.nn.init.normal_(coca.text_decoder.text_projection, std=0.1)
        torch.save(coca.state_dict(), folder / "open_clip_pytorch_model.bin")
    return model


SIGLIP = {  # as OpenCLIP's ViT-B-16-SigLIP is built, but for its sizes
    "embed_dim": 64, "init_logit_bias": -10.0, "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit", "timm_model_pretrained": False, "timm_pool": "map",
                   "timm_proj": "none", "image_size": 160},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1,
                 "no_causal_mask": True, "proj_bias": True, "pool_type": "last", "norm_kwargs": {"eps": 1e-6}},
}  # fmt: skip
CAPTIONS = [f"a photo of {noun}" for noun in ("a dog", "a cat", "two birds", "the Sea!!!", "a car", "an old tree")]
CLUSTER_OF = [0, 0, 1, 2, 3, 3]
HOW_MANY = [14, 10, 9, 2, 3, 10]


class Data:
    """48 noise images with captions of uneven frequency, in OpenCLIP's CSV form, and their cluster table."""

    def __init__(self, folder: Path) -> None:
        from PIL import Image

        from mmts_plugins.tables import ClusterTable

        self.folder = folder
        self.csv = folder / "train.tsv"
        self.table = folder / "clusters.parquet"
        draw = random.Random(0)
        captions = [caption for caption, many in zip(CAPTIONS, HOW_MANY) for _ in range(many)]
        draw.shuffle(captions)
        lines = ["filepath\ttitle"]
        for number, caption in enumerate(captions):
            path = folder / f"{number}.png"
            Image.frombytes("RGB", (16, 16), draw.randbytes(768)).save(path)
            lines.append(f"{path}\t{caption}")
        self.csv.write_text("\n".join(lines) + "\n")
        sizes = [sum(many for many, c in zip(HOW_MANY, CLUSTER_OF) if c == cluster) for cluster in range(4)]
        self.frequency = {caption: sizes[cluster] for caption, cluster in zip(CAPTIONS, CLUSTER_OF)}
        ClusterTable.build(CAPTIONS, CLUSTER_OF, [sizes[c] for c in CLUSTER_OF], HOW_MANY).save(self.table)


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Data:
    return Data(tmp_path_factory.mktemp("data"))


def openclip_flags(model: str, logs: Path, name: str = "run", **changes: object) -> list[str]:
    """OpenCLIP's flags for a run of a few seconds; ``None`` leaves one out, ``True`` is a switch."""
    flags: dict[str, object] = {
        "model": model,
        "logs": logs,
        "name": name,
        "device": "cpu",
        "precision": "fp32",
        "batch-size": 8,
        "epochs": 2,
        "workers": 0,
        "warmup": 2,
        "lr": 1e-2,
        "log-every-n-steps": 1,
        "save-most-recent": None,
        **{key.replace("_", "-"): value for key, value in changes.items()},
    }
    argv = []
    for flag, value in flags.items():
        if value is True:
            argv.append(f"--{flag}")
        elif value is not None:
            argv += [f"--{flag}", *([str(v) for v in value] if isinstance(value, (list, tuple)) else [str(value)])]
    return argv


def run_python(*arguments: object, timeout: float = 150, **environment: str) -> subprocess.CompletedProcess[str]:
    """A fresh interpreter, as a user starts one; output as text, errors merged in."""
    outer = os.environ.get("PYTHONPATH")  # of a copy of the code that is tested in the place of the installed one
    if outer and "PYTHONPATH" in environment:
        environment["PYTHONPATH"] += os.pathsep + outer
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=timeout,
        check=False,
    )
