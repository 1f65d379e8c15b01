"""The local block, and others by lot: what any K blocks are worth."""

import msa_cpp
import torch
from arm import Arm
from msa_cpp.autograd import MsaConfig
from msa_cpp.train.metrics import Choose
from msa_cpp.train.model import Heads


def choose(config: MsaConfig, seed: int) -> Choose:
    generator = torch.Generator().manual_seed(seed)

    def by_lot(heads: Heads) -> torch.Tensor:
        valid = (heads.places() // config.block_size + 1).int()
        scores = torch.rand(heads.k.shape[1], len(valid), int(valid.max()), generator=generator)
        return msa_cpp.select_blocks(scores.to(heads.q.device), config.topk,
                                     num_valid_blocks=valid, init_blocks=config.init_blocks,
                                     local_blocks=config.local_blocks)

    return by_lot


ARM = Arm("random", "the local block and random ones", choose=choose)
