"""Log-probabilities and entropies of chosen tokens without ever holding ``[tokens, vocabulary]``.

Shapes: ``n`` tokens, ``H`` hidden size, ``V`` vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint


def _chunk(hidden_nH: Tensor, head_VH: Tensor, targets_n: Tensor, bias_V: Tensor | None, soft_cap: float | None):
    logits_nV = torch.nn.functional.linear(hidden_nH, head_VH, bias_V).float()
    if soft_cap is not None:
        logits_nV = soft_cap * torch.tanh(logits_nV / soft_cap)
    log_z_n = torch.logsumexp(logits_nV, dim=-1)
    logprob_n = logits_nV.gather(-1, targets_n[:, None]).squeeze(-1) - log_z_n
    # H = log Z - E[logit]; the product is formed on probabilities, so a padded -inf logit would be NaN: none gets here.
    entropy_n = log_z_n - (torch.exp(logits_nV - log_z_n[:, None]) * logits_nV).sum(dim=-1)
    return logprob_n, entropy_n


def chunked_token_logprobs(
    hidden_nH: Tensor,
    head_VH: Tensor,
    targets_n: Tensor,
    *,
    bias_V: Tensor | None = None,
    soft_cap: float | None = None,
    chunk_tokens: int = 1024,
) -> tuple[Tensor, Tensor]:
    """Return the log-probability of each target and the entropy of each distribution, both ``[n]`` float32.

    The softmax is fp32 whatever the dtype of the inputs. Chunks are recomputed in the backward pass, so the peak is
    ``chunk_tokens * V`` instead of ``n * V``.

    Args:
        hidden_nH: final hidden states, already shifted to the position that predicts the target.
        head_VH: output projection, trimmed to the tokenizer's vocabulary.
        targets_n: int64 token ids.
        bias_V: the projection's bias, if the model has one.
        soft_cap: ``cap * tanh(logits / cap)`` for models that bound their logits (Gemma 2).
        chunk_tokens: tokens per chunk.
    """
    logprobs: list[Tensor] = []
    entropies: list[Tensor] = []
    for start in range(0, len(targets_n), chunk_tokens):
        part = slice(start, start + chunk_tokens)
        args = (hidden_nH[part], head_VH, targets_n[part], bias_V, soft_cap)
        if torch.is_grad_enabled() and (hidden_nH.requires_grad or head_VH.requires_grad):
            logprob, entropy = checkpoint(_chunk, *args, use_reentrant=False, preserve_rng_state=False)
        else:
            logprob, entropy = _chunk(*args)
        logprobs.append(logprob)
        entropies.append(entropy)
    if not logprobs:
        # Still a function of the inputs, so that a rank without tokens takes part in the backward pass.
        empty = (hidden_nH.sum() * 0.0 + head_VH.sum() * 0.0).float().expand(0)
        return empty, empty
    return torch.cat(logprobs), torch.cat(entropies)
