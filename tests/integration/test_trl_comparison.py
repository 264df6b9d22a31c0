"""Our divergences give TRL's numbers and gradients on the same tensors, where TRL has them.

TRL lives in an environment of its own (``make test-trl``); ``trl_reference.py`` calls its functions there. The table
that this prints stands in ``docs/divergences.md`` with the conventions that differ.
"""

from __future__ import annotations

import os
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from roll_opd.algorithms.chunked_head import FullTarget, Head, SupportTarget, head_outputs, support_scores, tail_logprob
from roll_opd.algorithms.divergences import bucket_divergence, direct_sampled_loss, policy_gradient_score
from roll_opd.algorithms.kl import kl_estimate

pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]
REFERENCE = Path(__file__).with_name("trl_reference.py")
PAGE = REPO / "docs" / "divergences.md"

N, V, H, G, TOP_K = 24, 503, 16, 24, 16
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)
CHUNK = 7  # several chunks, the last one shorter

TOLERANCE = {np.dtype("float64"): 1e-12, np.dtype("float32"): 1e-6}
"""Of ``|ours - TRL| / max(1, |TRL|)``, the largest over all elements."""

Arrays = dict[str, np.ndarray]
Results = dict[str, Tensor]


def given() -> Arrays:
    """A student whose logits vary by 2, a teacher that half agrees, and tokens that the student sampled."""
    random = np.random.default_rng(2026)
    student_nV = random.normal(0, 2, (N, V))
    teacher_nV = 0.8 * student_nV + random.normal(0, 1.2, (N, V))
    targets_n = (student_nV + random.gumbel(size=(N, V))).argmax(-1)
    hidden = {"student_hidden_nH": (N, H), "teacher_hidden_nG": (N, G)}
    weights = {"student_weight_VH": (V, H), "teacher_weight_VG": (V, G)}
    return (
        {"student_logits_nV": student_nV, "teacher_logits_nV": teacher_nV, "targets_n": targets_n}
        | {name: random.normal(0, 1, shape).astype(np.float32) for name, shape in hidden.items()}
        | {name: random.normal(0, 1.5 / shape[1] ** 0.5, shape).astype(np.float32) for name, shape in weights.items()}
        | {"betas": np.array(BETAS), "top_k": np.array(TOP_K)}
    )


# --- ours -------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tensors:
    """The given tensors; ``student_logits_nV`` and the student's hidden states and head are to be differentiated by."""

    student_logits_nV: Tensor
    teacher_logits_nV: Tensor
    targets_n: Tensor
    student_hidden_nH: Tensor
    student_weight_VH: Tensor
    teacher_hidden_nG: Tensor
    teacher_weight_VG: Tensor

    @classmethod
    def of(cls, arrays: Arrays) -> Tensors:
        tensors = {name: torch.from_numpy(array) for name, array in arrays.items() if name in cls.__annotations__}
        for name in ("student_logits_nV", "student_hidden_nH", "student_weight_VH"):
            tensors[name].requires_grad_(True)
        return cls(**tensors)

    def sampled(self) -> tuple[Tensor, Tensor]:
        """Student's and teacher's log-probabilities of the sampled tokens."""
        at = self.targets_n[:, None]
        student, teacher = (
            x.log_softmax(-1).gather(-1, at)[:, 0] for x in (self.student_logits_nV, self.teacher_logits_nV)
        )
        return student, teacher


def by_logits(tensors: Tensors, value_n: Tensor) -> Results:
    value_n.sum().backward()
    assert tensors.student_logits_nV.grad is not None
    return {"value": value_n.detach(), "grad": tensors.student_logits_nV.grad}


def by_hidden(tensors: Tensors, value_n: Tensor) -> Results:
    value_n.sum().backward()
    assert tensors.student_hidden_nH.grad is not None and tensors.student_weight_VH.grad is not None
    return {
        "value": value_n.detach(),
        "grad_hidden": tensors.student_hidden_nH.grad,
        "grad_weight": tensors.student_weight_VH.grad,
    }


def k1(tensors: Tensors) -> Results:
    return {"value": kl_estimate("kl", *tensors.sampled()).detach()}


def k1_score(tensors: Tensors) -> Results:
    """The policy gradient: the score is k1 with its sign turned."""
    logprobs_n, teacher_logprobs_n = tensors.sampled()
    advantages_n = policy_gradient_score("reverse_kl", (logprobs_n - teacher_logprobs_n).detach())
    return by_logits(tensors, -advantages_n * logprobs_n)


def k2_gradient(tensors: Tensors) -> Results:
    return {"grad": by_logits(tensors, direct_sampled_loss("reverse_kl", *tensors.sampled()))["grad"]}


def k2_estimate_gradient(tensors: Tensors) -> Results:
    return {"grad": by_logits(tensors, kl_estimate("mse", *tensors.sampled()))["grad"]}


def k3(tensors: Tensors) -> Results:
    return by_logits(tensors, direct_sampled_loss("forward_kl", *tensors.sampled()))


def k3_estimate(tensors: Tensors) -> Results:
    return by_logits(tensors, kl_estimate("k3", *tensors.sampled()))


def named(beta: float) -> tuple[str, float]:
    """TRL's beta as our divergence and ``jsd_beta``; the latter is not read at the ends."""
    return {0.0: "forward_kl", 1.0: "reverse_kl"}.get(beta, "jsd"), beta if 0 < beta < 1 else 0.5


def identity_head(size: int) -> Head:
    """With it hidden states are logits, and their gradient is the logits'."""
    return Head(torch.eye(size, dtype=torch.float64))


def full(tensors: Tensors, beta: float) -> Results:
    divergence, jsd_beta = named(beta)
    head = identity_head(V)
    target = FullTarget(divergence, tensors.teacher_logits_nV, head, jsd_beta)
    out = head_outputs(tensors.student_logits_nV, head, tensors.targets_n, [target], chunk_tokens=CHUNK)
    return by_logits(tensors, out.divergences[0])


def buckets(tensors: Tensors, beta: float) -> Results:
    divergence, jsd_beta = named(beta)
    student, teacher = (x.log_softmax(-1) for x in (tensors.student_logits_nV, tensors.teacher_logits_nV))
    return by_logits(tensors, bucket_divergence(divergence, student, teacher, jsd_beta))


def from_hidden(tensors: Tensors, beta: float) -> Results:
    divergence, jsd_beta = named(beta)
    target = FullTarget(divergence, tensors.teacher_hidden_nG, Head(tensors.teacher_weight_VG), jsd_beta)
    student = Head(tensors.student_weight_VH)
    out = head_outputs(tensors.student_hidden_nH, student, tensors.targets_n, [target], chunk_tokens=CHUNK)
    return by_hidden(tensors, out.divergences[0])


def entropy(tensors: Tensors) -> Results:
    head = Head(tensors.student_weight_VH)
    out = head_outputs(tensors.student_hidden_nH, head, tensors.targets_n, chunk_tokens=CHUNK)
    return {"value": out.entropy_n.detach()}


def teacher_topk(tensors: Tensors) -> Results:
    head = identity_head(V)
    _, ids, logprobs, tail = support_scores(tensors.teacher_logits_nV, head, tensors.targets_n, TOP_K)
    target = SupportTarget("forward_kl", ids, logprobs, tail)
    out = head_outputs(tensors.student_logits_nV, head, tensors.targets_n, [target], chunk_tokens=CHUNK)
    return by_logits(tensors, out.divergences[0])


def teacher_topk_renormalised(tensors: Tensors) -> Results:
    """Ours without a tail sums over the set, TRL makes both sum to 1 first. With their masses ``Q`` and ``P`` in it:

    ``sum (q/Q) log((q/Q) / (p/P)) = (1/Q) sum q log(q/p) - log Q + log P``.
    """
    head = identity_head(V)
    _, ids, logprobs, _ = support_scores(tensors.teacher_logits_nV, head, tensors.targets_n, TOP_K)
    target = SupportTarget("forward_kl", ids, logprobs)
    out = head_outputs(tensors.student_logits_nV, head, tensors.targets_n, [target], chunk_tokens=CHUNK)
    log_q = logprobs.logsumexp(-1)
    log_p = tensors.student_logits_nV.log_softmax(-1).gather(-1, ids).logsumexp(-1)
    return by_logits(tensors, out.divergences[0] / log_q.exp() - log_q + log_p)


def teacher_topk_from_hidden(tensors: Tensors) -> Results:
    teacher, student = Head(tensors.teacher_weight_VG), Head(tensors.student_weight_VH)
    _, ids, logprobs, tail = support_scores(tensors.teacher_hidden_nG, teacher, tensors.targets_n, TOP_K)
    target = SupportTarget("forward_kl", ids, logprobs, tail)
    out = head_outputs(tensors.student_hidden_nH, student, tensors.targets_n, [target], chunk_tokens=CHUNK)
    return by_hidden(tensors, out.divergences[0])


def student_topk(tensors: Tensors, beta: float) -> Results:
    divergence, jsd_beta = named(beta)
    head = identity_head(V)
    ids = tensors.student_logits_nV.detach().topk(TOP_K, dim=-1).indices
    logprobs = tensors.teacher_logits_nV.log_softmax(-1).gather(-1, ids)
    target = SupportTarget(divergence, ids, logprobs, tail_logprob(tensors.teacher_logits_nV, ids), jsd_beta)
    out = head_outputs(tensors.student_logits_nV, head, tensors.targets_n, [target], chunk_tokens=CHUNK)
    return by_logits(tensors, out.divergences[0])


# --- side by side -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Comparison:
    """One row of the table: what is compared, TRL's function, its case in the results, and ours."""

    name: str
    trl: str
    case: str
    ours: Callable[[Tensors], Results]


def over_betas(name: str, trl: str, case: str, ours: Callable[[Tensors, float], Results]) -> list[Comparison]:
    labels = {0.0: "forward KL", 1.0: "reverse KL"}
    return [
        Comparison(f"{labels.get(beta, f'JSD {beta:g}')}, {name}", trl, f"{case}/{beta:g}", partial(ours, beta=beta))
        for beta in BETAS
    ]


COMPARISONS = [
    Comparison("k1, `kl_estimate`", "`compute_sampled_token_self_distillation_loss`", "k1", k1),
    Comparison(
        "k1 as a score, `policy_gradient_score`",
        "`compute_sampled_token_self_distillation_loss`",
        "sdft_sampled",
        k1_score,
    ),
    Comparison(
        "k2, `direct_sampled_loss`", "`compute_sampled_token_self_distillation_loss`", "sdft_sampled", k2_gradient
    ),
    Comparison(
        "k2, `kl_estimate`", "`compute_sampled_token_self_distillation_loss`", "sdft_sampled", k2_estimate_gradient
    ),
    Comparison("k3, `direct_sampled_loss`", "`GRPOTrainer._compute_loss`", "k3", k3),
    Comparison("k3, `kl_estimate`", "`GRPOTrainer._compute_loss`", "k3", k3_estimate),
    *over_betas("`FullTarget`", "`GKDTrainer.generalized_jsd_loss`", "gkd", full),
    *over_betas("`bucket_divergence`", "`compute_full_logit_self_distillation_loss`", "sdft_full", buckets),
    *over_betas("`FullTarget` from hidden states", "`ChunkedDivergenceFunction`", "chunked", from_hidden),
    Comparison("entropy, `head_outputs`", "`ChunkedDivergenceFunction`", "entropy", entropy),
    Comparison(
        "forward KL, teacher's top-k and tail, `SupportTarget`",
        "`ServerDistillationTrainer._compute_server_forward_kl_loss`",
        "server_topk/tail",
        teacher_topk,
    ),
    Comparison(
        "forward KL, teacher's top-k and tail, `SupportTarget` from hidden states",
        "`async_distillation._jsd_loss_chunk`",
        "async_topk",
        teacher_topk_from_hidden,
    ),
    Comparison(
        "forward KL, teacher's top-k, no tail, renormalised",
        "`ServerDistillationTrainer._compute_server_forward_kl_loss`",
        "server_topk/no_tail",
        teacher_topk_renormalised,
    ),
    *over_betas(
        "student's top-k and tail, `SupportTarget`", "`compute_topk_self_distillation_loss`", "sdft_topk", student_topk
    ),
]


def trl_python() -> str:
    """TRL's Python: the environment variable, which must work, or the environment of ``make test-trl``."""
    if named_python := os.environ.get("TRL_PYTHON"):
        return named_python
    python = REPO / ".venv-trl" / "bin" / "python"
    look = "import importlib.metadata as metadata; metadata.version('trl')"
    if not python.exists() or subprocess.run([python, "-c", look], capture_output=True).returncode != 0:
        pytest.skip("TRL is not installed: make test-trl")
    return str(python)


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Arrays:
    python = trl_python()
    folder = tmp_path_factory.mktemp("trl")
    np.savez(folder / "in.npz", **given())
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRL_EXPERIMENTAL_SILENCE": "1", "CUDA_VISIBLE_DEVICES": ""}
    # Its own packages only: ours must not be found there.
    environment.pop("PYTHONPATH", None)
    done = subprocess.run(
        [python, REFERENCE, folder / "in.npz", folder / "out.npz"],
        env=environment, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    with np.load(folder / "out.npz", allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="module")
def table(reference: Arrays, request: pytest.FixtureRequest) -> Iterator[list[str]]:
    """Rows as they are measured; printed at the end, whatever is captured."""
    rows: list[str] = []
    yield rows
    plugins = request.config.pluginmanager
    reporter, capture = plugins.getplugin("terminalreporter"), plugins.getplugin("capturemanager")
    head = ["", f"TRL {reference['version']}", "| ours | TRL | dtype | value | gradient |", "|---|---|---|---|---|"]
    with capture.global_and_fixture_disabled():
        for line in head + rows:
            reporter.write_line(line)


def difference(ours: np.ndarray, theirs: np.ndarray) -> float:
    assert ours.dtype == theirs.dtype and ours.shape == theirs.shape
    return float((np.abs(ours - theirs) / np.maximum(1.0, np.abs(theirs))).max())


def test_trl_is_the_version_that_the_documentation_names(reference: Arrays) -> None:
    assert str(reference["version"]).startswith("1.16.")


@pytest.mark.parametrize("comparison", COMPARISONS, ids=lambda comparison: comparison.name.replace("`", ""))
def test_same_numbers_as_trl(comparison: Comparison, reference: Arrays, table: list[str]) -> None:
    ours = {name: tensor.numpy() for name, tensor in comparison.ours(Tensors.of(given())).items()}
    theirs = {name: reference[f"{comparison.case}/{name}"] for name in ours}
    differences = {name: difference(ours[name], theirs[name]) for name in ours}
    gradients = [size for name, size in differences.items() if name != "value"]
    dtype = next(iter(theirs.values())).dtype
    value = f"{differences['value']:.0e}" if "value" in differences else "–"
    gradient = f"{max(gradients):.0e}" if gradients else "–"
    table.append(f"| {comparison.name} | {comparison.trl} | {dtype} | {value} | {gradient} |")
    assert max(differences.values()) <= TOLERANCE[dtype], differences
    # A case in which nothing happens would pass as well.
    assert all(np.abs(theirs[name]).max() > 1e-3 for name in theirs)


def test_documentation_has_every_comparison() -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert [row.name for row in COMPARISONS if f"| {row.name} | {row.trl} |" not in page] == []
