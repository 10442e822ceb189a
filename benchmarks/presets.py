"""`python -m benchmarks.presets`: whether each card's preset trains as well as float32 does.

Each preset trains on the demo's base, circles and settings for 300 steps of 8 samples, with the
same samples, noise and initial weights. Compared is the final loss on held-out rows.
"""

import json
import shutil
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from accelerate.state import AcceleratorState, GradientState

from common.atomic_files import write_text
from common.cards import card_names, settings_with
from common.command import CONTEXT, user_errors
from common.config_file import read_section
from common.interruption import exit_code
from common.provenance import commit, machine, versions
from demo.circles import CirclesConfig, draw_data_sets
from precompute.config import PrecomputeConfig
from precompute.run import precompute
from train.config import TrainConfig
from train.run import train

DEMO = Path("configs/demo.toml")
SAMPLES = 8
LIMIT = 0.02  # relative to the loss of float32


@dataclass(frozen=True)
class Extent:
    """How much is trained.

    Attributes:
        steps: of training.
        rows: circles to train on and to hold out.
        held_out_rows: circles held out.
    """

    steps: int
    rows: int
    held_out_rows: int


WHOLE, TINY = Extent(300, 3072, 256), Extent(2, 24, 8)


@click.command(context_settings=CONTEXT)
@click.option(
    "--tiny", is_flag=True, help="Two steps on a few circles, to try this; the losses say nothing."
)
@click.option("--work-dir", type=click.Path(path_type=Path), help="Kept; temporary if absent.")
@click.option(
    "--json",
    "results",
    type=click.Path(path_type=Path),
    default=Path("benchmarks/results/presets.json"),
    show_default=True,
)
@click.pass_context
def main(ctx: click.Context, tiny: bool, work_dir: Path | None, results: Path) -> None:
    """Train with every preset; exit 1 if the loss of one is above its limit."""
    extent = TINY if tiny else WHOLE
    with user_errors(), tempfile.TemporaryDirectory() as temporary:
        folder = (work_dir or Path(temporary)).absolute()
        base = prepare_demo(folder, extent)
        losses = {"float32": train_to_held_out_loss(replace(base, output_dir=folder / "float32"))}
        for card in reversed(card_names()):
            config = apply_preset(base, card)
            losses[card] = train_to_held_out_loss(replace(config, output_dir=folder / card))
    rows, all_good = [], True
    for name, loss in losses.items():
        ratio = loss / losses["float32"]
        all_good &= ratio <= 1 + LIMIT
        rows.append({"preset": name, "held_out_loss": loss, "ratio": ratio, "limit": 1 + LIMIT})
        click.echo(f"{name:8}  {loss:.5f}  {ratio:.4f}  at most {1 + LIMIT:.2f}")
    figures = {"machine": machine(), "versions": versions(), "commit": commit(), "rows": rows}
    results.parent.mkdir(parents=True, exist_ok=True)
    write_text(results, json.dumps(figures, indent=1) + "\n")
    ctx.exit(int(not (all_good or tiny)))


def prepare_demo(folder: Path, extent: Extent) -> TrainConfig:
    """Write the demo's cache, with held-out rows; return settings to train from it."""
    circles: dict[str, Any] = read_section(DEMO, "circles", CirclesConfig)
    ours = {"output_dir": folder / "circles", "num_rows": extent.rows, "num_unseen": 1}
    draw_data_sets(CirclesConfig(**circles | ours))
    stage1 = read_section(DEMO, "precompute", PrecomputeConfig)
    changes = {
        "source": folder / "circles/train",
        "cache": folder / "cache",
        "validation_rows": extent.held_out_rows,
        "validation_prompt": (),
        "validation_image": (),
    }
    precompute(PrecomputeConfig(**stage1 | changes))
    stage2 = read_section(DEMO, "train", TrainConfig)
    overrides = {
        "cache": (str(folder / "cache"),),
        "train_batch_size": SAMPLES,
        "max_train_steps": extent.steps,
        "lr_warmup_steps": extent.steps // 10,
        "checkpointing_steps": extent.steps,
        "validation_steps": extent.steps,
        "report_to": "none",
    }
    return TrainConfig(**stage2 | overrides)


def apply_preset(base: TrainConfig, card: str) -> TrainConfig:
    """Return settings with a card's preset, and the same number of samples a step as before."""
    changes = settings_with(card, "train", TrainConfig)
    batches = 1 if changes.get("fused_backward_pass") else 4
    same_samples = {"train_batch_size": SAMPLES // batches, "gradient_accumulation_steps": batches}
    return replace(base, **changes | same_samples)


def train_to_held_out_loss(config: TrainConfig) -> float:
    """Train; return the mean loss on held-out rows after the last step."""
    shutil.rmtree(config.output_dir, ignore_errors=True)  # of an earlier run
    if ended_by := train(config):
        raise SystemExit(exit_code(ended_by))
    reset_accelerate()
    path = config.output_dir / f"validation/step-{config.max_train_steps:06d}/held_out.json"
    losses = json.loads(path.read_text())["held_out_loss"]
    return float(sum(losses) / len(losses))


def reset_accelerate() -> None:
    """Reset accelerate's state, so that the next run of this process can choose its precision."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


if __name__ == "__main__":
    main()
