"""Running a function right after a module is imported, before whoever imported it binds its names.

Nothing but ``sys`` is imported here: every interpreter does. A hook that raises fails the import: a host that cannot be
patched must not train.
"""

from __future__ import annotations

import sys

TYPE_CHECKING = False  # typing.TYPE_CHECKING without the milliseconds of importing typing
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any, Optional

    Hook = Callable[[ModuleType], None]

_hooks: dict[str, list[Hook]] = {}


class HalfImported(ImportError):
    """A hook came while its module was still being executed: too early to patch it, too late to be told."""


def after_import(module: str, hook: Hook) -> None:
    """Call ``hook(module)`` after each execution of ``module``; at once if it is imported already.

    Raises:
        HalfImported: the module is being imported at this moment.
    """
    loaded = sys.modules.get(module)
    if loaded is not None:
        spec = getattr(loaded, "__spec__", None)
        if getattr(spec, "_initializing", False):
            raise HalfImported(f"{module} is half imported; install mmts_plugins before importing it")
        hook(loaded)
    _hooks.setdefault(module, []).append(hook)
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def remove(module: str, hook: Hook) -> None:
    """Forget a hook. The finder leaves ``sys.meta_path`` with the last one."""
    hooks = _hooks.get(module, [])
    if hook in hooks:
        hooks.remove(hook)
    if not hooks:
        _hooks.pop(module, None)
    if not _hooks and _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


class _Finder:
    """Lets the finders behind it find the module, and adds the hooks to its loader's last step.

    Those before it were asked before. All others would be wrong: a second copy of this module has a finder, too, and
    the two would ask each other for ever.
    """

    def find_spec(
        self, fullname: str, path: Optional[Sequence[str]] = None, target: Optional[ModuleType] = None
    ) -> Optional[ModuleSpec]:
        if fullname not in _hooks:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 if self in finders else 0 :]:
            find = getattr(finder, "find_spec", None)
            spec: Optional[ModuleSpec] = find(fullname, path, target) if find else None
            if spec is not None:
                if hasattr(spec.loader, "exec_module"):
                    _extend(spec, fullname)
                return spec
        return None


_finder: Any = _Finder()


def _extend(spec: Any, name: str) -> None:
    loader = spec.loader
    execute = loader.exec_module
    mark = (name, _finder)
    if getattr(execute, "_mmts_hooks", None) == mark:
        return  # a loader that others share, found again

    def exec_module(module: ModuleType) -> None:
        execute(module)
        if module.__name__ == name:  # a zip file has one loader for all its modules
            for hook in list(_hooks.get(name, ())):
                hook(module)

    exec_module._mmts_hooks = mark  # type: ignore[attr-defined]
    try:
        # On the instance, not a wrapper around it: runpy, pkgutil and inspect ask loaders for more than exec_module.
        loader.exec_module = exec_module
    except (AttributeError, TypeError):  # a loader that takes no attributes
        spec.loader = _Loader(loader, exec_module)


class _Loader:
    """Another loader with a last step added."""

    def __init__(self, loader: Any, exec_module: Any) -> None:
        self._loader, self.exec_module = loader, exec_module

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)
