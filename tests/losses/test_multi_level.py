from __future__ import annotations

import pytest
import torch
from monai.losses import DeepSupervisionLoss, DiceCELoss
from torch import nn
from torch.nn import functional

from volseg.errors import ConfigError
from volseg.losses import BinaryCrossEntropyDice, DiceCrossEntropy, MultiLevelLoss, SoftDice


class FirstLogit(nn.Module):
    """Returns the first logit, so that weights can be read from the sum."""

    def forward(self, logits, target):
        return logits.flatten()[0]


class Recorder(nn.Module):
    """Keeps what it is given."""

    def __init__(self):
        super().__init__()
        self.logits, self.targets = [], []

    def forward(self, logits, target):
        self.logits.append(logits)
        self.targets.append(target)
        return logits.sum()


def levels(*values):
    return [torch.full((1, 2, 8 >> i, 8 >> i), value) for i, value in enumerate(values)]


TARGET = torch.zeros(1, 8, 8, dtype=torch.long)


def test_halved_weights_sum_to_one():
    # 4/7, 2/7, 1/7
    loss = MultiLevelLoss(FirstLogit())
    assert loss(levels(7.0, 0.0, 0.0), TARGET).item() == pytest.approx(4)
    assert loss(levels(0.0, 7.0, 0.0), TARGET).item() == pytest.approx(2)
    assert loss(levels(0.0, 0.0, 7.0), TARGET).item() == pytest.approx(1)


def test_given_weights_are_used_as_they_are():
    loss = MultiLevelLoss(FirstLogit(), weights=[1, 10])
    assert loss(levels(2.0, 3.0), TARGET).item() == pytest.approx(32)


def test_one_tensor_and_one_level_give_the_plain_loss():
    logits = torch.randn(1, 2, 8, 8, generator=torch.manual_seed(0))
    plain = DiceCrossEntropy()(logits, TARGET)
    loss = MultiLevelLoss(DiceCrossEntropy())
    assert loss(logits, TARGET) == loss([logits], TARGET) == plain


def weights_used(loss, num_levels):
    """The weight of each output, read from a sum in which that output alone is 1."""
    return [
        loss([torch.full((1, 2, 8, 8), float(i == k)) for i in range(num_levels)], TARGET).item()
        for k in range(num_levels)
    ]


@pytest.mark.parametrize(
    ("weights", "expected"),
    [
        ("halving", [16 / 31, 8 / 31, 4 / 31, 2 / 31, 1 / 31]),
        ("exp", [1, 1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16]),
        ("two", [1, 1 / 2, 1 / 2, 1 / 2]),
        ("same", [1, 1, 1, 1]),
        ("dsn", [1, 0.2, 0.4]),
        ([3, 0, 5.5], [3, 0, 5.5]),
    ],
)
def test_weights_by_rule(weights, expected):
    num_levels = len(expected)
    assert weights_used(MultiLevelLoss(FirstLogit(), weights), num_levels) == pytest.approx(
        expected
    )
    scaled = [weight / sum(expected) for weight in expected]
    loss = MultiLevelLoss(FirstLogit(), weights, normalise=True)
    assert weights_used(loss, num_levels) == pytest.approx(scaled)


@pytest.mark.parametrize("weights", ["exp", "two", "same"])
def test_equals_monai(weights):
    generator = torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 32, 32), generator=generator)
    logits = [torch.randn(2, 3, 32 >> i, 32 >> i, generator=generator) for i in range(6)]
    dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = DeepSupervisionLoss(dice_ce, weight_mode=weights)(logits, target.float())
    loss = MultiLevelLoss(DiceCrossEntropy(), weights)(logits, target)
    torch.testing.assert_close(loss, expected)


def test_equals_monai_on_anisotropic_levels():
    generator = torch.manual_seed(0)
    target = torch.randint(0, 3, (2, 1, 8, 12, 4), generator=generator)
    sizes = [(8, 12, 4), (4, 6, 4), (2, 3, 2)]
    logits = [torch.randn(2, 3, *size, generator=generator) for size in sizes]
    dice_ce = DiceCELoss(include_background=False, to_onehot_y=True, softmax=True)
    expected = DeepSupervisionLoss(dice_ce, weight_mode="exp")(logits, target.float())
    loss = MultiLevelLoss(DiceCrossEntropy(), weights=[1, 0.5, 0.25])(logits, target)
    torch.testing.assert_close(loss, expected)


@pytest.mark.parametrize("axis", [False, True])
def test_target_of_each_level(axis):
    # A lone voxel of class 2 in the corner of the first block, class 1 in the middle of the last.
    target = torch.zeros(1, 8, 8, dtype=torch.int16)
    target[0, 0, 0], target[0, 6, 6] = 2, 1
    expected = {
        "nearest-exact": [[0, 0], [0, 1]],
        "max": [[2, 0], [0, 1]],
        "area": [
            [[15 / 16, 1], [1, 15 / 16]],
            [[0, 0], [0, 1 / 16]],
            [[1 / 16, 0], [0, 0]],
        ],
    }
    for reduce, coarse in expected.items():
        recorder = Recorder()
        loss = MultiLevelLoss(recorder, target=reduce)
        given = target[:, None] if axis else target
        loss([torch.zeros(1, 3, 8, 8), torch.zeros(1, 3, 2, 2)], given)
        assert recorder.targets[0] is given
        assert recorder.targets[1].squeeze().tolist() == coarse
        assert recorder.targets[1].is_floating_point() == (reduce == "area")


@pytest.mark.parametrize("reduce", ["nearest-exact", "area"])
def test_soft_target_is_reduced_too(reduce):
    target = torch.rand(1, 3, 4, 4, generator=torch.manual_seed(0))
    recorder = Recorder()
    MultiLevelLoss(recorder, target=reduce)(
        [torch.zeros(1, 3, 4, 4), torch.zeros(1, 3, 2, 2)], target
    )
    mean = functional.avg_pool2d(target, 2)
    expected = target[..., 1::2, 1::2] if reduce == "nearest-exact" else mean
    assert torch.equal(recorder.targets[1], expected)


@pytest.mark.parametrize(
    "base", [DiceCrossEntropy(), SoftDice(), SoftDice("sigmoid"), BinaryCrossEntropyDice()]
)
@pytest.mark.parametrize("target", ["nearest-exact", "area", "max"])
@pytest.mark.parametrize("resolution", ["native", "full"])
def test_gradient_of_every_loss_reaches_all_levels(base, target, resolution):
    logits = [level.requires_grad_() for level in levels(0.0, 0.0, 0.0)]
    labels = torch.randint(0, 2, (1, 8, 8), generator=torch.manual_seed(0))
    MultiLevelLoss(base, target=target, resolution=resolution)(logits, labels).backward()
    assert all(level.grad.abs().max() > 0 for level in logits)


@pytest.mark.parametrize("target", ["nearest-exact", "area", "max"])
def test_one_channel_of_a_sigmoid_is_class_one(target):
    # Class 1 fills whole blocks, so that all reductions agree.
    labels = torch.zeros(1, 8, 8, dtype=torch.long)
    labels[0, 4:] = 1
    logits = [torch.full((1, 1, 8 >> i, 8 >> i), -1.0) for i in range(2)]
    for level in logits:
        level[:, :, level.shape[2] // 2 :] = 2.0
    base = BinaryCrossEntropyDice(1, 0)
    loss = MultiLevelLoss(base, target=target)(logits, labels)
    torch.testing.assert_close(loss, base(logits[0], labels))


def test_full_resolution_interpolates_the_logits_by_hand():
    # Centres at 1/4 and 3/4 of each voxel, ends repeated: a, (3a + b)/4, (a + 3b)/4, b.
    level = torch.tensor([[0.0, 8.0], [16.0, 40.0]])[None, None]
    target = torch.zeros(1, 4, 4, dtype=torch.long)
    rows = [[0, 2, 6, 8], [4, 7, 13, 16], [12, 17, 27, 32], [16, 22, 34, 40]]
    recorder = Recorder()
    MultiLevelLoss(recorder, resolution="full")([torch.ones(1, 1, 4, 4), level], target)
    assert recorder.logits[1].tolist() == [[rows]]
    assert recorder.targets[1] is target


def test_full_resolution_of_three_axes_needs_no_divisor():
    recorder = Recorder()
    loss = MultiLevelLoss(recorder, resolution="full")
    main, ramp = torch.zeros(1, 2, 4, 5, 6), torch.arange(3.0).expand(1, 2, 2, 2, 3)
    loss([main, ramp], torch.zeros(1, 4, 5, 6, dtype=torch.long))
    assert recorder.logits[0] is main
    ramp_seen = recorder.logits[1][0, 0, 0, 0]
    torch.testing.assert_close(ramp_seen, torch.tensor([0, 0.25, 0.75, 1.25, 1.75, 2]))


def test_outputs_at_full_resolution_are_compared_as_they_are():
    logits = list(torch.randn(3, 1, 2, 8, 8, generator=torch.manual_seed(0)))
    main, fine, coarse = (DiceCrossEntropy()(output, TARGET) for output in logits)
    for target in ("nearest-exact", "area", "max"):
        loss = MultiLevelLoss(DiceCrossEntropy(), "dsn", target=target)(logits, TARGET)
        torch.testing.assert_close(loss, main + 0.2 * fine + 0.4 * coarse)


def test_decay_fades_all_weights_but_the_first():
    loss = MultiLevelLoss(FirstLogit(), "dsn", decay=0.25)
    assert loss.progress == 0
    assert weights_used(loss, 3) == pytest.approx([1, 0.2, 0.4])
    loss.progress = 0.5
    assert weights_used(loss, 3) == pytest.approx([1, 0.1, 0.2])
    loss.progress = 1.0
    assert weights_used(loss, 3) == pytest.approx([1, 0.05, 0.1])


def test_five_percent_every_ten_epochs():
    loss = MultiLevelLoss(FirstLogit(), "same", decay=0.95 ** (300 / 10))
    loss.progress = 20 / 300
    assert weights_used(loss, 2) == pytest.approx([1, 0.95 * 0.95])


def test_weights_are_normalised_for_the_start_of_the_training():
    loss = MultiLevelLoss(FirstLogit(), [3, 1], decay=0.5, normalise=True)
    loss.progress = 1.0
    assert weights_used(loss, 2) == pytest.approx([0.75, 0.125])


def test_level_that_does_not_divide_the_target_is_refused():
    logits = [torch.zeros(1, 2, 8, 8), torch.zeros(1, 2, 3, 4)]
    with pytest.raises(ConfigError, match=r"size \(3, 4\); expected a divisor of \(8, 8\)"):
        MultiLevelLoss(DiceCrossEntropy())(logits, TARGET)


@pytest.mark.parametrize("weights", [[1.0], [1.0, 0.5, 0.25]])
def test_another_number_of_weights_is_refused(weights):
    with pytest.raises(ConfigError, match="expected one weight per output"):
        MultiLevelLoss(FirstLogit(), weights)(levels(1.0, 1.0), TARGET)


def test_no_level_is_refused():
    with pytest.raises(ConfigError, match="for 0 outputs in training"):
        MultiLevelLoss(FirstLogit())([], TARGET)


@pytest.mark.parametrize("num_levels", [1, 2, 4])
def test_dsn_is_for_three_outputs(num_levels):
    with pytest.raises(ConfigError, match=rf"3 weights \(dsn\) for {num_levels} outputs"):
        MultiLevelLoss(FirstLogit(), "dsn")(levels(*[1.0] * num_levels), TARGET)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weights": "linear"}, "weights 'linear'; expected one of halving, exp"),
        ({"weights": [1, -0.5]}, r"weights \[1, -0.5\]; expected at least 0"),
        ({"weights": [0, 0]}, r"weights \[0, 0\]; expected at least 0, and one of them above"),
        ({"weights": []}, r"weights \[\]; expected at least 0, and one of them above"),
        ({"target": "min"}, "target 'min'; expected one of nearest-exact, area, max"),
        ({"resolution": "half"}, "resolution 'half'; expected one of native, full"),
        ({"decay": 0}, "decay 0; expected above 0 and at most 1"),
        ({"decay": 1.1}, "decay 1.1; expected above 0 and at most 1"),
    ],
)
def test_wrong_option_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        MultiLevelLoss(FirstLogit(), **options)


def test_max_of_a_soft_target_is_refused():
    logits = [torch.zeros(1, 2, 4, 4), torch.zeros(1, 2, 2, 2)]
    with pytest.raises(ConfigError, match=r"'max' of torch\.float32; expected integer"):
        MultiLevelLoss(FirstLogit(), target="max")(logits, torch.zeros(1, 2, 4, 4))
