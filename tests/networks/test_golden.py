"""Published sizes: number of parameters, of layers, of their calls, and what comes out.

The values are checksums of independent transcriptions of the sources, computed once with weights
from `execution_order.fill_`. Outputs there carry the source's own activation.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from networks.execution_order import eval_all_heads_, fill_, run

from volseg.networks import build_network

ACTIVATIONS = {
    "none": torch.nn.Identity(),
    "sigmoid": torch.nn.Sigmoid(),
    "log_softmax": torch.nn.LogSoftmax(dim=1),
}


@dataclass(frozen=True)
class Golden:
    """`outputs`: mean, deviation, first three values, the middle one and the last, per output."""

    name: str
    channels: tuple[int, int]
    parameters: int
    owners: int
    calls: int
    size: tuple[int, ...]
    outputs: list[tuple[float, ...]]
    options: dict[str, Any] = field(default_factory=dict)
    activation: str = "none"
    gain: float = 1.0


GOLDEN = {
    "laddernet-2d": Golden(
        name="laddernet",
        channels=(3, 2),
        parameters=879_698,
        owners=29,
        calls=44,  # 15 blocks run their convolution twice.
        size=(48, 48),
        activation="log_softmax",
        gain=0.4,
        outputs=[
            (-0.844788, 0.590461, -0.416193, -0.255218, -0.351231, -1.077496, -1.363254),
        ],
    ),
    "laddernet-3d": Golden(
        name="laddernet",
        options={"channels": (4, 8, 16)},
        channels=(1, 2),
        parameters=40_454,
        owners=21,
        calls=32,
        size=(16, 16, 16),
        activation="log_softmax",
        gain=0.4,
        outputs=[
            (-0.769382, 0.448038, -0.690313, -0.873658, -0.798711, -0.695989, -0.644389),
        ],
    ),
    "unet_original-2d": Golden(
        name="unet_original",
        channels=(3, 1),
        parameters=31_031_745,
        owners=23,
        calls=23,
        size=(64, 64),
        outputs=[
            (-3.159239, 2.235273, -0.943075, -0.999508, -2.041458, -0.080412, -0.287134),
        ],
    ),
    "unet_original-3d": Golden(
        name="unet_original",
        options={"channels": (4, 8, 16, 32, 64)},
        channels=(1, 2),
        parameters=353_218,
        owners=23,
        calls=23,
        size=(32, 32, 32),
        outputs=[
            (0.549783, 1.040932, 0.174374, 0.147717, 0.006593, -0.06856, 0.010632),
        ],
    ),
    "unet_keras-2d": Golden(
        name="unet_keras",
        options={"penultimate": 2},
        channels=(1, 1),
        parameters=31_031_685,
        owners=24,
        calls=24,
        size=(64, 64),
        activation="sigmoid",
        outputs=[
            (0.616255, 0.119776, 0.696113, 0.774809, 0.767551, 0.786252, 0.500185),
        ],
    ),
    "unetplusplus-pytorch-2d": Golden(
        name="unetplusplus",
        channels=(3, 3),
        parameters=47_195_340,
        owners=78,
        calls=78,
        size=(64, 64),
        outputs=[  # The source gives the shallowest first.
            (0.581608, 0.992054, -0.153025, -0.025055, 0.111445, -0.54919, 0.147392),
            (0.38399, 0.713957, 0.112034, 0.951797, 1.154201, 0.593961, 0.67153),
            (-0.640037, 1.654245, -0.867412, -1.271333, -1.292794, 0.089318, -0.246739),
            (1.188445, 0.767324, -0.041867, 0.568882, 0.819656, 0.162542, 0.711618),
        ],
    ),
    "unetplusplus-keras-2d": Golden(
        name="unetplusplus",
        options={"form": "keras"},
        channels=(1, 2),
        parameters=9_041_832,
        owners=44,
        calls=44,
        size=(64, 64),
        activation="sigmoid",
        outputs=[
            (0.881838, 0.1537, 0.592158, 0.550356, 0.489459, 0.511862, 0.57759),
            (0.49415, 0.233994, 0.720956, 0.790687, 0.833717, 0.442372, 0.517499),
            (0.362961, 0.373406, 0.255081, 0.200276, 0.071946, 0.768279, 0.287396),
            (0.255593, 0.182084, 0.807031, 0.801217, 0.638791, 0.468465, 0.487037),
        ],
    ),
    "resnet_unet-2d": Golden(
        name="resnet_unet",
        channels=(3, 1),
        parameters=24_438_804,
        owners=94,
        calls=94,
        size=(64, 64),
        activation="sigmoid",
        outputs=[
            (0.072459, 0.138858, 0.508399, 0.481543, 0.208458, 0.504952, 0.154251),
        ],
    ),
    "unet_summed_logits-3d": Golden(
        name="unet_summed_logits",
        channels=(4, 4),
        parameters=8_269_676,
        owners=57,
        calls=57,
        size=(32, 32, 32),
        outputs=[
            (-0.13814, 1.589292, 0.811918, 0.485814, 0.818088, -0.886458, 1.70043),
        ],
    ),
    "hypercolumn_unet-2d": Golden(
        name="hypercolumn_unet",
        channels=(1, 1),
        parameters=5_147_073,
        owners=96,
        calls=96,
        size=(64, 64),
        activation="sigmoid",
        gain=0.8,
        outputs=[
            (0.454581, 0.103345, 0.381606, 0.370043, 0.365553, 0.324211, 0.304738),
        ],
    ),
}


def summarise(output):
    values = output.double().flatten()
    picked = [*values[:3], values[len(values) // 2], values[-1]]
    return [float(value) for value in (values.mean(), values.std(), *picked)]


@pytest.mark.parametrize("case", GOLDEN)
def test_numbers_of_the_source(case):
    golden = GOLDEN[case]
    network = build_network(
        golden.name,
        spatial_dims=len(golden.size),
        in_channels=golden.channels[0],
        out_channels=golden.channels[1],
        **golden.options,
    )
    assert sum(parameter.numel() for parameter in network.parameters()) == golden.parameters
    image = torch.randn(1, golden.channels[0], *golden.size, generator=torch.manual_seed(0))
    eval_all_heads_(network)
    first = run(network, image)
    assert (len(first.owners), len(first.calls)) == (golden.owners, golden.calls)
    fill_(first.owners, golden.gain)
    activation = ACTIVATIONS[golden.activation]
    summaries = [summarise(activation(output)) for output in run(network, image).outputs]
    assert summaries == [pytest.approx(output, abs=1e-4) for output in golden.outputs]
