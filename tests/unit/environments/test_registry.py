"""From `env_type` to an environment, and the messages on the way."""

import functools
import subprocess
import sys

import gymnasium
import pytest

from roll_opd.environments import registry
from roll_opd.environments.frozen_lake import FrozenLakeEnv
from roll_opd.environments.registry import check_env_type, known_environments, make_environment, resolve_environment
from roll_opd.environments.sokoban import SokobanEnv
from roll_opd.errors import ConfigError

FIELD = "custom_envs.Lake"
ROLL = "roll.pipeline.agentic.env"


class Echo(gymnasium.Env[str, str]):
    """Takes anything."""

    def __init__(self, env_id="", *, times=1, **kwargs):
        if kwargs.get("broken"):
            raise TypeError("broken is of the wrong type")
        self.made_of = (env_id, times, kwargs)


class Demanding(Echo):
    def __init__(self, path):
        super().__init__(path)


class NoGame:
    pass


@pytest.mark.parametrize(
    ("env_type", "cls"),
    [
        ("frozen_lake", FrozenLakeEnv),
        ("sokoban", SokobanEnv),
        ("roll_opd.environments.sokoban.SokobanEnv", SokobanEnv),
        ("roll_opd.environments.sokoban:SokobanEnv", SokobanEnv),
        (f"{ROLL}.frozen_lake.env.FrozenLakeEnv", FrozenLakeEnv),
        (f"{ROLL}.frozen_lake:FrozenLakeEnv", FrozenLakeEnv),
        ("roll_opd.pipeline.agentic.env.sokoban.env.SokobanEnv", SokobanEnv),
        (f"{__name__}.Echo", Echo),
    ],
)
def test_names_and_paths_lead_to_their_class(env_type, cls):
    check_env_type(env_type, FIELD)
    assert resolve_environment(env_type, FIELD) is cls


@pytest.mark.parametrize(
    ("env_type", "adapter", "identifier"),
    [
        ("gym:FrozenLake-v1", "gym", "FrozenLake-v1"),
        ("gym:my_module:Maze-v0", "gym", "my_module:Maze-v0"),
        ("gem:game:GuessTheNumber-v0", "gem", "game:GuessTheNumber-v0"),
        ("game:GuessTheNumber-v0", "gem", "game:GuessTheNumber-v0"),
        ("math:GSM8K", "gem", "math:GSM8K"),
        ("rg:letter_counting", "gem", "rg:letter_counting"),
    ],
)
def test_ids_of_gymnasium_and_gem_go_to_their_adapters(env_type, adapter, identifier, monkeypatch):
    monkeypatch.setitem(registry._ADAPTERS, adapter, f"{__name__}.Echo")
    make = resolve_environment(env_type, FIELD)
    assert isinstance(make, functools.partial) and make.args == (identifier,)
    assert make_environment(env_type, {"seed": 1}, FIELD).made_of == (identifier, 1, {"seed": 1})


def test_adapters_and_short_names_are_where_the_registry_looks():
    for env_type in (*known_environments(), "gym:X-v0", "game:X-v0"):
        assert callable(resolve_environment(env_type, FIELD))
    assert known_environments() == ["frozen_lake", "math", "mcp", "roll_math", "sokoban"]


@pytest.mark.parametrize(
    ("env_type", "message"),
    [
        ("frozen_lak", "did you mean 'frozen_lake'?"),
        ("FrozenLake", "did you mean 'frozen_lake'?"),
        ("gmy:Maze-v0", "did you mean 'gym:Maze-v0'?"),
        ("chess", "known are frozen_lake, math, mcp, roll_math, sokoban"),
        ("", "known are frozen_lake"),
        ("gym:", "write gym:<id>"),
        ("a b.c", "there is no environment 'a b.c'"),
        ("webshop", "of ROLL that is not here; it needs a service of its own"),
        ("sokoban_native_env", "of ROLL that is not here; use `sokoban`"),
        ("roll_qa", "qa:NaturalQuestions"),
        (f"{ROLL}.webshop.env.WebShopEnv", "of ROLL that is not here"),
    ],
)
def test_a_name_that_stands_for_nothing_is_refused_before_anything_is_imported(env_type, message):
    with pytest.raises(ConfigError) as error:
        check_env_type(env_type, "custom_envs.Lake.env_type")
    assert error.value.field == "custom_envs.Lake.env_type"
    assert message in error.value.problem


@pytest.mark.parametrize(
    ("env_type", "message"),
    [
        ("no_such_package.envs.Maze", "there is no module 'no_such_package'"),
        ("roll_opd.environments.nowhere.Maze", "there is no module 'roll_opd.environments.nowhere'"),
        ("roll_opd.environments.sokoban.SokobanEnvironment", "did you mean 'SokobanEnv'?"),
        ("roll_opd.environments.sokoban.Room", "a class with the methods reset, step, close"),
        (f"{__name__}.NoGame", "is not an environment"),
        ("roll_opd.environments.grid_game.GridGame", "is not an environment"),
    ],
)
def test_a_path_that_leads_nowhere_says_where_it_ends(env_type, message):
    check_env_type(env_type, FIELD)
    with pytest.raises(ConfigError, match=FIELD) as error:
        resolve_environment(env_type, FIELD)
    assert message in error.value.problem


def test_a_missing_package_is_named_as_pip_knows_it(monkeypatch, tmp_path):
    (tmp_path / "maze_of_mine.py").write_text("import gem.no_such_part\nclass Maze: ...\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "gem", None)
    with pytest.raises(ConfigError, match=r"'maze_of_mine\.Maze' needs the package 'gem-llm', which is not installed"):
        resolve_environment("maze_of_mine.Maze", FIELD)


@pytest.mark.parametrize(
    ("env_type", "env_config", "field", "message"),
    [
        ("frozen_lake", {"sise": 4}, f"{FIELD}.env_config.sise", "did you mean 'size'? it takes size, p, is_slippery"),
        ("frozen_lake", {"size": 1}, f"{FIELD}.env_config", "size must be at least 2"),
        ("sokoban", {"action_pattern": "("}, f"{FIELD}.env_config", "action_pattern '('"),
        (f"{__name__}.Demanding", {}, f"{FIELD}.env_config.path", "cannot do without"),
        (f"{__name__}.Echo", {"broken": True}, f"{FIELD}.env_config", "broken is of the wrong type"),
        ("chess", {}, f"{FIELD}.env_type", "there is no environment"),
    ],
)
def test_a_wrong_argument_is_named_with_its_path(env_type, env_config, field, message):
    with pytest.raises(ConfigError) as error:
        make_environment(env_type, env_config, FIELD)
    assert error.value.field == field
    assert message in error.value.problem


def test_rolls_settings_make_an_environment():
    settings = {
        "action_pattern": r"<think>(.*?)</think>\s*<answer>(.*?)</answer>",
        "max_steps": 10,
        "format_penalty": -0.01,
        "is_slippery": False,
        "render_mode": "rgb_array",
    }
    env = make_environment("frozen_lake", settings, FIELD)
    env.reset(seed=0)
    assert env.step("<answer>Up</answer>")[1] == -0.01
    env.close()


def test_the_registry_imports_no_environment():
    script = (
        "import sys, roll_opd.environments.registry as r; r.check_env_type('sokoban', 'f');"
        "sys.exit(any(m in sys.modules for m in ('numpy', 'gymnasium', 'torch', 'ray')))"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
