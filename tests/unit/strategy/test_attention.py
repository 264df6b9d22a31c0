"""Which attention function a model gets."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from roll_opd.distributed.strategy import attention
from roll_opd.errors import ModelError

CPU, GPU = torch.device("cpu"), torch.device("cuda")
FP32, BF16 = torch.float32, torch.bfloat16
OURS, FLASH = (attention.NAME, True), ("flash_attention_2", True)


def text(**fields) -> SimpleNamespace:
    config = SimpleNamespace(**fields)
    config.get_text_config = lambda: config
    return config


CAUSAL = text(layer_types=["full_attention"] * 2, sliding_window=None)
SLIDING = text(layer_types=["full_attention", "sliding_attention"], sliding_window=8)
CAPPED = text(layer_types=["full_attention"] * 2, attn_logit_softcapping=50.0)


def choose(wanted, config, dtype, device, decodes=False) -> tuple[str, bool]:
    return attention.choose(wanted, config, dtype, device, field="teacher.attn", decodes=decodes)


@pytest.fixture
def flash(monkeypatch):
    def install(two: bool, three: bool = False) -> None:
        monkeypatch.setattr(attention, "is_flash_attn_2_available", lambda: two)
        monkeypatch.setattr(attention, "is_flash_attn_3_available", lambda: three)

    return install


def test_automatically(flash) -> None:
    flash(True)
    for wanted in (None, "auto"):
        assert choose(wanted, CAUSAL, BF16, CPU) == OURS
        assert choose(wanted, SLIDING, BF16, CPU) == ("sdpa", False)
        assert choose(wanted, CAPPED, BF16, CPU) == ("eager", False)
        assert all(choose(wanted, config, BF16, GPU) == FLASH for config in (CAUSAL, SLIDING, CAPPED))
        assert choose(wanted, CAUSAL, FP32, GPU) == OURS, "flash-attention has no fp32"
    flash(False)
    assert choose("auto", CAUSAL, BF16, GPU) == OURS
    assert choose("auto", text(sliding_window=None), BF16, GPU) == OURS
    assert choose("auto", text(sliding_window=8), BF16, GPU) == ("sdpa", False)
    assert choose("auto", text(sliding_window=8, use_sliding_window=False), BF16, GPU) == OURS


def test_as_the_config_says(flash) -> None:
    flash(True, True)
    assert choose("fa2", SLIDING, BF16, GPU) == FLASH
    assert choose("fa3", CAUSAL, BF16, GPU) == ("flash_attention_3", True)
    assert choose("eager", CAPPED, FP32, CPU) == ("eager", False)
    assert choose("sdpa", CAUSAL, FP32, CPU) == ("sdpa", False)
    assert choose("flex", CAUSAL, FP32, GPU) == ("flex_attention", False)


def test_decoding_needs_ours_where_it_serves(flash) -> None:
    flash(True)
    assert choose("fa2", CAUSAL, BF16, GPU, decodes=True) == OURS
    assert choose(None, CAUSAL, BF16, GPU, decodes=True) == OURS
    assert choose(None, SLIDING, BF16, CPU, decodes=True) == ("sdpa", False)


@pytest.mark.parametrize(
    ("wanted", "config", "dtype", "device", "installed"),
    [
        ("fa2", CAUSAL, BF16, CPU, True),
        ("fa2", CAUSAL, FP32, GPU, True),
        ("fa2", CAUSAL, BF16, GPU, False),
        ("fa3", CAUSAL, BF16, GPU, True),
        ("flex", CAUSAL, FP32, CPU, True),
        ("sdpa", CAPPED, FP32, CPU, True),
    ],
)
def test_what_cannot_run_here_is_refused(flash, wanted, config, dtype, device, installed) -> None:
    flash(installed)
    with pytest.raises(ModelError, match=rf"teacher\.attn: '{wanted}'.*use auto"):
        choose(wanted, config, dtype, device)


@pytest.mark.parametrize("width", [4, 6], ids=["values as wide as keys", "wider values"])
@pytest.mark.parametrize("new", [1, 3], ids=["one token", "a prompt"])
@pytest.mark.parametrize("kv_heads", [1, 2, 4])
def test_decoding_sees_the_visible_keys_of_its_own_head(kv_heads: int, new: int, width: int) -> None:
    """Against the sum written out, with a cache that is longer than what has been filled."""
    torch.manual_seed(0)
    query, key = torch.randn(2, 4, new, 4), torch.randn(2, kv_heads, 9, 4)
    value = torch.randn(2, kv_heads, 9, width)
    visible = torch.rand(2, 1, new, 7) > 0.3
    visible[..., 0] = True
    out, _ = attention.varlen_attention(torch.nn.Module(), query, key, value, visible, scaling=0.5)
    assert out.shape == (2, new, 4, width)
    for head in range(4):
        k, v = (x[:, head * kv_heads // 4, :7] for x in (key, value))
        weights = (0.5 * query[:, head] @ k.transpose(1, 2)).masked_fill(~visible[:, 0], -torch.inf).softmax(-1)
        torch.testing.assert_close(out[:, :, head], weights @ v)
