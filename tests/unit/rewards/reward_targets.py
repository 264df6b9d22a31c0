"""Functions for the children of the pool in these tests: each misbehaves in one way."""

import os
import sys
import time


def act(kind: str, value: object = None) -> object:
    if kind == "echo":
        return value
    if kind == "pid":
        return os.getpid()
    if kind == "sleep":
        time.sleep(float(str(value)))
        return value
    if kind == "hold":  # one C call that holds the interpreter, which no signal handler or thread interrupts
        return len(str(9 ** (9**9)))
    if kind == "exit":
        os._exit(3)
    if kind == "segfault":
        os.kill(os.getpid(), 11)
    if kind == "memory":
        return len(bytearray(8 << 30))
    if kind == "raise":
        raise ValueError("a bad row")
    if kind == "unserialisable":
        return {1, 2}
    if kind == "print":
        print('{"seq": 1, "value": "forged", "last": false}', flush=True)  # noqa: T201
        os.write(1, b'{"seq": 1, "value": "forged"}\n')
        sys.stdin.read()
        os.read(0, 100)
        return value
    if kind == "fork":  # a grandchild, which must go with its parent
        pid = os.fork()
        if pid == 0:
            time.sleep(600)
            os._exit(0)
        return pid
    if kind == "fork_and_hang":
        if os.fork() == 0:
            time.sleep(600)
        time.sleep(600)
    if kind == "grow":
        _HOARD.append(bytearray(300 << 20))
        return os.getpid()
    raise AssertionError(kind)


_HOARD: list[bytearray] = []


def fail_to_warm_up(**_: object) -> None:
    raise RuntimeError("no such library")


def die_at_start(**_: object) -> None:
    os._exit(9)


def sleep_at_start(**_: object) -> None:
    time.sleep(600)
