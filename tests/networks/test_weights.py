from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch

from volseg.errors import DataError
from volseg.networks.weights import load_weights, save_weights

STATE = {"network": {"weight": torch.arange(6.0)}, "step": 3, "losses": [0.5], "name": "unet"}


@pytest.fixture
def checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    save_weights(path, STATE)
    return path


def sidecar(path):
    return path.with_name(f"{path.name}.sha256")


def write_with_hash(path, data):
    path.write_bytes(data)
    sidecar(path).write_text(hashlib.sha256(data).hexdigest())


@pytest.mark.parametrize("mapped", [False, True])
def test_state_survives(checkpoint, mapped):
    state = load_weights(checkpoint, mapped=mapped)
    assert torch.equal(state["network"]["weight"], torch.arange(6.0))
    assert {key: state[key] for key in ("step", "losses", "name")} == {
        "step": 3,
        "losses": [0.5],
        "name": "unet",
    }


def test_no_other_file_is_left(checkpoint):
    names = sorted(path.name for path in checkpoint.parent.iterdir())
    assert names == ["checkpoint.pt", "checkpoint.pt.sha256"]


def test_sidecar_lists_the_new_and_the_previous_hash(checkpoint):
    first = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    for step in (4, 5):
        previous = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        save_weights(checkpoint, {"step": step})
    new = hashlib.sha256(checkpoint.read_bytes()).hexdigest()
    assert sidecar(checkpoint).read_text().split() == [new, previous]
    assert first not in (new, previous)


def test_any_single_flipped_bit_is_refused(checkpoint):
    data = bytearray(checkpoint.read_bytes())
    data[len(data) // 2] ^= 1
    checkpoint.write_bytes(data)
    with pytest.raises(DataError, match=r"checkpoint\.pt does not match checkpoint\.pt\.sha256"):
        load_weights(checkpoint)


@pytest.mark.parametrize("kept", [0, 100])
def test_truncated_file_is_refused(checkpoint, kept):
    checkpoint.write_bytes(checkpoint.read_bytes()[:kept])
    with pytest.raises(DataError, match="does not match"):
        load_weights(checkpoint)


def test_missing_checkpoint_or_sidecar_is_refused(checkpoint):
    with pytest.raises(DataError, match=r"other\.pt does not exist"):
        load_weights(checkpoint.with_name("other.pt"))
    sidecar(checkpoint).unlink()
    with pytest.raises(DataError, match="missing or damaged"):
        load_weights(checkpoint)


class Malicious:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return Path.touch, (self.marker,)


def test_pickle_with_code_is_refused_and_not_executed(tmp_path):
    path, marker = tmp_path / "checkpoint.pt", tmp_path / "executed"
    torch.save({"network": Malicious(marker)}, path)
    write_with_hash(path, path.read_bytes())
    with pytest.raises(DataError, match="holds more than plain data") as error:
        load_weights(path)
    assert "\n" not in str(error.value)
    assert not marker.exists()


@pytest.mark.parametrize("data", [b"", b"text", b"PK\x03\x04broken"])
def test_other_file_with_the_right_hash_is_refused_in_one_line(tmp_path, data):
    path = tmp_path / "checkpoint.pt"
    write_with_hash(path, data)
    with pytest.raises(DataError, match=r"checkpoint\.pt (cannot be loaded: |holds)") as error:
        load_weights(path)
    assert "\n" not in str(error.value)


def test_bare_tensor_is_refused(tmp_path):
    path = tmp_path / "checkpoint.pt"
    torch.save(torch.zeros(1), path)
    write_with_hash(path, path.read_bytes())
    with pytest.raises(DataError, match="holds a Tensor; expected a checkpoint"):
        load_weights(path)


def test_state_that_could_not_be_loaded_is_not_saved(checkpoint):
    with pytest.raises(TypeError, match="more than tensors, numbers and text"):
        save_weights(checkpoint, {"folder": Path("run")})
    assert load_weights(checkpoint)["step"] == 3


@pytest.mark.parametrize("kills", [1, 3])
def test_checkpoint_stays_usable_if_killed_between_the_two_files(checkpoint, monkeypatch, kills):
    replace = os.replace

    def replace_sidecar_only(source, target):
        if str(target).endswith(".pt"):
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_sidecar_only)
        for step in range(4, 4 + kills):
            with pytest.raises(KeyboardInterrupt):
                save_weights(checkpoint, {"step": step})
    assert load_weights(checkpoint)["step"] == 3
    save_weights(checkpoint, {"step": 9})
    assert load_weights(checkpoint)["step"] == 9


def test_damaged_checkpoint_is_not_vouched_for_by_the_next_save(checkpoint):
    checkpoint.write_bytes(b"damaged")
    damaged = hashlib.sha256(b"damaged").hexdigest()
    save_weights(checkpoint, STATE)
    assert damaged not in sidecar(checkpoint).read_text()
