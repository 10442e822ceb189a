"""Two GPUs on a machine without one: `python -m tests.devices.stand_in MODULE ...` runs a module.

`backend.cpp` gives torch the device `cuda`, in host memory. This module has it compiled, loads it
before torch, which looks for devices as it is imported, and answers for it in `torch.cuda`. It
lasts for the process, so tests run in one of their own.
"""

import contextlib
import ctypes
import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import runpy
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

NUM_DEVICES = 2
TOTAL_BYTES = 24 << 30
SOURCE = Path(__file__).with_name("backend.cpp")


def find_torch() -> Path:
    """Return torch's folder, without importing it."""
    found = importlib.util.find_spec("torch")
    assert found is not None
    assert found.origin is not None
    return Path(found.origin).parent


def build() -> Path:
    """Return the compiled backend, which is kept for the next time."""
    root = find_torch()
    version = SOURCE.read_bytes() + importlib.metadata.version("torch").encode()
    digest = hashlib.sha256(version).hexdigest()[:16]
    library = SOURCE.parent / "__pycache__" / f"backend-{digest}.so"
    if not library.is_file():
        library.parent.mkdir(exist_ok=True)
        new = library.with_suffix(f".{os.getpid()}")
        include, lib = root / "include", root / "lib"
        flags = ["-O0", "-std=c++20", "-fPIC", "-shared", "-Wno-interference-size"]
        flags += [f"-I{include}", f"-I{include}/torch/csrc/api/include"]
        libraries = [f"-L{lib}", f"-Wl,-rpath,{lib}", "-ltorch_cpu", "-lc10"]
        subprocess.run(["g++", *flags, str(SOURCE), "-o", str(new), *libraries], check=True)
        new.rename(library)
    return library


@functools.cache
def backend() -> Any:
    """Return the loaded backend."""
    library = ctypes.CDLL(str(build()), mode=ctypes.RTLD_GLOBAL)
    library.submitted.restype = library.completed.restype = ctypes.c_int64
    library.get_stream.restype = ctypes.c_int64
    return library


if "torch" not in sys.modules:
    backend()

import torch  # noqa: E402


def index_of(device: Any) -> int:
    """Return the number of a device as torch.cuda's functions take it."""
    if device is None:
        return int(backend().get_device())
    if isinstance(device, int):
        return device if device >= 0 else int(backend().get_device())
    named = torch.device(device)
    assert named.type == "cuda"
    return int(backend().get_device()) if named.index is None else named.index


def touch(index: int) -> int:
    """Return 0 if a device may be used."""
    if not backend().may_use(index):
        raise RuntimeError(f"cuda:{index} is used")
    return 0


class Stream:
    """A device's stream; 0 is its default one."""

    count = 0

    def __init__(self, device: Any = None, stream_id: int | None = None, **_: Any) -> None:
        self.device_index = index_of(device)
        if stream_id is None:
            Stream.count += 1
            stream_id = Stream.count
        self.stream_id = stream_id
        self.device = torch.device("cuda", self.device_index)

    def synchronize(self) -> None:
        position = backend().submitted(self.device_index, ctypes.c_int64(self.stream_id))
        self.complete(position)

    def complete(self, position: int) -> None:
        arguments = ctypes.c_int64(self.stream_id), ctypes.c_int64(position)
        backend().complete_to(self.device_index, *arguments)

    def wait_event(self, event: "Event") -> None:
        event.synchronize()

    def wait_stream(self, stream: "Stream") -> None:
        stream.synchronize()


class Event:
    """A place in a stream; it knows of nothing on others."""

    def __init__(self, enable_timing: bool = False, **_: Any) -> None:
        self.enable_timing = enable_timing
        self.stream: Stream | None = None

    def record(self, stream: Stream | None = None) -> None:
        self.stream = stream or current_stream()
        touch(self.stream.device_index)
        stream_id = ctypes.c_int64(self.stream.stream_id)
        self.position = backend().submitted(self.stream.device_index, stream_id)
        self.time = time.perf_counter()

    def synchronize(self) -> None:
        if self.stream is not None:
            self.stream.complete(self.position)

    def query(self) -> bool:
        if self.stream is None:
            return True
        stream_id = ctypes.c_int64(self.stream.stream_id)
        done = backend().completed(self.stream.device_index, stream_id)
        return bool(done >= self.position)

    def elapsed_time(self, end: "Event") -> float:
        assert self.enable_timing
        assert end.enable_timing
        assert self.stream is not None
        assert end.stream is not None
        if self.stream.device_index != end.stream.device_index:
            raise RuntimeError("events of two devices")
        if not end.query():
            raise RuntimeError("the event has not happened yet")
        return 1000 * (end.time - self.time)


def current_stream(device: Any = None) -> Stream:
    index = index_of(device)
    return Stream(index, backend().get_stream(index))


@contextlib.contextmanager
def stream(chosen: Stream | None) -> Iterator[None]:
    if chosen is None:
        yield
        return
    before = current_stream(chosen.device_index)
    with use(chosen.device_index):
        set_stream(chosen)
        try:
            yield
        finally:
            set_stream(before)


def set_stream(chosen: Stream) -> None:
    backend().set_stream(chosen.device_index, ctypes.c_int64(chosen.stream_id))


class use:
    """`torch.cuda.device`."""

    def __init__(self, device: Any) -> None:
        self.index = index_of(device)

    def __enter__(self) -> None:
        self.before = backend().get_device()
        backend().set_device(self.index)

    def __exit__(self, *_: object) -> None:
        backend().set_device(self.before)


def set_device(device: Any) -> None:
    if index_of(device) >= NUM_DEVICES:
        raise RuntimeError("CUDA error: invalid device ordinal")
    backend().set_device(index_of(device))


def synchronize(device: Any = None) -> None:
    touch(index_of(device))
    backend().complete_device(index_of(device))


def properties(device: Any = None) -> SimpleNamespace:
    return SimpleNamespace(
        total_memory=TOTAL_BYTES,
        name=f"Stand-in {index_of(device)}",
        major=9,
        minor=0,
        multi_processor_count=1,
    )


# What `torch.cuda` answers.
ANSWERS: dict[str, Any] = {
    "_is_compiled": lambda: True,
    "_lazy_init": lambda: None,
    "_is_in_bad_fork": lambda: False,
    "is_available": lambda: True,
    "is_initialized": lambda: True,
    "is_bf16_supported": lambda *_, **__: True,
    "device_count": lambda: NUM_DEVICES,
    "current_device": lambda: index_of(None),
    "set_device": set_device,
    "device": use,
    "Event": Event,
    "Stream": Stream,
    "stream": stream,
    "set_stream": set_stream,
    "current_stream": current_stream,
    "default_stream": lambda device=None: Stream(device, 0),
    "synchronize": synchronize,
    "get_device_name": lambda device=None: properties(device).name,
    "get_device_capability": lambda device=None: (9, 0),
    "get_device_properties": properties,
    "mem_get_info": lambda device=None: (TOTAL_BYTES, TOTAL_BYTES),
    "empty_cache": lambda: None,
    "manual_seed": lambda seed: None,
    "manual_seed_all": lambda seed: None,
    "get_rng_state": lambda device=None: torch.get_rng_state(),
    "set_rng_state": lambda state, device=None: None,
    "get_rng_state_all": lambda: [torch.get_rng_state() for _ in range(NUM_DEVICES)],
    "set_rng_state_all": lambda states: None,
    "reset_peak_memory_stats": lambda device=None: touch(index_of(device)),
    "max_memory_allocated": lambda device=None: touch(index_of(device)),
    "max_memory_reserved": lambda device=None: touch(index_of(device)),
    "memory_allocated": lambda device=None: touch(index_of(device)),
    "memory_reserved": lambda device=None: touch(index_of(device)),
}


def install() -> None:
    """Give torch two devices, for the rest of the process and before its first backward pass."""
    with contextlib.suppress(ImportError):
        # Before it finds CUDA, and takes kernels of its own instead of the stand-in's.
        importlib.import_module("bitsandbytes")
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]
    for name, answer in ANSWERS.items():
        setattr(torch.cuda, name, answer)
        for module in (torch.cuda.memory, torch.cuda.random, torch.cuda.streams):
            if hasattr(module, name):
                setattr(module, name, answer)


@contextlib.contextmanager
def only(device: str) -> Iterator[None]:
    """Make every use of another device an error, and every change of memory that is being copied.

    The calling thread begins with the first device, as every thread does.
    """
    others = set(range(NUM_DEVICES)) - {index_of(device)}
    set_device(0)
    backend().forget_faults()
    for other in others:
        backend().forbid(other, 1)
    try:
        yield
        for index in range(NUM_DEVICES):
            backend().complete_device(index)
        assert not backend().num_faults()
    finally:
        for other in others:
            backend().forbid(other, 0)
        set_device(0)


if __name__ == "__main__":
    from tests.devices import stand_in

    stand_in.install()
    sys.argv = sys.argv[1:]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
