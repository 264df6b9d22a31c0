"""Whether the settings fit together and fit this machine: rewards, batches, devices; backends and memory beside."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from roll_opd.configs.checks import data_parallel_size
from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.launch_checks import model_holders
from roll_opd.errors import ConfigError
from roll_opd.pipeline.preflight.engine_checks import ENGINE_CHECKS
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding, failed
from roll_opd.pipeline.preflight.memory_checks import MEMORY_CHECKS
from roll_opd.rewards import resolve_reward


def reward_classes(facts: Facts) -> Iterator[Finding]:
    """Every reward's class can be imported."""
    for name, reward in facts.config.rewards.items():
        field = f"rewards.{name}.worker_cls"
        try:
            yield Finding("ok", field, f"class {resolve_reward(reward.worker_cls or '', field).__name__}")
        except ConfigError as error:
            yield failed(error)


def top_k_fits(facts: Facts) -> Iterator[Finding]:
    """A set of tokens is no larger than the vocabulary."""
    args = facts.config.opd_args
    if not facts.config.teachers or args.objective != "direct" or not args.support.endswith("topk"):
        return
    size = len(facts.tokenizer)
    if args.top_k > size:
        problem = f"{args.top_k} is more than the vocabulary of {size} tokens; lower it"
        yield failed(ConfigError("opd_args.top_k", problem))
    else:
        yield Finding("ok", "opd_args.top_k", f"{args.top_k} of {size} tokens")


def batch_arithmetic(facts: Facts) -> Iterator[Finding]:
    """What a step holds and what divides it; the config warns where something is left over."""
    config, path = facts.config, facts.student
    training = config.actor_train.training_args
    group, size = config.group_size, training.per_device_train_batch_size
    groups, samples = config.groups_per_step, config.samples_per_step
    episodes = config.pipeline == "agentic"
    draws, unit = ("groups", "episodes") if episodes else ("prompts", "trajectories")
    ranks = data_parallel_size(config.actor_train, path)
    update = size * training.gradient_accumulation_steps * ranks
    told = f"{groups} {draws} x {group} {unit if episodes else 'samples'} = {samples} {unit} a step"
    yield Finding("ok", "rollout_batch_size", told)
    whole, rest = divmod(samples, update)
    parts = f"{size} x {training.gradient_accumulation_steps} x {ranks} rank(s) = {update} {unit}"
    left = f" and one of {rest}" if rest else ""
    told = f"an optimizer step takes {parts}: {whole} of them a step{left}, {config.ppo_epochs} time(s) over"
    yield Finding("ok", f"{path}.training_args", told)
    if ranks > samples:
        problem = f"{ranks} ranks share {samples} {unit}, so {ranks - samples} compute nothing"
        yield Finding("warning", f"{path}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")
    infer, role = config.actor_infer, facts.loaded.yaml_names["actor_infer"]
    engines = infer.world_size or 1
    each = -(-groups // engines) * group
    told = f"{engines} engine(s), {each} {unit} each at most"
    if not episodes and infer.strategy_args is not None and infer.strategy_args.strategy_name == "hf_infer":
        # An engine forms its own batches.
        told += f": {-(-each // infer.infer_batch_size)} batch(es) of {infer.infer_batch_size}"
    yield Finding("ok", f"{role}.infer_batch_size", told)
    if engines > groups:
        idle = engines - groups
        kept = "which stay together" if episodes else "whose groups stay together"
        problem = f"{engines} engines for {groups} {draws}, {kept}: {idle} idle"
        yield Finding("warning", f"{role}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")


def devices(facts: Facts) -> Iterator[Finding]:
    """The devices that the roles map exist; of a running cluster only the cluster knows."""
    roles = model_holders(facts.config, facts.loaded.yaml_names)
    mapped = {path: worker.device_mapping for path, worker in roles.items() if worker.device_mapping}
    if not mapped:
        yield Finding("ok", "device_mapping", "no role maps a device; all run as CPU processes")
        return
    if facts.config.ray_args.address is not None:
        yield Finding("skipped", "device_mapping", "devices: the cluster at ray_args.address is asked at launch")
        return
    present = torch.cuda.device_count()
    for path, numbers in mapped.items():
        if max(numbers) >= present:
            problem = f"asks for device {max(numbers)}, but this machine has {present} GPU(s), numbered from 0"
            fix = "map fewer devices, or leave device_mapping out to run on CPU processes"
            yield Finding("error", f"{path}.device_mapping", f"{problem}; {fix}")
        else:
            yield Finding("ok", f"{path}.device_mapping", f"{format_devices(numbers)} of {present} GPU(s)")


SETTING_CHECKS: tuple[Check[Facts], ...] = (
    Check("settings", reward_classes, always=True),
    Check("settings", top_k_fits, always=True),
    Check("settings", batch_arithmetic),
    Check("settings", devices),
    *ENGINE_CHECKS,
    *MEMORY_CHECKS,
)
