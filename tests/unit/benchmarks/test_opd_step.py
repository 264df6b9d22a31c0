"""What the comparison with TRL decides without a process: pairs, void turns, agreement, targets, the guard."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator

import numpy as np
import pytest

from benchmarks.opd_step.guard import moves
from benchmarks.opd_step.machine import ProcessTree, busy_seconds, parent_and_cpu, pss_bytes
from benchmarks.opd_step.report import _learning_lines, _levels, verdict
from benchmarks.opd_step.rounds import BenchError, Turn, agreement, learned, of, race, spread, take_turns, time_to
from benchmarks.opd_step.side import checksum
from benchmarks.opd_step.workload import GATE_LENGTHS, LEARNING, REGIMES, Job, gate_responses

QUIET, BUSY = 0.05, 0.3


def turn(who: str, others: float = QUIET, seconds: float = 2.0, tokens: int = 100) -> Turn:
    return Turn(who, [{"seconds": seconds / 2, "tokens": tokens // 2}] * 2, others, 0)  # type: ignore[arg-type]


# ---- turns -----------------------------------------------------------------------------------------------------------


def test_turns_alternate_who_comes_first():
    order = []
    good, void = take_turns(lambda who: order.append(who) or turn(who), 3)  # type: ignore[func-returns-value]
    assert order == ["ours", "trl", "trl", "ours", "ours", "trl"]
    assert [(a.who, b.who) for a, b in good] == [("ours", "trl")] * 3
    assert void == []


def test_a_void_pair_is_taken_again():
    noise = iter([QUIET, BUSY, QUIET, QUIET, QUIET, QUIET])
    good, void = take_turns(lambda who: turn(who, next(noise)), 2)
    assert [t.void for pair in good for t in pair] == [False] * 4
    assert [t.void for pair in void for t in pair] == [False, True]


def test_a_machine_that_is_never_quiet_gives_as_many_pairs_after_twice_as_many():
    count: Iterator[int] = iter(range(100))
    good, void = take_turns(lambda who: turn(who, BUSY if next(count) >= 2 else QUIET), 3)
    assert next(count) == 2 * 6
    assert [pair[0].void for pair in good] == [False, True, True]
    assert len(void) == 3


@pytest.mark.parametrize(("others", "void"), [(0.10, False), (0.11, True)])
def test_void_is_more_than_a_tenth_of_a_core(others, void):
    assert turn("trl", others).void is void


def test_rate_and_spread():
    pair = turn("ours", seconds=2.0, tokens=100), turn("trl", seconds=5.0, tokens=50)
    assert (pair[0].rate, pair[1].rate) == (50.0, 10.0)
    assert of("trl", [pair]) == [pair[1]]
    assert spread([3.0, 1.0, 2.0]) == {"median": 2.0, "min": 1.0, "max": 3.0}


# ---- the gate --------------------------------------------------------------------------------------------------------


def test_agreement_is_relative_to_loss_and_to_the_norm_of_the_whole_gradient():
    theirs = {"loss": np.array([4.0]), "a": np.array([3.0], np.float32), "b": np.array([[0.0, 4.0]], np.float32)}
    ours = {"loss": np.array([3.0]), "a": np.array([3.0], np.float32), "b": np.array([[0.5, 4.0]], np.float32)}
    assert agreement(ours, theirs) == {"loss": 0.25, "gradient": pytest.approx(0.5 / 5.0)}
    assert math.isnan(agreement(ours | {"a": np.array([np.nan], np.float32)}, theirs)["gradient"])


def test_gradients_of_other_parameters_are_no_agreement():
    one = {"loss": np.array([1.0]), "a": np.array([1.0])}
    with pytest.raises(BenchError, match="'b'"):
        agreement(one, one | {"b": np.array([1.0])})


def test_gate_responses_are_the_same_in_every_process():
    responses = gate_responses(1000)
    assert [len(r) for r in responses] == list(GATE_LENGTHS)
    assert responses == gate_responses(1000)
    assert min(map(min, responses)) >= 0 and max(map(max, responses)) < 1000


def test_checksum_sees_order_and_limits_of_prompts():
    assert checksum([[1, 2], [3]]) == checksum([np.array([1, 2]), (3,)])
    assert len({checksum(p) for p in ([[1, 2], [3]], [[3], [1, 2]], [[1], [2, 3]])}) == 3


def test_a_job_comes_back_as_it_was(tmp_path):
    job = Job(REGIMES["ragged"], "student", "teacher", "prompts", str(tmp_path), 3)
    assert Job.read(str(job.write())) == job


# ---- time to a KL ----------------------------------------------------------------------------------------------------


def test_time_to_a_value_lies_between_the_points_around_it():
    curve = [(0.0, 1.0), (10.0, 0.8), (20.0, 0.4), (30.0, 0.6)]
    assert time_to(0.5, curve) == pytest.approx(17.5)
    assert time_to(0.8, curve) == pytest.approx(10.0)
    assert time_to(0.3, curve) is None
    assert time_to(2.0, curve) == 0.0


def test_times_to_other_levels_are_told_beside_the_target():
    def curve(*points: tuple[float, float]) -> list[dict[str, float]]:
        return [{"seconds": seconds, "kl": kl} for seconds, kl in points]

    curves = {"ours": curve((0, 1.0), (10, 0.4), (20, 0.2)), "trl": curve((0, 1.0), (40, 0.4), (80, 0.3))}
    rows = _levels({"seed": 7, "target_kl": 0.1, "curves": curves})
    assert rows[0] == "| 7 | 0.5000, 50% of the start | 8.3 | 33.3 | 4.00x |"
    assert rows[1] == "| 7 | 0.2500, 25% of the start | 17.5 | not reached |  |"
    assert rows[3] == "| 7 | 0.3000, lowest of both | 15.0 | 80.0 | 5.33x |"
    assert len(_levels({"seed": 7, "target_kl": 0.3, "curves": curves})) == 3


def race_of(falls: dict[str, float], max_steps: int = 12) -> tuple[list[str], dict]:
    """Sides whose KL is halved, or whatever ``falls`` says, by every step; two steps take ours 3 s and TRL's 10 s."""
    order: list[str] = []

    def train(who: str, step: int) -> float:
        order.append(f"{who} {step}")
        return {"ours": 3.0, "trl": 10.0}[who]

    curves = race(train, lambda who, step: {"kl": falls[who] ** step}, {"kl": 1.0}, 0.1, every=2, max_steps=max_steps)
    return order, curves


def test_each_side_of_a_race_ends_at_the_target_and_the_other_goes_on():
    order, curves = race_of({"ours": 0.5, "trl": 0.75})
    assert order == ["ours 2", "trl 2", "trl 4", "ours 4", "trl 6", "trl 8", "trl 10"]
    assert [point["step"] for point in curves["ours"]] == [0, 2, 4]
    assert [point["seconds"] for point in curves["ours"]] == [0.0, 3.0, 6.0]
    assert [point["step"] for point in curves["trl"]] == [0, 2, 4, 6, 8, 10]
    assert curves["trl"][-2]["kl"] > 0.1 >= curves["trl"][-1]["kl"]


def test_a_race_that_nobody_ends_ends_with_its_budget():
    order, curves = race_of({"ours": 0.99, "trl": 0.99}, max_steps=5)
    assert order == ["ours 2", "trl 2", "trl 4", "ours 4"]
    assert [curve[-1]["step"] for curve in curves.values()] == [4, 4]


def test_a_ratio_needs_every_seed():
    def run(ratio: float | None) -> dict:
        return {"ratio": ratio}

    assert learned(LEARNING, [run(3.0), run(4.0)])["ratio"] == {"median": 3.5, "min": 3.0, "max": 4.0}
    assert learned(LEARNING, [run(3.0), run(None)])["ratio"] is None


def test_the_report_tells_both_sides_of_a_race():
    curves = race_of({"ours": 0.5, "trl": 0.75})[1]
    run = {
        "seed": 3, "trl_setting": "2 threads", "target_kl": 0.1, "seconds_to_target": {"ours": 5.5, "trl": 40.0},
        "ratio": 40 / 5.5, "void_turns": 1, "turns": 7, "curves": curves,
    }  # fmt: skip
    lines = _learning_lines(learned(LEARNING, [run]))
    assert "Ratio: 7.27x (7.27 to 7.27); ≥ 1.5x: reached." in lines
    assert "| 3 | 0.1000 | 5.5 | 40.0 | 7.27x | 4, 10 | 2 threads | 1 of 7 |" in lines


# ---- targets and guard -----------------------------------------------------------------------------------------------


def test_verdicts_are_plain():
    assert verdict(2.0, 2.0) == "≥ 2x: reached"
    assert verdict(1.99, 2.0) == "≥ 2x: FALLS SHORT"
    assert verdict(None, 1.5) == "≥ 1.5x: FALLS SHORT"
    assert verdict(1.05, 1.0, at_most=True) == "≤ 1x: FALLS SHORT"
    assert verdict(1.0, None) == ""


@pytest.mark.parametrize(
    ("ratio", "memory", "worse"),
    [(1.71, 1040.0, [False, False]), (1.69, 1040.0, [True, False]), (3.0, 1060.0, [False, True])],
)
def test_the_guard_allows_a_sixth_of_the_ratio_and_a_twentieth_of_the_memory(ratio, memory, worse):
    def result(ratio: float, memory: float) -> dict:
        return {"ratio": {"median": ratio, "min": ratio - 0.5, "max": ratio + 1}, "ours": {"peak_pss_mib": memory}}

    found = moves("fixed", result(2.0, 1000.0), result(ratio, memory))
    assert [move.worse for move in found] == worse
    assert ["WORSE" in str(move) for move in found] == worse
    assert f"; 1.5 to 3 → {ratio - 0.5:.3g} to {ratio + 1:.3g}" in str(found[0])


# ---- the machine -----------------------------------------------------------------------------------------------------


def test_proc_texts():
    second = os.sysconf("SC_CLK_TCK")
    fields = " ".join(str(second * n) for n in (1, 2, 3, 100, 100, 4, 5, 6, 7, 8))
    assert busy_seconds(f"cpu  {fields}\ncpu0 1\n") == 1 + 2 + 3 + 4 + 5 + 6
    times = " ".join(str(second * n) for n in (1, 2, 3, 4))
    assert parent_and_cpu(f"12 (a) (b c) S 7 1 1 0 -1 4194304 10 10 0 0 {times} 20 0 1 0") == (7, 10.0)
    assert pss_bytes("55-77 ---p [rollup]\nRss:  9 kB\nPss:  12 kB\nPss_Anon: 3 kB\n") == 12 * 1024
    assert pss_bytes("") == 0


def test_a_tree_keeps_grandchildren_whose_parent_has_died():
    # The child starts a grandchild that works, tells its id, and ends.
    child = (
        "import subprocess, sys\n"
        "work = 'import time\\nx = bytearray(40 << 20)\\nfor _ in range(10**7): pass\\ntime.sleep(60)'\n"
        "p = subprocess.Popen([sys.executable, '-c', work], stdout=subprocess.DEVNULL)\n"
        "print(p.pid, flush=True)\n"
        "sys.stdin.readline()\n"
    )
    root = subprocess.Popen([sys.executable, "-c", child], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert root.stdin is not None and root.stdout is not None
    grandchild = int(root.stdout.readline())
    try:
        tree = ProcessTree(root.pid)
        tree.cpu_seconds()
        root.stdin.close()
        root.wait(10)
        deadline = time.monotonic() + 20
        while (tree.cpu_seconds() < 0.05 or tree.pss() < 40 << 20) and time.monotonic() < deadline:
            time.sleep(0.02)
        assert tree.cpu_seconds() >= 0.05
        assert tree.pss() >= 40 << 20
    finally:
        os.kill(grandchild, 9)
