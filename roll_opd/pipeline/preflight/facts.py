"""What the checks before a run look at; nothing here touches a GPU, or starts a process but to try an environment.

Each check is a generator of findings over :class:`Facts`, in one of the files ``*_checks.py``, listed at the file's end
in the order of their findings. ``docs/preflight.md`` has a row for each.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

from transformers import PreTrainedTokenizerBase

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.launch_checks import model_holders, starts_critic
from roll_opd.configs.loader import LoadedConfig
from roll_opd.configs.memory import find_model_config
from roll_opd.configs.model_args import ModelArguments
from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.distributed.strategy.tokenizer import Vocabulary, load_tokenizer, vocabulary_of
from roll_opd.errors import RollOPDError
from roll_opd.pipeline.preflight.env_trial import Opened, open_environments
from roll_opd.pipeline.preflight.finding import NotKnown
from roll_opd.pipeline.rlvr.prompt_source import PromptSource, read_prompts

T = TypeVar("T")
BASE_MODEL = "opd_args.base_model"


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
        if config.base_scorer is not None:
            found["the base model"] = (BASE_MODEL, config.base_scorer.model_args)
        return found

    def is_remote(self, path: str) -> bool:
        """Whether somebody else's server runs the scorer at ``path``; its files need not be here then."""
        held = model_holders(self.config, self.loaded.yaml_names)[path].strategy_args
        return held is not None and held.strategy_name == "remote"

    @functools.cached_property
    def models(self) -> dict[str, ModelArguments]:
        """Path in the YAML -> model, of everything that reads the student's tokens."""
        models = {self.student: self.config.actor_train.model_args, **dict(self.scorers.values())}
        if self.config.critic is not None and starts_critic(self.config):
            models["critic"] = self.config.critic.model_args
        return models

    def block_of(self, path: str) -> str:
        """The block of settings by which what stands at ``path`` runs; a base model runs as the first teacher does."""
        return self.loaded.teacher_yaml_name(next(iter(self.config.teachers))) if path == BASE_MODEL else path

    def architecture(self, path: str) -> dict[str, Any] | None:
        """The language model's part of ``config.json``, as the run changes it; None where it is not on disk."""
        found = find_model_config(self.models[path].model_name_or_path)
        return found and {**found.get("text_config", found), **self.models[path].model_config_kwargs}

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

    @property
    def agentic(self) -> AgenticConfig:
        """The config, for checks that only the agentic pipeline asks."""
        assert isinstance(self.config, AgenticConfig)
        return self.config

    @property
    def openings(self) -> dict[str, Opened]:
        """Tag -> what a reset of its environment returned, or why there is none."""
        return self._once("the environments", lambda: open_environments(self.agentic))

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
    return path if path == BASE_MODEL else f"{path}.model_args.model_name_or_path"
