"""What the records of a cache hold: the specs that a manifest states once for all shards."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from msgspec import Meta

from shards.format.tensor_spec import TensorSpec

DType = Annotated[str, Meta(pattern=r"^(float16|bfloat16|float32)\Z")]
Posterior = Annotated[str, Meta(pattern=r"^(mean|mean_std)\Z")]
PixelRange = Annotated[str, Meta(pattern=r"^(-1_1|0_1|stability_canny)\Z")]
# Of a tensor's axis.
Size = Annotated[int, Meta(ge=1, le=1 << 16)]
Channel = Annotated[int, Meta(ge=0, le=255)]
# Red, green and blue, 0 to 255.
Color = tuple[Channel, Channel, Channel]
# Height and width of a latent grid.
Bucket = tuple[Size, Size]


@dataclass(frozen=True)
class AnnotatorSpec:
    """What drew conditioning images from images.

    Attributes:
        name: as precompute's `--conditioning-from` takes it.
        arguments: all of them, by name; plain JSON values.
        digest: of the code, the arguments, files and weights; the name has no part in it.
    """

    name: str
    arguments: dict[str, Any]
    digest: str


def describe_annotator(name: str, arguments: Mapping[str, Any]) -> str:
    """Return an annotator in words: `canny (high_threshold=200, low_threshold=100)`."""
    listed = ", ".join(f"{key}={value}" for key, value in sorted(arguments.items()))
    return f"{name} ({listed})" if listed else name


@dataclass(frozen=True)
class TextSpec:
    """Shapes of a text record: `clip_embeds` [clip_tokens, clip_width], `t5_embeds`
    [max_sequence_length, t5_width], `pooled_embeds` [pooled_width].

    Attributes:
        without_t5: whether the base has no T5; then records hold no `t5_embeds`, which are zeros
            of this shape for the networks. None for no.
    """

    clip_tokens: Size
    clip_width: Size
    max_sequence_length: Size
    t5_width: Size
    pooled_width: Size
    dtype: DType
    without_t5: bool | None = None

    def tensor_specs(self) -> dict[str, TensorSpec]:
        """Return the tensors of a text record, by name."""
        specs = self.network_specs()
        if self.without_t5:
            del specs["t5_embeds"]
        return specs

    def network_specs(self) -> dict[str, TensorSpec]:
        """Return what the networks get of a prompt, by name: also what no record holds."""
        return {
            "clip_embeds": TensorSpec((self.clip_tokens, self.clip_width), self.dtype),
            "t5_embeds": TensorSpec((self.max_sequence_length, self.t5_width), self.dtype),
            "pooled_embeds": TensorSpec((self.pooled_width,), self.dtype),
        }


@dataclass(frozen=True)
class LatentSpec:
    """Meaning of a latent or conditioning latent [latent_channels, height, width] of any bucket.

    Attributes:
        latent_channels: of the VAE.
        vae_scale_factor: pixels a grid cell.
        scaling_factor: training takes (latent - shift_factor) * scaling_factor.
        shift_factor: subtracted before scaling.
        posterior: `mean`, or `mean_std` where the standard deviation is stored as well.
        pixel_range: `-1_1`, what the VAE was trained on; `0_1` for conditioning latents encoded
            as the diffusers training script does; `stability_canny`, as those of Stability's Canny.
        dtype: of the stored tensors.
    """

    latent_channels: Size
    vae_scale_factor: Size
    scaling_factor: float
    shift_factor: float
    posterior: Posterior
    pixel_range: PixelRange
    dtype: DType

    def tensor_specs(self, name: str, bucket: Bucket) -> dict[str, TensorSpec]:
        """Return the tensors of a record, by name.

        Args:
            name: `latent` or `conditioning_latent`.
            bucket: height and width of the latent grid.
        """
        spec = TensorSpec((self.latent_channels, *bucket), self.dtype)
        names = [name, f"{name}_std"] if self.posterior == "mean_std" else [name]
        return dict.fromkeys(names, spec)


@dataclass(frozen=True)
class ConditioningSpec(LatentSpec):
    """Meaning of a control's latents, and how its conditioning images became pixels.

    Attributes:
        background: colour behind transparent pixels; None for white.
        scale: which numbers became black and white; None for 8 bits as they are. See
            `sd3.value_scale`.
        inpainting: whether the latents are of the images themselves without a part, and a record
            holds `conditioning_mask` too, [1, height, width]: 1 where the image is kept, 0 in the
            part that is left out. None for no.
    """

    background: Color | None = None
    scale: Annotated[str, Meta(max_length=100)] | None = None
    inpainting: bool | None = None

    @property
    def extra_channels(self) -> int:
        """How many channels the ControlNet gets beside those of the latents: 1 for the mask."""
        return 1 if self.inpainting else 0

    def tensor_specs(self, name: str, bucket: Bucket) -> dict[str, TensorSpec]:
        """Return the tensors of a record, by name; see `LatentSpec.tensor_specs`."""
        mask = {"conditioning_mask": TensorSpec((1, *bucket), "uint8")} if self.inpainting else {}
        return super().tensor_specs(name, bucket) | mask
