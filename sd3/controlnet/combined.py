"""ControlNets that control a base together, whatever their numbers of blocks."""

from typing import Any

from diffusers import SD3ControlNetModel, SD3MultiControlNetModel
from torch import Tensor


class CombinedControlNets(SD3MultiControlNetModel):  # type: ignore[misc]
    """diffusers' own, except that the ControlNets may have different numbers of blocks.

    diffusers adds their residuals pair by pair and drops what the longer has more. Here each of the
    base's L blocks gets the sum of what each ControlNet alone would give it: of N residuals
    block b gets number int(b / (L / N)).

    Args:
        controlnets: the ControlNets.
        num_base_blocks: L.
    """

    def __init__(self, controlnets: list[SD3ControlNetModel], num_base_blocks: int) -> None:
        super().__init__(controlnets)
        self.num_base_blocks = num_base_blocks

    def forward(
        self,
        *,
        controlnet_cond: list[Tensor],
        conditioning_scale: list[float],
        **inputs: Any,
    ) -> tuple[list[Tensor]]:
        """Return the residual of each of the base's blocks.

        Args:
            controlnet_cond: the control of each ControlNet, [B, C, h, w].
            conditioning_scale: of each.
            inputs: what all take, as the stock pipeline gives it.
        """
        residuals: list[list[Tensor]] = [
            net(controlnet_cond=control, conditioning_scale=scale, **inputs)[0]
            for net, control, scale in zip(
                self.nets, controlnet_cond, conditioning_scale, strict=True
            )
        ]
        sums: dict[tuple[int, ...], Tensor] = {}  # most blocks share theirs with the next
        spread = []
        for block in range(self.num_base_blocks):
            numbers = tuple(
                int(block / (self.num_base_blocks / len(of_net))) for of_net in residuals
            )
            if numbers not in sums:
                first, *others = (
                    of_net[number] for of_net, number in zip(residuals, numbers, strict=True)
                )
                sums[numbers] = sum(others, first)
            spread.append(sums[numbers])
        return (spread,)


def together(
    controlnets: list[SD3ControlNetModel], num_base_blocks: int
) -> SD3ControlNetModel | CombinedControlNets:
    """Return what controls a base: the ControlNet, if it is one, or all of them combined."""
    if len(controlnets) == 1:
        return controlnets[0]
    return CombinedControlNets(controlnets, num_base_blocks)
