"""What a call to a worker raises in the driver; Ray's errors are made here, as Ray makes them."""

from __future__ import annotations

import pytest
import ray
from ray.exceptions import ActorDiedError, ActorUnavailableError, GetTimeoutError, ObjectLostError, RayTaskError

from roll_opd.distributed.runtime import get
from roll_opd.errors import ConfigError, RollOPDError, WorkerDiedError, WorkerError


def raised_by(method: str, cause: Exception) -> RayTaskError:
    """What Ray raises where a task has raised ``cause``, or has got it in place of an argument."""
    return RayTaskError(method, f"Traceback of {method}", cause).as_instanceof_cause()


def answer_of(monkeypatch: pytest.MonkeyPatch, error: Exception) -> BaseException:
    def fail(refs, timeout):
        raise error

    monkeypatch.setattr(ray, "get", fail)
    with pytest.raises(Exception) as caught:
        get("ref", 5.0, "actor_infer.load_weights")
    return caught.value


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (ActorDiedError(), WorkerDiedError, "load_weights: a process died; its log"),
        (ActorUnavailableError("away", None), WorkerError, "load_weights: a process cannot be reached; its log"),
        (ObjectLostError("0" * 56, None, ""), WorkerError, "load_weights: an object was lost; its log"),
        (GetTimeoutError("late"), WorkerError, "load_weights gave no answer within 5 s"),
        (raised_by("load", ConfigError("a.b", "bad")), ConfigError, "a.b: bad"),
        # The trainer died while the generator waited for its weights.
        (raised_by("load", ActorDiedError()), WorkerError, "load_weights: a process died that it needs a result"),
        (raised_by("load", raised_by("export", ConfigError("a.b", "bad"))), ConfigError, "a.b: bad"),
    ],
)
def test_what_the_user_sees(monkeypatch: pytest.MonkeyPatch, error: Exception, kind: type, says: str) -> None:
    seen = answer_of(monkeypatch, error)
    assert type(seen) is kind and says in str(seen)


def test_a_defect_stays_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = answer_of(monkeypatch, raised_by("load", KeyError("lost")))
    assert isinstance(seen, KeyError) and not isinstance(seen, RollOPDError)
