"""What the commands of this package share: errors are one line on stderr.

Their exit code is 2 for bad input and 1 where valid input led to what is no number.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn


class InputError(ValueError):
    """Bad input: one line that names file, key or tensor, what was given and what is supported."""


class NumericError(ArithmeticError):
    """A computation on valid input made NaN or infinity: one line that says where."""


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def device_here(name: str) -> str:
    """A value of --device that this machine has, as an argument's `type`."""
    import torch

    here = ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",)
    if name.partition(":")[0] not in here:
        raise argparse.ArgumentTypeError(f"got {name}, supported here: {', '.join(here)}")
    return name


def exit_code(name: str, body: Callable[[], str]) -> int:
    """Runs a command and prints what it says."""
    try:
        print(body())
    except (InputError, NumericError, OSError) as error:
        print(f"{name}: error: {error}", file=sys.stderr)
        return 1 if isinstance(error, NumericError) else 2
    return 0
