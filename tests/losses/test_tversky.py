from __future__ import annotations

import numpy as np
import pytest
import torch

from volseg.errors import ConfigError
from volseg.losses import RegionLoss, SoftDice, Tversky, build_loss

SHAPES = [(2, 3, 5, 4), (2, 3, 4, 3, 5)]


def draw(shape):
    generator = torch.manual_seed(0)
    logits = 2 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits, torch.randint(0, shape[1], (shape[0], 1, *shape[2:]), generator=generator)


def by_numpy(p, t, alpha, beta, gamma):
    axes = tuple(range(2, p.ndim))
    tp, fp, fn = ((a * b).sum(axes) for a, b in ((p, t), (p, 1 - t), (1 - p, t)))
    return np.mean((1 - tp / (tp + alpha * fp + beta * fn)) ** (1 / gamma))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    ("alpha", "beta", "gamma"), [(0.3, 0.7, 1), (0.9, 0.2, 4 / 3), (0.5, 0.5, 3)]
)
def test_value_by_numpy(shape, alpha, beta, gamma):
    logits, target = draw(shape)
    t = np.stack([target.numpy()[:, 0] == c for c in range(3)], 1).astype(float)
    options = {"alpha": alpha, "beta": beta, "gamma": gamma, "smooth": 1e-9}
    e = np.exp(logits.numpy())
    p = (e / e.sum(1, keepdims=True))[:, 1:]
    ours = Tversky(**options)(logits, target).item()
    assert ours == pytest.approx(by_numpy(p, t[:, 1:], alpha, beta, gamma), rel=1e-6)
    p = 1 / (1 + np.exp(-logits.numpy()))
    ours = Tversky("sigmoid", **options)(logits, torch.from_numpy(t)).item()
    assert ours == pytest.approx(by_numpy(p, t, alpha, beta, gamma), rel=1e-6)


def test_equal_weights_of_a_half_are_dice():
    logits, target = draw(SHAPES[0])
    tversky = Tversky(alpha=0.5, beta=0.5, smooth=1e-5)(logits, target)
    assert tversky.item() == pytest.approx(SoftDice(smooth=2e-5)(logits, target).item(), rel=1e-6)


def test_missed_voxels_cost_more_than_false_ones():
    target = torch.tensor([[[0, 0, 1, 1, 1, 1]]])
    missed, false = target.clone(), target.clone()
    missed[..., 2], false[..., 1] = 0, 1
    loss = Tversky()
    values = [loss(100.0 * torch.cat([1 - x, x], 1), target).item() for x in (missed, false)]
    # Index 3 / (3 + 0.7) and 4 / (4 + 0.3).
    assert values == pytest.approx([0.7 / 3.7, 0.3 / 4.3], abs=1e-5)


@pytest.mark.parametrize("activation", ["softmax", "sigmoid"])
@pytest.mark.parametrize("size", [0.0, 1.0, 200.0])
@pytest.mark.parametrize("gamma", [1, 4 / 3])
def test_gradient_is_finite_for_absent_classes_and_certain_predictions(activation, size, gamma):
    logits = torch.full((1, 3, 4, 4), -size)
    logits[:, 0] = size
    logits.requires_grad_()
    loss = Tversky(activation, gamma=gamma)(logits, torch.zeros(1, 1, 4, 4, dtype=torch.long))
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(logits.grad).all()


def test_focal_form_by_its_name():
    logits, target = draw(SHAPES[0])
    named = build_loss("focal_tversky", "softmax", alpha=0.4)
    assert named(logits, target) == Tversky(alpha=0.4, gamma=4 / 3)(logits, target)
    assert build_loss("focal_tversky", "sigmoid", gamma=2).gamma == 2
    assert build_loss("tversky", "sigmoid").activation == "sigmoid"
    with pytest.raises(ConfigError, match="with softmax"):
        RegionLoss(build_loss("tversky", "softmax"), [[1]])


@pytest.mark.parametrize(
    "options",
    [{"gamma": 0.9}, {"alpha": -1}, {"alpha": 0, "beta": 0}, {"smooth": 0}, {"activation": "x"}],
)
def test_wrong_option_is_refused(options):
    with pytest.raises(ConfigError, match="expected"):
        Tversky(**options)
