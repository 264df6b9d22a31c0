"""How text is sampled."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from roll_opd.configs.field_spec import as_list, parse_with, ranged
from roll_opd.errors import ConfigError


def _top_k(value: Any, path: str) -> Any:
    # vLLM writes "off" as -1, Hugging Face as 0. One spelling from here on.
    return 0 if value == -1 and not isinstance(value, bool) else value


def _num_beams(value: Any, path: str) -> Any:
    if isinstance(value, int) and not isinstance(value, bool) and value != 1:
        raise ConfigError(path, f"must be 1, got {value}: beam search does not sample from the policy")
    return value


@dataclass(frozen=True)
class GeneratingArguments:
    """Sampling settings. The defaults sample from the model's own distribution, which the OPD estimator assumes."""

    do_sample: bool = True
    """False takes the most likely token at each step; for validation only."""
    temperature: float = ranged(1.0, ge=0)
    """Divides the logits before sampling. Above 0 for training; 0 in validation means greedy."""
    top_p: float = ranged(1.0, gt=0, le=1)
    """Keep the smallest set of tokens with this probability mass; 1 keeps all."""
    top_k: int = field(default=0, metadata=parse_with(_top_k))
    """Keep this many most likely tokens; 0 (or -1) keeps all."""
    min_p: float = ranged(0.0, ge=0, le=1)
    """Drop tokens below this fraction of the most likely token's probability; 0 keeps all."""
    repetition_penalty: float = ranged(1.0, gt=0)
    """Above 1 discourages repeated tokens; 1 is off."""
    max_new_tokens: int | None = ranged(None, ge=1)
    """Tokens sampled at most; null means the pipeline's `response_length`."""
    num_return_sequences: int | None = ranged(None, ge=1)
    """Samples per prompt; null means `num_return_sequences_in_group` in training and 1 in validation."""
    num_beams: int = field(default=1, metadata=parse_with(_num_beams))
    """Must be 1; kept so that ROLL's files load."""
    stop_strings: list[str] | None = field(default=None, metadata=parse_with(as_list))
    """Texts that end a response."""
    include_stop_str_in_output: bool = True
    """Keep the stop string's tokens in the response: they were sampled, so they are trained."""
    ignore_eos: bool = False
    """Sample on after the end-of-sequence token; for benchmarks."""

    @property
    def is_untruncated(self) -> bool:
        """True when the samples come from the model's softmax at temperature 1 and from nothing else."""
        neutral = self.temperature == 1 and self.top_p == 1 and self.top_k <= 0 and self.min_p == 0
        return self.do_sample and neutral and self.repetition_penalty == 1
