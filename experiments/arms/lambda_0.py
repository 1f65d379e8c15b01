from arm import Arm

ARM = Arm("lambda 0", "MSA-PT without a KL loss: the index branch keeps its random weights",
          options=lambda size: {"kl_weight": 0.0})
