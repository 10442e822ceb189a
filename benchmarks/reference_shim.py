"""Run a copy of diffusers' train_controlnet_sd3.py with everything random handed to it.

    python -m benchmarks.reference_shim SCRIPT DRAWS LOSSES [the script's own arguments]

DRAWS is a .npz with one entry a step: `rows` [S, B] of the data set, `noise`, `latent` and
`conditioning_latent` [S, B, C, h, w], standard normal, and `density` [S, B]. LOSSES becomes a JSON
list. The script itself is left as it is: libraries that it draws from are made to give these.
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
import datasets  # noqa: F401  # it looks for torchvision, and must not find the stand-in
import diffusers.training_utils
import numpy as np
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from PIL import Image
from torch import Tensor


def main() -> None:
    """Patch, run, and write the losses."""
    script, draws, losses = sys.argv[1:4]
    sys.argv = [script, *sys.argv[4:]]
    found = np.load(draws)
    logged: list[float] = []
    if importlib.util.find_spec("torchvision") is None:
        stand_in_for_torchvision()
    hand_over(dict(found.items()), logged)
    runpy.run_path(script, run_name="__main__")
    Path(losses).write_text(json.dumps(logged))


def hand_over(draws: dict[str, Any], logged: list[float]) -> None:
    """Have the libraries that the script draws from give these draws, in their order."""
    steps = iter(range(len(draws["rows"])))
    now = {"step": -1}

    def tensor(name: str) -> Tensor:
        return torch.from_numpy(draws[name][now["step"]])

    def sample(self: Any, generator: Any = None) -> Tensor:
        # A step samples the image's latent first, which begins it, then the conditioning image's.
        name = "conditioning_latent" if now.get("begun") else "latent"
        if name == "latent":
            now["step"] = next(steps)
        now["begun"] = int(name == "latent")
        latent: Tensor = self.mean + self.std * tensor(name)
        return latent

    def randn_like(values: Tensor, **_: Any) -> Tensor:
        return tensor("noise").to(values.dtype)

    def density(*_: Any, **__: Any) -> Tensor:
        return tensor("density")

    def log(self: Any, values: dict[str, float], *_: Any, **__: Any) -> None:
        logged.append(values["loss"])

    order = [int(row) for row in draws["rows"].flatten()]

    class InOrder(torch.utils.data.DataLoader[Any]):
        def __init__(self, dataset: Any, *, shuffle: bool = False, **more: Any) -> None:
            super().__init__(dataset, sampler=order if shuffle else None, **more)

    patches: list[tuple[Any, str, Callable[..., Any]]] = [
        (DiagonalGaussianDistribution, "sample", sample),
        (torch, "randn_like", randn_like),
        (diffusers.training_utils, "compute_density_for_timestep_sampling", density),
        (accelerate.Accelerator, "log", log),
        (torch.utils.data, "DataLoader", InOrder),
    ]
    for owner, name, replacement in patches:
        setattr(owner, name, replacement)


def stand_in_for_torchvision() -> None:
    """Give the script the five transforms of torchvision that it uses, by Pillow and torch."""

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
    for one in (Compose, Resize, CenterCrop, ToTensor, Normalize):
        setattr(transforms, one.__name__, one)
    transforms.InterpolationMode = types.SimpleNamespace(BILINEAR=None)  # type: ignore[attr-defined]
    package.transforms = transforms  # type: ignore[attr-defined]
    sys.modules |= {"torchvision": package, "torchvision.transforms": transforms}


if __name__ == "__main__":
    main()
