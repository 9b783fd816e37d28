"""Boxes, classes and masks of objects: read from every form, and what is wrong with them named with the picture."""

import copy
import json

import datasets
import numpy as np
import PIL.Image
import pytest
from boxed_data import COCO, HEIGHT, SQUARE, WIDTH, changed, write_coco, write_pictures

from vitae_hf.dense.detection.data import DetectionDataset, load_boxed_images
from vitae_hf.dense.detection.objects import as_mask, read_objects


def read_split(folder, split: str = "train", with_masks: bool = True, **options) -> DetectionDataset:
    data, names = load_boxed_images(str(folder), **options)
    return DetectionDataset(data[split], None, names, with_masks)


def test_cocos_boxes_classes_masks_and_crowds_are_read(tmp_path):
    data = read_split(write_coco(tmp_path), "validation")
    data.check()
    picture, objects, name = data.read(0)
    assert picture.size == (WIDTH, HEIGHT) and name.endswith("val2017/a.png") and list(data.numbers) == ["cat", "dog"]
    assert objects.boxes.tolist() == [[5, 5, 25, 25], [0, 0, 10, 30]] and objects.labels.tolist() == [1, 0]
    assert objects.is_crowd.tolist() == [False, True] and objects.areas.tolist() == [400, 290]
    masks = objects.pixels(HEIGHT, WIDTH)
    assert masks[0, 5:25, 5:25].all() and masks[0].sum() == 400 and masks[1, :, :10].all() and masks[1].sum() == 300
    assert len(objects.single()) == 1 and len(data.read(1)[1]) == 0
    data.transform = lambda picture, objects: (picture, objects.labels.tolist())
    assert data[0]["labels"] == [1]  # the crowd is no target


@pytest.mark.parametrize("name, format", [("a.txt", "YOLO's"), ("a.xml", "Pascal VOC's"), ("a.json", "LabelMe's")])
def test_labels_in_another_format_are_named_unless_there_are_cocos_too(tmp_path, name, format):
    write_pictures(tmp_path / "images", "a.png", "b.png")
    (tmp_path / "labels").mkdir()
    (tmp_path / "labels" / name).write_text('{"shapes": []}')
    with pytest.raises(ValueError, match=f"are in {format} format; convert them to COCO's"):
        load_boxed_images(str(tmp_path))
    assert len(read_split(write_coco(tmp_path), "validation")) == len(COCO["images"])


def test_cocos_file_may_be_called_as_a_picture_is(tmp_path):
    write_pictures(tmp_path, "a.png", "b.png")
    (tmp_path / "a.json").write_text(json.dumps(COCO))
    assert len(read_split(tmp_path)) == len(COCO["images"])


def test_a_folder_of_each_split_with_its_own_json_is_read(tmp_path):
    """As Roboflow writes it."""
    for split in ("train", "valid"):
        write_pictures(tmp_path / split, "a.png", "b.png")
        (tmp_path / split / "_annotations.coco.json").write_text(json.dumps(COCO))
    data, names = load_boxed_images(str(tmp_path))
    assert set(data) == {"train", "validation"} and names == {0: "cat", 1: "dog"}


@pytest.mark.parametrize(
    "objects",
    [
        {"bbox": [[5, 5, 20, 20]], "categories": ["dog"]},
        [{"bbox": [5, 5, 20, 20], "label": "dog", "segmentation": [SQUARE]}],
        [{"bbox": [5, 5, 20, 20], "label": "dog", "segmentation": [[SQUARE[i : i + 2] for i in range(0, 8, 2)]]}],
    ],
    ids=["a dict of lists", "a list of dicts", "pairs in lists of their own"],
)
def test_metadata_beside_the_pictures_is_read_and_text_stands_for_a_class(tmp_path, objects):
    write_pictures(tmp_path / "train", "a.png", "b.png")
    empty = {key: [] for key in objects} if isinstance(objects, dict) else []
    rows = [{"file_name": "a.png", "objects": objects}, {"file_name": "b.png", "objects": empty}]
    (tmp_path / "train" / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")
    data = read_split(tmp_path, with_masks=isinstance(objects, list))
    data.check()
    assert list(data.numbers) == ["dog"] and data.read(0)[1].boxes.tolist() == [[5, 5, 25, 25]]
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert read_split(tmp_path, with_masks=False, file=tmp_path / "names.txt").read(0)[1].labels.tolist() == [1]


def test_the_scenes_have_a_mask_in_every_box(scenes):
    data, names = load_boxed_images("examples/garment_scenes")
    objects = DetectionDataset(data["validation"], None, names, with_masks=True).read(0)[1]
    masks = objects.pixels(96, 128)
    for box, mask in zip(objects.boxes.astype(int), masks):
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        assert box.tolist() == [columns[0], rows[0], columns[-1] + 1, rows[-1] + 1]
    semantic = np.asarray(scenes.cast_column("mask", datasets.Image())["validation"][0]["mask"])
    assert all((semantic[mask > 0] == label).all() for mask, label in zip(masks, objects.labels))


BAD = {
    "three numbers": (("annotations", 0, {"bbox": [1, 2, 3]}), r"\[1.0, 2.0, 3.0\], which must be four numbers"),
    "text in a box": (("annotations", 0, {"bbox": [1, 2, 3, "x"]}), "which must be four numbers"),
    "no box": (("annotations", 0, {"bbox": None}), r"\[\], which must be"),
    "not finite": (("annotations", 0, {"bbox": [1, 2, 3, float("nan")]}), "whose numbers must be finite"),
    "empty": (("annotations", 0, {"bbox": [5, 5, 0, 20]}), "an empty box, 0 wide and 20 high"),
    "outside": (("annotations", 0, {"bbox": [30, 5, 20, 20]}), "from 30, 5 to 50, 25, outside the picture of 40×30"),
    "crowd": (("annotations", 0, {"iscrowd": 2}), "2.0 for iscrowd, which must be 0 or 1"),
    "no mask": (("annotations", 0, {"segmentation": None}), "no mask, which this detector needs"),
    "a number for a mask": (
        ("annotations", 0, {"segmentation": 5}),
        "the mask 5, which must be polygons or run lengths",
    ),
    "words in a polygon": (
        ("annotations", 0, {"segmentation": [["a", "b"] * 3]}),
        "a polygon that is no list of numbers",
    ),
    "odd polygon": (("annotations", 0, {"segmentation": [[1, 2, 3, 4, 5]]}), "pairs of x and y, three pairs at least"),
    "polygon outside": (("annotations", 0, {"segmentation": [[1, 2, 99, 4, 5, 6]]}), "a polygon outside"),
    "empty mask": (("annotations", 0, {"segmentation": [[1, 1] * 3]}), "a mask without a pixel"),
    "mask of another size": (
        ("annotations", 1, {"segmentation": {"size": [9, 9], "counts": [81]}}),
        r"a mask of size \[9, 9\], but the picture is 30 high and 40 wide",
    ),
    "run lengths of another size": (
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": [9]}}),
        "run lengths for 9 pixels, but the picture has 1200",
    ),
    "negative run lengths": (
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": [-5, 1205]}}),
        "run lengths that are not all whole numbers from 0 on",
    ),
    "damaged run lengths": (
        ("annotations", 1, {"segmentation": {"size": [30, 40], "counts": "oooooooooooooooo"}}),
        "run lengths that cannot be decoded",
    ),
}


@pytest.mark.parametrize("kind", list(BAD))
def test_a_bad_annotation_is_named_with_its_picture_before_training(tmp_path, kind):
    (part, index, values), message = BAD[kind]
    write_coco(tmp_path, changed(part, index, **values))
    with pytest.raises(ValueError, match=f"train2017/a.png: object {index} .*{message}.*--on_bad_object skip"):
        read_split(tmp_path).check()


BROKEN = {
    "unknown class": (changed("annotations", category_id=9), r"annotation 1, of picture a.png, has the category 9"),
    "unknown picture": (
        changed("annotations", image_id=9),
        "annotation 1 is of picture 9, which is none of the images",
    ),
    "annotation twice": (changed("annotations", 1, id=1), r"several annotations with the id 1 \(a.png\)"),
    "picture twice": (changed("images", 1, id=7), r"several images with the id 7 \(b.png\)"),
    "missing picture": (changed("images", file_name="c.png"), "names pictures that are missing in .*train2017: c.png"),
    "no categories": ({**COCO, "categories": None}, "must hold the lists images, annotations, categories"),
    "a list for an id": (
        changed("images", id=[1]),
        "entry 0 of images in .* must have id and file_name, ids as numbers or .*1",
    ),
    "a number for a file": (changed("images", file_name=5), "entry 0 of images in .* must have id and file_name"),
    "no file name": (changed("images", file_name=None), "entry 0 of images in .* must have id and file_name"),
    "another size": (
        changed("images", 1, width=640, height=480),
        r"gives b.png 640×480 pixels, but it has 40×30: its boxes",
    ),
    "names twice": (changed("categories", name="dog"), "several categories called dog"),
}


@pytest.mark.parametrize("kind", list(BROKEN))
def test_a_json_that_contradicts_itself_is_refused_in_one_sentence(tmp_path, kind):
    content, message = BROKEN[kind]
    write_coco(tmp_path, content)
    with pytest.raises(ValueError, match=message):
        load_boxed_images(str(tmp_path))


def test_what_is_no_json_and_splits_with_other_classes_are_refused(tmp_path):
    path = write_coco(tmp_path) / "annotations" / "instances_val2017.json"
    path.write_text(json.dumps(changed("categories", name="cow")))
    with pytest.raises(ValueError, match="instances_val2017.json has other categories than .*instances_train2017.json"):
        load_boxed_images(str(tmp_path))
    path.write_text("{")
    with pytest.raises(ValueError, match="instances_val2017.json is no JSON"):
        load_boxed_images(str(tmp_path))


def test_bad_objects_can_be_left_out(tmp_path):
    write_coco(tmp_path, changed("annotations", bbox=[5, 5, 0, 20]))
    data, names = load_boxed_images(str(tmp_path))
    data = DetectionDataset(data["train"], None, names, on_bad_object="skip")
    data.check()
    assert data.read(0)[1].labels.tolist() == [0]


def test_boxes_that_rounding_put_a_pixel_outside_are_clipped():
    objects, problems = read_objects({"bbox": [[-0.6, 0, 41.2, 30.4]], "category": [0]}, 1, HEIGHT, WIDTH)
    assert problems == [] and objects.boxes.tolist() == [[0, 0, 40, 30]]


def test_boxes_may_be_corners(tmp_path):
    write_coco(tmp_path, changed("annotations", bbox=[5, 5, 38, 25]))
    data, names = load_boxed_images(str(tmp_path))
    with pytest.raises(
        ValueError, match="outside the picture of .*, --box_format xyxy reads boxes as left, top, right"
    ):
        DetectionDataset(data["train"], None, names).check()
    corners = DetectionDataset(data["train"], None, names, box_format="xyxy")
    corners.check()
    objects = corners.read(0)[1]
    assert objects.boxes.tolist() == [[5, 5, 38, 25], [0, 0, 10, 30]] and objects.areas.tolist() == [660, 290]
    write_coco(tmp_path / "other", changed("annotations", bbox=[5, 5, 5, 25]))
    data, names = load_boxed_images(str(tmp_path / "other"))
    with pytest.raises(ValueError, match="has an empty box, 0 wide and 20 high; --on_bad_object skip leaves such"):
        DetectionDataset(data["train"], None, names, box_format="xyxy").check()


@pytest.mark.parametrize(
    "objects, message",
    [
        ({"bbox": [[0, 0, 1, 1]], "category": []}, "its objects differ in number: 1 bbox, 0 category"),
        ({"bbox": [[0, 0, 1, 1]], "category": [2]}, "object 0 is of class 2, but there are 2 classes, counted from 0"),
        ({"bbox": [[0, 0, 1, 1]], "category": ["cow"]}, "object 0 is of class 'cow', but there are 2 classes"),
        ({"bbox": [[0, 0, 1, 1]], "category": [None]}, "object 0 has no class"),
    ],
)
def test_classes_that_do_not_exist_are_named(objects, message):
    found, problems = read_objects(objects, 2, HEIGHT, WIDTH)
    assert len(found) == 0 and len(problems) == 1 and problems[0].startswith(message)


def test_a_mask_is_the_same_in_all_three_codes():
    polygon = as_mask([SQUARE], HEIGHT, WIDTH)
    compressed = {"size": [HEIGHT, WIDTH], "counts": polygon["counts"].decode()}
    assert as_mask(compressed, HEIGHT, WIDTH) == as_mask(json.dumps([SQUARE]), HEIGHT, WIDTH) == polygon
    counts = [5 * HEIGHT + 5]
    for _ in range(19):
        counts += [20, 10]
    counts += [20, HEIGHT * WIDTH - sum(counts) - 20]
    assert as_mask({"size": [HEIGHT, WIDTH], "counts": counts}, HEIGHT, WIDTH) == polygon


def test_other_names_than_those_of_the_data_are_refused(tmp_path):
    """They would make dogs of cats."""
    (tmp_path / "names.txt").write_text("dog\ncat\n")
    with pytest.raises(ValueError, match="names its classes itself, cat, dog: leave --class_names out"):
        load_boxed_images(str(write_coco(tmp_path / "coco")), file=tmp_path / "names.txt")
    (tmp_path / "names.txt").write_text("cat\ndog\n")
    assert load_boxed_images(str(tmp_path / "coco"), file=tmp_path / "names.txt")[1] == {0: "cat", 1: "dog"}


def test_of_several_columns_those_that_are_named_are_read(tmp_path):
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    objects["category"] = datasets.List(datasets.Value("string"))
    columns = {name: copy.copy(objects) for name in ("objects", "annotations", "by_hand")}
    features = datasets.Features({"image": datasets.Image(), "img": datasets.Image(), **columns})
    row = {name: {"bbox": [[0, 0, 4, 4]], "category": [name]} for name in columns}
    row |= {"image": PIL.Image.new("RGB", (8, 8)), "img": PIL.Image.new("RGB", (6, 5))}
    datasets.Dataset.from_list([row], features=features).to_parquet(tmp_path / "a.parquet")
    data, names = load_boxed_images(str(tmp_path), image_column="img", objects_column="by_hand")
    assert names == {0: "by_hand"} and DetectionDataset(data["train"], None, names).read(0)[0].size == (6, 5)
    for chosen, message in [
        (
            {"image_column": "img"},
            r"several columns of objects, \['objects', 'annotations'\]: .* --objects_column_name",
        ),
        ({"objects_column": "objects"}, "several columns of images, .* --image_column_name"),
        ({"image_column": "img", "objects_column": "img"}, "has no objects in a column 'img'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_boxed_images(str(tmp_path), **chosen)


def test_data_without_objects_or_names_say_what_was_expected(tmp_path):
    picture = PIL.Image.new("RGB", (8, 8))
    objects = {"bbox": datasets.List(datasets.List(datasets.Value("float32")))}
    features = datasets.Features({"image": datasets.Image(), "objects": objects})
    rows = [{"image": picture, "objects": {"bbox": [[0, 0, 4, 4]]}}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(
        ValueError, match="must have a column of objects, got .*; one that is called objects, .* a list `category`"
    ):
        load_boxed_images(str(tmp_path))
    objects["category"] = datasets.List(datasets.Value("int64"))
    rows[0]["objects"]["category"] = [1]
    features = datasets.Features({"image": datasets.Image(), "objects": copy.copy(objects)})
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    with pytest.raises(ValueError, match="are numbers without names: give the names by --class_names"):
        load_boxed_images(str(tmp_path))
