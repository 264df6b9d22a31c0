"""One environment of the agentic pipeline: what it is, how the student is spoken to, and its limits."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from roll_opd.configs.field_spec import parse_with, ranged
from roll_opd.configs.roll_compat import resolve_class_path

DEFAULT_STEP_TEMPLATE = """\
{env_instruction}
You have taken {step_count} steps. The last {history_length} of them: {history}
Step {current_step} begins with:
{current_observation}"""


@dataclass(frozen=True)
class ToolConfig:
    """A tool that stands between the student and its environment."""

    tool_id: str = "python_code"
    """Short name of the tool, or the import path of its class."""
    tool_args: dict[str, Any] = field(default_factory=dict)
    """Settings that are handed to the tool's class."""


@dataclass(frozen=True)
class ToolWrapperArguments:
    """What every tool call is worth."""

    tool_reward: float = 0.0
    """Added to the reward of a turn that calls a tool."""
    tool_success_reward: float = 0.0
    """Added when the call succeeds."""
    max_tool_uses: int = ranged(10, ge=0)
    """Calls in an episode; what would be a further one goes to the environment."""


@dataclass(frozen=True)
class ToolWrapperConfig:
    """Tools around an environment: an action that calls one is answered by it, any other goes to the environment."""

    wrapper_args: ToolWrapperArguments = field(default_factory=ToolWrapperArguments)
    """Rewards and limits."""
    tool_configs: list[ToolConfig] = field(default_factory=list)
    """The tools; the first that finds its call in an action answers."""


@dataclass(frozen=True)
class EnvironmentConfig:
    """Settings of one environment, an entry of `custom_envs`; its key is the tag of the episodes."""

    env_type: str = ""
    """Short name (`frozen_lake`, `sokoban`, `math`, …), `gym:<id>`, `gem:<id>` (or GEM's own `game:…`), or the import
    path of a class."""
    env_config: dict[str, Any] = field(default_factory=dict)
    """Arguments of the environment's class."""
    max_steps: int = ranged(10, ge=1)
    """Turns of an episode at most."""
    max_tokens_per_step: int | None = ranged(None, ge=1)
    """Tokens of a turn at most, beside `generating_args.max_new_tokens`; null: that alone. Always set after load."""
    env_manager_cls: str | None = field(default=None, metadata=parse_with(resolve_class_path))
    """ROLL's way to choose `episode_mode`: `…TrajEnvManager` or `…StepEnvManager`."""
    episode_mode: Literal["trajectory", "step"] | None = None
    """`trajectory`: the student sees all earlier turns, and an episode is one trajectory. `step`: each turn has a
    prompt of its own (with the last `history_length` turns as text), and is a trajectory. Null: as `env_manager_cls`
    says, else `trajectory`. Set after load, unless a manager of ROLL's is named that is only planned."""
    agent_system_template: str | None = None
    """System message; null: none."""
    agent_template: str = "{observation}"
    """User message of a turn. In `trajectory` mode it may name `observation`, `turn_idx`, `actions_left`,
    `max_response_length` and `suffix`; in `step` mode `env_instruction`, `history`, `history_length`, `step_count`,
    `current_step`, `current_observation` and `max_response_length`; the default there shows all but the last. A brace
    that is no field is written twice."""
    history_length: int = ranged(5, ge=0)
    """Earlier turns that the prompt of a turn shows, in `step` mode."""
    on_rewrite: Literal["split", "keep"] = "split"
    """When the chat template rewrites earlier turns (removes their thinking, say): `split` begins a new trajectory with
    the history as the template now writes it; `keep` goes on behind the tokens as they were."""
    on_context_full: str = "stop"
    """When `sequence_length` leaves no room for a turn: `stop` ends the episode; or the import path of a function that
    takes the messages so far and returns fewer, behind which a new trajectory of the episode begins."""
    reset_timeout: float = ranged(60.0, gt=0)
    """Seconds for a reset, the start of a process not counted; beyond, the environment counts as hung."""
    step_timeout: float = ranged(60.0, gt=0)
    """Seconds for a step; beyond, the environment counts as hung."""
    tool_wrapper: ToolWrapperConfig | None = None
    """Tools around the environment."""
    max_env_step_concurrent: int = ranged(0, ge=0)
    """Resets and steps of this environment at the same time, over all processes; 0: no limit."""
    use_thread_lock: bool = False
    """One reset or step at a time in each process, for environments that cannot work side by side in one."""
    agent_runner_cls: str | None = None
    """An agent of ROLL's that plays in the student's place; planned only."""
