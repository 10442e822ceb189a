"""`python -m benchmarks.train_step`: speed and memory of a training step at a base's true size.

Weights are random, the cache is made up, and the step is the one that `python -m train` takes. One
row for each flag alone, for each card's preset, and for sizes and batches of the plain setting:
samples a second; floating point operations that the step needs, recomputation left out, over what
the same device reaches in large matrix products; and the peak of memory beside `--estimate`'s.
It is made to take less than nine minutes on a GPU; `--tiny` tries it all on a miniature, anywhere,
and `--predict` gives what can be said without a GPU: the memory.
"""

import gc
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from matplotlib.figure import Figure
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.bases import TRANSFORMERS
from benchmarks.encoders import num_parameters
from benchmarks.presets import cards, forget_accelerator
from benchmarks.synthetic import Shape, write_cache
from common.atomic_files import write_text
from common.config_file import read_section
from common.device import default_dtype
from common.errors import ConfigError, RunError
from common.options import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from train import loop
from train.assembly import Run, assemble
from train.config import TrainConfig
from train.data import RankPlaces, TrainingSamples, read_batches
from train.memory.estimate import find_sizes
from train.memory.simulation import PARTS, Simulation, Sizes, simulate
from train.optim.nonfinite import NonFiniteGuard

IMAGES = 16
SECONDS, MOST_STEPS = 3.0, 20
TINY: dict[str, Any] = TRANSFORMERS["sd3-medium"] | {
    "num_layers": 4,
    "num_attention_heads": 4,
    "attention_head_dim": 16,
    "caption_projection_dim": 64,
    "joint_attention_dim": 96,
    "pooled_projection_dim": 80,
    "pos_embed_max_size": 32,
}
PLAIN: dict[str, Any] = {
    "mixed_precision": "bf16",
    "train_batch_size": 1,
    "validation_steps": 0,
    "report_to": "none",
    "allow_tf32": True,
    "dataloader_num_workers": 2,
}
FLAGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "gradient checkpointing": {"gradient_checkpointing": True},
    "8 bit AdamW": {"use_8bit_adam": True},
    "base in int8": {"quantize_base": "int8"},
    "base in fp8": {"quantize_base": "fp8"},
    "base in nf4": {"quantize_base": "nf4"},
    "fused backward pass": {"fused_backward_pass": True, "max_grad_norm": 0.0},
    "bf16 weights": {"bf16_weights": True},
    "offloaded optimiser": {"offload_optimizer": True},
    "offloaded activations": {"offload_activations": True},
    "6 ControlNet blocks": {"num_controlnet_layers": 6},
    "int8, bf16 weights, 8 bit AdamW": {
        "quantize_base": "int8",
        "bf16_weights": True,
        "use_8bit_adam": True,
    },
    "compiled": {"compile": True},
    "fp8 products, compiled": {"quantize_base": "fp8", "fp8_matmul": True, "compile": True},
}
SIZES = [(px, batch) for px in (512, 1024) for batch in (1, 4, 8)]


@dataclass(frozen=True)
class Row:
    """A setting to measure.

    Attributes:
        name: of it.
        px: side of the pictures.
        settings: of training.
    """

    name: str
    px: int
    settings: dict[str, Any]


@click.command(context_settings=CONTEXT)
@click.option(
    "--base", type=click.Choice(list(TRANSFORMERS)), default="sd3-medium", show_default=True
)
@click.option("--tiny", is_flag=True, help="A miniature at 256 px, to try this anywhere.")
@click.option("--predict", is_flag=True, help="Estimate memory, and take no step.")
@click.option("--only", help="Rows whose name has this in it.")
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    help="benchmarks/results/train_step_BASE.json if absent.",
)
@click.option(
    "--chart", type=click.Path(path_type=Path), help="A PNG of the memory, with the reference's."
)
def main(
    base: str,
    tiny: bool,
    predict: bool,
    only: str | None,
    results: Path | None,
    chart: Path | None,
) -> None:
    """Measure every row, print a table, write JSON and draw a chart."""
    if chart is not None and only is not None:
        raise click.UsageError("--chart: shows what --only leaves out; give one of them.")
    if not (tiny or predict) and not torch.cuda.is_available():
        raise click.UsageError("no GPU here; --tiny tries this on a miniature.")
    name = "tiny" if tiny else base
    kind = "_predicted" if predict else ""
    results = results or Path(f"benchmarks/results/train_step_{name}{kind}.json")
    results.parent.mkdir(parents=True, exist_ok=True)
    transformer = TINY if tiny else TRANSFORMERS[base]
    figures: dict[str, Any] = {
        "machine": machine(),
        "versions": versions(),
        "commit": commit(),
        "base": name,
        "matrix_tflops": None if predict else matrix_rate() / 1e12,
        "rows": [],
    }
    with user_errors(), tempfile.TemporaryDirectory() as folder:
        save_random(Path(folder) / "base", transformer, weights=not predict)
        rate = figures["matrix_tflops"]
        click.echo(f"{machine()}, {name}, {rate or 0:.1f} TFLOP/s in matrix products")
        for row in rows(name):
            if only is None or only in row.name:
                found = measure(row, Path(folder), transformer, rate)
                figures["rows"].append(found)
                click.echo(line(found))
                write_text(results, json.dumps(figures, indent=1) + "\n")
    if chart is not None:
        draw(figures["rows"], chart, name)


def rows(base: str) -> Iterator[Row]:
    """Give what is measured; of one size alone where that is a miniature, `tiny`."""
    tiny = base == "tiny"
    usual = 256 if tiny else 1024
    for px, batch in [(usual, 1)] if tiny else SIZES:
        yield Row(f"plain, batch {batch}", px, {"train_batch_size": batch})
    for name, settings in FLAGS.items():
        if name != "plain":
            yield Row(name, usual, settings)
    run = read_section(Path(f"configs/{'sd3-medium' if tiny else base}.toml"), "train", TrainConfig)
    batches = {name: run[name] for name in ("train_batch_size", "gradient_accumulation_steps")}
    for path in cards():
        card = batches | read_section(path, "train", TrainConfig)
        yield Row(f"card of {path.stem.removesuffix('gb')} GB", usual, card)


def save_random(folder: Path, transformer: dict[str, Any], *, weights: bool = True) -> None:
    """Save a transformer with random weights in 16 bit, and a schedule, as a base's folder.

    Args:
        folder: of the base.
        transformer: its configuration.
        weights: or that alone.
    """
    FlowMatchEulerDiscreteScheduler(shift=3.0).save_pretrained(folder / "scheduler")
    if not weights:
        (folder / "transformer").mkdir(parents=True)
        write_text(folder / "transformer/config.json", json.dumps(transformer))
        return
    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with default_dtype(torch.bfloat16), device:
        SD3Transformer2DModel.from_config(transformer).save_pretrained(folder / "transformer")


def settings_of(row: Row, folder: Path, transformer: dict[str, Any]) -> TrainConfig:
    """Return a row's settings, and make the cache that they name."""
    side = row.px // 8
    cache = folder / f"cache{side}"
    if not cache.exists():
        width = int(transformer["joint_attention_dim"])
        pooled = int(transformer["pooled_projection_dim"])
        shape = Shape(side, clip_width=width // 2, t5_width=width, pooled_width=pooled)
        write_cache(cache, shape, 1, IMAGES)
    config = TrainConfig(str(folder / "base"), str(cache), output_dir=folder / "out")
    return replace(config, **PLAIN | row.settings)


def measure(
    row: Row, folder: Path, transformer: dict[str, Any], matrix_tflops: float | None
) -> dict[str, Any]:
    """Return a row's figures, or the reason why there are none."""
    found: dict[str, Any] = {"name": row.name, "px": row.px}
    try:
        config = settings_of(row, folder, transformer)
        sizes = find_sizes(config)
        found["samples"] = config.train_batch_size * config.gradient_accumulation_steps
        found["estimated_bytes"] = simulate(config, sizes).step
        if matrix_tflops is None:
            return found
        seconds, found["measured_bytes"] = _taken(config)
        tflops = flops(config, sizes) / 1e12 / seconds
        found |= {
            "seconds_per_step": seconds,
            "samples_per_second": found["samples"] / seconds,
            "tflops": tflops,
            "of_matrix_rate": tflops / matrix_tflops,
        }
    except torch.OutOfMemoryError:
        found["failed"] = "out of memory"
    except (ConfigError, RunError, ImportError, RuntimeError) as error:
        # What this card or its libraries cannot do is no reason to lose the other rows.
        found["failed"] = f"{type(error).__name__}: {str(error).splitlines()[0]}"
    torch._dynamo.reset()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return found


def _taken(config: TrainConfig) -> tuple[float, int]:
    """Return seconds a step and the most memory; everything is gone when this returns."""
    steps = Steps(assemble(config))
    try:
        return steps.seconds_a_step(), steps.peak_bytes()
    finally:
        steps.close()


class Steps:
    """The steps of a run, one after another.

    Args:
        run: assembled.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.device = run.accelerator.device
        samples = TrainingSamples(
            run.inputs.cache, run.inputs.order, seed=0, proportion_empty_prompts=0.0
        )
        places = RankPlaces(0, batch_size=run.config.train_batch_size, rank=0, num_ranks=1)
        workers = run.config.dataloader_num_workers
        pin = self.device.type == "cuda"
        self.batches = read_batches(samples, places, num_workers=workers, pin=pin)
        self.guard = NonFiniteGuard(
            run.optimizer.optimizer,
            None,
            update_already_applied=False,
            stop=True,
            sample_key=str,
            print=click.echo,
        )
        self.number = 0

    def take(self) -> None:
        """Take a step."""
        self.number += 1
        loop.take_step(self.run, self.batches, self.guard, self.number)

    def seconds_a_step(self) -> float:
        """Return the time of a step once all is warm: after two."""
        for _ in range(2):
            self.take()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        self._wait()
        start, count = time.perf_counter(), 0
        while count < MOST_STEPS and time.perf_counter() - start < SECONDS:
            self.take()
            count += 1
        self._wait()
        return (time.perf_counter() - start) / count

    def peak_bytes(self) -> int:
        """Return the most that was allocated in a step after the first."""
        if self.device.type == "cuda":
            return int(torch.cuda.max_memory_allocated())
        if not self.number:
            self.take()
        return self._standing() + self._beyond_it()

    def close(self) -> None:
        """Let go of everything."""
        self.batches.close()
        if self.run.fused is not None:
            self.run.fused.close()
        forget_accelerator()
        del self.run, self.guard

    def _wait(self) -> None:
        self.guard.finish()
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    def _standing(self) -> int:
        """Return the bytes of weights and of the optimiser's state."""
        networks = (self.run.transformer, self.run.controlnet)
        tensors = [one for net in networks for one in (*net.parameters(), *net.buffers())]
        for state in self.run.optimizer.optimizer.state.values():
            tensors += [one for one in state.values() if isinstance(one, torch.Tensor)]
        return sum({one.untyped_storage().data_ptr(): one.nbytes for one in tensors}.values())

    def _beyond_it(self) -> int:
        """Return the most that the CPU's allocator gave out in a step, by its own account."""
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
            self.take()
        events: Any = found.profiler
        memory = [one for one in events.kineto_results.events() if one.name() == "[memory]"]
        now = most = 0
        for event in sorted(memory, key=lambda one: int(one.start_ns())):
            now += event.nbytes()
            most = max(most, now)
        return most


def flops(config: TrainConfig, sizes: Sizes) -> int:
    """Return the floating point operations that a step needs, nothing computed twice."""
    plain = replace(
        config, gradient_checkpointing=False, quantize_base=None, fp8_matmul=False, compile=False
    )
    aten: Any = torch.ops.aten
    attention = {
        aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
        aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
    }
    counter = FlopCounterMode(display=False, custom_mapping=attention)
    with FakeTensorMode():
        run = Simulation(plain, sizes)
        with counter:
            run.step()
    return int(counter.get_total_flops()) * config.gradient_accumulation_steps


def attention_flops(query: torch.Size, key: torch.Size, *_: Any, **__: Any) -> int:
    """Return the operations of softmax(Q K) V, two products of [B, heads, T, width] each."""
    batch, heads, length, width = query
    return 4 * batch * heads * length * key[2] * width


def attention_backward_flops(_: torch.Size, *others: Any, **__: Any) -> int:
    """Return those of its gradients: two products for each."""
    return 2 * attention_flops(*others)


def matrix_rate() -> float:
    """Return what this device reaches in large 16 bit matrix products, in operations a second."""
    on_gpu = torch.cuda.is_available()
    side, repeats = (8192, 20) if on_gpu else (1024, 5)
    one = torch.randn(side, side, device="cuda" if on_gpu else "cpu").to(torch.bfloat16)
    best = 0.0
    for _ in range(3):
        if on_gpu:
            torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            one @ one
        if on_gpu:
            torch.cuda.synchronize()
        best = max(best, repeats * 2 * side**3 / (time.perf_counter() - start))
    return best


def draw(rows: list[dict[str, Any]], path: Path, base: str) -> None:
    """Draw the memory of the plain setting and of cards' presets, part by part.

    Beside them the reference's plain setting: the same step, and its encoders, which it keeps.
    """
    usual = max(row["px"] for row in rows)
    (plain,) = (row for row in rows if (row["name"], row["px"]) == ("plain, batch 1", usual))
    shown = [plain, *(row for row in rows if row["name"].startswith("card"))]
    shown = [row for row in shown if "estimated_bytes" in row]
    encoders = {"encoders": 2 * num_parameters()}
    bars = [
        ("train_controlnet_sd3.py", plain["estimated_bytes"] | encoders, None),
        *((row["name"], row["estimated_bytes"], row.get("measured_bytes")) for row in shown),
    ]
    figure = Figure(figsize=(9, 0.33 * len(bars) + 1.6), layout="constrained")
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for part in (*PARTS, "encoders"):
        sizes = [parts.get(part, 0) / 1e9 for _, parts, _ in bars]
        if any(sizes):
            axes.barh(range(len(bars)), sizes, left=left, label=part)
        left = [start + size for start, size in zip(left, sizes, strict=True)]
    measured = [(at, total / 1e9) for at, (_, _, total) in enumerate(bars) if total is not None]
    if measured:
        axes.plot(
            [total for _, total in measured], [at for at, _ in measured], "k|", label="measured"
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel("GB of device memory at a step's fullest moment")
    axes.set_title(f"{base}, {usual} px, one sample a step, or as a card's preset says")
    figure.legend(loc="outside lower center", ncols=7, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)


def line(found: dict[str, Any]) -> str:
    """Return a row of the table."""
    head = f"{found['name']:32} {found['px']:5} px"
    if "failed" in found:
        return f"{head}  {found['failed']}"
    estimated = sum(found["estimated_bytes"].values())
    if "measured_bytes" not in found:
        return f"{head} x {found['samples']}  {estimated / 1e9:6.2f} GB"
    measured = found["measured_bytes"]
    return (
        f"{head} x {found['samples']}  {found['samples_per_second']:6.2f} samples/s "
        f"{found['tflops']:7.1f} TFLOP/s {found['of_matrix_rate']:5.0%}  "
        f"{measured / 1e9:6.2f} GB, estimate {estimated / measured:.2f} of it"
    )


if __name__ == "__main__":
    main()
