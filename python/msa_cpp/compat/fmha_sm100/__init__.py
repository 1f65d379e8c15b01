"""`fmha_sm100`, MiniMax's public operators for Blackwell, over msa_cpp: Hopper and CPU.

    msa_cpp.compat.install()                 # then `import fmha_sm100` finds this package
    plan = fmha_sm100.fmha_sm100_plan(qo_lens, kv_lens, 4, num_kv_heads=1, page_size=128,
                                      output_maxscore=True, causal=True)
    _, max_score = fmha_sm100.fmha_sm100(q, k, k, plan, kv_indices=pages, output_o=False)
    ids = fmha_sm100.sparse_topk_select(max_score, 16, num_valid_pages=valid)

Names, arguments and results are those of the first generation (MiniMax-AI/MSA, python/fmha_sm100:
api.py and cute/interface.py, read in November 2026), in bfloat16 and whatever else the backends
compute. Scores and lists may have any width. 8-bit and 4-bit elements raise NotImplementedError.
"""

from .api import fmha_sm100, fmha_sm100_plan, sparse_topk_select
from .sparse import (
    SparseDecodePagedAttentionWrapper, build_k2q_csr, fp4_indexer_block_scores, sparse_atten_func,
    sparse_atten_nvfp4_kv_func, sparse_decode_atten_func, sparse_fmha, sparse_fmha_plan,
)

__all__ = [
    "SparseDecodePagedAttentionWrapper", "build_k2q_csr", "fmha_sm100", "fmha_sm100_plan",
    "fp4_indexer_block_scores", "sparse_atten_func", "sparse_atten_nvfp4_kv_func",
    "sparse_decode_atten_func", "sparse_fmha", "sparse_fmha_plan", "sparse_topk_select",
]
