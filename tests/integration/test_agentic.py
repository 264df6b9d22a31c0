"""Episodes in real environments, real processes: learning, faults in the middle, and YAML of ROLL's shape."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

REPO = Path(__file__).parents[2]
EXAMPLE = REPO / "examples" / "quickstart_agentic"


def test_quickstart_agentic_learns(run, tmp_path: Path) -> None:
    finished = run(tmp_path / "run", example=EXAMPLE, seed=1, max_steps=14, eval_steps=14)
    summary = finished.summary
    assert summary["accuracy_last"] - summary["accuracy_first"] >= 0.30, summary
    assert summary["reverse_kl_last"] <= 0.5 * summary["reverse_kl_first"], summary
    steps = finished.metrics[:-1]
    assert all(m["episode/num_episodes"] == m["rollout/num_trajectories"] == 128 for m in steps)
    assert all(m["rollout/failed_groups"] == 0 and m["staleness/max"] == 0 for m in steps)
    # The teacher scores, and the trainer sees, exactly what the engine sampled: only rounding may differ.
    assert max(m["mismatch/abs_logprob_diff_max"] for m in steps) <= 1e-3
    assert max(m["episode/turns"] for m in steps) > 1
    for name in ("samples/samples.html", "samples/episodes.txt"):
        assert (finished.folder / name).stat().st_size > 0, name
    assert {"env-train-0.log", "env-val-0.log"} <= {file.name for file in (finished.folder / "logs").iterdir()}
    deadline = time.monotonic() + 10
    while [p for p in psutil.process_iter() if "EnvWorker" in _title(p)]:
        assert time.monotonic() < deadline, "an environment's process outlives the run"
        time.sleep(0.2)


def test_episodes_of_several_segments(run, tmp_path: Path) -> None:
    """A context that is soon full: an episode becomes several trajectories, all of them scored and trained, in two
    optimizer steps of 64 episodes however many trajectories they are."""
    settings = {
        "sequence_length": 72,
        "+custom_envs.Lake.on_context_full": "roll_opd.pipeline.agentic.context_limits.drop_oldest_turns",
        "max_steps": 2,
        "eval_steps": 0,
        "preflight": "off",
    }
    for m in run(tmp_path / "run", example=EXAMPLE, seed=1, **settings).metrics:
        assert m["episode/num_episodes"] == 128 and m["train/num_updates"] == 2
        assert m["episode/segments"] > 1.5 and m["rollout/num_trajectories"] == 128 * m["episode/segments"]
        # Each turn is in one segment, and the trainer sees what the engine sampled it behind.
        assert 1.5 < m["episode/tokens_per_turn"] <= 4 and m["mismatch/abs_logprob_diff_max"] <= 1e-3


def _title(process: psutil.Process) -> str:
    with contextlib.suppress(psutil.NoSuchProcess):
        return " ".join(process.cmdline())
    return ""


@contextlib.contextmanager
def random_deaths(rng: random.Random) -> Iterator[list[int]]:
    """Kill one environment process after the other, as long as the block runs; each has a moment to start playing."""
    killed: list[int] = []
    over = threading.Event()

    def strike() -> None:
        while not over.wait(rng.uniform(0.2, 0.6)):
            victims = [
                p
                for p in psutil.Process().children(recursive=True)
                if "EnvWorker" in _title(p) and p.pid not in killed and time.time() - p.create_time() > 1.0
            ]
            if victims and len(killed) < 6:
                victim = rng.choice(victims)
                with contextlib.suppress(ProcessLookupError):
                    os.kill(victim.pid, signal.SIGKILL)
                    killed.append(victim.pid)

    thread = threading.Thread(target=strike, daemon=True)
    thread.start()
    try:
        yield killed
    finally:
        over.set()
        thread.join()


def test_killed_environments_cost_nothing_but_time(run, tmp_path: Path) -> None:
    """SIGKILL of environment processes at random: every batch is full, nothing is trained twice, nothing hangs."""
    settings = {
        "max_steps": 8,
        "eval_steps": 0,
        "rollout_batch_size": 32,
        "train_env_manager.num_env_groups": 4,
        "train_env_manager.max_env_num_per_worker": 8,
        "preflight": "off",
    }
    with random_deaths(random.Random(5)) as killed:
        finished = run(tmp_path / "run", example=EXAMPLE, seed=1, **settings)
    assert killed, "the run was over before anything died"
    steps = finished.metrics
    # A trajectory that came twice would have stopped the update (Student.train).
    assert [m["episode/num_episodes"] for m in steps] == [32] * 8
    log = (finished.folder / "logs" / "driver.log").read_text()
    assert "it is played again" in log


ROLL_SHAPE = """
defaults:
  - ../../{config}/step_envs@_here_
exp_name: agentic_pipeline
seed: 42
max_steps: 2
save_steps: 10000
eval_steps: 1
rollout_batch_size: 8
val_batch_size: 2
sequence_length: 1536
max_tokens_per_step: 8
max_actions_per_traj: 3
advantage_clip: 0.2
ppo_epochs: 1
adv_estimator: gigpo
step_reward_gamma: 0.95
init_kl_coef: 0.0
whiten_advantages: true
use_opd: true
preflight: static
pretrain: {models}/student
actor_train:
  model_args: {{dtype: fp32, disable_gradient_checkpointing: true}}
  training_args: {{learning_rate: 1.0e-4, per_device_train_batch_size: 4, gradient_accumulation_steps: 1}}
  strategy_args: {{strategy_name: fsdp2_train}}
actor_infer:
  model_args: {{dtype: fp32}}
  strategy_args: {{strategy_name: hf_infer}}
teacher:
  model_args: {{model_name_or_path: {models}/teacher, dtype: fp32}}
  strategy_args: {{strategy_name: hf_infer}}
  tag_included: [FrozenLake, SimpleSokoban]
reward_normalization: {{grouping: traj_group_id, method: mean_std}}
train_env_manager:
  max_env_num_per_worker: 16
  num_env_groups: 4
  group_size: 2
  tags: [FrozenLake, SimpleSokoban]
  num_groups_partition: [2, 2]
  generating_args: {{max_new_tokens: 8, top_p: 0.99, top_k: 100, temperature: 0.99, num_return_sequences: 1}}
val_env_manager:
  num_env_groups: 2
  group_size: 1
  tags: [SimpleSokoban, FrozenLake]
  num_groups_partition: [1, 1]
  generating_args: {{max_new_tokens: 8, temperature: 0.2, num_return_sequences: 1}}
custom_envs:
  SimpleSokoban: ${{custom_env.SimpleSokoban}}
  FrozenLake: ${{custom_env.FrozenLake}}
"""


def test_a_config_of_rolls_shape_runs(run, tmp_path: Path) -> None:
    """Two steps of GiGPO beside a teacher on both games, each turn a trajectory of its own."""
    folder = tmp_path / "config" / "run"
    folder.mkdir(parents=True)
    fragments = os.path.relpath(REPO / "examples" / "config", tmp_path)
    text = ROLL_SHAPE.format(config=fragments, models=REPO / "examples" / "quickstart" / "models")
    (folder / "agent.yaml").write_text(text)
    finished = run(tmp_path / "out", example=folder, config_name="agent", launcher="agentic")
    steps = finished.metrics[:-1]
    assert [m["episode/num_episodes"] for m in steps] == [8, 8]
    assert all(m["rollout/num_trajectories"] > 8 for m in steps), "each turn is a trajectory"
    assert all({"rl/state_group_size_mean", "opd/reverse_kl", "train/loss"} <= m.keys() for m in steps)
    assert {f"episode/success_rate/tag/{tag}" for tag in ("FrozenLake", "SimpleSokoban")} <= steps[0].keys()
