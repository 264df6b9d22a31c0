"""The plan's memory: every number worked out by hand on a model of 2,792 parameters; and who shares which devices."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from config_samples import PURE, changed

from roll_opd.configs import build_config, plan_as_dict, render_plan_text
from roll_opd.configs.memory import DeviceGroup, Footprint, device_groups, find_model_config, model_size, turn_bytes

OPD = "onpolicy_distill"
# embeddings 2 * 100 * 8, two layers of attention 2 * 8 * 4 * (2 + 1), MLP 3 * 8 * 16 and norms 2 * 8, last norm 8
SHAPE = {"hidden_size": 8, "num_hidden_layers": 2, "vocab_size": 100, "num_attention_heads": 2,
         "num_key_value_heads": 1, "head_dim": 4, "intermediate_size": 16}  # fmt: skip
TOTAL, HEAD = 1600 + 2 * (192 + 384 + 16) + 8, 800
# Four experts of 3 * 8 * 6 in each layer, and their router, in place of the MLP.
MOE = {**SHAPE, "num_experts": 4, "moe_intermediate_size": 6}
EXPERTS, REST = 2 * 4 * 144, 1600 + 2 * (192 + 32 + 16) + 8


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path)


@pytest.fixture
def moe(tmp_path: Path) -> str:
    (tmp_path / "moe").mkdir()
    (tmp_path / "moe" / "config.json").write_text(json.dumps(MOE))
    return str(tmp_path / "moe")


def held(path: str, role: str, strategy: str, settings: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """What the plan says that ``role`` holds, without what is nothing."""
    raw = {f"{role}.model_args.model_name_or_path": path, f"{role}.strategy_args.strategy_name": strategy}
    raw |= {f"{role}.strategy_args.strategy_config": settings or {}}
    loaded = build_config(changed(PURE, raw | {f"{role}.{k}": v for k, v in changes.items()}), OPD)
    found = plan_as_dict(loaded)["memory"][role]
    return {key: value for key, value in found.items() if value}


def test_sizes_of_known_shapes() -> None:
    size = model_size(SHAPE)
    assert size is not None
    assert (size.total, size.experts, size.head) == (TOTAL, 0, HEAD) == (2792, 0, 800)
    assert model_size({**SHAPE, "tie_word_embeddings": True}).total == TOTAL - HEAD  # type: ignore[union-attr]
    assert model_size({"text_config": SHAPE}) == size
    mixed = model_size(MOE)
    assert mixed is not None and (mixed.total, mixed.experts) == (REST + EXPERTS, EXPERTS)
    qwen3_8b = {"hidden_size": 4096, "num_hidden_layers": 36, "vocab_size": 151936, "num_attention_heads": 32,
                "num_key_value_heads": 8, "head_dim": 128, "intermediate_size": 12288}  # fmt: skip
    # The checkpoint holds 8,190,735,360 parameters (its q/k norms, 2 * 128 a layer, are not counted here).
    assert model_size(qwen3_8b).total == 8_190_735_360 - 36 * 2 * 128  # type: ignore[union-attr]
    assert model_size({"model_type": "other"}) is None


def test_fsdp2(model: str) -> None:
    """Shards of fp32 weight, gradient and two moments, whatever the compute dtype."""
    role = ("student_train", "fsdp2_train")
    for dtype in ("fp32", "bf16"):
        found = held(model, *role, world_size=2, model_args={"model_name_or_path": model, "dtype": dtype})
        assert found == {"weights": 4 * TOTAL / 2, "training": 12 * TOTAL / 2}
    assert held(model, *role, {"offload_policy": True})["in_host_memory"]
    # sgd keeps nothing, so that the gradient is all.
    assert held(model, *role, **{"training_args.optimizer": "sgd"})["training"] == 4 * TOTAL
    assert held(model, "teacher", "fsdp2_infer", world_size=4) == {"weights": 2 * TOTAL / 4}


def test_lora_trains_its_adapters_alone(model: str) -> None:
    # Widths in + out, for two layers: q 8 + 8, k and v 8 + 4, o 8 + 8, MLP 8 + 16 each.
    everywhere, attention = 2 * (16 + 12 + 12 + 16 + 3 * 24), 2 * (16 + 12)
    for target, widths in (("all-linear", everywhere), ("q_proj, v_proj", attention)):
        args = {"model_name_or_path": model, "lora_target": target, "lora_rank": 3}
        found = held(model, "student_train", "fsdp2_train", model_args=args)
        assert found == {"weights": 4 * (TOTAL + 3 * widths), "training": 12 * 3 * widths}


def test_megatron(model: str, moe: str) -> None:
    """bf16: weights 2, gradients 4, masters 4 and two moments 8 bytes, the last two over the data-parallel ranks."""
    role = ("student_train", "megatron_train")
    sizes = {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}
    mine = TOTAL / 4
    assert held(model, *role, sizes, world_size=8) == {"weights": 2 * mine, "training": (4 + 12 / 2) * mine}
    whole = {**sizes, "use_distributed_optimizer": False}
    assert held(model, *role, whole, world_size=8)["training"] == (4 + 12) * mine
    fp32 = {"model_name_or_path": model, "dtype": "fp32"}
    assert held(model, *role, model_args=fp32) == {"weights": 4 * TOTAL, "training": (4 + 8) * TOTAL}
    scoring = ("teacher", "megatron_infer")
    assert held(model, *scoring, sizes, world_size=4) == {"weights": 2 * mine}
    # Experts with ranks of their own are not cut by tensor parallelism.
    split = {"tensor_model_parallel_size": 2, "expert_model_parallel_size": 4}
    assert held(moe, *scoring, split, world_size=4) == {"weights": 2 * (REST / 2 + EXPERTS / 4)}
    assert held(moe, *scoring, {"tensor_model_parallel_size": 2}, world_size=2) == {"weights": REST + EXPERTS}


def test_engines(model: str) -> None:
    role = ("student_infer", "vllm")
    on_devices = {"tensor_parallel_size": 2, "gpu_memory_utilization": 0.6}
    assert held(model, *role, on_devices, device_mapping=[0, 1]) == {"weights": TOTAL, "share": 0.6}
    # Without devices an engine's processes share the host's memory.
    assert held(model, *role, {"cpu_kvcache_space_gb": 2}) == {"weights": 2 * TOTAL, "cache": 2 << 30}
    assert held(model, "student_infer", "hf_infer") == {"weights": 2 * TOTAL}
    assert held("elsewhere", "teacher", "remote", {"base_url": "http://a:1"}) == {}


def test_a_trainer_holds_the_heads_of_teachers(model: str) -> None:
    full = {"opd_args": {"objective": "direct", "support": "full"}, "teacher.model_args.model_name_or_path": model}
    full |= {"pretrain": model, "student_train.world_size": 2}
    (tensor,) = ({"tensor_model_parallel_size": 2},)
    parallel = {"student_train.strategy_args": {"strategy_name": "megatron_train", "strategy_config": tensor}}
    for changes, expected in (({}, 2 * HEAD), (parallel, HEAD)):
        loaded = build_config(changed(PURE, {**full, **changes}), OPD)
        assert plan_as_dict(loaded)["memory"]["student_train"]["heads"] == expected
        assert "teachers' heads" in render_plan_text(loaded)
    sampled = build_config(changed(PURE, {**full, "opd_args": {}}), OPD)
    assert plan_as_dict(sampled)["memory"]["student_train"]["heads"] == 0


def test_a_base_model_is_one_more_scorer(model: str) -> None:
    changes = {"opd_args": {"base_model": model, "extrapolation": 1.5}, "teacher.device_mapping": [0]}
    plan = plan_as_dict(build_config(changed(PURE, changes), OPD))
    assert plan["memory"]["opd_args.base_model"]["weights"] == 2 * TOTAL
    assert plan["sharing"][0] == {"devices": [0], "roles": ["teacher", "opd_args.base_model"]}


def test_who_shares_which_devices() -> None:
    """Mappings that overlap in part make groups of their own."""
    mappings = {"student_train.device_mapping": "range(4)", "student_infer.device_mapping": "[2,3,4,5]"}
    loaded = build_config(changed(PURE, mappings), OPD)
    config = loaded.config
    roles = {"train": config.actor_train, "infer": config.actor_infer, "teacher": config.teachers["default"]}
    assert device_groups(roles) == [
        DeviceGroup((0, 1), ("train",)),
        DeviceGroup((2, 3), ("train", "infer")),
        DeviceGroup((4, 5), ("infer",)),
        DeviceGroup((), ("teacher",)),
    ]
    server = {"strategy_name": "remote", "strategy_config": {"base_url": "http://a:1"}}
    remote = build_config(changed(PURE, {"teacher.strategy_args": server}), OPD).config.teachers["default"]
    assert device_groups({"teacher": remote}) == []


def test_turns() -> None:
    train, infer, teacher = Footprint(4.0, 12.0), Footprint(14.0), Footprint(30.0, in_host_memory=True)
    turns = turn_bytes({"train": train, "infer": infer, "teacher": teacher}, "train", ["infer", "elsewhere"])
    assert turns == {"train": 16.0, "infer": 14.0, "teacher": 0.0, "weight update of infer": 18.0}
    assert turn_bytes({"infer": infer}, "train", ["infer"]) == {"infer": 14.0}


def plan_text(model: str, **changes: Any) -> str:
    text = render_plan_text(build_config(changed(PURE, {"pretrain": model, **changes}), OPD))
    return " ".join(text.partition("estimated memory")[2].partition("rewards:")[0].split())


def test_the_plan_says_who_takes_turns(model: str) -> None:
    def shown(count: float) -> str:
        return f"{count / 2**20:.1f} MiB"

    engine = {"strategy_name": "vllm", "strategy_config": {"gpu_memory_utilization": 0.6}}
    shared = {"student_train.device_mapping": [0], "student_infer.device_mapping": [0]}
    text = plan_text(model, **shared, **{"student_infer.strategy_args": engine})
    assert f"student_train device {shown(4 * TOTAL)} {shown(12 * TOTAL)} -" in text
    assert f"student_infer device {shown(2 * TOTAL)} - with its cache 60% of the device" in text
    assert (
        f"device 0: student_train, student_infer take turns: the largest one takes {shown(16 * TOTAL)} of each device "
        f"(student_train) or 60% of it (student_infer); up to {shown(16 * TOTAL)} for each wait in host memory" in text
    )
    assert "teacher process unknown" in text and "without devices: teacher: unknown" in text
    some = plan_text(model)
    assert f"student_infer, teacher: {shown(18 * TOTAL)} together, beside what is unknown" in some
    alone = plan_text(model, **{"student_train.device_mapping": [0, 1]})
    assert f"devices 0-1: student_train: {shown(16 * TOTAL / 2)} of each" in alone
    everyone = plan_text(model, **{"teacher.model_args.model_name_or_path": model, "student_infer.world_size": 2})
    assert f"student_train, student_infer, teacher: {shown((16 + 2 * 2 + 2) * TOTAL)} together" in everyone


def test_a_model_config_that_cannot_be_read_is_unknown(tmp_path: Path) -> None:
    assert find_model_config(None) is None and find_model_config(str(tmp_path)) is None
    (tmp_path / "config.json").write_text("{")
    assert find_model_config(str(tmp_path)) is None
