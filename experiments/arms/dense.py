from arm import Arm

ARM = Arm("dense", "full attention, no index branch", options=lambda size: {"route": "full"})
