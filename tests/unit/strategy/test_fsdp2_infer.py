"""``fsdp2_infer`` gives what ``hf_infer`` gives. With one rank, in this process."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from roll_opd.distributed.strategy.base import ScoreRequest, ScoreWant
from roll_opd.distributed.strategy.fsdp2_infer import FSDP2InferStrategy
from roll_opd.distributed.strategy.packed_model import head_of
from roll_opd.distributed.strategy.weight_transfer import WeightBucket, pack
from roll_opd.errors import GenerationError

pytestmark = pytest.mark.usefixtures("process_group")
CPU = torch.device("cpu")
WANTS = {
    "sampled": ScoreWant(),
    "top-k": ScoreWant(top_k=5),
    "given": ScoreWant(given=True),
    "union": ScoreWant(top_k=5, given=True),
    "hidden": ScoreWant(hidden=True),
}


@pytest.fixture
def load(fsdp2_config, vocabulary):
    def build(path: str, **settings) -> FSDP2InferStrategy:
        return FSDP2InferStrategy("teacher", fsdp2_config(path, **settings), vocabulary, CPU)

    return build


@pytest.fixture(scope="module")
def requests(sequences) -> list[ScoreRequest]:
    rng = np.random.default_rng(2)
    return [
        ScoreRequest(
            s.id, s.tokens, s.response_mask, rng.integers(0, 305, (int(s.response_mask.sum()), 3)).astype(np.int32)
        )
        for s in sequences
    ]


def details(result) -> list[np.ndarray]:
    found = result.details
    if found is None:
        return [np.zeros(0)]
    return [found.raw.view(np.float32)] if hasattr(found, "raw") else [found.ids, found.logprobs, found.tail]


def assert_same(ours, theirs, atol: float = 0.0) -> None:
    for a, b in zip(ours, theirs, strict=True):
        assert (a.id, a.checksum) == (b.id, b.checksum)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=atol)
        for x, y in zip(details(a), details(b), strict=True):
            np.testing.assert_allclose(x, y, atol=atol)


@pytest.mark.parametrize("which", ["tied", "untied with padding"])
def test_every_score_is_hf_infers(load, make_strategy, tiny_models, random_model, requests, which) -> None:
    path = tiny_models.student if which == "tied" else random_model
    ours, theirs = load(path), make_strategy(path)
    for want in WANTS.values():
        assert_same(ours.score(requests, want), theirs.score(requests, want))
    one, other = ours.head(), theirs.head()
    assert (one.weight.raw == other.weight.raw).all()
    assert one.weight.shape == other.weight.shape and one.weight.shape[0] == 305
    assert not any(p.requires_grad for p in ours.model.parameters())
    assert ours.score([]) == []


@pytest.mark.parametrize("want", WANTS.values(), ids=WANTS)
def test_balanced_rows_give_the_same_scores_in_the_same_order(load, random_model, requests, want) -> None:
    balanced = load(random_model, use_dynamic_batching_in_infer=True, max_tokens_per_microbatch_in_infer=45)
    assert_same(balanced.score(requests, want), load(random_model).score(requests, want), atol=2e-5)


def test_hidden_states_and_head_in_fp32(load, random_model, requests) -> None:
    """A head that is applied in fp32 travels in fp32, with hidden states that fit."""
    strategy = load(random_model, model={"dtype": "bf16"}, logits_in_fp32=True)
    head = strategy.head()
    assert head.weight.dtype == "float32"
    (result, *_) = strategy.score(requests[1:2], ScoreWant(hidden=True))
    assert result.details.dtype == "float32"
    projection = head_of(head, CPU)
    hidden = torch.from_numpy(result.details.raw.copy()).view(torch.float32).reshape(result.details.shape)
    targets = torch.from_numpy(requests[1].tokens[requests[1].response_mask].astype(np.int64))
    expected = (hidden @ projection.weight_VH.T).log_softmax(-1).gather(-1, targets[:, None]).squeeze(-1)
    np.testing.assert_allclose(result.logprobs[requests[1].response_mask], expected.numpy(), atol=1e-5)


# ---- weights that move ---------------------------------------------------------------------------------------------


def buckets(strategy, change: float) -> tuple[list[WeightBucket], dict[str, torch.Tensor]]:
    """The strategy's weights, all moved by ``change``, a few to a bucket."""
    lm = strategy.model.lm
    new = {n: p.full_tensor() + change for n, p in lm.named_parameters(remove_duplicate=False)}
    tensors = [([n], t) for n, t in new.items()]
    return [pack(tensors[i : i + 5], "host")[0] for i in range(0, len(tensors), 5)], new


@pytest.mark.parametrize("which", ["tied", "untied"])
@pytest.mark.parametrize("mix", [1.0, 0.25])
def test_weights_are_taken_over_or_mixed(load, tiny_models, random_model, which, mix) -> None:
    strategy = load(tiny_models.student if which == "tied" else random_model)
    held = {n: p.full_tensor().clone() for n, p in strategy.model.lm.named_parameters()}
    sent, new = buckets(strategy, 0.5)
    strategy.begin_weight_update(1, mix)
    checksums: dict[str, int] = {}
    for bucket in sent:
        checksums |= strategy.load_weights(bucket)
    found = strategy.finish_weight_update(1)
    assert found.keys() == checksums.keys() == new.keys()
    assert (found == checksums) == (mix == 1.0)
    for name, parameter in strategy.model.lm.named_parameters():
        expected = torch.lerp(held[name], new[name], mix)
        torch.testing.assert_close(parameter.full_tensor(), expected, atol=1e-7, rtol=1e-6)
    assert strategy.weight_dtype() == "float32"


def test_an_update_of_another_model_is_refused(load, random_model) -> None:
    strategy = load(random_model)
    strategy.begin_weight_update(1)
    with pytest.raises(GenerationError, match=r"no parameter 'model\.layers\.7\.x'"):
        strategy.load_weights(pack([(["model.layers.7.x"], torch.zeros(1))], "host")[0])
    with pytest.raises(GenerationError, match=r"model\.norm\.weight' is \(1,\) in training, \(32,\)"):
        strategy.load_weights(pack([(["model.norm.weight"], torch.zeros(1))], "host")[0])


@pytest.mark.parametrize("which", ["tied", "untied"])
def test_saved_weights_come_back(load, tiny_models, random_model, requests, tmp_path: Path, which) -> None:
    path = tiny_models.student if which == "tied" else random_model
    moved, other = load(path), load(path)
    moved.begin_weight_update(1)
    for bucket in buckets(moved, 0.01)[0]:
        moved.load_weights(bucket)
    moved.finish_weight_update(1)
    moved.save_model(str(tmp_path))
    before = other.score(requests)
    other.load_model(str(tmp_path))
    assert_same(other.score(requests), moved.score(requests))
    assert max(np.abs(a.logprobs - b.logprobs).max() for a, b in zip(before, moved.score(requests), strict=True)) > 1e-3


def test_a_scorer_leaves_and_comes_back(load, random_model, requests) -> None:
    strategy = load(random_model)
    before = strategy.score(requests, WANTS["hidden"])
    strategy.sharded._leave(False)
    strategy.sharded._leave(False)
    assert all(p.to_local().untyped_storage().nbytes() == 0 for p in strategy.model.parameters())
    with pytest.raises(AssertionError, match="left its device"):
        strategy.score(requests)
    strategy.sharded._come_back(False)
    assert_same(strategy.score(requests, WANTS["hidden"]), before)
    strategy.offload()  # on a CPU nothing moves
    assert_same(strategy.score(requests, WANTS["hidden"]), before)
    strategy.onload()
