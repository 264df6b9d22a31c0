"""Every finding about environments, provoked on the quickstart's student; and the child process that tries them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from roll_opd.configs import AgenticConfig, build_config
from roll_opd.environments.base import Opening
from roll_opd.errors import ConfigError, EnvironmentFailedError
from roll_opd.pipeline.preflight import env_checks, env_trial
from roll_opd.pipeline.preflight.env_checks import ENV_CHECKS
from roll_opd.pipeline.preflight.facts import Facts
from roll_opd.pipeline.preflight.finding import Finding, run_checks, wanted
from roll_opd.pipeline.preflight.model_checks import context_lengths

STUDENT = Path(__file__).parents[3] / "examples" / "quickstart" / "models" / "student"
OPENING = Opening("You stand on ice.", {"env_instruction": "Walk to the goal."})
# Each message by its role; turns lose their thinking, as in the templates of thinking models.
THOUGHTLESS = """\
{%- for m in messages %}<|im_start|>{{ m.role }}
{{ m.content.split('</think>')[-1] if m.role == 'assistant' else m.content }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
ENVIRONMENTS = """
import os, time

class Well:
    def __init__(self, size=1): self.size = size
    def reset(self, *, seed=None, options=None):
        print("noise")
        return f"map {seed} of {self.size} {os.environ.get('LAKE')}", {"hint": "left"}
    def step(self, action): return "", 0.0, True, False, {}
    def close(self): pass

class Hangs(Well):
    def reset(self, *, seed=None, options=None): time.sleep(60)

class Dies(Well):
    def reset(self, *, seed=None, options=None): os._exit(3)

class Picture(Well):
    def reset(self, *, seed=None, options=None): return b"pixels", {}
"""


def facts(openings: dict[str, Any] | None = None, **changes: Any) -> Facts:
    """Of a config with one environment, ``Lake``; ``openings`` in place of a trial."""
    raw = {
        "pretrain": str(STUDENT),
        "adv_estimator": "reinforce",
        "rollout_batch_size": 2,
        "sequence_length": 400,
        "actor_train": {"infer_batch_size": 1},
        "actor_infer": {"generating_args": {"max_new_tokens": 8}},
        "train_env_manager": {"num_env_groups": 2, "tags": ["Lake"]},
        "custom_envs": {"Lake": {"env_type": "frozen_lake", "max_steps": 4}},
        "eval_steps": 0,
    }
    found = Facts(build_config({**raw, **changes}, "agentic"))
    if openings is not None:
        found._known["the environments"] = openings
    return found


def lake(**settings: Any) -> dict[str, Any]:
    return {"custom_envs": {"Lake": {"env_type": "frozen_lake", "max_steps": 4, **settings}}}


def look(found: Facts) -> list[Finding]:
    return run_checks(ENV_CHECKS, found)


def problems(findings: list[Finding]) -> list[tuple[str, str]]:
    return [(f.level, f.field) for f in findings if f.level != "ok"]


def test_an_environment_that_is_well() -> None:
    findings = look(facts({"Lake": OPENING}))
    assert problems(findings) == [] and {f.area for f in findings} == {"environments"}
    told = "\n".join(f"{f.field}: {f.message}" for f in findings)
    assert "custom_envs.Lake: frozen_lake begins; its first observation has 17 characters" in told
    assert "and a turn up to 8 more" in told and "writes earlier turns as they were" in told
    assert "train_env_manager.tags: tag 'Lake': 2 of 2 groups" in told


def test_types_and_hooks() -> None:
    (error, *_) = look(facts({"Lake": ConfigError("custom_envs.Lake.env_type", "unknown")},
                             custom_envs={"Lake": {"env_type": "frozen_lakes"}}))  # fmt: skip
    assert "did you mean 'frozen_lake'" in error.message
    for hook, words in (("roll_opd.nowhere.f", "cannot be imported"), ("roll_opd.errors.nothing", "cannot be imported"),
                        ("roll_opd.pipeline.agentic.context_limits.KEPT_TURNS", "is no function")):  # fmt: skip
        (error,) = list(env_checks.env_types(facts({}, **lake(on_context_full=hook))))
        assert error.field == "custom_envs.Lake.on_context_full" and words in error.message
    assert list(env_checks.env_types(facts({}, **lake(on_context_full="os.path.join")))) == []


def test_an_unknown_type_is_reported_once() -> None:
    unknown = facts(custom_envs={"Lake": {"env_type": "frozen_lakes"}})
    assert problems(look(unknown)) == [("error", "custom_envs.Lake.env_type")]
    # It is one of the two checks that no setting switches off; nothing is started for it.
    off = facts(preflight="off")
    assert [check.find for check in wanted(off.config, ENV_CHECKS)] == [env_checks.env_types]


@pytest.mark.parametrize(
    ("opened", "field", "words"),
    [
        (EnvironmentFailedError("Lake", "reset raised OSError"), "custom_envs.Lake", "does not begin: reset raised"),
        (ConfigError("custom_envs.Lake.env_config.sise", "no such argument"), "custom_envs.Lake.env_config.sise", "no"),
        # A known name whose package is not there.
        (ConfigError("custom_envs.Lake.env_type", "needs the package"), "custom_envs.Lake.env_type", "package"),
    ],
)
def test_environments_that_do_not_begin(opened: Any, field: str, words: str) -> None:
    findings = look(facts({"Lake": opened}))
    assert problems(findings) == [("error", field)]
    assert words in next(f.message for f in findings if f.level == "error")


def test_a_first_prompt_that_is_too_long() -> None:
    long = Opening("ice " * 400, {})
    findings = look(facts({"Lake": long}))
    assert problems(findings) == [("error", "sequence_length")]


def test_turns_that_fit() -> None:
    def warnings(length: int, **settings: Any) -> list[str]:
        found = look(facts({"Lake": OPENING}, sequence_length=length, **lake(**settings)))
        return [f.message for f in found if f.level == "warning"]

    told = [f.message for f in look(facts({"Lake": OPENING})) if "first prompt" in f.message]
    prompt = int(told[0].split(" has ")[1].split()[0])
    further = env_checks._rewrites(*_dialogue(), OPENING, env_checks.PLAIN_TURN)[1]
    enough = prompt + 8 + 3 * (further + 8)
    assert warnings(enough) == []
    (warning,) = warnings(enough - 1)
    assert "when every turn takes 8 tokens, 3 of max_steps = 4 turns fit" in warning
    assert warnings(enough - 1, on_context_full="os.path.join") == [] and warnings(enough - 1, max_steps=3) == []
    (warning,) = warnings(prompt + 7)
    assert "0 of max_steps" in warning


def _dialogue() -> tuple[Facts, str, env_checks.Dialogue]:
    found = facts({})
    return found, "Lake", env_checks.Dialogue(found.agentic.custom_envs["Lake"], OPENING, 8)


def test_a_prompt_of_its_own_for_each_turn() -> None:
    step = lake(episode_mode="step", history_length=3)
    assert problems(look(facts({"Lake": OPENING}, **step))) == []
    findings = look(facts({"Lake": Opening("ice " * 60, {})}, **step))
    assert problems(findings) == [("warning", "custom_envs.Lake.history_length")]
    assert (
        problems(look(facts({"Lake": Opening("ice " * 60, {})}, **lake(episode_mode="step", history_length=0)))) == []
    )


@pytest.mark.parametrize(
    ("template", "settings", "words"),
    [
        (THOUGHTLESS, {}, "removes the thinking of earlier turns: each such turn begins another trajectory"),
        (THOUGHTLESS, {"on_rewrite": "keep"}, "the student goes on behind the tokens as they were"),
        (THOUGHTLESS.replace("m.content.split('</think>')[-1]", "'moved: ' + m.content"), {}, "rewrites earlier turns"),
    ],
)
def test_templates_that_rewrite(template: str, settings: dict[str, Any], words: str) -> None:
    found = facts({"Lake": OPENING}, **lake(**settings))
    found.tokenizer.chat_template = template
    (told,) = [f.message for f in look(found) if f.field.endswith("on_rewrite")]
    assert words in told


TOOLS = {"tool_wrapper": {"tool_configs": [{"tool_id": "python_code"}]}}
SILENT = THOUGHTLESS.replace("<|im_start|>", "{% if m.role != 'tool' %}<|im_start|>", 1).replace(
    "{% endfor", "{% endif %}{% endfor"
)
STRICT = THOUGHTLESS.replace(
    "<|im_start|>", "{% if m.role == 'tool' %}{{ raise_exception('no tool') }}{% endif %}<|im_start|>", 1
)


@pytest.mark.parametrize("template", [SILENT, STRICT])
@pytest.mark.parametrize("settings", [TOOLS, {"env_type": "mcp"}])
def test_a_template_without_the_role_of_tools(settings: dict[str, Any], template: str) -> None:
    def errors(**more: Any) -> list[tuple[str, str]]:
        found = facts({"Lake": OPENING}, **lake(**more))
        found.tokenizer.chat_template = template
        return [(f.field, f.message) for f in look(found) if f.level != "ok"]

    assert errors() == errors(**settings, episode_mode="step", history_length=0) == []
    ((field, message),) = errors(**settings)
    assert field == "custom_envs.Lake" and "episode_mode: step" in message and "tool" in message
    assert problems(look(facts({"Lake": OPENING}, **lake(**settings)))) == []


@pytest.mark.parametrize(
    ("template", "settings", "error"),
    [
        ("{{ prompt }} {{ tag }} {{ observation }} {{ hint }}", {}, ""),
        ("{{ prompt }} {{ solution }}", {}, "environment 'Lake': the context template uses a field"),
        (
            "{{ prompt }}{% for _ in range(100) %} ice{% endfor %}",
            {"context_length": 60},
            "more than 60; raise",
        ),
        ("{{ solution }}", {"tag_included": ["Pond"]}, ""),
    ],
)
def test_what_a_teacher_with_a_view_of_its_own_sees(template: str, settings: dict[str, Any], error: str) -> None:
    tags = settings.pop("tag_included", ["Lake"])
    teacher = {
        "model_args": {"model_name_or_path": str(STUDENT)},
        "tag_included": tags,
        "teacher_args": {"context_template": template, **settings},
    }
    opening = Opening(OPENING.observation, {**OPENING.info, "hint": "left", "path": [1]})
    envs = {name: {"env_type": "frozen_lake", "max_steps": 4} for name in ("Lake", "Pond")}
    found = facts(
        {"Lake": opening}, custom_envs=envs, train_env_manager={"num_env_groups": 2, "tags": list(envs)},
        teacher=teacher, opd_args={"uncovered": "skip"}, is_pure_opd=False, use_opd=True,
    )  # fmt: skip
    told = list(env_checks.env_contexts(found))
    assert [f.field for f in told] == ["teacher.teacher_args.context_template"] * (tags == ["Lake"])
    assert [f.level for f in told] == (["error"] if error else ["ok"] * (tags == ["Lake"]))
    assert all(error in f.message for f in told)


@pytest.mark.parametrize(
    ("lengths", "context", "level", "fix"),
    [
        # The model has 2048 positions. response_length bounds a turn, sequence_length what follows the context.
        ({"sequence_length": 1500, "response_length": 8}, 548, "ok", ""),
        ({"sequence_length": 1500, "response_length": 8}, 549, "error", "set it to 548 at most"),
        ({"sequence_length": 1025, "response_length": 8}, None, "warning", "set it to 1023 at most"),
        ({"sequence_length": 2048, "response_length": 8}, 1, "error", "shorten sequence_length"),
    ],
)
def test_an_episode_behind_a_teachers_own_prompt_fits_its_positions(
    lengths: dict[str, int], context: int | None, level: str, fix: str
) -> None:
    teacher = {
        "model_args": {"model_name_or_path": str(STUDENT)},
        "teacher_args": {"context_template": "{{ prompt }}", "context_length": context},
    }
    found = facts(teacher=teacher, use_opd=True, **lengths)
    told = next(f for f in context_lengths(found) if f.field.startswith("teacher"))
    assert (told.level, fix in told.message) == (level, True), told


def test_a_penalty_that_is_given_twice() -> None:
    def warnings(own: float, managers: float) -> list[tuple[str, str]]:
        manager = {"num_env_groups": 2, "tags": ["Lake"], "format_penalty": managers}
        settings = lake(env_config={"format_penalty": own})
        return [(f.level, f.field) for f in env_checks.env_penalties(facts({}, train_env_manager=manager, **settings))]

    assert warnings(-0.1, -0.2) == [("warning", "train_env_manager.format_penalty")]
    assert warnings(-0.1, 0) == warnings(0, -0.2) == []


def test_a_tokenizer_without_a_template() -> None:
    found = facts({"Lake": OPENING})
    found.tokenizer.chat_template = None
    findings = look(found)
    assert problems(findings) == [("error", "custom_envs.Lake")]


def test_validation_without_environments() -> None:
    assert problems(look(facts({"Lake": OPENING}, eval_steps=5))) == [("warning", "val_env_manager.tags")]


def test_trials_in_processes_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "trial_environments.py").write_text(ENVIRONMENTS)
    monkeypatch.syspath_prepend(tmp_path)
    names = {"Well": {"size": {1: "one\ntwo"}}, "Hangs": {}, "Dies": {}, "Picture": {}, "Odd": {"sise": 2}, "Lost": {}}
    envs = {
        name: {"env_type": f"trial_environments.{name if name != 'Odd' else 'Well'}", "env_config": arguments}
        for name, arguments in names.items()
    }
    envs["Lost"] = {"env_type": "math", "env_config": {"file_name": "nowhere.jsonl"}}
    envs["Hangs"]["reset_timeout"] = 0.1
    manager = {"num_env_groups": 6, "tags": list(envs), "system_envs": {"LAKE": 7}}
    config = facts({}, custom_envs=envs, train_env_manager=manager, rollout_batch_size=6).config
    assert isinstance(config, AgenticConfig)
    opened = env_trial.open_environments(config)
    assert opened["Well"] == Opening(r"map 42 of {1: 'one\ntwo'} 7", {"hint": "left"})
    assert "took longer than reset_timeout (0.1 s)" in str(opened["Hangs"])
    assert "ended with exit code 3" in str(opened["Dies"])
    assert "an observation that is a bytes, not a string" in str(opened["Picture"])
    assert isinstance(opened["Odd"], ConfigError) and opened["Odd"].field == "custom_envs.Odd.env_config.sise"
    assert "nowhere.jsonl: data file not found" in str(opened["Lost"])
