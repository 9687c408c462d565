"""Killed (SIGKILL) at random points and started again until it ends by itself: equal to what was never interrupted.

One kill of each kind in ``make test``; ``python -m pytest tests/kill --hypothesis-profile=long`` makes 50. The points
are drawn, from a seed, over the time that an uninterrupted run takes. Kills count that hit a running process.
"""

from __future__ import annotations

import fcntl
import json
import os
import random
import shlex
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import REPOSITORY, openclip_flags
from forked import _become, context, free_port, one_rank
from hypothesis import settings

from mmts_plugins.compare.execute import torn
from mmts_plugins.tables import ClusterTable

LONG = settings.default.max_examples == settings.get_profile("long").max_examples  # type: ignore[union-attr]
KILLS = {"cluster": 14, "report": 12, "compare": 14, "openclip": 10} if LONG else dict.fromkeys(
    ("cluster", "report", "compare", "openclip"), 1
)  # fmt: skip
MOST_STARTS = 20  # for each kill wanted: an early end is none


def _alone(arguments: list[str], environment: dict[str, str], output: str) -> None:
    os.setsid()  # killed with all that it started, but for what has a session of its own
    _become(arguments, environment, output)


class Job:
    """A command of one or several ranks, forked from the warm server."""

    def __init__(self, arguments: list[object], output: Path, ranks: int = 1, **environment: str) -> None:
        output.touch()
        port = free_port()
        self._output, self._children = output, []
        for rank in range(ranks):
            variables = {**environment, **(one_rank(rank, ranks, port) if ranks > 1 else {})}
            child = context.Process(target=_alone, args=([str(word) for word in arguments], variables, str(output)))
            child.start()
            self._children.append(child)

    def end(self, timeout: float = 240) -> None:
        """Wait for it; it must end well."""
        for child in self._children:
            child.join(timeout)
        codes = [child.exitcode for child in self._children]
        self.kill()
        assert codes == [0] * len(codes), self._output.read_text()[-3000:]

    def kill(self) -> bool:
        """Kill it now; whether it was still running."""
        hit = all(child.exitcode is None for child in self._children)
        for child in self._children:
            with suppress(ProcessLookupError):  # killed before it had a session of its own
                os.killpg(child.pid, signal.SIGKILL)
            child.kill()
            child.join()
        return hit


def killed_and_ended(kind: str, start: Callable[[str], Job], seconds: float, check: Callable[[str], None]) -> None:
    """Start it, kill it, look at what is there and start it again, until it ends by itself; again in another folder
    until there were as many kills as this kind wants.

    Args:
        kind: of :data:`KILLS`.
        start: what is killed, in the folder of this name.
        seconds: that it takes.
        check: whether what the folder of this name holds is whole, as far as it is there.
    """
    draw = random.Random(kind)
    hits = starts = rounds = 0
    while hits < KILLS[kind]:
        rounds += 1
        running = True
        while running and hits < KILLS[kind]:
            starts += 1
            assert starts <= MOST_STARTS * KILLS[kind], f"{hits} kills in {starts} starts of {seconds:.1f} s"
            job = start(f"killed {rounds}")
            time.sleep(draw.uniform(0, seconds))
            running = job.kill()
            hits += running
            check(f"killed {rounds}")
    start(f"killed {rounds}").end()
    check(f"killed {rounds}")
    print(f"{kind}: {hits} kills in {starts} starts and {rounds} folders; {seconds:.1f} s without")


def ended(folder: Path) -> list[Path]:
    """The folders whose run ended."""
    return sorted(folder.glob("killed *[0-9]"))


def timed(start: Callable[[], Job]) -> float:
    start().end()  # what only the first run does: byte code, fonts
    started = time.monotonic()
    start().end()
    return time.monotonic() - started


def content(path: Path) -> tuple[Any, ...]:
    table = ClusterTable.load(path)
    return (table.keys.to_pylist(), table.cluster.tolist(), table.frequency.tolist(), table.count.tolist(),
            table.content_hash)  # fmt: skip


def test_cluster(tmp_path):
    pytest.importorskip("sklearn", reason="needs the extra: pip install 'mmts-plugins[cluster]'")
    draw = random.Random(0)
    words = [f"{a}{b}" for a in "bdfgklmnprst" for b in ("a", "e", "i", "o", "ur", "un")]
    captions = [" ".join(draw.choices(words, k=5)) for _ in range(4000)]
    (tmp_path / "captions.txt").write_text("\n".join(captions * 2) + "\n")

    def start(name: str) -> Job:
        command = ["-m", "mmts_plugins", "cluster", tmp_path / "captions.txt", "--encoder", "hashing", "-k", "50"]
        out = tmp_path / name / "t.parquet"
        command += ["--runs", "10", "--force", "-o", out]
        return Job(command, tmp_path / f"{name}.txt", MMTS_CACHE=str(tmp_path / f"cache {name}"))

    def check(name: str) -> None:
        if (tmp_path / name / "t.parquet").exists():
            assert content(tmp_path / name / "t.parquet") == whole

    seconds = timed(lambda: start("whole"))
    whole = content(tmp_path / "whole" / "t.parquet")
    assert len(whole[0]) > 3000
    killed_and_ended("cluster", start, seconds, check)
    for folder in ended(tmp_path):
        assert content(folder / "t.parquet") == whole
        assert [path.name for path in folder.iterdir()] == ["t.parquet"]


def test_report(tmp_path):
    pytest.importorskip("matplotlib", reason="needs the extra: pip install 'mmts-plugins[report]'")
    keys = [f"caption {number}" for number in range(300)]
    sizes = [1 + 1000 // (1 + number // 6) for number in range(300)]
    ClusterTable.build(keys, [number // 6 for number in range(300)], sizes, [2] * 300).save(tmp_path / "t.parquet")

    def start(name: str) -> Job:
        command = ["-m", "mmts_plugins", "report", tmp_path / "t.parquet", "-o", tmp_path / name / "out", "--force"]
        return Job(command, tmp_path / f"{name}.txt", MMTS_CACHE="")

    def files(name: str) -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in (tmp_path / name / "out").iterdir() if path.suffix != ".tmp"}

    def check(name: str) -> None:
        for path in (tmp_path / name / "out").glob("*"):
            if path.suffix != ".tmp":
                assert path.read_bytes() == whole[path.name], path.name

    seconds = timed(lambda: start("whole"))
    whole = files("whole")
    assert len(whole["report.html"]) > 50_000
    killed_and_ended("report", start, seconds, check)
    for folder in ended(tmp_path):
        assert files(folder.name) == whole
        assert not list((folder / "out").glob("*.tmp"))


TRAINER = """
import fcntl, pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
folder.mkdir(parents=True, exist_ok=True)
alone = open(folder / "alone", "a")
try:
    fcntl.flock(alone, fcntl.LOCK_EX | fcntl.LOCK_NB)
except BlockingIOError:
    (folder / "twice").touch()
    sys.exit("two trainers in one folder")
state = folder / "step.txt"
done = int(state.read_text()) if "--resume" in sys.argv and state.exists() and state.read_text() else 0
for step in range(done, 8):
    time.sleep(0.04)
    new = folder / "new.txt"
    new.write_text(str(step + 1))
    new.replace(state)
with open(folder / "done.pt", "wb", buffering=0) as file:  # slowly, under its own name, as OpenCLIP does
    file.write(b"PK\\3\\4")
    time.sleep(0.1)
    import io, zipfile
    whole = io.BytesIO()
    with zipfile.ZipFile(whole, "w") as archive:
        archive.writestr("step", "8")
    file.seek(0)
    file.write(whole.getvalue())
"""
JUDGE = """
import json, sys, time, zipfile
step = int(zipfile.ZipFile(sys.argv[1]).read("step"))
with open(sys.argv[2], "w") as file:
    file.write('{"metrics": ')
    file.flush()
    time.sleep(0.05)
    file.write(json.dumps({"R@1": step / 10}) + "}")
"""


def test_compare(tmp_path):
    (tmp_path / "train.py").write_text(TRAINER)
    (tmp_path / "judge.py").write_text(JUDGE)
    python = shlex.quote(sys.executable)
    plan = {
        "command": f"{python} -S train.py --seed {{seed}} --out '{{output}}/runs/{{run}}'",
        "variants": {"plain": "", "mine": "--mine"},
        "seeds": [0, 1],
        "done": "{output}/runs/{run}/done.pt",
        "resume": "--resume",
        "eval": f"{python} -S judge.py {{done}} {{result}}",
    }
    (tmp_path / "plan.yaml").write_text(yaml.safe_dump(plan))

    def start(name: str) -> Job:
        command = ["-m", "mmts_plugins", "compare", tmp_path / "plan.yaml", "-o", tmp_path / name]
        return Job(command, tmp_path / f"{name}.txt", MMTS_CACHE="")

    def metrics(name: str) -> Any:
        return json.loads((tmp_path / name / "compare.json").read_text())["metrics"]

    def check(name: str) -> None:
        """A trainer has ended before the next comparison could start one; a state is whole whenever it is there."""
        deadline = time.monotonic() + 30
        for path in (tmp_path / name / "runs").glob("*/alone"):
            with path.open("a") as file:
                while True:
                    try:
                        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                        break
                    except BlockingIOError:
                        assert time.monotonic() < deadline, "a trainer outlives its comparison"
                        time.sleep(0.02)
        if (tmp_path / name / "state.json").exists():
            json.loads((tmp_path / name / "state.json").read_text())

    started = time.monotonic()
    start("whole").end()
    seconds = time.monotonic() - started
    killed_and_ended("compare", start, seconds, check)
    assert metrics("whole")["mine"]["R@1"]["all"]["mean"] == 0.8
    for folder in ended(tmp_path):
        assert metrics(folder.name) == metrics("whole")
        states = json.loads((folder / "state.json").read_text())["runs"]
        assert [known["status"] for known in states.values()] == ["finished"] * 4
        assert not list(folder.rglob("twice"))
        assert not list(folder.glob(".*.tmp"))


def test_openclip(tmp_path, small_model, data):
    """Two ranks, so that an epoch's batches depend on its number alone; every epoch a checkpoint."""
    pytest.importorskip("open_clip_train", reason="needs the extra: pip install 'mmts-plugins[openclip]'")
    plain_crop = ["scale=(1.0, 1.0)", "ratio=(1.0, 1.0)"]  # no draw that a resumed run would make anew

    def start(name: str) -> Job:
        flags = openclip_flags(
            small_model, tmp_path, name, train_data=data.csv, dataset_type="csv", loss="mmts", mmts_clusters=data.table,
            batch_size=3, epochs=4, aug_cfg=plain_crop, resume="latest", save_frequency=1,
        )  # fmt: skip
        script = REPOSITORY / "tests" / "recorded_openclip.py"
        return Job([script, tmp_path / f"{name}-record", *flags], tmp_path / f"{name}.txt", ranks=2)

    def check(name: str) -> None:
        """What OpenCLIP was writing when it was killed is torn, and would stop it: its user deletes that."""
        for path in (tmp_path / name / "checkpoints").glob("*.pt"):
            if torn(path) or not path.stat().st_size:
                path.unlink()
        if (tmp_path / name / "mmts.yaml").exists():
            assert (tmp_path / name / "mmts.yaml").read_text() == record

    def values(name: str) -> dict[int, Any]:
        """The last that was said of each step, of what depends on the step."""
        lines = map(json.loads, (tmp_path / name / "mmts.jsonl").read_text().splitlines())
        said = {
            line["step"]: (line["tau_base"], line["tau_mean"], line["phase"]) for line in lines if "tau_base" in line
        }
        return dict(sorted(said.items()))

    started = time.monotonic()
    start("whole").end()
    seconds = time.monotonic() - started
    record = (tmp_path / "whole" / "mmts.yaml").read_text()
    killed_and_ended("openclip", start, seconds, check)
    one = torch.load(tmp_path / "whole" / "checkpoints" / "epoch_4.pt", weights_only=True)
    assert len(values("whole")) == 32
    for run in ended(tmp_path):
        other = torch.load(run / "checkpoints" / "epoch_4.pt", weights_only=True)
        assert one["epoch"] == other["epoch"] == 4
        assert one["state_dict"].keys() == other["state_dict"].keys()
        for name, value in one["state_dict"].items():
            assert torch.equal(value, other["state_dict"][name]), name
        assert values(run.name) == values("whole")
