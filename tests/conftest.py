"""Fixtures that every test may use."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from known_speed import know_speed
from makers import make_dataset


@pytest.fixture(scope="session", autouse=True)
def _known_speed() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        know_speed(patch)
        yield


@pytest.fixture(scope="session", autouse=True)
def _own_memory(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What is measured of networks in tests is not remembered for the user's own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder with real images beside the checkout; tests that need it are skipped without it."""
    folder = Path(__file__).resolve().parents[2] / "shared" / "data"
    if not folder.is_dir():
        pytest.skip(f"needs the real images in {folder}")
    return folder


TINY = [
    "plan.width=4",
    "plan.patch=[16, 16, 16]",
    "plan.num_levels=3",
    "training.steps_per_epoch=6",
]
"""A training that runs in seconds."""


@pytest.fixture(scope="session")
def balls(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five labelled cases of two balls, MSD layout, anisotropic and oblique, labels 3 and 7."""
    folder = tmp_path_factory.mktemp("data") / "balls"
    return make_dataset(
        folder,
        "msd",
        num_cases=5,
        shape=(20, 18, 14),
        values=(3, 7),
        spacing_mm=(1.0, 1.2, 1.6),
        oblique=True,
    )


@pytest.fixture(scope="session")
def run(balls: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run folder of a short training on `balls`; not to be changed."""
    import volseg
    from volseg.config import load_config

    folder = tmp_path_factory.mktemp("runs") / "balls"
    return volseg.train(balls, folder, config=load_config(None, TINY), epochs=10, device="cpu")
