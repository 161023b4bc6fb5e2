"""The parts that networks are made of, for 2D and 3D alike.

Callers give `spatial_dims` and integers; sizes, strides and kernels may be one integer or one per
axis. How parts are put together is left to `encoder`, `decoder` and the architectures.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from monai.networks.layers.factories import Conv, Dropout, Norm
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError

LEAKY_SLOPE = 0.01
"""Slope of the leaky ReLU for negative values, and the one that He initialisation allows for."""

# In place: neither a convolution nor a normalisation needs its own output for its gradient, so
# one feature map per layer need not be kept.
_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE, inplace=True),
    "relu": lambda: nn.ReLU(inplace=True),
    "elu": lambda: nn.ELU(inplace=True),
    "silu": lambda: nn.SiLU(inplace=True),
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
}
_NORMS = ("instance", "batch", "none")


def per_axis(value: int | Sequence[int], spatial_dims: int, name: str) -> tuple[int, ...]:
    """One integer per axis: a scalar is repeated, a sequence must have the right length.

    Args:
        value: at least 1 each.
        spatial_dims: 2 or 3.
        name: what the value is called in the error.

    Raises:
        ConfigError: wrong length, or a value below 1.

    >>> per_axis(3, spatial_dims=2, name="kernel_size")
    (3, 3)
    """
    values = (value,) * spatial_dims if isinstance(value, int) else tuple(value)
    if len(values) != spatial_dims or min(values, default=0) < 1:
        raise ConfigError(
            f"{name} {value}; expected a positive integer or {spatial_dims} of them, "
            f"one per axis (spatial_dims={spatial_dims})."
        )
    return values


class InstanceNorm(nn.Module):
    """Normalise every channel of every sample over its voxels, then scale and shift (affine).

    References:
        D. Ulyanov, A. Vedaldi, V. Lempitsky: Instance Normalization: The Missing Ingredient for
        Fast Stylization, 2016, doi 10.48550/arXiv.1607.08022.
    """

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        """Start as a plain normalisation.

        Args:
            channels: of the input.
            eps: added to the variance.
        """
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(B, C, *S)``."""
        if x.device.type == "cpu":
            # One group per channel is the same function, and on a CPU its forward pass takes a
            # quarter of the time. Its kernel for channels-last memory is inexact, hence contiguous.
            return functional.group_norm(
                x.contiguous(), self.channels, self.weight, self.bias, self.eps
            )
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.channels}, eps={self.eps}"


def make_norm(norm: str, spatial_dims: int, channels: int) -> nn.Module:
    """Build a normalisation with scale and shift.

    Args:
        norm: ``"instance"``, ``"batch"`` or ``"none"``.
        spatial_dims: 2 or 3.
        channels: of its input.

    Raises:
        ConfigError: unknown name.
    """
    if norm not in _NORMS:
        raise ConfigError(f"norm '{norm}'; expected one of {', '.join(_NORMS)}.")
    if norm == "instance":
        return InstanceNorm(channels)
    layer: nn.Module = Norm[norm, spatial_dims](channels) if norm == "batch" else nn.Identity()
    return layer


def make_activation(activation: str) -> nn.Module:
    """Build an activation by name.

    Raises:
        ConfigError: unknown name.
    """
    if activation not in _ACTIVATIONS:
        raise ConfigError(f"activation '{activation}'; expected one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[activation]()


def make_conv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: int | Sequence[int] = 1,
    stride: int | Sequence[int] = 1,
) -> nn.Module:
    """Build a convolution with bias that keeps the size, but for its stride.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of its input.
        out_channels: of its output.
        kernel_size: odd. 1 makes a head.
        stride: sizes are divided by it.

    Raises:
        ConfigError: an even kernel, which has no centre, or a wrong number of axes.
    """
    kernel = per_axis(kernel_size, spatial_dims, "kernel_size")
    if any(size % 2 == 0 for size in kernel):
        raise ConfigError(f"kernel_size {kernel}; expected odd sizes.")
    layer: nn.Module = Conv[Conv.CONV, spatial_dims](
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=per_axis(stride, spatial_dims, "stride"),
        padding=tuple(size // 2 for size in kernel),
    )
    return layer


def make_upsampling(
    spatial_dims: int, in_channels: int, out_channels: int, stride: int | Sequence[int]
) -> nn.Module:
    """Build a transposed convolution whose kernel is its stride: sizes are multiplied by it."""
    size = per_axis(stride, spatial_dims, "stride")
    layer: nn.Module = Conv[Conv.CONVTRANS, spatial_dims](
        in_channels, out_channels, kernel_size=size, stride=size
    )
    return layer


class ConvNormAct(nn.Sequential):
    """Convolution, optional dropout of whole channels, normalisation, activation.

    The convolution keeps its bias even where a normalisation takes it out again, so that weights
    of nnU-Net's networks fit one to one.

    >>> block = ConvNormAct(3, 1, 8, stride=(2, 2, 1))
    >>> block(torch.zeros(2, 1, 16, 16, 16)).shape
    torch.Size([2, 8, 8, 8, 16])
    """

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        norm: str = "instance",
        activation: str = "leaky_relu",
        dropout: float = 0.0,
    ) -> None:
        """Build the four layers.

        Args:
            spatial_dims: 2 or 3.
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: odd; one or per axis.
            stride: one or per axis.
            norm: ``"instance"``, ``"batch"`` or ``"none"``.
            activation: ``"leaky_relu"``, ``"relu"``, ``"elu"``, ``"silu"``, ``"gelu"`` or
                ``"prelu"``.
            dropout: probability that a channel is set to zero in training; 0 for no such layer.

        Raises:
            ConfigError: unknown name, even kernel or wrong number of axes.
        """
        conv = make_conv(spatial_dims, in_channels, out_channels, kernel_size, stride)
        layers: list[tuple[str, nn.Module]] = [("conv", conv)]
        if dropout > 0:
            layers.append(("dropout", Dropout[Dropout.DROPOUT, spatial_dims](dropout)))
        layers.append(("norm", make_norm(norm, spatial_dims, out_channels)))
        layers.append(("activation", make_activation(activation)))
        super().__init__(OrderedDict(layers))


class ConvStack(nn.Sequential):
    """Several `ConvNormAct`, of which the first changes the channels and takes the stride."""

    def __init__(
        self,
        spatial_dims: int,
        in_channels: int,
        out_channels: int,
        *,
        num_convs: int,
        kernel_size: int | Sequence[int] = 3,
        stride: int | Sequence[int] = 1,
        norm: str = "instance",
        activation: str = "leaky_relu",
    ) -> None:
        """Build the convolutions.

        Args:
            spatial_dims: 2 or 3.
            in_channels: of the input.
            out_channels: of every convolution.
            num_convs: how many.
            kernel_size: odd; one or per axis.
            stride: of the first; one or per axis.
            norm: as in `ConvNormAct`.
            activation: as in `ConvNormAct`.

        Raises:
            ConfigError: no convolution, or what `ConvNormAct` refuses.
        """
        if num_convs < 1:
            raise ConfigError(f"num_convs {num_convs}; expected at least 1.")
        super().__init__(
            *(
                ConvNormAct(
                    spatial_dims,
                    out_channels if index else in_channels,
                    out_channels,
                    kernel_size=kernel_size,
                    stride=1 if index else stride,
                    norm=norm,
                    activation=activation,
                )
                for index in range(num_convs)
            )
        )


def initialise_he_(network: nn.Module) -> None:
    """Draw all convolution weights as He et al. propose for leaky ReLU; set their biases to zero.

    References:
        K. He et al.: Delving Deep into Rectifiers, 2015, doi 10.1109/ICCV.2015.123.
    """
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, convolutions):
            nn.init.kaiming_normal_(module.weight, a=LEAKY_SLOPE)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
