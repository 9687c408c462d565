"""Running a plan: what was done is kept in a state file, what died is resumed, one failure stops nothing else."""

from __future__ import annotations

import json
import os
import shlex
import time
import zipfile
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, Optional

from .._files import replacing
from ..errors import MMTSError, last_resort, reading, shown
from ..fields import NUMBER, TEXT, WHOLE, Field, check_mapping
from ..processes import run_logged
from ..processes import shown as typed
from . import tables
from .lock import locked
from .plan import Plan, Run, launched

STATE = "state.json"
SUBMITTED, RUNNING, FAILED, TRAINED, FINISHED = "submitted", "running", "failed", "trained", tables.FINISHED
_LONGEST = 10_000_000  # characters: whatever a plan leads to can be read again
_FIELDS = {
    "status": Field(TEXT, choices=(SUBMITTED, RUNNING, FAILED, TRAINED, FINISHED)),
    "command": Field(TEXT, longest=_LONGEST),
    "attempts": Field(WHOLE, least=0),
    "seconds": Field(NUMBER, least=0),
    "error": Field(TEXT, null=True, empty=True, longest=_LONGEST),
}
_CHECKPOINTS = (".pt", ".pth", ".ckpt")
# Written by the job itself, so that it is proof wherever it ran. Appended: a launcher may start several of it.
_REPORTING = '"$@"; code=$?; echo "$code" >> "$0"; exit "$code"'


class State:
    """``state.json``: ``{"runs": {name: {"status", "command", "attempts", "seconds", "error"}}}``, replaced whole.

    ``trained`` is a run whose command ended with 0 and left its file; nothing else proves that it did.

    Raises:
        MMTSError: it is damaged.
    """

    def __init__(self, output: Path) -> None:
        self._path = output / STATE
        self.runs: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            what = "cannot be read as the state of a comparison (without it, all runs are new)"
            with reading(self._path, what):
                content = json.loads(self._path.read_text(encoding="utf-8"))
                if not isinstance(content, dict) or list(content) != ["runs"] or not isinstance(content["runs"], dict):
                    raise MMTSError(f"{self._path}: {what}: expected {{'runs': {{...}}}}, not {shown(content)}")
            for name, known in content["runs"].items():
                self.runs[name] = check_mapping(
                    f"{self._path}: run {shown(name)}", known, _FIELDS, ["status"], MMTSError
                )

    def of(self, run: Run) -> dict[str, Any]:
        """What is known of a run; nothing if it was never started."""
        return self.runs.get(run.name, {})

    def update(self, run: Run, **values: Any) -> None:
        """Change what is known of a run, and write it."""
        self.runs[run.name] = {**self.of(run), **values}
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"runs": self.runs}, indent=2) + "\n", encoding="utf-8")


def execute(
    plan: Plan, launcher: Optional[str] = None, wait: bool = True, retry: bool = False, accept: bool = False
) -> State:
    """Train and evaluate every run that is not finished, in order.

    Args:
        plan: what to run.
        launcher: a scheduler's command, see :func:`~.plan.launched`; evaluations run under it too if ``wait``.
        wait: False for launchers that return at once (``sbatch``): runs are submitted, and evaluated by a later call.
        retry: submit again what was submitted and has not finished.
        accept: take a ``done`` file that is there for finished, though no command of ours is known to have made it.

    Raises:
        MMTSError: the folder belongs to another plan, or another comparison is at work in it. A run that fails raises
            nothing: its state says so.
    """
    if not plan.folder.is_dir():
        raise MMTSError(f"{plan.folder}: no such folder; the plan's commands are to run there (folder:)")
    if plan.output.exists() and not plan.output.is_dir():
        raise MMTSError(f"{plan.output}: is no folder; -o/--output names one")
    plan.output.mkdir(parents=True, exist_ok=True)
    with locked(plan.output) as lock:
        state = State(plan.output)
        for run in plan.runs:
            now = typed(run.command)  # without the path of this Python: another environment may go on
            then = state.of(run).get("command", now)
            if then != now:
                raise MMTSError(
                    f"{run.name} was started with another command: {_difference(then, now)}; use another -o/--output "
                    f"than {plan.output}"
                )
        for number, run in enumerate(plan.runs, 1):
            say = f"[{number}/{len(plan.runs)}] {run.variant}, seed {run.seed}"
            step = _Step(plan, run, state, launcher, wait, lock, say)
            try:
                step.train(retry, accept)
                step.evaluate()
            except (MMTSError, OSError) as error:
                reason = last_resort(error)
                state.update(run, status=TRAINED if step.trained() else FAILED, error=reason)
                print(f"{say}: failed: {reason}", flush=True)
            except BaseException:
                if state.of(run).get("status") == RUNNING:
                    state.update(run, status=FAILED, error="interrupted")
                raise
    return state


def _difference(then: str, now: str) -> str:
    """The words in which two commands differ, without what they begin and end with alike."""
    old, new = then.split(), now.split()
    start = next((i for i, (a, b) in enumerate(zip(old, new)) if a != b), min(len(old), len(new)))
    old, new = old[start:], new[start:]
    end = next((i for i, (a, b) in enumerate(zip(old[::-1], new[::-1])) if a != b), min(len(old), len(new)))
    before, after = (" ".join(words[: len(words) - end]) for words in (old, new))
    return f"then {shown(before)}, now {shown(after)}"


class _Step:
    """One run of a plan, on its way."""

    def __init__(
        self, plan: Plan, run: Run, state: State, launcher: Optional[str], wait: bool, lock: Optional[int], say: str
    ) -> None:
        self._plan, self._run, self._state, self._say = plan, run, state, say
        self._launcher, self._wait, self._lock = launcher, wait, lock
        self._log = plan.output / "logs" / f"{run.name}.log"

    def trained(self) -> bool:
        return self._state.of(self._run).get("status") in (TRAINED, FINISHED)

    def train(self, retry: bool, accept: bool) -> None:
        """Unless that is done: proved by an exit status of 0 and the file that it leaves, both."""
        run, known = self._run, self._state.of(self._run)
        status, attempts = known.get("status"), known.get("attempts", 0)
        there = run.done.exists()
        if self.trained() and there:
            return
        if accept and there:
            self._trained("taken as it is")
            return
        if status == SUBMITTED:
            code = _exit_status(self._exit_file(attempts))
            if code == 0:
                self._trained("the job ended without an error")
                return
            if not retry:
                if code is not None:
                    raise MMTSError(f"the job ended with exit code {code}; see {self._log} or your scheduler's log")
                print(f"{self._say}: submitted, not finished yet (--retry submits it again)", flush=True)
                return
        elif there and not attempts:
            raise MMTSError(
                f"{run.done} is there, but no command of this comparison made it: take it as finished "
                "(--accept-done), or move it away"
            )
        if attempts:
            self._set_aside()
        self._launch(run.resumed if attempts else run.command, known, attempts + 1)

    def _launch(self, command: list[str], known: dict[str, Any], attempt: int) -> None:
        run, state = self._run, self._state
        print(f"{self._say}: {'resuming' if attempt > 1 else 'training'}, log in {self._log}", flush=True)
        # A job that may have been submitted counts as one: twice in a folder is worse than not at all.
        status = RUNNING if self._wait else SUBMITTED
        state.update(run, status=status, command=typed(run.command), attempts=attempt, error=None)
        if not self._wait:
            file = self._exit_file(attempt)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.unlink(missing_ok=True)
            self._run_logged(launched(reporting(command, file), self._launcher), self._log)
            return
        started = time.monotonic()
        try:
            self._run_logged(launched(command, self._launcher), self._log)
        finally:  # what a run took in all, over its attempts
            state.update(run, seconds=round(known.get("seconds", 0) + time.monotonic() - started, 1))
        self._trained("the command ended without an error")

    def _trained(self, why: str) -> None:
        """OpenCLIP exits with 0 on some errors."""
        done = self._run.done
        if not done.exists():
            raise MMTSError(f"{why}, but did not write {done} (done:); see {self._log}")
        if torn(done):
            raise MMTSError(f"{why}, but {done} (done:) is half a file")
        self._state.update(self._run, status=TRAINED, command=typed(self._run.command), error=None)

    def _set_aside(self) -> None:
        """What a killed attempt left half written would stop the host again: OpenCLIP resumes from the last ``.pt``."""
        run = self._run
        unfinished = [run.done] if run.done.exists() and (run.resumed == run.command or torn(run.done)) else []
        if run.own_folder and run.done.parent.is_dir():
            # tmp.pt and the like are the host's to write over, and not what it resumes from.
            names = (path for path in run.done.parent.iterdir() if not path.name.startswith((".", "tmp")))
            unfinished += sorted(path for path in names if path != run.done and torn(path))
        for path in unfinished:
            new = next(each for each in _names_aside(path) if not os.path.lexists(each))
            path.rename(new)
            print(f"{self._say}: {path} was left by a killed attempt: moved to {new.name}", flush=True)

    def evaluate(self) -> None:
        """Unless that is done; an evaluation too is whole only if its command ended with 0."""
        run, state = self._run, self._state
        if not self.trained() or (state.of(run)["status"] == FINISHED and run.result.exists()):
            return
        state.update(run, status=TRAINED, error=None)
        print(f"{self._say}: evaluating", flush=True)
        run.result.parent.mkdir(parents=True, exist_ok=True)
        if run.result.exists():  # by an evaluation that did not end; mmts eval would refuse to replace it
            run.result.replace(run.result.with_name(run.result.name + ".old"))
        command = launched(run.evaluation, self._launcher if self._wait else None)
        self._run_logged(command, self._plan.output / "logs" / f"{run.name}.eval.log", wait=True)
        if not run.result.exists():
            raise MMTSError(
                f"the evaluation ended without an error, but did not write {run.result}: use {{result}} in eval:"
            )
        tables.metrics(run.result)
        state.update(run, status=FINISHED, error=None)

    def _run_logged(self, command: list[str], log: Path, wait: Optional[bool] = None) -> None:
        """With all output appended to a file. What is waited for ends with us; what is submitted does not."""
        log.parent.mkdir(parents=True, exist_ok=True)
        with open(log, "a", encoding="utf-8", errors="surrogateescape", buffering=1) as file:
            file.write(f"$ {shlex.join(command)}\n")

            def write(line: str) -> None:
                file.write(line)

            run_logged(command, self._plan.folder, write, self._lock, self._wait if wait is None else wait)

    def _exit_file(self, attempt: int) -> Path:
        return exit_file(self._plan, self._run, attempt)


def exit_file(plan: Plan, run: Run, attempt: int) -> Path:
    """Where a submitted job writes its exit status: one file for each attempt, so that none speaks for another."""
    return plan.output / "logs" / f"{run.name}.exit-{attempt}"


def reporting(command: list[str], file: Path) -> list[str]:
    """The command, with its exit status appended to a file when it ends."""
    return ["sh", "-c", _REPORTING, str(file), *command]


def _exit_status(file: Path) -> Optional[int]:
    """What a submitted job ended with; ``None`` while it has not. Of several tasks, the first that failed.

    Raises:
        MMTSError: somebody else wrote the file.
    """
    if not file.exists():
        return None
    with reading(file, "cannot be read as the exit status of a job"):
        codes = [int(line) for line in file.read_text(encoding="utf-8").split("\n")[:-1]]
    return next(filter(None, codes), 0) if codes else None


def torn(path: Path) -> bool:
    """Whether a checkpoint is the beginning of one: ``torch.save`` writes a zip, whose table of contents comes last.

    Checkpoints of other forms are never torn for all that can be told. Contents are not read: they may be huge.
    """
    if path.suffix not in _CHECKPOINTS or not path.is_file():
        return False
    with path.open("rb") as file:
        if not b"PK\3\4".startswith(file.read(4)):
            return False
    try:
        zipfile.ZipFile(path).close()
    except OSError:
        raise
    except Exception:  # BadZipFile, and whatever else half a table of contents leads to
        return True
    return False


def _names_aside(path: Path) -> Iterator[Path]:
    """Names that no host takes for a checkpoint."""
    yield path.with_name(f"{path.name}.unfinished")
    for number in count(2):
        yield path.with_name(f"{path.name}.unfinished-{number}")
