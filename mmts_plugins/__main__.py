"""``python -m mmts_plugins``: the same as the command ``mmts``."""

from __future__ import annotations

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
