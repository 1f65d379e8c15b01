"""Training of small MiniMax-M3-shaped models on msa_cpp's operators: `python -m msa_cpp.train`.

model.py the model, data.py what it reads, trainer.py the loop, metrics.py what the log says about
the index branch, storage.py checkpoints. docs/training.md has the mathematics and the recipe.
"""
