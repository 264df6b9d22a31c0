"""The documentation agrees with the code where that can be checked."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from roll_opd.pipeline.student import COMPONENTS

REPO = Path(__file__).parents[2]
PAGES = sorted(
    path
    for pattern in ("*.md", "docs/*.md", "data/*.md", "benchmarks/*.md", "examples/*/README.md")
    for path in REPO.glob(pattern)
)


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_configuration", REPO / "docs" / "make_configuration.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # dataclasses look their module up by name.
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def test_configuration_page_is_up_to_date(maker: ModuleType) -> None:
    page = maker.PAGE.read_text(encoding="utf-8")
    assert maker.updated(page) == page, "run: python docs/make_configuration.py"


def test_notes_name_fields(maker: ModuleType) -> None:
    classes = {cls.__name__: cls for section in maker.SECTIONS for cls in section.classes}
    for key in maker.NOTES:
        cls, _, name = key.partition(".")
        assert name in maker.documented(classes[cls]), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_relative_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


PREFIXES = "opd|rl|rollout|staleness|mismatch|train|critic|time|teacher|reward|probe"


def emitted() -> set[str]:
    """Names of metrics and of summary entries that the code emits, as far as they stand in it as literals."""
    found: set[str] = set()
    pipeline = REPO / "roll_opd" / "pipeline"
    for source in pipeline.rglob("*.py"):
        code = source.read_text(encoding="utf-8")
        found |= set(re.findall(rf'"((?:{PREFIXES})/[a-z_]+)"', code))
        found |= {f"time/{name}" for name in re.findall(r'(?:phase|add_seconds)\("([a-z_]+)"', code)}
        found |= set(re.findall(r'\bnote\(\s*"([a-z_/]+)"', code))
        if source.name in ("validation.py", "agentic_pipeline.py"):
            found |= {f"val/{name}" for name in re.findall(r'metrics\["([a-z_]+)"\]', code)}
    found |= {f"train/{name}" for name in COMPONENTS}
    metrics = ast.parse((pipeline / "metrics.py").read_text(encoding="utf-8"))
    given = {"reward_metrics": "reward", "episode_metrics": "episode"}
    for function in metrics.body:
        if isinstance(function, ast.FunctionDef) and function.name in given:
            names = re.findall(r"\{prefix\}/([a-z_]+)", ast.unparse(function))
            found |= {f"{given[function.name]}/{name}" for name in names}
    # Signal puts what the advantages report under a prefix of its own.
    rl = ("rl_advantages", "agent_advantages", "sequence_advantages", "_scores", "_placed", "_count_states")
    prefixes = dict.fromkeys(rl, "rl") | {"final_advantages": "opd"}
    for name in ("advantages.py", "agent_advantages.py"):
        module = ast.parse((REPO / "roll_opd" / "algorithms" / name).read_text(encoding="utf-8"))
        for function in module.body:
            if isinstance(function, ast.FunctionDef) and function.name in prefixes:
                found |= {f"{prefixes[function.name]}/{key}" for key in metric_keys(function)}
    return found


def metric_keys(function: ast.FunctionDef) -> set[str]:
    """Text keys of ``metrics[...] = `` and of the dict displays in a function, its table of ``groups`` aside."""
    keys: list[ast.expr | None] = []
    tables = [
        n.value for n in ast.walk(function) if isinstance(n, ast.Assign) and "groups" in ast.unparse(n.targets[0])
    ]
    for node in ast.walk(function):
        if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name) and node.value.id == "metrics":
            keys.append(node.slice)
        elif isinstance(node, ast.Dict) and node not in tables:
            keys += node.keys
    return {key.value for key in keys if isinstance(key, ast.Constant) and isinstance(key.value, str)}


def test_the_code_is_searched_for_metrics() -> None:
    """One of each way in which a name comes about; if the code moves, the search must follow."""
    some = {"opd/reverse_kl", "rl/kl_coef", "rl/penalty_scale", "rl/reward_std", "opd/advantage_clip_fraction"}
    some |= {"train/divergence_loss", "train/grad_norm", "critic/loss", "critic/explained_variance", "time/values"}
    some |= {"rollout/filtered_groups", "mismatch/correction_min", "val/num_samples", "probe/noise_floor"}
    some |= {"reward/graded", "episode/turns", "episode/valid_action_rate", "rl/state_compared_fraction"}
    assert some <= emitted()


def test_every_metric_is_documented() -> None:
    """Metric names that stand as literals in the code stand in docs/metrics.md."""
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert sorted(name for name in emitted() if f"`{name}`" not in text) == []


def test_every_documented_metric_is_emitted() -> None:
    """What docs/metrics.md names under the prefixes of the signal and of training is what the code emits."""
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    named = set(re.findall(r"`((?:rl|mismatch|train|critic|time|episode)/[a-z_]+)`", text))
    assert sorted(named - emitted()) == []
