"""MSA on NumPy arrays: choose blocks, attend to them, compare with dense attention."""

import numpy as np

import msa_cpp

tokens, heads, kv_heads, dim = 4096, 16, 2, 128
generator = np.random.default_rng(0)


def normal(*shape):
    return generator.standard_normal(shape, dtype=np.float32)


q, k, v = normal(tokens, heads, dim), normal(tokens, kv_heads, dim), normal(tokens, kv_heads, dim)
q_idx, k_idx = normal(tokens, kv_heads, dim), normal(tokens, dim)  # the index branch
ends = np.array([0, tokens], np.int32)  # one sequence; [0, 100, tokens] would be two
batch = msa_cpp.Batch(cu_seqlens_q=ends, cu_seqlens_k=ends)

ids = msa_cpp.index_select(q_idx, k_idx, topk=16, batch=batch)  # int32 [kv_heads, tokens, 16]
out = msa_cpp.sparse_attention(q, k, v, ids, batch=batch)  # [tokens, heads, dim]
assert (out == msa_cpp.msa_attention(q, k, v, q_idx, k_idx, topk=16, batch=batch)).all()
dense = msa_cpp.dense_attention(q, k, v, batch=batch)

print("blocks of the last query:", ids[0, -1])
for first, last in ((0, 2048), (2048, tokens)):
    difference = np.abs(out[first:last] - dense[first:last]).max()
    print(f"tokens {first} to {last}: as dense: {bool(difference < 1e-5)}")
