"""Every network can learn one small patch of three classes by heart."""

from __future__ import annotations

import nibabel as nib
import numpy as np
import pytest
import torch
from makers import make_arrays

from volseg.losses import DiceCrossEntropy, MultiLevelLoss
from volseg.networks import build_network, list_networks

# The source's momentum of 0.01 forgets the first statistics too slowly for so few steps.
QUICK = ["batch", {"momentum": 0.1}]
OPTIONS = {
    "unet_keras": {"dropout": 0.0},
    "laddernet": {"dropout": 0.0},
    "hypercolumn_unet": {"dropout": 0.0, "norm": QUICK},
    # The large stem leaves too little of a patch of 16 voxels.
    "resnet_unet": {"stem": "k3s1", "depth": 18, "norm": QUICK, "decoder_norm": QUICK},
}


def compute_dice(predicted, label, value):
    a, b = predicted == value, label == value
    return float(2 * (a & b).sum() / (a.sum() + b.sum()))


def learn(name, image, label):
    """Train until the worst class is above the bar, or for 400 steps; its Dice in eval mode."""
    torch.manual_seed(0)
    network = build_network(
        name,
        spatial_dims=3,
        in_channels=1,
        out_channels=3,
        channels=(8, 12, 16),
        **OPTIONS.get(name, {}),
    )
    image = (image - image.mean()) / image.std()
    loss = MultiLevelLoss(DiceCrossEntropy())
    optimiser = torch.optim.Adam(network.parameters(), lr=0.005)
    worst = 0.0
    for step in range(1, 401):
        optimiser.zero_grad()
        loss(network.train()(image), label).backward()
        optimiser.step()
        if step % 20 == 0:
            with torch.no_grad():
                predicted = network.eval()(image).argmax(1)
            worst = min(compute_dice(predicted, label, value) for value in range(3))
            if worst > 0.95:
                break
    return worst


@pytest.mark.slow
@pytest.mark.parametrize("name", list_networks())
def test_two_balls_are_learnt(name):
    image, label = make_arrays((16, 16, 16), values=(1, 2))
    image = torch.from_numpy(image[..., 0])[None, None]
    assert learn(name, image, torch.from_numpy(label).long()[None]) > 0.95


@pytest.mark.slow
@pytest.mark.parametrize("name", list_networks())
def test_a_real_hippocampus_is_learnt(name, shared_data):
    patch = np.s_[8:24, 16:40, 8:24]
    image, label = (
        nib.load(shared_data / "hippocampus" / folder / "hippocampus_001.nii.gz").dataobj[patch]
        for folder in ("imagesTr", "labelsTr")
    )
    image = torch.from_numpy(image.astype(np.float32))[None, None]
    label = torch.from_numpy(label.astype(np.int64))[None]
    assert learn(name, image, label) > 0.95
