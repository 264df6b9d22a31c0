"""Rewards: one file a reward, a plain function that grades and the thin worker around it.

How to add a reward
-------------------

1. Make ``roll_opd/rewards/my_reward_worker.py``, or a module of your own anywhere on the import path. Its core is a
   plain function: strings in, a JSON-able value out, no Ray, no torch, easy to test::

       def grade_length(response: str, limit: int) -> dict:
           return {"reward": 1.0 if len(response) <= limit else 0.0, "correct": None}

2. Wrap it in a :class:`~roll_opd.rewards.base.RewardWorker`. It needs one method, which grades one item::

       class LengthRewardWorker(RewardWorker):
           def __init__(self, name: str, settings: dict) -> None:
               super().__init__(name, settings)
               self._limit = self.setting("limit", 100)

           async def grade_one(self, item: RewardItem) -> RewardResult:
               return RewardResult(id=item.id, reward=grade_length(item.response, self._limit)["reward"])

   ``grade`` of the base class runs the items side by side, keeps their order, measures, and turns a fault of one item
   into that item's ``error`` with reward 0.0.

3. If the function reads what a model wrote with anything stronger than string comparison (a parser, a computer algebra
   system), do not call it in this process: hand its dotted name to a
   :class:`~roll_opd.rewards.process_pool.ProcessPool`, as ``math_rule_reward_worker.py`` does. A hostile answer then
   costs one child process and its deadline, never the run. The pool bounds time and memory; it is *not* a sandbox
   against code that opens files or sockets, so it is not enough for a reward that executes what a model wrote.

4. Name the class in the YAML: ``rewards: {my_domain: {worker_cls: my_package.my_reward_worker.LengthRewardWorker}}``.

5. Test the function with right and wrong answers made by hand, and the worker with one item that it cannot grade.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from typing import TYPE_CHECKING

from roll_opd.errors import ConfigError

if TYPE_CHECKING:  # kept out of the children of the process pool, which import this package on their way up
    from types import ModuleType

    from roll_opd.rewards.base import RewardWorker


def resolve_reward(cls_path: str, field: str = "worker_cls") -> type[RewardWorker]:
    """Import a reward worker class by its dotted path.

    Args:
        cls_path: ``package.module.ClassName``. Paths of ROLL have been mapped to ours by the config layer.
        field: full path of the setting the class path came from, for the message.

    Raises:
        ConfigError: the path has no dot, the module or class does not exist (with the nearest existing name), one of
            the module's own imports is missing, or the object is not a :class:`RewardWorker` class.
    """
    from roll_opd.rewards.base import RewardWorker

    module_name, _, class_name = cls_path.rpartition(".")
    if not module_name or not class_name or module_name.startswith("."):
        raise ConfigError(field, f"{cls_path!r} is not a class path; write package.module.ClassName")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        missing = error.name or module_name
        if module_name == missing or module_name.startswith(f"{missing}."):
            hint = _did_you_mean(cls_path, _shipped_worker_paths())
            raise ConfigError(field, f"{cls_path!r}: there is no module {missing!r}{hint}") from error
        raise ConfigError(field, f"{cls_path!r} needs the package {missing!r}, which is not installed") from error

    found = getattr(module, class_name, None)
    if found is None:
        paths = [f"{module_name}.{name}" for name in _worker_names(module, RewardWorker)]
        raise ConfigError(field, f"{module_name!r} has no class {class_name!r}{_did_you_mean(cls_path, paths)}")
    if not (isinstance(found, type) and issubclass(found, RewardWorker)):
        raise ConfigError(field, f"{cls_path!r} is not a subclass of {RewardWorker.__module__}.{RewardWorker.__name__}")
    if inspect.isabstract(found):
        raise ConfigError(field, f"{cls_path!r} is abstract; name a class that implements grade_one")
    return found


def _worker_names(module: ModuleType, base: type) -> list[str]:
    return [n for n, v in vars(module).items() if isinstance(v, type) and issubclass(v, base) and v is not base]


def _shipped_worker_paths() -> list[str]:
    """Class paths of the rewards in this package, by the naming rule ``x_reward_worker`` -> ``XRewardWorker``."""
    modules = [m.name for m in pkgutil.iter_modules(__path__) if m.name.endswith("_reward_worker")]
    return [f"{__name__}.{m}.{''.join(part.capitalize() for part in m.split('_'))}" for m in modules]


def _did_you_mean(wrong: str, known: list[str]) -> str:
    nearest = difflib.get_close_matches(wrong, known, n=1, cutoff=0.6)
    if nearest:
        return f"; did you mean {nearest[0]!r}?"
    return f"; known here: {', '.join(known)}" if known else ""
