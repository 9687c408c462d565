"""Anything may be read: what comes out is a result or one line, soon.

``python -m pytest tests/fuzz --hypothesis-profile=long`` tries ``MMTS_FUZZ_EXAMPLES`` cases a test (default 5,000).
"""

from __future__ import annotations

from typing import Any

from fuzzing import tally


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"fuzzing: {tally['cases']} cases, {tally['refused']} of them refused in one line")
