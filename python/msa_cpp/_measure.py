"""What `msa_cpp.bench` asks of every contender: a right result, and how long it takes."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from .compat._calls import BLOCK

DIM = 128
# Of an output against fp64, relative to the largest value of its row: 16-bit kernels round
# probabilities and results, fp32 ones err by the order of sums.
TOLERANCE = {"f32": 1e-4, "bf16": 2.0 ** -6}
SCORE_GAP = 1e-4  # of the largest score: what the order of fp32 sums moves it by
SAMPLED = 4  # queries of a case that are computed again
GRAPH_SECONDS = 1e-3  # of calls in one CUDA graph


def check(work: Any, ids: torch.Tensor | None, out: torch.Tensor | None) -> float:
    """The largest error of sampled queries; raises ValueError for a wrong result."""
    worst = 0.0
    for t in np.random.default_rng(1).choice(work.q.shape[0], SAMPLED).tolist():
        b, i = divmod(t, work.case.new_tokens)
        position = work.case.context - work.case.new_tokens + i
        pages = work.page_table[b, :position // BLOCK + 1].long()
        for head in range(work.case.heads_kv):
            chosen = None if ids is None else _check_list(work, ids[head, t], head, t, pages,
                                                          position)
            if out is not None:
                worst = max(worst, _check_row(work, out[t], head, t, pages, position, chosen))
    if worst > TOLERANCE[work.case.dtype]:
        raise ValueError(f"error {worst:.1e}, allowed {TOLERANCE[work.case.dtype]:.1e}")
    return worst


def _check_list(work: Any, listed: torch.Tensor, head: int, t: int, pages: torch.Tensor,
                position: int) -> torch.Tensor:
    """The blocks of a list, if they are as many as there must be and the best."""
    count = position // BLOCK + 1
    chosen = listed[listed >= 0].long()
    distinct = set(chosen.tolist())
    if len(distinct) != min(work.case.topk, count) or len(distinct) != len(chosen) or \
            count - 1 not in distinct:
        raise ValueError(f"query {t}, head {head}: list {listed.tolist()} of {count} blocks")
    if work.given_ids is not None or len(distinct) == count:
        return chosen
    products = work.index_cache[pages].float() @ work.idx_q[t, head].float()
    products.view(-1)[position + 1:] = -math.inf
    scores = products.amax(1)
    missed = torch.ones(count, dtype=torch.bool, device=scores.device)
    missed[chosen] = False
    own = chosen[chosen != count - 1]
    gap = (scores[missed].max() - scores[own].min()).item()
    if gap > SCORE_GAP * scores.abs().max().item():
        raise ValueError(f"query {t}, head {head}: a missed block scores {gap:.1e} more")
    return chosen


def _check_row(work: Any, out: torch.Tensor, head: int, t: int, pages: torch.Tensor, position: int,
               chosen: torch.Tensor | None) -> float:
    """The error of the heads of one group, relative to the largest value of their rows."""
    group = slice(head * work.case.heads_q // work.case.heads_kv,
                  (head + 1) * work.case.heads_q // work.case.heads_kv)
    blocks = torch.arange(len(pages), device=pages.device) if chosen is None else chosen
    rows = work.kv_cache[pages[blocks], head].double()  # [blocks,128,2*D]
    places = blocks[:, None] * BLOCK + torch.arange(BLOCK, device=pages.device)
    rows = rows[places <= position]
    logits = work.q[t, group].double() @ rows[:, :DIM].T * DIM ** -0.5
    want = torch.softmax(logits, 1) @ rows[:, DIM:]
    error = (out[group].double() - want).abs().amax(1) / want.abs().amax(1)
    return error.max().item() if bool(error.isfinite().all()) else math.inf


def cpu_clock(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    def measure() -> float:
        start = time.perf_counter()
        calls[0]()
        return time.perf_counter() - start

    return measure


def cuda_clock(calls: list[Callable[[], Any]]) -> Callable[[], float]:
    """Seconds of a call on the GPU, which never waits for the CPU. Short ones are replayed as a
    graph over the copies of the data in turn, again and again; long ones follow themselves."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

    def seconds(run: Callable[[], object]) -> float:
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) * 1e-3

    for call in calls:  # what compiles or tunes itself has done so
        call()
    duration = seconds(calls[0])
    if duration >= GRAPH_SECONDS:
        def measure() -> float:
            calls[0]()
            return seconds(calls[0])

        return measure
    rounds = math.ceil(GRAPH_SECONDS / (duration * len(calls)))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls * rounds:
            call()
    return lambda: seconds(graph.replay) / (len(calls) * rounds)
