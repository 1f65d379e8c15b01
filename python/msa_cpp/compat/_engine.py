"""Replacing functions of an inference engine, in every module that holds them, and taking it back.

Only what is known is replaced: another version, another signature, or another set of functions is
refused by name, before anything changes. A call that a replacement does not serve raises
NotImplementedError before it writes, and goes to the original then; each reason is logged once.
"""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
import sys
from collections.abc import Callable
from typing import Any

_log = logging.getLogger("msa_cpp.compat")


class Engine:
    """One engine's functions and their replacements.

    Args:
        name: its package, as "vllm".
        versions: the versions whose functions are known; "0.33" stands for 0.33.0, 0.33.1, ...
        modules: module -> replacements, each under the name of what it replaces. A replacement
            takes every argument of the original by name and may take more; what it can do without
            has a default.
    """

    def __init__(self, name: str, versions: tuple[str, ...],
                 modules: dict[str, tuple[Callable, ...]]) -> None:
        self.name, self.versions, self.modules = name, versions, modules
        self._patched: list[tuple[Callable, Callable]] = []  # originals and what stands for them
        self._said: set[tuple[str, str]] = set()

    def patch(self) -> None:
        """Puts the replacements in place. Idempotent.

        Errors: ImportError without the engine or one of its modules, RuntimeError for an unknown
        version or signature.
        """
        if self._patched:
            return
        self._check_version()
        found = []
        for module, functions in self.modules.items():
            theirs = importlib.import_module(module)
            for ours in functions:
                original = getattr(theirs, ours.__name__, None)
                if original is None:
                    raise RuntimeError(f"{module}: has no {ours.__name__}; {self._known()}")
                self._check_signature(original, ours)
                found.append((original, ours))
        for original, ours in found:
            shim = self._shim(original, ours)
            _rebind(original, shim)
            self._patched.append((original, shim))
        _log.warning("%s: %s are msa_cpp's now", self.name,  # engines show no less by default
                     ", ".join(ours.__name__ for _, ours in found))

    def unpatch(self) -> None:
        """Puts the originals back, wherever the replacements are by now. Idempotent."""
        for original, shim in self._patched:
            _rebind(shim, original)
        self._patched.clear()
        self._said.clear()

    def original(self, function: Callable) -> Callable:
        """The engine's own function behind a replacement, or the function itself."""
        return next((original for original, shim in self._patched if shim is function), function)

    def _known(self) -> str:
        return f"known is {self.name} {', '.join(self.versions)}"

    def _check_version(self) -> None:
        version = str(getattr(importlib.import_module(self.name), "__version__", "unknown"))
        if not any(version == known or version.startswith(known + ".") for known in self.versions):
            raise RuntimeError(f"{self.name}: got version {version}; {self._known()}")

    def _check_signature(self, original: Callable, ours: Callable) -> None:
        theirs = inspect.signature(original).parameters
        known = inspect.signature(ours).parameters
        unknown = [name for name in theirs if name not in known]
        missing = [name for name, parameter in known.items()
                   if parameter.default is parameter.empty and name not in theirs]
        for names, what in ((unknown, "takes"), (missing, "does not take")):
            if names:
                raise RuntimeError(f"{original.__module__}.{ours.__name__}: {what} "
                                   f"{', '.join(names)}; {self._known()}")

    def _shim(self, original: Callable, ours: Callable) -> Callable:
        names = tuple(inspect.signature(original).parameters)

        @functools.wraps(original)
        def shim(*args: Any, **kwargs: Any) -> Any:
            named = kwargs | dict(zip(names, args))
            try:
                return ours(**named)
            except NotImplementedError as error:
                self._say(ours.__name__, str(error))
            return original(*args, **kwargs)

        return shim

    def _say(self, name: str, reason: str) -> None:
        if (name, reason) not in self._said:
            self._said.add((name, reason))
            _log.warning("%s: %s goes to the original: %s", self.name, name, reason)


def _rebind(old: Callable, new: Callable) -> None:
    """`from module import name` leaves its own reference behind: every module is looked through."""
    for module in list(sys.modules.values()):
        for name, value in list(getattr(module, "__dict__", {}).items()):
            if value is old:
                setattr(module, name, new)
