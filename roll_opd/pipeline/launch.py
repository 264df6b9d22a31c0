"""From a checked config to a finished run."""

from __future__ import annotations

import os
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path

from roll_opd.configs.base_config import CheckpointArguments
from roll_opd.configs.loader import LoadedConfig
from roll_opd.distributed.runtime import ray_session, stop_on_signals
from roll_opd.errors import RollOPDError
from roll_opd.pipeline.agentic.agentic_pipeline import AgenticPipeline
from roll_opd.pipeline.base_pipeline import BasePipeline
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Finding, errors_of, failed, run_checks
from roll_opd.pipeline.preflight.run_checks import RUN_CHECKS
from roll_opd.pipeline.rlvr.rlvr_pipeline import RLVRPipeline
from roll_opd.utils.logging import configure_logging

PIPELINES: dict[str, type[BasePipeline]] = {"rlvr": RLVRPipeline, "agentic": AgenticPipeline}


def run_pipeline(loaded: LoadedConfig) -> Path:
    """Run and return the path of ``summary.json``; every process that was started has ended when this returns."""
    config = loaded.config
    _leave_the_cores()
    with stop_on_signals():
        pipeline = PIPELINES[config.pipeline](loaded)
        configure_logging(log_file=pipeline.report.folder.logs / "driver.log", process="driver")
        pipeline.check()
        # Once more inside: Ray installs handlers of its own, which print a stack trace at SIGTERM.
        with ray_session(config.ray_args), stop_on_signals():
            pipeline.run()
    return pipeline.report.folder.summary


def _leave_the_cores() -> None:
    """The driver only moves small arrays about; the cores belong to the workers."""
    import torch

    torch.set_num_threads(1)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def examine_pipeline(loaded: LoadedConfig, static: bool, findings: list[Finding]) -> list[Finding]:
    """Check a config as a launch would and, unless ``static``, try its models; nothing is trained or left behind.

    What is found joins ``findings``; after an error no model is loaded.

    The run's own folders are not touched: what this writes lies in a temporary one, which is kept, and named, only when
    loading or sampling failed.
    """
    _leave_the_cores()
    config = loaded.config
    facts = Facts(loaded)
    findings = findings + run_checks(RUN_CHECKS, facts)
    folder = Path(tempfile.mkdtemp(prefix="roll_opd-doctor-"))
    keep = False
    try:
        pipeline = PIPELINES[config.pipeline](_elsewhere(loaded, folder))
        with stop_on_signals():
            try:
                pipeline.prepare()
                if not static and config.preflight != "off" and not errors_of([*findings, *pipeline.findings]):
                    keep = True
                    with ray_session(config.ray_args), stop_on_signals():
                        pipeline.examine()
                    keep = False
            except RollOPDError as error:
                pipeline.findings.append(replace(failed(error), area="samples" if keep else "models"))
        findings += pipeline.findings
        if keep:
            findings.append(Finding("skipped", "", f"the processes' logs are in {folder / 'logs'}", "samples"))
        elif not any(f.area == "samples" for f in findings):
            why = "as asked" if static else "because preflight is off" if config.preflight == "off" else "after errors"
            findings.append(Finding("skipped", "", f"the models were not loaded, {why}", "samples"))
        return findings
    finally:
        if not keep:
            shutil.rmtree(folder, ignore_errors=True)


def _elsewhere(loaded: LoadedConfig, folder: Path) -> LoadedConfig:
    """The config of a run that leaves nothing outside of ``folder`` and tells no tracker."""
    config = replace(
        loaded.config,
        output_dir=str(folder),
        logging_dir=None,
        checkpoint_config=CheckpointArguments(),
        track_with=[],
        tracker_kwargs={},
        resume_from_checkpoint=False,
    )
    return replace(loaded, config=config)
