"""The pool of killable children, with functions that misbehave on purpose."""

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import psutil
import pytest

from roll_opd.errors import LaunchError
from roll_opd.rewards import process_pool
from roll_opd.rewards.process_pool import Outcome, ProcessPool

TARGET = "reward_targets.act"
DEADLINE = 0.5
SLACK = 2.0


@pytest.fixture(autouse=True)
def targets_are_importable(monkeypatch):
    """The children look for modules where this process does; pytest may load this file without that."""
    monkeypatch.setattr(sys, "path", [os.path.dirname(__file__), *sys.path])


@contextlib.contextmanager
def pool(target=TARGET, **kwargs):
    made = ProcessPool(target, **{"timeout": DEADLINE, "start_timeout": 30.0, **kwargs})
    try:
        yield made
    finally:
        made.close()


def call(made: ProcessPool, kind: str, value: object = None) -> Outcome:
    return asyncio.run(made.call(kind=kind, value=value))


def children() -> set[int]:
    found = psutil.Process().children(recursive=True)
    return {p.pid for p in found if p.status() != psutil.STATUS_ZOMBIE}


def wait_until(condition, seconds: float = 5.0) -> bool:
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def gone(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


@pytest.mark.parametrize(
    "value", ["plain", "two\nlines", "ünïcødé ∞ 数", "\ud800", "x" * 300_000, None, [1, {"a": 2.5}]]
)
def test_values_survive_the_channel(value):
    with pool() as made:
        outcome = call(made, "echo", value)
    assert outcome.error is None
    assert outcome.value == value


@pytest.mark.parametrize("kind", ["sleep", "hold"])
def test_deadline_kills_only_the_slow_item(kind):
    async def scenario(made):
        first = await made.call(kind="pid")
        hung = await made.call(kind=kind, value=600)
        started = time.monotonic()
        second = await made.call(kind="pid")
        return first, hung, second, time.monotonic() - started

    with pool() as made:
        first, hung, second, respawn = asyncio.run(scenario(made))
    assert hung.error == "timeout after 0.5 s"
    assert hung.value is None
    assert DEADLINE <= hung.seconds < DEADLINE + SLACK
    assert second.error is None and second.value != first.value
    assert gone(first.value)
    assert respawn < 5.0


@pytest.mark.parametrize(
    ("kind", "cause"),
    [
        ("exit", "exit code 3"),
        ("segfault", "signal SIGSEGV"),
        ("memory", "out of memory, limit 512 MiB"),
    ],
)
def test_death_is_reported_and_the_next_item_is_graded(kind, cause):
    async def scenario(made):
        return [await made.call(kind=k, value="fine") for k in (kind, "echo")]

    with pool(memory_mb=512, timeout=5.0) as made:
        died, after = asyncio.run(scenario(made))
    assert died.error == f"grader died ({cause})"
    assert died.seconds < 3.0
    assert after == Outcome("fine", None, after.seconds)


@pytest.mark.parametrize(("kind", "message"), [("raise", "ValueError: a bad row"), ("unserialisable", "TypeError: ")])
def test_exception_costs_no_process(kind, message):
    async def scenario(made):
        return [await made.call(kind=k) for k in ("pid", kind, "pid")]

    with pool() as made:
        before, failed, after = asyncio.run(scenario(made))
    assert failed.error is not None and failed.error.startswith(message)
    assert before.value == after.value


def test_prints_and_reads_of_the_function_do_not_touch_the_channel(capfd):
    with pool() as made:
        outcome = call(made, "print", "mine")
    assert (outcome.value, outcome.error) == ("mine", None)
    assert "forged" not in capfd.readouterr().out


def test_a_hung_child_does_not_delay_the_others():
    async def scenario(made):
        await asyncio.gather(*(made.call(kind="sleep", value=0.1) for _ in range(2)))  # both children are ready
        started = time.monotonic()
        hung = asyncio.create_task(made.call(kind="sleep", value=600))
        others = await asyncio.gather(*(made.call(kind="echo", value=i) for i in range(50)))
        elapsed = time.monotonic() - started
        return await hung, others, elapsed

    with pool(num_processes=2, timeout=3.0) as made:
        hung, others, elapsed = asyncio.run(scenario(made))
    assert [o.value for o in others] == list(range(50))
    assert hung.error == "timeout after 3 s"
    assert elapsed < 2.5


def test_waiting_for_a_slot_or_for_a_start_is_not_the_items_time():
    async def scenario(made):
        return await asyncio.gather(*(made.call(kind="sleep", value=0.6) for _ in range(4)))

    with pool(timeout=1.2) as made:  # 4 times 0.6 s one after the other, each within its own 1.2 s
        outcomes = asyncio.run(scenario(made))
    assert [o.error for o in outcomes] == [None] * 4
    assert all(0.6 <= o.seconds < 1.2 for o in outcomes)


def test_a_busy_event_loop_does_not_turn_a_reply_into_a_timeout():
    async def scenario(made):
        await made.call(kind="pid")
        task = asyncio.create_task(made.call(kind="echo", value=1))
        await asyncio.sleep(0.01)
        time.sleep(2 * DEADLINE)  # the loop is held up, the child has long answered
        return await task

    with pool() as made:
        assert asyncio.run(scenario(made)).value == 1


def test_cancelled_call_does_not_leak_its_answer_into_the_next():
    async def scenario(made):
        await made.call(kind="pid")
        task = asyncio.create_task(made.call(kind="sleep", value=0.2))
        await asyncio.sleep(0.05)
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        return await made.call(kind="echo", value="mine")

    with pool() as made:
        assert asyncio.run(scenario(made)).value == "mine"


def test_a_grown_child_is_replaced_before_it_reaches_its_limit():
    async def scenario(made):
        return [await made.call(kind="grow") for _ in range(3)]

    with pool(memory_mb=512, timeout=5.0) as made:
        outcomes = asyncio.run(scenario(made))
    assert [o.error for o in outcomes] == [None] * 3
    assert len({o.value for o in outcomes}) == 3


# -- event loops ------------------------------------------------------------------------------------------------------


def test_made_before_any_loop_and_used_in_two():
    with pool() as made:
        first, second = call(made, "pid"), call(made, "pid")
    assert first.value == second.value  # the child outlives the loop


def test_made_inside_a_running_loop():
    async def scenario():
        with pool() as made:
            return await made.call(kind="echo", value=1)

    assert asyncio.run(scenario()).value == 1


def test_made_in_one_thread_and_used_in_the_loops_of_others():
    found: list[int] = []
    with pool() as made:
        for _ in range(3):  # the thread that started the child is gone each time, and the child with it
            thread = threading.Thread(target=lambda: found.append(call(made, "echo", 5).value))
            thread.start()
            thread.join()
        assert call(made, "echo", 6).value == 6
    assert found == [5, 5, 5]


def test_a_loop_closed_under_a_call_leaves_a_pool_that_works():
    with pool(timeout=30.0) as made:
        loop = asyncio.new_event_loop()
        loop.run_until_complete(made.call(kind="pid"))
        task = loop.create_task(made.call(kind="sleep", value=0.2))
        loop.run_until_complete(asyncio.sleep(0.05))
        loop.close()
        assert call(made, "echo", "mine").value == "mine"
        task._log_destroy_pending = False  # it was abandoned on purpose
        del task


def test_two_loops_at_once_are_refused():
    with pool(timeout=5.0) as made:
        call(made, "pid")
        thread = threading.Thread(target=call, args=(made, "sleep", 1.0))
        thread.start()
        try:
            assert wait_until(lambda: any(slot.busy for slot in made._slots))
            with pytest.raises(RuntimeError, match="another event loop"):
                call(made, "pid")
        finally:
            thread.join()


# -- start-up ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "warm_up", "message"),
    [
        ("no_such_module.f", None, "ModuleNotFoundError"),
        ("reward_targets.no_such_function", None, "AttributeError"),
        ("reward_targets.fail_to_warm_up", {}, "RuntimeError: no such library"),
        ("reward_targets.die_at_start", {}, "died while starting .exit code 9."),
        ("reward_targets.sleep_at_start", {}, "not ready after 1 s"),
    ],
)
def test_a_function_that_cannot_start_is_an_error_of_the_launch(monkeypatch, target, warm_up, message):
    monkeypatch.setattr(process_pool, "_START_PAUSE_S", 0.01)

    async def scenario(made):
        return await asyncio.gather(*(made.call() for _ in range(5)), return_exceptions=True)

    before = children()  # of other tests' fixtures, which live until the session ends
    with pool(target, warm_up=warm_up, start_timeout=1.0 if "sleep" in target else 30.0) as made:
        errors = asyncio.run(scenario(made))
    for error in errors:
        assert isinstance(error, LaunchError)
    with pytest.raises(LaunchError, match=message):
        raise errors[0]
    assert wait_until(lambda: children() <= before)


# -- no process is left -----------------------------------------------------------------------------------------------


def test_nothing_runs_before_the_first_call_and_nothing_after_close():
    before = children()
    with pool(num_processes=2) as made:
        assert children() == before
        call(made, "echo")
        assert len(children() - before) == 2
        assert call(made, "sleep", 600).error is not None
    assert children() == before
    made.close()
    with pytest.raises(RuntimeError, match="closed"):
        call(made, "echo")


def test_close_ends_the_calls_in_flight():
    async def scenario(made):
        tasks = [asyncio.create_task(made.call(kind="sleep", value=600)) for _ in range(2)]
        await asyncio.sleep(0.02)
        while not any(task.done() for task in tasks) and not made._slots[0].child.pending:
            await asyncio.sleep(0.02)
        made.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    before = children()
    with pool(timeout=60.0) as made:
        running, waiting = asyncio.run(scenario(made))
    assert running.error == "grader died (the pool was closed)"
    assert isinstance(waiting, RuntimeError)
    assert children() == before


def test_grandchildren_die_with_the_child():
    before = children()
    with pool() as made:
        call(made, "echo")
        assert call(made, "fork_and_hang").error == "timeout after 0.5 s"
        grandchild = call(made, "fork").value
        assert not gone(grandchild)
    none_left = wait_until(lambda: gone(grandchild) and children() == before)
    with contextlib.suppress(ProcessLookupError):
        os.kill(grandchild, signal.SIGKILL)
    assert none_left


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_no_orphan_after_the_parent_was_killed(how):
    script = """
        import asyncio
        from roll_opd.rewards.process_pool import ProcessPool
        async def main():
            pool = ProcessPool("reward_targets.act", num_processes=2, timeout=600)
            pids = [(await pool.call(kind="pid")).value for _ in range(2)]
            pids += [slot.child.process.pid for slot in pool._slots]
            print(*set(pids), flush=True)
            await asyncio.gather(pool.call(kind="hold"), pool.call(kind="hold"))  # both are deaf to their channel
        asyncio.run(main())
    """
    path = os.pathsep.join(sys.path)
    parent = subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(script)],
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    time.sleep(0.5)
    assert not any(gone(pid) for pid in pids)
    parent.send_signal(how)
    parent.wait(10)
    parent.stdout.close()
    none_left = wait_until(lambda: all(gone(pid) for pid in pids))
    for pid in pids:  # a test that fails leaves none behind either
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert none_left
