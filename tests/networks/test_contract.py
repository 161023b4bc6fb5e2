"""What every network promises. A new network adds its cases to `CASES`."""

from __future__ import annotations

import copy
import json
import re

import pytest
import torch
from monai.inferers import SlidingWindowInferer

from volseg.errors import ConfigError
from volseg.networks import build_network, list_networks

CASES = {
    "unet-2d": ("unet", 2, {"channels": [4, 6, 8]}),
    "unet-2d-anisotropic": ("unet", 2, {"channels": [4, 6, 8], "strides": [1, [2, 1], [2, 2]]}),
    "unet-2d-supervised": ("unet", 2, {"channels": [4, 6, 8, 8], "deep_supervision": True}),
    "unet-3d": ("unet", 3, {"channels": [4, 6, 8]}),
    "unet-3d-batch-norm": ("unet", 3, {"channels": [4, 6], "norm": "batch", "num_convs": 1}),
    "unet-3d-anisotropic-supervised": (
        "unet",
        3,
        {
            "channels": [4, 6, 8, 8],
            "strides": [[1, 1, 1], [2, 2, 1], 2, [1, 2, 2]],
            "kernel_sizes": [[3, 3, 1], 3, 3, 3],
            "deep_supervision": True,
        },
    ),
}


@pytest.fixture(params=CASES)
def network(request):
    torch.manual_seed(0)
    name, spatial_dims, options = CASES[request.param]
    return build_network(name, spatial_dims=spatial_dims, in_channels=2, out_channels=3, **options)


def make_image(network, batch=2):
    """Noise of two, three and one times the divisor."""
    size = [d * blocks for d, blocks in zip(network.divisor, (2, 3, 1), strict=False)]
    return torch.randn(batch, network.in_channels, *size, generator=torch.manual_seed(1))


def test_every_network_has_cases_in_2d_and_3d():
    covered = {(name, spatial_dims) for name, spatial_dims, _ in CASES.values()}
    assert covered == {(name, dims) for name in list_networks() for dims in (2, 3)}


@pytest.mark.parametrize("batch", [1, 2])
def test_eval_gives_one_tensor_of_the_input_size(network, batch):
    image = make_image(network, batch)
    assert network.eval()(image).shape == (batch, 3, *image.shape[2:])


def test_training_gives_what_the_supervision_strides_say(network):
    image = make_image(network)
    outputs = network.train()(image)
    outputs = outputs if isinstance(outputs, list) else [outputs]
    assert [tuple(output.shape) for output in outputs] == [
        (2, 3, *(n // s for n, s in zip(image.shape[2:], strides, strict=True)))
        for strides in network.supervision_strides
    ]


def test_gradient_reaches_every_parameter(network):
    outputs = network.train()(make_image(network))
    outputs = outputs if isinstance(outputs, list) else [outputs]
    sum(output.square().mean() for output in outputs).backward()
    for name, parameter in network.named_parameters():
        assert parameter.grad is not None, name
        # A bias in front of a normalisation has no influence, hence a gradient of zero.
        assert parameter.dim() == 1 or parameter.grad.abs().max() > 0, name


def test_state_dict_makes_another_network_equal(network):
    other = copy.deepcopy(network)
    for parameter in other.parameters():
        torch.nn.init.ones_(parameter)
    other.load_state_dict(network.state_dict())
    image = make_image(network)
    assert torch.equal(other.eval()(image), network.eval()(image))


def test_no_parameter_is_registered_twice(network):
    parameters = [p for _, p in network.named_parameters(remove_duplicate=False)]
    assert len(parameters) == len({id(parameter) for parameter in parameters})


def test_no_tensor_is_kept_after_forward(network):
    network.train()(make_image(network))
    for module in network.modules():
        kept = [name for name, value in vars(module).items() if isinstance(value, torch.Tensor)]
        assert kept == []


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_scripted_network_is_equal_and_refuses_alike(network):
    network.eval()
    image = make_image(network)
    scripted = torch.jit.script(network)
    assert torch.equal(scripted(image), network(image))
    with pytest.raises(torch.jit.Error, match="Pad to"):
        scripted(image[:, :, 1:])


def test_exported_network_is_equal(network):
    network.eval()
    image = make_image(network)
    exported = torch.export.export(network, (image,)).module()
    torch.testing.assert_close(exported(image), network(image))


def test_sliding_window_of_the_whole_image_gives_the_network_output(network):
    network.eval()
    image = make_image(network)
    inferer = SlidingWindowInferer(image.shape[2:], overlap=0.5, mode="gaussian")
    with torch.no_grad():
        torch.testing.assert_close(inferer(image, network), network(image), rtol=1e-5, atol=1e-4)


def test_sliding_window_covers_a_larger_image(network):
    image = make_image(network)
    larger = torch.cat([image, image], dim=-1)
    with torch.no_grad():
        logits = SlidingWindowInferer(image.shape[2:])(larger, network.eval())
    assert logits.shape == (2, 3, *larger.shape[2:])


def test_odd_size_is_refused_with_the_size_to_pad_to(network):
    image = make_image(network)
    size = list(image.shape[2:])
    with pytest.raises(ConfigError, match=re.escape(f"Pad to {size}.")):
        network(image[:, :, 1:])


def test_wrong_number_of_axes_or_channels_is_refused(network):
    image = make_image(network)
    with pytest.raises(ConfigError, match=f"and {network.spatial_dims} spatial axes"):
        network(image[0])
    with pytest.raises(ConfigError, match="input has 1 channels; expected 2"):
        network(image[:, :1])


@pytest.mark.parametrize("case", CASES)
def test_options_survive_json(case):
    name, spatial_dims, options = CASES[case]
    facts = {"spatial_dims": spatial_dims, "in_channels": 1, "out_channels": 2, **options}
    network = build_network(name, **json.loads(json.dumps(facts)))
    assert network.in_channels == 1
    assert network.out_channels == 2
