"""What the log says about a selection: how much of the main branch's attention it keeps.

Every figure is a mean over the queries and KV heads with more visible blocks than K, where there is
a choice; mass is `msa_cpp.block_mass` under full attention.

    score recall      mass of (selected and oracle) / mass of the oracle's K best blocks
    block recall      |selected and oracle| / K
    kept mass         mass of the selected blocks
    learned coverage  mass of the selected blocks without the forced ones, relative to the best
                      that many blocks can do: an untrained index branch "recalls" much by the
                      local block
"""

from __future__ import annotations

from typing import Any, Callable

import msa_cpp
import torch
from torch import Tensor

from ..autograd import MsaConfig
from .model import Attend, Heads

NAMES = ("score_recall", "block_recall", "kept_mass", "learned_coverage")
Choose = Callable[[Heads], Tensor]  # int32 [Hkv,T,K]


@torch.no_grad()
def measure(heads: Heads, ids: Tensor, config: MsaConfig) -> dict[str, float]:
    """The four figures of the lists `ids` [Hkv,T,K]; {} where no query has a choice."""
    options: dict[str, Any] = dict(block_size=config.block_size,
                                   softmax_scale=config.softmax_scale, **heads.lengths())
    q, k, v = heads.q.detach(), heads.k.detach(), heads.v.detach()
    _, lse = msa_cpp.dense_attention(q, k, v, return_lse=True, **options)
    mass = msa_cpp.block_mass(q, k, lse, **options)  # [Hkv,T,blocks]
    groups, _, blocks = mass.shape
    topk = ids.shape[2]

    last = heads.places() // config.block_size  # the block of every query
    real = torch.arange(len(q), device=q.device) < heads.cu_seqlens[-1]  # not padding behind them
    choice = real & (last + 1 > topk)
    if not choice.any():
        return {}
    mass, ids, last = mass[:, choice], ids[:, choice], last[choice, None]

    def mask(lists: Tensor) -> Tensor:  # [Hkv,rows,K] -> bool [Hkv,rows,blocks]
        found = torch.zeros(*lists.shape[:2], blocks + 1, dtype=torch.bool, device=lists.device)
        return found.scatter_(2, torch.where(lists < 0, blocks, lists).long(), True)[..., :blocks]

    block = torch.arange(blocks, device=q.device)
    forced = (block < config.init_blocks) | (
        (block <= last) & (block > last - config.local_blocks))
    free = topk - config.init_blocks - config.local_blocks
    selected, oracle = mask(ids), mask(mass.topk(topk).indices)
    best_free = mass.masked_fill(forced, 0).topk(max(free, 1)).values.sum(2)
    kept = lambda chosen: (mass * chosen).sum(2)
    return {
        "score_recall": float((kept(selected & oracle) / kept(oracle)).mean()),
        "block_recall": float((selected & oracle).sum(2).float().mean() / topk),
        "kept_mass": float(kept(selected).mean()),
        "learned_coverage": float((kept(selected & ~forced) / best_free.clamp_min(1e-30)).mean()),
    }


class Recorder:
    """An `Attend` that also measures the selection of every layer, kept in `layers`."""

    def __init__(self, attend: Attend, choose: Choose, config: MsaConfig) -> None:
        self._attend, self._choose, self._config = attend, choose, config
        self.layers: dict[int, dict[str, float]] = {}

    def __call__(self, heads: Heads) -> tuple[Tensor, Tensor | None]:
        if heads.layer not in self.layers:  # activation checkpointing calls twice
            ids = self._choose(heads)
            self.layers[heads.layer] = measure(heads, ids, self._config)
        return self._attend(heads)

    def means(self) -> dict[str, float]:
        """Over the layers; {} where no query had a choice."""
        rows = [row for row in self.layers.values() if row]
        return {name: sum(row[name] for row in rows) / len(rows) for name in NAMES if rows}
