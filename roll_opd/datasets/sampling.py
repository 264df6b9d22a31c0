"""The order in which prompts are drawn: a pure function of the draw, so there is nothing to save or restore."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt


class PromptOrder:
    """Which prompt each draw of a run takes.

    Draws count prompts from the start of the run. Every ``num_prompts`` draws are an epoch, in which each prompt comes
    exactly once, in an order of that epoch's own. The answer for a draw depends on the arguments and the draw alone:
    not on what was asked before, on the batch size, or on where a run was resumed.

    Args:
        num_prompts: how many prompts there are, at least 1.
        seed: any whole number from 0 to 2**64 - 1.
        shuffle: false draws the prompts in the order of the data in every epoch.

    Raises:
        ValueError: ``num_prompts`` or ``seed`` out of range.
    """

    def __init__(self, num_prompts: int, seed: int, shuffle: bool = True) -> None:
        if num_prompts < 1:
            raise ValueError(f"num_prompts must be at least 1, not {num_prompts}")
        if not 0 <= seed < 2**64:
            raise ValueError(f"seed must be from 0 to 2**64 - 1, not {seed}")
        self.num_prompts = num_prompts
        self.seed = seed
        self.shuffle = shuffle
        self._recent: dict[int, npt.NDArray[np.intp]] = {}

    def epoch(self, draw: int) -> int:
        """The epoch that a draw belongs to, from 0.

        Raises:
            ValueError: ``draw`` is negative.
        """
        if draw < 0:
            raise ValueError(f"draws count from 0, so {draw} is none")
        return draw // self.num_prompts

    def index(self, draw: int) -> int:
        """The position, from 0, of the prompt that a draw takes.

        Raises:
            ValueError: ``draw`` is negative.
        """
        epoch, position = self.epoch(draw), draw % self.num_prompts
        return int(self._permutation(epoch)[position]) if self.shuffle else position

    def _permutation(self, epoch: int) -> npt.NDArray[np.intp]:
        permutation = self._recent.get(epoch)
        if permutation is None:
            # Philox takes (seed, epoch) as its key, so epochs are independent streams. Its raw numbers are the same in
            # every numpy version, which Generator.permutation does not promise; sorting them gives the permutation.
            random = np.random.Philox(key=np.array([self.seed, epoch], dtype=np.uint64)).random_raw(self.num_prompts)
            permutation = np.argsort(random, kind="stable")
            # A batch may straddle two epochs, so two are kept. Replaced as a whole: other threads may be reading.
            self._recent = {**dict(list(self._recent.items())[-1:]), epoch: permutation}
        return permutation
