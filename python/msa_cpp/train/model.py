"""The text model of MiniMax-M3 with dense MLPs, over packed sequences.

Names of modules and weights are those of Hugging Face (`minimax_m3_vl`), so that a checkpoint loads
there and in `msa eval`. How a sparse layer attends is an argument of the call: see `Attend`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Callable, Optional

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from .._config import SPARSE, m3_config
from ..attention import msa_attention
from ..autograd import MsaConfig, attend

Config = dict  # config.json of a `minimax_m3_vl_text` model

#: Two layers that learn in a minute on a CPU; 64 queries and more have more blocks than they read.
MINIATURE: Config = {
    "architectures": ["MiniMaxM3SparseForCausalLM"],
    "model_type": "minimax_m3_vl_text",
    "vocab_size": 256,
    "hidden_size": 64,
    "dense_intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rotary_dim": 8,
    "rope_parameters": {
        "rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    "swiglu_alpha": 1.702,
    "swiglu_limit": 7.0,
    "layer_types": [SPARSE, SPARSE],
    "mlp_layer_types": ["dense", "dense"],
    "index_n_heads": 2,
    "index_head_dim": 16,
    "index_block_size": 8,
    "index_topk_blocks": 3,
    "index_local_blocks": 1,
    "max_position_embeddings": 1048576,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 1,
}


@dataclass
class Heads:
    """What a sparse layer attends with. One layer of one packed batch."""

    layer: int
    q: Tensor  # [T,Hq,D]
    k: Tensor  # [T,Hkv,D]
    v: Tensor  # [T,Hkv,D]
    q_idx: Tensor  # [T,Hkv,Di]
    k_idx: Tensor  # [T,Di]
    cu_seqlens: Tensor  # i32 [B+1]
    max_seqlen: int

    def places(self) -> Tensor:
        """int32 [T], as the function."""
        return places(self.cu_seqlens, len(self.q))

    def lengths(self) -> dict[str, Any]:
        """Keywords of a batched operator."""
        return dict(cu_seqlens_q=self.cu_seqlens, cu_seqlens_k=self.cu_seqlens,
                    max_seqlen_q=self.max_seqlen, max_seqlen_k=self.max_seqlen)


def places(cu_seqlens: Tensor, tokens: int) -> Tensor:
    """int32 [T]: where a token stands in its sequence."""
    row = torch.arange(tokens, device=cu_seqlens.device, dtype=torch.int32)
    return row - cu_seqlens[torch.searchsorted(cu_seqlens[1:], row, right=True)]


#: (o [T,Hq,D], kl scalar or None) of a sparse layer: attention with its index branch, or any other.
Attend = Callable[[Heads], tuple[Tensor, Optional[Tensor]]]


def dense(heads: Heads) -> tuple[Tensor, None]:
    """Full attention, no use of the index branch."""
    o, _ = attend(heads.q, heads.k, heads.v, None, heads.cu_seqlens, MsaConfig(),
                  max_seqlen=heads.max_seqlen)
    return o, None


def msa(config: MsaConfig) -> Attend:
    """`msa_attention` under the given configuration."""
    return lambda heads: msa_attention(
        heads.q, heads.k, heads.v, heads.q_idx, heads.k_idx, **vars(config), **heads.lengths(),
        return_kl=True)


def listed(choose: Callable[[Heads], Tensor], config: MsaConfig) -> Attend:
    """Attention over the blocks [Hkv,T,K] of any selector; the index branch learns nothing."""

    def attend_to_choice(heads: Heads) -> tuple[Tensor, None]:
        with torch.no_grad():
            ids = choose(heads)
        o, _ = attend(heads.q, heads.k, heads.v, ids, heads.cu_seqlens, config,
                      max_seqlen=heads.max_seqlen)
        return o, None

    return attend_to_choice


class Norm(nn.Module):
    """RMSNorm in Gemma's form: f32, times 1 + weight."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.zeros(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.weight.shape, 1 + self.weight, self.eps)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE on the first channels of x [T,H,D], paired half by half; cos and sin [T,1,rotary/2]."""
    cos, sin = rope
    a, b, rest = x.split([cos.shape[-1], cos.shape[-1], x.shape[-1] - 2 * cos.shape[-1]], -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin, rest), -1)


class Projections(nn.Module):
    """Queries and keys with their norms: the index branch, and the base of the main one."""

    def __init__(self, c: Config, q_heads: int, k_heads: int, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.q_proj = nn.Linear(c["hidden_size"], q_heads * dim, bias=False)
        self.k_proj = nn.Linear(c["hidden_size"], k_heads * dim, bias=False)
        self.q_norm, self.k_norm = (Norm(dim, c["rms_norm_eps"]) for _ in range(2))

    def queries_and_keys(self, x: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """[T,H,dim] each, after norm and RoPE, in the dtype of the projections."""
        def heads(rows: Tensor, norm: Norm) -> Tensor:
            return rotate(norm(rows.view(len(x), -1, self.dim)), rope).to(rows.dtype)

        q, k = self.q_proj(x), self.k_proj(x)
        return heads(q, self.q_norm), heads(k, self.k_norm)


class Attention(Projections):
    def __init__(self, c: Config, layer: int) -> None:
        heads, groups, dim = c["num_attention_heads"], c["num_key_value_heads"], c["head_dim"]
        super().__init__(c, heads, groups, dim)
        self.layer = layer
        self.v_proj = nn.Linear(c["hidden_size"], groups * dim, bias=False)
        self.o_proj = nn.Linear(heads * dim, c["hidden_size"], bias=False)
        self.indexer = None
        if c["layer_types"][layer] == SPARSE:
            self.indexer = Projections(c, groups, 1, c["index_head_dim"])

    def forward(self, x: Tensor, batch: Batch, attend: Attend,
                detach: bool) -> tuple[Tensor, Tensor | None]:
        q, k = self.queries_and_keys(x, batch.rope)
        v = self.v_proj(x).view(*k.shape)
        kl = None
        q_idx, k_idx = q[:, :0], k[:, 0]
        if self.indexer is not None:
            q_idx, k_idx = self.indexer.queries_and_keys(x.detach() if detach else x, batch.rope)
            k_idx = k_idx[:, 0]
        heads = Heads(self.layer, q, k, v, q_idx, k_idx, batch.cu_seqlens, batch.max_seqlen)
        o, kl = dense(heads) if self.indexer is None else attend(heads)
        return self.o_proj(o.flatten(1)), kl


class Mlp(nn.Module):
    def __init__(self, c: Config) -> None:
        super().__init__()
        hidden, inner = c["hidden_size"], c["dense_intermediate_size"]
        self.gate_up_proj = nn.Linear(hidden, 2 * inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)
        self.alpha, self.limit = c["swiglu_alpha"], c["swiglu_limit"]

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up_proj(x).chunk(2, -1)
        gate, up = gate.clamp(max=self.limit), up.clamp(-self.limit, self.limit)
        return self.down_proj((up + 1) * gate * torch.sigmoid(self.alpha * gate))


class Layer(nn.Module):
    def __init__(self, c: Config, layer: int) -> None:
        super().__init__()
        self.input_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = Norm(c["hidden_size"], c["rms_norm_eps"])
        self.mlp = Mlp(c)

    def forward(self, x: Tensor, batch: Batch, attend: Attend,
                detach: bool) -> tuple[Tensor, Tensor | None]:
        o, kl = self.self_attn(self.input_layernorm(x), batch, attend, detach)
        x = x + o
        return x + self.mlp(self.post_attention_layernorm(x)), kl


@dataclass
class Batch:
    """Packed sequences, and what every layer needs to know about them."""

    cu_seqlens: Tensor
    max_seqlen: int
    rope: tuple[Tensor, Tensor]


class Decoder(nn.Module):
    """`model.` of the weight names."""

    def __init__(self, c: Config) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(c["vocab_size"], c["hidden_size"])
        self.layers = nn.ModuleList(Layer(c, i) for i in range(c["num_hidden_layers"]))
        self.norm = Norm(c["hidden_size"], c["rms_norm_eps"])


class Model(nn.Module):
    """f32 weights; under autocast the products and q, k, v are bf16. seed: of the fresh weights.

    Raises InputError, one line, for a configuration that this trainer does not make.
    """

    def __init__(self, config: Config, seed: int = 0) -> None:
        config = m3_config(config)
        super().__init__()
        self.config = config
        self.model = Decoder(config)
        self.lm_head = nn.Linear(config["hidden_size"], config["vocab_size"], bias=False)
        self.checkpointing = False  # recompute a layer in its backward instead of keeping it
        generator = torch.Generator().manual_seed(seed)
        branches = 2 * config["num_hidden_layers"]  # each adds to the residual stream
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                std = 1 if "embed_tokens" in name else weight.shape[1] ** -0.5
                if name.endswith(("o_proj.weight", "down_proj.weight")):
                    std *= branches ** -0.5
                nn.init.normal_(weight, std=std, generator=generator)

    def forward(self, tokens: Tensor, cu_seqlens: Tensor, max_seqlen: int, attend: Attend,
                detach: bool = True) -> tuple[Tensor, list[Tensor]]:
        """(logits f32 [T,V], kl of every sparse layer whose attention has one).

        tokens: int64 [T], or [T,n] whose embeddings are added. detach: the index branch reads its
        input without passing gradients back.
        """
        x = self.model.embed_tokens(tokens)
        x = x.sum(1) if tokens.ndim == 2 else x
        batch, kls = Batch(cu_seqlens, max_seqlen, self.rope(cu_seqlens, len(tokens))), []
        for layer in self.model.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x, kl = checkpoint(layer, x, batch, attend, detach, use_reentrant=False)
            else:
                x, kl = layer(x, batch, attend, detach)
            kls += [] if kl is None else [kl]
        return self.lm_head(self.model.norm(x)).float(), kls

    def rope(self, cu_seqlens: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """cos and sin [T,1,rotary/2] of every token's place in its sequence."""
        size, theta = self.config["rotary_dim"], self.config["rope_parameters"]["rope_theta"]
        channel = torch.arange(0, size, 2, device=cu_seqlens.device, dtype=torch.float32)
        angle = places(cu_seqlens, tokens)[:, None, None] * theta ** (-channel / size)
        return angle.cos(), angle.sin()

    def index_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if ".indexer." in n}

    def backbone_parameters(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.named_parameters() if ".indexer." not in n}
