"""Whether the environments can be played: they exist, begin, fit the context, and somebody scores them."""

from __future__ import annotations

import importlib
from collections.abc import Iterator

from roll_opd.configs.environment_config import EnvironmentConfig
from roll_opd.datasets.contexts import render_context
from roll_opd.datasets.conversation import Conversation
from roll_opd.datasets.prompts import tokenize
from roll_opd.environments.base import Opening, Outcome
from roll_opd.environments.registry import check_env_type
from roll_opd.errors import ConfigError, DataError, RollOPDError
from roll_opd.pipeline.agentic.dialogue import Dialogue, Played, context_fields
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Check, Finding, failed

PLAIN_TURN = "<answer>x</answer>"
THINKING_TURN = "<think>\nx\n</think>\n\n" + PLAIN_TURN
"""What a student may write, for a look at what the chat template makes of it."""


def env_types(facts: Facts) -> Iterator[Finding]:
    """Every ``env_type`` can stand for an environment, and every hook for a function."""
    for tag, env in facts.agentic.environments_in_use().items():
        path = f"custom_envs.{tag}"
        try:
            check_env_type(env.env_type, f"{path}.env_type")
            _check_hook(env.on_context_full, f"{path}.on_context_full")
        except ConfigError as error:
            yield failed(error)


def _check_hook(hook: str, field: str) -> None:
    if hook == "stop":
        return
    module, _, name = hook.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ConfigError(field, f"{hook!r} cannot be imported: {error}") from error
    if not callable(found):
        raise ConfigError(field, f"{hook!r} is no function of the messages so far")


def envs_begin(facts: Facts) -> Iterator[Finding]:
    """Every environment can be made and reset, within its deadline, and shows text."""
    for tag, opened in facts.openings.items():
        env = facts.agentic.custom_envs[tag]
        if isinstance(opened, Opening):
            told = f"{env.env_type} begins; its first observation has {len(opened.observation)} characters"
            yield Finding("ok", f"custom_envs.{tag}", told)
        elif isinstance(opened, ConfigError):
            # What env_types has reported is not reported again.
            if opened.field != f"custom_envs.{tag}.env_type" or _is_known(env, tag):
                yield failed(opened)
        else:
            fix = "correct env_config, raise reset_timeout, or use another env_type"
            error = ConfigError(f"custom_envs.{tag}", f"{env.env_type} does not begin: {opened.reason}; {fix}")
            yield failed(error)


def _is_known(env: EnvironmentConfig, tag: str) -> bool:
    try:
        check_env_type(env.env_type, f"custom_envs.{tag}.env_type")
    except ConfigError:
        return False
    return True


def env_prompts(facts: Facts) -> Iterator[Finding]:
    """The first prompt fits the context, and turns behind it; what the chat template does with earlier turns."""
    for tag, opened in facts.openings.items():
        if isinstance(opened, Opening):
            try:
                yield from _prompts(facts, tag, opened)
            except RollOPDError as error:
                yield failed(error, f"custom_envs.{tag}")


def _prompts(facts: Facts, tag: str, opening: Opening) -> Iterator[Finding]:
    whole, env, path = facts.agentic.sequence_length, facts.agentic.custom_envs[tag], f"custom_envs.{tag}"
    assert whole is not None
    dialogue = _dialogue(facts, tag, opening)
    turn = dialogue.max_tokens
    first = _begun(facts, tag, dialogue)
    length = len(first.prompt_ids)
    if length >= whole:
        problem = f"the first prompt of {tag!r} has {length} tokens, and sequence_length is {whole}"
        yield failed(ConfigError("sequence_length", f"{problem}; raise it, or shorten the templates"))
        return
    yield Finding("ok", path, f"its first prompt has {length} tokens, and a turn up to {turn} more")
    if env.episode_mode == "step":
        played = [Played(opening.observation, PLAIN_TURN, 0.0)] * env.max_steps
        first.start(dialogue.following(_like(opening), played))
        later = len(first.prompt_ids)
        if later + turn > whole:
            problem = f"a prompt with the last {env.history_length} turns has about {later} tokens, which leaves"
            fix = f"less than max_tokens_per_step = {turn} of sequence_length = {whole}; lower history_length"
            yield Finding("warning", f"{path}.history_length", f"{problem} {fix}, or raise sequence_length")
        return
    further = _rewrites(facts, tag, dialogue, opening, PLAIN_TURN)[1]
    turns = 1 + max(0, whole - length - turn) // (turn + further) if length + turn <= whole else 0
    if turns < env.max_steps and env.on_context_full == "stop":
        problem = f"when every turn takes {turn} tokens, {turns} of max_steps = {env.max_steps} turns fit"
        fix = "raise sequence_length, lower max_tokens_per_step or max_steps, or set on_context_full"
        yield Finding("warning", path, f"{problem} sequence_length = {whole}, where the episode ends; {fix}")
    yield from _history(facts, tag, dialogue, opening)
    if _has_tools(env):
        yield from _tool_answers(facts, tag, dialogue)


def _dialogue(facts: Facts, tag: str, opening: Opening) -> Dialogue:
    config, env = facts.agentic, facts.agentic.custom_envs[tag]
    sampling = config.actor_infer.generating_args
    assert sampling is not None
    limits = (env.max_tokens_per_step, sampling.max_new_tokens, config.response_length)
    return Dialogue(env, opening, min(limit for limit in limits if limit is not None))


def _has_tools(env: EnvironmentConfig) -> bool:
    """Whether answers of tools come under a role of their own, as far as the config tells."""
    wrapper = env.tool_wrapper
    wrapped = wrapper is not None and bool(wrapper.tool_configs) and wrapper.wrapper_args.max_tool_uses > 0
    return wrapped or env.env_type == "mcp"


def _tool_answers(facts: Facts, tag: str, dialogue: Dialogue) -> Iterator[Finding]:
    try:
        _after_a_turn(facts, tag, dialogue, PLAIN_TURN).observe([{"role": "tool", "content": "x"}])
    except DataError as error:
        yield failed(DataError(f"{error}. Or set episode_mode: step, where they stand in the user message"))


def _history(facts: Facts, tag: str, dialogue: Dialogue, opening: Opening) -> Iterator[Finding]:
    """Tell whether the chat template writes earlier turns as the student saw them."""
    field, split = f"custom_envs.{tag}.on_rewrite", dialogue.config.on_rewrite == "split"
    what = "rewrites earlier turns" if _rewrites(facts, tag, dialogue, opening, PLAIN_TURN)[0] else ""
    if not what and _rewrites(facts, tag, dialogue, opening, THINKING_TURN)[0]:
        what = "removes the thinking of earlier turns"
    then = "each such turn begins another trajectory" if split else "the student goes on behind the tokens as they were"
    told = f"the chat template {what}: {then}" if what else "the chat template writes earlier turns as they were"
    yield Finding("ok", field, told)


def _rewrites(facts: Facts, tag: str, dialogue: Dialogue, opening: Opening, text: str) -> tuple[bool, int]:
    """Whether the template rewrites a turn that says ``text``, and how many tokens come between it and the next."""
    conversation = _after_a_turn(facts, tag, dialogue, text, split=True)
    seen = len(conversation.prompt_ids)
    rewritten = conversation.observe(dialogue.following(_like(opening), [Played(opening.observation, text, 0.0)]))
    return rewritten, max(0, len(conversation.prompt_ids) - seen)


def _begun(facts: Facts, tag: str, dialogue: Dialogue, split: bool = False) -> Conversation:
    data = facts.config.actor_train.data_args
    thinking = None if data is None else data.enable_thinking
    conversation = Conversation(
        facts.tokenizer,
        stop_ids=facts.vocabulary.stop_ids,
        on_rewrite="split" if split else dialogue.config.on_rewrite,
        chat_template_kwargs={} if thinking is None else {"enable_thinking": thinking},
        where=f"custom_envs.{tag}",
    )
    conversation.start(dialogue.first())
    return conversation


def _after_a_turn(facts: Facts, tag: str, dialogue: Dialogue, text: str, split: bool = False) -> Conversation:
    conversation = _begun(facts, tag, dialogue, split)
    (ids,) = tokenize([text], facts.tokenizer, add_special_tokens=False)
    conversation.sampled([*ids, min(facts.vocabulary.stop_ids)] if facts.vocabulary.stop_ids else ids)
    return conversation


def _like(opening: Opening) -> Outcome:
    """An outcome that shows what the opening shows, for want of a played turn."""
    return Outcome(opening.observation, 0.0, terminated=False, truncated=False)


def env_contexts(facts: Facts) -> Iterator[Finding]:
    """What a teacher sees in place of the first user message can be written for each environment, and fits."""
    for name, teacher in facts.config.teachers.items():
        template = teacher.teacher_args.context_template
        for tag, opened in facts.openings.items():
            if template is None or not isinstance(opened, Opening) or tag not in (teacher.tag_included or [tag]):
                continue
            field = f"{facts.loaded.teacher_yaml_name(name)}.teacher_args.context_template"
            try:
                length, most = _context_length(facts, tag, opened, template), facts.agentic.context_length(teacher)
            except RollOPDError as error:
                yield failed(ConfigError(field, str(error)))
                continue
            told = f"the prompt of teacher {name!r} in environment {tag!r} has {length} tokens"
            if length > most:
                fix = "raise teacher_args.context_length, or shorten teacher_args.context_template"
                yield failed(ConfigError(field, f"{told}, more than {most}; {fix}"))
            else:
                yield Finding("ok", field, told)


def _context_length(facts: Facts, tag: str, opening: Opening, template: str) -> int:
    dialogue = _dialogue(facts, tag, opening)
    first = next(message["content"] for message in dialogue.first() if message["role"] == "user")
    text = render_context(template, context_fields(opening, first, tag), f"environment {tag!r}")
    return len(_after_a_turn(facts, tag, dialogue, PLAIN_TURN).opening_with(0, text))


def env_penalties(facts: Facts) -> Iterator[Finding]:
    """A turn without a valid action is not punished twice."""
    config = facts.agentic
    for name, manager in (("train_env_manager", config.train_env_manager), ("val_env_manager", config.val_env_manager)):
        for tag in manager.tags if manager.format_penalty else ():
            if own := config.custom_envs[tag].env_config.get("format_penalty"):
                problem = f"is added to custom_envs.{tag}.env_config.format_penalty = {own}; set one of the two"
                yield Finding("warning", f"{name}.format_penalty", f"{manager.format_penalty} {problem}")


def env_tags(facts: Facts) -> Iterator[Finding]:
    """Who scores each environment; the config has refused one that nobody scores."""
    config = facts.agentic
    train = config.train_env_manager
    groups = dict(zip(train.tags, train.num_groups_partition or [], strict=True))
    for tag, count in groups.items():
        who = [name for name, t in config.teachers.items() if not t.tag_included or tag in t.tag_included]
        said = f"tag {tag!r}: {count} of {train.num_env_groups} groups"
        if config.teachers:
            nobody = f"no teacher (opd_args.uncovered: {config.opd_args.uncovered})"
            said += f", teacher {', '.join(who)}" if who else f", {nobody}"
        yield Finding("ok", "train_env_manager.tags", said)
    if not config.val_env_manager.tags and config.eval_steps > 0:
        problem = f"empty, so that eval_steps = {config.eval_steps} validates nothing; name tags, or set eval_steps: 0"
        yield Finding("warning", "val_env_manager.tags", problem)


ENV_CHECKS: tuple[Check[Facts], ...] = (
    Check("environments", env_types, always=True),
    Check("environments", envs_begin),
    Check("environments", env_prompts),
    Check("environments", env_contexts),
    Check("environments", env_penalties),
    Check("environments", env_tags),
)
