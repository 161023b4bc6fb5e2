"""What every network promises, for every name of the registry.

A new network takes part without a line here; one that cannot be built from `channels` alone, or
takes long, adds to `SHORT`.
"""

from __future__ import annotations

import copy
import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from monai.inferers import SlidingWindowInferer
from torch import nn
from torch.export import Dim

from volseg.errors import ConfigError
from volseg.networks import build_network, list_networks
from volseg.networks.layers import Style, Unit

STRIDES = ((1, 1, 1), (2, 1, 2), (2, 2, 1), (2, 2, 2))
KERNELS = ((3, 1, 3), (3, 3, 3), (3, 3, 1), (3, 3, 3))
SHORT = {"resnet_unet": {"blocks": [1, 2]}}
VARIANTS = {name: (name, {}) for name in list_networks()} | {
    "unet-residual": (
        "unet",
        {
            "channels": [4, 6, 8, 8],
            "encoder": "residual",
            "num_convs": [1, 2, 1, 1],
            "deep_supervision": True,
        },
    ),
    "resnet_unet-group-norm": (
        "resnet_unet",
        {"norm": ["group", {"num_groups": 2}], "decoder_norm": "none", "stem": "k3s1"},
    ),
    "hypercolumn-group-norm": ("hypercolumn_unet", {"norm": ["group", {"num_groups": 2}]}),
    "unet3d-encoder-taps": (
        "unet3d_deep_supervision",
        {"supervision": "encoder", "branch": "nearest"},
    ),
    "unetplusplus-keras": ("unetplusplus", {"form": "keras", "eval_output": "mean"}),
    "resnet_unet-small-stem": (
        "resnet_unet",
        {"stem": "k3s1", "depth": 50, "upsampling": "deconv"},
    ),
}


@dataclass(frozen=True)
class Case:
    """A network of three narrow levels, unless its options say otherwise."""

    variant: str
    spatial_dims: int
    is_anisotropic: bool = False

    @property
    def is_plain(self) -> bool:
        return self.variant == self.name

    @property
    def name(self) -> str:
        return VARIANTS[self.variant][0]

    @property
    def options(self) -> dict[str, Any]:
        options = {"channels": [4, 6, 8], **SHORT.get(self.name, {}), **VARIANTS[self.variant][1]}
        if self.is_anisotropic:
            depth = len(options["channels"])
            # The large stem of a ResNet has a stride of its own.
            first = (2, 2, 1) if self.variant == "resnet_unet" else STRIDES[0]
            strides = (first, *STRIDES[1:depth])
            options["strides"] = [list(stride[: self.spatial_dims]) for stride in strides]
            options["kernel_sizes"] = [list(size[: self.spatial_dims]) for size in KERNELS[:depth]]
        return options

    def build(self) -> nn.Module:
        torch.manual_seed(0)
        facts = {"spatial_dims": self.spatial_dims, "in_channels": 2, "out_channels": 3}
        return build_network(self.name, **facts, **self.options)

    def __str__(self) -> str:
        return f"{self.variant}-{self.spatial_dims}d{'-anisotropic' * self.is_anisotropic}"


ISOTROPIC = [Case(variant, dims) for variant in VARIANTS for dims in (2, 3)]
ANISOTROPIC = [replace(case, is_anisotropic=True) for case in ISOTROPIC]
CASES = ISOTROPIC + ANISOTROPIC


@pytest.fixture(params=CASES, ids=str)
def network(request):
    return request.param.build()


def make_image(network, batch=2):
    """Noise of two, three and one times the coarsest level's voxel."""
    size = [stride * n for stride, n in zip(network.total_stride, (2, 3, 1), strict=False)]
    return torch.randn(batch, network.in_channels, *size, generator=torch.manual_seed(1))


def let_sizes_vary(network):
    """For `torch.export`: any batch, any size of two voxels or more at the coarsest level.

    torch fixes a size of one. Multiples of the divisor would be too many where that is 1: the
    padding that an odd size then needs is decided on export.
    """
    sizes = [stride * Dim(f"n{axis}", min=2) for axis, stride in enumerate(network.total_stride)]
    return ({0: Dim("batch"), **dict(enumerate(sizes, start=2))},)


def make_images_to_vary(network):
    """One to export with, one of another batch and other sizes."""
    strides = network.total_stride
    shapes = [(2, [2, 3, 2]), (3, [3, 2, 4])]
    return [
        torch.randn(batch, 2, *(n * s for n, s in zip(times, strides, strict=False)))
        for batch, times in shapes
    ]


def run(network, image):
    with torch.no_grad():
        return network.eval()(image)


def train(network, image):
    outputs = network.train()(image)
    return outputs if isinstance(outputs, list) else [outputs]


def assert_near(actual, expected):
    """Everywhere within a ten-thousandth of the spread."""
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.parametrize("batch", [1, 2])
def test_eval_gives_one_tensor_of_the_input_size(network, batch):
    image = make_image(network, batch)
    assert run(network, image).shape == (batch, 3, *image.shape[2:])


def test_cases_of_a_batch_do_not_meet_in_eval(network):
    image = make_image(network)
    both = run(network, image)
    assert_near(torch.cat([run(network, one[None]) for one in image]), both)


def test_training_gives_what_the_supervision_strides_say(network):
    image = make_image(network)
    outputs = network.train()(image)
    assert isinstance(outputs, list) == (len(network.supervision_strides) > 1)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert [tuple(output.shape) for output in outputs] == [
        (2, 3, *(n // s for n, s in zip(image.shape[2:], strides, strict=True)))
        for strides in network.supervision_strides
    ]


def test_gradient_reaches_every_parameter(network):
    for name, parameter in network.named_parameters():
        # A scale that begins at zero hides all in front of it from the first step's gradient.
        if name.endswith("norm.weight") and not parameter.any():
            nn.init.ones_(parameter)
    sum(output.square().mean() for output in train(network, make_image(network))).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # A bias in front of a normalisation has no influence, hence a gradient of zero.
        assert parameter.dim() == 1 or parameter.grad.abs().max() > 0, name


def test_state_dict_makes_another_network_equal(network):
    image = make_image(network)
    other = copy.deepcopy(network)
    train(network, image)  # Running statistics are part of the state.
    for parameter in other.parameters():
        nn.init.normal_(parameter)
    file = io.BytesIO()
    torch.save(network.state_dict(), file)
    file.seek(0)
    assert not torch.equal(run(other, image), run(network, image))
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(run(other, image), run(network, image))


def test_no_parameter_is_registered_twice(network):
    parameters = [p for _, p in network.named_parameters(remove_duplicate=False)]
    assert len(parameters) == len({id(parameter) for parameter in parameters})


def find_tensors(value):
    if isinstance(value, torch.Tensor):
        return [value]
    values = value.values() if isinstance(value, dict) else value
    is_nested = isinstance(value, (dict, list, tuple))
    return [tensor for item in values for tensor in find_tensors(item)] if is_nested else []


def test_no_tensor_is_kept_after_forward(network):
    train(network, make_image(network))
    for module in network.modules():
        state = ("_parameters", "_buffers", "_modules")
        attributes = {name: value for name, value in vars(module).items() if name not in state}
        assert find_tensors(attributes) == []


def test_sliding_window_of_the_whole_image_gives_the_network_output(network):
    image = make_image(network)
    inferer = SlidingWindowInferer(image.shape[2:], overlap=0.5, mode="gaussian")
    expected = run(network, image)
    with torch.no_grad():
        assert_near(inferer(image, network), expected)


def test_sliding_window_covers_a_larger_image(network):
    image = make_image(network)
    larger = torch.cat([image, image], dim=-1)
    with torch.no_grad():
        logits = SlidingWindowInferer(image.shape[2:], overlap=0)(larger, network.eval())
    expected = torch.cat([run(network, image)] * 2, dim=-1)
    assert_near(logits, expected)


def test_channels_last_is_equal(network):
    image = make_image(network)
    expected = run(network, image)
    last = {2: torch.channels_last, 3: torch.channels_last_3d}[network.spatial_dims]
    logits = run(network.to(memory_format=last), image.to(memory_format=last))
    assert_near(logits, expected)


def test_bfloat16_is_near(network):
    image = make_image(network)
    expected = run(network, image)
    with torch.autocast("cpu", torch.bfloat16):
        logits = run(network, image)
    # Three digits per operation: single voxels may be off, the typical one is not.
    assert (logits.float() - expected).square().mean().sqrt() < 0.2 * expected.std()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_sixteen_bits_are_near_and_stay(network, dtype):
    if any(isinstance(module, nn.AvgPool3d) for module in network.modules()):
        pytest.skip("torch has no 3D average pooling of sixteen bits on a CPU")
    image = make_image(network)
    expected = run(network, image)
    logits = run(network.to(dtype), image.to(dtype))
    assert logits.dtype == dtype
    assert (logits.float() - expected).square().mean().sqrt() < 0.2 * expected.std()


def test_float64_is_near_and_stays(network):
    image = make_image(network)
    expected = run(network, image)
    logits = run(network.double(), image.double())
    assert logits.dtype == torch.float64
    assert_near(logits, expected)


def test_odd_size_is_taken_or_refused_with_the_size_to_pad_to(network):
    image = make_image(network)
    odd = image[:, :, 1:]
    if max(network.divisor) == 1:
        assert run(network, odd).shape[2:] == odd.shape[2:]
    else:
        with pytest.raises(ConfigError, match=re.escape(f"Pad to {list(image.shape[2:])}.")):
            network(odd)


def test_wrong_number_of_axes_or_channels_is_refused(network):
    image = make_image(network)
    with pytest.raises(ConfigError, match=f"and {network.spatial_dims} spatial axes"):
        network(image[0])
    with pytest.raises(ConfigError, match="input has 1 channels; expected 2"):
        network(image[:, :1])
    with pytest.raises(ConfigError, match="input size"):
        network(image[..., :0])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_options_survive_json(case):
    facts = {"spatial_dims": case.spatial_dims, "in_channels": 1, "out_channels": 2}
    network = build_network(case.name, **json.loads(json.dumps({**facts, **case.options})))
    assert (network.in_channels, network.out_channels) == (1, 2)
    assert network.divisor == build_network(case.name, **facts, **case.options).divisor


# What follows takes long, so that each is shown with the one or the other strides.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", ANISOTROPIC, ids=str)
def test_scripted_network_is_equal(case):
    network = case.build()
    image = make_image(network)
    scripted = torch.jit.script(network.eval())
    assert_near(run(scripted, image), run(network, image))
    with pytest.raises(torch.jit.Error, match="input has 1 channels; expected 2"):
        scripted(image[:, :1])


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [c for c in ISOTROPIC if c.spatial_dims == 2], ids=str)
def test_scripted_network_trains_alike(case):
    network = case.build().train()
    image = make_image(network)
    scripted = torch.jit.script(network)
    torch.manual_seed(2)  # Of dropout.
    expected = network(image)
    torch.manual_seed(2)
    outputs = scripted(image)
    assert isinstance(outputs, list) == isinstance(expected, list)
    torch.testing.assert_close(outputs, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_units_keep_their_own_order():
    # TorchScript compiles modules of the same parts only once.
    torch.manual_seed(0)
    image = torch.randn(2, 4, 8, 8)
    units = [Unit(Style(2, "batch", order=order), 4, 4).eval() for order in ("CNA", "NAC", "ANC")]
    for unit in units:
        unit.norm.running_mean.normal_()
    for unit in units:
        torch.testing.assert_close(torch.jit.script(unit)(image), unit(image))


@pytest.mark.parametrize("case", ANISOTROPIC, ids=str)
def test_exported_network_is_equal(case):
    network = case.build()
    image = make_image(network)
    exported = torch.export.export(network.eval(), (image,)).module()
    with torch.no_grad():
        assert_near(exported(image), run(network, image))


def run_onnx(program, image):
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    (logits,) = session.run(None, {session.get_inputs()[0].name: image.numpy()})
    return torch.from_numpy(logits)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [c for c in ISOTROPIC if c.spatial_dims == 2], ids=str)
def test_onnx_network_is_equal(case):
    network = case.build().eval()
    image = make_image(network)
    program = torch.onnx.export(network, (image,), dynamo=True, verbose=False)
    assert_near(run_onnx(program, image), run(network, image))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [c for c in ANISOTROPIC if c.spatial_dims == 3], ids=str)
def test_exported_and_onnx_network_take_other_sizes(case):
    network = case.build().eval()
    image, other = make_images_to_vary(network)
    varying = let_sizes_vary(network)
    exported = torch.export.export(network, (image,), dynamic_shapes=varying)
    with torch.no_grad():
        assert_near(exported.module()(other), run(network, other))
    program = torch.onnx.export(exported, (image,), verbose=False)
    assert_near(run_onnx(program, other), run(network, other))


def assert_compiled_is_equal_and_trains(network, backend):
    torch.compiler.reset()
    image = make_image(network)
    compiled = torch.compile(network, backend=backend, fullgraph=True)
    assert_near(run(compiled, image), run(network, image))
    sum(output.square().mean() for output in train(compiled, image)).backward()
    assert all(parameter.grad is not None for parameter in network.parameters())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", [c for c in ANISOTROPIC if c.spatial_dims == 3], ids=str)
def test_compiled_network_is_equal_and_trains(case):
    assert_compiled_is_equal_and_trains(case.build(), "aot_eager")


# This takes ten seconds and more for a network of three levels. The others therefore go by
# `aot_eager` above, which traces and differentiates alike and compiles nothing.
@pytest.mark.slow
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["unet_original", "laddernet"])
def test_network_compiled_to_machine_code_is_equal_and_trains(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    facts = {"spatial_dims": 2, "in_channels": 2, "out_channels": 3}
    assert_compiled_is_equal_and_trains(build_network(name, **facts, channels=[4, 6]), "inductor")
    assert list(tmp_path.rglob("*.so")), "nothing was compiled"
