"""Whether two model folders hold the same weights, without loading either."""

from __future__ import annotations

from pathlib import Path

WHOLE = 256 << 20
"""Bytes of weights up to which every byte is compared."""
SAMPLES, SAMPLE_BYTES = 64, 256 << 10
"""Of larger files, this many pieces are compared. Training moves weights all over a model, so two checkpoints of one
family differ in the first of them; only copies agree in all."""


def same_model(a: str, b: str) -> bool:
    """Whether two paths name one model, or two folders hold equal ``*.safetensors``.

    A hub name that is no folder here is compared as a name.
    """
    one, other = Path(a).expanduser(), Path(b).expanduser()
    if not one.is_dir() or not other.is_dir():
        return a == b
    if one.resolve() == other.resolve():
        return True
    ours, theirs = (sorted(folder.glob("*.safetensors")) for folder in (one, other))
    if not ours or [(f.name, f.stat().st_size) for f in ours] != [(f.name, f.stat().st_size) for f in theirs]:
        return False
    whole = sum(f.stat().st_size for f in ours) <= WHOLE
    return all(_same_bytes(f, g, whole) for f, g in zip(ours, theirs, strict=True))


def _same_bytes(a: Path, b: Path, whole: bool) -> bool:
    size = a.stat().st_size
    step = SAMPLE_BYTES if whole else max(SAMPLE_BYTES, size // SAMPLES)
    with a.open("rb") as one, b.open("rb") as other:
        for start in range(0, size, step):
            one.seek(start)
            other.seek(start)
            if one.read(SAMPLE_BYTES) != other.read(SAMPLE_BYTES):
                return False
    return True
