"""Attention and the KL loss of the index branch in plain torch: dense masks, autograd, any dtype.

Slow and plain on purpose, as msa_oracle: nothing here uses msa_cpp. Packed sequences only; queries
and keys are the same tokens (T = S), as in training.
"""

from __future__ import annotations

import torch
from torch import Tensor

INF = float("inf")


def visible(cu_seqlens: Tensor, block_size: int, block_ids: Tensor | None, heads: int) -> Tensor:
    """bool [Hkv,T,S]: the causally visible keys, of the listed blocks where lists are given."""
    lengths = cu_seqlens.diff().long()
    tokens = int(cu_seqlens[-1])
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    position = torch.arange(tokens) - cu_seqlens[:-1].long()[sequence]
    mask = (sequence[:, None] == sequence) & (position[:, None] >= position)
    mask = mask.expand(heads, -1, -1)
    if block_ids is None:
        return mask
    block = position // block_size
    return mask & (block_ids[..., None] == block).any(2)


def logits(q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """[Hq,T,S], -inf where nothing is visible; k has one head for G of q."""
    group = q.shape[1] // k.shape[1]
    dots = torch.einsum("thd,shd->hts", q, k.repeat_interleave(group, 1)) * scale
    return dots.masked_fill(~mask.repeat_interleave(group, 0), -INF)


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """(o [T,Hq,D], lse [T,Hq])"""
    s = logits(q, k, mask, scale)
    values = v.repeat_interleave(q.shape[1] // k.shape[1], 1)
    o = torch.einsum("hts,shd->thd", s.softmax(-1), values)
    return o, s.logsumexp(-1).T


def kl(q: Tensor, k: Tensor, q_idx: Tensor, k_idx: Tensor, mask: Tensor, scale: float) -> Tensor:
    """The loss [T,Hkv]: teacher from q and k (detached), student from q_idx and k_idx."""
    heads = k.shape[1]
    p = logits(q.detach(), k.detach(), mask, scale).softmax(-1)
    p = p.view(heads, -1, *p.shape[1:]).mean(1)
    keys = k_idx[:, None].expand(-1, heads, -1)
    log_pi = logits(q_idx, keys, mask, q_idx.shape[-1] ** -0.5).log_softmax(-1)
    return torch.where(mask, torch.xlogy(p, p) - p * log_pi.masked_fill(~mask, 0), 0).sum(-1).T
