"""Two ranks of FSDP2 do what one does: scores, losses, gradients, weights, checkpoints, with every setting."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from roll_opd.algorithms.loss import Loss
from roll_opd.configs import ModelArguments, StrategyArguments, TrainingArguments, WorkerConfig
from roll_opd.distributed.strategy.base import ScoreRequest, ScoreResult, ScoreWant
from roll_opd.trajectory import Trajectory, TrajectoryId

pytestmark = pytest.mark.integration

VOCAB = 305
LORA = {"lora_target": "all-linear", "lora_rank": 4, "additional_target": "norm"}
DYNAMIC = {"use_dynamic_batching_in_train": True, "max_tokens_per_microbatch_in_train": 120,
           "use_dynamic_batching_in_infer": True, "max_tokens_per_microbatch_in_infer": 90}  # fmt: skip
SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "dynamic batching": {"worker": DYNAMIC},
    "gradient checkpointing, no resharding": {
        "model": {"disable_gradient_checkpointing": False}, "fsdp2": {"reshard_after_forward": False}
    },
    "offload policy": {"fsdp2": {"offload_policy": True}},
    "LoRA": {"model": LORA},
    "LoRA, checkpointing, offload policy": {
        "model": LORA | {"disable_gradient_checkpointing": False}, "fsdp2": {"offload_policy": True}
    },
}  # fmt: skip


def config_of(path: str, settings: dict[str, Any], strategy: str = "fsdp2_train") -> WorkerConfig:
    model = {"dtype": "fp32", "disable_gradient_checkpointing": True} | settings.get("model", {})
    return WorkerConfig(
        model_args=ModelArguments(path, **model),
        training_args=TrainingArguments(
            optimizer=settings.get("optimizer", "sgd"),
            learning_rate=1e-2,
            lr_scheduler_type="constant",
            per_device_train_batch_size=3,
        ),
        strategy_args=StrategyArguments(strategy, settings.get("fsdp2", {})),
        infer_batch_size=3,
        **settings.get("worker", {}),
    )


# ---- jobs of a rank --------------------------------------------------------------------------------------------------


class Trained(NamedTuple):
    """What a rank gives: scores before, metrics of each update, and, from rank 0, weights afterwards."""

    scores: list[ScoreResult]
    metrics: list[dict[str, float]]
    weights: dict[str, np.ndarray]


def train(path: str, settings: dict[str, Any], items: list[Trajectory], updates: int = 2, load: str = "",
          save: str = "") -> Trained:  # fmt: skip
    """Load a checkpoint, or start; score and update; save before the last update."""
    import torch
    import torch.distributed as dist

    from roll_opd.distributed.strategy.fsdp2 import FSDP2Strategy
    from roll_opd.distributed.strategy.tokenizer import Vocabulary
    from roll_opd.pipeline.batching import micro_batches, rank_shares

    config, rank, ranks = config_of(path, settings), dist.get_rank(), dist.get_world_size()
    vocabulary = Vocabulary(VOCAB, frozenset({2}), lambda ids: "")
    strategy = FSDP2Strategy(
        "student_train", config, vocabulary, torch.device("cpu"), max_grad_norm=1.0, total_updates=4
    )
    if load:
        strategy.load(load)
    requests = [ScoreRequest(t.id, t.tokens, t.response_mask) for t in items]
    scores = strategy.score(rank_shares(requests, ranks)[rank])
    rows = micro_batches(items, config, ranks, "token-mean", 64)[rank]
    metrics = []
    for update in range(updates):
        if save and update == updates - 1:
            strategy.save(save)
        metrics.append(strategy.train_step(rows, Loss()))
    weights = {name: full.numpy().flatten() for names, full in strategy.full_weights(None) for name in names}
    return Trained(scores, metrics, weights)


def read(path: str) -> tuple[dict[str, np.ndarray], int]:
    """Only load: the whole of each parameter, and the most bytes that this rank asked for at once beside its shards."""
    import torch

    from roll_opd.distributed.strategy import pretrained
    from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
    from roll_opd.distributed.strategy.sharded_model import full_tensor
    from roll_opd.distributed.strategy.tokenizer import Vocabulary

    largest = 0

    def refuse(self: pretrained.Checkpoint) -> None:
        raise AssertionError("a rank read the whole model")

    def watched(tensor: torch.Tensor) -> tuple[torch.Tensor, Any]:
        nonlocal largest
        own, rows = own_part(tensor)
        largest = max(largest, own.nbytes)
        return own, rows

    own_part, load = pretrained.own_part, pretrained.Checkpoint.load
    pretrained.own_part, pretrained.Checkpoint.load = watched, refuse  # type: ignore[assignment]
    try:
        vocabulary = Vocabulary(VOCAB, frozenset({2}), lambda ids: "")
        strategy = FSDP2InferStrategy("teacher", config_of(path, {}, "fsdp2_infer"), vocabulary, torch.device("cpu"))
    finally:
        pretrained.own_part, pretrained.Checkpoint.load = own_part, load  # type: ignore[method-assign]
    named = strategy.model.lm.named_parameters(remove_duplicate=False)
    return {name: full_tensor(p).numpy().copy() for name, p in named}, largest


def infer(path: str, requests: list[list[ScoreRequest]], wants: list[ScoreWant], update: list[Any],
          mix: float) -> tuple[list[list[ScoreResult]], Any, dict[str, int], list[ScoreResult]]:  # fmt: skip
    """Score this rank's share with each want; take over weights; score again."""
    import torch
    import torch.distributed as dist

    from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
    from roll_opd.distributed.strategy.tokenizer import Vocabulary

    config = config_of(path, {"worker": DYNAMIC}, "fsdp2_infer")
    vocabulary = Vocabulary(VOCAB, frozenset({2}), lambda ids: "")
    strategy = FSDP2InferStrategy("teacher", config, vocabulary, torch.device("cpu"))
    mine = requests[dist.get_rank()]
    before = [strategy.score(mine, want) for want in wants]
    head = strategy.head().weight.raw.copy()  # one rank shows its parameters themselves
    strategy.begin_weight_update(1, mix)
    for bucket in update:
        strategy.load_weights(bucket)
    return before, head, dict(strategy.finish_weight_update(1)), strategy.score(mine)


# ---- training --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def items() -> list[Trajectory]:
    """Thirteen sequences of very different lengths: one rank runs out of rows before the other."""
    random = np.random.default_rng(0)
    out = []
    for i in range(13):
        prompt, response = int(random.integers(3, 30)), int(random.integers(1, 60))
        mask = np.arange(prompt + response) >= prompt
        out.append(
            Trajectory(
                id=TrajectoryId(i, 0),
                tag="",
                tokens=random.integers(4, 300, len(mask)).astype(np.int32),
                response_mask=mask,
                infer_logprobs=np.zeros(len(mask), np.float32),
                weight_version=np.where(mask, 0, -1).astype(np.int32),
                old_logprobs=np.full(len(mask), -6.0, np.float32),
                advantages=random.normal(size=len(mask)).astype(np.float32),
            )
        )
    return out


def undealt(answers: list[list[Any]]) -> list[Any]:
    from roll_opd.pipeline.batching import undeal

    return undeal(answers)


@pytest.fixture(scope="module")
def one_rank(torch_ranks, tiny_models, random_model, items) -> dict[tuple[str, str], Trained]:
    """One rank, before training, and after it with and without adapters: what the other settings must not change."""
    paths = {"tied": tiny_models.student, "untied": random_model}
    plain = {"start": ({}, 0), "plain": ({}, 2), "LoRA": ({"model": LORA}, 2)}
    return {
        (which, name): torch_ranks.run(1, train, path, settings, items, updates)[0]
        for which, path in paths.items()
        for name, (settings, updates) in plain.items()
    }


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("name", SETTINGS)
def test_two_ranks_train_as_one(torch_ranks, tiny_models, random_model, items, one_rank, name: str, which: str) -> None:
    path = tiny_models.student if which == "tied" else random_model
    expected = one_rank[which, "LoRA" if "LoRA" in name else "plain"]
    first, second = torch_ranks.run(2, train, path, SETTINGS[name], items)
    for ours, theirs in zip(undealt([first.scores, second.scores]), expected.scores, strict=True):
        assert ours.id == theirs.id
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    for ours, theirs in zip(first.metrics, expected.metrics, strict=True):
        for key in ("loss", "grad_norm", "sum/tokens", "sum/entropy"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-6, abs=1e-7), key
        assert ours["lr"] == theirs["lr"]
    assert not second.weights and first.weights.keys() == expected.weights.keys()
    # With plain SGD the change of the weights is the gradient.
    start = one_rank[which, "start"].weights
    change, difference = (
        np.sqrt(sum(float(np.square(one[w] - other[w], dtype=np.float64).sum()) for w in start))
        for one, other in ((expected.weights, start), (expected.weights, first.weights))
    )
    assert change > 1e-2 and difference <= 1e-5 * change


@pytest.mark.parametrize(
    "settings", [{"optimizer": "adamw"}, {"optimizer": "adamw", "model": LORA}], ids=["whole", "adapters"]
)
def test_a_checkpoint_goes_on_with_any_number_of_ranks(
    torch_ranks, random_model, items, settings, tmp_path: Path
) -> None:
    folder = str(tmp_path / "state")
    whole = torch_ranks.run(2, train, random_model, settings, items, 3, "", folder)[0]
    again = torch_ranks.run(2, train, random_model, settings, items, 1, folder)[0]
    assert again.metrics[0] == whole.metrics[2], "two ranks go on exactly"
    assert all((again.weights[name] == whole.weights[name]).all() for name in whole.weights)
    alone = torch_ranks.run(1, train, random_model, settings, items, 1, folder)[0]
    for key in ("loss", "grad_norm"):
        assert alone.metrics[0][key] == pytest.approx(whole.metrics[2][key], rel=1e-6), key


# ---- loading ---------------------------------------------------------------------------------------------------------


SMALL = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def saved(folder: Path, model_cls: Any, config: Any) -> str:
    import torch

    with torch.random.fork_rng():
        torch.manual_seed(3)
        model_cls(config).float().save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("which", ["tied", "odd numbers of rows"])
def test_each_rank_reads_its_rows_and_no_more(torch_ranks, tiny_models, tmp_path: Path, which: str) -> None:
    from safetensors.torch import load_file
    from transformers import Qwen3Config, Qwen3ForCausalLM

    path = tiny_models.student
    if which != "tied":
        path = saved(tmp_path, Qwen3ForCausalLM, Qwen3Config(**SMALL, vocab_size=307, intermediate_size=45))
    files = load_file(Path(path) / "model.safetensors")
    answers = torch_ranks.run(2, read, path)
    for rank, (held, largest) in enumerate(answers):
        assert set(files) <= set(held)
        assert set(held) - set(files) == ({"lm_head.weight"} if which == "tied" else set())
        for name, values in held.items():
            stored = files.get(name, files["model.embed_tokens.weight"])
            assert (values == stored.float().numpy()).all(), name
        # Half of the largest tensor, the embedding; the first rank has the odd row.
        assert largest == max((len(t) + 1 - rank) // 2 * t[0].numel() * 4 for t in files.values())


def test_what_must_be_converted_comes_from_rank_0(torch_ranks, tmp_path: Path, items) -> None:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    experts = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    config = Qwen3MoeConfig(**SMALL, **experts, vocab_size=320, intermediate_size=48)
    path = saved(tmp_path, Qwen3MoeForCausalLM, config)
    (alone,) = torch_ranks.run(1, train, path, {}, items, 1)
    first, second = torch_ranks.run(2, train, path, {}, items, 1)
    for ours, theirs in zip(undealt([first.scores, second.scores]), alone.scores, strict=True):
        np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=2e-5)
    assert first.metrics[0]["grad_norm"] == pytest.approx(alone.metrics[0]["grad_norm"], rel=1e-6)


# ---- scoring ---------------------------------------------------------------------------------------------------------

WANTS = [ScoreWant(), ScoreWant(top_k=4), ScoreWant(given=True), ScoreWant(4, True), ScoreWant(hidden=True)]


@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_two_ranks_score_as_one(torch_ranks, tiny_models, items, mix: float) -> None:
    """Shares of very different sizes, down to none; then new weights, copied or mixed in."""
    random = np.random.default_rng(1)
    requests = [
        ScoreRequest(
            t.id, t.tokens, t.response_mask, random.integers(0, VOCAB, (t.response_length, 3)).astype(np.int32)
        )
        for t in items
    ]
    import torch
    from safetensors.torch import load_file

    from roll_opd.distributed.strategy.weight_transfer import pack

    files = load_file(Path(tiny_models.student) / "model.safetensors")
    moved = {
        name: (t.float() + 0.02 * torch.randn(t.shape, generator=torch.Generator().manual_seed(len(name)))).numpy()
        for name, t in files.items()
    }
    moved["lm_head.weight"] = moved["model.embed_tokens.weight"]
    update = [pack([([name], torch.from_numpy(values))], "host")[0] for name, values in moved.items()]

    def ask(shares: list[list[ScoreRequest]]) -> tuple[list[list[ScoreResult]], list[Any]]:
        answers = torch_ranks.run(len(shares), infer, tiny_models.student, shares, WANTS, update, mix)
        lists = [*zip(*(before for before, *_ in answers), strict=True), [after for *_, after in answers]]
        return [[result for share in each for result in share] for each in lists], answers

    expected, ((_, head, sums, _),) = ask([requests])
    assert (sums == {name: sum for b in update for name, sum in b.checksums.items()}) == (mix == 1.0)
    for cut in (11, 13):
        found, answers = ask([requests[:cut], requests[cut:]])
        for ours, theirs in zip(found, expected, strict=True):
            assert_same_scores(ours, theirs)
        for _, other_head, other_sums, _ in answers:
            assert (other_head == head).all() and other_sums == sums
    assert np.abs(expected[0][0].logprobs - expected[-1][0].logprobs).max() > 1e-3


def assert_same_scores(ours: list[ScoreResult], theirs: list[ScoreResult]) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.checksum) == (b.id, b.checksum)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=2e-5)
        assert (a.details is None) == (b.details is None)
        if a.details is None or b.details is None:
            continue
        if hasattr(a.details, "raw"):
            np.testing.assert_allclose(a.details.raw.view(np.float32), b.details.raw.view(np.float32), atol=1e-4)
        else:
            np.testing.assert_array_equal(a.details.ids, b.details.ids)
            np.testing.assert_allclose(a.details.logprobs, b.details.logprobs, atol=2e-5)
            np.testing.assert_allclose(a.details.tail, b.details.tail, atol=2e-5)
