"""Megatron-core behind our strategies: groups, model, weights, and what it needs where there is no CUDA."""

import warnings

# Megatron-core says so at each of its modules, and we use neither.
warnings.filterwarnings("ignore", message=r".*Apex (is|are) not installed", category=UserWarning)
