"""`python -m benchmarks.presets`: whether each card's preset trains as well as float32 does.

The demo's base, circles and settings, 300 steps of 8 samples: the same samples, noise and start
each time. What counts is the loss on held-out rows at the end, over that of float32.
"""

import json
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
from accelerate.state import AcceleratorState, GradientState

from common.atomic_files import write_text
from common.config_file import read_section
from common.options import CONTEXT, user_errors
from common.provenance import commit, machine, versions
from demo.circles import CirclesConfig, draw_data_sets
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from train.config import TrainConfig
from train.run import train

DEMO = Path("configs/demo.toml")
CARDS = Path("configs/cards")
STEPS, SAMPLES, HELD_OUT_ROWS = 300, 8, 256
LIMIT, LIMIT_OF_4_BIT = 0.02, 0.05


@click.command(context_settings=CONTEXT)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Kept; temporary if absent.")
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/presets.json"),
    show_default=True,
)
@click.pass_context
def main(ctx: click.Context, work_dir: Path | None, results: Path) -> None:
    """Train with every preset; exit 1 where one is worse than its limit."""
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        folder = (work_dir or Path(temporary)).absolute()
        base = with_cache(folder)
        losses = {"float32": held_out_loss(replace(base, output_dir=folder / "float32"))}
        for path in cards():
            config = preset(base, path)
            losses[path.stem] = held_out_loss(replace(config, output_dir=folder / path.stem))
    rows, good = [], True
    for name, loss in losses.items():
        ratio = loss / losses["float32"]
        limit = LIMIT_OF_4_BIT if name != "float32" and has_4_bit(name) else LIMIT
        good &= ratio <= 1 + limit
        rows.append({"preset": name, "held_out_loss": loss, "ratio": ratio, "limit": 1 + limit})
        click.echo(f"{name:8}  {loss:.5f}  {ratio:.4f}  at most {1 + limit:.2f}")
    figures = {"machine": machine(), "versions": versions(), "commit": commit(), "rows": rows}
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(figures, indent=1) + "\n")
    ctx.exit(int(not good))


def cards() -> list[Path]:
    """Return the presets' files, from the smallest card up."""
    return sorted(CARDS.glob("*.toml"), key=lambda path: int(path.stem.removesuffix("gb")))


def has_4_bit(card: str) -> bool:
    """Tell whether a preset keeps the base in 4 bit."""
    return read_section(CARDS / f"{card}.toml", "train", TrainConfig).get("quantize_base") == "nf4"


def with_cache(folder: Path) -> TrainConfig:
    """Make the demo's cache, with held-out rows, and return settings that train from it."""
    circles: dict[str, Any] = read_section(DEMO, "circles", CirclesConfig)
    draw_data_sets(CirclesConfig(**circles | {"output_dir": folder / "circles"}))
    stage1 = read_section(DEMO, "precompute", PrecomputeConfig)
    moved = {
        "source": folder / "circles/train",
        "cache": folder / "cache",
        "validation_rows": HELD_OUT_ROWS,
        "validation_prompt": (),
        "validation_image": (),
    }
    precompute(PrecomputeConfig(**stage1 | moved))
    stage2 = read_section(DEMO, "train", TrainConfig)
    ours = {
        "cache": str(folder / "cache"),
        "train_batch_size": SAMPLES,
        "max_train_steps": STEPS,
        "lr_warmup_steps": STEPS // 10,
        "checkpointing_steps": STEPS,
        "validation_steps": STEPS,
        "report_to": "none",
    }
    return TrainConfig(**stage2 | ours)


def preset(base: TrainConfig, path: Path) -> TrainConfig:
    """Return settings changed as a card's file says, but for the number of samples a step."""
    changes = read_section(path, "train", TrainConfig)
    batches = 1 if changes.get("fused_backward_pass") else 4
    same = {"train_batch_size": SAMPLES // batches, "gradient_accumulation_steps": batches}
    return replace(base, **changes | same)


def held_out_loss(config: TrainConfig) -> float:
    """Train, and return the loss on held-out rows that the last step left."""
    shutil.rmtree(config.output_dir, ignore_errors=True)  # of an earlier run
    train(config)
    forget_accelerator()
    found = config.output_dir / f"validation/step-{STEPS:06d}/held_out.json"
    losses = json.loads(found.read_text())["held_out_loss"]
    return float(sum(losses) / len(losses))


def forget_accelerator() -> None:
    """Let the next run of this process choose its precision, which accelerate keeps for good."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    main()
