"""The base class and the resolution of class paths."""

import asyncio
import json
import logging
import math
import sys

import numpy as np
import pytest
import torch

from roll_opd.errors import ConfigError, LaunchError
from roll_opd.rewards import resolve_reward
from roll_opd.rewards.base import RewardItem, RewardResult, RewardWorker
from roll_opd.rewards.math_rule_reward_worker import MathRuleRewardWorker
from roll_opd.utils.files import to_json

MATH = "roll_opd.rewards.math_rule_reward_worker.MathRuleRewardWorker"

NOT_FINITE = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf, "numpy": np.float32("nan"), "none": None}


# What a reward may return: its reward and verdict, and the plain values that they are.
FOREIGN = {
    "float32": (np.float32(0.5), np.bool_(True), 0.5, True),
    "int64": (np.int64(1), np.int64(0), 1.0, False),
    "tensor": (torch.tensor(0.25), torch.tensor(True), 0.25, True),
    "bool": (True, None, 1.0, None),
}


class LengthRewardWorker(RewardWorker):
    """Slower the earlier the item, so that finishing order is not item order."""

    async def grade_one(self, item: RewardItem) -> RewardResult:
        if item.response == "bad":
            raise KeyError("no such thing")
        if item.response == "broken":
            raise LaunchError("no GPU for the judge")
        if item.response in NOT_FINITE:
            return RewardResult(item.id, NOT_FINITE[item.response], correct=True)
        if item.response in FOREIGN:
            return RewardResult(item.id, *FOREIGN[item.response][:2])
        if item.response == "two rewards":
            return RewardResult(item.id, np.array([1.0, 0.0]))
        if item.response == "two verdicts":
            return RewardResult(item.id, 1.0, np.array([True, False]))
        await asyncio.sleep(0.05 / (1 + int(item.id)))
        return RewardResult(item.id, float(len(item.response)))


def grade(*responses):
    worker = LengthRewardWorker("length", {})
    found = asyncio.run(worker.grade([RewardItem(str(i), r, None) for i, r in enumerate(responses)]))
    worker.close()
    return found


def test_order_is_kept_and_a_fault_stays_with_its_item(caplog):
    with caplog.at_level(logging.WARNING):
        results = grade("a", "bad", "ccc")
    assert [(r.id, r.reward) for r in results] == [("0", 1.0), ("1", 0.0), ("2", 3.0)]
    assert results[1].error == "KeyError: 'no such thing'"
    assert results[1].correct is None
    assert "length" in caplog.text and "KeyError" in caplog.text


@pytest.mark.parametrize("response", list(NOT_FINITE))
def test_a_reward_that_is_no_finite_number_is_an_error_of_its_item(response, caplog):
    with caplog.at_level(logging.WARNING):
        before, bad, after = grade("a", response, "ccc")
    assert (before.reward, after.reward) == (1.0, 3.0) and before.error is None and after.error is None
    assert (bad.id, bad.reward, bad.correct) == ("1", 0.0, None)
    assert bad.error is not None and ("TypeError" in bad.error if response == "none" else "not finite" in bad.error)
    assert "reward length: item 1" in caplog.text


@pytest.mark.parametrize("response", list(FOREIGN))
def test_values_of_other_libraries_become_plain_ones(response):
    (result,) = grade(response)
    assert (result.reward, result.correct, result.error) == (*FOREIGN[response][2:], None)
    assert type(result.reward) is float and type(result.correct) in (bool, type(None))
    # As they are written into samples.jsonl.
    assert json.loads(to_json({"reward": result.reward, "correct": result.correct})) == {
        "reward": result.reward,
        "correct": result.correct,
    }


@pytest.mark.parametrize("response", ["two rewards", "two verdicts"])
def test_what_is_no_plain_value_is_an_error_of_its_item(response):
    before, bad, after = grade("a", response, "ccc")
    assert (before.reward, after.reward) == (1.0, 3.0)
    assert (bad.reward, bad.correct) == (0.0, None)
    assert bad.error is not None and bad.error.startswith(("TypeError", "ValueError"))


def test_nothing_to_grade():
    assert grade() == []


def test_a_fault_of_the_installation_stops_the_batch():
    with pytest.raises(LaunchError, match="judge"):
        grade("a", "broken", "ccc")


def test_resolve():
    assert resolve_reward(MATH) is MathRuleRewardWorker
    assert resolve_reward(f"{__name__}.LengthRewardWorker") is LengthRewardWorker


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("MathRuleRewardWorker", "package.module.ClassName"),
        ("", "package.module.ClassName"),
        (".relative.X", "package.module.ClassName"),
        ("roll_opd.rewards.math_rule_reward_worker.", "package.module.ClassName"),
        (
            "roll_opd.rewards.math_rule_reward_worker.MathRuleWorker",
            f"no class 'MathRuleWorker'; did you mean '{MATH}'",
        ),
        ("roll_opd.rewards.math_reward_worker.MathRewardWorker", f"no module .*; did you mean '{MATH}'"),
        ("no_such_package.x.Y", f"no module 'no_such_package'; known here: {MATH}"),
        ("roll_opd.rewards.base.RewardItem", "not a subclass of roll_opd.rewards.base.RewardWorker"),
        ("roll_opd.rewards.base.logger", "not a subclass"),
        ("roll_opd.rewards.base.RewardWorker", "abstract"),
    ],
)
def test_what_cannot_be_resolved(path, message):
    with pytest.raises(ConfigError, match=message) as caught:
        resolve_reward(path, field="rewards.math_rule.worker_cls")
    assert caught.value.field == "rewards.math_rule.worker_cls"


def test_a_missing_dependency_is_told_from_a_missing_module(tmp_path, monkeypatch):
    (tmp_path / "needy_reward.py").write_text("import surely_not_installed\n")
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    with pytest.raises(ConfigError, match="needs the package 'surely_not_installed', which is not installed"):
        resolve_reward("needy_reward.NeedyRewardWorker")
