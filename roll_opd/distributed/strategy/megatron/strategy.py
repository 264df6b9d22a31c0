"""``megatron_train`` and ``megatron_infer``: a model over tensor-, pipeline- and data-parallel ranks, on packed rows."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor
from transformers import AutoModelForCausalLM

from roll_opd.algorithms.chunked_head import Head
from roll_opd.algorithms.loss import Loss
from roll_opd.configs.backends import backend_settings
from roll_opd.configs.worker_config import WorkerConfig
from roll_opd.distributed.strategy.base import (
    SAMPLED_ONLY,
    HeadWeights,
    ScoreRequest,
    ScoreResult,
    ScoreWant,
    TrainItem,
    WeightBucket,
)
from roll_opd.distributed.strategy.loss_inputs import RowTensors
from roll_opd.distributed.strategy.megatron.model import MegatronChunk, load_chunks, whole_head
from roll_opd.distributed.strategy.megatron.parallel import initialize
from roll_opd.distributed.strategy.megatron.shim import cuda_shim
from roll_opd.distributed.strategy.megatron.trainer import MegatronTrainer, microbatches_in_step, run_pipeline
from roll_opd.distributed.strategy.packed_model import DTYPES, as_bytes, head_of, raw_of
from roll_opd.distributed.strategy.scoring import rows_of, score_row
from roll_opd.distributed.strategy.sharded_trainer import disk_errors, idle_request
from roll_opd.distributed.strategy.tokenizer import Vocabulary
from roll_opd.trajectory import PackedBatch
