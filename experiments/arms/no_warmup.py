from arm import Arm

ARM = Arm("no warm-up", "MSA-PT, sparse from the first step",
          options=lambda size: {"warmup_steps": 0})
