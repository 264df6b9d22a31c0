"""The roofline: operations against torch's own counter, bytes and seconds against numbers worked out by hand."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import DynamicCache, Qwen3Config, Qwen3ForCausalLM

from benchmarks import gpu_step
from benchmarks.roofline import (
    Machine,
    Part,
    Phase,
    Shape,
    Step,
    adamw,
    backward,
    causal_pairs,
    decode,
    divergence_head,
    forward,
    paper,
    product,
    scoring_head,
    weight_gradient,
)
from roll_opd.algorithms.chunked_head import FullTarget, Head, head_outputs

CONFIG: dict[str, Any] = {
    "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
    "intermediate_size": 40, "vocab_size": 50, "tie_word_embeddings": True,
}  # fmt: skip
SHAPE = Shape.of(CONFIG)
# A second shape, so that nothing can be taken from the wrong model.
TEACHER = Shape.of({**CONFIG, "hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 56})


def flops(parts: Sequence[Part]) -> float:
    return Phase("", tuple(parts)).flops


def qwen3() -> Qwen3ForCausalLM:
    # Eager attention: its products are counted one by one, over all pairs, whether a query sees the key or not.
    return Qwen3ForCausalLM(Qwen3Config(**CONFIG, attn_implementation="eager"))


def test_parameters_are_those_of_the_model_but_for_the_norms_of_queries_and_keys() -> None:
    norms = SHAPE.layers * 2 * SHAPE.head_dim
    assert SHAPE.parameters == sum(p.numel() for p in qwen3().parameters()) - norms
    with pytest.raises(ValueError, match="dense"):
        Shape.of({**CONFIG, "num_experts": 4})
    with pytest.raises(ValueError, match="dense"):
        Shape.of({"model_type": "other"})


def test_operations_of_forward_and_backward_are_torchs() -> None:
    batch, length = 3, 7
    model, rows, pairs = qwen3(), batch * length, batch * length**2
    with FlopCounterMode(display=False) as counter:
        loss = model(torch.zeros(batch, length, dtype=torch.long), use_cache=False).logits.sum()
    head = scoring_head(SHAPE, rows, 5, 4)
    assert counter.get_total_flops() == flops([*forward(SHAPE, rows, pairs, 4), head])
    with FlopCounterMode(display=False) as counter:
        loss.backward()
    # Autograd has stored the attention's scores, and saves the product that makes them again.
    stored = SHAPE.layers * 2 * pairs * SHAPE.heads * SHAPE.head_dim
    assert counter.get_total_flops() == flops(backward(SHAPE, rows, pairs, 4)) - stored + 2 * flops([head])


def test_operations_of_decoding_are_torchs() -> None:
    batch, prompt, new = 3, 5, 4
    model = qwen3()
    cache = DynamicCache(config=model.config)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(batch, prompt, dtype=torch.long), past_key_values=cache, logits_to_keep=1)
        for _ in range(new - 1):
            model(torch.zeros(batch, 1, dtype=torch.long), past_key_values=cache)
    prefill = forward(SHAPE, batch * prompt, batch * prompt**2, 4)
    expected = flops([*prefill, *decode(SHAPE, batch, prompt, new, 4)])
    assert counter.get_total_flops() == expected


def test_operations_at_the_head_are_those_of_the_product() -> None:
    tokens, chunk = 11, 4
    hidden = torch.randn(tokens, SHAPE.hidden, requires_grad=True)
    head = Head(torch.randn(SHAPE.vocab, SHAPE.hidden, requires_grad=True))
    teacher = Head(torch.randn(TEACHER.vocab, TEACHER.hidden))
    target = FullTarget("reverse_kl", torch.randn(tokens, TEACHER.hidden), teacher, weights_m=torch.ones(tokens))
    # The counter does not know the product that adds to a sum in place.
    adding = {torch.ops.aten.addmm_: lambda total, a, b, **_: 2 * a[0] * a[1] * b[1]}
    with FlopCounterMode(display=False, custom_mapping=adding) as counter:
        ids = torch.zeros(tokens, dtype=torch.long)
        head_outputs(hidden, head, ids, [target], chunk_tokens=chunk).divergences[0].sum().backward()
    assert counter.get_total_flops() == flops(divergence_head(SHAPE, TEACHER, tokens, chunk, 4))
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        head_outputs(hidden, head, ids, chunk_tokens=chunk)
    assert counter.get_total_flops() == flops([scoring_head(SHAPE, tokens, chunk, 4)])


def test_bytes_worked_out_by_hand() -> None:
    assert causal_pairs(4) == 10
    # In bf16: rows 3 x 5, weight 5 x 7, result 3 x 7.
    assert product("", 3, 5, 7, 2) == Part("", 210.0, 2 * (15 + 35 + 21))
    # Operands in bf16, the sum of 5 x 7 in fp32 read and written.
    assert weight_gradient("", 3, 5, 7, 2) == Part("", 210.0, 2 * 3 * 12 + 8 * 35)
    # Four numbers read and three written, of four bytes, and the gradient read once more for its norm.
    assert adamw(10, 2) == Part("AdamW", memory=320.0, times=2)
    # Two layers, two heads of eight numbers, keys and values, bf16.
    assert SHAPE.cache_bytes(2) == 2 * 2 * 2 * 8 * 2
    # Head: chunks of two tokens, hidden 24, vocabulary 50.
    assert scoring_head(SHAPE, 6, 2, 2).times == 3
    assert scoring_head(SHAPE, 6, 2, 2).memory == 2 * (2 * 24 + 24 * 50 + 2 * 50)


def test_decoding_reads_the_weights_at_each_step_and_the_cache_as_it_grows() -> None:
    parts = {part.name: part for part in decode(SHAPE, 3, 5, 4, 2)}
    # Three steps through two layers; the head and the sampler also make the first token.
    assert [parts[f"decode: {name}"].times for name in ("qkv", "down", "head")] == [6, 6, 4]
    # They see 6, 7 and 8 keys. Of grouped queries each key is read once, for two heads, not four.
    attention = parts["decode: attention"]
    assert attention.times == 2
    assert attention.flops == 4 * 3 * (6 + 7 + 8) * 4 * 8
    keys_and_values = 3 * (6 + 7 + 8 + 3) * 2 * 2 * 8
    queries_and_results = 3 * 3 * 2 * 4 * 8
    assert attention.memory == 2 * (keys_and_values + queries_and_results)
    assert parts["sampler"].memory == 4 * 3 * 50


def test_a_part_takes_the_longest_of_its_three_and_parts_follow_each_other() -> None:
    machine = Machine("paper", flops=100.0, memory=10.0, link=2.0)
    by_matmul, by_memory, by_link = Part("a", 300.0, 20.0), Part("b", 100.0, 50.0, times=2), Part("c", link=8.0)
    assert [p.bound(machine) for p in (by_matmul, by_memory, by_link)] == ["matmul", "memory", "link"]
    assert [p.seconds(machine) for p in (by_matmul, by_memory, by_link)] == [3.0, 10.0, 4.0]
    phase = Phase("all", (by_matmul, by_memory, by_link))
    assert (phase.seconds(machine), phase.flops, phase.memory, phase.link) == (17.0, 500.0, 120.0, 8.0)
    assert phase.seconds(dataclasses.replace(machine, link=math.inf)) == 13.0
    text = paper([phase], [machine], every_part=True)
    assert "b (memory)" in text and text.splitlines()[-1].split("|")[-2].strip() == "17.0000"


STEP = Step(SHAPE, TEACHER, sequences=6, prompt=5, new=4, row=20, chunk=4, size=2)


def test_a_step_adds_up() -> None:
    phases = {phase.name: phase for phase in STEP.phases()}
    assert list(phases) == ["weight_sync", "generate", "score", "old_logprobs", "train"]
    # Six sequences of nine tokens, two in a row: three rows.
    student, teacher = (flops(forward(shape, 54, 6 * 45, 2)) for shape in (SHAPE, TEACHER))
    assert phases["score"].flops == teacher + 2 * 24 * 32 * 50
    assert phases["old_logprobs"].flops == student + 2 * 24 * 24 * 50
    gradients = flops(backward(SHAPE, 54, 6 * 45, 2))
    assert phases["train"].flops == 2 * student + gradients + 2 * 24 * 50 * (3 * 24 + 32)
    plain = {phase.name: phase for phase in dataclasses.replace(STEP, recomputes=False).phases()}
    assert phases["train"].flops - plain["train"].flops == student
    assert {p.times for p in phases["score"].parts if p.name == "layers: down"} == {3 * TEACHER.layers}
    assert STEP.cache() == 6 * 9 * SHAPE.cache_bytes(2)


def test_turns_cost_what_has_changed_and_the_teacher() -> None:
    count, answer = SHAPE.parameters, 2 * 24 * 32
    links = {phase.name: phase.link for phase in STEP.phases()}
    assert links == {"weight_sync": 8 * count, "generate": 4 * count, "score": 2 * TEACHER.parameters + answer,
                     "old_logprobs": 12 * count, "train": answer}  # fmt: skip
    assert not any(phase.link for phase in dataclasses.replace(STEP, turns=False).phases())


def test_fp32_needs_no_copy_in_low_precision() -> None:
    def copies(size: int) -> list[float]:
        phases = dataclasses.replace(STEP, size=size, updates=2).phases()
        return [p.times * p.memory for phase in phases for p in phase.parts if p.name == "weights in low precision"]

    assert copies(2) == [6 * SHAPE.parameters, 12 * SHAPE.parameters]
    assert copies(4) == []


def test_without_a_gpu_the_roofline_is_on_paper_and_the_plan_beside_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    gpu_step.main(["--work_dir", str(tmp_path)])
    said = capsys.readouterr().out
    assert said.startswith("No CUDA device")
    for expected in ("H200 data sheet, s", "H100 data sheet, s", "generate", "take turns", "whole sequences: 29.8 GiB"):
        assert expected in said


def test_a_measured_step_stands_beside_its_roofline() -> None:
    row = {"time/weight_sync": 1.0, "time/generate": 2.0, "time/rollout": 5.0, "time/old_logprobs": 4.0,
           "time/advantages": 0.5, "time/train": 6.0}  # fmt: skip
    measured = gpu_step.seconds_of(row)
    assert measured["score"] == 3.0
    machine = Machine("paper", flops=1.0, memory=1.0)
    phases = [Phase(name, (Part("", flops=1.5),)) for name in measured if name != "advantages"]
    lines = [line.replace(" ", "") for line in gpu_step.report(phases, machine, measured).splitlines()]
    assert "|score|3.0000|1.5000|0.500|" in lines and "|advantages|0.5000|-|-|" in lines
    assert lines[-1] == "|step|16.5000|7.5000|0.455|"
