"""The evaluation transform equals the authors', on either backend, for whatever PIL can open."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import PIL.Image
import pytest
import torch
from helpers import ASSETS, GOLDEN
from huggingface_hub import HfApi
from transformers import AutoImageProcessor, AutoModelForImageClassification, pipeline
from transformers.image_utils import SizeDict
from transformers.utils import PushToHubMixin, logging

from vitae_hf import ViTAEImageProcessor, ViTAEImageProcessorPil, config_from_preset, image_processing_vitae


CHELSEA = ASSETS / "chelsea.png"
BACKENDS = {"torchvision": ViTAEImageProcessor, "pil": ViTAEImageProcessorPil}


@pytest.fixture(params=list(BACKENDS))
def processor_class(request):
    return BACKENDS[request.param]


def pixels(processor, images) -> np.ndarray:
    """What the processor makes of the images before scaling, as integers (B, 3, height, width)."""
    values = processor(images, do_rescale=False, do_normalize=False, return_tensors="np").pixel_values
    return np.asarray(values).astype(np.int64)


def test_pillow_gives_the_authors_pixels_and_torchvision_almost():
    expected = np.load(GOLDEN / "preprocessed_chelsea_224.npz")["uint8"].astype(np.int64)
    image = PIL.Image.open(CHELSEA)
    assert np.array_equal(pixels(ViTAEImageProcessorPil(), image)[0], expected)
    difference = np.abs(pixels(ViTAEImageProcessor(), image)[0] - expected)
    assert difference.max() <= 1 and difference.mean() < 0.05


def test_pixels_are_scaled_and_normalised_with_imagenets_statistics(processor_class):
    image = PIL.Image.new("RGB", (300, 250), (255, 128, 0))
    values = processor_class()(image, return_tensors="pt").pixel_values
    assert values.shape == (1, 3, 224, 224) and values.dtype == torch.float32
    expected = [(1 - 0.485) / 0.229, (128 / 255 - 0.456) / 0.224, (0 - 0.406) / 0.225]
    assert torch.allclose(values.amax((0, 2, 3)), torch.tensor(expected), atol=1e-5)


@pytest.mark.parametrize(
    "size, crop_pct, resized",
    [
        ({"height": 224, "width": 224}, 0.9, (248, 372)),  # the longer side truncated: 248 · 451/300 = 372.8
        ({"height": 384, "width": 384}, 0.9, (426, 640)),
        ({"height": 224, "width": 224}, 1.0, (224, 336)),
        ({"height": 224, "width": 448}, 1.0, (298, 448)),  # here the width decides
    ],
)
def test_the_picture_covers_the_size_over_the_crop_ratio(size, crop_pct, resized):
    size = image_processing_vitae.SizeDict(**size)
    assert image_processing_vitae.resized_height_width(300, 451, size, crop_pct) == resized


def test_the_crop_corner_is_rounded_half_to_even():
    size = image_processing_vitae.SizeDict(height=224, width=224)
    corners = {side: image_processing_vitae.center_box(side, 248, size)[0].start for side in (247, 249, 251, 253)}
    assert corners == {247: 12, 249: 12, 251: 14, 253: 14}  # offsets 11.5, 12.5, 13.5, 14.5


def test_size_and_crop_ratio_adapt(processor_class):
    image = PIL.Image.open(CHELSEA)
    assert pixels(processor_class(size=384), image).shape == (1, 3, 384, 384)
    assert pixels(processor_class(size={"height": 160, "width": 320}), image).shape == (1, 3, 160, 320)
    once = processor_class()(image, size={"height": 96, "width": 96}, crop_pct=1.0, return_tensors="pt")
    assert once.pixel_values.shape == (1, 3, 96, 96)
    whole = pixels(processor_class(size={"height": 300, "width": 451}, crop_pct=1.0), image)[0]
    assert np.array_equal(whole, np.asarray(image.convert("RGB")).transpose(2, 0, 1))


def test_batches_of_mixed_sizes_equal_the_images_alone(processor_class):
    processor, cat = processor_class(), PIL.Image.open(CHELSEA)
    images = [cat, cat.crop((0, 0, 80, 200)), cat.resize((451, 300)).transpose(PIL.Image.Transpose.ROTATE_90), cat]
    together = processor(images, return_tensors="pt").pixel_values
    alone = torch.cat([processor(image, return_tensors="pt").pixel_values for image in images])
    assert torch.equal(together, alone)


# ------------------------------------------------------------------------------------------- kinds of pictures


def saved(image: PIL.Image.Image, path, **options) -> PIL.Image.Image:
    image.save(path, **options)
    return PIL.Image.open(path)


@pytest.mark.parametrize("mode", ["L", "LA", "P", "RGBA", "CMYK", "1", "YCbCr", "HSV"])
def test_every_mode_is_read_as_pillows_convert_does(processor_class, mode):
    image = PIL.Image.open(CHELSEA).convert("RGB").convert(mode)
    expected = pixels(processor_class(), image.convert("RGB"))
    assert np.array_equal(pixels(processor_class(), image), expected)


def test_sixteen_bit_grey_is_scaled_not_clipped(processor_class, tmp_path):
    grey = np.asarray(PIL.Image.open(CHELSEA).convert("L"))
    image = saved(PIL.Image.fromarray(grey.astype(np.uint16) * 257), tmp_path / "grey16.png")
    assert image.mode.startswith("I")
    expected = pixels(processor_class(), PIL.Image.fromarray(grey))
    assert np.array_equal(pixels(processor_class(), image), expected)
    assert np.array_equal(pixels(processor_class(), np.asarray(image)), expected)


def test_exif_rotation_is_applied(processor_class, tmp_path):
    upright = PIL.Image.open(CHELSEA).convert("RGB")
    exif = PIL.Image.Exif()
    exif[0x0112] = 6  # the camera was held so that the picture needs a quarter turn to the right
    turned = upright.transpose(PIL.Image.Transpose.ROTATE_90)
    image = saved(turned, tmp_path / "turned.png", exif=exif)
    assert np.array_equal(pixels(processor_class(), image), pixels(processor_class(), upright))
    assert np.array_equal(pixels(processor_class(), tmp_path / "turned.png"), pixels(processor_class(), upright))


def test_arrays_tensors_and_paths_equal_the_image(processor_class):
    image = PIL.Image.open(CHELSEA).convert("RGB")
    array, processor = np.asarray(image), processor_class()
    expected = pixels(processor, image)
    for other in (array, torch.from_numpy(array.copy()).permute(2, 0, 1), str(CHELSEA), CHELSEA, [CHELSEA]):
        assert np.array_equal(pixels(processor, other), expected)
    grey = array[..., 0]
    assert np.array_equal(pixels(processor, grey), pixels(processor, PIL.Image.fromarray(grey)))
    alpha = np.concatenate([array, np.full_like(array[..., :1], 7)], -1)
    assert np.array_equal(pixels(processor, alpha), expected)
    assert np.array_equal(pixels(processor, alpha.transpose(2, 0, 1)), expected)
    narrow = array[:, :4]  # four pixels wide is not four channels
    assert np.array_equal(pixels(processor, narrow), pixels(processor, PIL.Image.fromarray(narrow)))
    assert np.array_equal(pixels(processor, narrow.transpose(2, 0, 1)), pixels(processor, PIL.Image.fromarray(narrow)))


def test_mirrored_views_work_as_from_opencv(processor_class):
    bgr = np.asarray(PIL.Image.open(CHELSEA).convert("RGB"))[..., ::-1].copy()
    assert np.array_equal(pixels(processor_class(), bgr[..., ::-1]), pixels(processor_class(), CHELSEA))


def test_thirty_two_bit_grey_with_small_values_is_left_as_it_is(processor_class):
    grey = np.asarray(PIL.Image.open(CHELSEA).convert("L"))
    image = PIL.Image.fromarray(grey.astype(np.int32))
    assert image.mode == "I"
    assert np.array_equal(pixels(processor_class(), image), pixels(processor_class(), PIL.Image.fromarray(grey)))


def test_a_line_of_pixels_does_not_grow_to_gigabytes(processor_class):
    line = np.zeros((1, 10_000, 3), np.uint8)
    line[:, 4995:5005] = 255
    assert pixels(processor_class(), line)[0, :, :, 100:124].mean() > 250
    assert pixels(processor_class(), PIL.Image.new("RGB", (1, 1), (9, 9, 9))).max() == 9
    long = PIL.Image.new("RGB", (6000, 300))
    assert image_processing_vitae.without_far_ends(
        np.asarray(long).transpose(2, 0, 1), SizeDict(height=224, width=224)
    ).shape == (3, 300, 6000)


# ------------------------------------------------------------------------------------------- numbers of channels


def statistics(num_channels: int) -> dict:
    return {"image_mean": [0.1 * index for index in range(num_channels)], "image_std": [0.5] * num_channels}


@pytest.mark.parametrize(
    "wanted, shape, found",
    [
        (3, (13, 40, 50), 13),
        (3, (40, 50, 13), 13),
        (3, (2, 40, 50), 2),
        (13, (3, 40, 50), 3),
        (13, (40, 50, 1), 1),
        (4, (40, 50, 3), 3),
        (1, (40, 50, 3), 3),
        (1, (2, 40, 50), 2),
    ],
)
def test_pictures_of_other_numbers_of_channels_are_an_error_with_both(processor_class, wanted, shape, found):
    array = np.zeros(shape, np.uint8)
    layout = "channels_first" if shape[0] == found else "channels_last"
    processor = processor_class(size=32, **statistics(wanted))
    for picture, options in ((array, {}), (torch.from_numpy(array), {}), (array, {"input_data_format": layout})):
        with pytest.raises(ValueError, match=f"have numbers, {wanted}, got {found}"):
            processor(picture, **options)


def test_as_many_channels_are_taken_as_there_are_means(processor_class):
    processor = processor_class(size={"height": 40, "width": 50}, crop_pct=1.0, **statistics(13))
    array = np.random.default_rng(0).integers(0, 256, (13, 40, 50), dtype=np.uint8)
    expected = (array / 255 - np.array(processor.image_mean)[:, None, None]) / 0.5
    for picture in (array, array.transpose(1, 2, 0), torch.from_numpy(array), [array, array], np.stack([array] * 2)):
        values = processor(picture, return_tensors="pt").pixel_values
        assert values.shape[1:] == (13, 40, 50) and np.allclose(values[0], expected, atol=1e-5)
    rgba = PIL.Image.open(CHELSEA).convert("RGBA")
    assert processor_class(**statistics(4))(rgba, return_tensors="pt").pixel_values.shape == (1, 4, 224, 224)
    with pytest.raises(ValueError, match="a number for each channel, got 13 and 3 numbers"):
        processor_class(image_mean=[0.5] * 13)(array)


@pytest.mark.parametrize("dtype", ["uint16", "int16", "float32", ">f4"])
def test_what_satellites_measure_is_resized_in_its_own_unit(processor_class, dtype):
    array = np.linspace(0, 9000, 13 * 40 * 50).reshape(13, 40, 50).astype(dtype)
    processor = processor_class(size=20, crop_pct=1.0, do_rescale=False, do_normalize=False, **statistics(13))
    values = processor(array, return_tensors="pt").pixel_values[0]
    assert torch.allclose(values.mean((1, 2)), torch.tensor(array.mean((1, 2)).astype("float32")), atol=1)


@pytest.mark.parametrize("mode", ["L", "LA", "1", "RGB", "RGBA"])
def test_one_mean_is_for_grey_pictures_of_whatever_mode(processor_class, mode):
    processor, grey = processor_class(**statistics(1)), PIL.Image.open(CHELSEA).convert("L")
    picture = grey.convert(mode)
    assert np.array_equal(pixels(processor, picture), pixels(processor, picture.convert("L")))
    assert pixels(processor, np.asarray(grey)).shape == (1, 1, 224, 224)
    with pytest.raises(ValueError, match="have numbers, 1, got 3"):
        processor(CHELSEA)


def test_a_network_of_thirteen_channels_works_from_a_folder(processor_class, tiny_config, tmp_path):
    AutoModelForImageClassification.from_config(tiny_config(num_channels=13)).save_pretrained(tmp_path)
    processor_class(size=64, **statistics(13)).save_pretrained(tmp_path)
    array = np.random.default_rng(0).integers(0, 256, (70, 90, 13), dtype=np.uint8)
    classify = pipeline("image-classification", model=str(tmp_path))
    inputs = AutoImageProcessor.from_pretrained(tmp_path)(array, return_tensors="pt")
    expected = AutoModelForImageClassification.from_pretrained(tmp_path)(**inputs).logits.softmax(-1).max()
    assert classify(array)[0]["score"] == pytest.approx(expected.item(), abs=1e-5)
    with pytest.raises(ValueError, match="have numbers, 13, got 3"):
        classify(str(CHELSEA))


def test_pixels_that_are_rescaled_twice_get_the_librarys_warning(processor_class, monkeypatch):
    warnings = []
    monkeypatch.setattr(image_processing_vitae.logger, "warning_once", warnings.append)
    picture = np.asarray(PIL.Image.open(CHELSEA).convert("RGB"))
    for values, options in ((picture, {}), (picture.astype(float), {}), (picture / 255, {"do_rescale": False})):
        processor_class()(values, **options)
    assert not warnings
    processor_class()(picture / 255)
    assert "trying to rescale already rescaled images" in warnings[0] and len(warnings) == 1


# --------------------------------------------------------------------------------------------------- bad input


def test_an_empty_list_is_named(processor_class):
    with pytest.raises(ValueError, match="at least one picture, got an empty list"):
        processor_class()([])


@pytest.mark.parametrize("content", [b"not a picture", None])
def test_a_damaged_file_is_named(processor_class, tmp_path, content):
    path = tmp_path / "broken.png"
    path.write_bytes(content or CHELSEA.read_bytes()[:20000])
    with pytest.raises(ValueError, match="cannot read the image .*broken.png"):
        processor_class()(path)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"crop_pct": 0.0}, "`crop_pct` must be above 0 and at most 1, got 0.0"),
        ({"crop_pct": 1.5}, "`crop_pct` must be above 0"),
        ({"size": {"shortest_edge": 224}}, "`size` must have 'height' and 'width'"),
        ({"size": {"height": 30_000, "width": 30_000}}, "`size` over `crop_pct` must be whole pixels and at most"),
        ({"crop_pct": 1e-9}, "`size` over `crop_pct` must be whole pixels and at most 25,165,824 values, got 224×224"),
        ({"resample": 99}, "`resample` must be one of the filters"),
        ({"rescale_factor": float("inf")}, "`rescale_factor` must be a positive number, got inf"),
        ({"image_std": [0.5, 0.0, 0.5]}, "`image_std` must be finite numbers of at least 1e-06"),
        ({"image_mean": [0.5, 0.5, float("nan")]}, "`image_mean` must be finite numbers, got"),
        ({"image_mean": [0.5]}, "a number for each channel, got 1 and 3 numbers"),
        ({"do_center_crop": False}, "leave `do_center_crop` and `crop_size` out"),
        ({"crop_size": {"height": 100, "width": 100}}, "leave `do_center_crop` and `crop_size` out"),
    ],
)
def test_wrong_options_are_named(processor_class, options, message):
    with pytest.raises(ValueError, match=message):
        processor_class()(PIL.Image.open(CHELSEA), **options)


def test_pictures_that_eight_bits_would_make_black_are_refused_or_told(processor_class, caplog):
    fractions = PIL.Image.fromarray(np.linspace(0, 1, 4096, dtype=np.float32).reshape(64, 64))
    with pytest.raises(ValueError, match="floating-point numbers from 0 to 1: save it with 8 or 16 bits"):
        processor_class()(fractions)
    missing = np.full((64, 64), 200.0, np.float32)
    missing[0, 0] = np.nan
    with pytest.raises(ValueError, match="not all values of the picture are finite"):
        processor_class()(PIL.Image.fromarray(missing))
    with pytest.raises(ValueError, match="not all values of the picture are finite"):
        processor_class()(np.stack([missing] * 3))
    filtered = np.full((64, 64), 200.0, np.float32)
    filtered[0, :10] = 262  # as filters leave it at edges
    assert np.asarray(image_processing_vitae.to_rgb(PIL.Image.fromarray(filtered))).mean() > 199
    logging.warning_once.cache_clear()
    processor_class()(PIL.Image.fromarray(np.full((64, 64), 3990, np.uint16)))
    assert "A picture of 16 bits has no value above 3990" in caplog.text
    processor_class()(np.full((64, 64, 3), 60_000, np.int32))
    assert "Pixels up to 60000 are multiplied by 0.00392, which gives more than 1" in caplog.text


def test_a_picture_as_long_as_the_output_is_not_cut(processor_class):
    rows = np.tile(np.linspace(0, 255, 800), (20, 1)).astype(np.uint8)
    processor = processor_class(size={"height": 16, "width": 640}, crop_pct=1.0, do_rescale=False, do_normalize=False)
    pixels = processor(np.stack([rows] * 3, -1), return_tensors="np").pixel_values[0]
    assert pixels.shape == (3, 16, 640) and pixels.min() < 3 and pixels.max() > 252


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tensors_of_any_kind_are_pictures(processor_class, dtype):
    picture = torch.full((3, 32, 32), 128.0, dtype=dtype, requires_grad=True)
    pixels = processor_class(size=32, do_normalize=False)(picture, return_tensors="pt").pixel_values
    assert torch.allclose(pixels.float(), torch.tensor(128 / 255), atol=3e-3)


def test_an_array_of_no_pictures_is_told(processor_class):
    with pytest.raises(ValueError, match=r"expected at least one picture, got an array of shape \(0, 30, 30, 3\)"):
        processor_class()(np.zeros((0, 30, 30, 3), np.uint8))


def test_pushing_while_saving_uploads_the_code(processor_class, tmp_path, monkeypatch):
    """The library uploads what is newer than before the saving, and compares times of files."""
    uploaded = []

    def upload(self, working_dir, repo_id, files_timestamps, **options):
        files = {path.name: path.stat().st_mtime for path in Path(working_dir).iterdir()}
        uploaded.append({name for name, time in files.items() if time > files_timestamps.get(name, 0)})

    monkeypatch.setattr(PushToHubMixin, "_upload_modified_files", upload)
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **_: SimpleNamespace(repo_id=name))
    processor_class().save_pretrained(str(tmp_path / "processor"), push_to_hub=True, repo_id="org/name")
    config_from_preset("vitae-nano").save_pretrained(str(tmp_path / "config"), push_to_hub=True, repo_id="org/name")
    assert uploaded[0] == {"preprocessor_config.json", "image_processing_vitae.py"}
    assert uploaded[1] >= {"config.json", "configuration_vitae.py", "modeling_vitae.py", "layers_vitae.py"}


def test_a_crop_that_is_no_number_and_a_picture_without_pixels_are_named(processor_class, tmp_path):
    processor_class().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="`crop_pct` must be above 0 and at most 1, got None"):
        processor_class.from_pretrained(tmp_path, crop_pct=None)(PIL.Image.open(CHELSEA))
    for empty in (np.zeros((0, 50, 3), np.uint8), np.zeros((50, 0, 3), np.float32)):
        with pytest.raises(ValueError, match="the picture has no pixels: its shape is "):
            processor_class()(empty)


# -------------------------------------------------------------------------------------------------- auto class


def test_the_auto_class_gives_either_backend(processor_class, tmp_path):
    processor_class(size=64, crop_pct=0.8).save_pretrained(tmp_path)
    for backend, expected in {**BACKENDS, None: ViTAEImageProcessor}.items():
        processor = AutoImageProcessor.from_pretrained(tmp_path, backend=backend)
        assert type(processor) is expected
        assert (dict(processor.size), processor.crop_pct) == ({"height": 64, "width": 64}, 0.8)


def test_without_torchvision_the_class_says_what_to_install(monkeypatch):
    monkeypatch.setattr(image_processing_vitae, "is_torchvision_available", lambda: False)
    with pytest.raises(ImportError, match="pip install torchvision.*ViTAEImageProcessorPil"):
        ViTAEImageProcessor()
