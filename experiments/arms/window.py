"""A window of the last K - 1 blocks, and the first block as a sink: the same budget, no choice."""

import torch
from arm import Arm
from msa_cpp.autograd import MsaConfig
from msa_cpp.train.metrics import Choose
from msa_cpp.train.model import Heads


def choose(config: MsaConfig, seed: int) -> Choose:
    def latest(heads: Heads) -> torch.Tensor:
        last = (heads.places() // config.block_size)[:, None]
        ids = last - torch.arange(config.topk, device=last.device).flip(0)  # ascending, [T,K]
        shift = (-ids[:, :1]).clamp(min=0)  # near the start of a sequence
        ids = torch.where(ids + shift <= last, ids + shift, -1)
        ids[:, 0] = 0
        return ids.int().expand(heads.k.shape[1], -1, -1)

    return latest


ARM = Arm("window + sink", "the last K - 1 blocks and the first one", choose=choose)
