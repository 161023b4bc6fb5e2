"""NIfTI in and out, against nibabel and hand-made files."""

from __future__ import annotations

import gzip
import itertools
import logging
import zlib

import nibabel as nib
import numpy as np
import pytest

from volseg.errors import DataError, MachineError
from volseg.geometry import Geometry
from volseg.images import (
    from_nibabel,
    read_header,
    read_image,
    read_labels,
    write_image,
    write_labels,
)

READ_OK_NIFTI = [
    *("big_endian_float.nii.gz", "big_endian_int16.nii"),
    *("big_endian_int16_label_qform_only.nii.gz", "nifti2_4d.nii.gz"),
    *("nifti2_header_or_extension.nii.gz", "no_qform_no_sform.nii.gz", "oblique_flair.nii.gz"),
    *("oblique_flair_label.nii.gz", "sheared_affine.nii.gz", "tiny_4x5x7.nii.gz"),
    *("trailing_singleton_axis.nii.gz", "two_channel_4d.nii.gz", "two_dimensional.nii"),
]
CODES = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]


def _save(path, array, affine=None, header_type=nib.Nifti1Image):
    nib.save(header_type(array, np.eye(4) if affine is None else affine), path)
    return path


def _flip_bit(path, position):
    content = bytearray(path.read_bytes())
    content[position] ^= 4
    path.write_bytes(content)


def _set_field(path, offset, value):
    content = bytearray(path.read_bytes())
    content[offset : offset + value.nbytes] = value.tobytes()
    path.write_bytes(content)


@pytest.mark.parametrize("name", READ_OK_NIFTI)
def test_voxels_and_affine_are_those_of_nibabel(shared_data, name):
    path = shared_data / "tricky" / "read_ok" / name
    expected = nib.load(path)
    voxels = np.asanyarray(expected.dataobj)
    voxels = voxels.reshape(voxels.shape[:3] if voxels.shape[3:] == (1,) else voxels.shape)
    voxels = np.moveaxis(voxels, -1, 0) if voxels.ndim == 4 else voxels[None]
    image = read_image(path)
    np.testing.assert_allclose(image.array, voxels, rtol=1e-6, atol=1e-4)
    assert image.geometry.affine.tobytes() == np.asarray(expected.affine, float).tobytes()
    assert image.array.dtype.isnative
    assert read_header(path)[1] == len(image.array)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
@pytest.mark.parametrize("name", READ_OK_NIFTI)
def test_labels_on_a_read_grid_keep_its_affine_bit_for_bit(shared_data, tmp_path, name, suffix):
    source = shared_data / "tricky" / "read_ok" / name
    geometry, _ = read_header(source)
    labels = (np.arange(np.prod(geometry.shape)) % 7).reshape(geometry.shape)
    write_labels(tmp_path / f"labels{suffix}", labels, geometry)
    before, after = nib.load(source), nib.load(tmp_path / f"labels{suffix}")
    assert after.shape == before.shape[:3]
    assert after.affine.tobytes() == np.asarray(before.affine, float).tobytes()
    assert after.header["qform_code"] == before.header["qform_code"]
    assert np.array_equal(np.asarray(after.dataobj), labels)


@pytest.mark.parametrize("codes", CODES)
def test_real_heads_in_every_orientation_are_the_same_head(shared_data, codes):
    folder = shared_data / "tricky" / "orientations"
    image, reference = read_image(folder / f"{codes}.nii.gz"), read_image(folder / "RAS.nii.gz")
    canonical, grid = image.geometry.to_canonical(image.array)
    assert image.geometry.orientation == codes
    assert np.array_equal(canonical, reference.array)
    assert grid.is_same_grid(reference.geometry)


@pytest.mark.parametrize("name", ["uint8", "int8", "int16", "uint16", "int32", "uint32", "float32"])
def test_stored_types_are_kept(shared_data, name):
    image = read_image(shared_data / "tricky" / "dtypes" / f"{name}.nii")
    assert image.array.dtype == np.dtype(name)
    assert image.array.sum() == sum(range(27))


@pytest.mark.parametrize("value", [2**63 + 1, 2**53 + 1])
def test_64_bit_integers_are_exact(tmp_path, value):
    path = tmp_path / "a.nii"
    nib.save(nib.Nifti1Image(np.full((2, 2, 2), value), np.eye(4), dtype=np.uint64), path)
    assert read_image(path).array[0, 1, 1, 1] == value


def test_scaled_int16_becomes_float32_and_scaled_int32_float64(tmp_path):
    for stored, expected in ((np.int16, np.float32), (np.int32, np.float64)):
        path = _save(tmp_path / "a.nii", np.full((2, 2, 2), 3, stored))
        _set_field(path, 112, np.array([0.5, 10], "<f4"))
        array = read_image(path).array
        assert (array.dtype, array[0, 0, 0, 0]) == (expected, 11.5)


def test_scaling_with_a_broken_intercept_is_refused(tmp_path):
    path = _save(tmp_path / "a.nii", np.zeros((2, 2, 2), np.int16))
    _set_field(path, 112, np.array([1, np.nan], "<f4"))
    with pytest.raises(DataError, match=r"a\.nii: scaling is damaged"):
        read_image(path)


@pytest.mark.parametrize(
    ("stored", "expected"),
    [
        ((2, 3), (1, 2, 3)),
        ((2, 3, 1), (1, 2, 3, 1)),
        ((2, 3, 4, 1), (1, 2, 3, 4)),
        ((2, 3, 4, 5), (5, 2, 3, 4)),
        ((2, 3, 4, 5, 1), (5, 2, 3, 4)),
    ],
)
def test_axes_after_the_third_are_channels(tmp_path, stored, expected):
    path = _save(tmp_path / "a.nii.gz", np.zeros(stored, np.uint8))
    assert read_image(path).array.shape == expected
    assert read_image(path).geometry.shape == expected[1:]


def test_pair_of_header_and_voxels_is_read_by_either_name(tmp_path):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    nib.save(nib.Nifti1Pair(array, np.diag([1, 2, 3, 1])), tmp_path / "a.hdr")
    for name in ("a.hdr", "a.img"):
        image = read_image(tmp_path / name)
        assert np.array_equal(image.array[0], array)
        assert image.geometry.spacing_mm == (1, 2, 3)
    (tmp_path / "a.img").unlink()
    with pytest.raises(DataError, match=r"a\.hdr: its voxels a\.img are missing"):
        read_image(tmp_path / "a.hdr")


def test_analyze_files_are_refused(tmp_path):
    nib.save(nib.Spm2AnalyzeImage(np.zeros((2, 2, 2), np.int16), np.eye(4)), tmp_path / "a.img")
    with pytest.raises(DataError, match=r"not a NIfTI file.*left from right"):
        read_image(tmp_path / "a.hdr")


@pytest.mark.parametrize("share", [0.02, 0.5, 0.99, 0.9999])
def test_truncated_gzip_is_refused(tmp_path, share):
    rng = np.random.default_rng(0)
    path = _save(tmp_path / "a.nii.gz", rng.normal(size=(30, 30, 30)).astype(np.float32))
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=r"a\.nii\.gz: .*truncated"):
        read_image(path)


def test_half_a_plain_file_is_refused_with_both_sizes(tmp_path):
    path = _save(tmp_path / "a.nii", np.zeros((10, 10, 10), np.int16))
    path.write_bytes(path.read_bytes()[:1352])
    with pytest.raises(DataError, match="truncated: 1000 bytes of voxels; expected 2000"):
        read_image(path)


def test_gzip_works_without_isal(tmp_path, monkeypatch):
    monkeypatch.setattr("volseg.images.compressed.GzipFile", gzip.GzipFile)
    monkeypatch.setattr("volseg.images.compressed.InflateError", zlib.error)
    labels = np.random.default_rng(0).integers(0, 250, (9, 9, 9))
    path = tmp_path / "a.nii.gz"
    write_labels(path, labels, Geometry((9, 9, 9), np.eye(4)))
    assert np.array_equal(read_labels(path).array[0], labels)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="truncated"):
        read_labels(path)


def test_missing_gzip_checksum_is_refused(tmp_path):
    path = _save(tmp_path / "a.nii.gz", np.zeros((9, 9, 9), np.uint8))
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(DataError, match="truncated"):
        read_image(path)


def test_flipped_bit_in_gzip_is_refused(tmp_path):
    rng = np.random.default_rng(0)
    path = _save(tmp_path / "a.nii.gz", rng.integers(0, 255, (30, 30, 30)).astype(np.uint8))
    _flip_bit(path, 20_000)
    with pytest.raises(DataError, match=r"a\.nii\.gz: the gzip stream is damaged"):
        read_image(path)


@pytest.mark.parametrize("suffix", [".nii", ".nii.gz"])
def test_header_that_declares_terabytes_is_refused_before_memory_is_taken(tmp_path, suffix):
    path = _save(tmp_path / "a.nii", np.zeros((2, 2, 2), np.float32))
    _set_field(path, 40, np.array([3, 32767, 32767, 32767], "<i2"))
    content = path.read_bytes()
    path = tmp_path / f"b{suffix}"
    path.write_bytes(gzip.compress(content) if suffix.endswith("gz") else content)
    with pytest.raises(DataError, match=r"truncated: .*expected 140724603846652 by the header"):
        read_image(path)


@pytest.mark.parametrize("dim", [[3, 4, 0, 4], [3, 4, -1, 4], [0, 1, 1, 1], [3, -1, 1, 1]])
def test_empty_axes_are_refused(tmp_path, dim):
    path = _save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.uint8))
    _set_field(path, 40, np.array(dim, "<i2"))
    with pytest.raises(DataError, match=r"a\.nii: .*(shape|axes)"):
        read_image(path)


@pytest.mark.parametrize("value", [0, np.nan])
def test_broken_affine_is_refused_with_the_file(tmp_path, value):
    path = _save(tmp_path / "a.nii", np.zeros((4, 4, 4), np.uint8))
    _set_field(path, 280, np.full(12, value, "<f4"))
    with pytest.raises(DataError, match=r"a\.nii: affine is (singular|not a finite)"):
        read_image(path)


def test_infinite_voxels_are_counted_and_placed(tmp_path):
    array = np.zeros((2, 3, 4, 2), np.float32)
    array[1, 2, 0, 1] = np.inf
    array[1, 2, 3, 1] = np.nan
    path = _save(tmp_path / "a.nii", array)
    with pytest.raises(DataError, match=r"2 voxels .* first at index \(1, 2, 0\) of channel 1"):
        read_image(path)


def test_plain_nifti_with_a_gzip_name_is_read_with_one_warning(tmp_path, caplog):
    path = _save(tmp_path / "a.nii", np.ones((2, 2, 2), np.uint8)).rename(tmp_path / "a.nii.gz")
    assert read_image(path).array.sum() == 8
    read_image(path)
    assert [record.getMessage() for record in caplog.records] == [
        f"{path} is plain NIfTI by its content, not what its name says; it is read all the same."
    ]


def test_conflicting_qform_is_named_and_the_sform_used(tmp_path, caplog):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    image.set_sform(np.eye(4), 1)
    image.set_qform(np.diag([2, 2, 2, 1]), 1)
    nib.save(image, tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii")[0].spacing_mm == (1, 1, 1)
    message = caplog.records[0].getMessage()
    assert "qform (spacing 2 x 2 x 2 mm) and sform (spacing 1 x 1 x 1 mm) differ by" in message


def test_a_damaged_qform_beside_a_sform_is_told_and_left(tmp_path, caplog):
    # The rounded quaternion of a turn by 180 degrees, whose real part is the root of -4e-6.
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), np.eye(4))
    image.set_sform(np.diag([1, 2, 3, 1]), 1)
    image.header["qform_code"] = 1
    image.header["quatern_b"] = 1.000002
    nib.save(image, tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii")[0].spacing_mm == (1, 2, 3)
    assert "qform is damaged (w2 should be positive" in caplog.records[0].getMessage()
    image.header["sform_code"] = 0
    (tmp_path / "b.nii").write_bytes(image.header.binaryblock + bytes(4 + 64))
    with pytest.raises(DataError, match=r"b\.nii: qform is damaged"):
        read_header(tmp_path / "b.nii")


def test_missing_orientation_is_assumed_with_a_warning(tmp_path, caplog):
    image = nib.Nifti1Image(np.zeros((4, 4, 4), np.uint8), None)
    nib.save(image, tmp_path / "a.nii")
    assert read_header(tmp_path / "a.nii")[0].orientation == "LAS"
    assert "neither qform nor sform" in caplog.records[0].getMessage()


def test_agreeing_headers_give_no_warning(shared_data, caplog):
    with caplog.at_level(logging.WARNING):
        read_header(shared_data / "tricky" / "read_ok" / "oblique_flair.nii.gz")
    assert not caplog.records


@pytest.mark.parametrize("suffix", [".nii.gz", ".nii"])
@pytest.mark.parametrize("codes", CODES[::5])
def test_asymmetric_labels_come_back_exactly_on_an_oblique_grid(tmp_path, codes, suffix):
    rng = np.random.default_rng(0)
    start = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), (5, 6, 7))
    tilt = nib.eulerangles.euler2mat(0.2, 0.1, -0.15) @ np.diag([0.7, 0.9, 3])
    affine = nib.affines.from_matvec(tilt, (11, -12, 13)) @ start
    labels = rng.integers(0, 9, (5, 6, 7))
    write_labels(tmp_path / f"a{suffix}", labels, Geometry((5, 6, 7), affine))
    image = read_labels(tmp_path / f"a{suffix}")
    assert np.array_equal(image.array[0], labels)
    np.testing.assert_allclose(image.geometry.affine, affine, atol=1e-5)
    assert nib.load(tmp_path / f"a{suffix}").header["qform_code"] == 1


def test_sheared_grid_is_written_without_a_wrong_qform(tmp_path):
    affine = np.eye(4)
    affine[0, 1] = 0.5
    write_labels(tmp_path / "a.nii", np.zeros((9, 9, 9), int), Geometry((9, 9, 9), affine))
    after = nib.load(tmp_path / "a.nii")
    assert np.array_equal(after.affine, affine)
    assert (after.header["qform_code"], after.header["sform_code"]) == (0, 1)


def test_axis_too_long_for_nifti1_is_written_as_nifti2(tmp_path):
    geometry = Geometry((40000, 1, 1), np.eye(4))
    write_labels(tmp_path / "a.nii", np.ones((40000, 1, 1), np.uint8), geometry)
    assert isinstance(nib.load(tmp_path / "a.nii"), nib.Nifti2Image)
    assert read_labels(tmp_path / "a.nii").array.sum() == 40000


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ((0, 255), np.uint8),
        ((-1, 1), np.int16),
        ((0, 256), np.int16),
        ((0, 65536), np.int32),
        ((0, 2**40), np.int64),
    ],
)
def test_labels_get_the_smallest_common_type(tmp_path, values, expected):
    labels = np.array(values).reshape(2, 1, 1)
    write_labels(tmp_path / "a.nii.gz", labels, Geometry((2, 1, 1), np.eye(4)))
    stored = nib.load(tmp_path / "a.nii.gz")
    assert stored.get_data_dtype() == expected
    assert np.asarray(stored.dataobj).ravel().tolist() == list(values)


def test_probabilities_have_channels_last_in_the_file(tmp_path):
    array = np.random.default_rng(0).random((3, 4, 5, 6), np.float32)
    write_image(tmp_path / "a.nii.gz", array, Geometry((4, 5, 6), np.eye(4)))
    stored = np.asarray(nib.load(tmp_path / "a.nii.gz").dataobj)
    assert np.array_equal(stored, np.moveaxis(array, 0, -1))
    assert np.array_equal(read_image(tmp_path / "a.nii.gz").array, array)


def test_channels_in_2d_are_those_of_one_slice_in_its_place(tmp_path):
    array = np.random.default_rng(0).random((3, 4, 5), np.float32)
    affine = np.array([[0, -2, 0, 7], [1.5, 0, 0, -3], [0, 0, 4, 11], [0, 0, 0, 1.0]])
    write_image(tmp_path / "a.nii", array, Geometry((4, 5), affine))
    stored = nib.load(tmp_path / "a.nii")
    assert stored.shape == (4, 5, 1, 3)
    assert np.array_equal(stored.affine, affine)
    assert np.array_equal(np.moveaxis(np.asarray(stored.dataobj)[:, :, 0], -1, 0), array)
    assert read_image(tmp_path / "a.nii").array.shape == (3, 4, 5, 1)


def test_equal_content_gives_equal_bytes(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (9, 9, 9))
    for name in ("a.nii.gz", "b.nii.gz"):
        write_labels(tmp_path / name, labels, Geometry((9, 9, 9), np.eye(4)))
    assert (tmp_path / "a.nii.gz").read_bytes() == (tmp_path / "b.nii.gz").read_bytes()


def test_failed_write_leaves_the_old_file_and_nothing_else(tmp_path, monkeypatch):
    class FullDisk:
        def __enter__(self):
            return self

        def __exit__(self, *_):
            return None

        def write(self, _):
            raise OSError(28, "No space left on device")

    def create(path):
        path.write_bytes(b"half")
        return FullDisk()

    (tmp_path / "a.nii.gz").write_bytes(b"old")
    monkeypatch.setattr("volseg.images.nifti._create", create)
    with pytest.raises(MachineError, match="no space left"):
        write_labels(
            tmp_path / "a.nii.gz", np.zeros((2, 2, 2), int), Geometry((2, 2, 2), np.eye(4))
        )
    assert [path.name for path in tmp_path.iterdir()] == ["a.nii.gz"]
    assert (tmp_path / "a.nii.gz").read_bytes() == b"old"


def test_nibabel_image_keeps_its_header_on_the_way_out(shared_data, tmp_path):
    source = nib.load(shared_data / "tricky" / "read_ok" / "trailing_singleton_axis.nii.gz")
    image = from_nibabel(source)
    write_labels(tmp_path / "a.nii.gz", np.zeros(image.geometry.shape, int), image.geometry)
    assert image.array.shape == (1, 64, 64, 21)
    assert nib.load(tmp_path / "a.nii.gz").header["qform_code"] == 1
    assert nib.load(tmp_path / "a.nii.gz").affine.tobytes() == source.affine.tobytes()


def test_big_endian_nibabel_image_becomes_native(shared_data):
    source = nib.load(shared_data / "tricky" / "read_ok" / "big_endian_int16.nii")
    image = from_nibabel(source)
    assert image.array.dtype == np.int16
    assert np.array_equal(image.array[0], np.asarray(source.dataobj))


def test_nibabel_image_of_a_truncated_file_is_refused(tmp_path):
    path = _save(tmp_path / "a.nii.gz", np.arange(4096, dtype=np.int16).reshape(16, 16, 16))
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(DataError, match="the nibabel image cannot be read"):
        from_nibabel(nib.load(path))


def test_nibabel_image_in_memory_with_an_exact_affine():
    affine = np.diag([1 / 3, 1, 1, 1])
    image = from_nibabel(nib.Nifti1Image(np.zeros((2, 3, 4), np.int16), affine))
    assert np.array_equal(image.geometry.affine, affine)
    assert image.geometry.nifti is None
