from __future__ import annotations

import pytest
import torch

from volseg.networks import SummedLogitsUNet

IMAGE = torch.randn(1, 1, 8, 16, generator=torch.manual_seed(0))


def build(channels=(4, 6, 8), **options):
    torch.manual_seed(0)
    return SummedLogitsUNet(2, 1, 3, channels=channels, **options).eval()


def repeat(x):
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


def test_two_levels_have_one_head():
    network = build((4, 6))
    a = network.transitions[0](IMAGE)
    a = a + network.encoder[0](a)
    b = network.transitions[1](a)
    b = b + network.encoder[1](b)
    up_unit = network.decoder[0].upsampling[1]
    joined = torch.cat([up_unit(repeat(b)), a], 1)
    expected = network.heads[0](network.decoder[0].convs(joined))
    torch.testing.assert_close(network(IMAGE), expected)
    assert network.num_heads == 1


def test_logits_of_levels_are_upsampled_and_added():
    network = build((4, 6, 8, 8))
    decoded = []
    for level in network.decoder:
        level.register_forward_hook(lambda _, __, out: decoded.append(out))
    logits = network(IMAGE)
    quarter, half, full = (head(x) for head, x in zip(network.heads, decoded, strict=True))
    torch.testing.assert_close(logits, full + repeat(half + repeat(quarter)))


@pytest.mark.parametrize(
    ("depth", "num_auxiliary", "heads"),
    [(2, 2, 1), (3, 2, 2), (4, 2, 3), (5, 2, 3), (5, 9, 4), (5, 0, 1)],
)
def test_there_are_as_many_heads_as_asked_for_and_as_depth_has_room_for(
    depth, num_auxiliary, heads
):
    network = build((4,) * depth, num_auxiliary=num_auxiliary)
    assert network.num_heads == heads
    assert sum(len([*head.parameters()]) > 0 for head in network.heads) == heads


def test_without_auxiliary_heads_it_is_the_head_of_a_plain_unet():
    network = build(num_auxiliary=0)
    decoded = []
    network.decoder[-1].register_forward_hook(lambda _, __, out: decoded.append(out))
    torch.testing.assert_close(network(IMAGE), network.heads[-1](decoded[0]))


def test_training_gives_one_tensor_of_the_same_values():
    network = build()
    assert torch.equal(network.train()(IMAGE), network.eval()(IMAGE))


def test_residual_adds_no_parameter():
    residual, plain = build(), build(residual=False)
    plain.load_state_dict(residual.state_dict())
    assert not torch.allclose(plain(IMAGE), residual(IMAGE))
