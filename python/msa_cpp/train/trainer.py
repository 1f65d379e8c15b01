"""The training loop: stages, optimiser, accumulation, ranks, log and checkpoints.

Two losses, `lm + lambda * kl`: the language-model loss trains the backbone, the KL loss the index
branch, and neither reaches the other's weights. Routes and switches: docs/training.md.

A step does not wait for the device. What it makes stays there until a line of the log or a
checkpoint is due; `Watch` sees to it that a step gone wrong changes nothing in between.
"""

from __future__ import annotations

import json
import math
import time
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Callable

import torch
import torch.distributed as distributed
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .. import autograd
from .._command import NumericError
from .._files import naming, write_whole
from . import storage
from .data import NO_TARGET, Examples, Source, moved
from .metrics import Choose, Recorder
from .model import Attend, Config, Model, dense, listed, msa

ROUTES = ("full", "msa-pt", "msa-cpt")
FULL, WARMUP, SPARSE = "full", "warmup", "sparse"  # stages
FIGURES = ("loss", "kl", "grad_norm_backbone", "grad_norm_index")  # of every step


@dataclass(frozen=True)
class Options:
    """One run. `python -m msa_cpp.train --help` says what each means."""

    route: str = "msa-pt"
    steps: int = 400
    warmup_steps: int = 100
    batch: int = 32
    context: int = 96
    accumulate: int = 1
    lr: float = 3e-3
    index_lr: float | None = None  # as lr
    index_warmup_lr: float | None = None  # as index_lr
    lr_warmup: int = 20
    weight_decay: float = 0.1
    clip: float = 1.0
    index_clip: float = 1.0
    kl_weight: float = 1.0
    kl_support: str = "selected"
    kl_reduction: str = "mean"
    detach_input: bool = True
    force_local: bool = True
    freeze: str | None = None  # "none", "warmup" or "all"; by route
    dtype: str = "f32"
    activation_checkpointing: bool = False
    save_every: int = 100
    keep: int = 2
    log_every: int = 10
    seed: int = 0


class Diverged(NumericError):
    """A loss or gradient that is no number: one line with the step and the first such tensor."""


class Watch:
    """Whether the steps so far made numbers, known to the device alone until somebody asks.

    From the first step that did not, the optimiser updates nothing: its weights are those of then.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, device: torch.device) -> None:
        self._state = torch.zeros(2, device=device)  # steps that were good; 1 from a bad one on
        # where fused AdamW looks, as for torch's GradScaler
        setattr(optimizer, "found_inf", self._state[1])

    def saw(self, figures: Tensor) -> None:
        good, bad = self._state
        bad.copy_(torch.maximum(bad, 1 - figures.isfinite().all().float()))
        good += 1 - bad

    def read(self, figures: Tensor) -> tuple[list[float], int | None]:
        """Waits for the device. The figures, and how many good steps came before a bad one."""
        *values, good, bad = torch.cat((figures, self._state)).tolist()
        return values, int(good) if bad else None


class Trainer:
    """Trains `model` in place on the examples of `source`.

    choose: another selector in the place of the index branch, which then learns nothing.
    output: the folder of log and checkpoints, or None to keep both in memory (`log`).
    on_step: called with the number of finished steps.
    inputs: what the run is made of besides the options, for those who resume it; kept with them.
    """

    def __init__(self, options: Options, model: Model, source: Source, *,
                 output: Path | None = None, choose: Choose | None = None,
                 on_step: Callable[[int], None] = lambda done: None,
                 inputs: dict | None = None) -> None:
        self.options, self.model, self.source = options, model, source
        self.output, self.choose, self.on_step, self.inputs = output, choose, on_step, inputs or {}
        self.log: list[dict] = []
        self.figures: dict[str, float] = {}  # FIGURES of the last step that was waited for
        self.step = 0
        self.device = next(model.parameters()).device
        self.rank, self.ranks = 0, 1
        if distributed.is_initialized():
            self.rank, self.ranks = distributed.get_rank(), distributed.get_world_size()
        self.msa = msa_config(model.config, options)
        model.checkpointing = options.activation_checkpointing
        self.optimizer = optimizer(model, options)
        self._stage = ""
        self._wrapped: Model | DistributedDataParallel = model
        self._watch, self._watched_from = Watch(self.optimizer, self.device), 0

    # ---- schedule ----

    def stage(self) -> str:
        if self.options.route == "full":
            return FULL
        return WARMUP if self.step < self.options.warmup_steps else SPARSE

    def attend(self, stage: str) -> Attend:
        if stage == FULL:
            return dense
        if stage == WARMUP:
            return msa(replace(self.msa, topk=None))
        return msa(self.msa) if self.choose is None else listed(self.choose, self.msa)

    def learning_rates(self) -> tuple[float, float]:
        """Of backbone and index branch: a linear start, then a cosine down to a tenth."""
        o = self.options
        start = min(1.0, (self.step + 1) / max(1, o.lr_warmup))
        cosine = 0.55 + 0.45 * math.cos(math.pi * self.step / max(1, o.steps))
        index_lr = o.lr if o.index_lr is None else o.index_lr
        if self.stage() == WARMUP and o.index_warmup_lr is not None:
            return o.lr * start * cosine, o.index_warmup_lr * start
        return o.lr * start * cosine, index_lr * start * cosine

    def _enter(self, stage: str) -> None:
        """Decides what learns, and tells DistributedDataParallel so."""
        freeze = self.options.freeze or ("warmup" if self.options.route == "msa-cpt" else "none")
        backbone = freeze == "none" or (freeze == "warmup" and stage != WARMUP)
        index = stage == WARMUP or (stage == SPARSE and self.choose is None)
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(index if ".indexer." in name else backbone)
            parameter.grad = None
        self._stage = stage
        if self.ranks > 1:
            self._wrapped = DistributedDataParallel(self.model)

    # ---- steps ----

    def run(self, until: int | None = None) -> None:
        """Steps up to `until`, the whole run by default."""
        o, began = self.options, time.monotonic()
        last = o.steps if until is None else until
        while self.step < last:
            done = self.step + 1
            due = self.step % o.log_every == 0 or done == o.steps
            saves = self.output is not None and (done == o.steps or done % o.save_every == 0)
            figures, entry = self._train_step(due)
            if due or saves or done == last:
                self.figures = dict(zip(FIGURES, self._look(figures)))
            if due:
                entry |= dict(self.figures, seconds=round(time.monotonic() - began, 3))
                self._write(entry)
            self.step = done
            if saves:
                self.save()
            self.on_step(self.step)

    def _train_step(self, measures: bool) -> tuple[Tensor, dict]:
        """One optimiser step. FIGURES, on the device; and the rest of its line of the log, whose
        recall and coverage cost more than the step, if it `measures`."""
        o, stage = self.options, self.stage()
        if stage != self._stage:
            self._enter(stage)
        rates = self.learning_rates()
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["index"]]
        attend, recorder = self.attend(stage), None
        if measures and self.rank == 0 and stage != FULL:
            choose = self.choose or by_index(self.msa)
            attend = recorder = Recorder(attend, choose, self.msa)
        examples = [self._examples(micro) for micro in range(o.accumulate)]
        sums = torch.zeros(2, device=self.device)
        for micro, share in enumerate(self._shares(examples)):
            model, last = self._wrapped, micro + 1 == o.accumulate
            with (model.no_sync() if isinstance(model, DistributedDataParallel) and not last
                  else nullcontext()):
                losses = share * torch.stack(
                    self.losses(examples[micro].to(self.device), attend, model))
                loss = losses[0] + o.kl_weight * losses[1]
                (self.ranks * loss).backward()  # the gradient is a mean over ranks
            sums += losses.detach()
        if self.ranks > 1:
            distributed.all_reduce(sums)
        figures = torch.stack((*sums, self._clip(self.model.backbone_parameters(), o.clip),
                               self._clip(self.model.index_parameters(), o.index_clip)))
        self._watch.saw(figures)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return figures, dict(step=self.step, stage=stage, lr=rates[0], index_lr=rates[1],
                             **(recorder.means() if recorder else {}))

    def _examples(self, micro: int) -> Examples:
        o = self.options
        number = (self.step * o.accumulate + micro) * self.ranks + self.rank
        return self.source.examples(number, o.batch, o.context)

    def _shares(self, examples: list[Examples]) -> Tensor:
        """f32 [accumulate,2]: the shares of each micro step in the targets and in the queries of
        the whole step, over all ranks: its weights in the means over them."""
        counts = moved(torch.tensor([[e.target_count(), e.cu_seqlens[-1]] for e in examples],
                                    dtype=torch.float64), self.device)
        totals = counts.sum(0)
        if self.ranks > 1:
            distributed.all_reduce(totals)
        return (counts / totals.clamp_min(1)).float()

    def _clip(self, parameters: dict[str, nn.Parameter], limit: float) -> Tensor:
        """The norm of the gradients before they were clipped."""
        learning = [p for p in parameters.values() if p.grad is not None]
        if not learning:
            return torch.zeros((), device=self.device)
        return nn.utils.clip_grad_norm_(learning, limit)

    def _look(self, figures: Tensor) -> list[float]:
        """Waits for the figures of a step. Diverged if it or one since the last look was bad."""
        values, good = self._watch.read(figures)
        if good is not None:
            self.step = self._watched_from + good
            raise Diverged(f"step {self.step}: {self._first_bad()}; the last checkpoint is as it "
                           "was")
        return values

    def losses(self, examples: Examples, attend: Attend,
               model: nn.Module | None = None) -> tuple[Tensor, Tensor]:
        """(language-model loss, KL loss over the layers), f32 scalars: means over the targets, 0
        without any, and over the queries."""
        bf16 = self.options.dtype == "bf16"
        with torch.autocast(self.device.type, torch.bfloat16, enabled=bf16):
            logits, kls = (model or self.model)(
                examples.tokens, examples.cu_seqlens, examples.max_seqlen, attend,
                self.options.detach_input)
        lm = F.cross_entropy(logits, examples.targets, ignore_index=NO_TARGET, reduction="sum")
        lm = lm / examples.target_count().clamp_min(1)
        if not kls:
            return lm, lm.new_zeros(())
        kl = torch.stack(kls).sum()
        return lm, kl / len(kls) if self.options.kl_reduction == "mean" else kl

    def _first_bad(self) -> str:
        """Repeats a bad step, whose weights are still there, and names the first tensor that is not
        finite: a weight, what a module makes, a gradient."""
        for name, parameter in self.model.named_parameters():
            if not parameter.isfinite().all():
                return f"{name} holds NaN or infinity"
        bad: list[str] = []

        def look(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, inputs: object, output: object) -> None:
                if isinstance(output, Tensor) and not output.isfinite().all():
                    bad.append(f"the output of {name} holds NaN or infinity")
            return hook

        stage = self.stage()
        self._enter(stage)
        handles = [m.register_forward_hook(look(n)) for n, m in self.model.named_modules() if n]
        for micro in range(self.options.accumulate):
            lm, kl = self.losses(self._examples(micro).to(self.device), self.attend(stage))
            if not bad:
                (lm + self.options.kl_weight * kl).backward()
        for handle in handles:
            handle.remove()
        bad += [f"the gradient of {name} holds NaN or infinity"
                for name, parameter in self.model.named_parameters()
                if parameter.grad is not None and not parameter.grad.isfinite().all()]
        return bad[0] if bad else f"loss {float(lm)}, kl {float(kl)}"

    # ---- what stays ----

    def _write(self, entry: dict) -> None:
        self.log.append(entry)
        if self.output and self.rank == 0:
            log = self.output / "log.jsonl"
            with naming(log), log.open("a") as file:
                file.write(json.dumps(entry) + "\n")

    def _folder(self) -> Path:
        if self.output is None:
            raise ValueError("output: got None, expected the folder of the run's checkpoints")
        return self.output

    def save(self) -> None:
        if self.rank == 0:
            run = {"options": asdict(self.options), "inputs": self.inputs}
            storage.save(self._folder(), self.step, self.model, self.optimizer, run,
                         self.options.keep)

    def resume(self) -> None:
        """Continues from the last checkpoint in `output`, and cuts the log back to it."""
        folder = self._folder()
        if self.rank == 0:
            storage.remove_partial(folder)
        self.step = self._watched_from = storage.steps(folder)[-1]
        path = storage.directory(folder, self.step)
        storage.load_weights(self.model, path)
        storage.load_optimizer(self.model, self.optimizer, path)
        log = folder / "log.jsonl"
        if self.rank == 0 and log.exists():
            lines = [x for x in log.read_text().splitlines(True) if x.endswith("\n")]
            write_whole(log, "".join(x for x in lines if json.loads(x)["step"] < self.step))


def msa_config(config: Config, options: Options) -> autograd.MsaConfig:
    """The sparse stage's attention."""
    return autograd.MsaConfig(
        block_size=config["index_block_size"], topk=config["index_topk_blocks"],
        init_blocks=config["index_init_blocks"],
        local_blocks=config["index_local_blocks"] if options.force_local else 0,
        kl_support=options.kl_support)


def by_index(config: autograd.MsaConfig) -> Choose:
    """The selector of MSA itself."""
    return lambda heads: autograd.select(heads.q_idx, heads.k_idx, heads.cu_seqlens, config,
                                         max_seqlen=heads.max_seqlen)


def optimizer(model: Model, options: Options) -> torch.optim.AdamW:
    """AdamW in three groups: matrices of the backbone decay, its norms and the index do not."""
    backbone = model.backbone_parameters().values()
    groups = [
        {"params": [p for p in backbone if p.ndim == 2], "weight_decay": options.weight_decay,
         "index": False},
        {"params": [p for p in backbone if p.ndim == 1], "weight_decay": 0.0, "index": False},
        {"params": list(model.index_parameters().values()), "weight_decay": 0.0, "index": True},
    ]
    return torch.optim.AdamW(groups, lr=options.lr, betas=(0.9, 0.95), fused=True)
