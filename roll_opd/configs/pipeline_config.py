"""Roles and algorithm: what a pipeline trains, against whom, and by which estimator."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from dataclasses_json import DataClassJsonMixin

from roll_opd.configs.base_config import BaseConfig
from roll_opd.configs.field_spec import ranged
from roll_opd.configs.opd_args import OPDArguments
from roll_opd.configs.worker_config import (
    RewardConfig,
    TeacherArguments,
    TeacherConfig,
    ValidationConfig,
    WorkerConfig,
)

Mode = Literal["pure_opd", "mixed_opd", "rl"]
AdvantageEstimator = Literal[
    "gae", "reinforce", "reinforce++", "grpo", "rloo", "gigpo", "step_reinforce", "agentic_reinforce"
]
LossAggMode = Literal["token-mean", "seq-mean-token-sum", "seq-mean-token-mean", "seq-mean-token-sum-norm"]


@dataclass(frozen=True)
class TrainInferWeightArguments:
    """Importance weight between the trainer's and the sampling engine's probabilities."""

    enabled: bool = False
    """Weight each token's loss by the clipped ratio."""
    weight_type: Literal["token", "segment", "geometric", "sequence"] = "token"
    """What the ratio is taken over."""
    upper_bound: float | None = ranged(1.2, gt=0)
    """Ratios above are cut to this; null: no bound."""
    detach: bool = True
    """Read by ROLL. Here the weight is made of numbers from before the update, so there is no gradient to keep out."""


@dataclass(frozen=True)
class TrainInferFilterArguments:
    """Drops tokens or sequences whose two probabilities lie too far apart."""

    enabled: bool = False
    """Apply this filter."""
    agg_type: Literal["token", "segment", "geometric", "sequence"] = "token"
    """What the difference is taken over."""
    ratio_enabled: bool = True
    """Test the ratio against `ratio_low`..`ratio_high`."""
    ratio_low: float = ranged(0.8, ge=0)
    """Lowest ratio that is kept; below `ratio_high`."""
    ratio_high: float = ranged(1.2, gt=0)
    """Highest ratio that is kept."""
    diff_enabled: bool = False
    """Test the difference of probabilities against `diff_low`..`diff_high`."""
    diff_low: float = -0.2
    """Lowest difference that is kept; below `diff_high`."""
    diff_high: float = 0.2
    """Highest difference that is kept."""


@dataclass(frozen=True)
class TrainInferCorrectionArguments:
    """Correction of the mismatch between trainer and sampling engine; off by default."""

    is_weight: TrainInferWeightArguments = field(default_factory=TrainInferWeightArguments)
    """The importance weight."""
    filters: list[TrainInferFilterArguments] = field(default_factory=list)
    """Filters, applied in order."""

    @property
    def enabled(self) -> bool:
        """Whether the weight or one of the filters is."""
        return self.is_weight.enabled or any(spec.enabled for spec in self.filters)


@dataclass(frozen=True)
class PipelineConfig(BaseConfig, DataClassJsonMixin):
    """Canonical config: after load the roles carry the pipeline's names, whatever the YAML called them."""

    pipeline: Literal["rlvr", "agentic"] = "rlvr"
    """Which pipeline runs; set at load from the launcher, not by the user."""
    is_pure_opd: bool = False
    """The teacher alone is the training signal; set by the launcher of on-policy distillation."""
    use_opd: bool = False
    """Mixed mode: rewards and teacher."""
    pure_opd_pipeline_type: Literal["rlvr", "agentic"] = "rlvr"
    """Pipeline under pure OPD."""
    opd_kl_coef: float | None = ranged(None, ge=0)
    """Weight of each teacher's term where it sets none of its own; null: 1."""
    opd_args: OPDArguments = field(default_factory=OPDArguments)
    """The distillation objective."""
    pretrain: str | None = None
    """Model of every student role that names none."""
    reward_pretrain: str | None = None
    """Model of the critic, when it names none."""
    global_template: str | None = None
    """Chat template of data that names none."""
    tag_to_template: dict[str, str] = field(default_factory=dict)
    """Chat template by tag."""
    actor_train: WorkerConfig = field(default_factory=WorkerConfig)
    """The student in training (`student_train` in pure OPD)."""
    actor_infer: WorkerConfig = field(default_factory=WorkerConfig)
    """The student in generation (`student_infer` in pure OPD)."""
    teachers: dict[str, TeacherConfig] = field(default_factory=dict)
    """Teachers by name, from `teacher` in the YAML; a single one is called `default`."""
    reference: WorkerConfig | None = None
    """A frozen policy for KL-to-reference terms; never beside a teacher."""
    critic: WorkerConfig | None = None
    """Value model of `gae`."""
    rewards: dict[str, RewardConfig] = field(default_factory=dict)
    """Rewards by name (domain)."""
    validation: ValidationConfig | None = None
    """Held-out prompts; null: no validation."""
    num_return_sequences_in_group: int = ranged(1, ge=1)
    """Samples per prompt."""
    async_generation_ratio: float = ranged(0.0, ge=0)
    """Batches that generation may run ahead of training; 0 is synchronous."""
    ppo_epochs: int = ranged(1, ge=1)
    """Passes over each batch."""
    adv_estimator: AdvantageEstimator = "gae"
    """Estimator of the external reward's advantage; pure OPD uses plain `reinforce`."""
    gamma: float = ranged(1.0, ge=0, le=1)
    """Discount per token (per turn with `agentic_reinforce`); pure OPD uses 0: each token answers for itself."""
    lambd: float = ranged(0.95, ge=0, le=1)
    """Lambda of `gae`."""
    pg_clip: float = ranged(0.2, ge=0)
    """Clip of the policy ratio around 1 on both sides."""
    use_pg_clip_range: bool = False
    """Use `pg_clip_low` and `pg_clip_high` in place of `pg_clip`."""
    pg_clip_low: float = ranged(0.2, ge=0, le=1)
    """Clip below 1."""
    pg_clip_high: float = ranged(0.2, ge=0)
    """Clip above 1."""
    dual_clip_loss: bool = False
    """Also bound the loss of tokens with negative advantage and a large ratio."""
    importance_sampling: Literal["token", "seq"] = "token"
    """Policy ratio per token, or one per sequence."""
    loss_agg_mode: LossAggMode = "seq-mean-token-mean"
    """How token losses become one number. ROLL's default; `token-mean` weighs every token of the batch alike."""
    max_grad_norm: float = ranged(1.0, gt=0)
    """Gradients are scaled down to this L2 norm. It must be above 0; a large value such as 1e9 never scales."""
    whiten_advantages: bool = False
    """Shift and scale advantages to mean 0, variance 1; pure OPD never does."""
    whiten_rewards: bool = False
    """Shift and scale token rewards to mean 0, variance 1."""
    advantage_clip: float | None = ranged(None, gt=0)
    """Bound on the absolute advantage; null: none."""
    reward_clip: float | None = ranged(None, gt=0)
    """Bound on the absolute external reward; null: none."""
    norm_mean_type: Literal["batch", "group", "running"] | None = None
    """What rewards are centred over; null: the estimator's own."""
    norm_std_type: Literal["batch", "group", "running"] | None = None
    """What rewards are scaled over; null: the estimator's own."""
    kl_penalty: Literal["kl", "abs", "mse", "k3", "full"] = "kl"
    """Estimator of KL-to-reference without a teacher; with one, ROLL's name for `opd_args.divergence` and `support`."""
    init_kl_coef: float = ranged(0.2, ge=0)
    """Weight of the token-level KL reward, at the start if it adapts."""
    target_kl: float | None = ranged(None, gt=0)
    """KL to the reference, in nats per token, that the weight of the KL reward adapts to; null: the weight is fixed."""
    kl_horizon: int = ranged(10000, ge=1)
    """Samples over which the weight of the KL reward adapts."""
    add_token_level_kl: bool = False
    """Subtract KL-to-reference from each token's reward."""
    use_kl_loss: bool = False
    """Add KL-to-reference to the loss."""
    kl_loss_coef: float = ranged(0.0, ge=0)
    """Weight of the KL loss."""
    kl_loss_type: Literal["k2", "k3"] = "k3"
    """Estimator of the KL loss on the sampled token: k3 (ROLL's; gradient of the forward KL) or k2 (the reverse KL)."""
    entropy_loss_coef: float = ranged(0.0, ge=0)
    """Weight of the entropy bonus."""
    value_clip: float | None = ranged(None, gt=0)
    """Clip of the critic's value update; null: none."""
    critic_warmup: int = ranged(0, ge=0)
    """Steps that train the critic alone."""
    train_infer_correction: TrainInferCorrectionArguments = field(default_factory=TrainInferCorrectionArguments)
    """Correction of the trainer/engine mismatch. Off under `opd_args.student_logprob_source: infer`, where there is
    none."""

    @property
    def mode(self) -> Mode:
        """Where the training signal comes from."""
        if self.is_pure_opd:
            return "pure_opd"
        return "mixed_opd" if self.use_opd else "rl"

    @property
    def group_size(self) -> int:
        """Samples of one draw: responses to a prompt, or episodes of one environment and seed."""
        return self.num_return_sequences_in_group

    @property
    def groups_per_step(self) -> int:
        """Draws whose samples make a step."""
        return self.rollout_batch_size

    @property
    def samples_per_step(self) -> int:
        """Responses or episodes of a step; an episode may become several trajectories."""
        return self.groups_per_step * self.group_size

    def context_length(self, scorer: TeacherConfig) -> int:
        """Tokens that the prompt of a teacher with a view of its own may have."""
        return scorer.teacher_args.context_length or 2 * self.prompt_length

    def longest_view(self, scorer: TeacherConfig) -> int:
        """Tokens of the longest sequence that a teacher with a view of its own sees: that prompt and a response."""
        assert self.response_length is not None, "set at load"
        return self.context_length(scorer) + self.response_length

    @property
    def needs_reference(self) -> bool:
        """Whether something of the signal is a distance to the frozen ``reference``."""
        in_loss = self.use_kl_loss and self.kl_loss_coef > 0
        return not self.teachers and (in_loss or self.add_token_level_kl)

    @property
    def corrects_mismatch(self) -> bool:
        """Whether sampled tokens are weighed by trainer against engine: not where the old policy's log-probabilities
        are the engine's own."""
        return self.train_infer_correction.enabled and self.opd_args.student_logprob_source == "train"

    @property
    def base_scorer(self) -> TeacherConfig | None:
        """Who scores ``opd_args.base_model``; None without one. It runs as the first teacher does, but sees every tag,
        has the student's view, and has no adapter: an adapter is what made the teacher of the base model."""
        if self.opd_args.base_model is None or not self.teachers:
            return None
        like = next(iter(self.teachers.values()))
        model = replace(like.model_args, model_name_or_path=self.opd_args.base_model, adapter_name_or_path=None)
        return replace(like, model_args=model, tag_included=[], teacher_args=TeacherArguments())

    def teacher_coef(self, name: str) -> float:
        """Weight of the teacher ``name``: its own, else the pipeline's, else 1."""
        own = self.teachers[name].opd_kl_coef
        if own is not None:
            return own
        return 1.0 if self.opd_kl_coef is None else self.opd_kl_coef


@dataclass(frozen=True)
class RLVRConfig(PipelineConfig):
    """Settings of the RLVR pipeline: sample selection and loss weights."""

    is_use_additional_prompts: bool = False
    """After a filter has dropped groups, draw more prompts than are missing: fewer rounds, some of them for nothing.
    The batch is filled in either case."""
    max_additional_running_prompts: int = ranged(16, ge=0)
    """Prompts beyond the missing ones that such a round draws at most; never more than are missing."""
    dataset_filter: dict[str, Any] = field(default_factory=dict)
    """Rows to keep, by source and difficulty."""
    use_policy_loss_type: Literal["PPO", "PG"] = "PPO"
    """Clipped surrogate, or plain policy gradient."""
    rl_loss_coef: float = ranged(1.0, ge=0)
    """Weight of the policy loss."""
    postive_loss_coef: float = ranged(0.0, ge=0)
    """Weight of a likelihood loss on positive samples (the spelling is ROLL's)."""
    use_topr_neg_loss_coef: float = ranged(0.0, ge=0)
    """Weight of the tapered loss on negative samples."""
    use_topr_loss: bool = False
    """Use the TOPR loss."""
    use_reward_scaling: bool = False
    """Scale external rewards by a running standard deviation."""
    use_reward_norm: bool = False
    """Centre external rewards by a running mean."""
    add_len_reward: bool = False
    """Add a reward for length."""
    difficulty_loss_weight: bool = False
    """Weigh samples by difficulty."""
    length_loss_weight: bool = False
    """Weigh samples by length."""
    max_len_mask: bool = False
    """Leave responses out that were cut at the length limit."""
    mask_type: Literal["all", "loss"] = "loss"
    """Masks act on the loss only, or on statistics too."""
    difficulty_mask: bool = False
    """Leave prompts out whose mean score lies outside the thresholds."""
    difficulty_low_threshold: float = 0.0
    """Mean score above which a prompt is trained, for `difficulty_mask`; below `difficulty_high_threshold`."""
    difficulty_high_threshold: float = 1.0
    """Mean score below which a prompt is trained, for `difficulty_mask`."""
    error_max_len_clip: bool = False
    """Leave wrong responses out that have `error_max_len_threshold` tokens or more."""
    error_max_len_threshold: int = ranged(9999999999, ge=1)
    """Tokens, for `error_max_len_clip`."""
