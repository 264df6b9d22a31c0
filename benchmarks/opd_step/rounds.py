"""The driver: starts both sides, checks that they compute the same, and lets them take turns."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from safetensors.numpy import load_file

from benchmarks.opd_step.machine import ProcessTree, Watch
from benchmarks.opd_step.models import ModelPair, ensure_models
from benchmarks.opd_step.workload import (
    LEARNING,
    MAX_OTHERS,
    MIN_TURN_SECONDS,
    TOLERANCE,
    Job,
    Learning,
    Regime,
    Step,
    read_prompts,
)

logger = logging.getLogger("benchmarks.opd_step")

Who = Literal["ours", "trl"]

REPOSITORY = Path(__file__).parents[2]
WORK = REPOSITORY / "benchmarks" / ".work"
TRL_PYTHON = REPOSITORY / ".venv-trl" / "bin" / "python"
WARM_UP_STEPS = 2
MEMORY_STEPS = 3
"""At the end, after the turns that are timed; and the warm-up's."""
TRL_SETTINGS: Mapping[str, Mapping[str, str]] = {
    "1 thread": {"OMP_NUM_THREADS": "1"},
    "2 threads": {"OMP_NUM_THREADS": "2"},
    "2 threads, passive": {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
}
"""TRL gets the best of these. Our side is started without any: it divides the cores by itself."""


class BenchError(Exception):
    """The comparison cannot be made, or must not be."""


@dataclass(frozen=True)
class Turn:
    """Some steps of one side.

    Attributes:
        who: whose.
        steps: their reports.
        others: cores that other processes used meanwhile.
        peak_pss: bytes; 0 where memory was not looked at.
    """

    who: Who
    steps: list[Step]
    others: float
    peak_pss: int

    @property
    def seconds(self) -> float:
        """Of all steps."""
        return float(sum(step["seconds"] for step in self.steps))

    @property
    def rate(self) -> float:
        """Trained tokens per second."""
        return float(sum(step["tokens"] for step in self.steps)) / self.seconds

    @property
    def void(self) -> bool:
        """Whether the machine was not this side's alone."""
        return self.others > MAX_OTHERS


Pair = tuple[Turn, Turn]
"""Adjacent turns: ours, TRL's; whichever came first."""


class Talk:
    """A process that is asked in JSON lines on its standard input and answers each with one on its standard output.

    Args:
        who: whose Python runs it.
        what: it is to do.
        job: what it works on.
        environment: variables besides the usual ones.

    Raises:
        BenchError: it has died instead of answering.
    """

    def __init__(self, who: Who, what: str, job: Job, environment: Mapping[str, str]) -> None:
        self.who, self.job = who, job
        self._log = Path(job.folder) / f"{what}.log"
        self._process = _start(who, [what, str(job.write())], environment, self._log, talks=True)

    def ask(self, **command: Any) -> dict[str, Any]:
        """Ask; return the answer."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._answer()

    def close(self) -> None:
        """End it and all its processes."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # Also where a second signal ends the waiting.
            if self._process.poll() is None:
                self._process.terminate()
                self._process.wait(60)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise BenchError(f"{self.who} has died; see {self._log}")
        return dict(json.loads(line))


class Process(Talk):
    """A side that is alive, and the driver's end of the conversation with it.

    Between its turns all its processes are stopped: an idle Ray takes a fifteenth of a core, which would be taken from
    the other side.

    Attributes:
        greeting: what it said when it was ready.
        tree: its processes.
    """

    def __init__(self, who: Who, job: Job, environment: Mapping[str, str]) -> None:
        super().__init__(who, "run", job, environment)
        self.tree = ProcessTree(self._process.pid)
        self.greeting = self._answer()
        self.tree.cpu_seconds()
        self.tree.send(signal.SIGSTOP)

    def run(self, steps: int, memory: bool = False) -> Turn:
        """Let it take a turn; with a look at its memory it is no turn to be timed."""
        self.tree.send(signal.SIGCONT)
        with Watch(self.tree, memory) as watch:
            answer = self.ask(run=steps)
        self.tree.send(signal.SIGSTOP)
        return Turn(self.who, answer["steps"], watch.others, watch.peak_pss)

    def write_weights(self, folder: Path) -> None:
        """Have the student written, in Hugging Face format."""
        self.tree.send(signal.SIGCONT)
        self.ask(weights=str(folder))
        self.tree.send(signal.SIGSTOP)

    def close(self) -> None:
        """Let it go on, to its end."""
        self.tree.send(signal.SIGCONT)
        super().close()


def _start(
    who: Who, arguments: Sequence[str], environment: Mapping[str, str], log: Path, talks: bool = False
) -> subprocess.Popen[str]:
    python, module = (sys.executable, "ours") if who == "ours" else (str(TRL_PYTHON), "trl_side")
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("OMP_", "MKL_", "KMP_"))}
    log.parent.mkdir(parents=True, exist_ok=True)
    pipe = subprocess.PIPE if talks else None
    with log.open("w") as file:
        return subprocess.Popen(
            [python, "-m", f"benchmarks.opd_step.{module}", *arguments],
            stdin=pipe or subprocess.DEVNULL,
            stdout=pipe or file,
            stderr=file,
            text=True,
            cwd=REPOSITORY,
            env=inherited | {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"} | dict(environment),
        )


def _run_once(who: Who, what: str, job: Job) -> None:
    """Run a side's other duty, on one thread, to its end."""
    log = Path(job.folder) / f"{what}.log"
    process = _start(who, [what, str(job.write())], {"OMP_NUM_THREADS": "1"}, log)
    try:
        if process.wait() != 0:
            raise BenchError(f"{who}: {what} failed; see {log}")
    finally:
        process.kill()  # nothing where it has ended


def scratch() -> tempfile.TemporaryDirectory[str]:
    """A folder for what a run's processes leave; from here on SIGTERM ends them too, even those that are stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    WORK.mkdir(parents=True, exist_ok=True)
    (WORK / ".gitignore").write_text("*\n")
    return tempfile.TemporaryDirectory(dir=WORK, prefix="run-")


class Bench:
    """Both sides on the same models.

    Args:
        folder: see :func:`scratch`; the models are kept elsewhere in :data:`WORK`.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.versions: dict[str, Any] = {}
        self._gates: dict[str, dict[str, float]] = {}
        if not TRL_PYTHON.exists():
            raise BenchError(f"TRL's environment is missing ({TRL_PYTHON}); `make bench` makes it")

    def job(self, who: str, regime: Regime, seed: int = 0) -> Job:
        """What a process of ``who`` is to do; the prompts are cut to a whole number of steps."""
        pair = self.pair(regime)
        prompts = read_prompts(pair.prompts)
        whole = prompts[: len(prompts) // regime.sequences * regime.sequences]
        path = self.folder / f"prompts-{regime.name}.jsonl"
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in whole))
        folder = self.folder / f"{regime.name}-{seed}" / who
        return Job(regime, str(pair.student), str(pair.teacher), str(path), str(folder), seed)

    def pair(self, regime: Regime) -> ModelPair:
        """The regime's models."""
        return ensure_models(regime.models, WORK / "models")

    # ---- the gate ----------------------------------------------------------------------------------------------------

    def gate(self, regime: Regime) -> dict[str, float]:
        """Compare loss and gradient on the same tokens, in fp32, once for each pair of models.

        Raises:
            BenchError: they differ; there is nothing to compare then.
        """
        if regime.models not in self._gates:
            logger.info("%s: the same loss and gradient on the same tokens?", regime.models)
            same = replace(regime, dtype="fp32", objective="direct")
            found = {}
            for who in ("ours", "trl"):
                job = self.job(f"gate-{who}", same)
                _run_once(who, "gate", job)  # type: ignore[arg-type]
                found[who] = load_file(Path(job.folder) / "gate.safetensors")
            self._gates[regime.models] = agreement(found["ours"], found["trl"])
        gate = self._gates[regime.models]
        if not (gate["loss"] <= TOLERANCE and gate["gradient"] <= TOLERANCE):
            raise BenchError(
                f"{regime.models}: on the same tokens loss and gradient differ from TRL's by {gate['loss']:.1e} and "
                f"{gate['gradient']:.1e}, more than {TOLERANCE:.0e}: the sides do not do the same work"
            )
        return gate

    # ---- speed -------------------------------------------------------------------------------------------------------

    def start(self, who: Who, regime: Regime, environment: Mapping[str, str] | None = None, seed: int = 0) -> Process:
        """Start a side; it is ready when this returns."""
        process = Process(who, self.job(who, regime, seed), environment or {})
        self.versions[who] = process.greeting["versions"]
        return process

    def calibrate(self, regime: Regime, steps: int) -> tuple[str, dict[str, float]]:
        """Return TRL's fastest setting, and the seconds of a step under each."""
        found = {}
        for name, environment in TRL_SETTINGS.items():
            with self.start("trl", regime, environment) as trl:
                trl.run(1)
                turn = trl.run(steps)
            found[name] = turn.seconds / steps
            logger.info("%s: TRL with %s: %.2f s a step", regime.name, name, found[name])
        return min(found, key=lambda name: found[name]), found

    def speed(
        self, regime: Regime, pairs: int, calibration_steps: int = 2, setting: str | None = None
    ) -> dict[str, Any]:
        """Measure one regime; ``setting`` is TRL's, where it is known already."""
        gate = self.gate(regime)
        calibration = None
        if setting is None:
            setting, calibration = self.calibrate(regime, calibration_steps)
        with self.start("trl", regime, TRL_SETTINGS[setting]) as trl, self.start("ours", regime) as ours:
            sides: dict[Who, Process] = {"ours": ours, "trl": trl}
            warm = {who: side.run(WARM_UP_STEPS, memory=True) for who, side in sides.items()}
            if [s["prompts"] for s in warm["ours"].steps] != [s["prompts"] for s in warm["trl"].steps]:
                raise BenchError(f"{regime.name}: the sides do not take the same prompts in the same order")
            quickest = min(min(step["seconds"] for step in turn.steps) for turn in warm.values())
            steps = max(1, math.ceil(MIN_TURN_SECONDS / quickest))
            measured, void = take_turns(lambda who: sides[who].run(steps), pairs)
            last = {who: side.run(max(steps, MEMORY_STEPS), memory=True) for who, side in sides.items()}
        peaks = {who: max(warm[who].peak_pss, last[who].peak_pss) for who in sides}
        return {
            "regime": asdict(regime),
            "gate": gate,
            "trl_setting": setting,
            "calibration_seconds": calibration,
            "steps_per_turn": steps,
            "disturbed": any(turn.void for pair in measured for turn in pair),
            "void_pairs": len(void),
            "ratio": spread([ours.rate / trl.rate for ours, trl in measured]),
            "memory_ratio": peaks["ours"] / peaks["trl"],
            **{who: _summary(of(who, measured)) | {"peak_pss_mib": peaks[who] / 2**20} for who in sides},
            "pairs": [[asdict(turn) for turn in pair] for pair in measured],
        }

    # ---- learning ----------------------------------------------------------------------------------------------------

    def learning(self, setting: str, seed: int, plan: Learning = LEARNING) -> dict[str, Any]:
        """Train both from the same start; one evaluator says when each reaches the held-out KL."""
        self.gate(plan.regime)
        regime, folder = plan.regime, self.folder / f"learning-{seed}"
        void: list[bool] = []
        with (
            self._evaluator(regime, seed, plan.prompts) as evaluator,
            self.start("trl", regime, TRL_SETTINGS[setting], seed) as trl,
            self.start("ours", regime, seed=seed) as ours,
        ):
            sides: dict[Who, Process] = {"ours": ours, "trl": trl}

            def train(who: Who, step: int) -> float:
                turn = sides[who].run(plan.every)
                void.append(turn.void)
                sides[who].write_weights(folder / f"{who}-{step}")
                return turn.seconds

            def look(who: Who, step: int) -> dict[str, float]:
                return evaluator.ask(weights=str(folder / f"{who}-{step}"))

            start = evaluator.ask(weights=str(self.pair(regime).student))
            target = plan.share * start["kl"]
            curves = race(train, look, start, target, plan.every, plan.max_steps)
        times = {who: time_to(target, [(p["seconds"], p["kl"]) for p in curve]) for who, curve in curves.items()}
        reached = times["ours"] is not None and times["trl"] is not None
        return {
            "seed": seed,
            "trl_setting": setting,
            "target_kl": target,
            "seconds_to_target": times,
            "ratio": times["trl"] / times["ours"] if reached else None,  # type: ignore[operator]
            "void_turns": sum(void),
            "turns": len(void),
            "curves": curves,
        }

    def _evaluator(self, regime: Regime, seed: int, prompts: int) -> Talk:
        job = self.job("held-out", regime, seed)
        path = self.folder / "held-out.jsonl"
        held_out = read_prompts(self.pair(regime).heldout)[:prompts]
        path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in held_out))
        threads = {"OMP_NUM_THREADS": str(os.cpu_count() or 1)}
        return Talk("ours", "held_out", replace(job, prompts=str(path)), threads)


# ---- what can be said without a process ------------------------------------------------------------------------------


def agreement(ours: Mapping[str, np.ndarray[Any, Any]], trl: Mapping[str, np.ndarray[Any, Any]]) -> dict[str, float]:
    """Relative difference of ``loss``, and of all other tensors together, as gradients, by the norm of TRL's.

    Raises:
        BenchError: they are not gradients of the same parameters.
    """
    if ours.keys() != trl.keys():
        raise BenchError(f"gradients of different parameters: {sorted(ours.keys() ^ trl.keys())}")
    names = sorted(ours.keys() - {"loss"})
    difference = sum(float(((ours[n].astype(np.float64) - trl[n]) ** 2).sum()) for n in names)
    square = sum(float((trl[n].astype(np.float64) ** 2).sum()) for n in names)
    mine, theirs = float(ours["loss"][0]), float(trl["loss"][0])
    return {"loss": abs(mine - theirs) / abs(theirs), "gradient": math.sqrt(difference / square)}


def take_turns(turn: Callable[[Who], Turn], pairs: int) -> tuple[list[Pair], list[Pair]]:
    """Let the sides take turns, A B B A A B …; a void pair is taken again, ``pairs`` times in all.

    Returns:
        As many pairs as asked for, void ones at the end where quiet ones were not enough; and the void ones left out.
    """
    good: list[Pair] = []
    void: list[Pair] = []
    for number in range(2 * pairs):
        first, second = turn("ours" if number % 2 == 0 else "trl"), turn("trl" if number % 2 == 0 else "ours")
        pair = (first, second) if first.who == "ours" else (second, first)
        (void if first.void or second.void else good).append(pair)
        logger.info(
            "pair %d: %.2fx %s",
            len(good) + len(void),
            pair[0].rate / pair[1].rate,
            f"(void: others used {max(first.others, second.others):.2f} cores)" if pair in void else "",
        )
        if len(good) == pairs:
            break
    missing = pairs - len(good)
    return good + void[:missing], void[missing:]


def race(
    train: Callable[[Who, int], float],
    look: Callable[[Who, int], dict[str, float]],
    start: Mapping[str, float],
    target: float,
    every: int,
    max_steps: int,
) -> dict[Who, list[dict[str, float]]]:
    """Let each side train until a look says that it has reached ``target``; who comes first alternates.

    Args:
        train: has a side train until a step, ``every`` further than before, and returns the seconds it took.
        look: returns ``kl`` of a side after a step, and whatever else is to be kept. Its time counts for nobody.
        start: what ``look`` says of the weights that both start from.
        target: the KL to reach.
        every: steps between two looks.
        max_steps: after which a side ends wherever it is.

    Returns:
        For each side its looks, in order, with ``step`` and the ``seconds`` of training until then.
    """
    curves: dict[Who, list[dict[str, float]]] = {who: [{"step": 0, "seconds": 0.0, **start}] for who in ("ours", "trl")}
    for number, step in enumerate(range(every, max_steps + 1, every)):
        order: tuple[Who, Who] = ("ours", "trl") if number % 2 == 0 else ("trl", "ours")
        for who in order:
            curve = curves[who]
            if curve[-1]["kl"] > target:
                seconds = curve[-1]["seconds"] + train(who, step)
                curve.append({"step": step, "seconds": seconds, **look(who, step)})
                logger.info("%s, step %d: KL %.4f of %.4f after %.0f s", who, step, curve[-1]["kl"], target, seconds)
    return curves


def of(who: Who, pairs: Sequence[Pair]) -> list[Turn]:
    """One side's turns."""
    return [turn for pair in pairs for turn in pair if turn.who == who]


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median and range."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def learned(plan: Learning, runs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The runs of all seeds, and the spread of their ratios; none where one of them has none."""
    ratios = [run["ratio"] for run in runs]
    return {"plan": asdict(plan), "ratio": None if None in ratios else spread(ratios), "runs": list(runs)}


def time_to(target: float, curve: Sequence[tuple[float, float]]) -> float | None:
    """Seconds at which a curve of ``(seconds, value)`` first falls to ``target``; straight between its points.

    None where it does not.
    """
    for (before, high), (after, low) in itertools.pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low) if high > target else before
    return None


def _summary(turns: Sequence[Turn]) -> dict[str, Any]:
    steps = [step for turn in turns for step in turn.steps]
    names = dict.fromkeys(name for step in steps for name in step["phases"])
    return {
        "seconds_per_step": spread([step["seconds"] for step in steps]),
        "tokens_per_second": spread([turn.rate for turn in turns]),
        "tokens_per_step": statistics.mean(step["tokens"] for step in steps),
        "phases": {name: statistics.mean(step["phases"].get(name, 0.0) for step in steps) for name in names},
    }
