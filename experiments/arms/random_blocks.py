"""The local block, and others by lot: what any K blocks are worth."""

import msa_cpp
import torch
from arm import Arm
from msa_cpp.autograd import MsaConfig
from msa_cpp.train.metrics import Choose
from msa_cpp.train.model import Heads


def choose(config: MsaConfig, seed: int) -> Choose:
    generators: dict[torch.device, torch.Generator] = {}

    def by_lot(heads: Heads) -> torch.Tensor:
        device = heads.q.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)
        valid = (heads.places() // config.block_size + 1).int()
        blocks = -(-heads.max_seqlen // config.block_size)
        scores = torch.rand(heads.k.shape[1], len(valid), blocks, device=device,
                            generator=generators[device])
        return msa_cpp.select_blocks(scores, config.topk, num_valid_blocks=valid,
                                     init_blocks=config.init_blocks,
                                     local_blocks=config.local_blocks)

    return by_lot


ARM = Arm("random", "the local block and random ones", choose=choose)
