"""Hugging Face weights to Megatron-core's modules and back, bit for bit.

A matrix of Megatron-core is assembled from Hugging Face's: queries, keys and values group by group, gate and up
projection shard by shard, the vocabulary filled up until it divides. A :class:`Recipe` writes down once of which runs
of rows (or columns) a tensor consists; each rank holds an equal part of it. Reading files, taking over tensors and
exporting them are copies between runs and parts.

Our own table instead of a package: of those for this Python, one has to be corrected in four places for transformers 5
and is unmaintained (mbridge), another needs TransformerEngine (mcore-bridge); and none lets a rank read nothing but its
own part of a file.
"""

from __future__ import annotations

import json
import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.utils import unwrap_model
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import PretrainedConfig
from transformers.utils import cached_file

from roll_opd.configs.backends.megatron import MegatronSettings
from roll_opd.distributed.strategy.megatron.parallel import expert_tensor_size
from roll_opd.errors import ModelError

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
_OUR_HEAD = "output_layer.weight"


@dataclass(frozen=True)
class Run:
    """``length`` consecutive rows (or columns) of a Hugging Face tensor, from ``start``; ``name`` None is padding."""

    name: str | None
    start: int
    length: int


@dataclass(frozen=True)
class Recipe:
    """What a tensor of Megatron-core is assembled from.

    Attributes:
        name: its name in a model that is not split: layers and experts are counted through.
        runs: one after the other along ``dim`` they are the whole tensor.
        other: the sizes of its other dimensions.
        dim: along which it is cut into equal parts; of a tensor that every rank holds whole, 0.
        holders: ranks of one replica that hold its parts, in order.
    """

    name: str
    runs: tuple[Run, ...]
    other: tuple[int, ...]
    dim: int
    holders: tuple[int, ...]

    def shape(self, length: int) -> tuple[int, ...]:
        """The shape with ``length`` entries along ``dim``."""
        return *self.other[: self.dim], length, *self.other[self.dim :]

    @property
    def part(self) -> tuple[int, ...]:
        """Shape of a rank's part."""
        return self.shape(sum(run.length for run in self.runs) // len(self.holders))


@dataclass(frozen=True)
class Piece:
    """What a rank's parameter takes from one Hugging Face tensor: ``length`` rows (or columns) of it."""

    parameter: nn.Parameter
    dim: int
    at: int
    start: int
    length: int

    @property
    def target(self) -> Tensor:
        """The rows of the parameter, as a view."""
        return self.parameter.data.narrow(self.dim, self.at, self.length)


class WeightBridge:
    """Knows, for a model and a layout of ranks, which rank holds which part of each Hugging Face tensor.

    Args:
        hf_config: of the model.
        config: what Megatron-core builds it with.
        settings: how it is spread.
        world_size: over how many ranks.

    Attributes:
        recipes: of all tensors of the model, by their names in Megatron-core.
        padded_vocab_size: rows of embedding and head, filled up so that the tensor-parallel ranks get equally many.
        aliases: for a tensor that is held once under one name, the further names that it has in Hugging Face's model.
    """

    def __init__(
        self, hf_config: PretrainedConfig, config: TransformerConfig, settings: MegatronSettings, world_size: int
    ) -> None:
        self.hf_config = hf_config
        self.tied = bool(hf_config.tie_word_embeddings)
        self.aliases: dict[str, list[str]] = {_EMBEDDING: [_HEAD]} if self.tied else {}
        self._config = config
        self._settings = settings
        self._ranks_of_stage = world_size // settings.pipeline_model_parallel_size
        tensor = settings.tensor_model_parallel_size
        self.padded_vocab_size = math.ceil(hf_config.vocab_size / tensor) * tensor
        self._layers = _stages_of_layers(config)
        self.recipes = {recipe.name: recipe for recipe in self._table()}

    def mark_parts(self, chunks: Sequence[nn.Module]) -> None:
        """Say of each parameter whether the tensor-parallel ranks hold different values; the gradient's norm asks."""
        for name, parameter in self._local(chunks).items():
            # Experts that are not split are dealt out over these ranks.
            differs = len(self.recipes[name].holders) > 1 or ".local_experts." in name
            parameter.tensor_model_parallel = differs  # type: ignore[attr-defined]

    # ---- into Megatron-core ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def read(self, chunks: Sequence[nn.Module], path: str, field: str) -> None:
        """Fill this rank's parameters from the safetensors of a checkpoint, reading nothing else.

        Args:
            chunks: this rank's parts of the model.
            path: folder or hub name.
            field: full path of the setting that names it, for messages.

        Raises:
            ModelError: the checkpoint cannot be read, lacks tensors, or has others than a model of its kind.
        """
        files = _Checkpoint(path, field)
        # Some checkpoints of tied models have the head all the same.
        files.check(self.shapes, spare={_HEAD} if self.tied else set())
        for parameter in self._local(chunks).values():
            parameter.data.zero_()  # what nothing is copied to is padding
        for name, pieces in self._by_source(chunks).items():
            for piece in pieces:
                piece.target.copy_(files.rows(name, piece))

    @torch.no_grad()
    def put(self, chunks: Sequence[nn.Module], tensors: Iterable[tuple[str, Tensor]], mix: float = 1.0) -> None:
        """Take over this rank's parts of whole Hugging Face tensors; ``mix`` is their share in what is then held.

        Raises:
            ModelError: the model has no such tensor, or has it in another shape.
        """
        by_source = self._by_source(chunks)
        doubles = {alias for aliases in self.aliases.values() for alias in aliases}
        for name, tensor in tensors:
            if name in doubles:
                continue
            if tuple(tensor.shape) != self.shapes.get(name):
                raise ModelError(
                    f"weight update: {name} is {tuple(tensor.shape)}, the model's is {self.shapes.get(name)}"
                )
            for piece in by_source.get(name, []):
                source = tensor.narrow(piece.dim, piece.start, piece.length).to(piece.parameter)
                piece.target.lerp_(source, mix) if mix < 1.0 else piece.target.copy_(source)

    @cached_property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shape of each Hugging Face tensor."""
        shapes: dict[str, tuple[int, ...]] = {}
        for recipe in self.recipes.values():
            lengths: dict[str, int] = {}
            for run in recipe.runs:
                if run.name is not None:
                    lengths[run.name] = lengths.get(run.name, 0) + run.length
            shapes |= {name: recipe.shape(length) for name, length in lengths.items()}
        return shapes

    def _by_source(self, chunks: Sequence[nn.Module]) -> dict[str, list[Piece]]:
        """For each Hugging Face tensor, which parameters of this rank it has a part in."""
        pieces: dict[str, list[Piece]] = {}
        for name, parameter in self._local(chunks).items():
            recipe = self.recipes[name]
            assert parameter.shape == recipe.part, f"{name}: {tuple(parameter.shape)} is not {recipe.part}"
            length = recipe.part[recipe.dim]
            begin = self._part_index(recipe) * length
            for run, at in _overlaps(recipe.runs, begin, begin + length):
                if run.name is not None:
                    pieces.setdefault(run.name, []).append(Piece(parameter, recipe.dim, at, run.start, run.length))
        return pieces

    # ---- out of Megatron-core ----------------------------------------------------------------------------------------

    @torch.no_grad()
    def export(self, chunks: Sequence[nn.Module]) -> Iterator[tuple[str, Tensor]]:
        """Yield every tensor under its Hugging Face name, whole, on global rank 0; the others yield nothing.

        All ranks must iterate to the end. The order is the same every time: embedding, layers, norm, head. A tied head
        is not sent: see ``aliases``.
        """
        rank = dist.get_rank()
        local = self._local(chunks)
        like = next(iter(local.values())).data
        for recipe in self.recipes.values():
            if recipe.name == _OUR_HEAD and self.tied:
                continue
            parts: list[Tensor] = []
            for holder in recipe.holders:
                if rank == holder == 0:
                    parts.append(local[recipe.name].data)
                elif rank == 0:
                    parts.append(like.new_empty(recipe.part))
                    dist.recv(parts[-1], src=holder)
                elif rank == holder:
                    dist.send(local[recipe.name].data.contiguous(), dst=0)
            if rank == 0:
                yield from _taken_apart(recipe, torch.cat(parts, dim=recipe.dim))

    def _local(self, chunks: Sequence[nn.Module]) -> dict[str, nn.Parameter]:
        """This rank's parameters under the names that they have in a model that is not split."""
        experts = 0
        if self._config.num_moe_experts:
            experts = self._config.num_moe_experts // self._settings.expert_model_parallel_size
        first_expert = parallel_state.get_expert_model_parallel_rank() * experts
        out: dict[str, nn.Parameter] = {}
        for chunk in unwrap_model(list(chunks)):
            for name, parameter in chunk.named_parameters():
                words = name.split(".")
                if words[:2] == ["decoder", "layers"]:
                    words[2] = str(chunk.decoder.layers[int(words[2])].layer_number - 1)
                if "local_experts" in words:
                    number = words.index("local_experts") + 1
                    words[number] = str(int(words[number]) + first_expert)
                out[".".join(words)] = parameter
        return out

    def _part_index(self, recipe: Recipe) -> int:
        """Which part of a tensor this rank holds."""
        if len(recipe.holders) == 1:
            return 0
        if ".local_experts." in recipe.name:
            return parallel_state.get_expert_tensor_parallel_rank()
        return parallel_state.get_tensor_model_parallel_rank()

    # ---- the table ---------------------------------------------------------------------------------------------------

    def _table(self) -> Iterator[Recipe]:
        hidden, vocab = int(self.hf_config.hidden_size), int(self.hf_config.vocab_size)
        last_stage = self._settings.pipeline_model_parallel_size - 1

        def vocabulary(source: str) -> tuple[Run, ...]:
            return Run(source, 0, vocab), Run(None, 0, self.padded_vocab_size - vocab)

        yield self._split("embedding.word_embeddings.weight", vocabulary(_EMBEDDING), hidden, 0)
        for layer, stage in enumerate(self._layers):
            yield from self._layer(layer, stage)
        yield self._whole("decoder.final_layernorm.weight", "model.norm.weight", (hidden,), last_stage)
        if not self.tied or last_stage > 0:
            # The last stage has a copy of a tied embedding.
            head = _EMBEDDING if self.tied else _HEAD
            yield self._split(_OUR_HEAD, vocabulary(head), hidden, last_stage)

    def _layer(self, layer: int, stage: int) -> Iterator[Recipe]:
        config = self._config
        hidden, width = config.hidden_size, config.kv_channels
        heads, groups = config.num_attention_heads, config.num_query_groups
        assert width is not None and groups is not None
        ours, theirs = f"decoder.layers.{layer}.", f"model.layers.{layer}."
        yield self._whole(f"{ours}input_layernorm.weight", f"{theirs}input_layernorm.weight", (hidden,), stage)
        for kind in ("weight", "bias") if config.add_qkv_bias else ("weight",):
            queries = width * heads // groups
            runs = [
                Run(f"{theirs}self_attn.{projection}_proj.{kind}", group * length, length)
                for group in range(groups)
                for projection, length in (("q", queries), ("k", width), ("v", width))
            ]
            yield self._split(
                f"{ours}self_attention.linear_qkv.{kind}", runs, hidden if kind == "weight" else None, stage
            )
        for which in ("q", "k") if config.qk_layernorm else ():
            yield self._whole(
                f"{ours}self_attention.{which}_layernorm.weight",
                f"{theirs}self_attn.{which}_norm.weight",
                (width,),
                stage,
            )
        out = [Run(f"{theirs}self_attn.o_proj.weight", 0, width * heads)]
        yield self._split(f"{ours}self_attention.linear_proj.weight", out, hidden, stage, dim=1)
        yield self._whole(
            f"{ours}pre_mlp_layernorm.weight", f"{theirs}post_attention_layernorm.weight", (hidden,), stage
        )
        if config.num_moe_experts is None:
            yield from self._mlp(f"{ours}mlp.", f"{theirs}mlp.", config.ffn_hidden_size, stage)
            return
        yield self._whole(
            f"{ours}mlp.router.weight", f"{theirs}mlp.gate.weight", (config.num_moe_experts, hidden), stage
        )
        for expert in range(config.num_moe_experts):
            yield from self._mlp(
                f"{ours}mlp.experts.local_experts.{expert}.",
                f"{theirs}mlp.experts.{expert}.",
                config.moe_ffn_hidden_size,
                stage,
                expert,
            )

    def _mlp(
        self, ours: str, theirs: str, width: int | None, stage: int, expert: int | None = None
    ) -> Iterator[Recipe]:
        assert width is not None
        holders = self._holders(stage, expert)
        part = width // len(holders)
        gate_and_up = [
            Run(f"{theirs}{projection}_proj.weight", rank * part, part)
            for rank in range(len(holders))
            for projection in ("gate", "up")
        ]
        hidden = self._config.hidden_size
        yield self._split(f"{ours}linear_fc1.weight", gate_and_up, hidden, stage, expert=expert)
        down = [Run(f"{theirs}down_proj.weight", 0, width)]
        yield self._split(f"{ours}linear_fc2.weight", down, hidden, stage, dim=1, expert=expert)

    def _split(
        self,
        name: str,
        runs: Sequence[Run],
        other: int | None,
        stage: int = 0,
        *,
        dim: int = 0,
        expert: int | None = None,
    ) -> Recipe:
        return Recipe(name, tuple(runs), () if other is None else (other,), dim, self._holders(stage, expert))

    def _whole(self, name: str, source: str, shape: tuple[int, ...], stage: int) -> Recipe:
        return Recipe(name, (Run(source, 0, shape[0]),), shape[1:], 0, self._holders(stage)[:1])

    def _holders(self, stage: int, expert: int | None = None) -> tuple[int, ...]:
        """Ranks of one replica that hold the parts of a tensor; ranks follow each other as ``parallel.ORDER`` says."""
        first = stage * self._ranks_of_stage
        size = self._settings.tensor_model_parallel_size
        if expert is not None:
            assert self._config.num_moe_experts is not None
            size = expert_tensor_size(self._settings)
            per_rank = self._config.num_moe_experts // self._settings.expert_model_parallel_size
            first += expert // per_rank * size
        return tuple(range(first, first + size))


def _stages_of_layers(config: TransformerConfig) -> list[int]:
    """The pipeline rank of each layer."""
    stages = [-1] * config.num_layers
    for stage in range(config.pipeline_model_parallel_size):
        for part in range(config.virtual_pipeline_model_parallel_size or 1):
            vp_stage = None if config.virtual_pipeline_model_parallel_size is None else part
            first = get_transformer_layer_offset(config, vp_stage, stage)
            count = get_num_layers_to_build(config, vp_stage, stage)
            stages[first : first + count] = [stage] * count
    assert -1 not in stages, "a layer without a pipeline rank"
    return stages


def _overlaps(runs: Sequence[Run], begin: int, end: int) -> Iterator[tuple[Run, int]]:
    """Cut out of ``runs`` what lies in ``[begin, end)``, and where each piece lies in it."""
    position = 0
    for run in runs:
        low, high = max(begin, position), min(end, position + run.length)
        if low < high:
            yield Run(run.name, run.start + low - position, high - low), low - begin
        position += run.length


def _taken_apart(recipe: Recipe, whole: Tensor) -> Iterator[tuple[str, Tensor]]:
    """Undo what the recipe assembles."""
    sources: dict[str, list[Tensor]] = {}
    for run, rows in zip(recipe.runs, whole.split([run.length for run in recipe.runs], recipe.dim), strict=True):
        if run.name is not None:
            sources.setdefault(run.name, []).append(rows)
    for name, parts in sources.items():
        yield name, torch.cat(parts, dim=recipe.dim)


class _Checkpoint:
    """The safetensors files of a checkpoint, opened when first asked for."""

    def __init__(self, path: str, field: str) -> None:
        self._path = path
        self._field = field
        self._open: dict[str, Any] = {}
        index = self._find("model.safetensors.index.json")
        try:
            if index is not None:
                self._files: dict[str, str] = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"]
            else:
                self._files = dict.fromkeys(self._file("model.safetensors").keys(), "model.safetensors")
        except (ValueError, KeyError) as error:
            raise ModelError(f"{field}: the index of weights in {path!r} is damaged: {error!r}") from error

    def check(self, shapes: Mapping[str, tuple[int, ...]], spare: Collection[str]) -> None:
        """Refuse a checkpoint that lacks a tensor, or has one that the model would ignore, but for ``spare`` ones."""
        absent = sorted(shapes.keys() - self._files.keys())
        if absent:
            raise ModelError(
                f"{self._field}: the weights in {self._path!r} lack {len(absent)} tensor(s); first {absent[0]}"
            )
        known = {*shapes, *spare}
        strange = sorted(n for n in self._files if n not in known and not n.endswith("rotary_emb.inv_freq"))
        if strange:
            raise ModelError(
                f"{self._field}: the weights in {self._path!r} have {len(strange)} tensor(s) that this kind of model "
                f"has no use for; first {strange[0]}"
            )
        self._shapes = shapes

    def rows(self, name: str, piece: Piece) -> Tensor:
        """Read what ``piece`` takes of the tensor ``name``."""
        try:
            view = self._file(self._files[name]).get_slice(name)
        except SafetensorError as error:
            raise ModelError(f"{self._field}: cannot read {name} in {self._path!r}: {error}") from error
        if tuple(view.get_shape()) != self._shapes[name]:
            raise ModelError(
                f"{self._field}: {name} in {self._path!r} is {tuple(view.get_shape())}, but by its config.json "
                f"{self._shapes[name]}"
            )
        rows = slice(piece.start, piece.start + piece.length)
        return view[rows] if piece.dim == 0 else view[:, rows]

    def _file(self, name: str) -> Any:
        if name not in self._open:
            path = self._find(name)
            if path is None:
                raise ModelError(f"{self._field}: {self._path!r} has no {name}; Megatron-core reads safetensors only")
            try:
                self._open[name] = safe_open(path, framework="pt")
            except (OSError, SafetensorError) as error:
                raise ModelError(f"{self._field}: cannot read {path}: {error}") from error
        return self._open[name]

    def _find(self, name: str) -> str | None:
        """A file of the checkpoint on this machine, fetched from the hub if need be."""
        if Path(self._path).is_dir():
            file = Path(self._path) / name
            return str(file) if file.is_file() else None
        try:
            return cached_file(self._path, name, _raise_exceptions_for_missing_entries=False)
        except OSError as error:
            raise ModelError(f"{self._field}: cannot fetch {name} of {self._path!r}: {error}") from error
