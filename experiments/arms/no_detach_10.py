from arm import Arm

ARM = Arm("no detach, lambda 10", "MSA-PT whose KL loss reaches the backbone, ten times as strong",
          options=lambda size: {"detach_input": False, "kl_weight": 10.0})
