"""What runs at interpreter start (``mmts_plugins.pth``; ``mmts_plugins.start`` from Python 3.15).

It looks at the arguments: nothing but ``sys`` and ``os`` is imported unless they ask for us. A run armed here and one
armed by ``python -m mmts_plugins run`` are the same from then on.

Why it is on by default: without it a host may read ``--loss mmts`` as an abbreviation of a flag of its own, and train
plain without a word. For the same reason the functions that read such a host's command line are guarded in every
process: a notebook that calls ``main(["--loss", "mmts"])`` and has not armed us is refused. What there is to know of
the hosts stands in :mod:`.patches._before`.
"""

from __future__ import annotations

import os
import sys

from .patches import _before

TYPE_CHECKING = False  # as in _hooks
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from typing import Any, Optional

_started = False
_guarded = False
parsed: dict[str, Any] = {}
"""What a guarded reader of a host's command line last gave, by its module: for who makes the host's model."""


def means_us(value: str) -> bool:
    """Whether a loss of this name is one of ours, or so near to it that nothing else can be meant."""
    letters = "".join(letter for letter in value.lower() if letter.isalnum())
    word = value.lower().replace("_", "-").split("-")[0]
    if "mmts" in letters or word == "mm":
        return True
    one_off = (
        any(word[:i] + word[i + 1 :] == "mmts" for i in range(len(word))),  # a letter too many
        any("mmts"[:i] + "mmts"[i + 1 :] == word for i in range(4)),  # too few
        len(word) == 4 and sum(a != b for a, b in zip(word, "mmts")) == 1,
        sorted(word) == sorted("mmts"),
    )
    return any(one_off)


def _pairs(arguments: Sequence[str]) -> list[tuple[str, str]]:
    """Each word as a flag and its value, which stands behind an ``=`` or is the next word."""
    words = [str(word) for word in arguments]
    split = [(word.partition("="), following) for word, following in zip(words, [*words[1:], ""])]
    return [(name, value if equals else following) for (name, equals, value), following in split]


def asks_for_us(arguments: Sequence[str]) -> bool:
    """Whether a command line carries one of our flags, or a misspelling that a host would swallow."""
    for name, value in _pairs(arguments):
        if name.startswith("--mmts-"):
            return True
        if name in ("--loss", "--los"):  # hosts abbreviate: what --los is read as, --loss is too
            if any(word in each for each in arguments for word in _before.WORDS):
                return True  # whatever it is: that host is asked what it means
            if means_us(value) and (value[:2].lower() == "mm" or _starts_host(arguments)):
                return True
    return False


def swallowed(arguments: Sequence[str]) -> Optional[str]:
    """The first loss flag of a host (whole or abbreviated) that is given a value of ours; ``None`` where none is."""
    for name, value in _pairs(arguments):
        if name.startswith("--los") and means_us(value):
            return f"{name} {value}"
    return None


def guard() -> None:
    """Have the functions that read the hosts' command lines refuse a loss of ours that nobody has taken out before.

    Idempotent. A host that is imported already keeps what it has: others hold the function by now.
    """
    global _guarded
    if _guarded:
        return
    _guarded = True
    from . import _hooks

    for module, names in _before.READERS.items():
        if module not in sys.modules:
            _hooks.after_import(module, _guarding(*names))
    for module in _before.ALWAYS:
        if module not in sys.modules:
            _hooks.after_import(module, _attach)


def _attach(module: Any) -> None:
    """The seams of a module that every process has. Where they are not as we know them nothing is said: a process that
    asks for us stops over it when it is armed, and nobody else need know of us."""
    from contextlib import suppress
    from importlib import import_module

    from .errors import MMTSError

    with suppress(MMTSError):
        import_module(f".patches.{_before.ALWAYS[module.__name__]}", __package__).HOST.attach(module)


def _guarding(reader: str, beside: str) -> Callable[[Any], None]:
    def hook(module: Any) -> None:
        original = getattr(module, reader, None)
        if not callable(original) or not hasattr(module, beside):
            return
        from functools import wraps

        @wraps(original)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            given = args[0] if args else kwargs.get("args")
            if given is None:
                given = sys.argv[1:]
            found = swallowed(given) if isinstance(given, (list, tuple)) else None
            if found is not None:
                _tell_swallowed(module.__name__, found)
            parsed[module.__name__] = result = original(*args, **kwargs)
            return result

        setattr(module, reader, guarded)

    return hook


def _tell_swallowed(module: str, found: str) -> None:
    from .errors import ConfigError
    from .hosts.registry import quiet_excepthook

    quiet_excepthook()
    raise ConfigError(
        f"{found}: {module} would take this for a flag of its own and train without MM-TS. Write --loss mmts, on the "
        "command line of the process; in a notebook or a script of yours call mmts_plugins.install() before the "
        "trainer is imported"
    )


def start() -> None:
    """Arm the hosts' seams if this process asks for MM-TS. Idempotent: a virtual environment runs a ``.pth`` twice."""
    global _started
    guard()
    switch = os.environ.get("MMTS")
    arguments = list(getattr(sys, "orig_argv", sys.argv))
    asked = asks_for_us(arguments)
    wants_help = ("--help" in arguments or "-h" in arguments) and _starts_host(arguments)
    if _started or not (asked or switch == "1" or (wants_help and switch != "0")):
        return
    _started = True
    if switch == "0":
        # Switched off, yet asked for: the host must not mistake our flags for its own.
        _refuse("MMTS=0 switches mmts-plugins off, but the command line asks for it; unset MMTS or drop the flags")
        return
    try:
        from .hosts import registry

        registry.install_all()
        if asked and not _starts_host(arguments):
            _tell_broken(arguments)
    except Exception as error:  # an exception here would be printed by site and then ignored
        _refuse(f"mmts-plugins could not start: {type(error).__name__}: {error}")


def _starts_host(arguments: Sequence[str]) -> bool:
    return any(map(_before.is_started_by, arguments))


def _tell_broken(arguments: Sequence[str]) -> None:
    """Which adapters of others could not be loaded, where one may be meant: its host would train without us."""
    from .hosts import registry

    for each in registry.broken():
        named = any(each.name.lower() in argument.lower() for argument in arguments)
        if not named:
            print(f"mmts: warning: {each}; its host would train without MM-TS", file=sys.stderr, flush=True)
            continue
        print(f"mmts: error: {each}; without it --loss mmts would do nothing", file=sys.stderr, flush=True)
        os._exit(2)  # an exception here would be printed by site and then ignored


def _refuse(reason: str) -> None:
    """Make the hosts' argument parsing fail: nothing else of this process is any of our business."""
    from . import _hooks
    from .errors import one_line

    def refuse(module: object) -> None:
        if _before.is_foreign(module):
            return
        raise SystemExit(f"mmts: error: {one_line(reason)}")

    for module in _before.PARSED_IN:
        _hooks.after_import(module, refuse)
