"""What an experiment compares: an arm is one way to train and to select blocks.

A new arm is a file in `arms/` with an `ARM`; `facts.py` finds it by itself, under the file's name.
"""

from __future__ import annotations

import importlib.util
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable

from msa_cpp.autograd import MsaConfig
from msa_cpp.train.metrics import Choose
from msa_cpp.train.model import Config, Model
from msa_cpp.train.trainer import Options


@dataclass(frozen=True)
class Size:
    """One size of the experiment; a run from scratch has `steps` steps."""

    config: Config
    context: int
    batch: int
    lr: float
    steps: int
    warmup_steps: int  # of a run from scratch, with full attention
    conversion: tuple[int, ...]  # index-only steps after which a conversion is looked at, ascending
    sparse_steps: int  # of a conversion, after the last of these
    data: dict = field(default_factory=dict)  # of msa_cpp.train.data.Facts
    dtype: str = "f32"
    log_every: int = 10
    arms: tuple[str, ...] = ()  # that run if none are named, the most important first; () for all


@dataclass(frozen=True)
class Arm:
    """name, about: as the table says it. options: what differs from `from_scratch(size)`.

    start: the arm whose weights it starts from. looks: steps at which it is evaluated on the way.
    choose: a selector in the place of the index branch; zero_shot: tried on the dense model too.
    config: what differs in config.json. model: another class of model.
    """

    name: str
    about: str
    options: Callable[[Size], dict] = lambda size: {}
    start: str | None = None
    looks: Callable[[Size], tuple[int, ...]] = lambda size: ()
    choose: Callable[[MsaConfig, int], Choose] | None = None
    config: Callable[[Config], dict] = lambda config: {}
    model: Callable[[Config, int], Model] = Model


def from_scratch(size: Size, seed: int) -> Options:
    """MSA-PT at this size, of which an arm says how it differs."""
    return Options(route="msa-pt", steps=size.steps, warmup_steps=size.warmup_steps,
                   batch=size.batch, context=size.context, lr=size.lr, dtype=size.dtype,
                   log_every=size.log_every, seed=seed)


def arms() -> dict[str, Arm]:
    """All arms of `arms/` by the names of their files, those that others start from first."""
    found = {}
    for path in sorted((Path(__file__).parent / "arms").glob("*.py")):
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        found[path.stem] = module.ARM
    return dict(sorted(found.items(), key=lambda item: item[1].start is not None))
