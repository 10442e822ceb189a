"""The stand-in finds what it is there to find."""

import threading
import time

import pytest
import torch

from common.device import use_device
from tests.devices import stand_in

NUMBERS = torch.arange(2.0, 5.0)


def test_tensors_of_two_devices_do_not_mix() -> None:
    second = NUMBERS.to("cuda:1")
    for other in (NUMBERS, NUMBERS.to("cuda:0")):
        with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
            second + other
    assert (second + torch.tensor(1.0)).device == second.device  # a number may come from the host
    assert torch.equal((second * 2).cpu(), NUMBERS * 2)


def test_a_late_copy_is_there_once_its_own_stream_is_waited_for() -> None:
    host = torch.empty(3, pin_memory=True).copy_(NUMBERS.to("cuda:1"), non_blocking=True)
    event = torch.cuda.Event()
    event.record()  # of the thread's own device, the first one
    event.synchronize()
    assert not torch.equal(host, NUMBERS)
    event.record(torch.cuda.current_stream("cuda:1"))
    assert not event.query()
    event.synchronize()
    assert torch.equal(host, NUMBERS)


def test_memory_that_is_not_pinned_is_waited_for() -> None:
    host = torch.empty(3).copy_(NUMBERS.to("cuda:1"), non_blocking=True)
    assert torch.equal(host, NUMBERS)


def test_memory_that_changes_while_it_is_copied_is_noticed() -> None:
    def change(wait: bool) -> None:
        use_device(torch.device("cuda:1"))
        host = NUMBERS.clone().pin_memory()
        device = host.to("cuda:1", non_blocking=True)
        if wait:
            torch.cuda.synchronize("cuda:1")
        host.zero_()
        assert torch.equal(device.cpu(), NUMBERS)

    with stand_in.only("cuda:1"):
        change(wait=True)
    with pytest.raises(AssertionError), stand_in.only("cuda:1"):
        change(wait=False)


def test_the_use_of_another_device_is_an_error() -> None:
    with stand_in.only("cuda:1"):
        torch.ones(1, device="cuda:1")
        for use in (
            lambda: torch.ones(1, device="cuda"),
            lambda: NUMBERS.to("cuda:0"),
            lambda: NUMBERS.pin_memory(),  # makes a context on the thread's own device
            lambda: torch.cuda.Event().record(),
            torch.cuda.synchronize,
        ):
            with pytest.raises(RuntimeError, match="cuda:0 is used"):
                use()


def test_each_thread_begins_with_the_first_device() -> None:
    devices: list[int] = []

    def work(device: str | None) -> None:
        if device:
            use_device(torch.device(device))
        devices.append(torch.cuda.current_device())

    use_device(torch.device("cuda:1"))
    try:
        for device in (None, "cuda:1"):
            thread = threading.Thread(target=work, args=(device,))
            thread.start()
            thread.join()
    finally:
        use_device(torch.device("cuda:0"))
    assert devices == [0, 1]


def test_time_passes_between_events_of_one_device() -> None:
    first, last, other = (torch.cuda.Event(enable_timing=True) for _ in range(3))
    first.record()
    time.sleep(0.01)
    last.record()
    assert 10 <= first.elapsed_time(last) < 1000
    other.record(torch.cuda.current_stream("cuda:1"))
    with pytest.raises(RuntimeError, match="two devices"):
        first.elapsed_time(other)


def test_gradients_are_where_their_weights_are_and_so_is_the_thread_that_computes_them() -> None:
    weight = torch.nn.Parameter(NUMBERS.to("cuda:1"))
    devices: list[int] = []
    weight.register_post_accumulate_grad_hook(lambda _: devices.append(torch.cuda.current_device()))
    (weight * weight).sum().backward()
    assert weight.grad is not None
    assert weight.grad.device == weight.device
    assert torch.equal(weight.grad.cpu(), 2 * NUMBERS)
    assert devices == [1]


def test_pinned_memory_may_be_freed_while_another_thread_copies() -> None:
    """Who frees it may hold Python's lock, and who copies may wait for that."""
    ended = threading.Event()

    def copy() -> None:
        use_device(torch.device("cuda:1"))
        with torch.inference_mode():
            while not ended.is_set():
                NUMBERS.to("cuda:1").to(torch.float16).cpu()

    copying = threading.Thread(target=copy, daemon=True)
    copying.start()
    for _ in range(20_000):
        torch.empty(1, pin_memory=True).untyped_storage()
    ended.set()
    copying.join()
