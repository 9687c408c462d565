"""A trainer and its seams: installing the table of them, taking it out again, saying what state each is in.

A seam is a function, or a method of a class, that we replace right after its module is imported, before other modules
bind it. The replacement calls the original wherever the run does not ask for us. Classes stay what they are: picklable,
and the same object for whoever imported them.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import wraps
from importlib import metadata
from pathlib import Path
from types import CellType, ModuleType
from typing import TYPE_CHECKING, Any, Optional

from .. import _hooks, options
from .._startup import asks_for_us
from ..errors import SeamError, shown

if TYPE_CHECKING:
    from .adapter import Adapter

logger = logging.getLogger(__name__)

Wrapper = Callable[..., Any]


@dataclass(frozen=True)
class Seam:
    """One function or method of a host.

    Attributes:
        module, attribute: where it is *defined* (not where it is re-exported). A method is ``"Class.method"``.
        parameters: names that must be among its parameters; what our wrapper relies on.
        wrapper: ``wrapper(original, *args, **kwargs)``, called instead of it.
        required: whether a host without this attribute is one we do not know. ``False`` where host versions differ.
        uses: names of attributes that its body must read, where our wrapper relies on that.
        takes_flags: whether the wrapper is what takes our flags off the command line (:func:`.options.split_flags`).
            A run that asks for a schedule stops where it does not.
        always: whether every process has it, asked for or not: its wrapper passes through what is none of ours.
    """

    module: str
    attribute: str
    parameters: tuple[str, ...]
    wrapper: Wrapper
    required: bool = True
    uses: tuple[str, ...] = ()
    takes_flags: bool = False
    always: bool = False

    def __str__(self) -> str:
        return f"{self.module}.{self.attribute}"

    def current(self, module: Optional[ModuleType]) -> Any:
        """What stands there now; ``None`` where nothing does."""
        found: Any = module
        for name in self.attribute.split("."):
            found = getattr(found, name, None)
        return found

    def put(self, module: ModuleType, value: Any) -> None:
        *owners, name = self.attribute.split(".")
        owner: Any = module
        for part in owners:
            owner = getattr(owner, part)
        setattr(owner, name, value)


@dataclass
class Host:
    """A trainer and its seams.

    Attributes:
        name: as users write it.
        distribution: the name under which it is installed.
        package: what it is imported as; says the version of a checkout that shadows an installed one.
        versions: the range of versions that these seams were run on, for messages.
        seams: in no particular order; each is installed on its own.
        start_modules: what ``python -m`` or a launcher is given to start this host: modules, or names of scripts. Of a
            library that scripts of the users' own import, ``None``: any target may be one.
        imported_as: of such a library, what a script that imports it has in its text; empty: nothing is asked for.
        adapters: makes its conventions, one for each kind of run; called only where they are needed, so that its module
            may import what is slow to import.
        on_import: functions called right after a module of the host is imported, before its seams are looked at.
        checkout: for a host that is no package: where to get it. It counts as installed where it can be imported.
        root_files: for a checkout whose modules have names that others use too (``utils``, ``model``): files at its
            root that tell it from them. A module of one of our names elsewhere is foreign, and never touched.
        enable: of a library whose trainers are objects: takes one and our flags, by name, and tells whether it is one
            of its own and is scheduled from now on.
        needs: modules of the host that it imports only once it trains, each with what to do where that fails.
    """

    name: str
    distribution: str
    package: str
    versions: str
    seams: Sequence[Seam]
    start_modules: Optional[tuple[str, ...]] = None
    adapters: Callable[[], Sequence[Adapter]] = tuple
    on_import: Mapping[str, Callable[[ModuleType], None]] = field(default_factory=dict)
    checkout: str = ""
    root_files: tuple[str, ...] = ()
    imported_as: str = ""
    enable: Optional[Callable[[Any, Mapping[str, Any]], bool]] = None
    needs: Mapping[str, str] = field(default_factory=dict)
    _imports: list[str] = field(default_factory=list)
    _hooks: dict[Seam, Callable[[ModuleType], None]] = field(default_factory=dict)
    _replacements: dict[Seam, Any] = field(default_factory=dict)

    def check_fields(self) -> None:
        """Of an adapter by somebody else: that it is filled in.

        Raises:
            TypeError: naming the field that is not what it should be.
        """
        texts, several = (self.name, self.distribution, self.package, self.versions), (list, tuple)
        right = {
            "name, distribution, package, versions": all(isinstance(each, str) and each for each in texts),
            "seams": isinstance(self.seams, several) and all(isinstance(seam, Seam) for seam in self.seams),
            "adapters": callable(self.adapters),
            "start_modules": self.start_modules is None
            or (isinstance(self.start_modules, several) and all(isinstance(each, str) for each in self.start_modules)),
            "on_import": isinstance(self.on_import, Mapping) and all(map(callable, self.on_import.values())),
        }
        for name, good in right.items():
            if not good:
                raise TypeError(f"its Host is not filled in: {name}")

    def version(self) -> str:
        """The version imported, else installed; ``"not installed"`` where there is none."""
        root = None
        if self.root_files:  # not by a search for the module: it would import a foreign parent package
            root = next((folder for folder in sys.path if self._is_root(folder)), None)
            if root is None:
                return "not installed"
        imported = getattr(sys.modules.get(self.package), "__version__", None)
        if imported is not None:
            return str(imported)
        if root is not None:
            installed = next(iter(metadata.distributions(name=self.distribution, path=[root])), None)
            return _commit(Path(root)) if installed is None else installed.version
        if self.checkout:
            try:
                found = importlib.util.find_spec(self.seams[0].module)
            except ImportError:
                found = None
            if found is None or found.origin is None:
                return "not installed"
            return _commit(Path(found.origin).resolve().parents[self.seams[0].module.count(".")])
        try:
            return metadata.version(self.distribution)
        except metadata.PackageNotFoundError:
            return "not installed"

    def owns(self, module: ModuleType) -> bool:
        """Whether a module of one of our names is this host's, and not another package's."""
        file = getattr(module, "__file__", None)
        if not self.root_files or file is None:
            return not self.root_files
        root = os.path.abspath(file)
        for _ in range(module.__name__.count(".") + 1):
            root = os.path.dirname(root)
        return self._is_root(root)

    def _is_root(self, folder: str) -> bool:
        return all(os.path.exists(os.path.join(folder, name)) for name in self.root_files)

    def starts(self, target: str, as_module: bool) -> bool:
        """Whether this host is what a launcher is given: a module, or the path of a script."""
        if self.start_modules is None:
            return not self.imported_as or self.imported_as in _text_of(target, as_module)
        if as_module:
            return target in self.start_modules
        folder, name = os.path.split(os.path.abspath(target))
        return name in self.start_modules and (not self.root_files or self._is_root(folder))

    def unmet(self) -> Optional[str]:
        """Which of :attr:`needs` cannot be imported, why, and what to do; ``None`` where all can."""
        for name, advice in self.needs.items():
            try:
                importlib.import_module(name)
            except Exception as error:  # code for another version of a library fails in many ways
                return f"{name} cannot be imported: {error}. {advice}"
        return None

    def install(self, module: Optional[str] = None) -> None:
        """Arm every seam, or those of one module. Idempotent; modules imported already are patched at once.

        Raises:
            SeamError: a module is there and its seam is not what we know, or others hold the original already.
        """
        for name, action in self.on_import.items():
            if name not in self._imports and module in (None, name) and not self._is_taken(name):
                _hooks.after_import(name, action)
                self._imports.append(name)
        for seam in self.seams:
            if seam not in self._hooks and module in (None, seam.module) and not self._is_taken(seam.module):
                hook = self._hook(seam)
                _hooks.after_import(seam.module, hook)
                self._hooks[seam] = hook

    def attach(self, module: ModuleType) -> None:
        """Install the seams of a module that has just been executed, those that every process has. Idempotent.

        Raises:
            SeamError: one of them is not what we know.
        """
        for seam in self.seams:
            if seam.always and seam.module == module.__name__ and seam not in self._hooks:
                hook = self._hook(seam)
                hook(module)
                self._hooks[seam] = hook

    def _is_taken(self, name: str) -> bool:
        """Whether a foreign module goes by this name, perhaps half imported yet."""
        loaded = sys.modules.get(name)
        return loaded is not None and not self.owns(loaded)

    def uninstall(self) -> None:
        """Put the originals back. What another tool has wrapped since stays, and passes everything through."""
        while self._imports:
            module_name = self._imports.pop()
            _hooks.remove(module_name, self.on_import[module_name])
        for seam, hook in list(self._hooks.items()):
            _hooks.remove(seam.module, hook)
            del self._hooks[seam]
            module = sys.modules.get(seam.module)
            current = seam.current(module)
            # By identity: functools.wraps copies our marker onto what another tool puts around us.
            if module is not None and current is not None and current is self._replacements.pop(seam, None):
                seam.put(module, current.__wrapped__)
            elif current is not None and _wrapped_inside(current, self._mark(seam)):
                logger.warning("MM-TS: %s was wrapped by another tool after us; switched off in place", seam)

    def tell_wrappers(self) -> None:
        """Before a run builds anything: whose wrappers stand around its seams beside ours.

        Raises:
            SeamError: something else stands in the place of a seam, and does not lead to ours.
        """
        for seam, replacement in self._replacements.items():
            module = sys.modules.get(seam.module)
            current = seam.current(module)
            if module is None or current is None or not self.owns(module):
                continue
            if current is replacement:
                others = [each for each in _layers(replacement.__wrapped__)[:-1] if _is_foreign(each, seam)]
                if others:
                    logger.warning("MM-TS: %s is wrapped by another tool: %s", seam, _made_by(others[0]))
            elif _leads_to(current, self._mark(seam)):
                logger.warning("MM-TS: %s was wrapped by another tool after us: %s", seam, _made_by(current))
            else:
                raise SeamError(
                    f"{self.name} {self.version()}: another tool ({_made_by(current)}) put its own in the place of "
                    f"{seam} after mmts-plugins was armed, so the schedule would not apply; switch that tool off, or "
                    "have it call what it finds there (functools.wraps tells that it does)"
                )

    def status(self, seam: Seam) -> str:
        """One of ``installed``, ``armed`` (module not imported yet), ``absent``, ``not armed``."""
        module = sys.modules.get(seam.module)
        if module is None or not self.owns(module):
            return "armed" if seam in self._hooks else "not armed"
        current = seam.current(module)
        if current is None:
            return "absent"
        return "installed" if _wrapped_inside(current, self._mark(seam)) else "not armed"

    def check(self, seam: Seam, module: ModuleType) -> Any:
        """The seam's original.

        Raises:
            SeamError: it is missing or lacks a parameter; the message names host, version and seam.
        """
        original = seam.current(module)
        if original is None:
            if not seam.required:
                return None
            raise SeamError(
                f"{self.name} {self.version()}: {seam} is gone; this mmts-plugins knows {self.distribution} "
                f"{self.versions}. Train without --loss mmts, or install a version it knows"
            )
        try:
            known = inspect.signature(original).parameters
        except (TypeError, ValueError):  # no function at all, or one written in C
            raise SeamError(
                f"{self.name} {self.version()}: {seam} has changed: it is {shown(original)}, no function whose "
                f"parameters can be seen; this mmts-plugins knows {self.distribution} {self.versions}"
            ) from None
        lacking = [name for name in seam.parameters if name not in known]
        if lacking:
            raise SeamError(
                f"{self.name} {self.version()}: {seam} has changed: no parameter {lacking[0]!r} in "
                f"({', '.join(known)}); this mmts-plugins knows {self.distribution} {self.versions}"
            )
        code = getattr(inspect.unwrap(original), "__code__", None)
        unused = set(seam.uses) - set(code.co_names if code is not None else ())
        if unused:
            raise SeamError(
                f"{self.name} {self.version()}: {seam} has changed: it does not use {min(unused)!r}, so the schedule "
                f"would not apply; this mmts-plugins knows {self.distribution} {self.versions}"
            )
        return original

    def _mark(self, seam: Seam) -> str:
        """What tells our function there: a library that several hosts build on has one of each."""
        return f"{self.name}: {seam}"

    def _hook(self, seam: Seam) -> Callable[[ModuleType], None]:
        def hook(module: ModuleType) -> None:
            if not self.owns(module):
                return
            current = seam.current(module)
            if current is not None and _wrapped_inside(current, self._mark(seam)):
                return
            original = self.check(seam, module)
            if original is None:
                return
            self._replacements[seam] = self._replacement(seam, original)
            seam.put(module, self._replacements[seam])
            holders = _holders(original, seam.attribute)
            if holders:
                seam.put(module, original)
                raise SeamError(
                    f"{self.name}: {', '.join(holders)} imported {seam} before mmts_plugins was installed; call "
                    "mmts_plugins.install() before importing the host"
                )
            logger.debug("MM-TS: patched %s", seam)

        return hook

    def _replacement(self, seam: Seam, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def replacement(*args: Any, **kwargs: Any) -> Any:
            if seam not in self._hooks:  # uninstalled, but somebody still holds us
                return original(*args, **kwargs)
            result = seam.wrapper(original, *args, **kwargs)
            if seam.takes_flags and asks_for_us(sys.argv[1:]) and not options.taken:
                raise SeamError(
                    f"{self.name} {self.version()}: its adapter left --loss and --mmts-* on the command line, so the "
                    "schedule would not apply"
                )
            return result

        replacement._mmts_seam = self._mark(seam)  # type: ignore[attr-defined]
        return replacement


def _text_of(target: str, as_module: bool) -> str:
    """The source of what a launcher is given; nothing where there is none to read."""
    try:
        path: Optional[str] = target
        if as_module:
            found = importlib.util.find_spec(target)
            path = None if found is None else found.origin
        return "" if path is None else Path(path).read_text(encoding="utf-8", errors="replace")
    except (OSError, ImportError, ValueError):
        return ""


def _commit(root: Path) -> str:
    """What a checkout is at: the commit's first digits, as far as git's files tell."""
    try:
        head = (root / ".git" / "HEAD").read_text().strip()
        if head.startswith("ref: "):
            head = (root / ".git" / head[len("ref: ") :]).read_text().strip()
    except (OSError, UnicodeDecodeError):  # no repository, or packed references
        return "checkout"
    return f"checkout {head[:7]}"


def _layers(function: Any) -> list[Any]:
    """A function and what it wraps, outermost first."""
    layers = [function]
    while getattr(layers[-1], "__wrapped__", None) is not None and len(layers) < 100:
        layers.append(layers[-1].__wrapped__)
    return layers


def _home(function: Any) -> str:
    """The module whose code this is, which is not what ``functools.wraps`` says."""
    wrapper = getattr(function, "_self_wrapper", function)  # wrapt's proxies
    names = getattr(wrapper, "__globals__", None)
    return str(type(wrapper).__module__ if names is None else names.get("__name__"))


def _made_by(function: Any) -> str:
    code = getattr(getattr(function, "_self_wrapper", function), "__code__", None)
    return _home(function) + (f", {code.co_filename}:{code.co_firstlineno}" if code is not None else "")


def _is_foreign(function: Any, seam: Seam) -> bool:
    """Not the host's own decorators, nor those of torch and the standard library that it uses."""
    own = (seam.module.split(".")[0], "mmts_plugins", "torch", "functools", "contextlib")
    return _home(function).split(".")[0] not in own


def _wrapped_inside(function: Any, marker: str) -> bool:
    return any(getattr(layer, "_mmts_seam", None) == marker for layer in _layers(function))


def _leads_to(function: Any, marker: str, deep: int = 3) -> bool:
    """Whether ours stands inside a function, or among what its code refers to: not every wrapper says what it wraps."""
    if _wrapped_inside(function, marker):
        return True
    code = getattr(function, "__code__", None)
    if deep == 0 or not (code or callable(function)):
        return False
    inside = [cell.cell_contents for cell in getattr(function, "__closure__", None) or () if cell != _EMPTY]
    if code is not None:
        inside += [function.__globals__[name] for name in code.co_names if name in function.__globals__]
        inside += [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    else:
        inside += [getattr(function, "func", None), getattr(function, "__func__", None), *_attributes(function)]
    return any(callable(each) and _leads_to(each, marker, deep - 1) for each in inside)


_EMPTY = CellType()


def _attributes(thing: Any) -> list[Any]:
    return [] if isinstance(thing, type) else list(getattr(thing, "__dict__", {}).values())


def _holders(original: Any, attribute: str) -> list[str]:
    """Modules that bound the original under its own name before we replaced it."""
    return sorted(
        name
        for name, module in list(sys.modules.items())
        if isinstance(module, ModuleType) and vars(module).get(attribute) is original
    )
