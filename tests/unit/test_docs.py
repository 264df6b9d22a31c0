"""The documentation agrees with the code where that can be checked."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

REPO = Path(__file__).parents[2]
PAGES = sorted(
    [*REPO.glob("*.md"), *REPO.glob("docs/*.md"), *REPO.glob("data/*.md"), *REPO.glob("examples/*/README.md")]
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
        if re.match(r"[a-z]+:", target) or target.startswith("#"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path
        assert file.exists(), f"{page.name}: {target}"
        if anchor:
            assert anchor in anchors(file), f"{page.name}: {target}"


def anchors(page: Path) -> set[str]:
    """The anchors that a Markdown renderer gives to the headings."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def test_every_metric_is_documented() -> None:
    """Metric names that stand as literals in the code stand in docs/metrics.md."""
    text = (REPO / "docs" / "metrics.md").read_text(encoding="utf-8")
    sources = ["pipeline/metrics.py", "pipeline/base_pipeline.py", "pipeline/report.py"]
    found = set()
    for source in sources:
        code = (REPO / "roll_opd" / source).read_text(encoding="utf-8")
        found |= set(re.findall(r'"((?:opd|rollout|staleness|mismatch|train|time|teacher|reward)/[a-z_]+)"', code))
    assert found
    assert sorted(name for name in found if f"`{name}`" not in text) == []
