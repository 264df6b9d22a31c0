"""On-policy distillation for language models, as a Ray pipeline orchestrator.

Importing this package is cheap on purpose: ``--plan`` must not import torch or ray.
"""

__version__ = "0.1.0"
