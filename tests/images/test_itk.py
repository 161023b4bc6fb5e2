"""NRRD and MetaImage, with SimpleITK as the independent witness of where voxels lie."""

from __future__ import annotations

import itertools

import nibabel as nib
import numpy as np
import pytest
import SimpleITK as sitk

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images import read_header, read_image, read_labels, write_image, write_labels

CODES = [
    "".join(codes)
    for order in itertools.permutations(("LR", "PA", "IS"))
    for codes in itertools.product(*order)
]
SUFFIXES = (".nrrd", ".mha")


def _oblique(codes, shape):
    start = nib.orientations.inv_ornt_aff(nib.orientations.axcodes2ornt(codes), shape)
    tilt = nib.eulerangles.euler2mat(0.2, 0.1, -0.15) @ np.diag([0.7, 0.9, 3])
    return Geometry(shape, nib.affines.from_matvec(tilt, (11, -12, 13)) @ start)


def _write_sitk(path, array_xyz, compress):
    image = sitk.GetImageFromArray(array_xyz.T)
    sitk.WriteImage(image, str(path), useCompression=compress)
    return path


@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("codes", CODES)
def test_labels_come_back_exactly_on_an_oblique_grid(tmp_path, codes, suffix):
    labels = np.random.default_rng(0).integers(0, 300, (5, 6, 7))
    geometry = _oblique(codes, (5, 6, 7))
    write_labels(tmp_path / f"a{suffix}", labels, geometry)
    image = read_labels(tmp_path / f"a{suffix}")
    assert image.array.dtype == np.int16
    assert np.array_equal(image.array[0], labels)
    np.testing.assert_allclose(image.geometry.affine, geometry.affine, atol=1e-6)


@pytest.mark.parametrize("suffix", [*SUFFIXES, ".mhd", ".nhdr"])
def test_a_voxel_lies_where_simpleitk_puts_it(tmp_path, suffix):
    array = np.arange(24, dtype=np.int16).reshape(2, 3, 4)
    image = sitk.GetImageFromArray(array.T)
    image.SetSpacing((0.5, 2, 3))
    image.SetOrigin((10, 20, 30))
    image.SetDirection((0, 1, 0, 1, 0, 0, 0, 0, -1))
    sitk.WriteImage(image, str(tmp_path / f"a{suffix}"))
    found = read_image(tmp_path / f"a{suffix}")
    left, back, up = image.TransformIndexToPhysicalPoint((1, 2, 3))
    np.testing.assert_allclose(found.geometry.affine @ [1, 2, 3, 1], [-left, -back, up, 1])
    assert found.array[0, 1, 2, 3] == array[1, 2, 3]
    # Columns run to y, x and -z of LPS: posterior, left, inferior.
    assert found.geometry.orientation == "PLI"


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_vector_components_are_channels(tmp_path, suffix):
    array = np.random.default_rng(0).random((3, 4, 5, 6), np.float32)
    write_image(tmp_path / f"a{suffix}", array, _oblique("LPS", (4, 5, 6)))
    assert np.array_equal(read_image(tmp_path / f"a{suffix}").array, array)
    assert read_header(tmp_path / f"a{suffix}")[1] == 3
    assert sitk.ReadImage(str(tmp_path / f"a{suffix}")).GetPixel(1, 2, 3) == tuple(
        array[:, 1, 2, 3]
    )


@pytest.mark.parametrize("name", ["uint8", "int8", "uint16", "int32", "uint64", "float64"])
def test_stored_types_are_kept(tmp_path, name):
    path = _write_sitk(tmp_path / "a.mha", np.ones((2, 3, 4), name), compress=False)
    assert read_image(path).array.dtype == np.dtype(name)


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("suffix", SUFFIXES)
@pytest.mark.parametrize("share", [0.5, 0.995])
def test_truncated_files_are_refused(tmp_path, suffix, share, compress):
    array = np.random.default_rng(0).integers(0, 99, (20, 21, 22)).astype(np.int16)
    path = _write_sitk(tmp_path / f"a{suffix}", array, compress)
    content = path.read_bytes()
    path.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(DataError, match=rf"a\{suffix}: (truncated|cannot be read)") as caught:
        read_image(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_flipped_bit_in_compressed_data_is_refused(tmp_path, suffix):
    array = np.random.default_rng(0).integers(0, 99, (20, 21, 22)).astype(np.int16)
    path = _write_sitk(tmp_path / f"a{suffix}", array, compress=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(DataError, match=r"damaged|cannot be read"):
        read_image(path)


def test_data_file_beside_the_header_is_checked(tmp_path):
    path = _write_sitk(tmp_path / "a.mhd", np.zeros((4, 4, 4), np.int16), compress=False)
    (tmp_path / "a.raw").write_bytes(bytes(100))
    with pytest.raises(DataError, match="truncated: 100 bytes of voxels; expected 128"):
        read_image(path)
    (tmp_path / "a.raw").unlink()
    with pytest.raises(DataError, match=r"its data file a\.raw is missing"):
        read_image(path)


def test_complex_and_four_axes_are_refused(tmp_path):
    sitk.WriteImage(sitk.Image([2, 2, 2], sitk.sitkComplexFloat32), str(tmp_path / "c.nrrd"))
    sitk.WriteImage(sitk.Image([2, 2, 2, 2], sitk.sitkInt16), str(tmp_path / "t.nrrd"))
    with pytest.raises(DataError, match=r"c\.nrrd: voxels are complex"):
        read_image(tmp_path / "c.nrrd")
    with pytest.raises(DataError, match=r"t\.nrrd: 4 axes; expected 2 or 3"):
        read_image(tmp_path / "t.nrrd")


def test_picture_goes_through_nrrd(tmp_path):
    geometry = Geometry((4, 5), np.diag([0.5, 2, 1, 1.0]))
    array = np.random.default_rng(0).random((2, 4, 5), np.float32)
    write_image(tmp_path / "a.nrrd", array, geometry)
    image = read_image(tmp_path / "a.nrrd")
    assert np.array_equal(image.array, array)
    np.testing.assert_allclose(image.geometry.affine, geometry.affine, atol=1e-12)


def test_picture_that_is_tilted_in_space_is_refused(tmp_path):
    sagittal = Geometry(
        (4, 5), np.array([[0, 0, 1, 0], [1, 0, 0, 0], [0, 1, 0, 0], [0, 0, 0, 1.0]])
    )
    with pytest.raises(ConfigError, match=r"no place in 3D space\. Use \.nii\.gz"):
        write_labels(tmp_path / "a.nrrd", np.zeros((4, 5), int), sagittal)
    assert not list(tmp_path.iterdir())
