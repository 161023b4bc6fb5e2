"""More of a finished training: a new schedule that begins with its weights, in the same folder."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from volseg.config import TrainingConfig
from volseg.errors import ConfigError
from volseg.inference.model import count_steps
from volseg.networks.weights import load_weights
from volseg.run_folder import LAST, RunFolder
from volseg.training.engine import Learner

logger = logging.getLogger(__name__)


def check_finished(run: RunFolder, folds: Sequence[int]) -> None:
    """Refuse to extend what has not come to its end.

    Raises:
        ConfigError: a fold was not trained, or stopped before its end.
        DataError: a checkpoint is damaged.
    """
    for fold in folds:
        path = run.fold(fold) / LAST
        if not path.exists():
            raise ConfigError(
                f"{path.parent} holds no training to extend. Leave --resume out to train it."
            )
        step, end = count_steps(load_weights(path, mapped=True))
        if step < end:
            raise ConfigError(
                f"{path.parent} was stopped at step {step} of {end}; expected a finished training "
                "to extend. Go on with it by --resume alone, without a length."
            )


def warn_of_unequal(run: RunFolder, folds: Sequence[int]) -> None:
    """Say which folds were extended less often than others, as where an extension was stopped."""
    paths = {fold: run.fold(fold) / LAST for fold in folds}
    counts = {
        fold: load_weights(path, mapped=True)["counters"].get("extensions", 0)
        for fold, path in paths.items()
        if path.exists()
    }
    behind = [fold for fold, count in counts.items() if count < max(counts.values())]
    if behind:
        logger.warning(
            "fold %s of %s had fewer extensions than the others: give each the same length, by "
            "--resume --minutes or --epochs, and --fold %d",
            ", ".join(map(str, behind)),
            run.path,
            behind[0],
        )


def extend(learner: Learner, training: TrainingConfig) -> None:
    """Begin anew from the averaged weights: rate, optimiser and average as in a new training.

    Steps, time, validation cases and the best Dice go on being counted.

    Args:
        learner: of a finished training; changed in place.
        training: with the length of what is added.
    """
    counters = learner.counters
    learner.network.load_state_dict(learner.average.module.state_dict())
    learner.average.n_averaged.zero_()
    learner.optimizer.state.clear()
    if training.epochs:
        steps, minutes = training.epochs * training.steps_per_epoch, None
    else:
        minutes = float(training.minutes or 0)
        steps = int(minutes * 60 * counters.step / counters.elapsed_s)
    learner.budget.extend(counters.step, counters.elapsed_s, steps, minutes)
    # The first validations will be worse than those of a training at its end.
    counters.best_since_begin, counters.validations_since_best = -1.0, 0
    counters.is_settling = False
    counters.extensions += 1
    logger.info("extension %d begins at step %d", counters.extensions, counters.step)
