"""Reinforcement learning with verifiable rewards, alone or, with use_opd: true, mixed with a teacher's opinion.

    python examples/start_rlvr_pipeline.py --config_path … --config_name … --plan
    python examples/start_rlvr_pipeline.py --config_path … --config_name … max_steps=10

The YAML names actor_train, actor_infer and rewards, and teacher in the mixed mode. YAML files of ROLL's RLVR pipeline
load unchanged; docs/roll_compatibility.md says what each of their keys does here.
"""

import sys

from roll_opd.launcher import main

if __name__ == "__main__":
    sys.exit(main("rlvr", __file__, __doc__ or ""))
