"""A sparse attention layer under torch.compile, as one graph."""

import torch

import msa_cpp


class SparseAttention(torch.nn.Module):
    def __init__(self, hidden, heads, kv_heads, dim=128):
        super().__init__()
        self.dim = dim
        self.q = torch.nn.Linear(hidden, heads * dim, bias=False)
        self.k = torch.nn.Linear(hidden, kv_heads * dim, bias=False)
        self.v = torch.nn.Linear(hidden, kv_heads * dim, bias=False)
        self.q_idx = torch.nn.Linear(hidden, kv_heads * dim, bias=False)
        self.k_idx = torch.nn.Linear(hidden, dim, bias=False)
        self.o = torch.nn.Linear(heads * dim, hidden, bias=False)

    def forward(self, x, ends):  # [T, hidden], and where the sequences end
        def split(layer):
            return layer(x).unflatten(-1, (-1, self.dim))

        batch = dict(cu_seqlens_q=ends, cu_seqlens_k=ends)
        ids = msa_cpp.index_select(split(self.q_idx), self.k_idx(x), topk=4, **batch)
        out = msa_cpp.sparse_attention(split(self.q), split(self.k), split(self.v), ids, **batch)
        return self.o(out.flatten(-2))


torch.manual_seed(0)
layer = SparseAttention(hidden=256, heads=8, kv_heads=2)
compiled = torch.compile(layer, fullgraph=True)
x, ends = torch.randn(2000, 256), torch.tensor([0, 700, 2000], dtype=torch.int32)
with torch.no_grad():  # for training there is msa_cpp.autograd
    expected, got = layer(x, ends), compiled(x, ends)
print("one graph, same result:", torch.allclose(got, expected, atol=1e-5))
