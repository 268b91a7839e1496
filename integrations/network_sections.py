"""The section ``model`` of a recipe: networks that have a short name, and one of the user's own."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, ClassVar, Literal

from .sections import Count, Own, Section, expect


@dataclass
class Network(Section):
    """A network."""

    section: ClassVar[str] = "model"
    name: str = ""
    parameters: int | None = None
    """How many parameters the network has, for readers; ``--plan`` compares it with the count."""
    classes: Annotated[int | None, "at least 2, or null", lambda classes: classes >= 2] = None
    """Classes that the network can be told; null is an unconditional network."""

    def check_side(self, side: int) -> None:
        """Refuse images of a side that the network cannot take."""

    def check_groups(self, widths: list[int]) -> None:
        """Refuse a number of groups that does not divide the numbers of channels."""
        groups = self.norm_groups
        divides = groups >= 1 and bool(widths) and all(width > 0 and width % groups == 0 for width in widths)
        self.expect(divides, "norm_groups", f"a divisor of all numbers of channels, {widths}")


@dataclass
class OwnNetwork(Own):
    """A network of your own: any ``torch.nn.Module`` that is called as ``network(x, timesteps)``."""

    section: ClassVar[str] = "model"
    classes: int | None = None
    """Classes that the network is told, as ``class_labels=``; null is an unconditional network."""
    parameters: int | None = None
    """How many parameters the network has, for readers; ``--plan`` compares it with the count."""


@dataclass
class Mlp(Network):
    """A residual MLP on the flattened pixels: for images of a few hundred values."""

    name: Literal["mlp"] = "mlp"
    width: int = 256
    """Channels of the residual stream."""
    depth: int = 3
    """Number of blocks."""


@dataclass
class ConvNext(Network):
    """A small ConvNeXt-like network on patches: trains on CPU cores."""

    name: Literal["convnext"] = "convnext"
    patch_size: Count = 4
    """Side of a patch in pixels; the blocks see one token per patch."""
    width: int = 128
    """Channels of a token."""
    depth: int = 4
    """Number of blocks."""
    expansion: int = 3
    """Hidden channels of a block's MLP, in multiples of the width."""
    kernel_size: Annotated[int, "an odd number", lambda size: size % 2 == 1] = 5
    """Side of the depthwise convolution, in patches."""

    def check_side(self, side: int) -> None:
        """Refuse images that patches do not fill."""
        self.expect(side % self.patch_size == 0, "patch_size", f"a divisor of the images' {side} pixels")


@dataclass
class Levels(Network):
    """A U-Net, of several levels of resolution."""

    attention: list[bool] = field(default_factory=list)
    """Whether each level has self-attention, from full resolution down."""
    layers_per_block: int = 2
    """Residual blocks per level on the way down; one more on the way up."""
    dropout: float = 0.0
    """Dropout probability."""
    norm_groups: int = 32
    """Groups of the group normalisations; must divide every number of channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        widths, head = self.widths(), getattr(self, "head_channels", None)
        self.expect(len(self.attention) == len(widths), "attention", f"{len(widths)} values, one a level")
        self.check_groups(widths)
        # The last level is attended to between the way down and the way up.
        least = min(width for width, attends in zip(widths, [*self.attention[:-1], True], strict=True) if attends)
        fewer = f"at most {least}, the channels of a level with attention"
        if head is not None:
            self.expect(1 <= head <= least, "head_channels", fewer)

    def widths(self) -> list[int]:
        """Return the channels of each level."""
        return self.channels

    def check_side(self, side: int) -> None:
        """Refuse images that cannot be halved once a level."""
        count = len(self.widths())
        factor = 2 ** (count - 1)
        halved = f"a multiple of {factor}: the network halves the images {count - 1} time{'s' * (count > 2)}"
        expect(side % factor == 0, "data.resolution", side, halved)


@dataclass
class Unet(Levels):
    """The U-Net of DDPM (diffusers' UNet2DModel)."""

    name: Literal["unet"] = "unet"
    channels: list[int] = field(default_factory=lambda: [128, 256, 256, 256])
    """Channels of each resolution level, from full resolution down."""
    attention: list[bool] = field(default_factory=lambda: [False, True, False, False])
    dropout: float = 0.1
    head_channels: int | None = None
    """Channels per attention head; null is a single head."""


@dataclass
class Ncsnpp(Levels):
    """NCSN++ with residual input pyramid, as of consistency models on CIFAR-10 (arXiv 2011.13456)."""

    name: Literal["ncsnpp"] = "ncsnpp"
    channels: int = 128
    """Channels at full resolution before the multipliers."""
    multipliers: list[int] = field(default_factory=lambda: [2, 2, 2])
    """Channels of each resolution level, in multiples of ``channels``."""
    attention: list[bool] = field(default_factory=lambda: [False, True, False])
    layers_per_block: int = 4
    fourier_scale: float = 16.0
    """Standard deviation of the frequencies of the time embedding."""

    def __post_init__(self) -> None:
        self.check_groups([self.channels, *self.widths()])
        super().__post_init__()

    def widths(self) -> list[int]:
        """Return the channels of each level."""
        return [self.channels * multiplier for multiplier in self.multipliers]


@dataclass
class Adm(Levels):
    """The U-Net of ADM and of consistency models at 64x64 (arXiv 2105.05233), as diffusers' UNet2DModel."""

    name: Literal["adm"] = "adm"
    channels: list[int] = field(default_factory=lambda: [192, 384, 576, 768])
    """Channels of each resolution level, from full resolution down."""
    attention: list[bool] = field(default_factory=lambda: [False, True, True, True])
    layers_per_block: int = 3
    head_channels: int = 64
    """Channels per attention head."""


@dataclass
class ConditionUnet(Network):
    """The U-Net of Stable Diffusion (diffusers' UNet2DConditionModel)."""

    name: Literal["condition_unet"] = "condition_unet"
    pretrained: str | None = None
    """Folder or hub name of a pipeline to start from; its sizes then replace those given here. Null starts from random
    weights."""
    revision: str | None = None
    """Commit, tag or branch of a pipeline of the hub; null is its newest, which may change."""
    channels: list[int] = field(default_factory=lambda: [320, 640, 1280, 1280])
    """Channels of each resolution level; all levels but the last attend to the caption."""
    layers_per_block: int = 2
    """Residual blocks per level."""
    head_channels: int = 8
    """diffusers' attention_head_dim."""
    norm_groups: int = 32
    """Groups of the group normalisations; must divide every number of channels."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_groups(self.channels)
        least = min(self.channels)
        self.expect(1 <= self.head_channels <= least, "head_channels", f"at most {least}, the fewest channels")


MODELS: dict[str, type] = {kind.name: kind for kind in (Mlp, ConvNext, Unet, Ncsnpp, Adm, ConditionUnet)}
