from arm import Arm

ARM = Arm(
    "MSA-CPT", "the dense model converted: index-only steps, then sparse steps for all weights",
    start="dense",
    options=lambda size: {"route": "msa-cpt", "warmup_steps": size.conversion[-1],
                          "steps": size.conversion[-1] + size.sparse_steps, "lr": size.lr / 4,
                          "index_warmup_lr": size.lr},
    looks=lambda size: size.conversion)
