"""MiniMax Sparse Attention in Hugging Face transformers, for the text models of `minimax_m3_vl`.

    import msa_cpp.integrations.transformers as msa_transformers
    msa_transformers.register()
    model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="msa_cpp")

Only models that run with "msa_cpp" change; an eager model in the same process stays as it is.

What runs where: the index branch of a sparse layer is `msa_cpp.index_select` instead of dense fp32
scores over all keys, its attention `msa_cpp.sparse_attention`; full-attention layers run
`msa_cpp.dense_attention`; the vision tower (not causal, head dim 80) is handed on to "sdpa".
Keys, values and index keys stay in the model's own cache, dynamic or static, and are read there
in place: row b of a cache [B,Hkv,S,D] is a strided [S,Hkv,D], whatever the capacity S.

Right padding. A token's place in its sequence is the number of real tokens before it. Where
padding lies before a new token, the caches of transformers store it behind the padding; its key,
value and index key are then copied to their place, over the padding, so that every row of a cache
is dense up to its own length and gives what the sequence alone would give. `position_ids` must
count real tokens.

Not supported, refused by name when first met:
    left padding                  blocks are anchored at slot 0 of a cache row: padding in front
                                  shifts the block grid, and other blocks are chosen
    right padding in generate()   transformers takes the first new token from the logits of the
                                  padding, and counts positions on from there
    padding between tokens, packed sequences, custom masks, sliding windows
    output_attentions, attention dropout, other models than minimax_m3_vl
Gradients are those of the eager model; the loss of the index branch is not in it. Under
`torch.autocast`, so with Trainer(bf16=True), the operators cast queries, keys and index keys, as
the products of the eager model do; the caches hold what the layers made.
Under torch.compile values cannot be looked at: there only what types and shapes show is refused.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable
from typing import Any

import msa_cpp
import torch
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

try:
    from transformers.models.minimax_m3_vl import modeling_minimax_m3_vl as m3
except ImportError as error:
    raise ImportError("msa_cpp.integrations.transformers: this transformers has no minimax_m3_vl; "
                      "5.23 and 5.24 have it") from error

NAME = "msa_cpp"
_CACHE_NAMES = {"past_key_values": "cache"}  # 5.23's name of the argument: 5.24's

_log = logging.getLogger(__name__)
_originals: dict[Any, Callable] = {}  # class -> its forward, while registered


def register() -> None:
    """Makes `attn_implementation="msa_cpp"` work for minimax_m3_vl models. Idempotent.

    Errors: RuntimeError when this version of transformers calls its layers in another way.
    """
    if _originals:
        return
    replaced: dict[Any, Callable] = {m3.MiniMaxM3VLAttention: _layer_forward,
                                     m3.MiniMaxM3VLIndexer: _indexer_forward}
    for layer, ours in replaced.items():
        theirs = list(inspect.signature(layer.forward).parameters)
        known = list(inspect.signature(ours).parameters)
        if [_CACHE_NAMES.get(name, name) for name in theirs] != known:
            raise RuntimeError(f"register: {layer.__name__}.forward takes {', '.join(theirs)}: "
                               "this version of transformers is not supported, 5.23 and 5.24 are")
    for layer, ours in replaced.items():
        _originals[layer] = layer.forward
        layer.forward = ours
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    _log.info('attn_implementation="msa_cpp" serves the text models of minimax_m3_vl; vision '
              'towers run with "sdpa"; refused: left padding, packed sequences, sliding windows, '
              "output_attentions, attention dropout")


def unregister() -> None:
    """Undoes `register`: transformers is as it was, and "msa_cpp" an unknown name. Idempotent."""
    for layer, forward in _originals.items():
        layer.forward = forward
    _originals.clear()
    AttentionInterface._global_mapping.pop(NAME, None)
    AttentionMaskInterface._global_mapping.pop(NAME, None)


# The mask and the places of the tokens


def padding_mask(batch_size: int, q_length: int, kv_length: int, q_offset: int | torch.Tensor = 0,
                 kv_offset: int = 0, attention_mask: torch.Tensor | None = None,
                 local_size: int | None = None, **_: Any) -> torch.Tensor | None:
    """The mask function of "msa_cpp": bool [B,S], True for tokens, or None where nothing is padded.

    It never grows to [B,1,T,S]: causality is the operators' own business.
    """
    if local_size is not None or kv_offset != 0:
        raise NotImplementedError(f"sliding window: got {local_size or kv_offset}, msa_cpp attends "
                                  "to all blocks up to a query's own")
    if attention_mask is None:
        return None
    if not torch.compiler.is_compiling():
        seen = int(q_offset) + q_length
        if attention_mask.shape[1] < seen:
            raise ValueError(f"attention_mask: got {attention_mask.shape[1]} columns, expected "
                             f"{seen}, the cached tokens and the new ones")
        if attention_mask[:, :seen].all():
            return None
    mask = attention_mask.bool()[:, :kv_length]
    return torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))


def _allowed(mask: torch.Tensor) -> torch.Tensor:
    """bool, of a mask that is bool or additive"""
    return mask if mask.dtype == torch.bool else mask == 0


def _tokens(mask: torch.Tensor) -> torch.Tensor:
    """bool [B,S], False for padding; a caller's own mask [B,1,T,S] shows it in its last row."""
    return mask if mask.ndim == 2 else _allowed(mask)[:, 0, -1]


def _refuse_left_padding(tokens: torch.Tensor) -> None:
    left = ~tokens[:, 0] & tokens.any(1)
    if left.any():
        raise ValueError(
            f"attention_mask: row {int(left.nonzero()[0])} is padded on the left: blocks are "
            "anchored at the first slot of a row, so padding in front shifts the block grid and "
            "selects other blocks; pad on the right")


def _places(mask: torch.Tensor | None, slots: torch.Tensor, batch: int) -> torch.Tensor:
    """int64 [B,T]: the place in its sequence of the token in each of slots [T], -1 for padding."""
    if mask is None:
        return slots.expand(batch, -1)
    tokens = _tokens(mask).expand(batch, -1)
    return (tokens.cumsum(1) - 1).masked_fill(~tokens, -1)[:, slots]


def _check(mask: torch.Tensor | None, position_ids: torch.Tensor | None, slots: torch.Tensor,
           places: torch.Tensor) -> None:
    """Refuses masks and position_ids that mean more than padding on the right."""
    real = places >= 0  # [B,T]
    if mask is not None:
        tokens = _tokens(mask)
        if mask.ndim == 4:
            causal = torch.arange(mask.shape[3], device=mask.device) <= slots[:, None]  # [T,S]
            different = _allowed(mask) ^ (causal & tokens[:, None, None])
            if (different & real[:, None, :, None]).any():
                raise NotImplementedError("attention_mask: got a mask [B,1,T,S] that is not "
                                          "causal with padding, msa_cpp supports no other")
        _refuse_left_padding(tokens)
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("attention_mask: got padding between the tokens of one call, "
                             "expected it behind them")
    if position_ids is None:  # as the slots
        position_ids = slots
    wrong = (places != position_ids) & real
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{b},{t}]: got {int(position_ids.expand_as(places)[b, t])}, expected "
            f"{int(places[b, t])}, the number of tokens before it: packed sequences are not "
            "supported, nor is generate() on prompts padded on the right, since transformers takes "
            "their first new token from the logits of the padding")


def _settle(cache: torch.Tensor, slots: torch.Tensor, places: torch.Tensor) -> None:
    """Copies the rows `slots` [T] of cache [B,H,S,D] to their places [B,T]; padding stays."""
    target = torch.where(places >= 0, places, slots)
    if not torch.compiler.is_compiling() and torch.equal(target, slots.expand_as(target)):
        return
    rows = cache.index_select(2, slots)  # [B,H,T,D]
    cache.scatter_(2, target[:, None, :, None].expand_as(rows), rows)


# The layers


def _runs_here(module: Any) -> bool:
    return module.config._attn_implementation == NAME


def _layer_forward(self: Any, hidden_states: torch.Tensor,
                   position_embeddings: tuple[torch.Tensor, torch.Tensor],
                   attention_mask: torch.Tensor | None, cache: Any = None,
                   **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MiniMaxM3VLAttention.forward: mask and position_ids become the places of the tokens."""
    theirs = _originals[m3.MiniMaxM3VLAttention]
    if cache is None:
        cache = kwargs.pop("past_key_values", None)
    if not _runs_here(self):
        return theirs(self, hidden_states, position_embeddings, attention_mask, cache, **kwargs)
    batch, tokens, _ = hidden_states.shape
    seen = 0 if cache is None else cache.get_seq_length(self.layer_idx)
    slots = torch.arange(tokens, device=hidden_states.device) + seen
    places = _places(attention_mask, slots, batch)
    position_ids = kwargs.pop("position_ids", None)
    if self.layer_idx == 0 and not torch.compiler.is_compiling():  # all layers get the same
        _check(attention_mask, position_ids, slots, places)
    if attention_mask is not None:
        kwargs["slots"] = slots
    return theirs(self, hidden_states, position_embeddings, None, cache, position_ids=places,
                  **kwargs)


def _indexer_forward(self: Any, hidden_states: torch.Tensor,
                     position_embeddings: tuple[torch.Tensor, torch.Tensor], cache: Any,
                     position_ids: torch.Tensor) -> torch.Tensor:
    """MiniMaxM3VLIndexer.forward: int64 [B,Hi,T,min(K,blocks)], ascending ids, -1 tail."""
    if not _runs_here(self):
        return _originals[m3.MiniMaxM3VLIndexer](self, hidden_states, position_embeddings, cache,
                                                 position_ids)
    batch, tokens, _ = hidden_states.shape

    def heads(projection: torch.nn.Module, norm: torch.nn.Module) -> torch.Tensor:
        rows = projection(hidden_states).view(batch, tokens, -1, self.head_dim)
        return norm(rows).transpose(1, 2)

    q, k = m3.apply_rotary_pos_emb(heads(self.q_proj, self.q_norm), heads(self.k_proj, self.k_norm),
                                   *position_embeddings)  # [B,Hi,T,Di], [B,1,T,Di]
    if cache is not None:
        layer = cache.layers[self.layer_idx]
        k = layer.update_index(k)  # [B,1,S,Di]
        slots = torch.arange(tokens, device=k.device) + (layer.get_seq_length() - tokens)
        _settle(k, slots, position_ids)
    topk = min(self.topk_blocks, -(-k.shape[2] // self.block_size))
    return _select(q, k, position_ids, self.block_size, topk, self.local_blocks)


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None = None, dropout: float = 0.0,
              scaling: float | None = None, block_indices: torch.Tensor | None = None,
              position_ids: torch.Tensor | None = None, slots: torch.Tensor | None = None,
              **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function of "msa_cpp": query [B,Hq,T,D], key and value [B,Hkv,S,D] (a cache of
    any capacity) -> [B,T,Hq,D], and no weights.

    block_indices [B,Hkv,T,K] in any order, -1 tail, or None: every block. position_ids [B,T] are
    places, -1 for padding, whose output is 0. slots [T] are given where places may differ from
    them. attention_mask: None from `_layer_forward`; padding on the right needs none.
    """
    if isinstance(module, m3.MiniMaxM3VLVisionAttention):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask,
                                               dropout=dropout, scaling=scaling, **kwargs)
    if not isinstance(module, m3.MiniMaxM3VLAttention):
        raise NotImplementedError(f'attn_implementation="msa_cpp": got a {type(module).__name__}, '
                                  "supported are the models of minimax_m3_vl")
    if kwargs.get("output_attentions", module.config.output_attentions):
        raise NotImplementedError("output_attentions: msa_cpp never has the weights in memory")
    if dropout > 0:
        raise NotImplementedError(f"attention_dropout: got {dropout}, msa_cpp supports 0")
    if attention_mask is not None:
        _refuse_left_padding(_tokens(attention_mask))
    assert position_ids is not None  # given by _layer_forward, whose module this is
    position_ids = position_ids.expand(query.shape[0], -1)
    if slots is not None:
        _settle(key, slots, position_ids)
        _settle(value, slots, position_ids)
    out = _attend(query, key, value, position_ids, block_indices, module.config.index_block_size,
                  scaling or query.shape[-1] ** -0.5)
    return out, None


# The operators, row by row of a batch: row b of a cache [B,H,S,D] is a view [S,H,D] of its memory.


def _each_row(places: torch.Tensor, capacity: int, block_size: int,
              call: Callable[..., torch.Tensor]) -> torch.Tensor:
    """[B,...]: call(b, lengths...) of every row b with the places [B,T] of its tokens."""
    batch, tokens = places.shape
    ends = torch.stack(((places >= 0).sum(1), places.amax(1) + 1)).int()  # [2,B]
    cu_q, cu_k = torch.nn.functional.pad(ends[..., None], (1, 0))  # [B,2] each, from 0
    rows = [call(b, cu_seqlens_q=cu_q[b], cu_seqlens_k=cu_k[b], max_seqlen_q=tokens,
                 max_seqlen_k=capacity, block_size=block_size) for b in range(batch)]
    return rows[0][None] if batch == 1 else torch.stack(rows)


def _select(q: torch.Tensor, k: torch.Tensor, places: torch.Tensor, block_size: int, topk: int,
            local_blocks: int) -> torch.Tensor:
    """q [B,Hi,T,Di], index keys k [B,1,S,Di] -> ids int64 [B,Hi,T,K]."""

    def row(b: int, **lengths: Any) -> torch.Tensor:
        return msa_cpp.index_select(q[b].transpose(0, 1), k[b, 0], topk=topk,
                                    local_blocks=local_blocks, **lengths)

    return _each_row(places, k.shape[2], block_size, row).long()


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor,
            block_ids: torch.Tensor | None, block_size: int, scale: float) -> torch.Tensor:
    """query [B,Hq,T,D], key and value [B,Hkv,S,D], ids [B,Hkv,T,K] -> [B,T,Hq,D]."""
    ids = None if block_ids is None else block_ids.int()

    def row(b: int, **lengths: Any) -> torch.Tensor:
        q, k, v = (x[b].transpose(0, 1) for x in (query, key, value))
        if ids is None:
            return msa_cpp.dense_attention(q, k, v, softmax_scale=scale, **lengths)
        return msa_cpp.sparse_attention(q, k, v, ids[b], softmax_scale=scale, **lengths)

    return _each_row(places, key.shape[2], block_size, row)
