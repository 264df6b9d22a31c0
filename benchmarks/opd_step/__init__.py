"""One step of on-policy distillation, ours beside TRL's.

``workload`` says what both do; ``ours`` and ``trl_side`` are the two processes that do it, each in its own Python, at
the commands of the driver (``rounds``), to which they speak through ``side``. ``machine`` watches the cores and the
memory, ``report`` writes what came out, ``guard`` holds it against what is stored.
"""
