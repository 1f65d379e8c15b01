"""A sparse layer through the names of fmha_sm100: scores, selection, attention, over paged keys."""

import torch

import msa_cpp.compat

msa_cpp.compat.install()
from fmha_sm100 import fmha_sm100, fmha_sm100_plan, sparse_topk_select  # noqa: E402

torch.manual_seed(0)
device = "cuda" if torch.cuda.is_available() else "cpu"
heads, kv_heads, dim, page = 16, 2, 128, 128
new, cached = torch.tensor([1, 200]), torch.tensor([5000, 3000])  # two requests
pages = (cached + page - 1) // page


def normal(*shape):
    return torch.randn(shape, dtype=torch.bfloat16, device=device)


q, q_index = normal(201, heads, dim), normal(201, kv_heads, dim)
k, v = (normal(int(pages.sum()), kv_heads, page, dim) for _ in range(2))
k_index = normal(int(pages.sum()), 1, page, dim)  # one index key per token
table = torch.randperm(int(pages.sum()), device=device).int()  # the pages, request by request

plan = fmha_sm100_plan(new, cached, kv_heads, num_kv_heads=1, page_size=page, output_maxscore=True)
_, scores = fmha_sm100(q_index, k_index, k_index, plan, kv_indices=table, output_o=False)
position = torch.cat([torch.arange(c - n, c) for n, c in zip(new, cached)]).to(device)
blocks = sparse_topk_select(scores, 16, num_valid_pages=position // page + 1, force_end_blocks=1)

plan = fmha_sm100_plan(new, cached, heads, kv_heads, page_size=page, kv_block_num=16)
out, _ = fmha_sm100(q, k, v, plan, kv_indices=table, kv_block_indexes=blocks)
print("blocks", tuple(blocks.shape), "of the first query end with", blocks[0, 0, -1].item())
print("output", tuple(out.shape), out.dtype, "finite:", bool(out.isfinite().all()))
