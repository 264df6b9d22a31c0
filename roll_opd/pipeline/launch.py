"""From a checked config to a finished run."""

from __future__ import annotations

import os
from pathlib import Path

from roll_opd.configs.loader import LoadedConfig
from roll_opd.distributed.runtime import ray_session, stop_on_signals
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.rlvr.rlvr_pipeline import RLVRPipeline
from roll_opd.utils.logging import configure_logging

PIPELINES: dict[str, type[BasePipeline]] = {"rlvr": RLVRPipeline}


def run_pipeline(loaded: LoadedConfig) -> Path:
    """Run and return the path of ``summary.json``; every process that was started has ended when this returns."""
    config = loaded.config
    # The driver only moves small arrays about; the cores belong to the workers.
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    with stop_on_signals():
        pipeline = PIPELINES[config.pipeline](loaded)
        configure_logging(log_file=pipeline.report.folder.logs / "driver.log", process="driver")
        # Once more inside: Ray installs handlers of its own, which print a stack trace at SIGTERM.
        with ray_session(config.ray_args), stop_on_signals():
            pipeline.run()
    return pipeline.report.folder.summary
