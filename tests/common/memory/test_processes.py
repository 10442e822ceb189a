"""`map_in_processes`: results in order, errors where they are due, nothing left behind."""

import multiprocessing
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, nullcontext

import pytest
import torch

from common.errors import ConfigError
from common.memory import processes
from common.memory.processes import map_in_processes, num_cores

on_linux = pytest.mark.skipif(sys.platform != "linux", reason="processes are copied on Linux only")


@pytest.fixture(autouse=True)
def _two_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "num_cores", lambda: 2)


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_results_come_in_the_order_of_the_items(count: int) -> None:
    # A closure over a lambda, neither of which can be pickled.
    def plus(item: int) -> int:
        return (lambda: item + count)()

    assert list(map_in_processes(plus, range(count))) == [item + count for item in range(count)]


@on_linux
def test_they_are_computed_in_other_processes() -> None:
    about = list(
        map_in_processes(
            lambda _: (os.getpid(), signal.getsignal(signal.SIGINT), torch.get_num_threads()),
            range(4),
        )
    )
    assert os.getpid() not in {pid for pid, _, _ in about}
    # Of Ctrl-C only the first process says something.
    assert {handler for _, handler, _ in about} == {signal.SIG_IGN}
    assert {threads for _, _, threads in about} == {1}


@pytest.mark.parametrize("reason", ["items", "cores", "platform", "thread"])
def test_without_need_or_without_safety_they_are_computed_here(
    reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if reason == "cores":
        monkeypatch.setattr(processes, "num_cores", lambda: 1)
    if reason == "platform":
        monkeypatch.setattr(sys, "platform", "darwin")
    items = range(1 if reason == "items" else 3)
    with ThreadPoolExecutor(1) if reason == "thread" else nullcontext() as pool:
        if pool:
            pool.submit(int)  # it waits for more from now on
        assert {*map_in_processes(lambda _: os.getpid(), items)} == {os.getpid()}


def test_a_thread_copies_no_process() -> None:
    with ThreadPoolExecutor(1) as pool:
        pids = pool.submit(lambda: {*map_in_processes(lambda _: os.getpid(), range(3))})
        assert pids.result() == {os.getpid()}


def test_an_error_is_raised_when_its_result_is_due() -> None:
    def fail(item: int) -> int:
        if item == 1:
            raise ConfigError(f"item {item} is wrong")
        return item

    results = map_in_processes(fail, range(4))
    assert next(results) == 0
    with pytest.raises(ConfigError, match=r"^item 1 is wrong$"):
        next(results)
    assert not multiprocessing.active_children()


def test_nothing_goes_on_after_it_is_closed() -> None:
    with closing(map_in_processes(lambda item: item, range(9))) as results:
        assert next(results) == 0
    assert not multiprocessing.active_children()


@on_linux
def test_a_handler_of_this_process_keeps_none_of_them_alive() -> None:
    def note(*_: object) -> None:
        pass

    before = signal.signal(signal.SIGTERM, note)
    try:
        handlers = map_in_processes(lambda _: signal.getsignal(signal.SIGTERM), range(9))
        assert next(handlers) == signal.SIG_DFL
        handlers.close()  # ends those that compute or wait
        assert signal.getsignal(signal.SIGTERM) is note
    finally:
        signal.signal(signal.SIGTERM, before)
    assert not multiprocessing.active_children()


@on_linux
def test_cores_are_those_that_this_process_may_use() -> None:
    all_of_them = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(all_of_them)})
        assert num_cores() == 1
    finally:
        os.sched_setaffinity(0, all_of_them)
