from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional

from volseg.networks import UNet3d

CHANNELS = (4, 6, 8, 10)
IMAGE = torch.randn(2, 1, 16, 8, 16, generator=torch.manual_seed(0))


def build(**options):
    torch.manual_seed(0)
    return UNet3d(3, 1, 3, channels=CHANNELS, deep_supervision=True, **options).train()


def record(network, image):
    """The outputs, and features of encoder and decoder, each finest first."""
    encoded: list[torch.Tensor] = []
    decoded: list[torch.Tensor] = []
    for levels, found in ((network.encoder.levels, encoded), (network.decoder, decoded)):
        for level in levels:
            level.register_forward_hook(lambda _, __, out, found=found: found.append(out))
    return network(image), encoded, decoded[::-1]


def test_paper_size():
    # The paper: 132 x 132 x 116 in, 44 x 44 x 28 out.
    network = UNet3d(3, 1, 3, channels=(2, 2, 2, 2), padding="valid").eval()
    with torch.no_grad():
        assert network(torch.zeros(1, 1, 132, 132, 116)).shape == (1, 3, 44, 44, 28)


@pytest.mark.parametrize(
    ("branch", "mode"), [("linear", "trilinear"), ("nearest", "nearest"), ("none", None)]
)
def test_branches_classify_decoder_levels_and_upsample(branch, mode):
    network = build(branch=branch)
    outputs, _, decoded = record(network, IMAGE)
    torch.testing.assert_close(outputs[0], network.head(decoded[0]))
    for level in (1, 2):
        part = network.branches[level - 1]
        head = part if branch == "none" else part[0]
        assert head.kernel_size == (1, 1, 1)
        logits = head(decoded[level])
        if mode:
            logits = functional.interpolate(logits, IMAGE.shape[2:], mode=mode)
        torch.testing.assert_close(outputs[level], logits)
    strides = [(1, 1, 1), (2, 2, 2), (4, 4, 4)] if branch == "none" else [(1, 1, 1)] * 3
    assert list(network.supervision_strides) == strides


@pytest.mark.parametrize("supervision", ["encoder", "decoder"])
def test_deconvolved_branches_of_encoder_and_decoder(supervision):
    network = build(supervision=supervision, branch="deconv")
    outputs, encoded, decoded = record(network, IMAGE)
    taps = encoded if supervision == "encoder" else decoded
    for level, branch in enumerate(network.branches, start=1):
        *deconvs, head = branch
        assert len(deconvs) == level
        assert all(
            isinstance(layer, nn.ConvTranspose3d) and layer.bias is None for layer in deconvs
        )
        # The width is halved by each: 8, 4, 2 at the second level.
        assert head.in_channels == CHANNELS[level] // 2**level
        torch.testing.assert_close(outputs[level], branch(taps[level]))


def test_default_branch_depends_on_where_it_starts():
    assert isinstance(build().branches[0][1], nn.Upsample)
    assert isinstance(build(supervision="encoder").branches[0][0], nn.ConvTranspose3d)


def test_branches_are_not_used_in_eval():
    network = build()
    plain = UNet3d(3, 1, 3, channels=CHANNELS).eval()
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.equal(plain(IMAGE), network.eval()(IMAGE))


def test_width_is_halved_in_the_first_convolution_and_kept_by_upsampling():
    network = build()
    assert [unit.conv.out_channels for unit in network.encoder.levels[0][0]] == [2, 4]
    assert [unit.conv.out_channels for unit in network.encoder.levels[1][1]] == [3, 6]
    deconv = network.decoder[0].upsampling
    assert (deconv.in_channels, deconv.out_channels, deconv.bias) == (10, 10, None)
