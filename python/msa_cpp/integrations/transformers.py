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
    output_attentions, attention dropout, gradients, other models than minimax_m3_vl
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
                      "5.23 has it") from error

NAME = "msa_cpp"

_log = logging.getLogger(__name__)
_originals: dict[type, Callable] = {}  # class -> its forward, while registered


def register() -> None:
    """Makes `attn_implementation="msa_cpp"` work for minimax_m3_vl models. Idempotent.

    Errors: RuntimeError when this version of transformers calls its layers in another way.
    """
    if _originals:
        return
    replaced = {m3.MiniMaxM3VLAttention: _layer_forward, m3.MiniMaxM3VLIndexer: _indexer_forward}
    for layer, ours in replaced.items():
        theirs = list(inspect.signature(layer.forward).parameters)
        if theirs != list(inspect.signature(ours).parameters):
            raise RuntimeError(f"register: {layer.__name__}.forward takes {', '.join(theirs)}: "
                               "this version of transformers is not supported, 5.23 is")
    for layer, ours in replaced.items():
        _originals[layer] = layer.forward
        layer.forward = ours
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, padding_mask)
    _log.info('attn_implementation="msa_cpp" serves the text models of minimax_m3_vl; vision '
              'towers run with "sdpa"; refused: left padding, packed sequences, sliding windows, '
              "output_attentions, attention dropout, gradients")


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
    mask = attention_mask.bool()[:, :kv_length]
    mask = torch.nn.functional.pad(mask, (0, kv_length - mask.shape[1]))
    if not torch.compiler.is_compiling() and mask[:, :int(q_offset) + q_length].all():
        return None
    return mask


def _padding_of(mask: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """bool [B,S] of a caller's own mask [B,1,T,S], which must be causal with padding."""
    mask = mask if mask.dtype == torch.bool else mask == 0
    real = mask[:, 0, -1]
    causal = torch.arange(mask.shape[3], device=mask.device) <= slots[:, None]  # [T,S]
    if not torch.compiler.is_compiling() and not torch.equal(
            mask & real[:, None, slots, None],
            (causal & real[:, None, None]).expand_as(mask) & real[:, None, slots, None]):
        raise NotImplementedError("attention_mask: got a mask [B,1,T,S] that is not causal with "
                                  "padding, msa_cpp supports no other")
    return real


def _places(mask: torch.Tensor | None, position_ids: torch.Tensor | None, slots: torch.Tensor,
            batch: int) -> torch.Tensor:
    """int64 [B,T]: the place of every new token in its sequence, -1 for padding.

    slots [T] are their places in the cache. Errors: ValueError when the padding is not on the
    right, or position_ids do not count the tokens.
    """
    if position_ids is None:
        position_ids = slots
    position_ids = position_ids.expand(batch, -1)
    if mask is None:
        places, real = slots.expand(batch, -1), None
    else:
        if mask.ndim == 4:
            mask = _padding_of(mask, slots)
        mask = mask.expand(batch, -1)
        real = mask[:, slots]
        places = (mask.cumsum(1)[:, slots] - 1).masked_fill(~real, -1)
    if torch.compiler.is_compiling():
        return position_ids if mask is None else places
    if mask is not None:
        left = ~mask[:, 0] & mask.any(1)
        if left.any():
            raise ValueError(
                f"attention_mask: row {int(left.nonzero()[0])} is padded on the left: blocks are "
                "anchored at the first slot of a row, so padding in front shifts the block grid "
                "and selects other blocks; pad on the right")
        if (real[:, 1:] & ~real[:, :-1]).any():
            raise ValueError("attention_mask: got padding between the tokens of one call, "
                             "expected it behind them")
    wrong = (position_ids != places) if real is None else (position_ids != places) & real
    if wrong.any():
        b, t = wrong.nonzero()[0].tolist()
        raise ValueError(
            f"position_ids[{b},{t}]: got {int(position_ids[b, t])}, expected {int(places[b, t])}, "
            "the number of tokens before it: packed sequences are not supported, nor is "
            "generate() on prompts padded on the right, since transformers takes their first new "
            "token from the logits of the padding")
    return places


def _settle(cache: torch.Tensor, slots: torch.Tensor, places: torch.Tensor) -> None:
    """Copies the rows `slots` [T] of cache [B,H,S,D] to their places [B,T]; padding stays."""
    target = torch.where(places >= 0, places, slots)
    if not torch.compiler.is_compiling() and torch.equal(target, slots.expand_as(target)):
        return
    rows = cache.index_select(2, slots)  # [B,H,T,D]
    cache.scatter_(2, target[:, None, :, None].expand_as(rows), rows)


# The layers


def _runs_here(module: torch.nn.Module) -> bool:
    return module.config._attn_implementation == NAME


def _new_slots(cache: Any, layer: int, tokens: int, device: torch.device) -> torch.Tensor:
    """int64 [T]: where a cache stores the next `tokens` tokens."""
    seen = 0 if cache is None else cache.get_seq_length(layer)
    return torch.arange(tokens, device=device) + seen


def _layer_forward(self: torch.nn.Module, hidden_states: torch.Tensor,
                   position_embeddings: tuple[torch.Tensor, torch.Tensor],
                   attention_mask: torch.Tensor | None, past_key_values: Any = None,
                   **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor | None]:
    """MiniMaxM3VLAttention.forward: mask and position_ids become the places of the tokens."""
    theirs = _originals[m3.MiniMaxM3VLAttention]
    if not _runs_here(self):
        return theirs(self, hidden_states, position_embeddings, attention_mask, past_key_values,
                      **kwargs)
    batch, tokens, _ = hidden_states.shape
    slots = _new_slots(past_key_values, self.layer_idx, tokens, hidden_states.device)
    places = _places(attention_mask, kwargs.pop("position_ids", None), slots, batch)
    if attention_mask is not None:
        kwargs["slots"] = slots
    return theirs(self, hidden_states, position_embeddings, None, past_key_values,
                  position_ids=places, **kwargs)


def _indexer_forward(self: torch.nn.Module, hidden_states: torch.Tensor,
                     position_embeddings: tuple[torch.Tensor, torch.Tensor], past_key_values: Any,
                     position_ids: torch.Tensor) -> torch.Tensor:
    """MiniMaxM3VLIndexer.forward: int64 [B,Hi,T,min(K,blocks)], ascending ids, -1 tail."""
    if not _runs_here(self):
        return _originals[m3.MiniMaxM3VLIndexer](self, hidden_states, position_embeddings,
                                                 past_key_values, position_ids)
    batch, tokens, _ = hidden_states.shape

    def heads(projection: torch.nn.Module, norm: torch.nn.Module) -> torch.Tensor:
        rows = projection(hidden_states).view(batch, tokens, -1, self.head_dim)
        return norm(rows).transpose(1, 2)

    q, k = m3.apply_rotary_pos_emb(heads(self.q_proj, self.q_norm), heads(self.k_proj, self.k_norm),
                                   *position_embeddings)  # [B,Hi,T,Di], [B,1,T,Di]
    if past_key_values is not None:
        layer = past_key_values.layers[self.layer_idx]
        k = layer.update_index(k)  # [B,1,S,Di]
        slots = torch.arange(tokens, device=k.device) + (layer.get_seq_length() - tokens)
        _settle(k, slots, position_ids)
    topk = min(self.topk_blocks, -(-k.shape[2] // self.block_size))
    select = _select_op if torch.compiler.is_compiling() else _select
    return select(q.detach(), k.detach(), position_ids, self.block_size, topk, self.local_blocks)


def attention(module: torch.nn.Module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
              attention_mask: torch.Tensor | None = None, dropout: float = 0.0,
              scaling: float | None = None, block_indices: torch.Tensor | None = None,
              position_ids: torch.Tensor | None = None, slots: torch.Tensor | None = None,
              **kwargs: Any) -> tuple[torch.Tensor, None]:
    """The attention function of "msa_cpp": query [B,Hq,T,D], key and value [B,Hkv,S,D] (a cache of
    any capacity) -> [B,T,Hq,D], and no weights.

    block_indices [B,Hkv,T,K] in any order, -1 tail, or None: every block. position_ids [B,T] are
    places, -1 for padding, whose output is 0. slots [T] are given where places may differ from them.
    """
    if isinstance(module, m3.MiniMaxM3VLVisionAttention):
        return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, attention_mask,
                                               dropout=dropout, scaling=scaling, **kwargs)
    if not isinstance(module, m3.MiniMaxM3VLAttention):
        raise NotImplementedError(f'attn_implementation="msa_cpp": got a {type(module).__name__}, '
                                  "supported are the models of minimax_m3_vl")
    if kwargs.get("output_attentions"):
        raise NotImplementedError("output_attentions: msa_cpp never has the weights in memory")
    if dropout > 0:
        raise NotImplementedError(f"attention_dropout: got {dropout}, msa_cpp supports 0")
    if slots is not None:
        _settle(key, slots, position_ids)
        _settle(value, slots, position_ids)
    attend = _attend_op if torch.compiler.is_compiling() else _attend
    out = attend(query.detach(), key.detach(), value.detach(), position_ids, block_indices,
                 module.config.index_block_size, scaling or query.shape[-1] ** -0.5)
    return _NoGradient.apply(out, query, key, value), None


class _NoGradient(torch.autograd.Function):
    """Passes its first argument on; where a gradient is asked for, says that there is none."""

    @staticmethod
    def forward(ctx: Any, out: torch.Tensor, *inputs: torch.Tensor) -> torch.Tensor:
        return out.view_as(out)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, ...]:
        raise NotImplementedError('gradients: attn_implementation="msa_cpp" has none yet; train '
                                  'with "eager", or wrap the call in torch.no_grad()')


# The operators, row by row of a batch. Under torch.compile each is one opaque node of the graph.


def _lengths(places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """int32 cu_seqlens [B,2] of the queries and of the keys, each row of the batch alone."""
    ends = torch.stack(((places >= 0).sum(1), places.amax(1) + 1)).int()  # [2,B]
    return torch.nn.functional.pad(ends[..., None], (1, 0)).unbind(0)


def _select(q: torch.Tensor, k: torch.Tensor, places: torch.Tensor, block_size: int, topk: int,
            local_blocks: int) -> torch.Tensor:
    """q [B,Hi,T,Di], index keys k [B,1,S,Di] -> ids int64 [B,Hi,T,K]."""
    batch, heads, tokens, _ = q.shape
    ids = torch.empty(batch, heads, tokens, topk, dtype=torch.int32, device=q.device)
    cu_q, cu_k = _lengths(places)
    for b in range(batch):
        msa_cpp.index_select(q[b].transpose(0, 1), k[b, 0], cu_seqlens_q=cu_q[b],
                             cu_seqlens_k=cu_k[b], max_seqlen_q=tokens, max_seqlen_k=k.shape[2],
                             topk=topk, block_size=block_size, local_blocks=local_blocks,
                             out=ids[b])
    return ids.long()


_select_op = torch.library.custom_op("msa_cpp::m3_select", _select, mutates_args=())


@_select_op.register_fake
def _(q: torch.Tensor, k: torch.Tensor, places: torch.Tensor, block_size: int, topk: int,
      local_blocks: int) -> torch.Tensor:
    return q.new_empty(*q.shape[:3], topk, dtype=torch.int64)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor,
            block_ids: torch.Tensor | None, block_size: int, scale: float) -> torch.Tensor:
    """query [B,Hq,T,D], key and value [B,Hkv,S,D] -> [B,T,Hq,D]."""
    batch, heads, tokens, dim = query.shape
    out = query.new_empty(batch, tokens, heads, dim)
    cu_q, cu_k = _lengths(places)
    ids = None if block_ids is None else block_ids.int()
    for b in range(batch):
        q, k, v = (x[b].transpose(0, 1) for x in (query, key, value))  # [T,Hq,D], [S,Hkv,D]
        lengths = {"cu_seqlens_q": cu_q[b], "cu_seqlens_k": cu_k[b], "max_seqlen_q": tokens,
                   "max_seqlen_k": k.shape[0]}
        if ids is None:
            msa_cpp.dense_attention(q, k, v, softmax_scale=scale, out=out[b], **lengths)
        else:
            msa_cpp.sparse_attention(q, k, v, ids[b], block_size=block_size, softmax_scale=scale,
                                     out=out[b], **lengths)
    return out


_attend_op = torch.library.custom_op("msa_cpp::m3_attend", _attend, mutates_args=())


@_attend_op.register_fake
def _(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, places: torch.Tensor,
      block_ids: torch.Tensor | None, block_size: int, scale: float) -> torch.Tensor:
    batch, heads, tokens, dim = query.shape
    return query.new_empty(batch, tokens, heads, dim)
