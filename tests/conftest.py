"""Miniature models with random weights, a few circles, and a small cache of them."""

import contextlib
import gc
import hashlib
import importlib
import json
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import click
import numpy as np
import psutil
import pytest
import torch
from accelerate.state import AcceleratorState
from click.testing import CliRunner, Result
from diffusers import SD3ControlNetModel
from hypothesis import settings
from PIL import Image
from torch import Tensor

os.environ["HF_HUB_OFFLINE"] = "1"  # read at the first import of huggingface_hub

import huggingface_hub

import demo.base_model.pipeline
from benchmarks.synthetic import Shape, write_cache
from demo.circles import random_circles as draw
from demo.circles import write_circles
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from sd3.pretrained import DATA_KEY
from shards.format import manifest
from tests import hub_server, skips
from tests.hub_server import Hub
from train import loop, models
from train.config import TrainConfig
from train.data import Batch

# The same examples every time: a run that passes is one that passes again.
settings.register_profile("repeatable", derandomize=True)
settings.load_profile("repeatable")

Spoil = Callable[[Tensor, Any], Tensor]
REPOSITORY = Path(__file__).parent.parent
RESOLUTION_PX = 64
NUM_ROWS = 10
TOKENS = 20
# Two prompts of (24 * 80 + 20 * 96 + 80) floats, eight latents of 16 * 8 * 8 floats.
SHARD_MB = 0.0333
# Records of the second and the third are of equal size.
BUCKETS = [(8, 8), (4, 12), (12, 4)]
BUCKETED = Shape(side=8, tokens=TOKENS, clip_width=80, t5_width=96, pooled_width=80)
PROMPTS = (
    "tomato circle with pale turquoise background",
    "royal blue circle with lemon chiffon background",
)


def pytest_configure(config: pytest.Config) -> None:
    """Watch over skipped tests."""
    if not config.pluginmanager.is_registered(skips):
        config.pluginmanager.register(skips)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Begin with the slow tests, so that at the end no worker waits for another's."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish() -> None:
    """Spare the collector what lives as long as the process; each run calls it three times."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def one_accelerator_a_test() -> None:
    """Forget the precision that an earlier test's Accelerator settled for the process."""
    AcceleratorState._reset_state(True)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A miniature SD3 base; its VAE's posterior is narrow, as a trained one's is."""
    folder = tmp_path_factory.mktemp("models") / "base"
    pipeline = demo.base_model.pipeline.build_pipeline(0, num_layers=4)
    narrow_posterior(pipeline.vae)
    demo.base_model.pipeline.save_base(folder, pipeline)
    return folder


def awaken(controlnet: SD3ControlNetModel, seed: int = 0) -> None:
    """Give the layers that start at zero random weights, so that the control has a say."""
    generator = torch.Generator().manual_seed(seed)
    layers = [*controlnet.controlnet_blocks, controlnet.pos_embed_input.proj]
    with torch.no_grad():
        for layer in layers:
            layer.weight.normal_(std=0.3, generator=generator)


def narrow_posterior(vae: torch.nn.Module) -> None:
    """Make a VAE's standard deviation vanish, so that sampling gives the mean."""
    out = vae.encoder.conv_out
    with torch.no_grad():
        out.weight[16:] = 0
        out.bias[16:] = -60


@pytest.fixture(scope="session")
def circles(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten rows in fill50k's layout, with some grain.

    On quite flat pictures a random VAE's GroupNorm divides by next to nothing and magnifies
    rounding a thousandfold.
    """
    folder = tmp_path_factory.mktemp("source") / "fill50k"
    write_circles(folder, draw(NUM_ROWS, seed=3))
    rng = np.random.default_rng(0)
    for path in sorted(folder.glob("*/*.png")):
        pixels = np.array(Image.open(path))
        grain = rng.normal(0, 40, pixels.shape)
        Image.fromarray((pixels + grain).clip(0, 255).astype(np.uint8)).save(path)
    return folder


@pytest.fixture(scope="session")
def precompute_config(
    base: Path, circles: Path, tmp_path_factory: pytest.TempPathFactory
) -> PrecomputeConfig:
    """Everything in float32, in small shards, so that there are several."""
    return PrecomputeConfig(
        source=circles,
        pretrained_model_name_or_path=str(base),
        cache=tmp_path_factory.mktemp("cache") / "cache",
        resolution=RESOLUTION_PX,
        max_sequence_length=TOKENS,
        overwrite=True,  # of ten rows one is a tenth
        validation_prompt=PROMPTS,
        validation_image=(circles / "source" / "0.png", circles / "source" / "1.png"),
        cache_dtype="float32",
        text_dtype="float32",
        vae_batch_size=2,
        text_batch_size=2,
        shard_mb=SHARD_MB,
        device="cpu",
    )


@pytest.fixture(scope="session")
def cache(precompute_config: PrecomputeConfig) -> Path:
    """A complete cache of the circles."""
    precompute(precompute_config)
    return precompute_config.cache


@pytest.fixture(scope="session")
def held_out(precompute_config: PrecomputeConfig, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same rows, three of them held out of training; with standard deviations."""
    folder = tmp_path_factory.mktemp("held_out") / "cache"
    precompute(replace(precompute_config, cache=folder, validation_rows=3, posterior="mean_std"))
    return folder


@pytest.fixture(scope="session")
def bucketed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """35 samples of random numbers in 7 shards of three shapes, that the miniature base takes."""
    folder = tmp_path_factory.mktemp("bucketed") / "cache"
    write_cache(folder, BUCKETED, num_shards=7, images_per_shard=5, buckets=BUCKETS)
    return folder


@pytest.fixture
def fresh(precompute_config: PrecomputeConfig, tmp_path: Path) -> PrecomputeConfig:
    """The cache's settings, for a cache of the test's own."""
    return replace(precompute_config, cache=tmp_path / "cache")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Hub]:
    """An empty model hub on loopback, which huggingface_hub takes for the real one."""
    made = Hub()
    server = hub_server.start(made)
    for name, value in {
        "ENDPOINT": made.url,
        "HF_HUB_OFFLINE": False,
        "HF_HUB_DISABLE_XET": True,
        "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
        "HUGGINGFACE_CO_URL_TEMPLATE": made.url + "/{repo_id}/resolve/{revision}/{filename}",
    }.items():
        monkeypatch.setattr(huggingface_hub.constants, name, value)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    huggingface_hub.close_session()  # the client remembers proxies
    yield made
    huggingface_hub.close_session()
    server.shutdown()
    server.server_close()


def with_another_control(cache: Path, copy: Path, name: str) -> Path:
    """Return a copy of a cache that has its control once more, under another name."""
    shutil.copytree(cache, copy)
    for product in ("conditioning", "validation"):
        if (copy / product / "conditioning").is_dir():
            shutil.copytree(copy / product / "conditioning", copy / product / name)
    found = manifest.load(copy)
    parts = ("conditioning", "conditioning_specs", "validation")
    both = {
        part: dict.fromkeys(("conditioning", name), getattr(found, part)["conditioning"])
        for part in parts
    }
    manifest.write(copy, replace(found, samples=None, **both))
    return copy


def four_steps(base: Path, cache: Path, output_dir: Path) -> TrainConfig:
    """Return the settings of four steps of two samples, without pictures."""
    return TrainConfig(
        pretrained_model_name_or_path=str(base),
        cache=(str(cache),),
        output_dir=output_dir,
        num_controlnet_layers=2,
        train_batch_size=2,
        max_train_steps=4,
        learning_rate=1e-3,
        lr_scheduler="cosine",
        lr_warmup_steps=1,
        checkpointing_steps=2,
        validation_steps=0,
        report_to="none",
        mixed_precision="no",
    )


@pytest.fixture
def train_config(base: Path, cache: Path, tmp_path: Path) -> TrainConfig:
    """Four steps of two samples, without pictures."""
    return four_steps(base, cache, tmp_path / "out")


@pytest.fixture(scope="session")
def controlnet(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet with a say, saved as train saves it."""
    model = models.new_controlnet(base, None, 2, "prompt")
    awaken(model)
    data = {
        "max_sequence_length": TOKENS,
        "conditioning_range": "-1_1",
        "height": RESOLUTION_PX,
        "width": RESOLUTION_PX,
    }
    model.register_to_config(**{DATA_KEY: data})
    folder = tmp_path_factory.mktemp("controlnet")
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def in_batch(monkeypatch: pytest.MonkeyPatch) -> Callable[[int, Spoil], None]:
    """Have something done to the losses of the n-th batch, counted from 1."""

    def call(number: int, spoil: Spoil) -> None:
        original, count = loop.batch_losses, [0]

        def batch_losses(batch: Batch, controlnet: Any, *others: Any) -> Tensor:
            count[0] += 1
            losses = original(batch, controlnet, *others)
            return spoil(losses, controlnet) if count[0] == number else losses

        monkeypatch.setattr(loop, "batch_losses", batch_losses)

    return call


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    exit_code: int
    output: str


def without_make() -> dict[str, str]:
    """Return the environment for a `make` of its own: that of these tests may come from make."""
    ours = {"MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES", "ARGS"}
    return {name: value for name, value in os.environ.items() if name not in ours}


def main_of(module: str) -> click.Command:
    """Return what `python -m <module>` runs."""
    found = importlib.import_module(module)
    if hasattr(found, "__path__"):
        found = importlib.import_module(f"{module}.__main__")
    return cast(click.Command, found.main)


@pytest.fixture
def command() -> Callable[..., Outcome]:
    """Run `python -m <package> <arguments>` in this process."""

    def call(package: str, *arguments: object) -> Outcome:
        result: Result = CliRunner().invoke(
            main_of(package),
            [str(argument) for argument in arguments],
            prog_name=f"python -m {package}",
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        return Outcome(result.exit_code, result.output)

    return call


def reseal(cache: Path) -> None:
    """Have a cache's manifest vouch for its files as they are, as a faulty writer's would."""
    path = cache / "manifest.json"
    document = json.loads(path.read_text())
    for folder in ("text", "latents", "conditioning/conditioning", "validation/conditioning"):
        kind, _, name = folder.partition("/")
        product = document[kind][name] if name else document[kind]
        for suffix, digests in (("tar", "shard_sha256"), ("json", "sidecar_sha256")):
            product[digests] = [
                hashlib.sha256((cache / folder / f"{shard:06d}.{suffix}").read_bytes()).hexdigest()
                for shard in range(len(product["shard_records"]))
            ]
    write_manifest(cache, document)


def write_manifest(cache: Path, document: dict[str, Any]) -> None:
    """Write a manifest with the digest that belongs to it."""
    text = json.dumps({"digest": "0" * 64} | document | {"digest": "0" * 64})
    seal = hashlib.sha256(text.encode()).hexdigest()
    (cache / "manifest.json").write_text(text.replace("0" * 64, seal, 1))


def free_port() -> int:
    """Return a port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_python(
    *arguments: object, cwd: Path = REPOSITORY, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run Python on this repository in a process of its own, for less than a test may take."""
    return subprocess.run(
        [sys.executable, *(str(argument) for argument in arguments)],
        cwd=cwd,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=800,  # `make gpu` in small takes 160 s of two quiet cores
    )


def kill_with_children(process: subprocess.Popen[str]) -> None:
    """Kill a process and all that it started, if they still run."""
    with contextlib.suppress(psutil.NoSuchProcess):
        parent = psutil.Process(process.pid)
        for one in [*parent.children(recursive=True), parent]:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
    process.wait()


@contextlib.contextmanager
def running(arguments: Sequence[object], **options: Any) -> Iterator[subprocess.Popen[str]]:
    """Have Python run on this repository; kill it at the end if it still runs.

    Args:
        arguments: Python's.
        options: of `subprocess.Popen`.
    """
    command = [sys.executable, *(str(argument) for argument in arguments)]
    options = {"cwd": REPOSITORY, "text": True} | options
    with subprocess.Popen(command, **options) as process:
        try:
            yield process
        finally:
            kill_with_children(process)


def flags(config: object) -> list[str]:
    """Return a config dataclass as command line flags."""
    found: list[str] = []
    for name, value in vars(config).items():
        flag = "--" + name.replace("_", "-")
        if isinstance(value, bool):
            found += [flag] if value else []
        elif isinstance(value, tuple):
            found += [part for item in value for part in (flag, str(item))]
        elif value is not None:
            found += [flag, str(value)]
    return found


def two_processes(config: TrainConfig) -> list[object]:
    """Return Python's arguments that train in two processes with DDP."""
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", 2, "--master-port", free_port())
    return [*torchrun, "-m", "train", *flags(config)]


def train_in_two_processes(config: TrainConfig) -> None:
    """Train in two processes on the CPU, over gloo."""
    done = run_python(*two_processes(config), ACCELERATE_USE_CPU="true")
    assert done.returncode == 0, done.stderr
