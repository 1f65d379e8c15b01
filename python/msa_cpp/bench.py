"""Ours beside others, interleaved in one run, every result checked before it is timed.

    python -m msa_cpp.bench --context 8192 --json bench.json                      prefill
    python -m msa_cpp.bench --context 131072 --new-tokens 1 --batch 8             decode
    python -m msa_cpp.bench --context 131072 --new-tokens 1024 --selection trace.safetensors

One layer of random data over a paged cache as vLLM holds it. The contenders:

    msa             index, selection and attention: what a sparse layer costs
    index, sparse   its two parts
    dense           our dense attention
    adapter...      msa through msa_cpp.compat: the calls of vllm, of sglang and of fmha_sm100
    sdpa...         torch's dense attention: on a GPU cuDNN and FlashAttention
    vllm, sglang    the engines' own functions, where they can be imported and a GPU runs them

A verdict comes first: sampled queries are computed again in plain torch, attention in fp64 over the
blocks that a contender chose, and the choice by the gap of its scores. Then rounds of all
contenders, each in another order; `ratio` is a contender over msa, round by round. A measurement is
one call; on a GPU, calls below a millisecond are replayed as a CUDA graph over copies of the data
in turn, together larger than the L2 cache, and longer ones follow one that is not timed, so that
the GPU does not wait for the CPU.

`--selection FILE` (a trace of `msa eval --trace`) and `random` give the lists that sparse attention
reads; the index branch is then still computed inside `msa`, on the random data.
"""

from __future__ import annotations

import importlib
import json
import math
import platform
import re
import statistics
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import msa_cpp
import numpy as np
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.bias import causal_lower_right
from torch.nn.functional import scaled_dot_product_attention

from ._checkpoint import read_header
from ._command import InputError, Parser, device_here, exit_code
from ._files import write_whole
from ._measure import DIM, check, cpu_clock, cuda_clock
from .compat import fmha_sm100, sglang, vllm
from .compat._calls import BLOCK, valid_blocks
from .plot import read_trace

SHAPES = {"m3": (64, 4), "code-11m": (16, 2)}  # query and KV heads
DECODE_TOKENS = 16  # of a sequence; more are a chunk of a prefill in the engines
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}

Call = Callable[[], tuple[Any, Any]]  # (ids [Hkv,T,K] or None, out [T,Hq,D] or None)


@dataclass
class Case:
    context: int  # tokens of a sequence, the new ones included
    new_tokens: int
    batch: int
    heads_q: int
    heads_kv: int
    topk: int
    dtype: str
    device: str
    selection: str


class Work:
    """The tensors of a case, and its contenders: name -> call. What a contender alone needs, other
    layouts and large buffers, is made by its first call: not all are asked for, nor fit."""

    def __init__(self, case: Case, seed: int, given_ids: torch.Tensor | None) -> None:
        self.case, dtype, device = case, DTYPES[case.dtype], case.device
        generator = torch.Generator(device).manual_seed(seed)
        tokens, pages = case.batch * case.new_tokens, -(-case.context // BLOCK)

        def normal(*shape: int) -> torch.Tensor:
            return torch.randn(shape, dtype=dtype, device=device, generator=generator)

        self.q, self.idx_q = normal(tokens, case.heads_q, DIM), normal(tokens, case.heads_kv, DIM)
        self.kv_cache = normal(case.batch * pages, BLOCK, case.heads_kv, 2 * DIM).transpose(1, 2)
        self.index_cache = normal(case.batch * pages, BLOCK, DIM)
        order = torch.randperm(case.batch * pages, generator=generator, device=device)
        self.page_table = order.int().view(case.batch, pages)
        lengths = torch.full((case.batch,), case.context, dtype=torch.int32, device=device)
        self.seq_lens, self.prefix_lens = lengths, lengths - case.new_tokens
        steps = torch.arange(case.batch + 1, dtype=torch.int32, device=device)
        self.cu_seqlens_q = steps * case.new_tokens
        self.batch = msa_cpp.Batch(
            self.cu_seqlens_q, seq_lens=lengths, page_table=self.page_table,
            max_seqlen_q=case.new_tokens, max_seqlen_k=case.context)
        self.given_ids = given_ids
        self.ids = torch.empty((case.heads_kv, tokens, case.topk), dtype=torch.int32,
                               device=device)
        self.out = torch.empty_like(self.q)
        self.chosen = self.select() if given_ids is None else given_ids  # what `sparse` reads

    def nbytes(self) -> int:
        return sum(x.nbytes for x in (self.q, self.idx_q, self.kv_cache, self.index_cache))

    def lists(self) -> torch.Tensor:
        return self.ids if self.given_ids is None else self.given_ids

    def select(self, out: torch.Tensor | None = None) -> torch.Tensor:
        """The lists of the index branch."""
        return msa_cpp.index_select(self.idx_q, self.index_cache, topk=self.case.topk, out=out,
                                    batch=self.batch)

    def ours(self) -> dict[str, Call]:
        k, v = self.kv_cache[..., :DIM], self.kv_cache[..., DIM:]

        def sparse(lists: torch.Tensor) -> tuple[Any, Any]:
            return lists, msa_cpp.sparse_attention(self.q, k, v, lists, batch=self.batch,
                                                   out=self.out)

        def msa() -> tuple[Any, Any]:
            self.select(self.ids)
            return sparse(self.lists())

        def dense() -> tuple[Any, Any]:
            return None, msa_cpp.dense_attention(self.q, k, v, out=self.out, batch=self.batch)

        return {"msa": msa, "index": lambda: (self.select(self.ids), None),
                "sparse": lambda: sparse(self.chosen), "dense": dense}

    def adapters(self) -> dict[str, Call]:
        return {"adapter vllm": self.as_vllm(vllm), "adapter sglang": self.as_sglang(sglang),
                "adapter fmha": self.as_fmha()}

    def as_vllm(self, functions: Any) -> Call:
        """The calls of vLLM's Triton path."""
        c = self.case
        scale, table = DIM ** -0.5, self.page_table

        def decode() -> tuple[Any, Any]:
            functions.minimax_m3_index_decode(
                self.idx_q, self.index_cache, table, self.seq_lens, c.context, c.topk, 0, 1,
                c.heads_kv, c.new_tokens, c.new_tokens, out=self.ids)
            functions.minimax_m3_sparse_attn_decode(
                self.q, self.kv_cache, self.lists(), table, self.seq_lens, c.heads_kv, scale,
                self.out, c.new_tokens)
            return self.lists(), self.out

        def prefill() -> tuple[Any, Any]:
            lengths = (self.cu_seqlens_q, self.seq_lens, self.prefix_lens)
            scores = functions.minimax_m3_index_score(
                self.idx_q, self.index_cache, table, *lengths, c.new_tokens, c.context, c.heads_kv)
            functions.minimax_m3_index_topk(scores, lengths[0], lengths[2], c.new_tokens, c.topk,
                                             0, 1, out=self.ids)
            functions.minimax_m3_sparse_attn(
                self.q, self.kv_cache, self.lists(), table, *lengths, c.new_tokens, c.heads_kv,
                scale, self.out)
            return self.lists(), self.out

        return decode if c.new_tokens <= DECODE_TOKENS else prefill

    def as_fmha(self) -> Call:
        """The calls of a layer over MiniMax's operators, with the plans and buffers of a step."""
        c = self.case
        pages = dict(kv_indices=self.page_table.flatten())
        k, v = self.kv_cache[..., :DIM], self.kv_cache[..., DIM:]
        index_k = self.index_cache[:, None]
        lengths = self.seq_lens - self.prefix_lens, self.seq_lens
        scored = fmha_sm100.fmha_sm100_plan(*lengths, c.heads_kv, 1, page_size=BLOCK,
                                            output_maxscore=True)
        listed = fmha_sm100.fmha_sm100_plan(*lengths, c.heads_q, c.heads_kv, page_size=BLOCK,
                                            kv_block_num=c.topk)
        valid = valid_blocks(self.cu_seqlens_q, self.prefix_lens, self.q.shape[0])
        given_ids = None if self.given_ids is None else self.given_ids.transpose(0, 1)

        @cache
        def scores() -> torch.Tensor:
            return torch.full((self.q.shape[0], c.heads_kv, scored[3]["max_k_tiles"]), -math.inf,
                              device=self.q.device)

        def call() -> tuple[Any, Any]:
            fmha_sm100.fmha_sm100(self.idx_q, index_k, index_k, scored, max_score=scores(),
                                  output_o=False, **pages)
            chosen = fmha_sm100.sparse_topk_select(scores(), c.topk, valid, force_end_blocks=1,
                                                   max_score_layout="THK")
            ids = chosen if given_ids is None else given_ids
            out, _ = fmha_sm100.fmha_sm100(self.q, k, v, listed, kv_block_indexes=ids,
                                           out=self.out, **pages)
            return ids.transpose(0, 1), out

        return call

    @cached_property
    def contiguous(self) -> list[torch.Tensor]:
        """q, k and v as torch's attention has them: [B,H,S,D]"""
        c = self.case
        q = self.q.view(c.batch, c.new_tokens, c.heads_q, DIM).transpose(1, 2)
        both = self.kv_cache[self.page_table.long()]  # [B,pages,Hkv,128,2*D]
        both = both.transpose(1, 2).reshape(c.batch, c.heads_kv, -1, 2 * DIM)[:, :, :c.context]
        return [x.contiguous() for x in (q, both[..., :DIM], both[..., DIM:])]

    def torch_dense(self) -> dict[str, Call]:
        """torch's attention on contiguous copies, a call per backend."""
        c = self.case
        mask: dict[str, Any] = {"is_causal": True}
        if c.new_tokens == 1:
            mask = {}
        elif c.new_tokens < c.context:  # is_causal means the upper left corner
            mask = {"attn_mask": causal_lower_right(c.new_tokens, c.context)}

        def dense() -> tuple[Any, Any]:
            q, k, v = self.contiguous
            out = scaled_dot_product_attention(q, k, v, enable_gqa=True, **mask)
            return None, out.transpose(1, 2).reshape_as(self.q)

        if c.device == "cpu":
            return {"sdpa": dense}

        def through(backend: SDPBackend) -> Call:
            def call() -> tuple[Any, Any]:
                with sdpa_kernel(backend):
                    return dense()
            return call

        return {"sdpa cudnn": through(SDPBackend.CUDNN_ATTENTION),
                "sdpa flash": through(SDPBackend.FLASH_ATTENTION)}

    def engines(self) -> dict[str, Call]:
        """The engines' own functions, where they are installed; their Triton needs a GPU."""
        calls: dict[str, Call] = {}
        if self.case.device == "cpu":
            return calls
        if (functions := originals(vllm)) is not None:
            calls["vllm"] = refusing(self.as_vllm(functions))
        if (functions := originals(sglang)) is not None:
            calls["sglang"] = refusing(self.as_sglang(functions))
        return calls

    @cached_property
    def slots(self) -> list[torch.Tensor]:
        """K and V as SGLang has them: apart, [slots,Hkv,D]"""
        both = self.kv_cache.transpose(1, 2).flatten(0, 1)
        return [both[..., :DIM].contiguous(), both[..., DIM:].contiguous()]

    def as_sglang(self, functions: Any) -> Call:
        """The calls of SGLang's Triton path as its backend makes them on CUDA: pages of a block, K
        and V apart, slot by slot; several new tokens are a chunk, draft tokens too."""
        c = self.case
        index_k = self.index_cache.flatten(0, 1)[:, None]
        within = torch.arange(BLOCK, dtype=torch.int32, device=self.q.device)
        table = (self.page_table[..., None] * BLOCK + within).flatten(1)
        requests = torch.arange(c.batch, device=self.q.device)
        common = dict(sink=None, req_to_token=table)
        rows = dict(slot_ids=requests, page_size=BLOCK, seq_lens=self.seq_lens, block_size=BLOCK)

        def decode() -> tuple[Any, Any]:
            k, v = self.slots
            _, ids, _ = functions.flash_decode_with_topk_idx(
                q=self.idx_q, k_cache=index_k, v_cache=None, max_seqlen=c.context, topk=c.topk,
                init_blocks=0, local_blocks=1, disable_index_value=True, **rows, **common)
            ids = ids if self.given_ids is None else self.given_ids
            return ids, functions.flash_decode_with_gqa_share_sparse(
                q=self.q, k_cache=k, v_cache=v, topk_idx=ids, **rows, **common)

        chunks = dict(slot_ids=requests, seq_lens=self.seq_lens, prefix_lens=self.prefix_lens,
                      cu_seqlens=self.cu_seqlens_q, max_seqlen_q=c.new_tokens, block_size_q=1,
                      block_size_k=BLOCK, cu_seqblocks_q=self.cu_seqlens_q,
                      max_seqblock_q=c.new_tokens)
        # SGLang's function does not take the size; ours asks the server, and there is none.
        told = dict(page_size=BLOCK) if functions is sglang else {}

        def prefill() -> tuple[Any, Any]:
            k, v = self.slots
            _, ids = functions.flash_prefill_with_topk_index(
                q=self.idx_q, k_cache=index_k, v_cache=None, max_seqlen_k=c.context, topk=c.topk,
                init_blocks=0, local_blocks=1, disable_index_value=True, page_size=BLOCK,
                all_seqblock_q=self.q.shape[0], **chunks, **common)
            ids = ids if self.given_ids is None else self.given_ids
            return ids, functions.flash_prefill_with_gqa_share_sparse(
                q=self.q, k_cache=k, v_cache=v, topk_idx=ids, **chunks, **common, **told)

        return decode if c.new_tokens == 1 else prefill


def originals(adapter: Any) -> Any:
    """The functions that an adapter replaces, patched or not; None without the engine."""
    found = {}
    for module, functions in adapter._engine.modules.items():
        try:
            held = importlib.import_module(module)
        except ImportError:
            return None
        for ours in functions:
            found[ours.__name__] = adapter._engine.original(getattr(held, ours.__name__))
    return type(adapter._engine.name, (), {k: staticmethod(f) for k, f in found.items()})


def refusing(call: Call) -> Call:
    """A call of somebody else's code, which may fail in any way: the bench goes on without it."""
    def run() -> tuple[Any, Any]:
        try:
            return call()
        except Exception as error:
            raise RuntimeError(f"{type(error).__name__}: {error}") from error

    return run


# ---- lists, clocks, rows


def given_ids(case: Case) -> torch.Tensor | None:
    """int32 [Hkv,T,K] of a trace or at random, or None: what the index branch selects."""
    if case.selection == "index":
        return None
    first = case.context - case.new_tokens
    if case.selection == "random":
        draw = np.random.default_rng(2)
        ids = np.full((case.heads_kv, case.new_tokens, case.topk), -1, np.int32)
        for i in range(case.new_tokens):
            local = (first + i) // BLOCK
            count = min(case.topk - 1, local)
            for head in range(case.heads_kv):
                others = draw.choice(local, count, replace=False)
                ids[head, i, :count + 1] = sorted([*others, local])
    else:
        path = Path(case.selection)
        names = (re.fullmatch(r"layers\.(\d+)\.block_ids", name) for name in read_header(path)[0])
        layers = sorted(int(match[1]) for match in names if match)
        if not layers:
            raise InputError(f"{path}: not a trace of msa eval")
        whole = np.concatenate([read_trace(path, layer)[0] for layer in layers])
        if len(whole) < case.heads_kv or whole.shape[1] < case.context or \
                whole.shape[2] != case.topk:
            raise InputError(f"{path}: lists are {list(whole.shape)}, expected "
                             f"[>={case.heads_kv},>={case.context},{case.topk}]")
        ids = np.ascontiguousarray(whole[:case.heads_kv, first:case.context])
    return torch.from_numpy(np.tile(ids, (1, case.batch, 1))).to(case.device)


def contenders(work: Work) -> dict[str, Call]:
    return {**work.ours(), **work.adapters(), **work.torch_dense(), **work.engines()}


def run(case: Case, repeats: int, only: list[str]) -> list[dict[str, Any]]:
    """The rows of a case: a verdict for every contender, then the rounds."""
    ids = given_ids(case)
    works = [Work(case, 0, ids)]
    if case.device != "cpu":
        l2 = torch.cuda.get_device_properties(0).L2_cache_size
        copies = min(8, math.ceil(2 * l2 / works[0].nbytes()))
        works += [Work(case, seed, ids) for seed in range(1, copies)]
    calls: dict[str, list[Call]] = {}
    for work in works:
        known = contenders(work)
        for name in only or known:
            if name not in known:
                raise InputError(f"--contenders: got {name}, expected some of {', '.join(known)}")
            calls.setdefault(name, []).append(known[name])

    rows, clocks = {}, {}
    for name, copies_of in calls.items():
        row: dict[str, Any] = {"contender": name, **asdict(case), "verdict": "ok"}
        rows[name] = row
        works[0].ids.fill_(-7)
        works[0].out.fill_(math.nan)
        try:
            row["max_error"] = check(works[0], *copies_of[0]())
            clocks[name] = (cpu_clock if case.device == "cpu" else cuda_clock)(copies_of)
        except ValueError as error:
            row["verdict"] = f"failed: {error}"
        except (NotImplementedError, RuntimeError) as error:
            row["verdict"] = f"refused: {str(error).splitlines()[0]}"
        print(f"{name:14} {row['verdict']}", file=sys.stderr)

    # Every round in another order: a GPU that comes from dense attention is at its power limit.
    seconds: dict[str, list[float]] = {name: [] for name in clocks}
    order = np.random.default_rng(3)
    for _ in range(repeats):
        for name in order.permutation(list(clocks)).tolist():
            seconds[name].append(clocks[name]())
    for name, times in seconds.items():
        rows[name] |= {"repeats": repeats, "seconds_median": statistics.median(times),
                       "seconds_p10": float(np.quantile(times, 0.1)),
                       "seconds_p90": float(np.quantile(times, 0.9))}
        if "msa" in seconds:
            rows[name]["ratio"] = statistics.median(
                mine / ours for mine, ours in zip(times, seconds["msa"]))
    return list(rows.values())


def machine(device: str) -> dict[str, Any]:
    known = {"cpu": platform.processor() or platform.machine(), "threads": msa_cpp.num_threads(),
             "torch": torch.__version__, "msa_cpp": msa_cpp.__version__}
    if device != "cpu":
        known["gpu"] = torch.cuda.get_device_name()
    others = ("triton", "vllm", "sglang")
    return known | {name: sys.modules[name].__version__ for name in others if name in sys.modules}


def tsv(rows: list[dict[str, Any]]) -> str:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, *([str(row.get(key, "")) for key in columns] for row in rows)]
    return "".join("\t".join(line) + "\n" for line in lines)


def lines_of(rows: list[dict[str, Any]]) -> str:
    text = []
    for row in rows:
        if "seconds_median" not in row:
            continue
        ratio = f"  {row['ratio']:.3g}x msa" if "ratio" in row else ""
        text.append(f"{row['contender']:14} {row['batch']} x {row['new_tokens']} over "
                    f"{row['context']}: {row['seconds_median'] * 1e3:.4g} ms "
                    f"({row['seconds_p10'] * 1e3:.4g} to {row['seconds_p90'] * 1e3:.4g}){ratio}")
    return "\n".join(text)


def body(arguments: list[str] | None = None) -> str:
    parser = Parser(prog="python -m msa_cpp.bench", description=__doc__.splitlines()[0])
    parser.add_argument("--context", default="8192", help="key lengths, separated by commas")
    parser.add_argument("--new-tokens", type=int, help="per sequence (default: all are new)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (default 1)")
    parser.add_argument("--shape", default="m3", help="m3 (default), code-11m or HQ,HKV")
    parser.add_argument("--topk", type=int, default=16, help="blocks per query (default 16)")
    parser.add_argument("--dtype", choices=list(DTYPES), help="default: bf16 on a GPU, else f32")
    parser.add_argument("--device", type=device_here, choices=("cpu", "cuda"),
                        default="cuda" if torch.cuda.is_available() else "cpu",
                        help="default: cuda where there is a GPU")
    parser.add_argument("--selection", default="index",
                        help="index (default), random, or a trace FILE")
    parser.add_argument("--contenders", default="",
                        help='only these rows, separated by commas, as "msa,adapter vllm,vllm"')
    parser.add_argument("--repeats", type=int, default=10, help="rounds (default 10)")
    parser.add_argument("--json", type=Path, help="file for the machine and the rows")
    parser.add_argument("--tsv", type=Path, help="file for the rows")
    options = parser.parse_args(arguments)
    try:
        heads_q, heads_kv = SHAPES.get(options.shape) or map(int, options.shape.split(","))
    except ValueError:
        heads_q = heads_kv = 0
    if heads_kv < 1 or heads_q < 1 or heads_q % heads_kv:
        raise InputError(f"--shape: got {options.shape}, expected m3, code-11m or HQ,HKV, HQ a "
                         "multiple of HKV")
    try:
        contexts = [int(word) for word in options.context.split(",")]
    except ValueError:
        raise InputError(f"--context: got {options.context}, expected numbers, separated by "
                         "commas") from None
    for flag, numbers in {"--context": contexts, "--batch": [options.batch],
                          "--topk": [options.topk], "--repeats": [options.repeats]}.items():
        if min(numbers) < 1:
            raise InputError(f"{flag}: got {min(numbers)}, expected at least 1")
    for flag, path in {"--json": options.json, "--tsv": options.tsv}.items():
        if path and not path.parent.is_dir():
            raise InputError(f"{flag}: {path}: no such directory")
    rows = []
    with torch.inference_mode():
        for context in contexts:
            new_tokens = context if options.new_tokens is None else options.new_tokens
            if not 0 < new_tokens <= context:
                raise InputError(f"--new-tokens: got {new_tokens}, expected 1..{context}")
            case = Case(context, new_tokens, options.batch, heads_q, heads_kv, options.topk,
                        options.dtype or ("f32" if options.device == "cpu" else "bf16"),
                        options.device, options.selection)
            rows += run(case, options.repeats, [n for n in options.contenders.split(",") if n])
    result = {"machine": machine(options.device), "rows": rows}
    if options.json:
        write_whole(options.json, json.dumps(result, indent=1) + "\n")
    if options.tsv:
        write_whole(options.tsv, tsv(rows))
    failed = [row["contender"] for row in rows if row["verdict"].startswith("failed")]
    if failed:
        print(lines_of(rows))
        sys.exit(f"msa_cpp.bench: wrong results: {', '.join(failed)}")
    return lines_of(rows)


if __name__ == "__main__":
    sys.exit(exit_code("msa_cpp.bench", body))
