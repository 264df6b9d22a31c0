"""Reading ``device_mapping`` without ``eval``: a list of device numbers, or one of a few Python-like spellings."""

from __future__ import annotations

import ast
from typing import Any

from roll_opd.errors import ConfigError

_FORMS = "a list such as [0, 1], '0,1', 'range(0, 8)', 'list(range(0, 8))', or a sum of those"
# A typo such as range(0, 10**9) must give an error, not fill the memory.
MAX_DEVICES = 65536


def parse_device_mapping(value: Any, path: str) -> list[int] | None:
    """Return the device numbers that ``value`` stands for; ``None`` stays ``None`` (CPU processes).

    Devices are numbered over the whole cluster in node order. Raises ConfigError for anything that is not one of the
    spellings, for negative numbers and for duplicates.
    """
    if value is None:
        return None
    if isinstance(value, str):
        devices = _parse_text(value, path)
    elif isinstance(value, range):
        devices = _listed(value, value, path)
    elif isinstance(value, (list, tuple)):
        devices = list(value)
    elif isinstance(value, int) and not isinstance(value, bool):
        # Hydra turns the override device_mapping=0 into a number.
        devices = [value]
    else:
        raise ConfigError(path, f"expected {_FORMS}, got {value!r}")
    return _checked(devices, value, path)


def _checked(devices: list[Any], value: Any, path: str) -> list[int]:
    if not devices:
        raise ConfigError(path, f"{value!r} names no device; leave device_mapping out to run on CPU processes")
    for device in devices:
        if isinstance(device, bool) or not isinstance(device, int):
            raise ConfigError(path, f"device numbers are whole numbers, got {device!r} in {value!r}")
        if device < 0:
            raise ConfigError(path, f"device numbers start at 0, got {device} in {value!r}")
    duplicates = (
        sorted({device for device in devices if devices.count(device) > 1}) if len(set(devices)) < len(devices) else []
    )
    if duplicates:
        raise ConfigError(path, f"device {duplicates[0]} appears more than once in {value!r}; list every device once")
    return devices


def _parse_text(text: str, path: str) -> list[Any]:
    try:
        tree = ast.parse(text.strip(), mode="eval")
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        raise ConfigError(path, f"cannot read {text!r}; write {_FORMS}") from error
    return _expand(tree.body, text, path)


def _expand(node: ast.expr, text: str, path: str) -> list[Any]:
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_number(element, text, path) for element in node.elts]
    if isinstance(node, ast.Constant):
        return [_number(node, text, path)]
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return _expand(node.left, text, path) + _expand(node.right, text, path)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and not node.keywords:
        if node.func.id == "range" and 1 <= len(node.args) <= 3:
            return _expand_range([_number(argument, text, path) for argument in node.args], text, path)
        if node.func.id == "list" and len(node.args) == 1:
            return _expand(node.args[0], text, path)
    raise ConfigError(path, f"cannot read {text!r}; write {_FORMS}")


def _expand_range(bounds: list[int], text: str, path: str) -> list[int]:
    if len(bounds) == 3 and bounds[2] == 0:
        raise ConfigError(path, f"the step of a range must not be 0, got {text!r}")
    return _listed(range(*bounds), text, path)


def _listed(devices: range, given: Any, path: str) -> list[int]:
    # Not by len(), which cannot count beyond 2^63.
    if devices[MAX_DEVICES:]:
        raise ConfigError(path, f"{given!r} names more than the {MAX_DEVICES} devices that are supported")
    return list(devices)


def _number(node: ast.expr, text: str, path: str) -> int:
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_number(node.operand, text, path)
    if isinstance(node, ast.Constant) and isinstance(node.value, int) and not isinstance(node.value, bool):
        return node.value
    raise ConfigError(path, f"cannot read {text!r}; write {_FORMS}")


def format_devices(devices: list[int]) -> str:
    """Short text for a list of devices: ``0-7,12``."""
    runs: list[list[int]] = []
    for device in devices:
        if runs and device == runs[-1][1] + 1:
            runs[-1][1] = device
        else:
            runs.append([device, device])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
