"""An index branch with values, whose output joins the attention's: the language model trains it.

In plain torch, with the index branch's full attention as a matrix; for short contexts.
"""

from __future__ import annotations

import torch
from arm import Arm
from msa_cpp.train.model import Attend, Batch, Config, Model
from torch import Tensor, nn


class ValueHead(nn.Module):
    """o_proj(attention) + out(softmax(q_idx k_idx) v_idx), the index branch's own attention."""

    def __init__(self, attention: nn.Module, c: Config) -> None:
        super().__init__()
        self.attention = attention
        groups, dim = c["num_key_value_heads"], c["index_head_dim"]
        self.values = nn.Linear(c["hidden_size"], dim, bias=False)
        self.out = nn.Linear(groups * dim, c["hidden_size"], bias=False)
        nn.init.zeros_(self.out.weight)

    def forward(self, x: Tensor, batch: Batch, attend: Attend,
                detach: bool) -> tuple[Tensor, Tensor | None]:
        o, kl = self.attention(x, batch, attend, detach)
        q, k = self.attention.indexer.queries_and_keys(x, batch.rope)
        v = self.values(x)
        parts = []
        for first, end in zip(batch.cu_seqlens[:-1].tolist(), batch.cu_seqlens[1:].tolist()):
            rows = slice(first, end)
            queries, keys = q[rows].transpose(0, 1), k[rows].transpose(0, 1)  # [Hi,n,Di], [1,n,Di]
            mixed = nn.functional.scaled_dot_product_attention(
                queries, keys.expand_as(queries), v[rows].expand_as(queries), is_causal=True)
            parts.append(mixed.transpose(0, 1).flatten(1))
        return o + self.out(torch.cat(parts)), kl


def model(config: Config, seed: int) -> Model:
    made = Model(config, seed)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in made.model.layers:
            layer.self_attn = ValueHead(layer.self_attn, config)
    return made


ARM = Arm("value head", "MSA-PT whose index branch also has values and an output", model=model)
