"""Which names are secrets."""

from __future__ import annotations

import pytest

from roll_opd.configs.builder import field_types
from roll_opd.configs.masking import looks_secret, without_secrets
from roll_opd.configs.pipeline_config import RLVRConfig
from roll_opd.configs.worker_config import RewardConfig, TeacherConfig


@pytest.mark.parametrize(
    "name",
    ["judge_api_key", "WANDB_API_KEY", "HF_TOKEN", "token", "apiKey", "OPENAI_APIKEY", "client_secret", "dbPassword",
     "AWS_SECRET_ACCESS_KEY", "passwd", "private-key"],
)  # fmt: skip
def test_secrets(name):
    assert looks_secret(name)


@pytest.mark.parametrize(
    "name",
    ["max_new_tokens", "use_token_reward", "tokenizer_name_or_path", "token_mean", "key", "keys", "monkey", "apiary",
     "secretary", "max_tokens_per_microbatch_in_train", "TOKENIZERS_PARALLELISM", "", "***"],
)  # fmt: skip
def test_names_that_are_no_secrets(name):
    assert not looks_secret(name)


def test_our_own_fields_are_masked_for_the_judge_only():
    ours = {name for cls in (RLVRConfig, RewardConfig, TeacherConfig) for name in field_types(cls)}
    assert {name for name in ours if looks_secret(name)} == {"judge_api_key"}


def test_nothing_is_hidden_where_nothing_is_set():
    values = {"api_key": None, "use_secret": True, 1: [{"secret": {"a": 1}}, (2,)]}
    assert without_secrets(values) == {"api_key": None, "use_secret": True, 1: [{"secret": "***"}, (2,)]}
    assert values[1][0] == {"secret": {"a": 1}}
