from arm import Arm

ARM = Arm("blocks of half the size", "MSA-PT with twice as many blocks of half the size",
          config=lambda config: {"index_block_size": config["index_block_size"] // 2,
                                 "index_topk_blocks": config["index_topk_blocks"] * 2})
