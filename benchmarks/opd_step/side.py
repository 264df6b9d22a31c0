"""One side's end of the conversation with the driver: JSON lines on standard input and output.

Both Pythons import this. A side holds its models and waits. ``{"run": k}`` lets k steps happen and is answered with
their reports; ``{"weights": folder}`` has the student written, outside of any step's time; end of file is the end.
"""

from __future__ import annotations

import json
import os
import sys
import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TextIO

from benchmarks.opd_step.workload import Step


class Ended(Exception):
    """The driver has closed the conversation."""


def private_stdout() -> TextIO:
    """Standard output, for the driver's lines alone: from here on whatever else is printed goes to standard error."""
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return out


class Side:
    """A side that waits for its turns.

    Args:
        write_weights: writes the student in Hugging Face format into a folder.
    """

    def __init__(self, write_weights: Callable[[str], None]) -> None:
        self._out = private_stdout()
        self._write_weights = write_weights
        self._left = 0
        self._steps: list[Step] = []
        self._greeting: dict[str, Any] | None = None

    def greet(self, **facts: Any) -> None:
        """Set what the driver is told once the first step could begin."""
        self._greeting = facts

    def wait_for_turn(self) -> None:
        """Call before each step: returns when the step is to run.

        Raises:
            Ended: no further step is wanted.
        """
        if self._greeting is not None:
            self._say(self._greeting)
            self._greeting = None
        elif self._left == 0:
            self._say({"steps": self._steps})
            self._steps = []
        while self._left == 0:
            line = sys.stdin.readline()
            if not line:
                raise Ended
            command = json.loads(line)
            if "weights" in command:
                self._write_weights(command["weights"])
                self._say({"written": command["weights"]})
            else:
                self._left = int(command["run"])
        self._left -= 1

    def step_done(self, step: Step) -> None:
        """Call after each step."""
        self._steps.append(step)

    def _say(self, message: dict[str, Any]) -> None:
        try:
            self._out.write(json.dumps(message) + "\n")
            self._out.flush()
        except BrokenPipeError as error:
            raise Ended from error


def checksum(prompts: Iterable[Sequence[int]]) -> int:
    """Of the token ids of a step's prompts, in order: the driver compares the sides'."""
    return zlib.crc32(json.dumps([[int(token) for token in prompt] for prompt in prompts]).encode())
