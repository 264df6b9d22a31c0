"""Pure on-policy distillation: the teacher is the only training signal.

    python examples/start_onpolicy_distill_pipeline.py --config_path quickstart --config_name onpolicy_distill
    python examples/start_onpolicy_distill_pipeline.py --config_path … --config_name … max_steps=10 --plan

The YAML names student_train, student_infer and teacher; pure_opd_pipeline_type says which pipeline runs them.
"""

import sys

from roll_opd.launcher import main

if __name__ == "__main__":
    sys.exit(main("onpolicy_distill", __file__, __doc__ or ""))
