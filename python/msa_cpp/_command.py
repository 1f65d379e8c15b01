"""What the commands of this package share: errors are one line on stderr, with exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Bad input: one line that names file, key or tensor, what was given and what is supported."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def exit_code(name: str, body: Callable[[], str]) -> int:
    """Runs a command and prints what it says."""
    try:
        print(body())
    except (InputError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 2
    return 0
