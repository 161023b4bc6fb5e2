"""The parts that networks are made of, for 2D and 3D alike.

Sizes, strides and kernels may be one integer or one per axis. How parts are put together is left
to the architectures; `Style` is what all units of one network have in common.
"""

from __future__ import annotations

import math
import numbers
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard

import torch
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError, check_choice

Layers = Mapping[int, Callable[..., nn.Module]]
"""Torch's classes of one layer by `spatial_dims`."""
# MONAI has a factory for these, whose import takes each prediction a quarter of a gigabyte.
CONV: Layers = {2: nn.Conv2d, 3: nn.Conv3d}
DECONV: Layers = {2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
BATCH_NORM: Layers = {2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
ZERO_PAD: Layers = {2: nn.ZeroPad2d, 3: nn.ZeroPad3d}
MAX_POOL: Layers = {2: nn.MaxPool2d, 3: nn.MaxPool3d}
AVG_POOL: Layers = {2: nn.AvgPool2d, 3: nn.AvgPool3d}
DROPOUT: Layers = {2: nn.Dropout2d, 3: nn.Dropout3d}
"""Of whole channels."""

NUM_GROUPS = 8
LEAKY_SLOPE = 0.01
"""Slope of the leaky ReLU for negative values."""

_ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "leaky_relu": lambda: nn.LeakyReLU(LEAKY_SLOPE),
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "silu": nn.SiLU,
    "gelu": nn.GELU,
    "prelu": nn.PReLU,
}
_NORM_OPTIONS: dict[str, tuple[str, ...]] = {
    "instance": ("eps", "affine"),
    "batch": ("eps", "affine", "momentum"),
    "group": ("num_groups", "eps", "affine"),
    "none": (),
}

NormSpec = str | Sequence[Any]
"""``"instance"``, ``"batch"``, ``"group"`` or ``"none"``; or a pair of such a name and a dict of
its options (``eps``, ``affine``; ``momentum`` for batch, ``num_groups`` for group, by default 8),
as in MONAI: ``("batch", {"eps": 1e-3})``."""
Size = int | Sequence[int]


def is_count(value: object, at_least: int = 1) -> TypeGuard[int]:
    """Whether a value is a whole number (numpy's too, but no bool) and not below `at_least`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        return False
    return int(value) >= at_least


def as_counts(values: object) -> tuple[int, ...]:
    """A list of positive whole numbers as a tuple of int; empty where it is anything else.

    >>> as_counts([8, 16]), as_counts([8, 0.5]), as_counts(8)
    ((8, 16), (), ())
    """
    if not isinstance(values, Sequence) or not all(is_count(value) for value in values):
        return ()
    return tuple(int(value) for value in values)


def check_count(what: str, value: object, at_least: int = 1) -> int:
    """A whole number as an int.

    Args:
        what: what the value is called in the error.
        value: numpy's whole numbers are right too.
        at_least: the smallest that is allowed.

    Raises:
        ConfigError: `value` is smaller, or no whole number.
    """
    if not is_count(value, at_least):
        raise ConfigError(f"{what} {value!r}; expected at least {at_least}, a whole number.")
    return int(value)


def check_flag(what: str, value: object) -> bool:
    """A bool as it is: the text "false" and the number 0 may be meant as one, but are none.

    Raises:
        ConfigError: `value` is neither True nor False.
    """
    if not isinstance(value, bool):
        raise ConfigError(f"{what} {value!r}; expected true or false.")
    return value


def check_spatial_dims(value: object) -> int:
    """Number of spatial axes as an int.

    Raises:
        ConfigError: `value` is neither 2 nor 3.
    """
    if not is_count(value) or value not in (2, 3):
        raise ConfigError(f"spatial_dims {value!r}; expected 2 or 3.")
    return int(value)


def per_axis(value: Size, spatial_dims: int, name: str) -> tuple[int, ...]:
    """One integer per axis: a scalar is repeated, a sequence must have the right length.

    Args:
        value: at least 1 each.
        spatial_dims: 2 or 3.
        name: what the value is called in the error.

    Raises:
        ConfigError: wrong length, or a value that is no whole number of 1 or more.

    >>> per_axis(3, spatial_dims=2, name="kernel_size")
    (3, 3)
    """
    values = (int(value),) * spatial_dims if is_count(value) else as_counts(value)
    if len(values) != spatial_dims:
        raise ConfigError(
            f"{name} {value!r}; expected a positive integer or {spatial_dims} of them, "
            f"one per axis (spatial_dims={spatial_dims})."
        )
    return values


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value is a real number (numpy's too, but no bool)."""
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_probability(what: str, value: object) -> float:
    """A probability below 1 as a float.

    Raises:
        ConfigError: `value` is outside [0, 1), or no number.
    """
    if not is_number(value) or not 0 <= value < 1:
        raise ConfigError(f"{what} {value!r}; expected at least 0 and below 1, a number.")
    return float(value)


def _check_eps(what: str, value: object) -> float:
    if not is_number(value) or not 0 < value < math.inf:
        # YAML reads 1e-5, which has no point, as text.
        raise ConfigError(f"{what} {value!r}; expected a number above 0, such as 1.0e-5.")
    return float(value)


def _check_momentum(what: str, value: object) -> float | None:
    if value is None:
        return None
    if not is_number(value) or not 0 <= value <= 1:
        raise ConfigError(f"{what} {value!r}; expected a number from 0 to 1, or None.")
    return float(value)


_NORM_CHECKS: dict[str, Callable[[str, object], float | bool | None]] = {
    "eps": _check_eps,
    "affine": check_flag,
    "momentum": _check_momentum,
    "num_groups": check_count,
}


class InstanceNorm(nn.Module):
    """Normalise every channel of every sample over its voxels, then scale and shift (affine).

    References:
        D. Ulyanov, A. Vedaldi, V. Lempitsky: Instance Normalization: The Missing Ingredient for
        Fast Stylization, 2016, doi 10.48550/arXiv.1607.08022.
    """

    def __init__(self, channels: int, eps: float = 1e-5, affine: bool = True) -> None:
        """Start as a plain normalisation.

        Args:
            channels: of the input.
            eps: added to the variance.
            affine: whether scale and shift are learnt.
        """
        super().__init__()
        self.channels = channels
        self.eps = eps
        self.prefers_speed = False
        self.weight = nn.Parameter(torch.ones(channels)) if affine else None
        self.bias = nn.Parameter(torch.zeros(channels)) if affine else None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise ``(B, C, *S)``."""
        if self.prefers_speed and x.device.type == "cpu":
            # One group per channel is the same function, and on a CPU its forward pass takes a
            # quarter of the time. Its kernel for channels-last memory is inexact, hence contiguous.
            return functional.group_norm(
                x.contiguous(), self.channels, self.weight, self.bias, self.eps
            )
        return functional.instance_norm(x, weight=self.weight, bias=self.bias, eps=self.eps)

    def extra_repr(self) -> str:
        """What `print(network)` shows."""
        return f"{self.channels}, eps={self.eps}, affine={self.weight is not None}"


def prefer_speed_(network: nn.Module) -> None:
    """Let instance normalisation on a CPU use its fastest kernel, which rounds differently.

    Left alone, a network with ported weights gives the numbers of its source to the last digits;
    differences of rounding grow to about 2e-5 of the output's spread on the way through it.

    Args:
        network: changed in place.
    """
    for module in network.modules():
        if isinstance(module, InstanceNorm):
            module.prefers_speed = True


def split_norm(norm: NormSpec) -> tuple[str, dict[str, Any]]:
    """Name and options of a normalisation.

    Raises:
        ConfigError: unknown name or option, or a value that the option cannot have.

    >>> split_norm(["batch", {"eps": 0.001}])
    ('batch', {'eps': 0.001})
    """
    parts: Sequence[Any] = (norm, {}) if isinstance(norm, str) else norm
    is_pair = isinstance(parts, Sequence) and len(parts) == 2
    name, options = parts if is_pair else (None, None)
    if not isinstance(name, str) or not isinstance(options, Mapping):
        raise ConfigError(f"norm {norm!r}; expected a name, or a name and a dict of options.")
    check_choice("norm", name, _NORM_OPTIONS)
    for option in options:
        check_choice(f"option of norm '{name}'", option, _NORM_OPTIONS[name])
    return name, {
        option: _NORM_CHECKS[option](f"{option} of norm '{name}'", value)
        for option, value in options.items()
    }


def make_norm(norm: NormSpec, spatial_dims: int, channels: int) -> nn.Module:
    """Build a normalisation, by default with scale and shift.

    Args:
        norm: name, or name and options.
        spatial_dims: 2 or 3.
        channels: of its input.

    Raises:
        ConfigError: unknown name or option, or channels that the groups do not divide.
    """
    name, options = split_norm(norm)
    if name == "instance":
        return InstanceNorm(channels, **options)
    if name == "none":
        return nn.Identity()
    if name == "group":
        groups = options.pop("num_groups", NUM_GROUPS)
        if channels % groups:
            raise ConfigError(
                f"{channels} channels in {groups} groups; expected a multiple of the groups. Set "
                'the norm to ["group", {"num_groups": NUMBER}].'
            )
        return nn.GroupNorm(groups, channels, **options)
    return BATCH_NORM[spatial_dims](channels, **options)


def make_activation(activation: str, *, inplace: bool = True) -> nn.Module:
    """Build an activation by name.

    Args:
        activation: a key of ``leaky_relu``, ``relu``, ``elu``, ``silu``, ``gelu``, ``prelu``.
        inplace: whether it may overwrite its input. Neither a convolution nor a normalisation
            needs its own output for its gradient, so that one feature map less is kept.

    Raises:
        ConfigError: unknown name.
    """
    check_choice("activation", activation, _ACTIVATIONS)
    layer = _ACTIVATIONS[activation]()
    if isinstance(layer, (nn.LeakyReLU, nn.ReLU, nn.ELU, nn.SiLU)):
        layer.inplace = inplace
    return layer


def make_conv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    kernel_size: Size = 1,
    stride: Size = 1,
    *,
    bias: bool = True,
    padding: str = "same",
) -> nn.Module:
    """Build a convolution that keeps the size, but for its stride.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of its input.
        out_channels: of its output.
        kernel_size: an even one, without stride only, is padded behind (as in TensorFlow).
        stride: sizes are divided by it.
        bias: whether it has one.
        padding: ``"same"``, or ``"valid"`` for none.

    Raises:
        ConfigError: an even kernel with a stride, or a wrong number of axes.
    """
    check_choice("padding", padding, ("same", "valid"))
    kernel = per_axis(kernel_size, spatial_dims, "kernel_size")
    steps = per_axis(stride, spatial_dims, "stride")
    is_even = any(size % 2 == 0 for size in kernel)
    if is_even and max(steps) > 1:
        raise ConfigError(f"kernel_size {kernel} with stride {steps}; expected odd sizes.")
    is_centred = padding == "same" and not is_even
    conv = CONV[spatial_dims](
        in_channels,
        out_channels,
        kernel_size=kernel,
        stride=steps,
        padding=tuple(size // 2 for size in kernel) if is_centred else 0,
        bias=bias,
    )
    if is_centred or padding == "valid":
        return conv
    sides = [side for size in reversed(kernel) for side in ((size - 1) // 2, size // 2)]
    return nn.Sequential(ZERO_PAD[spatial_dims](tuple(sides)), conv)


def make_pooling(stride: Size, spatial_dims: int) -> nn.Module:
    """Build a max pooling whose window is its stride; an incomplete last window is dropped."""
    size = per_axis(stride, spatial_dims, "stride")
    return MAX_POOL[spatial_dims](size, size)


def make_deconv(
    spatial_dims: int,
    in_channels: int,
    out_channels: int,
    stride: Size,
    kernel_size: int | None = None,
    *,
    bias: bool = True,
) -> nn.Module:
    """Build a transposed convolution that multiplies sizes by its stride.

    Args:
        spatial_dims: 2 or 3.
        in_channels: of its input.
        out_channels: of its output.
        stride: one or per axis.
        kernel_size: by default the stride. Along an axis of stride 1, where an even kernel has no
            centre, it is the next smaller odd one.
        bias: whether it has one.

    Raises:
        ConfigError: a kernel smaller than the stride.
    """
    steps = per_axis(stride, spatial_dims, "stride")
    if kernel_size is not None and kernel_size < max(steps):
        raise ConfigError(f"kernel_size {kernel_size}; expected at least the stride {steps}.")
    sizes = steps if kernel_size is None else (kernel_size,) * spatial_dims
    kernel = [n - 1 if s == 1 and n % 2 == 0 else n for n, s in zip(sizes, steps, strict=True)]
    # (size - 1) * stride - 2 * padding + kernel + output_padding = size * stride
    padding = [(n - s + 1) // 2 for n, s in zip(kernel, steps, strict=True)]
    ends = [s + 2 * p - n for n, s, p in zip(kernel, steps, padding, strict=True)]
    return DECONV[spatial_dims](
        in_channels,
        out_channels,
        kernel_size=tuple(kernel),
        stride=steps,
        padding=tuple(padding),
        output_padding=tuple(ends),
        bias=bias,
    )


def make_nearest(stride: Size, spatial_dims: int) -> nn.Module:
    """Build an upsampling that repeats voxels: sizes are multiplied by `stride`."""
    steps = per_axis(stride, spatial_dims, "stride")
    return nn.Upsample(scale_factor=tuple(float(step) for step in steps), mode="nearest")


@dataclass(frozen=True)
class Style:
    """What all convolution units of one network have in common.

    Attributes:
        spatial_dims: 2 or 3.
        norm: see `NormSpec`.
        activation: a key of ``leaky_relu``, ``relu``, ``elu``, ``silu``, ``gelu``, ``prelu``.
        order: of the layers of a unit: C convolution, D dropout of whole channels, N norm,
            A activation. ``"NAC"`` is a pre-activated convolution.
        dropout: probability that a channel is set to zero in training; 0 for no such layer.
        bias: whether convolutions have one. They keep it before a normalisation, which takes it
            out again, wherever the source does, so that weights fit one to one.
        padding: ``"same"`` or ``"valid"``.
    """

    spatial_dims: int
    norm: NormSpec = "instance"
    activation: str = "leaky_relu"
    order: str = "CDNA"
    dropout: float = 0.0
    bias: bool = True
    padding: Literal["same", "valid"] = "same"


class Unit(nn.Sequential):
    """Convolution, dropout, normalisation and activation, in the order of the style.

    >>> unit = Unit(Style(3), 1, 8, stride=(2, 2, 1))
    >>> unit(torch.zeros(2, 1, 16, 16, 16)).shape
    torch.Size([2, 8, 8, 8, 16])
    """

    # TorchScript compiles modules with the same set of parts once, whatever their order, unless
    # a constant tells them apart.
    __constants__ = ("order",)

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int,
        kernel_size: Size = 3,
        stride: Size = 1,
    ) -> None:
        """Build the layers.

        Args:
            style: of the network; layers that it turns off are left out.
            in_channels: of the input.
            out_channels: of the output.
            kernel_size: one or per axis.
            stride: one or per axis.

        Raises:
            ConfigError: what `make_conv`, `make_norm` or `make_activation` refuses.
        """
        dims = style.spatial_dims
        dropout = check_probability("dropout", style.dropout)
        layers: OrderedDict[str, nn.Module] = OrderedDict()
        channels = in_channels
        for letter in style.order:
            if letter == "C":
                layers["conv"] = make_conv(
                    dims,
                    in_channels,
                    out_channels,
                    kernel_size,
                    stride,
                    bias=style.bias,
                    padding=style.padding,
                )
                channels = out_channels
            elif letter == "N" and split_norm(style.norm)[0] != "none":
                layers["norm"] = make_norm(style.norm, dims, channels)
            elif letter == "A":
                inplace = _gains_from_overwriting(style.activation, [*layers.values()])
                layers["activation"] = make_activation(style.activation, inplace=inplace)
            elif letter == "D" and dropout > 0:
                layers["dropout"] = DROPOUT[dims](dropout)
        super().__init__(layers)
        self.order = "-".join(layers)


def _gains_from_overwriting(activation: str, before: Sequence[nn.Module]) -> bool:
    """Whether an activation behind the layers `before` of its unit should overwrite its input."""
    if not before:
        # That is the unit's own input, which a shortcut may need.
        return False
    # Instance normalisation gives a view, and to overwrite a view costs a copy in the backward
    # pass. The others would otherwise keep their input; ReLU keeps its output in either case.
    return not (activation == "relu" and isinstance(before[-1], InstanceNorm))


class ConvStack(nn.Sequential):
    """Several `Unit`, of which the first takes the stride."""

    def __init__(
        self,
        style: Style,
        in_channels: int,
        out_channels: int | Sequence[int],
        *,
        num_convs: int = 2,
        kernel_size: Size = 3,
        stride: Size = 1,
    ) -> None:
        """Build the convolutions.

        Args:
            style: of the network.
            in_channels: of the input.
            out_channels: of every convolution, or of each.
            num_convs: how many; left out where `out_channels` names each.
            kernel_size: one or per axis.
            stride: of the first; one or per axis.

        Raises:
            ConfigError: no convolution, or what `Unit` refuses.
        """
        widths = [out_channels] * num_convs if isinstance(out_channels, int) else [*out_channels]
        if not widths:
            raise ConfigError(f"num_convs {num_convs}; expected at least 1.")
        inputs = [in_channels, *widths[:-1]]
        super().__init__(
            *(
                Unit(style, a, b, kernel_size, 1 if index else stride)
                for index, (a, b) in enumerate(zip(inputs, widths, strict=True))
            )
        )


def initialise_he_(network: nn.Module, slope: float = 0.0) -> None:
    """Draw all convolution weights as He et al. propose for (leaky) ReLU; biases become zero.

    Args:
        network: changed in place.
        slope: of the activation for negative values.

    References:
        K. He et al.: Delving Deep into Rectifiers, 2015, doi 10.1109/ICCV.2015.123.
    """
    convolutions = (nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.ConvTranspose3d)
    for module in network.modules():
        if isinstance(module, convolutions):
            nn.init.kaiming_normal_(module.weight, a=slope)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
