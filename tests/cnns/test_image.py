"""One image file of any kind to one input array."""

import numpy as np
import pytest
from PIL import Image

from cnns.data.images import (
    Preprocessing,
    center_crop,
    class_names,
    find_images,
    imagenet_classes,
    load_image,
    read_picture,
)
from cnns.errors import RunError, UsageError

PREPROCESSING = Preprocessing(24, 32, (100.0, 110.0, 120.0), (50.0, 60.0, 70.0))
GREY = 128


def test_normalisation_and_layout(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGB", (60, 40), (200, 50, 120)).save(path)
    image = load_image(str(path), PREPROCESSING)
    assert image.shape == (3, 24, 24) and image.dtype == np.float32
    np.testing.assert_allclose(image[:, 3, 4], [2.0, -1.0, 0.0], atol=1e-6)


def test_centre_crop_takes_the_centre():
    y, x = np.mgrid[0:64, 0:128]
    picture = Image.fromarray(np.stack([x, y, x], axis=-1).astype(np.uint8))
    crop = center_crop(picture, resize_shorter=32, size=24).astype(float)
    assert crop.shape == (24, 24, 3)
    assert abs(crop[..., 0].mean() - 63.5) < 0.6
    assert abs(crop[..., 1].mean() - 31.5) < 0.6


@pytest.mark.parametrize("mode", ["L", "P", "I;16", "I", "CMYK", "RGBA", "LA", "1", "F"])
def test_every_mode_becomes_rgb(tmp_path, mode):
    path = tmp_path / ("x.tif" if mode in ("CMYK", "F", "I") else "x.png")
    grey = np.full((40, 40), GREY, np.uint8)
    if mode == "I;16":
        picture = Image.fromarray(np.full((40, 40), GREY * 257, np.uint16))
    elif mode == "I":
        picture = Image.fromarray(np.full((40, 40), GREY * 257, np.int32))
    elif mode == "F":
        picture = Image.fromarray(np.full((40, 40), GREY, np.float32))
    elif mode in ("LA", "RGBA"):
        picture = Image.fromarray(grey).convert(mode)
        picture.putalpha(255)
    elif mode == "1":
        picture = Image.new("1", (40, 40), 1)
    else:
        adaptive = Image.Palette.ADAPTIVE  # else a palette picture is dithered
        picture = Image.fromarray(grey).convert("RGB").convert(mode, palette=adaptive)
    picture.save(path)
    pixels = np.asarray(read_picture(str(path))).astype(int)
    assert pixels.shape == (40, 40, 3)
    assert np.abs(pixels - (255 if mode == "1" else GREY)).max() <= 2
    assert load_image(str(path), PREPROCESSING).shape == (3, 24, 24)


def test_transparency_is_laid_on_white(tmp_path):
    path = tmp_path / "x.png"
    Image.new("RGBA", (40, 40), (0, 0, 0, 0)).save(path)
    assert np.asarray(read_picture(str(path))).min() == 255


def test_photographs_are_turned_upright(tmp_path):
    path = tmp_path / "x.jpg"
    picture = Image.new("RGB", (60, 40))
    exif = picture.getexif()
    exif[0x0112] = 6  # rotated by 90 degrees
    picture.save(path, exif=exif)
    assert read_picture(str(path)).size == (40, 60)


def test_what_is_no_image(tmp_path):
    text, half = tmp_path / "x.jpg", tmp_path / "half.jpg"
    text.write_text("no image")
    noise = np.random.default_rng(0).integers(0, 256, (80, 80, 3), np.uint8)
    Image.fromarray(noise).save(half)
    half.write_bytes(half.read_bytes()[:1000])
    for path in (text, half):
        with pytest.raises(RunError, match=path.name):
            read_picture(str(path))


def test_find_images(tmp_path):
    with pytest.raises(UsageError, match="no file or directory"):
        find_images([str(tmp_path / "none.jpg")])
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UsageError, match="holds no images"):
        find_images([str(tmp_path)])
    for name in ("b.JPG", "a.png"):
        (tmp_path / name).touch()
    found = find_images([str(tmp_path)])
    assert [path[-5:] for path in found] == ["a.png", "b.JPG"]


def test_class_names():
    names = imagenet_classes()
    assert len(names) == len(set(names)) + 1  # `crane` is a bird and a machine
    assert names[1] == "goldfish, Carassius auratus"
    assert names[292] == "tiger, Panthera tigris"
    assert names[967] == "espresso"
    assert class_names(1000, None) == names
    assert class_names(2, ("cat", "dog")) == ["cat", "dog"]
    assert class_names(2, None) == ["class 0", "class 1"]
    assert class_names(3, ("cat", "dog")) == ["cat", "dog", "class 2"]
    assert class_names(1000, ("cat", "dog"))[:3] == ["cat", "dog", "class 2"]


def test_a_picture_too_long_for_its_width_is_refused_before_it_fills_the_memory(tmp_path):
    path = tmp_path / "x.png"
    Image.new("L", (1, 30_000)).save(path)
    with pytest.raises(RunError, match="x.png: a picture of 1 x 30000 pixels is too long"):
        load_image(str(path), Preprocessing(224, 256, (0, 0, 0), (1, 1, 1)))
