from arm import Arm

ARM = Arm("MSA-PT", "from scratch: warm-up with full attention in both branches, then sparse")
