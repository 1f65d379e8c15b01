"""What every operator computes, in float64 NumPy over one sequence at a time, and random problems.

Slow and plain on purpose: nothing here uses msa_cpp, so that no mistake of the binding cancels.
Shapes are written with the letters of include/msa/problem.h.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from hypothesis import strategies as st

INF = float("inf")


@dataclass
class Problem:
    """A batch of sequences, B = len(q_lens), and the arguments that say where their rows lie."""

    q_lens: list[int]
    kv_lens: list[int]
    heads_kv: int = 2
    group: int = 2
    head_dim: int = 8
    index_dim: int = 4
    block_size: int = 4
    topk: int = 3
    init_blocks: int = 0
    local_blocks: int = 1
    paged: bool = False
    causal: bool = True
    offsets: bool = False  # q_offset is given
    shard: bool = False  # block_offset is given
    scale: float | None = None
    seed: int = 0
    rng: np.random.Generator = field(init=False, repr=False)

    def __post_init__(self):
        self.rng = np.random.default_rng(self.seed)
        self.cu_q = np.cumsum([0, *self.q_lens]).astype(np.int32)
        self.cu_k = np.cumsum([0, *self.kv_lens]).astype(np.int32)
        self.q_offset = self.block_offset = None
        if self.offsets:
            room = [max(0, k - q) + 1 for q, k in zip(self.q_lens, self.kv_lens)]
            self.q_offset = self.rng.integers(0, room).astype(np.int32) if room else \
                np.zeros(0, np.int32)
        if self.shard:
            self.block_offset = self.rng.integers(0, 3, len(self.q_lens)).astype(np.int32)
        if self.paged:
            counts = [self.blocks(b) for b in range(self.batch)]
            self.pages = sum(counts) + 2  # two that nobody owns
            order = self.rng.permutation(self.pages).astype(np.int32)
            self.page_table = np.full((self.batch, max([*counts, 0]) + 1), -1, np.int32)
            for b, count in enumerate(counts):
                self.page_table[b, :count], order = order[:count], order[count:]

    @property
    def batch(self):
        return len(self.q_lens)

    @property
    def tokens(self):
        return sum(self.q_lens)

    @property
    def heads_q(self):
        return self.heads_kv * self.group

    def blocks(self, b):
        return -(-self.kv_lens[b] // self.block_size)

    @property
    def columns(self):
        return max([self.blocks(b) for b in range(self.batch)], default=0)

    def rows(self, b):
        return range(self.cu_q[b], self.cu_q[b + 1])

    def first_block(self, b):
        return 0 if self.block_offset is None else int(self.block_offset[b])

    def position(self, b, t):
        """Of query row t of the packed batch, inside sequence b."""
        i = t - self.cu_q[b]
        if self.q_offset is not None:
            return int(self.q_offset[b]) + i
        return self.first_block(b) * self.block_size + self.kv_lens[b] - self.q_lens[b] + i

    def visible(self, b, t):
        """Keys given to sequence b that row t sees: the first ones, this many."""
        if not self.causal:
            return self.kv_lens[b]
        before = self.position(b, t) + 1 - self.first_block(b) * self.block_size
        return int(np.clip(before, 0, self.kv_lens[b]))

    def metadata(self, convert, pages=True):
        """The keyword arguments of the batch, as arrays of the wanted kind."""
        out = {"cu_seqlens_q": self.cu_q}
        if self.paged:
            out["seq_lens"] = np.array(self.kv_lens, np.int32)
            if pages:
                out["page_table"] = self.page_table
        else:
            out["cu_seqlens_k"] = self.cu_k
        if self.block_offset is not None:
            out["block_offset"] = self.block_offset
        if pages and self.q_offset is not None:
            out["q_offset"] = self.q_offset
        return {name: convert(value) for name, value in out.items()}

    # ---- arrays ----

    def normal(self, *shape):
        return self.rng.standard_normal(shape).astype(np.float32)

    def small_integers(self, *shape):
        """Products and sums of these are exact in every dtype, so that scores can be compared."""
        return self.rng.integers(-3, 4, shape).astype(np.float32)

    def store(self, keys, interleaved=False):
        """Packed keys [S,...] as operators get them: packed or in pages, with garbage elsewhere.

        `interleaved`: heads and tokens of a page lie token-major, in a pool of twice the width.
        """
        if not self.paged:
            return keys
        inner = keys.shape[1:]
        shape = (self.pages, self.block_size, *inner[:-1], 2 * inner[-1])
        pool = np.full(shape, np.nan, keys.dtype)
        view = pool[..., :inner[-1]]
        for b in range(self.batch):
            for s in range(self.kv_lens[b]):
                page = self.page_table[b, s // self.block_size]
                view[page, s % self.block_size] = keys[self.cu_k[b] + s]
        if len(inner) == 2:
            view = view.swapaxes(1, 2)
        return view if interleaved else np.ascontiguousarray(view)

    def lists(self, b, t):
        """A random list of global block ids of the sequence, distinct, in any order, -1 behind."""
        blocks = self.rng.permutation(self.blocks(b)) + self.first_block(b)
        count = int(self.rng.integers(0, min(self.topk, len(blocks)) + 1))
        return [*blocks[:count], *[-1] * (self.topk - count)]

    def block_ids(self):
        ids = np.full((self.heads_kv, self.tokens, self.topk), -1, np.int32)
        for b in range(self.batch):
            for t in self.rows(b):
                for h in range(self.heads_kv):
                    ids[h, t] = self.lists(b, t)
        return ids


@st.composite
def problems(draw, max_q=12, max_batch=3, paged=None, shards=False):
    batch = draw(st.integers(0, max_batch))
    q_lens = draw(st.lists(st.integers(0, max_q), min_size=batch, max_size=batch))
    prefixes = draw(st.lists(st.integers(0, 40), min_size=batch, max_size=batch))
    kv_lens = [q + prefix for q, prefix in zip(q_lens, prefixes)]
    if batch and draw(st.booleans()):  # a padded sequence
        kv_lens[draw(st.integers(0, batch - 1))] = 0
    topk = draw(st.integers(1, 5))
    init = draw(st.integers(0, min(2, topk)))
    return Problem(
        q_lens, kv_lens,
        heads_kv=draw(st.integers(1, 3)), group=draw(st.sampled_from([1, 2, 5])),
        head_dim=draw(st.sampled_from([1, 8, 17, 64])), index_dim=draw(st.sampled_from([1, 4, 33])),
        block_size=draw(st.sampled_from([1, 3, 8, 16])), topk=topk, init_blocks=init,
        local_blocks=draw(st.integers(0, min(2, topk - init))),
        paged=draw(st.booleans()) if paged is None else paged, causal=draw(st.booleans()),
        offsets=draw(st.booleans()), shard=shards and draw(st.booleans()),
        scale=draw(st.sampled_from([None, 0.3])), seed=draw(st.integers(0, 2**31)))


# ---- operators -----------------------------------------------------------------------------------


def index_scores(p, q_idx, k_idx):
    """f64 [Hi,T,blocks]"""
    out = np.full((p.heads_kv, p.tokens, p.columns), -INF)
    for b in range(p.batch):
        keys = k_idx[p.cu_k[b]:p.cu_k[b + 1]].astype(np.float64)
        for t in p.rows(b):
            products = q_idx[t].astype(np.float64) @ keys[:p.visible(b, t)].T  # [Hi, visible]
            for j in range(-(-p.visible(b, t) // p.block_size)):
                block = products[:, j * p.block_size:(j + 1) * p.block_size]
                out[:, t, j] = block.max(axis=1)
    return out


def select(p, scores, last, first=0):
    """(ids, their scores) of one row: the forced ids, then the best-scored, of first + 0, 1, ...

    `last` is the local block, of which local_blocks are forced; forced ids score +inf.
    """
    ids = range(first, first + len(scores))
    forced = [i for i in ids if i < p.init_blocks or last - p.local_blocks < i <= last]
    free = sorted({*ids} - {*forced}, key=lambda i: (-scores[i - first], i))
    chosen = sorted([*forced, *free][:p.topk])
    tail = p.topk - len(chosen)
    values = [INF if i in forced else scores[i - first] for i in chosen]
    return [*chosen, *[-1] * tail], [*values, *[-INF] * tail]


def select_blocks(p, scores, valid):
    """i32 [Hi,T,K] of f32 [Hi,T,blocks], of which the first valid[t] count."""
    out = np.full((*scores.shape[:2], p.topk), -1, np.int32)
    for h in range(scores.shape[0]):
        for t in range(scores.shape[1]):
            out[h, t] = select(p, scores[h, t, :valid[t]], valid[t] - 1)[0]
    return out


def index_select(p, scores):
    """(ids i32, scores f64) [Hi,T,K] of index_scores()."""
    ids = np.full((p.heads_kv, p.tokens, p.topk), -1, np.int32)
    best = np.full(ids.shape, -INF)
    for b in range(p.batch):
        for t in p.rows(b):
            blocks = -(-p.visible(b, t) // p.block_size)
            last = p.position(b, t) // p.block_size  # negative for rows without a key
            if not p.causal:
                last = p.first_block(b) + blocks - 1
            for h in range(p.heads_kv):
                ids[h, t], best[h, t] = select(p, scores[h, t, :blocks], last, p.first_block(b))
    return ids, best


def attention(p, q, k, v, ids=None):
    """(out f64 [T,Hq,D], lse f64 [T,Hq], probabilities per row) over the listed or all blocks."""
    scale = p.scale if p.scale is not None else p.head_dim ** -0.5
    out, lse = np.zeros((p.tokens, p.heads_q, p.head_dim)), np.full((p.tokens, p.heads_q), -INF)
    mass = np.zeros((p.heads_kv, p.tokens, p.columns))
    maxima = np.full((p.heads_q, p.tokens, p.columns), -INF)
    for b in range(p.batch):
        for t in p.rows(b):
            n = p.visible(b, t)
            block_of = np.arange(n) // p.block_size
            for h in range(p.heads_q):
                r = h // p.group
                keys = slice(p.cu_k[b], p.cu_k[b] + n)
                dots = k[keys, r].astype(np.float64) @ q[t, h].astype(np.float64)
                for j in range(-(-n // p.block_size)):
                    maxima[h, t, j] = dots[block_of == j].max()
                chosen = np.ones(n, bool)
                if ids is not None:
                    chosen = np.isin(block_of + p.first_block(b), ids[r, t][ids[r, t] >= 0])
                if not chosen.any():
                    continue
                logits = np.where(chosen, dots * scale, -INF)
                top = logits.max()
                lse[t, h] = top + np.log(np.exp(logits - top).sum())
                weights = np.exp(logits - lse[t, h])
                out[t, h] = weights @ v[keys, r].astype(np.float64)
                for j in range(-(-n // p.block_size)):
                    mass[r, t, j] += weights[block_of == j].sum() / p.group
    return out, lse, mass, maxima


def merge(o_parts, lse_parts):
    with np.errstate(invalid="ignore", divide="ignore"):
        top = lse_parts.max(axis=0).astype(np.float64)
        top = np.where(np.isneginf(top), 0, top)
        weights = np.exp(lse_parts - top)
        total = weights.sum(axis=0)
        out = (weights[..., None] * o_parts).sum(axis=0) / np.where(total == 0, 1, total)[..., None]
        return out, top + np.log(total)


def block_lists(p, ids):
    """(row_ptr, entries) as CSR per KV head."""
    starts = np.cumsum([0, *[p.blocks(b) for b in range(p.batch)]])
    row_ptr = np.zeros((p.heads_kv, starts[-1] + 1), np.int32)
    entries = np.full((p.heads_kv, p.tokens * p.topk), -1, np.int32)
    for h in range(p.heads_kv):
        found = [[] for _ in range(starts[-1])]
        for b in range(p.batch):
            for t in p.rows(b):
                for slot, block in enumerate(ids[h, t]):
                    if block < 0:
                        break
                    found[starts[b] + block - p.first_block(b)].append(t * p.topk + slot)
        row_ptr[h, 1:] = np.cumsum([len(row) for row in found])
        flat = [entry for row in found for entry in row]
        entries[h, :len(flat)] = flat
    return row_ptr, entries


# ---- tolerances ----------------------------------------------------------------------------------


def tolerance(p, q, k, v, dtype):
    """Bounds of |error| of (out, lse, mass) for inputs of `dtype` computed in float32.

    A logit is a sum of D products: its error is at most D eps sum|q k| scale, and a softmax moves
    by at most twice the largest error of a logit. exp and the sums add a few eps. 16-bit kernels
    may round probabilities and results to the storage type.
    """
    eps = 2.0 ** -23
    unit = {"float32": 0.0, "bfloat16": 2.0 ** -8, "float16": 2.0 ** -11}[dtype]
    scale = p.scale if p.scale is not None else p.head_dim ** -0.5
    longest = max([*p.kv_lens, 1])
    size = p.head_dim * float(np.abs(q).max(initial=0)) * float(np.abs(k).max(initial=0)) * scale
    logit = (p.head_dim + 4) * eps * size
    weight = 2 * logit + (longest + 16) * eps
    largest = float(np.abs(v).max(initial=0))
    return (weight + 2 * unit) * largest + 1e-9, logit + weight + unit, weight + 1e-9
