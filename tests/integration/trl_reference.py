"""What TRL computes on given tensors. Run by TRL's own Python, which has nothing of ours: ``trl_reference.py IN OUT``.

Both files are NumPy archives without pickles. ``n`` positions, ``V`` vocabulary, ``H`` and ``G`` widths of student and
teacher, ``k`` the support. Each case writes ``<case>/value`` (one number a position) and, where TRL's function is
differentiable, the gradient of the sum of values.

TRL's functions are called as they are. Those that are methods of a trainer get a stand-in for ``self`` with only the
settings they read, because a trainer needs a model, a data set and a tokenizer that play no part in the formula.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import torch
import trl
from torch import Tensor
from trl.experimental.async_distillation.async_distillation_trainer import _jsd_loss_chunk
from trl.experimental.gkd.gkd_trainer import GKDTrainer
from trl.experimental.sdft.loss_utils import (
    compute_full_logit_self_distillation_loss,
    compute_sampled_token_self_distillation_loss,
    compute_topk_self_distillation_loss,
)
from trl.experimental.server_distillation.server_distillation_trainer import ServerDistillationTrainer
from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.utils import selective_log_softmax

Arrays = dict[str, np.ndarray]


def with_gradient(name: str, function: Callable[[Tensor], Tensor], leaf: Tensor, out: Arrays) -> None:
    """Write values and the gradient of their sum with respect to ``leaf``."""
    leaf = leaf.clone().requires_grad_(True)
    value_n = function(leaf)
    value_n.sum().backward()
    assert leaf.grad is not None
    out[f"{name}/value"] = value_n.detach().numpy()
    out[f"{name}/grad"] = leaf.grad.numpy()


def sampled(student_nV: Tensor, teacher_nV: Tensor, targets_n: Tensor, out: Arrays) -> None:
    """Estimators on the sampled token."""

    # d.detach() * logprob: its gradient is that of k2, and its factor is k1.
    def sampled_token_loss(logits_nV: Tensor) -> Tensor:
        return compute_sampled_token_self_distillation_loss(logits_nV, teacher_nV, targets_n, distillation_alpha=1.0)

    with_gradient("sdft_sampled", sampled_token_loss, student_nV, out)
    logprobs_n = selective_log_softmax(student_nV, targets_n)
    out["k1/value"] = (sampled_token_loss(student_nV) / logprobs_n).numpy()

    teacher_logprobs_n = selective_log_softmax(teacher_nV, targets_n)
    with_gradient(
        "k3",
        lambda logits_nV: grpo_kl(selective_log_softmax(logits_nV, targets_n), teacher_logprobs_n),
        student_nV,
        out,
    )


def grpo_kl(logprobs_n: Tensor, ref_logprobs_n: Tensor) -> Tensor:
    """GRPO's loss with advantages of 0 and a KL coefficient of 1, one token a call: its per-token KL."""
    trainer = SimpleNamespace(
        args=SimpleNamespace(use_bias_correction_kl=False, delta=None),
        accelerator=SimpleNamespace(reduce=lambda x, reduction: x, gather=lambda x: x),
        model=SimpleNamespace(training=False),
        beta=1.0,
        loss_type="dr_grpo",
        max_completion_length=1,
        importance_sampling_level="token",
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        epsilon_low=0.2,
        epsilon_high=0.2,
        use_vllm=False,
        aux_loss_enabled=False,
        _entropy_bonus_enabled=False,
        _metrics={"eval": defaultdict(list)},
    )
    values = []
    for logprob, ref_logprob in zip(logprobs_n, ref_logprobs_n, strict=True):
        logprob_11 = logprob.reshape(1, 1)
        trainer._get_per_token_logps_and_entropies = lambda *_, now=logprob_11, **__: (now, torch.zeros_like(now), None)
        one = torch.ones((1, 1), dtype=torch.long)
        inputs = {
            "prompt_ids": one,
            "prompt_mask": one,
            "completion_ids": one,
            "completion_mask": one,
            "advantages": torch.zeros(1, dtype=logprobs_n.dtype),
            "ref_per_token_logps": ref_logprob.reshape(1, 1),
        }
        values.append(GRPOTrainer._compute_loss(trainer, None, inputs))
    return torch.stack(values)


def full(student_nV: Tensor, teacher_nV: Tensor, betas: list[float], out: Arrays) -> None:
    """Divergences over the vocabulary, from logits. TRL's beta 0 is the forward KL and 1 the reverse KL."""
    for beta in betas:
        with_gradient(
            f"gkd/{beta:g}",
            lambda logits_nV, beta=beta: GKDTrainer.generalized_jsd_loss(
                logits_nV, teacher_nV, beta=beta, temperature=1.0, reduction="none"
            ).sum(-1),
            student_nV,
            out,
        )
        with_gradient(
            f"sdft_full/{beta:g}",
            lambda logits_nV, beta=beta: compute_full_logit_self_distillation_loss(
                logits_nV, teacher_nV, distillation_alpha=beta
            ),
            student_nV,
            out,
        )


def chunked(given: Arrays, betas: list[float], out: Arrays) -> None:
    """What ``DistillationTrainer`` trains with: from hidden states and heads, always in fp32."""
    teacher = [torch.from_numpy(given[name]).float() for name in ("teacher_hidden_nG", "teacher_weight_VG")]
    for beta in betas:
        hidden_nH, weight_VH = (
            torch.from_numpy(given[name]).float().requires_grad_(True)
            for name in ("student_hidden_nH", "student_weight_VH")
        )
        value_n, entropy_n = ChunkedDivergenceFunction.apply(hidden_nH, weight_VH, None, *teacher, None, beta)
        value_n.sum().backward()
        name = f"chunked/{beta:g}"
        out[f"{name}/value"] = value_n.detach().numpy()
        out[f"{name}/grad_hidden"] = hidden_nH.grad.numpy()
        out[f"{name}/grad_weight"] = weight_VH.grad.numpy()
        out["entropy/value"] = entropy_n.numpy()


def teacher_topk(student_nV: Tensor, teacher_nV: Tensor, top_k: int, out: Arrays) -> None:
    """Forward KL on the teacher's top-k, with and without the bucket of the rest."""
    logprobs_nk, ids_nk = teacher_nV.log_softmax(-1).topk(top_k, dim=-1)

    for add_tail in (True, False):
        trainer = SimpleNamespace(
            loss_add_tail=add_tail, _reduce_divergence_loss=ServerDistillationTrainer._reduce_divergence_loss
        )

        def one_by_one(logits_nV: Tensor, trainer: SimpleNamespace = trainer) -> Tensor:
            # The method averages over the tokens of its batch: one token a call gives the values themselves.
            return torch.stack(
                [
                    ServerDistillationTrainer._compute_server_forward_kl_loss(
                        trainer,
                        {"topk_logprobs": logprobs_1k[None, None], "topk_token_ids": ids_1k[None, None]},
                        logits_V.log_softmax(-1)[None, None],
                        torch.zeros((1, 1), dtype=torch.long),
                    )
                    for logits_V, logprobs_1k, ids_1k in zip(logits_nV, logprobs_nk, ids_nk, strict=True)
                ]
            )

        with_gradient(f"server_topk/{'tail' if add_tail else 'no_tail'}", one_by_one, student_nV, out)


def teacher_topk_from_hidden(given: Arrays, out: Arrays) -> None:
    """The same divergence as the asynchronous trainer forms it, from hidden states and head, always in fp32."""
    hidden_nH, weight_VH = (
        torch.from_numpy(given[name]).float().requires_grad_(True)
        for name in ("student_hidden_nH", "student_weight_VH")
    )
    teacher_nV = torch.from_numpy(given["teacher_hidden_nG"]).float() @ torch.from_numpy(given["teacher_weight_VG"]).T
    logprobs_nk, ids_nk = teacher_nV.log_softmax(-1).topk(int(given["top_k"]), dim=-1)
    values = [
        _jsd_loss_chunk(
            hidden_H[None],
            weight_VH,
            lm_head_bias=None,
            logit_scale=1.0,
            final_logit_softcapping=None,
            target_ids_chunk=ids_k[None],
            teacher_logps_chunk=logprobs_k[None],
            candidate_mask_chunk=torch.ones_like(ids_k[None], dtype=torch.bool),
            beta=0.0,
            temperature=1.0,
            add_tail_bucket=True,
            teacher_id_idx_chunk=None,
            num_teachers=1,
        )[0]
        for hidden_H, logprobs_k, ids_k in zip(hidden_nH, logprobs_nk, ids_nk, strict=True)
    ]
    value_n = torch.stack(values)
    value_n.sum().backward()
    out["async_topk/value"] = value_n.detach().numpy()
    out["async_topk/grad_hidden"] = hidden_nH.grad.numpy()
    out["async_topk/grad_weight"] = weight_VH.grad.numpy()


def student_topk(student_nV: Tensor, teacher_nV: Tensor, top_k: int, betas: list[float], out: Arrays) -> None:
    """Divergences on the student's top-k with the bucket of the rest."""
    for beta in betas:
        with_gradient(
            f"sdft_topk/{beta:g}",
            lambda logits_nV, beta=beta: compute_topk_self_distillation_loss(
                logits_nV, teacher_nV, distillation_topk=top_k, distillation_alpha=beta, distillation_add_tail=True
            ),
            student_nV,
            out,
        )


def main(source: str, target: str) -> None:
    """Read the tensors, write TRL's numbers."""
    with np.load(source, allow_pickle=False) as archive:
        given = dict(archive)
    student_nV, teacher_nV = (torch.from_numpy(given[name]) for name in ("student_logits_nV", "teacher_logits_nV"))
    betas, top_k = [float(beta) for beta in given["betas"]], int(given["top_k"])
    out: Arrays = {"version": np.array(trl.__version__)}
    sampled(student_nV, teacher_nV, torch.from_numpy(given["targets_n"]), out)
    full(student_nV, teacher_nV, betas, out)
    chunked(given, betas, out)
    teacher_topk(student_nV, teacher_nV, top_k, out)
    teacher_topk_from_hidden(given, out)
    student_topk(student_nV, teacher_nV, top_k, betas, out)
    np.savez(target, **out)


if __name__ == "__main__":
    main(*sys.argv[1:])
