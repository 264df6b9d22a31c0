"""The shipped examples load and would be launched; what their READMEs say of memory and overrides is what a plan says.

The models of the larger ones are not on this disk. Their plans are made with the shapes that Qwen has published.
"""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from roll_opd.configs import (
    LoadedConfig,
    config_from_dict,
    config_to_json,
    launch_blockers,
    launch_warnings,
    load_config,
    render_plan_text,
)
from roll_opd.configs.composition import compose_config
from roll_opd.configs.launch_checks import model_holders, weight_followers
from roll_opd.configs.memory import device_groups, footprint, turn_bytes
from roll_opd.doctor import guess_launcher

EXAMPLES = Path(__file__).parents[3] / "examples"
YAML = sorted(path for path in EXAMPLES.glob("*/*.yaml") if path.parent.name != "config")
LARGE = sorted(path for path in YAML if path.parent.name.startswith("qwen3"))
# hidden size, MLP, layers, heads, tied; all have 8 key-value heads of 128 and a vocabulary of 151,936.
QWEN3 = {
    "0.6B": (1024, 3072, 28, 16, True),
    "1.7B": (2048, 6144, 28, 16, True),
    "4B": (2560, 9728, 36, 32, True),
    "8B": (4096, 12288, 36, 32, False),
    "14B": (5120, 17408, 40, 40, False),
    "32B": (5120, 25600, 64, 64, False),
}
# Smaller than any GPU that is sold with this name.
ROOM = {"qwen3-4B-lora-24GB": 22 * 2**30}
ROOM_ELSEWHERE = 79 * 2**30
OVERRIDE = re.compile(r"^\| `([^`]*=[^`]*)` \|", re.MULTILINE)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Hugging Face cache with nothing but the models' shapes."""
    for name, (hidden, mlp, layers, heads, tied) in QWEN3.items():
        folder = tmp_path / "hub" / f"models--Qwen--Qwen3-{name}" / "snapshots" / "1"
        folder.mkdir(parents=True)
        shape = {"hidden_size": hidden, "intermediate_size": mlp, "num_hidden_layers": layers, "vocab_size": 151936,
                 "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128,
                 "tie_word_embeddings": tied}  # fmt: skip
        (folder / "config.json").write_text(json.dumps(shape))
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    monkeypatch.delenv("HF_HUB_CACHE", raising=False)


def loaded(path: Path, *overrides: str) -> LoadedConfig:
    launcher = guess_launcher(compose_config(path.parent, path.stem, []).values)
    return load_config(launcher, str(path.parent), path.name, overrides, None)


def name_of(path: Path) -> str:
    return f"{path.parent.name}/{path.stem}"


@pytest.mark.parametrize("path", YAML, ids=name_of)
def test_a_shipped_example_would_be_launched_as_it_stands(path: Path) -> None:
    found = loaded(path)
    assert found.warnings == [] and launch_blockers(found) == [] and launch_warnings(found) == []
    assert config_from_dict(json.loads(config_to_json(found.config))) == found.config


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_the_readme_shows_the_plans_memory(path: Path) -> None:
    plan = render_plan_text(loaded(path))
    memory = plan[plan.index("estimated memory") : plan.index("\n\nrewards")]
    assert "unknown" not in memory
    assert f"```\n{memory}\n```" in (path.parent / "README.md").read_text(encoding="utf-8"), memory


@pytest.mark.usefixtures("hub")
@pytest.mark.parametrize("path", LARGE, ids=name_of)
def test_every_turn_fits_the_devices(path: Path) -> None:
    found, room = loaded(path), ROOM.get(path.parent.name, ROOM_ELSEWHERE)
    roles = model_holders(found.config, found.yaml_names)
    for group in device_groups(roles):
        held = {role: size for role in group.roles if (size := footprint(roles[role])) is not None}
        assert list(held) == list(group.roles)
        turns = turn_bytes(held, found.yaml_names["actor_train"], weight_followers(found))
        assert max(turns.values()) < room
        assert all(size.weights < size.share * room for size in held.values() if size.share)


@pytest.mark.parametrize("folder", sorted({path.parent for path in LARGE}), ids=lambda folder: folder.name)
def test_overrides_that_a_readme_suggests_would_be_launched(folder: Path) -> None:
    main = next(path for path in LARGE if path.parent == folder and path.stem.startswith("onpolicy_distill"))
    suggested = OVERRIDE.findall((folder / "README.md").read_text(encoding="utf-8"))
    assert suggested
    for overrides in suggested:
        assert launch_blockers(loaded(main, *shlex.split(overrides))) == [], overrides
