"""The first batch of a pass, encoded once more before anything of the pass is written.

A copy that is read before it has arrived gives finite numbers of the right shape. Their checksums
are right, `verify` finds nothing, and training suffers. So what would be written is compared with
what must come out, once a pass.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from common.device import AsyncHostCopy
from common.errors import RunError

# Of an item's numbers, as vectors. Rounding in half precision stays below a tenth of this, where a
# library takes another kernel the second time; another item differs by more than twice this.
LARGEST_DIFFERENCE = 0.1


def compare(
    name: str,
    tensors: dict[str, Tensor],
    output: AsyncHostCopy,
    encode_again: Callable[[], dict[str, Tensor] | None],
) -> None:
    """Hold a batch as it came to the host against plain copies, and against a second encoding.

    The plain copy is of the same tensors, so it has the same bytes. The second encoding may be
    rounded otherwise.

    Args:
        name: of what is encoded, for messages.
        tensors: on the device, [B, ...] each.
        output: their copy, that was made beside the encoding.
        encode_again: encodes the same input.

    Raises:
        RunError: something differs.
    """
    # Before the plain copies, which wait for the device and so hide what is to be found.
    arrived = {key: tensor.clone() for key, tensor in output.wait().items()}
    plain = {key: tensor.cpu() for key, tensor in tensors.items()}
    for key, tensor in plain.items():
        count = int((_bytes(arrived[key]) != _bytes(tensor)).sum())
        if count:
            found = f"{count} of {tensor.nbytes} bytes differ from those of a plain copy"
            raise _error(name, key, tensors[key].device, found)
    for key, again in (encode_again() or {}).items():
        most = _largest_difference(again.cpu(), plain[key])
        if not most <= LARGEST_DIFFERENCE:
            found = f"encoded again, an item differs by {most:.0%}"
            raise _error(name, key, again.device, found)


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.contiguous().view(torch.uint8)


def _largest_difference(again: Tensor, first: Tensor) -> float:
    """Return the largest relative difference of two items, [B, ...]; NaN agrees with NaN."""
    again, first = (tensor.flatten(1).double() for tensor in (again, first))
    same = (again == first) | (again.isnan() & first.isnan())
    difference = torch.where(same, 0.0, again - first).norm(dim=1)
    size = torch.where(same & ~first.isfinite(), 0.0, first).norm(dim=1)
    return float(torch.where(difference == 0, 0.0, difference / size).max())


def _error(name: str, key: str, device: torch.device, found: str) -> RunError:
    return RunError(
        f"{name}, the first batch: {key} does not come from {device} as it must: {found}. Nothing "
        "of this pass has been written. The GPU, its driver or this program is at fault: try "
        "another --device, and report it."
    )
