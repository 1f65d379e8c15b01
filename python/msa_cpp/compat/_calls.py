"""What the adapters share: lengths on the device."""

from __future__ import annotations

import torch

BLOCK = 128  # tokens of a block, and of a page
NO_BOUND = 2**31 - 1  # as max_seqlen_k: whatever the page table holds

_uniform: dict[tuple[torch.device, int, int], torch.Tensor] = {}


def uniform_cu_seqlens(batch: int, length: int, device: torch.device) -> torch.Tensor:
    """int32 [B+1]: 0, length, 2 length, ... Kept for good, since a CUDA graph may point at it.

    It is complete when this returns, for every stream; but one that is made during a capture
    belongs to that graph and is not kept.
    """
    key = (device, batch, length)
    kept = _uniform.get(key)
    if kept is not None:
        return kept
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        return torch.arange(batch + 1, dtype=torch.int32, device=device) * length
    made = torch.arange(batch + 1, dtype=torch.int32) * length
    _uniform[key] = made.to(device)
    return _uniform[key]


def int32(lengths: torch.Tensor) -> torch.Tensor:
    return lengths if lengths.dtype == torch.int32 else lengths.int()


def low_words(numbers: torch.Tensor) -> torch.Tensor:
    """Numbers below 2^31 as int32 [B]: of int64 ones every other word, not a copy."""
    if numbers.dtype == torch.int64:
        return numbers.view(torch.int32)[::2] if numbers.is_contiguous() else numbers.int()
    return int32(numbers)


def valid_blocks(cu_seqlens_q: torch.Tensor, first_positions: torch.Tensor,
                 tokens: int) -> torch.Tensor:
    """int32 [T]: the blocks that each query token sees, up to its own; of the positions [B] of the
    first token of each sequence, which may lie a little before 0. Nothing is read back."""
    rows = torch.arange(tokens, dtype=torch.int32, device=cu_seqlens_q.device)
    first_of_row = of_each_token(first_positions - cu_seqlens_q[:-1], cu_seqlens_q, rows)
    return first_of_row.add_(rows).div_(BLOCK, rounding_mode="floor").add_(1)


def of_each_token(values: torch.Tensor, cu_seqlens_q: torch.Tensor,
                  rows: torch.Tensor) -> torch.Tensor:
    """The value [B] of each token's sequence; rows: 0, 1, 2, ... of the tokens. A copy."""
    sequence = torch.searchsorted(cu_seqlens_q[1:-1], rows, right=True, out_int32=True)
    return values.index_select(0, sequence)
