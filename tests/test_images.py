"""Reading image files of every depth, mode and orientation."""

from __future__ import annotations

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

from diffbackbone import images
from diffbackbone.images import (
    ImageError,
    check_images,
    normalize,
    read_image,
    resize,
    to_tensor,
    to_uint8,
)

GREY = (np.arange(48 * 40).reshape(48, 40) * 2).astype(np.uint16)  # 12 bits in 16
COLOR = np.stack([GREY * 17, GREY[::-1] * 3, GREY + 1], axis=-1)


def save(path, values, **options):
    Image.fromarray(values).save(path, **options)
    return path


def save_color(path, values=COLOR):
    cv2 = pytest.importorskip("cv2")
    cv2.imwrite(str(path), values[..., [2, 1, 0, 3][: values.shape[-1]]])
    return path


@pytest.mark.parametrize("mode", ["1", "LA", "P", "CMYK"])
def test_8_bits_are_pillows_rgb_to_the_bit(tmp_path, mode):
    path = tmp_path / ("image.tif" if mode == "CMYK" else "image.png")
    Image.fromarray((COLOR >> 4).astype(np.uint8)).convert(mode).save(path)
    found, image = read_image(path), Image.open(path).convert("RGB")
    assert found.dtype == np.uint8
    assert (found == np.asarray(image)).all()
    image = image.resize((17, 23), Image.Resampling.BICUBIC, reducing_gap=3.0)
    expected = np.asarray(image, dtype=np.float32).transpose(2, 0, 1) / 127.5 - 1
    found = normalize(to_tensor(resize(found, (17, 23))))
    assert torch.equal(found, torch.from_numpy(expected))


@pytest.mark.parametrize(("suffix", "dtype"), [("png", "u2"), ("pgm", "u2"), ("tif", ">u2")])
def test_deep_grey_keeps_its_levels(tmp_path, suffix, dtype):
    path = save(tmp_path / f"image.{suffix}", GREY.astype(dtype))
    found = read_image(path)
    assert found.dtype == np.float32
    assert found.shape == (48, 40, 3)
    np.testing.assert_allclose(found, np.float64(GREY)[..., None].repeat(3, 2) / 65535, atol=1e-7)
    assert len(np.unique(found)) == len(np.unique(GREY))
    np.testing.assert_allclose(read_image(path, (0, 4095))[..., 0], GREY / 4095, atol=1e-6)


@pytest.mark.parametrize(("suffix", "channels"), [("png", 4), ("tif", 3)])
def test_deep_color_keeps_its_levels(tmp_path, suffix, channels):
    values = np.dstack([COLOR, GREY])[..., :channels]
    found = read_image(save_color(tmp_path / f"image.{suffix}", values))
    np.testing.assert_allclose(found, COLOR / 65535, atol=1e-7)
    with pytest.raises(ImageError, match="4095"):
        read_image(tmp_path / f"image.{suffix}", (0, 4095))


def test_color_of_a_maximum_of_its_own(tmp_path):
    path = tmp_path / "image.ppm"
    path.write_bytes(b"P6 40 48 4095\n" + (COLOR % 4096).astype(">u2").tobytes())
    np.testing.assert_allclose(read_image(path), COLOR % 4096 / 4095, atol=1e-6)


def test_floats_are_taken_as_they_are(tmp_path):
    values = np.linspace(0, 1, 48 * 40, dtype=np.float32).reshape(48, 40)
    path = save(tmp_path / "image.tif", values)
    assert (read_image(path)[..., 1] == values).all()
    np.testing.assert_allclose(read_image(path, (-1, 3))[..., 2], (values + 1) / 4, atol=1e-6)


@pytest.mark.parametrize(
    ("values", "value_range"),
    [
        (GREY.astype(np.float32), None),  # of an unknown range
        (np.float32([[0, np.nan]]), None),
        (np.float32([[0, np.inf]]), (0, np.inf)),
        (np.int32([[0, 65536]]), None),
        (GREY, (0, 100)),
        (GREY, (9000, 0)),
    ],
)
def test_values_without_a_known_range_are_refused(tmp_path, values, value_range):
    path = save(tmp_path / "image.tif", values)
    with pytest.raises(ImageError, match=r"image\.tif"):
        read_image(path, value_range)


def test_other_channels(tmp_path):
    path = tmp_path / "array.npy"
    for dtype, expected in (("u1", 128 / 255), ("i2", (128 + 32768) / 65535), ("f4", 0.5)):
        np.save(path, np.full((6, 8, 5), 0.5 if dtype == "f4" else 128, dtype))
        found = read_image(path, channels=5)
        assert found.shape == (6, 8, 5)
        assert (found.dtype == np.uint8) == (dtype == "u1")
        np.testing.assert_allclose(normalize(to_tensor(found)), 2 * expected - 1, atol=1e-6)
        assert resize(found, (4, 3)).shape == (3, 4, 5)
    np.save(path, GREY)
    np.testing.assert_allclose(read_image(path, channels=1)[..., 0], GREY / 65535, atol=1e-7)
    grey = save(tmp_path / "grey.tif", GREY)
    assert (read_image(grey, channels=1) == read_image(grey)[..., :1]).all()
    color = save(tmp_path / "color.png", (COLOR >> 4).astype(np.uint8))
    expected = np.asarray(Image.open(color).convert("L"))[..., None]
    assert (read_image(color, channels=1) == expected).all()
    for wrong, channels in ((path, 3), (color, 5), (save_color(tmp_path / "deep.png"), 1)):
        with pytest.raises(ImageError, match=f"{wrong.name}: shape"):
            read_image(wrong, channels=channels)
    np.save(path, np.array([{"a": 1}]), allow_pickle=True)
    with pytest.raises(ImageError, match="allow_pickle"):
        read_image(path)


UPRIGHT = {
    3: lambda x: np.rot90(x, 2),
    5: lambda x: x.swapaxes(0, 1),
    6: lambda x: np.rot90(x, -1),
}


@pytest.mark.parametrize("kind", ["rgb.png", "grey.png", "grey.tif", "color.png"])
@pytest.mark.parametrize("orientation", [3, 5, 6])
def test_orientation(tmp_path, kind, orientation):
    values = {"rgb": (COLOR >> 4).astype(np.uint8), "grey": GREY, "color": COLOR}[kind[:-4]]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / kind
    if kind == "color.png":  # Pillow can't write it: give it the EXIF chunk of one that it can
        plain = tmp_path / "plain.png"
        save(plain, GREY, exif=exif)
        chunk = plain.read_bytes()
        start = chunk.index(b"eXIf") - 4
        chunk = chunk[start : start + 12 + int.from_bytes(chunk[start : start + 4], "big")]
        data = save_color(path).read_bytes()
        path.write_bytes(data[:33] + chunk + data[33:])
        expected = read_image(save_color(tmp_path / "upright.png"))
    else:
        save(path, values, exif=exif)
        expected = read_image(save(tmp_path / f"upright{kind[-4:]}", values))
    assert (read_image(path) == UPRIGHT[orientation](expected)).all()


def test_damaged_exif_leaves_the_image(tmp_path):
    values = np.full((8, 8, 3), 100, np.uint8)
    path = save(tmp_path / "image.jpg", values, exif=b"Exif\0\0nonsense")
    assert (read_image(path) == values).all()


def test_frames(tmp_path):
    first, second = (Image.fromarray(np.full((8, 8), v, np.uint16)) for v in (200, 202))
    for name in ("stack.tif", "moving.png"):
        frames = [x if name == "stack.tif" else x.convert("RGB") for x in (first, second)]
        frames[0].save(tmp_path / name, save_all=True, append_images=frames[1:])
        with pytest.raises(ImageError, match="2 frames"):
            read_image(tmp_path / name)
    second.encoderinfo = {"tiffinfo": {254: 1}}  # an overview, as in satellite images
    first.save(tmp_path / "overview.tif", save_all=True, append_images=[second])
    assert (to_uint8(read_image(tmp_path / "overview.tif") * 257) == 200).all()
    first, second = (x.convert("RGB") for x in (first, second))
    first.save(tmp_path / "photo.jpg", format="MPO", save_all=True, append_images=[second])
    assert read_image(tmp_path / "photo.jpg").shape == (8, 8, 3)


def test_broken_files_are_named(tmp_path):
    whole = save(tmp_path / "whole.tif", GREY, compression="tiff_lzw").read_bytes()
    for name, content in (("cut.tif", whole[:600]), ("text.png", b"text"), ("empty.jpg", b"")):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ImageError, match=name):
            read_image(tmp_path / name)


def test_of_many_images_headers_are_checked(tmp_path, monkeypatch):
    paths = [save(tmp_path / f"{i}.bmp", GREY.astype(np.uint8)) for i in range(2)]
    check_images(paths)
    paths[1].write_bytes(paths[1].read_bytes()[:-100])
    with pytest.raises(ImageError, match="1.bmp"):
        check_images(paths)
    monkeypatch.setattr(images, "CHECK_WHOLE", 1)
    check_images(paths)
    paths[1].write_bytes(b"no image")
    with pytest.raises(ImageError, match="1.bmp"):
        check_images(paths)


def test_resized_floats_stay_in_range(tmp_path):
    values = np.zeros((32, 32, 3), np.float32)
    values[8:24, 8:24] = 1
    for size in ((70, 50), (9, 7)):
        found = resize(values, size)
        assert found.shape == (*size[::-1], 3)
        assert 0 <= found.min() < found.max() <= 1
        inner = 0.2 + values / 2  # 8 bits are cut to their range halfway, too
        expected = resize(np.rint(255 * inner).astype(np.uint8), size)
        assert np.abs(255 * resize(inner, size) - expected).max() < 1.5
