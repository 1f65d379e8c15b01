"""What vLLM imports for 4-bit caches, which this version does not have."""

from __future__ import annotations

from typing import Any, NoReturn


def __getattr__(name: str) -> Any:
    if name.startswith("__"):
        raise AttributeError(name)

    def missing(*args: Any, **kwargs: Any) -> NoReturn:
        raise NotImplementedError(f"{name}: 4-bit caches are not in this version")

    return missing
