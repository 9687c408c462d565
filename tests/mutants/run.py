"""Break the code on purpose, one small meaningful change at a time, and see the named test fail: ``make mutants``.

Each ``*.yaml`` beside this file is a list of mutants: ``file``, ``find`` (a piece of it that occurs once), ``replace``,
and ``tests`` (pytest's node ids, one or several), which pass as the code stands and of which at least one must fail.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import yaml

REPOSITORY = Path(__file__).resolve().parents[2]
# What the tests import of others, once; nothing of ours, and nothing that we patch.
PRELOAD = ["pytest", "hypothesis", "torch", "torch.distributed", "pandas", "pyarrow.parquet", "sklearn.cluster",
           "transformers", "torchvision", "timm", "webdataset", "matplotlib.pyplot", "torchmetrics"]  # fmt: skip


@dataclass(frozen=True)
class Mutant:
    """One change to one file, and the tests that must notice."""

    name: str
    file: str
    find: str
    replace: str
    tests: tuple[str, ...]

    def apply(self, tree: Path) -> None:
        path = tree / self.file
        path.write_text(path.read_text(encoding="utf-8").replace(self.find, self.replace), encoding="utf-8")


def load(only: str = "") -> list[Mutant]:
    """Every mutant whose name holds ``only``.

    Raises:
        ValueError: one of them does not fit the code any more.
    """
    mutants = []
    for path in sorted(Path(__file__).parent.glob("*.yaml")):
        for number, each in enumerate(yaml.safe_load(path.read_text(encoding="utf-8")) or [], 1):
            tests = each["tests"] if isinstance(each["tests"], list) else [each["tests"]]
            mutant = Mutant(f"{path.stem}-{number}", each["file"], each["find"], each["replace"], tuple(tests))
            found = (REPOSITORY / mutant.file).read_text(encoding="utf-8").count(mutant.find)
            if found != 1 or mutant.find == mutant.replace:
                raise ValueError(f"{mutant.name}: {mutant.find!r} occurs {found} times in {mutant.file}, not once")
            for test in tests:
                if not (REPOSITORY / test.split("::")[0]).exists():
                    raise ValueError(f"{mutant.name}: there is no {test}")
            mutants.append(mutant)
    return [mutant for mutant in mutants if only in mutant.name]


def _pytest(tree: str, tests: tuple[str, ...], output: str) -> None:
    os.setsid()  # so that a hang, and what it started, can be killed whole
    handle = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.chdir(tree)
    for name in [name for name in sys.modules if name.split(".")[0] == "mmts_plugins"]:
        del sys.modules[name]  # the start-up file imported those of the repository
    sys.path.insert(0, tree)
    os.environ["PYTHONPATH"] = tree
    import pytest

    os._exit(int(pytest.main(["-x", "-q", "-p", "no:cacheprovider", *tests])))


def run(tree: Path, tests: tuple[str, ...], timeout: float) -> tuple[Any, str]:
    """pytest's exit status on a tree (``None`` after a time-out), and what it printed."""
    context = get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    with tempfile.NamedTemporaryFile(suffix=".txt") as output:
        child = context.Process(target=_pytest, args=(str(tree), tests, output.name))
        child.start()
        child.join(timeout)
        code = child.exitcode
        if code is None:
            os.killpg(child.pid, signal.SIGKILL)  # type: ignore[arg-type]
            child.join()
        return code, Path(output.name).read_text(errors="replace")


def copy(folder: Path) -> Path:
    """A tree to break: what git would clone, as it stands now."""
    ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", ".*_cache", ".hypothesis", "mmts_demo", "runs")
    tree = folder / "tree"
    shutil.copytree(REPOSITORY, tree, symlinks=True, ignore=ignored)
    return tree


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("only", nargs="?", default="", help="a part of the names: a file, or file-number")
    parser.add_argument("-j", "--jobs", type=int, default=min(2, os.cpu_count() or 1))
    parser.add_argument("--timeout", type=float, default=600, metavar="SECONDS", help="for one mutant's tests")
    args = parser.parse_args()
    mutants = load(args.only)
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="mutants-") as folder, ThreadPoolExecutor(args.jobs) as pool:
        trees: SimpleQueue[Path] = SimpleQueue()
        for number in range(args.jobs):
            trees.put(copy(Path(folder) / str(number)))

        def sound(tests: tuple[str, ...]) -> tuple[Any, str]:
            tree = trees.get()
            try:
                return run(tree, tests, args.timeout)
            finally:
                trees.put(tree)

        def caught(mutant: Mutant) -> tuple[Any, str]:
            tree = trees.get()
            before = (tree / mutant.file).read_text(encoding="utf-8")
            try:
                mutant.apply(tree)
                return run(tree, mutant.tests, args.timeout)
            finally:
                (tree / mutant.file).write_text(before, encoding="utf-8")
                trees.put(tree)

        everything = sorted({mutant.tests for mutant in mutants})
        unsound = 0
        for tests, (code, output) in zip(everything, pool.map(sound, everything)):
            if code != 0 or " passed" not in output:
                print(f"UNSOUND  {' '.join(tests)}: pytest gives {code} on the code as it is\n{output[-1500:]}")
                unsound += 1
        survived = 0
        for mutant, (code, output) in zip(mutants, pool.map(caught, mutants)):
            good = (
                code == 1 and " failed" in output
            )  # a test failed: not a time-out, nor a file that cannot be imported
            survived += not good
            first = (mutant.replace.strip() or "(taken out)").splitlines()[0][:70]
            print(f"{'caught  ' if good else 'SURVIVED'} {mutant.name}: {mutant.file}: {first}", flush=True)
            if not good:
                print(f"         pytest gives {code}: {output[-600:]}")
    many = len(mutants)
    print(f"{many - survived} of {many} mutants caught, in {time.monotonic() - started:.0f} s")
    return 1 if survived or unsound or not many else 0


if __name__ == "__main__":
    raise SystemExit(main())
