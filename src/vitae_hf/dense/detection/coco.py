# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Folders with COCO's JSON files and their pictures, read as `datasets`."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import datasets
import PIL.Image

from ...data.folders import SPLITS, kind_of, split_of, walk, words_of
from ...messages import listed, printable


FEATURES = {
    "bbox": datasets.List(datasets.List(datasets.Value("float64"))),
    "iscrowd": datasets.List(datasets.Value("float64")),
    "area": datasets.List(datasets.Value("float64")),
    "segmentation": datasets.List(datasets.Value("string")),  # JSON, since polygons and run lengths occur side by side
}


OTHER_FORMATS = {
    ".txt": "YOLO's format; convert them to COCO's, as the package supervision does",
    ".xml": "Pascal VOC's format; convert them to COCO's, as the package supervision does",
    ".json": "LabelMe's format; convert them to COCO's",
}
"""What labels are in that are not read, and what to do, by the ending of the file that each picture has."""


def find_annotations(folder: Path) -> dict[str, Path]:
    """The JSON file of each split: `annotations/instances_val2017.json`, `valid/_annotations.coco.json` and the like.

    Where names begin with "instances", as COCO's own do, others (captions, key points) are left alone.

    Returns:
        None at all if the folder has metadata or shards, which are no COCO.

    Raises:
        ValueError: several files are of one split, or there is none and each picture has a file of its own.
    """
    everything = sorted(walk(folder))
    if {kind_of(path) for path in everything} - {None, "pictures"}:
        return {}
    pictures = {path.stem for path in everything if kind_of(path) == "pictures"}
    files = [path for path in everything if path.suffix == ".json"]
    beside = [path for path in files if path.stem in pictures]
    if beside and '"shapes"' in beside[0].read_text(encoding="utf-8"):
        files = [path for path in files if path.stem not in pictures]  # those of LabelMe have a list of shapes
    of_a_picture = {path.suffix for path in everything if path.stem in pictures}
    if not files and (others := [words for ending, words in OTHER_FORMATS.items() if ending in of_a_picture]):
        raise ValueError(f"the labels in {folder} are in {others[0]}")
    files = [path for path in files if path.stem.startswith("instances")] or files
    found: dict[str, list[Path]] = {}
    for path in files:
        words = [SPLITS[word] for word in words_of(path.stem) if word in SPLITS]
        found.setdefault(words[0] if words else split_of(path.parent.name) or "train", []).append(path)
    for split, paths in found.items():
        if len(paths) > 1:
            raise ValueError(f"{folder} has several files for the split {split!r}: {listed(paths)}; keep one of them")
    return {split: paths[0] for split, paths in found.items()}


def load_coco(folder: Path, files: dict[str, Path]) -> datasets.DatasetDict:
    """The splits of a folder, with the undecoded column `image`, and `objects` with COCO's names of the classes.

    Raises:
        ValueError: a file is no COCO, its ids are not unique or lead nowhere, a picture is missing, or the splits have
            different classes. The message names the picture where there is one.
    """
    contents = {split: read_coco(path) for split, path in files.items()}
    classes = {split: {c["id"]: c["name"] for c in content["categories"]} for split, content in contents.items()}
    first = next(iter(classes))
    for split, names in classes.items():
        if names != classes[first]:
            raise ValueError(f"{files[split]} has other categories than {files[first]}: {listed(names.values())}")
    ids = sorted(classes[first], key=lambda number: (isinstance(number, str), number))
    ordered = [classes[first][number] for number in ids]
    if repeated := [name for name, count in Counter(ordered).items() if count > 1]:
        raise ValueError(f"{files[first]} has several categories called {listed(repeated)}")
    category = datasets.List(datasets.ClassLabel(names=ordered))
    features = datasets.Features({"image": datasets.Image(decode=False), "objects": {**FEATURES, "category": category}})
    numbers = {number: label for label, number in enumerate(ids)}
    return datasets.DatasetDict(
        {
            split: datasets.Dataset.from_list(
                rows_of(content, files[split], find_pictures(content, folder, files[split], split), numbers),
                features=features,
            )
            for split, content in contents.items()
        }
    )


def read_coco(path: Path) -> dict[str, Any]:
    """The contents of a JSON file.

    Raises:
        ValueError: it is no JSON, or lacks a part of COCO's.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is no JSON: {error}") from None
    parts = ("images", "annotations", "categories")
    if not isinstance(content, dict) or not all(isinstance(content.get(part), list) for part in parts):
        raise ValueError(f"{path} must hold the lists {', '.join(parts)}, as COCO's annotations do")
    for part, keys in (("images", ("id", "file_name")), ("annotations", ("image_id",)), ("categories", ("id", "name"))):
        for number, entry in enumerate(content[part]):
            if not is_entry(entry, keys):
                wanted = f"{' and '.join(keys)}, ids as numbers or texts and names as texts"
                raise ValueError(f"entry {number} of {part} in {path} must have {wanted}, got {printable(entry)}")
        counts = Counter(entry["id"] for entry in content[part] if "id" in entry)
        repeated = {entry["id"]: entry for entry in content[part] if counts.get(entry.get("id"), 0) > 1}
        if repeated:
            said = listed(f"{number} ({name_of(entry, content)})" for number, entry in repeated.items())
            raise ValueError(f"{path} has several {part} with the id {said}")
    return content


def is_entry(entry: Any, keys: tuple[str, ...]) -> bool:
    """Whether an entry has these keys, with texts for names and numbers or texts for ids."""
    if not isinstance(entry, dict) or any(entry.get(key) is None for key in keys):
        return False
    given = [key for key in (*keys, "id", "category_id") if entry.get(key) is not None]
    return all(isinstance(entry[key], str if key in ("file_name", "name") else (int, str)) for key in given)


def name_of(entry: dict[str, Any], content: dict[str, Any]) -> str:
    """What a message calls an image, a category, or an annotation, which goes by its picture."""
    if "image_id" not in entry:
        return str(entry.get("file_name", entry.get("name")))
    return next((image["file_name"] for image in content["images"] if image["id"] == entry["image_id"]), "no picture")


def find_pictures(content: dict[str, Any], folder: Path, path: Path, split: str) -> Path:
    """The folder below which the pictures of a split lie.

    Raises:
        ValueError: there is no such folder, or one of the pictures is missing in it.
    """
    roots = [folder, folder / "images"]
    below = [child for root in roots if root.is_dir() for child in sorted(root.iterdir()) if child.is_dir()]
    places = [path.parent, path.parent / "images", *[c for c in below if split_of(c.name) == split], *roots]
    names = [image["file_name"] for image in content["images"]]
    best = min(places, key=lambda place: sum(not (place / name).is_file() for name in names[:20]))
    missing = [name for name in names if not (best / name).is_file()]
    if missing:
        raise ValueError(f"{path} names pictures that are missing in {best}: {listed(missing)}")
    check_sizes(content, path, best)
    return best


def check_sizes(content: dict[str, Any], path: Path, pictures: Path, most: int = 100) -> None:
    """See that pictures, some of them if there are many, have the sizes that the file at `path` gives.

    Raises:
        ValueError: one has another, as if it had been resized since its boxes were drawn.
    """
    images = content["images"]
    for image in images[:: -(-len(images) // most) or 1]:
        given = image.get("width"), image.get("height")
        try:
            with PIL.Image.open(pictures / image["file_name"]) as picture:
                size = picture.size
        except Exception:  # a damaged picture is named as it is decoded
            continue
        if all(isinstance(side, (int, float)) and side > 0 for side in given) and given not in (size, size[::-1]):
            raise ValueError(
                f"{path} gives {image['file_name']} {given[0]}×{given[1]} pixels, but it has {size[0]}×{size[1]}:"
                " its boxes are those of the first size"
            )


def rows_of(content: dict[str, Any], path: Path, pictures: Path, numbers: dict[Any, int]) -> list[dict[str, Any]]:
    """A row for each picture.

    Args:
        content: of the file at `path`.
        pictures: folder of the pictures.
        numbers: of the classes by their ids.

    Raises:
        ValueError: an annotation is of a picture or a category that there is none of.
    """
    objects: dict[Any, dict[str, list[Any]]] = {
        image["id"]: {key: [] for key in (*FEATURES, "category")} for image in content["images"]
    }
    for annotation in content["annotations"]:
        which = f"annotation {annotation.get('id', '')}".strip()
        if annotation["image_id"] not in objects:
            raise ValueError(f"{path}: {which} is of picture {annotation['image_id']!r}, which is none of the images")
        if annotation.get("category_id") not in numbers:
            raise ValueError(
                f"{path}: {which}, of picture {name_of(annotation, content)}, has the category"
                f" {annotation.get('category_id')!r}, which is none of the {len(numbers)} categories"
            )
        row, box, segmentation = objects[annotation["image_id"]], annotation.get("bbox"), annotation.get("segmentation")
        row["bbox"].append([number_or_none(value) for value in box] if isinstance(box, list) else [])
        row["category"].append(numbers[annotation["category_id"]])
        row["iscrowd"].append(number_or_none(annotation.get("iscrowd", 0)))
        row["area"].append(number_or_none(annotation.get("area")))
        row["segmentation"].append(json.dumps(segmentation) if segmentation else None)
    return [
        {"image": {"bytes": None, "path": str(pictures / image["file_name"])}, "objects": objects[image["id"]]}
        for image in content["images"]
    ]


def number_or_none(value: Any) -> float | None:
    """The value, if it is one that a column of numbers can hold."""
    return float(value) if isinstance(value, (int, float)) else None
