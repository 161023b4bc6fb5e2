from __future__ import annotations

import pytest
import torch

from volseg.errors import ConfigError
from volseg.networks import UNetPlusPlus
from volseg.networks.unetplusplus import average_logits

IMAGE = torch.randn(2, 1, 16, 32, generator=torch.manual_seed(0))


def build(**options):
    torch.manual_seed(0)
    network = UNetPlusPlus(2, 1, 3, channels=(4, 6, 8, 10), **options)
    with torch.no_grad():
        network.train()(IMAGE)  # So that running statistics are not those of a new network.
    return network.eval()


def all_heads(network):
    """Logits in eval mode of heads 1, 2, 3."""
    network.eval()
    network.training = True
    outputs = network(IMAGE)[::-1]
    network.eval()
    return outputs


@pytest.mark.parametrize("form", ["pytorch", "keras"])
def test_eval_gives_the_chosen_head_or_the_mean(form):
    network = build(form=form)
    heads = all_heads(network)
    expected = {1: heads[0], 2: heads[1], 3: heads[2], "last": heads[2], "mean": sum(heads) / 3}
    for choice, logits in expected.items():
        other = build(form=form, eval_output=choice)
        other.load_state_dict(network.state_dict())
        torch.testing.assert_close(other(IMAGE), logits)


@pytest.mark.parametrize(
    ("mean_of", "activate"), [("softmax", lambda x: x.softmax(1)), ("sigmoid", torch.sigmoid)]
)
def test_mean_of_probabilities(mean_of, activate):
    network = build()
    other = build(eval_output="mean", mean_of=mean_of)
    other.load_state_dict(network.state_dict())
    expected = sum(activate(logits) for logits in all_heads(network)) / 3
    torch.testing.assert_close(activate(other(IMAGE)), expected)
    assert not torch.allclose(activate(sum(all_heads(network)) / 3), expected, atol=1e-3)


def test_mean_of_probabilities_is_finite_where_a_probability_is_0_in_float32():
    logits = torch.tensor([200.0, -200.0]).reshape(1, 1, 2, 1).expand(2, 1, 2, 1)
    torch.testing.assert_close(average_logits(logits, "sigmoid"), logits[0])
    softmax = average_logits(logits, "softmax")
    torch.testing.assert_close(softmax[:, :1] - softmax[:, 1:], torch.full((1, 1, 1), 400.0))


@pytest.mark.parametrize("form", ["pytorch", "keras"])
@pytest.mark.parametrize("level", [1, 2, 3])
def test_pruned_network_gives_the_output_of_its_head(form, level):
    network = build(form=form, eval_output="mean", dropout=0.25)
    pruned = network.prune(level)
    assert torch.equal(pruned(IMAGE), all_heads(network)[level - 1])
    assert pruned.divisor == (2**level, 2**level)
    assert isinstance(pruned.train()(IMAGE), torch.Tensor)


def test_pruned_network_is_a_copy_in_the_same_mode():
    network = build()
    before = network(IMAGE)
    pruned = network.prune(2)
    assert not pruned.training
    for parameter in pruned.parameters():
        torch.nn.init.zeros_(parameter)
    assert torch.equal(network(IMAGE), before)
    assert network.train().prune(2).training


def test_pruned_network_keeps_strides_and_kernels():
    strides, kernels = (1, (2, 1), (1, 2), 2), (3, (3, 1), (1, 3), 3)
    network = build(strides=strides, kernel_sizes=kernels)
    pruned = network.prune(2)
    assert pruned.divisor == (2, 2)
    assert torch.equal(pruned(IMAGE), all_heads(network)[1])


def test_a_missing_head_cannot_be_pruned_to():
    with pytest.raises(ConfigError, match=r"level 4; expected a head of this network: \[1, 2, 3\]"):
        build().prune(4)
    with pytest.raises(ConfigError, match=r"level 1; .*\[3\]. Train with deep_supervision=True"):
        build(deep_supervision=False).prune(1)


def test_nodes_beyond_the_chosen_head_do_not_run_in_eval():
    network = build(eval_output=1)
    ran = []
    for key, node in network.nodes.items():
        node.register_forward_hook(lambda *_, key=key: ran.append(key))
    network(IMAGE)
    assert sorted(ran) == ["0_0", "0_1", "1_0"]


def test_node_takes_its_whole_row_and_the_node_below():
    network = build()
    # X(0, 3): upsampled X(1, 2) and X(0, 0), X(0, 1), X(0, 2), 4 channels each.
    node = network.nodes["0_3"]
    assert (node.source, node.row) == ("1_2", ["0_0", "0_1", "0_2"])
    assert node.convs[0].conv.in_channels == 16


def test_without_supervision_there_is_one_head():
    network, plain = build(), build(deep_supervision=False)
    assert list(plain.heads) == ["0_3"]
    assert plain.supervision_strides == ((1, 1),)
    state = network.state_dict()
    plain.load_state_dict({name: state[name] for name in plain.state_dict()})
    assert torch.equal(plain(IMAGE), network(IMAGE))


def test_pruned_network_keeps_the_type_of_its_weights():
    network = UNetPlusPlus(2, 1, 2, channels=(4, 8, 8)).double()
    assert next(network.prune(1).parameters()).dtype == torch.float64
