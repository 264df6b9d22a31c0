"""What can be found out before a process is started or a GPU is touched: one list of checks, for launch and doctor.

Each check is a generator of findings over :class:`Facts`. They are listed at the end of this file, in the order of
their findings; ``docs/preflight.md`` has a row for each.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import shutil
import subprocess
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeVar

import torch
from transformers import PreTrainedTokenizerBase

from roll_opd.configs.checks import data_parallel_size, roles_of
from roll_opd.configs.device_mapping import format_devices
from roll_opd.configs.launch_checks import starts_critic
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.memory import count_parameters, find_model_config, memory_per_device
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.datasets.tags import route_tags
from roll_opd.distributed.strategy.tokenizer import (
    Vocabulary,
    check_same_vocabulary,
    end_of_turn,
    load_tokenizer,
    vocabulary_of,
)
from roll_opd.errors import ConfigError, ModelError, RollOPDError
from roll_opd.pipeline.finding import Check, Finding, Level, NotKnown, failed
from roll_opd.pipeline.model_identity import same_model
from roll_opd.pipeline.rlvr.prompt_source import PromptSource, read_prompts
from roll_opd.rewards import resolve_reward

T = TypeVar("T")

OVERLONG = 0.2
"""Share of overlong prompts above which the setting is more likely wrong than the data."""
ARCHITECTURE = (
    *("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "vocab_size"),
)
"""Entries of ``config.json`` that decide the shapes of the weights."""
MAX_TAGS = 20
"""Tags that are listed one by one."""
LEAST_BYTES = {"fp32": 4, "bf16": 2, "fp16": 2}
TRAINED_BYTES = 16
"""Per parameter and at the least: a scorer by its dtype, and what FSDP2 holds of the student (see ``memory.py``)."""


class Facts:
    """What the checks look at; loaded once, when the first check asks for it.

    Args:
        loaded: a checked config.
        note: takes counts for the summary, by name.

    Attributes:
        rows: ``train`` and ``validation`` -> counts of rows, once the data has been read.
    """

    def __init__(self, loaded: LoadedConfig, note: Callable[[str, Any], None] | None = None) -> None:
        self.loaded = loaded
        self.config: PipelineConfig = loaded.config
        self.rows: dict[str, dict[str, int]] = {}
        self._note = note
        self._known: dict[str, Any] = {}

    @property
    def student(self) -> str:
        """The trained role as the YAML calls it."""
        return self.loaded.yaml_names["actor_train"]

    @functools.cached_property
    def scorers(self) -> dict[str, tuple[str, ModelArguments]]:
        """What must share the student's vocabulary: description -> path in the YAML, model."""
        config = self.config
        found = {
            f"teacher {name!r}": (self.loaded.teacher_yaml_name(name), teacher.model_args)
            for name, teacher in config.teachers.items()
        }
        if config.reference is not None and config.needs_reference:
            found["the reference"] = ("reference", config.reference.model_args)
        if config.opd_args.base_model is not None and config.teachers:
            like = next(iter(config.teachers.values())).model_args
            model = dataclasses.replace(like, model_name_or_path=config.opd_args.base_model)
            found["the base model"] = ("opd_args.base_model", model)
        return found

    @functools.cached_property
    def models(self) -> dict[str, ModelArguments]:
        """Path in the YAML -> model, of everything that reads the student's tokens."""
        models = {self.student: self.config.actor_train.model_args, **dict(self.scorers.values())}
        if self.config.critic is not None and starts_critic(self.config):
            models["critic"] = self.config.critic.model_args
        return models

    def architecture(self, path: str) -> dict[str, Any] | None:
        """The language model's part of ``config.json``; None where it is not on disk."""
        found = find_model_config(self.models[path].model_name_or_path)
        return found and found.get("text_config", found)

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The student's."""
        return self.tokenizer_of(self.student)

    def tokenizer_of(self, path: str) -> PreTrainedTokenizerBase:
        """The tokenizer of a role."""
        return self._once(f"the tokenizer of {path}", lambda: load_tokenizer(self.models[path], path))

    @property
    def vocabulary(self) -> Vocabulary:
        """Size and stop ids, from the student."""
        args = self.config.actor_train.model_args
        return self._once("the student's vocabulary", lambda: vocabulary_of(self.tokenizer, args))

    @property
    def source(self) -> PromptSource:
        """The run's prompts."""
        return self._once("the data", lambda: read_prompts(self.loaded, self.tokenizer, self._take_note))

    def _take_note(self, name: str, value: Any) -> None:
        if name.startswith("rows_") and isinstance(value, dict):
            self.rows[name.removeprefix("rows_")] = value
        if self._note is not None:
            self._note(name, value)

    def _once(self, what: str, get: Callable[[], T]) -> T:
        if what not in self._known:
            try:
                self._known[what] = get()
            except RollOPDError:
                self._known[what] = NotKnown(f"{what} cannot be used")
                raise
        known = self._known[what]
        if isinstance(known, NotKnown):
            raise known
        return known  # type: ignore[no-any-return]


def model_field(path: str) -> str:
    """The setting that names a role's model."""
    return path if path == "opd_args.base_model" else f"{path}.model_args.model_name_or_path"


# ---- models ------------------------------------------------------------------------------------------------------


def tokenizers(facts: Facts) -> Iterator[Finding]:
    """Every scorer has the student's tokens and special ids."""
    ours: PreTrainedTokenizerBase | None = None
    try:
        ours = facts.tokenizer
        yield Finding("ok", model_field(facts.student), f"tokenizer of {len(ours.get_vocab())} tokens")
    except ModelError as error:
        yield failed(error)
    for name, (path, _) in facts.scorers.items():
        field = model_field(path)
        try:
            theirs = facts.tokenizer_of(path)
            if ours is None:
                continue
            # Messages of the check begin with "teacher".
            warnings = check_same_vocabulary(ours, theirs, name.removeprefix("teacher ").strip("'"))
        except ModelError as error:
            yield failed(error, field)
            continue
        for warning in warnings:
            yield Finding("warning", field, warning)
        others = set(ours.all_special_ids) ^ set(theirs.all_special_ids)
        if others:
            token = ours.convert_ids_to_tokens(min(others))
            problem = f"{name} and student do not both treat {token!r} (id {min(others)}) as special"
            yield Finding("warning", field, f"{problem}; check that the two belong to one family")
        yield Finding("ok", field, f"{name} has the student's {len(ours.get_vocab())} tokens and special ids")


def vocabulary_rows(facts: Facts) -> Iterator[Finding]:
    """The embedding of every model has a row for each token; more are padding."""
    size = facts.vocabulary.size
    for path in facts.models:
        rows = (facts.architecture(path) or {}).get("vocab_size")
        if rows is None:
            yield Finding("skipped", model_field(path), "number of embedding rows: config.json is not on this disk")
        elif rows < size:
            problem = f"the model has {rows} embedding rows for a tokenizer of {size} ids"
            yield Finding("error", model_field(path), f"{problem}; use the tokenizer that the model was trained with")
        else:
            padding = f"; {rows - size} are padding and never enter a softmax" if rows > size else ""
            yield Finding("ok", model_field(path), f"{rows} embedding rows for {size} ids{padding}")


def end_of_turn_reachable(facts: Facts) -> Iterator[Finding]:
    """A response can end: the token that closes a turn stops generation, and every scorer has it."""
    config, vocabulary, field = facts.config, facts.vocabulary, model_field(facts.student)
    sampling = config.actor_infer.generating_args
    stop_strings = list(sampling.stop_strings or []) if sampling is not None else []
    if not vocabulary.stop_ids and not stop_strings:
        problem = "no stop token: neither the tokenizer nor generation_config.json names an eos_token_id"
        fix = "add one, or set generating_args.stop_strings; else every response runs to response_length"
        yield Finding("error", field, f"{problem}; {fix}")
    beyond = [i for i in vocabulary.stop_ids if i >= vocabulary.size]
    if beyond and len(beyond) == len(vocabulary.stop_ids):
        problem = f"the stop ids {beyond} lie beyond the tokenizer's {vocabulary.size} ids, where every head is padding"
        yield Finding("error", field, f"{problem}; correct eos_token_id in generation_config.json")
    data = config.actor_train.data_args
    if data is not None and not data.apply_chat_template:
        yield Finding("ok", field, f"bare prompts: a response ends with one of the ids {list(vocabulary.stop_ids)}")
        return
    closing = end_of_turn(facts.tokenizer)
    if closing is None:
        yield Finding("skipped", field, "end of turn: the chat template closes a turn with no token of its own")
        return
    token, number = closing
    if number not in vocabulary.stop_ids and not stop_strings:
        problem = f"the chat template ends a turn with {token!r} (id {number}), which is not among the stop ids"
        role = facts.loaded.yaml_names["actor_infer"]
        fix = f"add it to eos_token_id in generation_config.json, or to {role}.generating_args.stop_strings"
        told = f"{problem} {list(vocabulary.stop_ids)}, so responses go on behind their end"
        yield Finding("error", field, f"{told}; {fix}")
    else:
        yield Finding("ok", field, f"a turn ends with {token!r} (id {number}), which stops generation")
    for name, (path, _) in facts.scorers.items():
        rows = (facts.architecture(path) or {}).get("vocab_size")
        if rows is not None and number >= rows:
            problem = f"{token!r} (id {number}), which ends a turn, lies beyond the {rows} rows of {name}"
            yield Finding("error", model_field(path), f"{problem}; use a teacher that was trained with this template")


def context_lengths(facts: Facts) -> Iterator[Finding]:
    """No sequence is longer than a model's positions reach."""
    config = facts.config
    response = config.response_length or 0
    whole = config.prompt_length + response if config.pipeline == "rlvr" else config.sequence_length or 0
    views = {
        facts.loaded.teacher_yaml_name(name): teacher.teacher_args
        for name, teacher in config.teachers.items()
        if teacher.teacher_args.context_template is not None
    }
    for path in facts.models:
        limit = (facts.architecture(path) or {}).get("max_position_embeddings")
        if limit is None:
            yield Finding("skipped", model_field(path), "context length: no config.json on this disk names one")
            continue
        if whole > limit:
            what = "prompt_length + response_length" if config.pipeline == "rlvr" else "sequence_length"
            error = ConfigError("response_length", f"{what} = {whole} tokens, but {path} reaches {limit}; shorten them")
            yield failed(error)
            continue
        if path in views:
            context = views[path].context_length or 2 * config.prompt_length
            if context + response > limit:
                problem = f"{context} tokens and response_length = {response} are more than the {limit} of {path}"
                level: Level = "error" if views[path].context_length else "warning"
                field = f"{path}.teacher_args.context_length"
                yield Finding(level, field, f"{problem}; set it to {max(limit - response, 1)} at most")
                continue
        yield Finding("ok", model_field(path), f"sequences of up to {whole} tokens, positions up to {limit}")


def teachers_differ(facts: Facts) -> Iterator[Finding]:
    """A teacher that is the student says nothing."""
    config, student = facts.config, facts.config.actor_train.model_args.model_name_or_path or ""
    same = []
    for name, teacher in config.teachers.items():
        field = model_field(facts.loaded.teacher_yaml_name(name))
        args, path = teacher.teacher_args, teacher.model_args.model_name_or_path or ""
        if args.context_template is not None or args.self_teacher is not None:
            yield Finding("ok", field, f"teacher {name!r} is told apart from the student by its teacher_args")
        elif config.opd_args.base_model is not None:
            yield Finding("ok", field, f"teacher {name!r} is told apart from the student by opd_args.base_model")
        elif same_model(student, path):
            same.append((name, field, path))
        else:
            yield Finding("ok", field, f"teacher {name!r} is another model than the student")
    alone = config.mode == "pure_opd" and len(same) == len(config.teachers)
    for name, field, path in same:
        what = f"teacher {name!r} is the student's own model ({path})"
        if alone:
            fix = "name another model, give it a teacher_args.context_template, or set preflight: off for a control run"
            yield Finding("error", field, f"{what}, and its signal zero; {fix}")
        else:
            yield Finding("warning", field, f"{what}: its term only pulls the student back to where it started")


def student_roles(facts: Facts) -> Iterator[Finding]:
    """Both student roles hold one architecture: the trained weights are copied into the generator."""
    names, config = facts.loaded.yaml_names, facts.config
    ours = find_model_config(config.actor_train.model_args.model_name_or_path)
    theirs = find_model_config(config.actor_infer.model_args.model_name_or_path)
    if ours is None or theirs is None:
        yield Finding("skipped", model_field(names["actor_infer"]), "architecture: config.json is not on this disk")
        return
    for key in ARCHITECTURE:
        if ours.get(key) != theirs.get(key):
            problem = f"{key} is {theirs.get(key)}, and {ours.get(key)} in {names['actor_train']}"
            yield Finding(
                "error", model_field(names["actor_infer"]), f"{problem}; both student roles must name the same model"
            )
            return
    yield Finding("ok", model_field(names["actor_infer"]), f"the architecture of {names['actor_train']}")


# ---- settings ----------------------------------------------------------------------------------------------------


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
    group, size = config.num_return_sequences_in_group, training.per_device_train_batch_size
    samples = config.rollout_batch_size * group
    ranks = data_parallel_size(config.actor_train, path)
    update = size * training.gradient_accumulation_steps * ranks
    told = f"{config.rollout_batch_size} prompts x {group} samples = {samples} trajectories a step"
    yield Finding("ok", "rollout_batch_size", told)
    whole, rest = divmod(samples, update)
    parts = f"{size} x {training.gradient_accumulation_steps} x {ranks} rank(s) = {update} trajectories"
    left = f" and one of {rest}" if rest else ""
    told = f"an optimizer step takes {parts}: {whole} of them a step{left}, {config.ppo_epochs} time(s) over"
    yield Finding("ok", f"{path}.training_args", told)
    if ranks > samples:
        problem = f"{ranks} ranks share {samples} trajectories, so {ranks - samples} compute nothing"
        yield Finding("warning", f"{path}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")
    infer, role = config.actor_infer, facts.loaded.yaml_names["actor_infer"]
    engines = infer.world_size or 1
    each = -(-config.rollout_batch_size // engines) * group
    batches = -(-each // infer.infer_batch_size)
    told = f"{engines} engine(s), {each} trajectories each at most: {batches} batch(es) of {infer.infer_batch_size}"
    yield Finding("ok", f"{role}.infer_batch_size", told)
    if engines > config.rollout_batch_size:
        idle = engines - config.rollout_batch_size
        problem = f"{engines} engines for {config.rollout_batch_size} prompts, whose groups stay together: {idle} idle"
        yield Finding("warning", f"{role}.world_size", f"{problem}; use fewer, or a larger rollout_batch_size")


def devices(facts: Facts) -> Iterator[Finding]:
    """The devices that the roles map exist; of a running cluster only the cluster knows."""
    mapped = {path: worker.device_mapping for path, worker in _roles(facts).items() if worker.device_mapping}
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


def memory(facts: Facts) -> Iterator[Finding]:
    """What the roles hold at the least fits where they are."""
    least: dict[str, dict[str, float]] = {}
    for path, worker in _roles(facts).items():
        yield Finding("ok", path, f"memory: {memory_per_device(worker, path)}")
        held = _least_bytes(worker)
        if held is None:
            continue
        count = 1 if worker.device_mapping else worker.world_size or 1
        for place in [str(number) for number in worker.device_mapping or []] or ["cpu"]:
            least.setdefault(place, {})[path] = held * count
    for place, by_role in sorted(least.items()):
        total = _memory_of(place, facts.config.ray_args.address)
        if total is None:
            continue
        where = "this machine's memory" if place == "cpu" else f"device {place}"
        largest = max(by_role, key=lambda path: by_role[path])
        if by_role[largest] > total:
            problem = f"holds at least {_gib(by_role[largest])} in {where}, which has {_gib(total)}"
            yield Finding("error", largest, f"{problem}; use more devices, a smaller model, or a smaller dtype")
        elif sum(by_role.values()) > total:
            together = f"{', '.join(by_role)} hold at least {_gib(sum(by_role.values()))} together"
            problem = f"{together} in {where}, which has {_gib(total)}"
            yield Finding("warning", largest, f"{problem}; map them to different devices, or use smaller models")


def _roles(facts: Facts) -> dict[str, WorkerConfig]:
    roles = roles_of(facts.config, facts.loaded.yaml_names)
    if not facts.config.needs_reference:
        roles.pop("reference", None)
    return roles


def _least_bytes(worker: WorkerConfig) -> float | None:
    """Bytes of one process that nothing can do without; None where the strategy's sharding is not ours to know."""
    model = find_model_config(worker.model_args.model_name_or_path)
    parameters = count_parameters(model) if model else None
    strategy = worker.strategy_args.strategy_name if worker.strategy_args else ""
    if parameters is None:
        return None
    if strategy == "fsdp2_train":
        return parameters * TRAINED_BYTES / (worker.world_size or 1)
    if strategy in ("hf_infer", "vllm"):
        return parameters * LEAST_BYTES[worker.model_args.dtype] / max(1, worker.num_gpus_per_worker)
    return None


def _memory_of(place: str, address: str | None) -> float | None:
    """Bytes of the machine's memory, or of its smallest GPU; None where they are not this machine's or not known."""
    if address is not None:
        return None
    if place == "cpu":
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    # Not torch: reading a device's properties there starts CUDA in this process.
    command = shutil.which("nvidia-smi")
    if command is None:
        return None
    asked = [command, "--query-gpu=memory.total", "--format=csv,noheader,nounits"]
    try:
        answer = subprocess.run(asked, capture_output=True, text=True, timeout=20, check=True).stdout
    except (OSError, subprocess.SubprocessError):  # a machine that cannot say is not held up by that
        return None
    sizes = [float(line) for line in answer.split() if line.strip().isdigit()]
    return min(sizes) * 2**20 if sizes else None


def _gib(count: float) -> str:
    return f"{count / 2**30:.1f} GiB"


# ---- data --------------------------------------------------------------------------------------------------------


def data_rows(facts: Facts) -> Iterator[Finding]:
    """Files are there, rows have what they need, prompts fit."""
    unusable: Finding | None = None
    field = f"{facts.student}.data_args"
    try:
        prompts = len(facts.source.train)
    except RollOPDError as error:
        unusable = failed(error, field)
    for split, counts in facts.rows.items():
        where = field if split == "train" else "validation.data_args"
        told = ", ".join(f"{counts[key]} {word}" for key, word in _COUNTED)
        yield Finding("ok", f"{where}.file_name", told)
        if counts["bad"]:
            yield Finding("ok", f"{where}.on_bad_row", f"{counts['bad']} bad rows are skipped, as it says")
        if counts["dropped_overlong"] > OVERLONG * counts["kept"]:
            share = counts["dropped_overlong"] / counts["kept"]
            problem = f"{share:.0%} of the {split} rows are longer than {facts.config.prompt_length} tokens"
            yield Finding("warning", "prompt_length", f"{problem} and left out; raise it, or remove them from the data")
    if unusable is not None:
        yield unusable
    elif prompts < facts.config.rollout_batch_size:
        problem = f"{facts.config.rollout_batch_size} prompts a step of {prompts} in all, so some come twice in a step"
        yield Finding("warning", "rollout_batch_size", f"{problem}; lower it, or give more rows")


_COUNTED = (("read", "rows read"), ("bad", "bad"), ("dropped_overlong", "too long"), ("used", "used"))


def tag_coverage(facts: Facts) -> Iterator[Finding]:
    """Who scores and who grades each tag, and who has nothing to do."""
    config, source = facts.config, facts.source
    tags = Counter(p.row.tag for p in source.train)
    teachers = {name: teacher.tag_included for name, teacher in config.teachers.items()}
    rewards = {name: reward.tag_included for name, reward in config.rewards.items()}
    graded_by = route_tags(tags, rewards)
    for tag, count in tags.most_common(MAX_TAGS):
        who = [name for name, included in teachers.items() if not included or tag in included]
        said = f"tag {tag!r}: {count} prompts"
        if teachers:
            said += f", teacher {', '.join(who)}" if who else ", no teacher (opd_args.uncovered: reward_only)"
        if rewards and graded_by[tag] is None:
            problem = f"{said}, no reward, so its responses are not graded"
            yield Finding("warning", "rewards", f"{problem}; add the tag to a reward's tag_included")
        else:
            yield Finding("ok", "tag_included", said + (f", reward {graded_by[tag]}" if rewards else ""))
    if len(tags) > MAX_TAGS:
        yield Finding("ok", "tag_included", f"{len(tags) - MAX_TAGS} more tags")
    for name, included in teachers.items():
        yield from _idle(f"{facts.loaded.teacher_yaml_name(name)}.tag_included", included, tags, "scores")
    seen = [*tags, *(p.row.tag for p in source.validation)]
    used = set(route_tags(seen, rewards).values())
    for name in rewards:
        if name not in used:
            problem = "no tag of the data leads to this reward, so it grades nothing"
            yield Finding("warning", f"rewards.{name}.tag_included", f"{problem}; name tags of the data, or remove it")


def _idle(field: str, included: Sequence[str], tags: Mapping[str, int], does: str) -> Iterator[Finding]:
    if included and not set(included) & set(tags):
        some = ", ".join(sorted(tags)[:5])
        problem = f"none of {', '.join(included)} is a tag of the data ({some}), so this teacher {does} nothing"
        yield Finding("warning", field, f"{problem}; name tags of the data, or remove it")
    for tag in sorted(set(included) - set(tags)) if set(included) & set(tags) else ():
        yield Finding("warning", field, f"{tag!r} is no tag of the data; remove it, or correct the spelling")


def domain_shares(facts: Facts) -> Iterator[Finding]:
    """How many prompts stand behind each domain's share."""
    data = facts.config.actor_train.data_args
    shares = data.domain_interleave_probs if data is not None else None
    if not shares:
        return
    domains = facts.source.domains
    field, total = f"{facts.student}.data_args.domain_interleave_probs", sum(shares.values())
    for name, share in shares.items():
        yield Finding("ok", field, f"domain {name!r}: share {share / total:.1%}, {len(domains.get(name, []))} prompts")


MODEL_CHECKS: tuple[Check[Facts], ...] = (
    Check("models", tokenizers, always=True),
    Check("models", vocabulary_rows),
    Check("models", end_of_turn_reachable),
    Check("models", context_lengths, always=True),
    Check("models", teachers_differ),
    Check("models", student_roles),
)
SETTING_CHECKS: tuple[Check[Facts], ...] = (
    Check("settings", reward_classes, always=True),
    Check("settings", top_k_fits, always=True),
    Check("settings", batch_arithmetic),
    Check("settings", devices),
    Check("settings", memory),
)
DATA_CHECKS: tuple[Check[Facts], ...] = (
    Check("data", data_rows, always=True),
    Check("data", tag_coverage),
    Check("data", domain_shares),
)


def wanted(config: PipelineConfig, checks: Sequence[Check[Facts]]) -> list[Check[Facts]]:
    """Those of ``checks`` that the setting ``preflight`` asks for."""
    return [check for check in checks if check.always or config.preflight != "off"]
