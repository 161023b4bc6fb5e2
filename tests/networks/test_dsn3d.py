from __future__ import annotations

import torch
from torch import nn

from volseg.networks import DeeplySupervisedNet

CHANNELS = (4, 8, 16, 32)
IMAGE = torch.randn(1, 1, 16, 16, 8, generator=torch.manual_seed(0))


def build(**options):
    torch.manual_seed(0)
    return DeeplySupervisedNet(3, 1, 2, channels=CHANNELS, **options)


def test_branches_take_the_encoder_levels_between_finest_and_coarsest():
    network = build().train()
    features = []
    for level in network.encoder.levels:
        level.register_forward_hook(lambda _, __, out: features.append(out))
    outputs = network(IMAGE)
    assert len(outputs) == 3
    torch.testing.assert_close(outputs[0], network.decoder(features[3]))
    torch.testing.assert_close(outputs[1], network.branches[0](features[1]))
    torch.testing.assert_close(outputs[2], network.branches[1](features[2]))


def test_widths_are_halved_by_each_deconvolution():
    network = build()
    deconvs = [m for m in network.decoder if isinstance(m, nn.ConvTranspose3d)]
    assert [(m.in_channels, m.out_channels) for m in deconvs] == [(32, 16), (16, 8), (8, 4)]
    assert all(m.kernel_size == (4, 4, 4) and m.bias is not None for m in deconvs)
    assert all(m.bias is None for b in network.branches for m in [*b][:-1])


def test_the_first_level_has_one_convolution_and_the_others_two():
    assert [len(level[-1]) for level in build().encoder.levels] == [1, 2, 2, 2]


def test_without_supervision_there_are_no_branches_and_the_output_is_the_same():
    network, plain = build().eval(), build(deep_supervision=False).eval()
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert len(plain.branches) == 0
    assert torch.equal(plain(IMAGE), network(IMAGE))
    assert isinstance(plain.train()(IMAGE), torch.Tensor)
