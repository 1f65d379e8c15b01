from arm import Arm

ARM = Arm("lambda 10", "MSA-PT with ten times the KL loss",
          options=lambda size: {"kl_weight": 10.0})
