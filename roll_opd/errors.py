"""Errors that reach the user, as one small picklable hierarchy.

They cross Ray, so every class takes plain strings and pickles by its constructor arguments. The launchers print
the message of a :class:`RollOPDError` as one line and exit with code 1; anything else is a defect of ours and keeps
its traceback.
"""

from __future__ import annotations


class RollOPDError(Exception):
    """Base of all errors whose message is written for the user: it names the field or file, and the fix."""


class ConfigError(RollOPDError):
    """A setting that cannot work.

    Args:
        field: full path of the field as the user wrote it, for example ``student_train.training_args.learning_rate``.
        problem: what is wrong and what to do, as one sentence.
    """

    def __init__(self, field: str, problem: str) -> None:
        super().__init__(field, problem)
        self.field = field
        self.problem = problem

    def __str__(self) -> str:
        return f"{self.field}: {self.problem}" if self.field else self.problem


class DataError(RollOPDError):
    """A file or row of data that cannot be used; the message starts with ``file:row``."""


class ModelError(RollOPDError):
    """A model or tokenizer that cannot be loaded, or two that do not fit together."""


class LaunchError(RollOPDError):
    """Something outside the config stops the run from starting: no GPUs, a port in use, an unwritable folder."""


class TeacherError(RollOPDError):
    """A teacher kept failing or kept returning unusable scores; the message names the teacher."""


class TrainingError(RollOPDError):
    """An update that must not be made, for example because the gradient is not finite."""


class WorkerError(RollOPDError):
    """A worker process died, did not answer in time, or could not do what every run needs."""


class WorkerDiedError(WorkerError):
    """A worker process is gone."""


class GenerationError(RollOPDError):
    """The student's generation engine returned something that cannot be trained on, or stopped answering."""


class EngineDiedError(GenerationError):
    """An inference engine's process is gone, while the worker that owns it lives and can start another one."""


class EnvironmentFailedError(RollOPDError):
    """An environment crashed, hung, or returned what cannot be used. It costs its episode, which is played again.

    Args:
        tag: of the environment.
        reason: what happened, in one line.
    """

    def __init__(self, tag: str, reason: str) -> None:
        super().__init__(tag, reason)
        self.tag = tag
        self.reason = reason

    def __str__(self) -> str:
        return f"environment {self.tag!r}: {self.reason}"
