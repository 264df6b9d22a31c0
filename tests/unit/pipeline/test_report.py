"""What the report writes of episodes."""

from __future__ import annotations

import json
import logging
from dataclasses import replace

import numpy as np
import pytest

from roll_opd.configs.agentic_config import AgenticConfig
from roll_opd.configs.worker_config import TeacherConfig
from roll_opd.pipeline.report import RunReport, _spread, sample_view
from roll_opd.trajectory import TeacherScores, Trajectory, TrajectoryId, Turn


class Characters:
    """A tokenizer whose tokens are characters; ``$`` ends a turn."""

    all_special_ids = (ord("$"),)

    def decode(self, ids: list[int], skip_special_tokens: bool) -> str:
        text = "".join(map(chr, ids))
        return text.replace("$", "") if skip_special_tokens else text


def trajectory(sample: int, number: int, *turns: tuple[str, str, bool | None], first: int = 0) -> Trajectory:
    """A segment: ``(observation, what the student wrote, whether that was valid)`` for each turn."""
    text, mask, told = "rules|", [False] * 6, []
    for i, (observation, written, valid) in enumerate(turns):
        text += observation + "|" + written + "$\n"
        mask += [False] * (len(observation) + 1) + [True] * (len(written) + 1) + [False]
        end = len(text) - 1
        told.append(Turn(first + i, end - len(written) - 1, end, observation, 0.25, observation, valid))
    on = np.array(mask)
    ramp = np.arange(len(text), dtype=np.float32)
    return Trajectory(
        id=TrajectoryId(3, sample, number),
        tag="lake",
        tokens=np.array([ord(c) for c in text], dtype=np.int32),
        response_mask=on,
        infer_logprobs=np.where(on, -ramp, 9).astype(np.float32),
        weight_version=np.where(on, 0, -1).astype(np.int32),
        teacher_scores={"default": TeacherScores(np.where(on, -ramp - 2, 0).astype(np.float32))},
        turns=tuple(told),
        reward=1.0,
        correct=True,
        extras={"prompt": "rules"},
    )


@pytest.fixture
def report(tmp_path) -> RunReport:
    folders = {"output_dir": str(tmp_path), "render_save_dir": str(tmp_path / "renders")}
    return RunReport(AgenticConfig(**folders, html_samples=2, teachers={"default": TeacherConfig()}))


def test_turns_of_a_view_find_their_tokens(report) -> None:
    t = trajectory(0, 1, ("SF\nFG", "go", True), ("SP", "x", False), first=4)
    view = sample_view(t, 7, Characters(), report.config, segments=2)
    assert (view.id, view.episode, view.segment, view.segments) == ("3/0/1", "3/0", 1, 2)
    shown = ["".join(token.text for token in view.tokens[turn.start : turn.end]) for turn in view.turns]
    assert shown == ["go$", "x$"]
    assert [turn.text for turn in view.turns] == ["go", "x"]
    assert view.response_text == "go\nx"
    assert [(turn.index, turn.observation, turn.is_valid) for turn in view.turns] == [
        (4, "SF\nFG", True), (5, "SP", False)
    ]  # fmt: skip
    # The teacher finds every token less likely by 2 nats; in validation the colour is the log-ratio.
    assert {token.advantage for token in view.tokens} == {-2.0}
    assert [token.special for token in view.tokens] == [False, False, True, False, True]


def test_a_single_response_has_no_episode(report) -> None:
    t = replace(trajectory(0, 0, ("a", "b", None)), turns=())
    view = sample_view(t, 7, Characters(), report.config)
    assert (view.episode, view.turns, view.prompt_text, view.response_text) == ("", [], "rules", "b")


def test_a_page_shows_many_groups(report) -> None:
    """Of two groups of four, two episodes each; of prompts simply the first four."""
    batch = [
        replace(trajectory(s, 0, ("a", "b", True)), id=TrajectoryId(draw, s)) for draw in range(2) for s in range(4)
    ]

    def shown(trajectories: list[Trajectory]) -> list[str]:
        return [str(e[0].id) for e in _spread([[t] for t in trajectories], 4)]

    assert shown(batch) == ["0/0/0", "0/1/0", "1/0/0", "1/1/0"]
    assert shown(batch[:6]) == ["0/0/0", "0/1/0", "1/0/0", "1/1/0"]
    assert shown(batch[:4]) == ["0/0/0", "0/1/0", "0/2/0", "0/3/0"]
    assert shown([replace(t, turns=()) for t in batch]) == ["0/0/0", "0/1/0", "0/2/0", "0/3/0"]


def test_whole_episodes_are_written(report, tmp_path) -> None:
    """``html_samples`` counts episodes: the second one is shown with both its segments, the third not at all."""
    batch = [
        trajectory(0, 0, ("a", "one", True)),
        trajectory(1, 0, ("b", "two", True)),
        trajectory(1, 1, ("c", "three", True), first=1),
        trajectory(2, 0, ("d", "four", True)),
    ]
    page, log = tmp_path / "page.html", tmp_path / "episodes.txt"
    report._write_samples(page, log, "step 0", 0, batch, Characters())
    text = log.read_text(encoding="utf-8")
    assert [part in text for part in ("one", "two", "three", "four")] == [True, True, True, False]
    assert (tmp_path / "renders" / "episodes-0.txt").read_text(encoding="utf-8") == text
    assert "step 0: 2 episodes" in page.read_text(encoding="utf-8")
    rows = report.folder.samples_jsonl.read_text(encoding="utf-8").splitlines()
    assert [json.loads(row)["id"] for row in rows] == ["3/0/0", "3/1/0", "3/1/1"]
    log.unlink()
    single = [replace(t, turns=()) for t in batch[:2]]
    report._write_samples(page, log, "step 1", 1, single, Characters(), keep=False)
    assert not log.exists() and "the first 2 trajectories" in page.read_text(encoding="utf-8")


def test_a_warning_comes_once_and_again_after_a_recovery(report, caplog) -> None:
    bad = [trajectory(0, 0, *[("o", "huh", False)] * 8)]
    some = [trajectory(0, 0, *[("o", "huh", False)] * 8, ("o", "ok", True))]
    few = [trajectory(0, 0, ("o", "huh", False))]
    counts = []
    with caplog.at_level(logging.WARNING):
        for batch in (bad, bad, few, bad, some, bad):
            report._warn_of_actions(batch, Characters())
            counts.append(len(caplog.records))
    assert counts == [1, 1, 1, 1, 1, 2]
    assert "lake: the environment understood 0 of 8 actions" in caplog.text and "'huh'" in caplog.text
