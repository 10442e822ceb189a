"""Runs a copy of diffusers' train_controlnet_sd3.py with given random numbers.

    python -m benchmarks.reference.shim SCRIPT DRAWS LOSSES [the script's own arguments]

DRAWS is a .npz with one entry a step: `rows` [S, B] of the data set; `noise`, `latent` and
`conditioning_latent` [S, B, C, h, w], standard normal; and `density` [S, B]. LOSSES becomes a JSON
list. The script is not changed: functions of the libraries that it draws from are replaced.
"""

import importlib.util
import json
import runpy
import sys
import types
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any

import accelerate
import datasets  # noqa: F401  # looks for torchvision, and must not find the substitute
import diffusers.training_utils
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor


def main() -> None:
    """Replace the random draws, run the script, and write its losses."""
    script, draws, losses = sys.argv[1:4]
    sys.argv = [script, *sys.argv[4:]]
    given = dict(np.load(draws).items())
    logged: list[float] = []
    if importlib.util.find_spec("torchvision") is None:
        install_torchvision_substitute()
    replace_draws(GivenDraws(given), order=[int(row) for row in given["rows"].flatten()])
    record_losses(logged)
    runpy.run_path(script, run_name="__main__")
    Path(losses).write_text(json.dumps(logged))


class GivenDraws:
    """Returns the given random numbers, in the order in which the script asks for them.

    Args:
        draws: see the module's docstring.
    """

    def __init__(self, draws: dict[str, Any]) -> None:
        self._draws = draws
        self._step = -1
        self._next_latent = "latent"

    def sample(self, posterior: DiagonalGaussianDistribution) -> Tensor:
        """Return a sample of a posterior; each step samples the image's, then the control's."""
        name = self._next_latent
        if name == "latent":
            self._step += 1
        self._next_latent = "conditioning_latent" if name == "latent" else "latent"
        latent: Tensor = posterior.mean + posterior.std * self.tensor(name)
        return latent

    def tensor(self, name: str) -> Tensor:
        """Return the current step's numbers of a kind."""
        return torch.from_numpy(self._draws[name][self._step])


def replace_draws(draws: GivenDraws, order: list[int]) -> None:
    """Replace the functions that the script draws from.

    Args:
        draws: the numbers to return.
        order: rows of the data set, in the order in which the script gets them.
    """

    def sample(self: Any, generator: Any = None) -> Tensor:
        return draws.sample(self)

    def randn_like(values: Tensor, **_: Any) -> Tensor:
        return draws.tensor("noise").to(values.dtype)

    def density(*_: Any, **__: Any) -> Tensor:
        return draws.tensor("density")

    class OrderedLoader(torch.utils.data.DataLoader[Any]):
        def __init__(self, dataset: Any, *, shuffle: bool = False, **more: Any) -> None:
            super().__init__(dataset, sampler=order if shuffle else None, **more)

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (DiagonalGaussianDistribution, "sample", sample),
        (torch, "randn_like", randn_like),
        (diffusers.training_utils, "compute_density_for_timestep_sampling", density),
        (torch.utils.data, "DataLoader", OrderedLoader),
    ]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)


def record_losses(logged: list[float]) -> None:
    """Append every loss that the script logs to a list."""

    def log(self: Any, values: dict[str, float], *_: Any, **__: Any) -> None:
        logged.append(values["loss"])

    accelerate.Accelerator.log = log


def install_torchvision_substitute() -> None:
    """Install a module `torchvision` with the five transforms that the script uses."""

    class Compose:
        def __init__(self, parts: list[Callable[[Any], Any]]) -> None:
            self.parts = parts

        def __call__(self, image: Any) -> Any:
            for part in self.parts:
                image = part(image)
            return image

    class Resize:
        def __init__(self, size: int, interpolation: Any) -> None:
            self.size = size

        def __call__(self, image: Image.Image) -> Image.Image:
            short, long = sorted(image.size)
            scaled = self.size * long // short
            wide = image.width >= image.height
            size = (scaled, self.size) if wide else (self.size, scaled)
            return image.resize(size, Image.Resampling.BILINEAR)

    class CenterCrop:
        def __init__(self, size: int) -> None:
            self.size = size

        def __call__(self, image: Image.Image) -> Image.Image:
            left, top = ((side - self.size) // 2 for side in image.size)
            return image.crop((left, top, left + self.size, top + self.size))

    class ToTensor:
        def __call__(self, image: Image.Image) -> Tensor:
            return torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255

    class Normalize:
        def __init__(self, mean: list[float], std: list[float]) -> None:
            self.mean, self.std = mean[0], std[0]

        def __call__(self, pixels: Tensor) -> Tensor:
            return (pixels - self.mean) / self.std

    package, transforms = types.ModuleType("torchvision"), types.ModuleType("transforms")
    package.__spec__ = ModuleSpec("torchvision", None)
    for transform in (Compose, Resize, CenterCrop, ToTensor, Normalize):
        setattr(transforms, transform.__name__, transform)
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR=None)  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


if __name__ == "__main__":
    main()
