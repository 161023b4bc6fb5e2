from __future__ import annotations

import json
import shutil
from pathlib import Path

from makers import make_case, make_dataset

from volseg.data.layouts import find_dataset
from volseg.demo.run import _held_out
from volseg.run_folder import DATASET_FILE, RunFolder


def test_images_with_a_label_beside_them_are_held_out_if_they_are_there(tmp_path: Path) -> None:
    folder = make_dataset(tmp_path / "set", "msd")
    make_case(folder / "imagesTs" / "there.nii.gz", folder / "labelsTs" / "there.nii.gz")
    shutil.copy(folder / "labelsTs" / "there.nii.gz", folder / "labelsTs" / "gone.nii.gz")
    description = json.loads((folder / "dataset.json").read_text())
    description["test"] = ["./imagesTs/gone.nii.gz", "./imagesTs/there.nii.gz"]
    (folder / "dataset.json").write_text(json.dumps(description))
    run = RunFolder(tmp_path / "run")
    run.path.mkdir()
    find_dataset(folder).write_json(run.path / DATASET_FILE)
    held_out = _held_out(folder, run)
    assert [case.case_id for case in held_out.cases] == ["there"]
    assert held_out.cases[0].label == folder / "labelsTs" / "there.nii.gz"
