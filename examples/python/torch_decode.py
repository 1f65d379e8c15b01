"""MSA on torch tensors: a paged cache, filled by a prompt and then read token by token."""

import torch

import msa_cpp

heads, kv_heads, dim, block, prompt = 16, 2, 128, 128, 4000
torch.manual_seed(0)


def normal(*shape):
    return torch.randn(shape, dtype=torch.bfloat16)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


cache = dict(
    k_pages=torch.zeros(40, kv_heads, block, dim, dtype=torch.bfloat16),
    v_pages=torch.zeros(40, kv_heads, block, dim, dtype=torch.bfloat16),
    k_idx_pages=torch.zeros(40, block, dim, dtype=torch.bfloat16),
)
page_table = torch.randperm(40, dtype=torch.int32)[None]  # where block 0, 1, ... of sequence 0 lies


def append(tokens, length):
    """Writes keys, values and index keys of new tokens behind the cached ones."""
    msa_cpp.append_paged(
        normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim), normal(tokens, dim), **cache,
        page_table=page_table, seq_lens=int32(length), cu_seqlens_q=int32(0, tokens),
    )  # fmt: skip


append(prompt, prompt)
out = torch.empty(1, heads, dim, dtype=torch.bfloat16)
ids = torch.empty(kv_heads, 1, 16, dtype=torch.int32)
for length in range(prompt + 1, prompt + 4):
    append(1, length)
    msa_cpp.msa_layer(  # index, selection and attention of one new token
        normal(1, heads, dim), normal(1, kv_heads, dim), *cache.values(),
        page_table=page_table, seq_lens=int32(length), cu_seqlens_q=int32(0, 1), max_seqlen_q=1,
        out=out, block_ids=ids,
    )  # fmt: skip
    own = (length - 1) // block
    print(f"{length} tokens: {ids[0].unique().numel()} blocks read, the last is {ids[0, 0, -1]}")
    assert ids[0, 0, -1] == own and out.isfinite().all()
