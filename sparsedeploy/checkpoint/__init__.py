"""A pruned checkpoint: a normal Hugging Face folder plus ``sparsity.json``, ``recipe.yaml`` and the packed masks."""
