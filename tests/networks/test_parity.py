"""With the same weights every network gives what an independent transcription of its source does.

Weights are taken over in order of execution, so that calls must come in the same order too, and a
layer that a source uses twice must be used twice here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import transcriptions
from networks.execution_order import copy_weights_, eval_all_heads_, fill_, own_tensors, run
from torch import nn

from volseg.networks import build_network

WIDTHS = (4, 8, 6, 16, 12)
STRIDES = [(1, 1, 1), (2, 2, 1), (1, 2, 2), (2, 2, 2)]
KERNELS = [(3, 3, 1), (3, 3, 3), (1, 3, 5), (3, 3, 3)]


@dataclass(frozen=True)
class Case:
    """A transcription and the network that must equal it; `dims` is given to both."""

    reference: Callable[[int], nn.Module]
    name: str
    options: dict[str, Any]
    size: tuple[int, int, int] = (32, 16, 48)
    gain: float = 0.7


class Nested(nn.Module):
    """UNet++ with its outputs in the order of volseg: deepest first."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def forward(self, x):
        return self.network(x)[::-1]


class WithoutCoarsestHead(nn.Module):
    """nnU-Net without the head of the coarsest decoder level, whose loss has weight zero."""

    def __init__(self, network):
        super().__init__()
        self.network = network
        network.heads[0] = nn.Identity()

    def forward(self, x):
        return self.network(x)[:-1]


def planned(cls, deep_supervision=False, **options):
    """nnU-Net's networks need strides and kernels of `dims` axes."""

    def build(dims):
        strides, kernels = trim(dims, STRIDES), trim(dims, KERNELS)
        network = cls(
            WIDTHS[:4],
            strides,
            kernels,
            dims=dims,
            in_channels=2,
            out_channels=3,
            deep_supervision=deep_supervision,
            **options,
        )
        return WithoutCoarsestHead(network) if deep_supervision else network

    return build


def trim(dims, sizes):
    return [size[:dims] for size in sizes]


PLANNED = {"channels": WIDTHS[:4], "strides": STRIDES, "kernel_sizes": KERNELS}
RESNET = {"channels": (4, 4, 8, 6, 32)}
CASES = {
    "laddernet": Case(
        lambda dims: transcriptions.LadderNet(dims, 2, 3, layers=3, filters=4),
        "laddernet",
        {"channels": (4, 8, 16, 32)},
        gain=0.4,
    ),
    "laddernet-3-levels-of-10": Case(
        lambda dims: transcriptions.LadderNet(dims, 2, 3, layers=2, filters=10),
        "laddernet",
        {"channels": (10, 20, 40)},
        size=(12, 8, 16),
        gain=0.4,
    ),
    "unet_original": Case(
        lambda dims: transcriptions.LabmlUNet(dims, 2, 3, WIDTHS),
        "unet_original",
        {"channels": WIDTHS},
    ),
    "unet_original-cropped": Case(
        lambda dims: transcriptions.LabmlUNet(dims, 2, 3, WIDTHS),
        "unet_original",
        {"channels": WIDTHS, "align": "crop"},
        size=(37, 45, 33),
    ),
    "unet_original-valid": Case(
        lambda dims: transcriptions.RonnebergerUNet(dims, 2, 3, WIDTHS[:3]),
        "unet_original",
        {"channels": WIDTHS[:3], "align": "crop", "padding": "valid"},
        size=(45, 53, 51),
    ),
    "unet_keras": Case(
        lambda dims: transcriptions.KerasUNet(dims, 2, 3, WIDTHS, tail=False),
        "unet_keras",
        {"channels": WIDTHS},
    ),
    "unet_keras-tail": Case(
        lambda dims: transcriptions.KerasUNet(dims, 2, 3, WIDTHS[:3]),
        "unet_keras",
        {"channels": WIDTHS[:3], "penultimate": 2},
    ),
    "unet3d_original": Case(
        lambda dims: transcriptions.CicekUNet(dims, 2, 3, (4, 6, 8, 10)),
        "unet3d_original",
        {"channels": (8, 12, 16, 20)},
    ),
    "unet3d_original-valid": Case(
        lambda dims: transcriptions.CicekUNet(dims, 2, 3, (4, 6, 8), padding=0),
        "unet3d_original",
        {"channels": (8, 12, 16), "padding": "valid"},
        size=(45, 50, 47),
    ),
    "unet3d_deep_supervision": Case(
        lambda dims: transcriptions.ZengUNet(dims, 2, 3, (4, 6, 8, 10)),
        "unet3d_deep_supervision",
        {"channels": (8, 12, 16, 20)},
    ),
    "unet3d_deep_supervision-encoder": Case(
        lambda dims: transcriptions.ZengUNet(dims, 2, 3, (4, 8, 16, 20), taps="encoder"),
        "unet3d_deep_supervision",
        {"channels": (8, 16, 32, 40), "supervision": "encoder"},
    ),
    "unetplusplus-pytorch": Case(
        lambda dims: Nested(transcriptions.NestedUNet(dims, 2, 3, WIDTHS, deep_supervision=True)),
        "unetplusplus",
        {"channels": WIDTHS},
    ),
    "unetplusplus-keras": Case(
        lambda dims: Nested(
            transcriptions.NestedUNetKeras(dims, 2, 3, WIDTHS, deep_supervision=True)
        ),
        "unetplusplus",
        {"channels": WIDTHS, "form": "keras"},
    ),
    "unetplusplus-keras-one-head": Case(
        lambda dims: transcriptions.NestedUNetKeras(dims, 2, 3, WIDTHS[:4], deep_supervision=False),
        "unetplusplus",
        {"channels": WIDTHS[:4], "form": "keras", "deep_supervision": False},
    ),
    "resnet_unet": Case(
        lambda dims: transcriptions.ResNet34UNet(dims, 2, 3, RESNET["channels"]),
        "resnet_unet",
        {**RESNET, "decoder_channels": (256, 128, 64, 32, 16)},
        size=(64, 32, 64),
    ),
    "resnet_unet-identity": Case(
        lambda dims: transcriptions.ResNet34UNet(
            dims, 2, 3, RESNET["channels"], (9, 8, 7, 6, 5), variant="identity"
        ),
        "resnet_unet",
        {**RESNET, "decoder_channels": (9, 8, 7, 6, 5), "first_stage": "identity"},
        size=(64, 32, 64),
    ),
    "unet_summed_logits": Case(
        lambda dims: transcriptions.SummedLogitsUNet(dims, 2, 3, WIDTHS),
        "unet_summed_logits",
        {"channels": WIDTHS},
    ),
    "unet_summed_logits-batch-norm": Case(
        lambda dims: transcriptions.SummedLogitsUNet(
            dims, 2, 3, WIDTHS, residual=False, norm="batch"
        ),
        "unet_summed_logits",
        {"channels": WIDTHS, "residual": False, "norm": "batch"},
    ),
    "hypercolumn_unet": Case(
        lambda dims: transcriptions.HypercolumnUNet(dims, 2, 3, WIDTHS),
        "hypercolumn_unet",
        {"channels": WIDTHS},
    ),
    "dsn3d": Case(
        lambda dims: transcriptions.DeeplySupervised3d(dims, 2, 3, (8, 16, 32, 64)),
        "dsn3d",
        {"channels": (8, 16, 32, 64)},
    ),
    "unet": Case(planned(transcriptions.PlanUNet), "unet", PLANNED),
    "unet-supervised": Case(
        planned(transcriptions.PlanUNet, deep_supervision=True),
        "unet",
        {**PLANNED, "deep_supervision": True},
    ),
    "unet-residual": Case(
        planned(transcriptions.ResEncUNet, blocks=(1, 3, 4, 6)),
        "unet",
        {**PLANNED, "encoder": "residual"},
    ),
}


def build_pair(case, dims):
    options = dict(case.options)
    for key in {"strides", "kernel_sizes"} & options.keys():
        options[key] = trim(dims, options[key])
    network = build_network(case.name, spatial_dims=dims, in_channels=2, out_channels=3, **options)
    return case.reference(dims), network


def assert_near(ours, theirs):
    """Within 1e-5 of the spread."""
    for our, their in zip(ours, theirs, strict=True):
        assert our.shape == their.shape
        assert their.std() > 1e-3
        assert (our - their).abs().max() <= 1e-5 * their.std()


@pytest.mark.parametrize("dims", [2, 3])
@pytest.mark.parametrize("case", CASES)
def test_same_weights_give_the_same_output(case, dims):
    case = CASES[case]
    reference, network = build_pair(case, dims)
    image = torch.randn(2, 2, *case.size[:dims], generator=torch.manual_seed(0))
    expected = run(eval_all_heads_(reference), image)
    fill_(expected.owners, case.gain)
    copy_weights_(expected, run(eval_all_heads_(network), image))
    assert_near(run(network, image).outputs, run(reference, image).outputs)
    # In training with the same random numbers, dropout and running statistics must agree too.
    runs = []
    for model in (reference.train(), network.train()):
        torch.manual_seed(1)
        runs.append(run(model, image))
    theirs, ours = runs
    assert_near(ours.outputs, theirs.outputs)
    for their, our in zip(theirs.owners, ours.owners, strict=True):
        for name, tensor in own_tensors(their).items():
            torch.testing.assert_close(own_tensors(our)[name], tensor)
