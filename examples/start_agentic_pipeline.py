"""Agents in text environments, rewarded by the environment or, with use_opd: true, also by a teacher.

    python examples/start_agentic_pipeline.py --config_path … --config_name … --plan
    python examples/start_agentic_pipeline.py --config_path … --config_name … max_steps=10

The YAML names actor_train, actor_infer, train_env_manager and custom_envs, and teacher in the mixed mode;
examples/config holds environments to include. YAML files of ROLL's agentic pipeline load unchanged;
docs/roll_compatibility.md says what each of their keys does here.
"""

import sys

from roll_opd.launcher import main

if __name__ == "__main__":
    sys.exit(main("agentic", __file__, __doc__ or ""))
