"""Measures how well ControlNets follow their conditioning images, beside the base model alone."""

from collections.abc import Sequence
from dataclasses import replace

import click

from common.atomic_files import atomic_file, write_text
from common.errors import ConfigError
from common.progress import Progress
from common.provenance import write_run
from infer.config import ScoreConfig
from infer.convention import Convention, find_convention
from infer.loaded_base import LoadedBase
from infer.pipeline import (
    find_models,
    full_memory_explained,
    short_titles,
    with_dtype,
)
from infer.scoring.charts import draw_curves, worst_sheet
from infer.scoring.drawer import SampleDrawer
from infer.scoring.measures import MEASURES, Measure, Sample, applicable_measures
from infer.scoring.redrawn import find_redrawings, measure_redrawn
from infer.scoring.results import (
    WITH,
    WITHOUT,
    SampleResult,
    summarize_variants,
    to_csv,
    to_json,
    to_table,
)
from infer.scoring.samples import read_samples
from precompute.sources.open_source import open_source
from precompute.sources.source import Source, SourceSettings
from sd3.contact_sheet import save_png


def score(config: ScoreConfig) -> None:
    """Draw and measure every sample with each variant; write pictures, CSV, charts and figures.

    Raises:
        ConfigError: a model cannot be found or does not fit, or a sample cannot be measured.
        RunError: the device's memory is full.
        OSError: the output cannot be written.
    """
    config = with_dtype(config)
    base, folders = find_models(config, config.controlnet)
    conventions = [
        find_convention(config, base, name, folder)
        for name, folder in zip(config.controlnet, folders, strict=True)
    ]
    _check_sizes(config.controlnet, conventions)
    source = _open_source(config)
    redrawing = find_redrawings(config, conventions)
    samples = list(read_samples(config, source, conventions, redrawing))
    measures = [MEASURES[name] for name in _choose_measures(config, samples)]
    titles = [WITH] if len(folders) == 1 else short_titles(config.controlnet)
    for variant in (*titles, WITHOUT):
        (config.output_dir / variant).mkdir(parents=True, exist_ok=True)
    config.json_path.parent.mkdir(parents=True, exist_ok=True)
    write_run(config.output_dir, "score", config)

    results = [SampleResult(sample, {}, {}) for sample in samples]
    with full_memory_explained(config):
        num_pictures = len(samples) * (len(titles) + 1)
        with Progress(num_pictures, "picture", "score") as progress:
            drawer = SampleDrawer(config, measures, results, progress)
            sets = [[folder] for folder in folders]
            loaded = LoadedBase(config, base, sets, batch_size=config.batch_size)
            for title, folder, convention in zip(titles, folders, conventions, strict=True):
                drawer.draw_all(title, loaded.with_controlnets([folder]), convention)
            drawer.draw_all(WITHOUT, loaded.alone(), conventions[0])
            del drawer, loaded  # frees their memory for what draws the controls
    try:
        measure_redrawn(measures, results, redrawing)
    finally:  # whatever becomes of the annotator, the other measures' figures are there
        _write_results(config, measures, results)


def _open_source(config: ScoreConfig) -> Source:
    """Return the data set to measure.

    Raises:
        ConfigError: it cannot be read; or it has no conditioning images, and says what draws them.
    """
    settings = SourceSettings(source=str(config.source), wants_conditioning=not config.from_photo)
    try:
        return open_source(settings)
    except ConfigError:
        if not settings.wants_conditioning:
            raise
        try:
            open_source(replace(settings, wants_conditioning=False))
        except ConfigError:
            pass
        else:
            raise ConfigError(
                f"--source {config.source}: no conditioning images under their usual names; add "
                "--from-photo to have them drawn from its images, as for the ControlNet's training."
            ) from None
        raise


def _check_sizes(names: Sequence[str], conventions: Sequence[Convention]) -> None:
    """Check that all ControlNets can be compared on pictures of the same sizes.

    Raises:
        ConfigError: one was trained on other sizes than the first.
    """
    for name, convention in zip(names, conventions, strict=True):
        if convention.sizes != conventions[0].sizes:
            raise ConfigError(
                f"--controlnet {name}: trained on other sizes than {names[0]}; give "
                "--resolution, or --height and --width, for all."
            )


def _choose_measures(config: ScoreConfig, samples: Sequence[Sample]) -> tuple[str, ...]:
    """Return the names of the measures to apply to every sample.

    Raises:
        ConfigError: no measure applies to the first sample, or one does not apply to another.
    """
    names = config.measure or applicable_measures(samples[0])
    if not names:
        raise ConfigError(
            f"--source {config.source}: nothing to measure: its conditioning images are no "
            "drawings of lines, and it has no images to compare with."
        )
    for sample in samples:
        for name in names:
            try:
                MEASURES[name].check(sample)
            except ValueError as error:
                raise ConfigError(
                    f"--source, row {sample.number + 1}: {error}; --measure {name} needs it. "
                    f"Others: {', '.join(other for other in MEASURES if other != name)}."
                ) from error
    return names


def _write_results(
    config: ScoreConfig, measures: Sequence[Measure], results: Sequence[SampleResult]
) -> None:
    """Print the figures, and write CSV, charts and JSON."""
    figures = summarize_variants(measures, results)
    click.echo(to_table(measures, figures))
    write_text(config.output_dir / "samples.csv", to_csv(measures, results))
    save_png(config.output_dir / "worst.png", worst_sheet(measures[0], results))
    written = ["samples.csv", "worst.png", "all pictures"]
    if len(config.controlnet) > 1:
        with atomic_file(config.output_dir / "curve.png") as file:
            curves = draw_curves(measures, figures, config.controlnet)
            curves.savefig(file, format="png", dpi=120)
        written.insert(2, "curve.png")
    write_text(config.json_path, to_json(config, figures))
    click.echo(f"{config.output_dir}: {', '.join(written)}; {config.json_path}")
