"""What a check found, how checks are run side by side, and what a launch does with the result."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Literal, TypeVar

from roll_opd.configs.pipeline_config import PipelineConfig
from roll_opd.errors import ConfigError, RollOPDError

logger = logging.getLogger(__name__)

Level = Literal["ok", "skipped", "warning", "error"]
F = TypeVar("F")

_FIELD = re.compile(r"([A-Za-z_]\w*(?:\.[\w\-]+)*): (.*)", re.DOTALL)
"""How an error message names its setting: ``teacher.model_args.model_name_or_path: …``."""


@dataclass(frozen=True)
class Finding:
    """One result of one check.

    Attributes:
        level: ``error`` stops a launch; ``skipped`` could not be checked.
        field: the setting it speaks about, as the user wrote it; empty where there is none.
        message: what was found and, unless it is well, what to do.
        area: heading under which the doctor shows it.
        cause: the error that said so, raised again by a launch.
    """

    level: Level
    field: str
    message: str
    area: str = ""
    cause: RollOPDError | None = None

    def __str__(self) -> str:
        return str(self.as_error())

    def as_error(self) -> RollOPDError:
        """What a launch raises."""
        return self.cause if self.cause is not None else ConfigError(self.field, self.message)


class NotKnown(Exception):
    """A check asked for something that an earlier one has already failed to get; says what."""


@dataclass(frozen=True)
class Check(Generic[F]):
    """One question.

    Attributes:
        area: heading of its findings.
        find: answers it; what it raises as :class:`RollOPDError` is an error finding.
        always: it cannot be switched off, because the run could not do without the answer.
    """

    area: str
    find: Callable[[F], Iterator[Finding]]
    always: bool = False


def run_checks(checks: Iterable[Check[F]], facts: F) -> list[Finding]:
    """Ask all questions, whatever the others found; one whose input is missing is reported as skipped."""
    found: list[Finding] = []
    for check in checks:
        try:
            # One by one: what a check has found before it fails counts.
            for finding in check.find(facts):
                found.append(replace(finding, area=check.area))
        except NotKnown as missing:
            name = check.find.__name__.strip("_").replace("_", " ")
            found.append(Finding("skipped", "", f"{name}: not checked, because {missing}", check.area))
        except RollOPDError as error:
            found.append(replace(failed(error), area=check.area))
    return found


def wanted(config: PipelineConfig, checks: Sequence[Check[F]]) -> list[Check[F]]:
    """Those of ``checks`` that the setting ``preflight`` asks for."""
    return [check for check in checks if check.always or config.preflight != "off"]


def failed(error: RollOPDError, field: str = "") -> Finding:
    """The finding that ``error`` stands for; ``field`` is used when its message names none."""
    if isinstance(error, ConfigError):
        return Finding("error", error.field, error.problem, cause=error)
    named = _FIELD.fullmatch(str(error))
    if named:
        return Finding("error", named[1], named[2], cause=error)
    return Finding("error", field, str(error), cause=type(error)(f"{field}: {error}") if field else error)


def errors_of(findings: Sequence[Finding]) -> list[Finding]:
    """The findings that stop a launch."""
    return [f for f in findings if f.level == "error"]


def enforce(findings: Sequence[Finding]) -> None:
    """Log what a launch found; stop it if something cannot work.

    Raises:
        RollOPDError: the first error; the others have been logged.
    """
    for finding in findings:
        if finding.level == "warning":
            logger.warning("%s", finding)
        else:
            logger.debug("%s: %s", finding.level, finding)
    stopping = errors_of(findings)
    for finding in stopping[1:]:
        logger.error("%s", finding)
    if stopping:
        raise stopping[0].as_error()
