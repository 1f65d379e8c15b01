"""The blocks with the most attention mass, looked up under full attention: the best K blocks."""

import msa_cpp
import torch
from arm import Arm
from msa_cpp.autograd import MsaConfig
from msa_cpp.train.metrics import Choose
from msa_cpp.train.model import Heads


def choose(config: MsaConfig, seed: int) -> Choose:
    def by_mass(heads: Heads) -> torch.Tensor:
        q, k, v = heads.q.detach(), heads.k.detach(), heads.v.detach()
        options = dict(block_size=config.block_size, **heads.lengths())
        _, lse = msa_cpp.dense_attention(q, k, v, return_lse=True, **options)
        mass = msa_cpp.block_mass(q, k, lse, **options)
        return msa_cpp.select_blocks(
            mass, config.topk, num_valid_blocks=(heads.places() // config.block_size + 1).int(),
            init_blocks=config.init_blocks, local_blocks=config.local_blocks)

    return by_mass


ARM = Arm("oracle", "the blocks with the most attention mass", choose=choose)
