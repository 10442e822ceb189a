"""A run's page and its log, kept up to date (--dashboard)."""

from collections.abc import Mapping

from train.assembly import Run
from train.dashboard import records
from train.dashboard.page import write_page
from train.inputs import samples_per_step


class Dashboard:
    """Writes the log and the page; the main process alone has one.

    Args:
        run: whose page it is. What the log has of steps after the run's start is taken out.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self._said: set[str] = set()
        records.forget_after(run.config.output_dir, run.inputs.state.step)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Add a step's values to the log."""
        records.append(self.run.config.output_dir, step, values)

    def write(self, step: int) -> None:
        """Write the page anew, and print each kind of advice the first time that there is reason.

        Raises:
            OSError: it cannot be written.
        """
        run = self.run
        step_samples = samples_per_step(run.config, run.accelerator.num_processes)
        lines = write_page(run.config, step, run.num_steps, step_samples)
        for kind, line in lines.items():
            if kind not in self._said:
                run.print(f"step {step}: {line}")
        self._said |= lines.keys()


def open_dashboard(run: Run) -> Dashboard | None:
    """Return the run's dashboard; None without --dashboard and on other processes."""
    if run.config.dashboard and run.accelerator.is_main_process:
        return Dashboard(run)
    return None
