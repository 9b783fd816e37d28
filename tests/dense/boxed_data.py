"""Small data sets with boxes, in each of the forms that are read."""

import copy
import json
from pathlib import Path

import PIL.Image


WIDTH, HEIGHT = 40, 30
SQUARE = [5.0, 5.0, 25.0, 5.0, 25.0, 25.0, 5.0, 25.0]  # a polygon
COCO = {
    "images": [
        {"id": 7, "file_name": "a.png", "width": WIDTH, "height": HEIGHT},
        {"id": 8, "file_name": "b.png", "width": WIDTH, "height": HEIGHT},
    ],
    "categories": [{"id": 3, "name": "cat"}, {"id": 5, "name": "dog"}],
    "annotations": [
        {"id": 1, "image_id": 7, "category_id": 5, "bbox": [5, 5, 20, 20], "segmentation": [SQUARE], "iscrowd": 0},
        {
            "id": 2,
            "image_id": 7,
            "category_id": 3,
            "bbox": [0, 0, 10, 30],
            "segmentation": {"size": [HEIGHT, WIDTH], "counts": [0, 10 * HEIGHT, 30 * HEIGHT]},
            "area": 290,  # fewer pixels than in its box and its mask
            "iscrowd": 1,
        },
    ],
}


def write_pictures(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        PIL.Image.new("RGB", (WIDTH, HEIGHT), "grey").save(folder / name)


def write_coco(folder: Path, content: dict = COCO) -> Path:
    """COCO's own layout, with two splits of the same pictures."""
    for split in ("train", "val"):
        write_pictures(folder / f"{split}2017", "a.png", "b.png")
        path = folder / "annotations" / f"instances_{split}2017.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps(content))
    return folder


def changed(part: str, index: int = 0, **values) -> dict:
    """COCO's content with other values in an entry of one of its lists; `None` takes a value out."""
    content = copy.deepcopy(COCO)
    entry = content[part][index]
    for name, value in values.items():
        entry[name] = value
    content[part][index] = {name: value for name, value in entry.items() if value is not None}
    return content
