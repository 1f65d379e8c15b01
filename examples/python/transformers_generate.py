"""MSA in transformers: another attn_implementation, the same text."""

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

import msa_cpp.integrations.transformers as msa_transformers

msa_transformers.register()
model = AutoModelForCausalLM.from_pretrained("models/code-11m", attn_implementation="msa_cpp")
model = model.float()  # bf16 works too

text = Path("models/code-11m/sample.txt").read_bytes()[:3000]
prompt = torch.tensor([list(text)])  # the tokens of this model are bytes
out = model.generate(prompt, max_new_tokens=64, do_sample=False, pad_token_id=0)
print(bytes(out[0, len(text) :].tolist()).decode())
