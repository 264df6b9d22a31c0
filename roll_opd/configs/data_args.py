"""Where prompts come from and how rows become prompts."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from roll_opd.configs.field_spec import as_list, parse_with, ranged


@dataclass(frozen=True)
class DataArguments:
    """Files, column names and row handling of one role's data."""

    file_name: list[str] = field(default_factory=list, metadata=parse_with(as_list))
    """Data files or data sets, read in this order; one name or a list."""
    dataset_dir: str | None = None
    """Folder that is tried for a file that is not found under its own path."""
    dataset_type: Literal["json", "jsonl", "parquet", "csv", "arrow", "hub"] = "json"
    """Format of the files. `json` goes by each file's ending: `.jsonl` and `.json` (JSON lines), `.parquet`, `.csv`,
    `.arrow`. `hub` is what the library `datasets` loads: a name on the Hugging Face hub, or a folder; a folder that
    `save_to_disk` wrote needs no type."""
    split: str | None = None
    """Split of a data set that `datasets` loads, for example `test` or `train[:1000]`; null means `train`."""
    subset: str | None = None
    """Configuration of a hub's data set, for those that have several."""
    prompt: str | None = None
    """Column that holds a bare prompt; null means `prompt`. It is wrapped as one user message."""
    messages: str | None = None
    """Column that holds chat messages (list or JSON text); null means `messages`. Wins over `prompt`."""
    id: str = "id"
    """Column that holds the row's id."""
    tag: str = "tag"
    """Column that holds the tag which routes a sample to rewards and teachers."""
    template: str | None = None
    """Name of the chat template (`native` or null: the tokenizer's own)."""
    apply_chat_template: bool = True
    """False takes the text of `prompt` as it is."""
    enable_thinking: bool | None = None
    """Passed on to chat templates that know it; null leaves it out."""
    on_bad_row: Literal["error", "skip"] = "error"
    """A malformed row stops the run with file and row number, or is skipped and counted."""
    shuffle: bool = True
    """Draw rows in a seeded random order; false keeps the order of the files."""
    domain_interleave_probs: dict[str, float] | None = None
    """Share of each domain in a batch of prompts; scaled to add up to 1. A domain is the name of a reward or a teacher.
    A prompt belongs to the domain that its row's column `domain` names, else to the reward or teacher that takes its
    tag. Null: as the rows come."""
    preprocessing_num_workers: int | None = ranged(None, ge=1)
    """Processes that render prompts; null: one."""
