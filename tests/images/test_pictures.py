"""PNG and TIFF pictures, written by Pillow or tifffile and read back."""

from __future__ import annotations

import numpy as np
import pytest
import tifffile
from PIL import Image as Pillow

from volseg.errors import ConfigError, DataError
from volseg.geometry import Geometry
from volseg.images import read_header, read_image, read_labels, write_image, write_labels


def _save(path, rows):
    Pillow.fromarray(rows).save(path)
    return path


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_first_axis_is_the_column(tmp_path, suffix):
    rows = np.array([[1, 2, 3], [4, 5, 6]], np.uint8)
    image = read_image(_save(tmp_path / f"a{suffix}", rows))
    assert image.array.shape == (1, 3, 2)
    assert image.array[0, 2, 0] == 3
    assert np.array_equal(image.geometry.affine, np.eye(4))


@pytest.mark.parametrize("suffix", [".png", ".tif"])
def test_colours_are_three_channels(tmp_path, suffix):
    rows = np.arange(24, dtype=np.uint8).reshape(2, 4, 3)
    path = _save(tmp_path / f"a{suffix}", rows)
    assert np.array_equal(read_image(path).array, rows.transpose(2, 1, 0))
    assert read_header(path)[1] == 3
    assert read_header(path)[0].shape == (4, 2)


@pytest.mark.parametrize("dtype", [np.uint16, np.int16, np.int32, np.float32])
@pytest.mark.parametrize("byteorder", ["<", ">"])
def test_greyscale_tiff_keeps_its_values(tmp_path, dtype, byteorder):
    rows = (np.arange(6).reshape(2, 3) * 100).astype(dtype)
    tifffile.imwrite(tmp_path / "a.tif", rows, byteorder=byteorder)
    array = read_image(tmp_path / "a.tif").array
    assert np.array_equal(array[0], rows.T)
    assert array.dtype.isnative


def test_greyscale_png_of_16_bits_and_of_one_bit(tmp_path):
    wide = _save(tmp_path / "a.png", np.array([[0, 40000]], np.uint16))
    thin = _save(tmp_path / "b.png", np.array([[True, False]]))
    assert read_image(wide).array.ravel().tolist() == [0, 40000]
    assert read_labels(thin).array.ravel().tolist() == [1, 0]


def test_opaque_alpha_is_dropped_and_transparency_refused(tmp_path):
    rows = np.full((2, 3, 4), 255, np.uint8)
    assert read_image(_save(tmp_path / "a.png", rows)).array.shape == (3, 3, 2)
    rows[0, 0, 3] = 0
    with pytest.raises(DataError, match=r"b\.png: transparent pixels"):
        read_image(_save(tmp_path / "b.png", rows))


def test_palette_and_pages_and_wide_colours_are_refused(tmp_path):
    Pillow.fromarray(np.zeros((2, 3), np.uint8)).convert("P").save(tmp_path / "p.png")
    tifffile.imwrite(tmp_path / "v.tif", np.zeros((5, 8, 9), np.uint8))
    tifffile.imwrite(tmp_path / "w.tif", np.zeros((8, 9, 3), np.uint16), photometric="rgb")
    with pytest.raises(DataError, match=r"p\.png: colour mode P; expected greyscale or RGB"):
        read_image(tmp_path / "p.png")
    with pytest.raises(DataError, match=r"v\.tif: several pages"):
        read_image(tmp_path / "v.tif")
    with pytest.raises(DataError, match=r"w\.tif: colours of 16 bits"):
        read_image(tmp_path / "w.tif")


def test_truncated_and_damaged_png_are_refused(tmp_path):
    rows = np.random.default_rng(0).integers(0, 255, (50, 60)).astype(np.uint8)
    content = _save(tmp_path / "a.png", rows).read_bytes()
    middle = len(content) // 2
    flipped = content[:middle] + bytes([content[middle] ^ 4]) + content[middle + 1 :]
    for damaged in (content[:middle], flipped):
        (tmp_path / "a.png").write_bytes(damaged)
        with pytest.raises(DataError, match=r"a\.png: cannot be read as a PNG or TIFF"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("suffix", "highest", "expected"),
    [(".png", 255, np.uint8), (".png", 256, np.uint16), (".tif", 70000, np.int32)],
)
def test_labels_come_back_exactly(tmp_path, suffix, highest, expected):
    labels = np.array([[0, 1, 2], [3, 4, highest]])
    write_labels(tmp_path / f"a{suffix}", labels, Geometry((2, 3), np.eye(4)))
    array = read_labels(tmp_path / f"a{suffix}").array
    assert array.dtype == expected
    assert np.array_equal(array[0], labels)


def test_what_a_picture_cannot_hold_is_not_written(tmp_path):
    flat, volume = Geometry((2, 2), np.eye(4)), Geometry((2, 2, 2), np.eye(4))
    placed = Geometry((2, 2), np.diag([2, 2, 1, 1]))
    with pytest.raises(ConfigError, match="no volume and no position"):
        write_labels(tmp_path / "a.png", np.zeros((2, 2, 2), int), volume)
    with pytest.raises(ConfigError, match="no volume and no position"):
        write_labels(tmp_path / "a.png", np.zeros((2, 2), int), placed)
    with pytest.raises(ConfigError, match=r"type int32 as .*a\.png\. Use \.tif"):
        write_labels(tmp_path / "a.png", np.full((2, 2), -1), flat)
    with pytest.raises(ConfigError, match=r"cannot write 2 channels .* Use \.nrrd"):
        write_image(tmp_path / "a.tif", np.zeros((2, 2, 2), np.float32), flat)
    assert not list(tmp_path.iterdir())
