from __future__ import annotations

import pytest
from makers import make_case

from volseg.data.layouts import find_dataset
from volseg.errors import DataError

OLD = ("_t1", "_t1ce", "_t2", "_flair")
NEW = ("-t1n", "-t1c", "-t2w", "-t2f")


def write_case(folder, suffixes=OLD, label="_seg", ending=".nii.gz", values=(1, 2)):
    images = [folder / f"{folder.name}{suffix}{ending}" for suffix in suffixes]
    label_file = folder / f"{folder.name}{label}{ending}" if label else None
    make_case(images, label_file, shape=(12, 8, 8), values=values)


def name_of_value(classes, value):
    return classes.names[classes.values.index(value)]


@pytest.mark.parametrize(
    ("case_id", "suffixes", "layout", "names", "values"),
    [
        ("Brats18_2013_10_1", OLD, "BraTS 2018", ("NCR_NET", "ED", "ET"), (1, 2, 4)),
        ("BraTS19_CBICA_AAB_1", OLD, "BraTS 2019", ("NCR_NET", "ED", "ET"), (1, 2, 4)),
        ("BraTS20_Training_001", OLD, "BraTS 2020", ("NCR_NET", "ED", "ET"), (1, 2, 4)),
        ("BraTS2021_00000", OLD, "BraTS 2021", ("NCR", "ED", "ET"), (1, 2, 4)),
        ("BraTS-GLI-00005-001", NEW, "BraTS 2023 GLI", ("NCR", "ED", "ET"), (1, 2, 3)),
        ("BraTS-MEN-00004-000", NEW, "BraTS 2023 MEN", ("NCR", "ED", "ET"), (1, 2, 3)),
        ("BraTS-MET-00001-000", NEW, "BraTS 2023 MET", ("NCR", "ED", "ET"), (1, 2, 3)),
        ("BraTS-SSA-00002-000", NEW, "BraTS 2023 SSA", ("NCR", "ED", "ET"), (1, 2, 3)),
        ("BraTS-PED-00001-000", NEW, "BraTS 2023 PED", ("NC", "ED", "ET"), (1, 2, 3)),
        ("BraTS-GoAT-02610", NEW, "BraTS 2024 GoAT", ("NCR", "ED", "ET"), (1, 2, 3)),
    ],
)
def test_edition_follows_from_the_folder_name(tmp_path, case_id, suffixes, layout, names, values):
    write_case(tmp_path / case_id, suffixes, suffixes[0][0] + "seg")
    dataset = find_dataset(tmp_path)
    assert dataset.layout == layout
    assert dataset.channels == ("T1", "T1c", "T2", "FLAIR")
    assert dataset.classes.names == ("background", *names)
    assert dataset.classes.values == (0, *values)
    assert [path.name for path in dataset.cases[0].images] == [
        f"{case_id}{suffix}.nii.gz" for suffix in suffixes
    ]


@pytest.mark.parametrize(
    ("case_id", "values", "regions"),
    [
        ("BraTS2021_00000", (1, 4), {"WT": (1, 2, 4), "TC": (1, 4), "ET": (4,)}),
        ("BraTS-GLI-00005-001", (1, 2), {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,)}),
        (
            "BraTS-GLI-00005-100",
            (1, 4),
            {"WT": (1, 2, 3), "TC": (1, 3), "ET": (3,), "RC": (4,)},
        ),
        (
            "BraTS-PED-00001-000",
            (1, 4),
            {"WT": (1, 2, 3, 4), "TC": (1, 2, 3), "ET": (1,), "CC": (3,)},
        ),
    ],
)
def test_regions_are_those_of_the_edition(tmp_path, case_id, values, regions):
    is_old = case_id.startswith("BraTS2021")
    label = "_seg" if is_old else "-seg"
    write_case(tmp_path / case_id, OLD if is_old else NEW, label, values=values)
    classes = find_dataset(tmp_path).classes
    short = {"whole tumour": "WT", "tumour core": "TC"}
    found = {short.get(region.name, region.name): region.values for region in classes.regions}
    assert found == regions
    assert classes.find_merged() == []


def test_value_4_is_the_resection_cavity_in_treated_gliomas(tmp_path):
    write_case(tmp_path / "BraTS-GLI-00005-100", NEW, "-seg")
    dataset = find_dataset(tmp_path)
    assert dataset.layout == "BraTS 2024 GLI"
    assert name_of_value(dataset.classes, 4) == "RC"


def test_value_4_is_enhancing_tumour_until_2021(tmp_path):
    write_case(tmp_path / "BraTS2021_00000")
    classes = find_dataset(tmp_path).classes
    assert name_of_value(classes, 4) == "ET"


@pytest.mark.parametrize(
    ("task", "layout", "names"),
    [
        ("PED", "BraTS 2024 PED", ("background", "ET", "NET", "CC", "ED")),
        ("MET", "BraTS 2025 MET", ("background", "NETC", "SNFH", "ET", "RC")),
    ],
)
def test_value_4_tells_editions_with_equal_names_apart(tmp_path, task, layout, names):
    write_case(tmp_path / f"BraTS-{task}-00001-000", NEW, "-seg", values=(1, 2))
    write_case(tmp_path / f"BraTS-{task}-00002-000", NEW, "-seg", values=(1, 4))
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.classes.names) == (layout, names)


def test_radiotherapy_meningioma_has_one_channel(tmp_path):
    write_case(tmp_path / "BraTS-MEN-RT-0004-1", ("_t1c",), "_gtv")
    dataset = find_dataset(tmp_path)
    assert (dataset.layout, dataset.channels) == ("BraTS 2024 MEN-RT", ("T1c",))
    assert dataset.classes.names == ("background", "GTV")
    assert dataset.cases[0].patient_id == "BraTS-MEN-RT-0004"


def test_grades_of_2018_are_one_dataset(tmp_path):
    write_case(tmp_path / "HGG" / "Brats18_CBICA_AAB_1")
    write_case(tmp_path / "LGG" / "Brats18_2013_0_1")
    ids = [case.case_id for case in find_dataset(tmp_path).cases]
    assert ids == ["Brats18_2013_0_1", "Brats18_CBICA_AAB_1"]


def test_irregular_label_of_2020_is_found(tmp_path, caplog):
    folder = tmp_path / "BraTS20_Training_355"
    write_case(folder, ending=".nii")
    (folder / "BraTS20_Training_355_seg.nii").rename(folder / "W39_1998.09.19_Segm.nii")
    (case,) = find_dataset(tmp_path).cases
    assert case.label == folder / "W39_1998.09.19_Segm.nii"
    assert "W39_1998.09.19_Segm.nii is taken as its label" in caplog.text


def test_time_points_share_their_patient(tmp_path):
    for time_point in (100, 101):
        write_case(tmp_path / f"BraTS-GLI-00005-{time_point}", NEW, "-seg")
    first, second = find_dataset(tmp_path).cases
    assert first.case_id != second.case_id
    assert first.patient_id == second.patient_id == "BraTS-GLI-00005"


def test_validation_cases_are_unlabelled(tmp_path):
    write_case(tmp_path / "BraTS20_Training_001")
    write_case(tmp_path / "BraTS20_Validation_001", label="")
    dataset = find_dataset(tmp_path)
    assert [case.case_id for case in dataset.unlabelled] == ["BraTS20_Validation_001"]


def test_mixed_editions_are_refused(tmp_path):
    write_case(tmp_path / "BraTS-GLI-00005-000", NEW, "-seg")
    write_case(tmp_path / "BraTS-GLI-00006-100", NEW, "-seg")
    message = r"mixes BraTS 2023 GLI \(.*-000\) and BraTS 2024 GLI \(.*-100\); expected one edition"
    with pytest.raises(DataError, match=message):
        find_dataset(tmp_path)


def test_missing_modality_names_case_channel_and_file(tmp_path):
    write_case(tmp_path / "BraTS2021_00000")
    (tmp_path / "BraTS2021_00000" / "BraTS2021_00000_t1ce.nii.gz").unlink()
    message = r"case 'BraTS2021_00000' has no T1c image; expected .*BraTS2021_00000_t1ce.nii.gz"
    with pytest.raises(DataError, match=message):
        find_dataset(tmp_path)
