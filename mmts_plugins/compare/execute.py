"""Running a plan: what was done is kept in a state file, what died is resumed, one failure stops nothing else."""

from __future__ import annotations

import json
import shlex
import time
from pathlib import Path
from typing import Any, Optional

from .._files import replacing
from ..demo.train import run_logged, shown
from ..errors import MMTSError
from .plan import Plan, Run, launched

STATE = "state.json"
SUBMITTED, RUNNING, FAILED, TRAINED, FINISHED = "submitted", "running", "failed", "trained", "finished"


class State:
    """``state.json``: ``{"runs": {name: {"status", "command", "attempts", "seconds", "error"}}}``, replaced whole."""

    def __init__(self, output: Path) -> None:
        self._path = output / STATE
        self.runs: dict[str, dict[str, Any]] = {}
        if self._path.exists():
            try:
                self.runs = dict(json.loads(self._path.read_text(encoding="utf-8"))["runs"])
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise MMTSError(f"{self._path}: cannot be read as the state of a comparison: {error!r}") from error

    def update(self, run: Run, **values: Any) -> None:
        """Change what is known of a run, and write it."""
        self.runs[run.name] = {**self.runs.get(run.name, {}), **values}
        with replacing(self._path) as temporary:
            temporary.write_text(json.dumps({"runs": self.runs}, indent=2) + "\n", encoding="utf-8")


def execute(plan: Plan, launcher: Optional[str] = None, wait: bool = True, retry: bool = False) -> State:
    """Train and evaluate every run that is not finished, in order.

    Args:
        plan: what to run.
        launcher: a scheduler's command, see :func:`~.plan.launched`; evaluations run under it too if ``wait``.
        wait: False for launchers that return at once (``sbatch``): runs are submitted, and evaluated by a later call.
        retry: submit again what was submitted and has not finished.

    Raises:
        MMTSError: the folder belongs to another plan. A run that fails raises nothing: its state says so.
    """
    state = State(plan.output)
    for run in plan.runs:
        command = shown(run.command)  # without the path of this Python: another environment may go on
        known = state.runs.get(run.name, {}).get("command", command)
        if known != command:
            raise MMTSError(
                f"{plan.output}: {run.name} was started with another command; use another -o/--output.\n"
                f"then: {known}\nnow:  {command}"
            )
    for number, run in enumerate(plan.runs, 1):
        say = f"[{number}/{len(plan.runs)}] {run.variant}, seed {run.seed}"
        try:
            _train(plan, run, state, launcher, wait, retry, say)
            _evaluate(plan, run, state, launcher if wait else None, say)
        except MMTSError as error:
            state.update(run, status=FAILED, error=str(error))
            print(f"{say}: failed: {str(error).splitlines()[-1]}", flush=True)
        except BaseException:
            state.update(run, status=FAILED, error="interrupted")
            raise
    return state


def _train(plan: Plan, run: Run, state: State, launcher: Optional[str], wait: bool, retry: bool, say: str) -> None:
    known = state.runs.get(run.name, {})
    if run.done.exists():
        if known.get("status") not in (TRAINED, FINISHED):
            state.update(run, status=TRAINED, command=shown(run.command), error=None)
        return
    if known.get("status") == SUBMITTED and not retry:
        print(f"{say}: submitted, not finished yet (--retry submits it again)", flush=True)
        return
    attempts = known.get("attempts", 0)
    command = launched(run.resumed if attempts else run.command, launcher)
    log = plan.output / "logs" / f"{run.name}.log"
    print(f"{say}: {'resuming' if attempts else 'training'}, log in {log}", flush=True)
    state.update(run, status=RUNNING, command=shown(run.command), attempts=attempts + 1, error=None)
    started = time.monotonic()
    try:
        _logged(command, plan.folder, log)
    finally:  # what a run took in all, over its attempts
        state.update(run, seconds=round(known.get("seconds", 0) + time.monotonic() - started, 1))
    if not wait:
        state.update(run, status=SUBMITTED)
    elif run.done.exists():
        state.update(run, status=TRAINED)
    else:  # OpenCLIP exits with 0 on some errors
        raise MMTSError(f"the command ended without an error, but did not write {run.done} (done:); see {log}")


def _evaluate(plan: Plan, run: Run, state: State, launcher: Optional[str], say: str) -> None:
    if not run.done.exists() or (state.runs[run.name]["status"] == FINISHED and run.result.exists()):
        return
    if not run.result.exists():
        print(f"{say}: evaluating", flush=True)
        run.result.parent.mkdir(parents=True, exist_ok=True)
        _logged(launched(run.evaluation, launcher), plan.folder, plan.output / "logs" / f"{run.name}.eval.log")
    if not run.result.exists():
        raise MMTSError(
            f"the evaluation ended without an error, but did not write {run.result}: use {{result}} in eval:"
        )
    state.update(run, status=FINISHED, error=None)


def _logged(command: list[str], folder: Path, log: Path) -> None:
    """Run with all output appended to a file."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with open(log, "a", encoding="utf-8", buffering=1) as file:
        file.write(f"$ {shlex.join(command)}\n")

        def write(line: str) -> None:
            file.write(line)

        try:
            run_logged(command, folder, write)
        except OSError as error:
            raise MMTSError(f"cannot start {command[0]!r}: {error.strerror}") from error
