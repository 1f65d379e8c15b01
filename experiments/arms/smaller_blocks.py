from arm import Arm

ARM = Arm("blocks of a quarter", "MSA-PT with four times as many blocks of a quarter of the size",
          config=lambda config: {"index_block_size": config["index_block_size"] // 4,
                                 "index_topk_blocks": config["index_topk_blocks"] * 4})
