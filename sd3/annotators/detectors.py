"""The annotators of the package controlnet-aux, by their classes' or processors' names."""

import inspect
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import numpy as np
from PIL import Image
from xxhash import xxh3_64_intdigest, xxh3_128

from common.config_file import nearest
from common.errors import ConfigError
from sd3.annotators.annotator import Annotator, DrawBatch
from sd3.annotators.arguments import arguments_text, bind_arguments, takes

WEIGHTS = "lllyasviel/Annotators"


def find_detector(name: str, given: Mapping[str, Any], known: Sequence[str]) -> Annotator:
    """Return a detector of controlnet-aux.

    Args:
        name: of its class, e.g. `HEDdetector`, or of a processor, e.g. `softedge_hed`.
        given: arguments that it is made with, such as `pretrained_model_or_path` and `filename` of
            its weights, and those of its call.
        known: names of our own annotators, for the error.

    Raises:
        ConfigError: there is none, the package is missing, or its weights cannot be had.
    """
    where = f"--conditioning-from {name}"
    try:
        import controlnet_aux
        from controlnet_aux.processor import MODEL_PARAMS, MODELS
    except Exception as error:  # it imports a dozen libraries, in versions that may not match
        reason = " ".join(str(error).split())
        raise ConfigError(
            f"{where}: none of {', '.join(known)}, nor package.module:function or "
            f"path/to/file.py:function; and controlnet-aux, which has more, cannot be imported "
            f"({reason}): pip install '.[controlnet-aux]'."
        ) from error
    code = MODELS[name]["class"] if name in MODELS else getattr(controlnet_aux, name, None)
    if not inspect.isclass(code):
        raise ConfigError(f"{where}: unknown.{nearest(name, [*known, *MODELS])}")
    make, made_with = code, {}
    if hasattr(code, "from_pretrained"):
        make, made_with = code.from_pretrained, {"pretrained_model_or_path": WEIGHTS}
    made_with |= {key: value for key, value in given.items() if takes(make, key)}
    called_with = {key: value for key, value in given.items() if not takes(make, key)}
    preset, call = MODEL_PARAMS.get(name, {}), partial(code.__call__, None)
    bind_arguments(name, make, made_with, num_images=0)  # checks them
    defaults = bind_arguments(name, call, {})
    # The `**kwargs` of its call are for former names, and pass over all others.
    bind_arguments(name, call, called_with, takes_rest=False)
    changed = {
        key: value
        for key, value in (preset | called_with).items()
        if key not in defaults or value != defaults[key]
    }
    load = partial(_make, where, make, made_with)
    return Annotator(
        name=name,
        arguments=preset | dict(given),
        load=partial(_load, load, preset | called_with, "image_resolution" in defaults),
        identity=[code.__name__, arguments_text(changed), _weights_digest(load())],
    )


def _make(where: str, make: Callable[..., Any], made_with: Mapping[str, Any]) -> Any:
    """Return a detector, its weights on the CPU.

    Raises:
        ConfigError: they cannot be had.
    """
    try:
        return make(**made_with)
    except Exception as error:  # of the package, of the hub, of torch
        reason = str(error).splitlines() or [type(error).__name__]
        raise ConfigError(f"{where}: cannot be loaded ({reason[0]}).") from error


def _load(
    make: Callable[[], Any], arguments: Mapping[str, Any], takes_size: bool, device: str
) -> DrawBatch:
    """Return what draws pictures, one after the other as the package does."""
    detector = make()
    if hasattr(detector, "to"):
        detector = detector.to(device) or detector

    def draw(images: Sequence[Image.Image]) -> list[Image.Image]:
        drawn = []
        for image in images:
            # By default a detector returns 512 pixels, whatever it is given.
            size = {"image_resolution": min(image.size)} if takes_size else {}
            with _seeded_by(image):
                drawn.append(detector(image, **(size | dict(arguments))))
        return drawn

    return draw


@contextmanager
def _seeded_by(image: Image.Image) -> Iterator[None]:
    """Seed the generators that some detectors draw from, such as shuffle, by a picture's pixels.

    The same picture so gives the same drawing, in training and at inference. What others draw from
    the generators stays as it is.
    """
    seed = xxh3_64_intdigest(image.tobytes())
    states = random.getstate(), np.random.get_state()  # what the package uses
    random.seed(seed)
    np.random.seed(seed % 2**32)
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])


def _weights_digest(detector: Any) -> str:
    """Return a digest of the weights of all networks that a detector holds, at any depth."""
    import torch

    digest = xxh3_128()
    waiting, seen = [("", detector)], set()
    while waiting:
        place, value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, torch.nn.Module):
            for name, tensor in sorted(value.state_dict().items()):
                digest.update(f"{place}.{name} {tuple(tensor.shape)}".encode())
                digest.update(
                    tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy()
                )
        elif hasattr(value, "__dict__") and type(value).__module__.startswith("controlnet_aux"):
            waiting += [(f"{place}.{name}", part) for name, part in sorted(vars(value).items())]
    return digest.hexdigest()
