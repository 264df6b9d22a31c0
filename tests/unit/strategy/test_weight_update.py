"""begin -> load_weights -> finish: what is held equals what was sent, tied or not."""

from __future__ import annotations

import threading

import numpy as np
import pytest
import torch

from roll_opd.distributed.strategy.weight_transfer import WeightBucket, pack, tensor_checksum
from roll_opd.distributed.weight_sync import _compare
from roll_opd.errors import GenerationError


def buckets_of(lm: torch.nn.Module, dtype: torch.dtype, per_bucket: int = 3) -> list[WeightBucket]:
    """All names, tied ones twice, as read-only bytes: what arrives from Ray's object store."""
    entries = [([n], p.detach().to(dtype, copy=True)) for n, p in lm.named_parameters(remove_duplicate=False)]
    buckets = [pack(entries[i : i + per_bucket], "host")[0] for i in range(0, len(entries), per_bucket)]
    for bucket in buckets:
        for raw in bucket.raw:
            raw.setflags(write=False)
    return buckets


def bucket_of(name: str, tensor: torch.Tensor) -> WeightBucket:
    return pack([([name], tensor)], "host")[0]


def changed(lm: torch.nn.Module) -> torch.nn.Module:
    import copy

    other = copy.deepcopy(lm)
    with torch.no_grad():
        for i, parameter in enumerate(other.parameters()):
            parameter.add_(0.01 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i)))
    return other


def update(
    strategy, buckets: list[WeightBucket], version: int, mix: float = 1.0
) -> tuple[dict[str, int], dict[str, int]]:
    sent: dict[str, int] = {}
    strategy.begin_weight_update(version, mix)
    for bucket in buckets:
        sent |= strategy.load_weights(bucket)
    return sent, dict(strategy.finish_weight_update(version))


@pytest.mark.parametrize("tied", [True, False])
def test_held_equals_sent(make_strategy, tiny_models, random_model, sequences, tied) -> None:
    strategy = make_strategy(tiny_models.student if tied else random_model)
    names = dict(strategy.model.lm.named_parameters(remove_duplicate=False))
    assert (names["lm_head.weight"] is names["model.embed_tokens.weight"]) == tied
    before = strategy.score(sequences)
    for version in (1, 2):
        source = changed(strategy.model.lm)
        buckets = buckets_of(source, torch.float32)
        sent, held = update(strategy, buckets, version)
        assert sent == held and set(held) == set(names)
        assert sent == {n: tensor_checksum(p) for n, p in source.named_parameters(remove_duplicate=False)}
        assert strategy.version == version
        for name, parameter in source.named_parameters(remove_duplicate=False):
            assert torch.equal(names[name], parameter)
        _compare(sent, held, "actor_infer-0", version)
    after = strategy.score(sequences)
    assert not np.allclose(before[1].logprobs, after[1].logprobs)


def test_bf16_travels_as_bytes(vocabulary, tiny_models) -> None:
    from roll_opd.configs.model_args import ModelArguments
    from roll_opd.configs.worker_config import WorkerConfig
    from roll_opd.distributed.strategy.hf import HFStrategy

    config = WorkerConfig(model_args=ModelArguments(tiny_models.student, dtype="bf16"))
    strategy = HFStrategy("student_infer", config, vocabulary, torch.device("cpu"), generates=True)
    assert strategy.weight_dtype() == "bfloat16"
    sent, held = update(strategy, buckets_of(changed(strategy.model.lm), torch.bfloat16), 1)
    assert sent == held


def test_tied_weights_that_disagree_are_noticed(make_strategy, tiny_models) -> None:
    strategy = make_strategy(tiny_models.student)
    buckets = buckets_of(strategy.model.lm, torch.float32, per_bucket=1)
    head = bucket_of("lm_head.weight", torch.zeros_like(strategy.model.lm.lm_head.weight))
    sent, held = update(strategy, [*buckets, head], 1)
    with pytest.raises(GenerationError, match="other values than were sent"):
        _compare(sent, held, "actor_infer-0", 1)


def test_a_tensor_of_another_shape_does_not_pass(make_strategy, random_model) -> None:
    strategy = make_strategy(random_model)
    buckets = buckets_of(strategy.model.lm, torch.float32, per_bucket=1)
    # One row of 32 numbers, which a copy would repeat over all 320 rows.
    row = bucket_of("lm_head.weight", torch.ones(32))
    with pytest.raises(GenerationError, match=r"lm_head\.weight.*\(32,\).*\(320, 32\)"):
        update(strategy, [*buckets, row], 1)


def test_an_unknown_parameter_is_refused(make_strategy, random_model) -> None:
    strategy = make_strategy(random_model)
    bucket = bucket_of("model.layers.7.up_proj.weight", torch.zeros(1))
    with pytest.raises(GenerationError, match=r"model\.layers\.7\.up_proj\.weight"):
        strategy.load_weights(bucket)


def test_a_parameter_that_was_not_sent_is_named(make_strategy, random_model) -> None:
    strategy = make_strategy(random_model)
    sent, held = update(strategy, buckets_of(strategy.model.lm, torch.float32, per_bucket=1)[1:], 1)
    missing = (set(held) - set(sent)).pop()
    with pytest.raises(GenerationError, match=missing.replace(".", r"\.")):
        _compare(sent, held, "actor_infer-0", 1)


def test_nothing_is_served_between_begin_and_finish(make_strategy, random_model, sequences) -> None:
    strategy = make_strategy(random_model)
    old = strategy.score(sequences[:1])[0].logprobs
    buckets = buckets_of(changed(strategy.model.lm), torch.float32)
    answers: list[np.ndarray] = []
    strategy.begin_weight_update(1)
    asked = threading.Thread(target=lambda: answers.append(strategy.score(sequences[:1])[0].logprobs))
    asked.start()
    strategy.load_weights(buckets[0])
    asked.join(0.2)
    assert not answers, "scored with half the weights"
    for bucket in buckets[1:]:
        strategy.load_weights(bucket)
    strategy.finish_weight_update(1)
    asked.join(10)
    new = strategy.score(sequences[:1])[0].logprobs
    assert np.array_equal(answers[0], new) and not np.array_equal(old, new)


# ---- moving averages ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("per_bucket", [1, 3, 100])
def test_a_mixed_update_is_the_moving_average(make_strategy, tiny_models, random_model, tied, per_bucket) -> None:
    """held = (1 - mix) held + mix sent, three times over; a weight with two names is mixed once each time."""
    strategy = make_strategy(tiny_models.student if tied else random_model)
    lm = strategy.model.lm
    expected = {name: p.detach().double().clone() for name, p in lm.named_parameters()}
    source = lm
    for version in (1, 2, 3):
        source = changed(source)
        new = dict(source.named_parameters())
        held = {name: p.detach().clone() for name, p in lm.named_parameters()}
        update(strategy, buckets_of(source, torch.float32, per_bucket), version, mix=0.25)
        for name, parameter in lm.named_parameters():
            assert torch.equal(parameter, torch.lerp(held[name], new[name].detach(), 0.25)), name
            expected[name] = 0.75 * expected[name] + 0.25 * new[name].detach().double()
    for name, parameter in lm.named_parameters():
        assert not torch.equal(parameter, new[name])
        torch.testing.assert_close(parameter.double(), expected[name], atol=1e-6, rtol=1e-6)
    assert strategy.version == 3


def test_mixing_equal_weights_changes_no_bit(make_strategy, random_model) -> None:
    """The first update of a run: the average and the student are the same model."""
    strategy = make_strategy(random_model)
    buckets = buckets_of(strategy.model.lm, torch.float32)
    sent, held = update(strategy, buckets, 0, mix=0.01)
    assert sent == held


def test_a_whole_update_after_a_mixed_one_is_a_copy(make_strategy, random_model) -> None:
    """The share is that of one update, not of all later ones."""
    strategy = make_strategy(random_model)
    source = changed(strategy.model.lm)
    sent, held = update(strategy, buckets_of(source, torch.float32), 1, mix=0.5)
    assert sent.keys() == held.keys() and not any(sent[name] == held[name] for name in sent)
    sent, held = update(strategy, buckets_of(source, torch.float32), 2)
    assert sent == held


def test_a_mixed_update_from_bf16_is_taken_in_the_holders_precision(make_strategy, random_model) -> None:
    strategy = make_strategy(random_model)
    source = changed(strategy.model.lm)
    before = {name: p.detach().clone() for name, p in strategy.model.lm.named_parameters()}
    update(strategy, buckets_of(source, torch.bfloat16), 1, mix=0.5)
    rounded = {name: p.detach().bfloat16().float() for name, p in source.named_parameters()}
    for name, parameter in strategy.model.lm.named_parameters():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, torch.lerp(before[name], rounded[name], 0.5)), name
