"""Fisher information of models, and what stands in for it."""
