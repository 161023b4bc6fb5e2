"""Weights in torchvision's format, made here with its names and shapes."""

from __future__ import annotations

import logging
from pathlib import Path

import pytest
import torch

from volseg.errors import DataError
from volseg.networks import ResNetUNet, UNet

WIDTHS = (4, 4, 6, 8, 10)
UNITS = {18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}
NORM = ("weight", "bias", "running_mean", "running_var")


def make_state(depth, widths=WIDTHS):
    """What ``torchvision.models.resnet18().state_dict()`` and its like hold, in narrow."""
    generator = torch.Generator().manual_seed(depth)
    state = {}

    def conv(name, *shape):
        state[f"{name}.weight"] = torch.randn(shape, generator=generator)

    def norm(name, width):
        for entry in NORM:
            state[f"{name}.{entry}"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", widths[0], 3, 7, 7)
    norm("bn1", widths[0])
    before = widths[0]
    for stage, (width, count) in enumerate(zip(widths[1:], UNITS[depth], strict=True), start=1):
        for unit in range(count):
            name = f"layer{stage}.{unit}"
            kernels = (1, 3, 1) if depth == 50 else (3, 3)
            after = 4 * width if depth == 50 else width
            for place, kernel in enumerate(kernels, start=1):
                inputs = before if place == 1 else width
                outputs = after if place == len(kernels) else width
                conv(f"{name}.conv{place}", outputs, inputs, kernel, kernel)
                norm(f"{name}.bn{place}", outputs)
            if unit == 0 and (stage > 1 or before != after):
                conv(f"{name}.downsample.0", after, before, 1, 1)
                norm(f"{name}.downsample.1", after)
            before = after
    state["fc.weight"] = torch.zeros(1000, before)
    state["fc.bias"] = torch.zeros(1000)
    return state


@pytest.fixture
def save(tmp_path):
    def write(state, name="resnet.pth"):
        torch.save(state, tmp_path / name)
        return tmp_path / name

    return write


def build(depth=18, dims=2, in_channels=3, **options):
    torch.manual_seed(0)
    return ResNetUNet(dims, in_channels, 2, depth=depth, channels=WIDTHS, **options).eval()


@pytest.mark.parametrize("depth", [18, 34, 50])
def test_all_but_the_last_norm_of_each_unit_has_a_place(save, depth):
    state = make_state(depth)
    report = build(depth).load_pretrained(save(state))
    last = 3 if depth == 50 else 2
    no_place = (f".bn{last}.", ".downsample.1.", "fc.")
    unused = {name for name in state if any(part in f".{name}" for part in no_place)}
    counters = {name for name in state if "num_batches" in name}
    assert set(report.unused) == unused - counters
    assert set(report.loaded) == state.keys() - unused - counters
    assert report.adapted == ()


def test_fresh_parameters_are_those_in_front_of_each_unit(save):
    network = build()
    report = network.load_pretrained(save(make_state(18)))
    units = [name for name, module in network.named_modules() if hasattr(module, "preactivation")]
    assert len(units) == 8
    norms = {f"{unit}.preactivation.norm.{entry}" for unit in units for entry in NORM[:2]}
    others = {"stem.0.bias", "stages.0.first.projection.weight", "final.norm.weight"}
    assert set(report.fresh) == norms | others | {"final.norm.bias"}


def test_values_go_where_their_names_say(save):
    state = make_state(18)
    network = build(pretrained=save(state))
    stem, unit = network.stem[1], network.stages[2].first
    places = {
        "conv1.weight": stem.conv.weight,
        "bn1.running_var": stem.norm.running_var,
        "layer3.0.conv1.weight": unit.convs[0].weight,
        "layer3.0.bn1.bias": unit.convs[1].norm.bias,
        "layer3.0.bn1.running_mean": unit.convs[1].norm.running_mean,
        "layer3.0.conv2.weight": unit.convs[1].conv.weight,
        "layer3.0.downsample.0.weight": unit.projection.weight,
        "layer4.1.conv2.weight": network.stages[3].units[0].convs[1].conv.weight,
    }
    for name, tensor in places.items():
        assert torch.equal(tensor, state[name]), name


def test_first_stage_projection_of_a_bottleneck_network_is_loaded(save):
    state = make_state(50)
    network = build(50, pretrained=save(state))
    projection = network.stages[0].first.projection.weight
    assert torch.equal(projection, state["layer1.0.downsample.0.weight"])


def test_what_became_of_a_file_is_logged_in_one_line(save, caplog):
    path = save(make_state(18))
    with caplog.at_level(logging.INFO, logger="volseg"):
        build(in_channels=1, pretrained=path)
    (message,) = caplog.messages
    assert f"pretrained weights from {path}: " in message
    assert "1 adapted (conv1.weight)" in message
    assert "(fc.weight, fc.bias" not in message  # Three names at most, then dots.
    assert "\n" not in message


def test_inflated_kernels_keep_the_response_to_what_is_constant_along_the_last_axis(save):
    path = save(make_state(18))
    flat, deep = build(pretrained=path), build(dims=3)
    report = deep.load_pretrained(path)
    assert "conv1.weight" in report.adapted
    assert "bn1.weight" in report.loaded
    image = torch.randn(1, 3, 32, 32)
    stack = image[..., None].expand(-1, -1, -1, -1, 32)
    middle = deep.stem(stack)[..., 8]  # Away from the padding.
    torch.testing.assert_close(middle, flat.stem(image), rtol=1e-4, atol=1e-4)
    features = torch.randn(1, 4, 8, 8)
    stack = features[..., None].expand(-1, -1, -1, -1, 5)
    unit, inflated = flat.stages[1].first, deep.stages[1].first
    torch.testing.assert_close(
        inflated.convs[0](stack)[..., 1], unit.convs[0](features), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("in_channels", [1, 2, 4])
def test_other_numbers_of_channels_keep_the_response_to_equal_channels(save, in_channels):
    path = save(make_state(18))
    rgb, other = build(pretrained=path), build(in_channels=in_channels)
    assert other.load_pretrained(path).adapted == ("conv1.weight",)
    grey = torch.randn(1, 1, 16, 16)
    torch.testing.assert_close(
        other.stem(grey.repeat(1, in_channels, 1, 1)),
        rgb.stem(grey.repeat(1, 3, 1, 1)),
        rtol=1e-4,
        atol=1e-4,
    )


def test_no_statistics_without_their_convolution_and_planes_across_the_thin_axis(save):
    report = build(dims=3, kernel_sizes=[[1, 7, 7], [1, 3, 3], 5, 5, 5]).load_pretrained(
        save(make_state(18))
    )
    assert "layer1.0.conv1.weight" in report.adapted
    assert "layer1.0.bn1.weight" in report.loaded
    assert "layer2.0.conv1.weight" in report.unused
    assert "layer2.0.bn1.running_mean" in report.unused


def test_small_stem_leaves_the_first_kernel_and_its_statistics(save):
    report = build(stem="k3s1").load_pretrained(save(make_state(18)))
    assert {"conv1.weight", "bn1.weight", "bn1.running_mean"} <= set(report.unused)
    assert "stem.1.conv.weight" in report.fresh
    assert "layer1.0.conv1.weight" in report.loaded


@pytest.mark.parametrize(("held", "wanted"), [(18, 34), (34, 18), (34, 50), (50, 34), (18, 50)])
def test_state_dict_of_another_depth_is_refused(save, held, wanted):
    with pytest.raises(
        DataError, match=f"expected the state dict of a torchvision ResNet-{wanted}"
    ):
        build(wanted, pretrained=save(make_state(held)))


@pytest.mark.parametrize(
    "state",
    [
        pytest.param(lambda: UNet(2, 3, 2, channels=(4, 8)).state_dict(), id="another network"),
        pytest.param(dict, id="empty"),
    ],
)
def test_state_dict_that_does_not_fit_is_refused(save, state):
    with pytest.raises(DataError, match=r"resnet\.pth does not fit; expected .* ResNet-18"):
        build(pretrained=save(state()))


def test_state_dict_of_other_widths_is_refused(save):
    state = make_state(18, widths=(8, 8, 16, 32, 64))
    with pytest.raises(DataError, match=r"is \[8, 8, 3, 3\]; expected \[4, 4, 3, 3\]"):
        build(pretrained=save(state))


def test_stem_of_its_own_width_leaves_what_it_feeds(save):
    state = make_state(18, widths=(8, 8, 16, 32, 64))
    network = ResNetUNet(2, 3, 2, depth=18, channels=(4, 8, 16, 32, 64), stem="k3s1")
    report = network.load_pretrained(save(state))
    fed = {"conv1.weight", "layer1.0.conv1.weight"}
    assert fed < set(report.unused)
    convolutions = {name for name in state if ".conv" in name} - fed
    assert convolutions <= set(report.loaded)


def test_refused_file_leaves_the_network_as_it_was(save):
    network = build(34)
    before = {name: tensor.clone() for name, tensor in network.state_dict().items()}
    with pytest.raises(DataError):
        network.load_pretrained(save(make_state(18)))
    assert all(torch.equal(tensor, before[name]) for name, tensor in network.state_dict().items())


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_file_with_code_is_refused_and_not_executed(save, tmp_path):
    marker = tmp_path / "executed"
    path = save({**make_state(18), "code": Malicious(marker)})
    with pytest.raises(DataError, match="cannot be loaded as plain tensors"):
        build(pretrained=path)
    assert not marker.exists()


@pytest.mark.parametrize("kept", [0, 3, 0.5, 0.99])
def test_truncated_file_is_refused(save, kept):
    path = save(make_state(18))
    data = path.read_bytes()
    path.write_bytes(data[: int(kept * len(data)) if kept < 1 else kept])
    with pytest.raises(DataError, match=r"resnet\.pth cannot be loaded as plain tensors"):
        build(pretrained=path)


@pytest.mark.parametrize("data", [b"text", b"PK\x03\x04broken", b"\x80\x02."])
def test_file_of_another_kind_is_refused(tmp_path, data):
    path = tmp_path / "resnet.pth"
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"resnet\.pth cannot be loaded as plain tensors"):
        build(pretrained=path)


def test_missing_file_and_other_content_are_refused(save, tmp_path):
    with pytest.raises(DataError, match=r"none\.pth does not exist; expected a state dict"):
        build(pretrained=tmp_path / "none.pth")
    for content in ({"state_dict": make_state(18)}, [torch.zeros(1)]):
        with pytest.raises(DataError, match="is no state dict; expected names with tensors"):
            build(pretrained=save(content))
