from arm import Arm

ARM = Arm("no detach", "MSA-PT whose KL loss reaches the backbone",
          options=lambda size: {"detach_input": False})
