"""The parts of the ``vllm`` strategy that need no engine."""

from __future__ import annotations

import asyncio
import json
import os
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from roll_opd.algorithms.sampler import sample
from roll_opd.configs import ModelArguments, StrategyArguments, WorkerConfig
from roll_opd.configs.backends.vllm import VLLMSettings
from roll_opd.distributed.strategy.base import GenerateRequest, Sampling
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.distributed.strategy.vllm.engine import Engine, engine_arguments, set_environment
from roll_opd.distributed.strategy.vllm.strategy import VLLMStrategy, _max_model_len, _Response
from roll_opd.distributed.strategy.vllm.truncation import NUCLEUS, kept_mass, ranks_needed
from roll_opd.distributed.strategy.weight_transfer import TransferEnd, WeightBucket, in_shared_memory, pack
from roll_opd.errors import ConfigError, EngineDiedError, GenerationError
from roll_opd.trajectory import TrajectoryId

CPU, CUDA = torch.device("cpu"), torch.device("cuda")

# ---- the mass that is kept -------------------------------------------------------------------------------------------


def kept_of(logits: torch.Tensor, sampling: Sampling) -> tuple[np.ndarray, np.ndarray]:
    """What an engine's report gives, and what the whole distribution says."""
    count, vocab = logits.shape
    best = logits.double().log_softmax(-1).topk(min(ranks_needed(sampling), vocab)).values.numpy()
    cuts = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k}
    return kept_mass(best, sampling, vocab), sample(logits, torch.zeros(count), **cuts)[2].numpy()


@pytest.mark.parametrize(
    "sampling",
    [Sampling(top_k=5), Sampling(top_k=400), Sampling(top_p=0.6), Sampling(top_k=50, top_p=0.9), Sampling(top_p=1e-6)],
)
def test_kept_mass_is_exact_at_temperature_1(sampling: Sampling) -> None:
    for spread in (1.0, 4.0):
        logits = spread * torch.randn(40, 300, generator=torch.Generator().manual_seed(2))
        ours, exact = kept_of(logits, sampling)
        np.testing.assert_allclose(ours, exact, atol=1e-5, rtol=0)


@pytest.mark.parametrize("temperature", [0.6, 0.99, 1.5])
@pytest.mark.parametrize("cut", [{"top_k": 100, "top_p": 0.99}, {"top_k": 20}, {"top_p": 0.9}])
def test_kept_mass_at_another_temperature(temperature: float, cut: dict) -> None:
    """ROLL's own 0.99/0.99/100 among them; the logits are as peaked as a language model's."""
    logits = 3.0 * torch.randn(40, 2000, generator=torch.Generator().manual_seed(3))
    ours, exact = kept_of(logits, Sampling(temperature=temperature, **cut))
    np.testing.assert_allclose(ours, exact, atol=0.05 if temperature > 1 else 0.01, rtol=0)


def test_kept_mass_of_a_nucleus_that_is_wider_than_the_report() -> None:
    logits = torch.zeros(1, 1000)
    ours, exact = kept_of(logits, Sampling(top_p=0.5))
    assert ours[0] == 0.5 == pytest.approx(exact[0], abs=1 / 1000)
    assert NUCLEUS / 1000 < 0.5


def test_what_has_to_be_reported() -> None:
    assert ranks_needed(Sampling()) == ranks_needed(Sampling(temperature=0.3)) == 0
    assert ranks_needed(Sampling(greedy=True, top_k=5)) == 0
    assert ranks_needed(Sampling(top_p=0.9)) == NUCLEUS
    assert ranks_needed(Sampling(top_p=0.9, top_k=7)) == ranks_needed(Sampling(top_k=7)) == 7
    assert ranks_needed(Sampling(temperature=0.9, top_k=7)) == NUCLEUS
    assert ranks_needed(Sampling(temperature=0.9, top_k=500)) == 500


# ---- a response ------------------------------------------------------------------------------------------------------


@dataclass
class Output:
    """As vLLM's; each token with what was reported of it: ``(id, logprob, rank)``."""

    token_ids: list[int]
    reported: list[list[tuple[int, float, int]]]
    finish_reason: str | None = None

    @dataclass
    class Flat:
        start_indices: list[int] = field(default_factory=list)
        end_indices: list[int] = field(default_factory=list)
        token_ids: list[int] = field(default_factory=list)
        logprobs: list[float] = field(default_factory=list)
        ranks: list[int] = field(default_factory=list)

    @property
    def logprobs(self) -> Flat:
        flat = self.Flat()
        for entries in self.reported:
            flat.start_indices.append(len(flat.token_ids))
            for token, logprob, rank in entries:
                flat.token_ids.append(token)
                flat.logprobs.append(logprob)
                flat.ranks.append(rank)
            flat.end_indices.append(len(flat.token_ids))
        return flat


def response(sampling: Sampling, member: int = 0) -> _Response:
    name = TrajectoryId(0, member)
    vocabulary = Vocabulary(10, (2,), lambda ids: "".join(map(str, ids)))
    return _Response(GenerateRequest(name, (5,), name.seed(1), sampling), vocabulary)


def test_best_tokens_come_in_their_order_however_they_are_listed() -> None:
    """vLLM lists the sampled token first and the best after it; steps that it has put together name no token twice."""
    one = response(Sampling(report_top_ids=2))
    assert one.ranks == 2
    one.extend(Output([7, 4], [[(7, -3.0, 9), (3, -0.1, 1), (4, -1.0, 2)], [(4, -0.2, 1), (4, -0.2, 1), (3, -2.0, 2)]]))
    one.extend(Output([3, 8], [[(3, -2.0, 2), (4, -0.2, 1)], [(8, -5.0, 6), (1, -0.3, 1), (0, -2.0, 2)]], "length"))
    result = one.result(version=1)
    assert result.response_ids.tolist() == [7, 4, 3, 8]
    assert result.top_ids.tolist() == [[3, 4], [4, 3], [4, 3], [1, 0]]
    np.testing.assert_allclose(result.infer_logprobs, [-3.0, -0.2, -2.0, -5.0])
    assert result.sampled_mass == 1.0 and result.finish_reason == "length"


def test_splits_say_which_weights_sampled_a_token() -> None:
    """Updates at 2 and 3 tokens; at 3 again, before the next token; and one when all had come."""
    one = response(Sampling())
    for length, version in ((2, 5), (3, 6), (3, 7), (None, 8)):
        one.split(length, version)
    one.extend(Output([1, 1, 1, 1, 2], [[(1, -1.0, 1)]] * 5, "stop"))
    result = one.result(version=9)
    assert result.weight_version.tolist() == [5, 5, 6, 8, 8] and result.weight_version.dtype == np.int32
    assert result.finish_reason == "stop"


def test_the_kept_mass_is_measured_once_a_group() -> None:
    cut = Sampling(top_k=2)
    entries = [[(1, -1.0, 1), (1, -1.0, 1), (3, -2.0, 2)]]
    first, second = response(cut, member=0), response(cut, member=1)
    assert (first.ranks, second.ranks) == (2, 0)
    first.extend(Output([1], entries, "length"))
    second.extend(Output([1], [entries[0][:1]], "length"))
    assert first.result(0).sampled_mass == pytest.approx(np.exp(-1.0) + np.exp(-2.0))
    assert np.isnan(second.result(0).sampled_mass) and second.result(0).top_ids is None
    # Where as much is asked for anyway, it costs nothing.
    assert response(Sampling(top_k=2, report_top_ids=4), member=1).measured


def test_a_response_that_the_engine_gave_up_is_no_response() -> None:
    with pytest.raises(GenerationError, match=r"0/0/0.*abort"):
        response(Sampling()).extend(Output([], [], "abort"))


# ---- shared memory ---------------------------------------------------------------------------------------------------


def test_tensors_go_through_shared_memory_bit_for_bit_and_leave_nothing() -> None:
    random = torch.Generator().manual_seed(4)
    tensors = {
        "a": torch.randn(3, 5, generator=random),
        "b": torch.randn(7, generator=random).bfloat16(),
        "c": torch.tensor(2.5, dtype=torch.float16),
        "d": torch.randn(64, 3, generator=random).bfloat16(),
    }
    bucket, _ = pack([([name], tensor) for name, tensor in tensors.items()], "host")
    for raw in bucket.raw:
        raw.setflags(write=False)
    given, file = in_shared_memory(bucket)
    # As it crosses to another process: lists in place of tuples.
    handles = json.loads(json.dumps(given.handles))
    received = list(TransferEnd(CPU).tensors_of(WeightBucket(given.specs, {}, handles=handles)))
    file.close()
    assert not os.path.exists(file.place.path)
    assert [name for name, _ in received] == list(tensors)
    for name, tensor in received:
        assert torch.equal(tensor, tensors[name]) and tensor.dtype == tensors[name].dtype
        assert tensor.data_ptr() % 16 == 0


# ---- settings --------------------------------------------------------------------------------------------------------


def arguments(device: torch.device = CPU, generates: bool = True, **settings) -> dict:
    config = WorkerConfig(
        model_args=ModelArguments("model", dtype="bf16", model_config_kwargs={"rope_theta": 5.0}),
        strategy_args=StrategyArguments("vllm", {}),
    )
    return engine_arguments("role", config, VLLMSettings(**settings), device, generates=generates, max_model_len=77)


def test_arguments_of_an_engine() -> None:
    plain = arguments()
    assert plain["model"] == "model" and plain["dtype"] == "bfloat16" and plain["max_model_len"] == 77
    assert plain["hf_overrides"] == {"rope_theta": 5.0}
    assert plain["logprobs_mode"] == "raw_logprobs"
    assert "max_num_seqs" not in plain and "gpu_memory_utilization" not in plain and "enable_sleep_mode" not in plain
    assert arguments(max_num_seqs=9, engine_args={"kv_cache_dtype": "fp8"}).items() >= {
        "max_num_seqs": 9, "kv_cache_dtype": "fp8"
    }.items()  # fmt: skip
    assert arguments(CUDA, gpu_memory_utilization=0.4).items() >= {
        "gpu_memory_utilization": 0.4, "enable_sleep_mode": True
    }.items()  # fmt: skip


def test_an_engine_over_several_devices_starts_its_own_processes() -> None:
    assert "distributed_executor_backend" not in arguments()
    assert arguments(tensor_parallel_size=2)["distributed_executor_backend"] == "mp"


def test_what_would_end_an_engine_without_cuda_is_refused() -> None:
    assert arguments()["enable_chunked_prefill"] is False
    assert "enable_chunked_prefill" not in arguments(generates=False) and "enable_chunked_prefill" not in arguments(
        CUDA
    )
    with pytest.raises(ConfigError, match=r"role\.strategy_args\.strategy_config\.enable_chunked_prefill"):
        arguments(enable_chunked_prefill=True)
    assert arguments(generates=False, enable_chunked_prefill=True)["enable_chunked_prefill"] is True
    with pytest.raises(ConfigError, match="pipeline_parallel_size"):
        arguments(pipeline_parallel_size=2)


@pytest.mark.parametrize("name", ["logprobs_mode", "enforce_eager", "max_model_len"])
def test_an_argument_has_one_source(name: str) -> None:
    with pytest.raises(ConfigError, match=rf"role\.strategy_args\.strategy_config\.engine_args\.{name}"):
        arguments(engine_args={name: 1})


def test_the_environment_gets_defaults_and_keeps_what_is_set(monkeypatch) -> None:
    monkeypatch.setattr(os, "environ", {"VLLM_LOGGING_LEVEL": "DEBUG", "OMP_NUM_THREADS": "3"})
    set_environment(VLLMSettings(cpu_kvcache_space_gb=4, enforce_eager=True, start_timeout=90.0), CPU)
    assert os.environ["VLLM_LOGGING_LEVEL"] == "DEBUG" and os.environ["OMP_NUM_THREADS"] == "3"
    assert os.environ["VLLM_CPU_KVCACHE_SPACE"] == "4" and os.environ["VLLM_CPU_OMP_THREADS_BIND"] == "nobind"
    assert os.environ["VLLM_ENGINE_READY_TIMEOUT_S"] == "90" and os.environ["TORCH_COMPILE_DISABLE"] == "1"
    monkeypatch.setattr(os, "environ", {})
    set_environment(VLLMSettings(), CUDA)
    assert not {"VLLM_CPU_KVCACHE_SPACE", "TORCH_COMPILE_DISABLE", "OMP_NUM_THREADS"} & set(os.environ)


@pytest.mark.parametrize(
    ("longest", "given", "room"),
    [
        (100, {}, 101),  # one more, for the token that scoring samples
        (127, {}, 128),
        (128, {}, 128),
        (200, {}, 128),  # the bounds of a teacher's own view, which no sequence reaches
        (200, {"max_position_embeddings": 256}, 201),
    ],
)
def test_room_ends_where_the_models_positions_do(tmp_path, longest: int, given: dict, room: int) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama", "max_position_embeddings": 128}))
    model = ModelArguments(model_name_or_path=str(tmp_path), model_config_kwargs=given)
    assert _max_model_len(WorkerConfig(model_args=model), longest) == room
    nowhere = ModelArguments(model_name_or_path=str(tmp_path / "no"), model_config_kwargs=given)
    assert _max_model_len(WorkerConfig(model_args=nowhere), longest) == longest


# ---- an engine that is replaced --------------------------------------------------------------------------------------


@pytest.mark.parametrize("fact", ["vocab_size", "max_model_len", "dtype"])
def test_an_engine_that_is_being_replaced_is_a_dead_one(fact: str) -> None:
    engine = object.__new__(Engine)
    engine.role, engine.llm = "student_infer", None
    with pytest.raises(EngineDiedError, match="student_infer: the vLLM engine died, and another one is being started"):
        getattr(engine, fact)


def test_whoever_asks_a_new_engine_before_its_weights_came_may_ask_again() -> None:
    """Where no engine died, that it has no weights is an error; one that loads its own serves."""

    def admitted(*, replaced: bool, updated: bool, load_format: str = "auto") -> BaseException | None:
        strategy = object.__new__(VLLMStrategy)
        strategy.role, strategy.settings = "student_infer", VLLMSettings(load_format=load_format)  # type: ignore[arg-type]
        strategy.vocabulary = Vocabulary(8, (2,), str)
        strategy._updated, strategy._stale = updated, load_format == "dummy"
        strategy._updating = strategy._replaced = False
        strategy._serving = asyncio.Event()
        strategy._engine = SimpleNamespace(  # type: ignore[assignment]
            in_loop=lambda call: call(), stop=lambda: None, start=lambda: None, vocab_size=8, residence="all"
        )
        if replaced:
            strategy.restart()
        try:
            asyncio.run(asyncio.wait_for(strategy._admitted(), 5))
        except GenerationError as error:
            assert "holds no weights that could be served" in str(error)
            return error
        return None

    assert type(admitted(replaced=True, updated=True)) is EngineDiedError
    assert type(admitted(replaced=True, updated=False, load_format="dummy")) is EngineDiedError
    assert type(admitted(replaced=False, updated=False, load_format="dummy")) is GenerationError
    assert admitted(replaced=True, updated=False) is None
