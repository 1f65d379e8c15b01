"""fmha_sm100_plan, fmha_sm100 and sparse_topk_select.

Shapes: q [T,Hq,D]; k, v packed [S,Hkv,D] or pages [P,Hkv,page_size,D]; B requests. A plan is a dict
of int32 tensors on the device of the call, which callers may write into between runs (under a CUDA
graph, for example); lengths are read from them when the kernels run:

    qo_segment_offsets [B+1], kv_segment_lens [B], kv_segment_offsets [B+1], kv_page_indptr [B+1]
    qo_offset [B]   the position of the first query of each request; below 0 counts as 0
    max_k_tiles     the columns of max_score; may be set to those of the caller's buffer

Where lists of blocks are given, requests may grow beyond the lengths that the plan was made for, as
SGLang's decode plans do; else the longest of those is a bound of later ones.
"""

from __future__ import annotations

from typing import Any

import msa_cpp
import torch

from .._calls import BLOCK, NO_BOUND

__all__ = ["_fmha_sm100", "_fmha_sm100_plan", "fmha_sm100", "fmha_sm100_plan",
           "sparse_topk_select"]


def fmha_sm100_plan(
    qo_segment_lens: torch.Tensor, kv_segment_lens: torch.Tensor, num_qo_heads: int,
    num_kv_heads: int = -1, *, qo_offset: int | torch.Tensor | None = None,
    split_prefill_decode: bool = True, **options: Any,
) -> tuple[bool, int, int, dict, None]:
    """(mixed, split, batch, plan, prefill_plan). Batches are never split here: one plan serves
    decode and prefill rows together, so mixed is False and prefill_plan None."""
    plan = _fmha_sm100_plan(qo_segment_lens, kv_segment_lens, num_qo_heads, num_kv_heads,
                            qo_offset=qo_offset, **options)
    return False, 0, qo_segment_lens.shape[0], plan, None


def _fmha_sm100_plan(
    qo_segment_lens: torch.Tensor, kv_segment_lens: torch.Tensor, num_qo_heads: int,
    num_kv_heads: int = -1, qo_offset: int | torch.Tensor | None = None, *,
    num_kv_splits: int = -1, page_size: int = -1, output_maxscore: bool = False,
    kv_block_num: int = -1, causal: bool = True, sparse_kernel_mode: str = "auto",
    use_fp8_kvcache: bool = False, device: torch.device | str | None = None, stream: Any = None,
    usable_SM_count: int = -1, decode_backend: str = "auto", prefill_backend: str = "auto",
    kv_dtype: str | None = None, block_scale_shift: int = 3,
) -> dict[str, Any]:
    """The plan of a batch; lengths int32 or int64 [B] on any device, read back here once.

    num_kv_splits, sparse_kernel_mode, stream, usable_SM_count and the backends are hints that
    nothing here needs. Pages may have any size, which is that of the blocks in lists too. Errors:
    NotImplementedError for 8-bit and 4-bit caches, the q8kv4 backends, and scores, whose tiles have
    128 keys, over pages of another size.
    """
    if use_fp8_kvcache or kv_dtype is not None or "q8kv4" in (decode_backend, prefill_backend):
        raise NotImplementedError("kv_dtype, use_fp8_kvcache, q8kv4: asked for; 8-bit and 4-bit "
                                  "caches are not in this version")
    if output_maxscore and page_size > 0 and page_size != BLOCK:
        raise NotImplementedError(f"page_size: got {page_size}, supported with output_maxscore is "
                                  f"{BLOCK}")
    if device is None:
        device = qo_segment_lens.device
        if device.type == "cpu" and torch.cuda.is_available():
            device = torch.device("cuda", torch.cuda.current_device())
    qo_lens, kv_lens = (x.to("cpu", torch.int32) for x in (qo_segment_lens, kv_segment_lens))
    if qo_lens.shape != kv_lens.shape:
        raise ValueError(f"kv_segment_lens: got {kv_lens.shape[0]} requests, expected the "
                         f"{qo_lens.shape[0]} of qo_segment_lens")
    if qo_offset is None:
        qo_offset = kv_lens - qo_lens
    elif isinstance(qo_offset, int):
        qo_offset = torch.full_like(qo_lens, qo_offset)
    max_kv_len = int(kv_lens.max()) if len(kv_lens) else 0
    tiles, block = -(-max_kv_len // BLOCK), page_size if page_size > 0 else BLOCK

    def here(values: torch.Tensor) -> torch.Tensor:
        return values.to(device, torch.int32, copy=True)

    return {
        "qo_segment_lens": here(qo_lens), "qo_segment_offsets": here(_prefix_sums(qo_lens)),
        "kv_segment_lens": here(kv_lens), "kv_segment_offsets": here(_prefix_sums(kv_lens)),
        "kv_page_indptr": here(_prefix_sums((kv_lens + block - 1) // block)),
        "qo_offset": here(qo_offset), "max_k_tiles": -(-tiles // 128) * 128 if output_maxscore
        else -1, "max_qo_len": int(qo_lens.max()) if len(qo_lens) else 0, "max_kv_len": max_kv_len,
        "total_qo_len": int(qo_lens.sum()), "orig_num_qo_heads": num_qo_heads,
        "num_kv_heads": num_kv_heads, "page_size": page_size, "kv_block_num": kv_block_num,
        "causal": causal, "pack_factor": 1, "num_kv_splits": 1, "MM-SA-Nv": False,
    }


def fmha_sm100(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
    plan_info: tuple[bool, int, int, dict, None], kv_indices: torch.Tensor | None = None,
    kv_block_indexes: torch.Tensor | None = None,
    q_offset_override: int | torch.Tensor | None = None, out: torch.Tensor | None = None,
    max_score: torch.Tensor | None = None, page_table: torch.Tensor | None = None, **options: Any,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """`_fmha_sm100` with the plan of `fmha_sm100_plan`."""
    return _fmha_sm100(q, k, v, plan_info[3], kv_indices, kv_block_indexes, q_offset_override, out,
                       max_score, page_table=page_table, **options)


def _fmha_sm100(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, plan_info: dict[str, Any],
    kv_indices: torch.Tensor | None = None, kv_block_indexes: torch.Tensor | None = None,
    q_offset_override: int | torch.Tensor | None = None, out: torch.Tensor | None = None,
    max_score: torch.Tensor | None = None, sm_scale: float | None = None,
    q_scale: float | None = None, k_scale: float | None = None, v_scale: float | None = None,
    o_scale: float | None = None, output_maxscore: bool = True, output_o: bool = True,
    check_input_valid: bool = False, page_table: torch.Tensor | None = None,
) -> tuple[torch.Tensor | None, torch.Tensor | None]:
    """(out [T,Hq,D] or None, max_score or None).

    Args:
        kv_indices: int32 [pages], the pages of the requests one after another.
        page_table: int32 [B,pages] instead of it, which saves gathering one.
        kv_block_indexes: int32 [T,Hkv,K]: attend to these blocks; else to all. Of [T,Hq,K] the
            list of the first head of each group counts.
        max_score: float32 [Hq,max_k_tiles,T] or [T,Hq,max_k_tiles], of any strides, to fill with
            the unscaled maximum of each tile of 128 keys, -inf where nothing is visible. Tiles
            behind the longest length of the plan are not touched. Made, with -inf there, if the
            plan has max_k_tiles and `output_maxscore`.

    With one KV head and ``output_o=False`` scores are all that is computed. What the host can see
    is always checked, `check_input_valid` adds nothing. Errors: ValueError for what does not fit
    the plan, NotImplementedError for 8-bit elements and for scales other than 1.
    """
    for name, scale in (("q_scale", q_scale), ("k_scale", k_scale), ("v_scale", v_scale),
                        ("o_scale", o_scale)):
        if scale not in (None, 1):
            raise NotImplementedError(f"{name}: got {scale}, supported is 1: scales belong to "
                                      "8-bit caches")
    _check_plan(plan_info, q, k)
    batch = _lengths(plan_info, k, q_offset_override)
    batch["max_seqlen_q"] = plan_info["max_qo_len"]
    tiles = -(-plan_info["max_kv_len"] // BLOCK)
    if k.dim() == 4:
        batch |= _pages(plan_info, kv_indices, page_table)
    if kv_block_indexes is not None:
        heads = kv_block_indexes.shape[1]
        if heads == q.shape[1]:
            kv_block_indexes = kv_block_indexes[:, ::heads // k.shape[1]]
        batch["max_seqlen_k"] = NO_BOUND if k.dim() == 4 else k.shape[0]
        if k.dim() == 4 and plan_info["max_qo_len"] == 1 and not batch["causal"]:
            batch |= dict(causal=True, q_offset=None)  # the one token is the last
        ids, described = kv_block_indexes.transpose(0, 1), msa_cpp.Batch(**batch)
        return msa_cpp.sparse_attention(q, k, v, ids, batch=described, softmax_scale=sm_scale,
                                        out=out), None
    batch["max_seqlen_k"] = plan_info["max_kv_len"]
    wanted = output_maxscore and plan_info["max_k_tiles"] > 0
    if not (wanted or output_o):
        raise ValueError("output_o: got False, expected True without max_score")
    columns = None  # [Hq,T,tiles]
    if wanted:
        maxima = _maxima(plan_info, q, max_score, tiles)
        columns = maxima[..., :tiles]
        max_score = maxima.transpose(1, 2) if max_score is None else max_score
    if not output_o and k.shape[1] == 1:
        msa_cpp.index_scores(q, k[:, 0], **batch, out=columns)
        return None, max_score
    direct = columns
    if columns is not None and columns.stride(-1) != 1:
        direct = torch.empty_like(columns, memory_format=torch.contiguous_format)
    out = msa_cpp.dense_attention(q, k, v, **batch, softmax_scale=sm_scale, out=out,
                                  block_max=direct)
    if columns is not None and direct is not None and direct is not columns:
        columns.copy_(direct)
    return out if output_o else None, max_score if wanted else None


def sparse_topk_select(
    max_score: torch.Tensor, topk: int, num_valid_pages: int | torch.Tensor | None = None,
    output: torch.Tensor | None = None, force_begin_blocks: int = 0, force_end_blocks: int = 0,
    max_score_layout: str = "HKT", block_table: torch.Tensor | None = None,
    seq_lens: torch.Tensor | None = None, block_size: int = 0, decode_query_len: int = 0,
) -> torch.Tensor:
    """int32 [T,Hq,K]: the tiles to attend to, ascending, -1 behind; in `output` if given.

    Args:
        max_score: float32 [Hq,tiles,T], or with max_score_layout="THK" [T,Hq,tiles], any strides.
        num_valid_pages: how many tiles count, for all rows or int32 or int64 [T]; default all.
        force_begin_blocks, force_end_blocks: tiles that are always chosen, of the valid ones.
        block_table: int32 [T,Hq,tiles]: what to put for each chosen tile, in the same order.

    Of equal scores the lower tile wins. Errors: NotImplementedError for a block_table [B,pages],
    whose flat page ids are another library's.
    """
    if max_score_layout.upper() not in ("HKT", "THK"):
        raise ValueError(f'max_score_layout: got {max_score_layout!r}, expected "HKT" or "THK"')
    if seq_lens is not None or (block_table is not None and block_table.dim() == 2):
        raise NotImplementedError("block_table: got rank 2 or seq_lens, supported is [T,Hq,tiles]")
    scores = (max_score.transpose(1, 2) if max_score_layout.upper() == "HKT"
              else max_score.transpose(0, 1))  # [Hq,T,tiles]
    if isinstance(num_valid_pages, torch.Tensor):
        num_valid_pages = num_valid_pages.int()
    if output is None:
        output = torch.empty((scores.shape[1], scores.shape[0], topk), dtype=torch.int32,
                             device=max_score.device)
    msa_cpp.select_blocks(scores, topk, num_valid_blocks=num_valid_pages,
                          init_blocks=force_begin_blocks, local_blocks=force_end_blocks,
                          out=output.transpose(0, 1))
    if block_table is not None:
        if block_table.shape != (*output.shape[:2], scores.shape[2]):
            raise ValueError(f"block_table: got shape {tuple(block_table.shape)}, expected "
                             f"{(*output.shape[:2], scores.shape[2])}")
        found = block_table.gather(2, output.clamp(min=0).long())
        output.copy_(torch.where(output < 0, output, found))
    return output


def _prefix_sums(lengths: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.pad(lengths.cumsum(0), (1, 0))


def _check_plan(plan: dict[str, Any], q: torch.Tensor, k: torch.Tensor) -> None:
    kv_heads = plan["num_kv_heads"]
    paged = plan["page_size"] > 0
    for name, got, planned in (
            ("q: tokens", q.shape[0], plan["total_qo_len"]),
            ("q: heads", q.shape[1], plan["orig_num_qo_heads"]),
            ("k: heads", k.shape[1], k.shape[1] if kv_heads < 0 else kv_heads),
            ("k: rank", k.dim(), 4 if paged else 3),
            ("k: tokens of a page", k.shape[-2] if paged else 0, max(0, plan["page_size"]))):
        if got != planned:
            raise ValueError(f"{name}: got {got}, the plan was made for {planned}")


def _lengths(plan: dict[str, Any], k: torch.Tensor,
             q_offset: int | torch.Tensor | None) -> dict[str, Any]:
    """The lengths of a batched operator, from the tensors of the plan as they are now."""
    first: torch.Tensor = plan["qo_offset"]
    if isinstance(q_offset, int):
        first = torch.full_like(first, q_offset)
    elif q_offset is not None:
        first = q_offset
    if not first.is_cuda:  # where it is, kernels clamp it
        first = first.clamp(min=0)
    batch = dict(cu_seqlens_q=plan["qo_segment_offsets"], causal=plan["causal"],
                 q_offset=first if plan["causal"] else None,
                 block_size=plan["page_size"] if k.dim() == 4 else BLOCK)
    if k.dim() == 3:
        return batch | dict(cu_seqlens_k=plan["kv_segment_offsets"])
    return batch | dict(seq_lens=plan["kv_segment_lens"])


def _pages(plan: dict[str, Any], kv_indices: torch.Tensor | None,
           page_table: torch.Tensor | None) -> dict[str, torch.Tensor]:
    """Where the blocks of the requests lie: in a table, or in one list after the other."""
    if page_table is not None:
        return dict(page_table=page_table)
    indptr: torch.Tensor = plan["kv_page_indptr"]
    if kv_indices is None:
        raise ValueError("kv_indices: not given, expected the pages of k and v, or page_table")
    if kv_indices.device.type == "cpu" and int(indptr[-1]) > kv_indices.shape[0]:
        raise ValueError(f"kv_indices: got {kv_indices.shape[0]} pages, the plan needs "
                         f"{int(indptr[-1])}")
    return dict(page_table=kv_indices, page_rows=indptr[:-1])


def _maxima(plan: dict[str, Any], q: torch.Tensor, max_score: torch.Tensor | None,
            tiles: int) -> torch.Tensor:
    """A caller's buffer, or a new one in the layout [Hq,tiles,T], as [Hq,T,tiles]."""
    tokens, heads, _ = q.shape
    columns = plan["max_k_tiles"]
    if columns < tiles:
        raise ValueError(f"max_k_tiles: got {columns}, the longest request has {tiles} tiles")
    if max_score is None:
        return torch.full((heads, columns, tokens), -float("inf"), dtype=torch.float32,
                          device=q.device).transpose(1, 2)
    if max_score.shape == (tokens, heads, columns):
        return max_score.transpose(0, 1)
    if max_score.shape == (heads, columns, tokens):
        return max_score.transpose(1, 2)
    raise ValueError(f"max_score: got shape {tuple(max_score.shape)}, expected [H,K,T] = "
                     f"{(heads, columns, tokens)} or [T,H,K] = {(tokens, heads, columns)}")
