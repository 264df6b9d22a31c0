"""Megatron-core behind our strategies: groups, model, weights, and what it needs where there is no CUDA."""
