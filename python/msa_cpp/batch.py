"""The lengths of a batch and where its keys lie: what every batched operator is told."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypedDict, Union

import numpy as np

if TYPE_CHECKING:
    import torch

    from .plans import Plan

Integers = Union[np.ndarray, "torch.Tensor"]  # int32

_SHAPES = {"cu_seqlens_q": "B+1", "cu_seqlens_k": "B+1", "seq_lens": "B",
           "q_offset": "B", "block_offset": "B", "page_rows": "B"}


@dataclass(frozen=True)
class Batch:
    """Made once, given to every call as ``batch=``; `msa_cpp.ops` says what the fields mean.

    The arrays are kept, not copied: lengths and pages may be written into them between calls, which
    look at what they hold. What cannot change is checked here: ValueError and TypeError name the
    field. Keys are packed (`cu_seqlens_k`) or paged (`seq_lens`, and `page_table` where an operator
    reads keys); lengths in CUDA memory need `max_seqlen_q` and `max_seqlen_k`.

    >>> import numpy as np, msa_cpp
    >>> batch = msa_cpp.Batch(cu_seqlens_q=np.array([0, 1, 3], np.int32),  # 1 and 2 new tokens
    ...                       seq_lens=np.array([5, 9], np.int32),
    ...                       page_table=np.array([[0, 1, -1], [4, 2, 3]], np.int32), block_size=4)
    >>> len(batch)
    2
    """

    cu_seqlens_q: Integers
    cu_seqlens_k: Integers | None = None
    seq_lens: Integers | None = None
    page_table: Integers | None = None
    q_offset: Integers | None = None
    block_offset: Integers | None = None
    page_rows: Integers | None = None
    causal: bool = True
    block_size: int = 128
    max_seqlen_q: int | None = None
    max_seqlen_k: int | None = None

    def __post_init__(self) -> None:
        sequences = self.cu_seqlens_q.shape[0] - 1 if len(self.cu_seqlens_q.shape) == 1 else -1
        extents = {"B": sequences, "B+1": sequences + 1}
        for name, letters in (*_SHAPES.items(), ("page_table", self._table_letters())):
            array = getattr(self, name)
            if array is None:
                continue
            if str(array.dtype).rpartition(".")[2] != "int32":
                raise TypeError(f"{name}: got dtype {array.dtype}, expected int32")
            shape = tuple(array.shape)
            wanted = tuple(extents.get(letter, n) for letter, n in zip(letters.split(","), shape))
            if sequences < 0 or shape != wanted or letters.count(",") != len(shape) - 1:
                raise ValueError(f"{name}: got shape {list(shape)}, expected [{letters}]"
                                 + (f" with B = {sequences}" if sequences >= 0 else ", B >= 0"))
        if self.seq_lens is None and self.page_table is not None:
            raise ValueError("seq_lens: not given, expected the lengths of the pages in page_table")
        if (self.seq_lens is None) == (self.cu_seqlens_k is None):
            given = "neither" if self.seq_lens is None else "both"
            raise ValueError(f"cu_seqlens_k, seq_lens: {given} given, expected one: that of packed "
                             "or of paged keys")
        if self.block_size < 1:
            raise ValueError(f"block_size: got {self.block_size}, expected >= 1")
        for name in ("max_seqlen_q", "max_seqlen_k"):
            bound = getattr(self, name)
            if bound is not None and bound < 0:
                raise ValueError(f"{name}: got {bound}, expected >= 0")
            if bound is None and getattr(self.cu_seqlens_q, "is_cuda", False):
                raise ValueError(f"{name}: not given, expected a bound of the lengths, which are "
                                 "not read back from CUDA memory")

    def _table_letters(self) -> str:
        if self.page_rows is None:
            return "B,max_pages"
        flat = self.page_table is not None and len(self.page_table.shape) == 1
        return "entries" if flat else "rows,max_pages"

    def __len__(self) -> int:
        return int(self.cu_seqlens_q.shape[0]) - 1

    def laid_out(self) -> tuple[Any, ...]:
        """The fields in their order."""
        return (self.cu_seqlens_q, self.cu_seqlens_k, self.seq_lens, self.page_table, self.q_offset,
                self.block_offset, self.page_rows, self.causal, self.block_size,
                self.max_seqlen_q, self.max_seqlen_k)


class Run(TypedDict, total=False):
    """How a call runs: keywords of every operator."""

    workspace: Any
    plan: Plan | None
    backend: str


class Keywords(Run, total=False):
    """The fields of a `Batch` as keywords of a batched operator."""

    cu_seqlens_q: Integers
    cu_seqlens_k: Integers | None
    seq_lens: Integers | None
    page_table: Integers | None
    q_offset: Integers | None
    block_offset: Integers | None
    page_rows: Integers | None
    causal: bool
    block_size: int
    max_seqlen_q: int | None
    max_seqlen_k: int | None
