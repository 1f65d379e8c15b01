"""Random batches as serving engines hold them, and what each contract says in plain torch.

Nothing here uses msa_cpp. Index queries and keys are small integers, so that scores are exact and
ties are many; blocks and pages have 128 tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from msa_arrays import DEVICE

BLOCK = 128
INF = float("inf")


@dataclass
class Serving:
    """Requests with cached prefixes: the last q_lens[b] of the kv_lens[b] tokens are new."""

    q_lens: list[int]
    kv_lens: list[int]
    heads_kv: int = 2
    group: int = 2
    dim: int = 128
    topk: int = 3
    init_blocks: int = 0
    local_blocks: int = 1
    dtype: torch.dtype = torch.float32
    layout: str = "NHD"  # or "HND", or "layers": one slice of a pool of all layers
    seed: int = 0
    keys: list[torch.Tensor] = field(init=False)  # per request [S,Hkv,D]; values likewise
    values: list[torch.Tensor] = field(init=False)
    index_keys: list[torch.Tensor] = field(init=False)  # [S,D]

    def __post_init__(self):
        self.generator = torch.Generator().manual_seed(self.seed)
        self.keys = [self.normal(n, self.heads_kv, self.dim) for n in self.kv_lens]
        self.values = [self.normal(n, self.heads_kv, self.dim) for n in self.kv_lens]
        self.index_keys = [self.integers(n, self.dim) for n in self.kv_lens]
        self.q = self.normal(self.tokens, self.heads_kv * self.group, self.dim)
        self.idx_q = self.integers(self.tokens, self.heads_kv, self.dim)
        ends = torch.tensor([0, *self.q_lens]).cumsum(0)
        self.cu_seqlens_q, self.seq_lens = self.int32(ends), self.int32(self.kv_lens)
        self.prefix_lens = self.int32([k - q for q, k in zip(self.q_lens, self.kv_lens)])
        self.pages = sum(self.blocks) + 2
        order = torch.randperm(self.pages, generator=self.generator).tolist()
        self.own_pages = [[order.pop() for _ in range(n)] for n in self.blocks]
        width = max(self.blocks, default=0) + 1
        self.block_table = self.int32([[*own, *[0] * (width - len(own))]
                                       for own in self.own_pages]).reshape(-1, width)

    # ---- sizes and tensors

    @property
    def tokens(self):
        return sum(self.q_lens)

    @property
    def blocks(self):
        return [-(-n // BLOCK) for n in self.kv_lens]

    def int32(self, values):
        return torch.as_tensor(values, dtype=torch.int32).to(DEVICE)

    def normal(self, *shape):
        return torch.randn(shape, generator=self.generator).to(self.dtype).to(DEVICE)

    def integers(self, *shape):
        drawn = torch.randint(-1, 2, shape, generator=self.generator)
        return drawn.to(self.dtype).to(DEVICE)

    def poison(self, *shape, dtype=torch.float32):
        return torch.full(shape, 77, dtype=dtype, device=DEVICE)

    # ---- caches

    def paged(self, rows, width):
        """[pages,128,H,width] of per-request rows [S,H,width], NaN where nothing was written."""
        heads = self.heads_kv if rows is not self.index_keys else 1
        pool = torch.full((self.pages, BLOCK, heads, width), float("nan"), dtype=self.dtype,
                          device=DEVICE)
        for own, row in zip(self.own_pages, rows):
            for s in range(row.shape[0]):
                pool[own[s // BLOCK], s % BLOCK] = row[s].reshape(heads, width)
        return pool

    def kv_cache(self):
        """[pages,Hkv,128,2*D] in the memory order of `layout`."""
        both = torch.cat((self.paged(self.keys, self.dim), self.paged(self.values, self.dim)), -1)
        if self.layout == "NHD":
            return both.transpose(1, 2)
        if self.layout == "HND":
            return both.transpose(1, 2).contiguous()
        layers = torch.full((self.pages, 3, *both.shape[1:]), 5, dtype=self.dtype, device=DEVICE)
        layers[:, 1] = both
        return layers[:, 1].transpose(1, 2)

    def index_cache(self):
        pages = self.paged(self.index_keys, self.dim)[:, :, 0]
        if self.layout != "layers":
            return pages
        layers = torch.full((self.pages, 3, *pages.shape[1:]), 5, dtype=self.dtype, device=DEVICE)
        layers[:, 1] = pages
        return layers[:, 1]

    # ---- what the contracts say

    def rows(self):
        """(row, request, position) of every new token; a position may be negative in padding."""
        t = 0
        for b, (q_len, kv_len) in enumerate(zip(self.q_lens, self.kv_lens)):
            for i in range(q_len):
                yield t, b, kv_len - q_len + i
                t += 1

    def scores(self):
        """f32 [Hi,T,blocks]: the largest unscaled product of each block, -inf where none."""
        out = torch.full((self.heads_kv, self.tokens, max(self.blocks, default=0)), -INF)
        for t, b, position in self.rows():
            for j in range(position // BLOCK + 1):
                keys = self.index_keys[b][j * BLOCK:min((j + 1) * BLOCK, position + 1)]
                out[:, t, j] = (self.idx_q[t].float() @ keys.float().T).amax(1).cpu()
        return out

    def ids(self, scores=None):
        """int32 [Hi,T,K]: forced blocks, then the best, lower ids first; ascending, -1 behind."""
        scores = self.scores() if scores is None else scores
        out = torch.full((self.heads_kv, self.tokens, self.topk), -1, dtype=torch.int32)
        for t, _, position in self.rows():
            count = position // BLOCK + 1
            forced = [j for j in range(count)
                      if j < self.init_blocks or j >= count - self.local_blocks]
            for h in range(self.heads_kv):
                rest = sorted({*range(count)} - {*forced}, key=lambda j: (-scores[h, t, j], j))
                chosen = sorted([*forced, *rest][:self.topk])
                out[h, t, :len(chosen)] = torch.tensor(chosen, dtype=torch.int32)
        return out

    def attention(self, ids=None, scale=None):
        """(f32 [T,Hq,D], LSE f32 [T,Hq]) over the listed blocks or all; zeros where none."""
        scale = self.dim ** -0.5 if scale is None else scale
        out = torch.zeros(self.q.shape)
        lse = torch.full(self.q.shape[:2], -INF)
        for t, b, position in self.rows():
            for h in range(self.heads_kv * self.group):
                chosen = torch.arange(max(position + 1, 0))
                if ids is not None:
                    listed = ids[h // self.group, t]
                    chosen = chosen[torch.isin(chosen // BLOCK, listed[listed >= 0].cpu())]
                if len(chosen) == 0:
                    continue
                k, v = (x[b][chosen.to(DEVICE), h // self.group].double()
                        for x in (self.keys, self.values))
                logits = k @ self.q[t, h].double() * scale
                lse[t, h] = torch.logsumexp(logits, 0)
                out[t, h] = torch.softmax(logits, 0) @ v
        return out, lse


def shuffled(ids, seed=0):
    """The same lists in another order, -1 behind."""
    generator = torch.Generator().manual_seed(seed)
    out = torch.full_like(ids, -1)
    for index in torch.cartesian_prod(*map(torch.arange, ids.shape[:2])):
        row = ids[tuple(index)]
        listed = row[row >= 0]
        out[tuple(index)][:len(listed)] = listed[torch.randperm(len(listed), generator=generator)]
    return out


def check_close(got, want, dtype=torch.float32):
    """Outputs of attention: 2^-8 of the largest value where bf16 rounds values and results."""
    bound = 2e-5 if dtype == torch.float32 else 2.0 ** -6
    torch.testing.assert_close(got.float().cpu(), want.float(), atol=bound, rtol=bound)
