# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures through `datasets`, with labels or without, whatever form they are kept in."""

from collections.abc import Iterable

import datasets


def load_labelled_images(
    source: str, name: str | None = None, splits: list[str] | None = None, names: list[str] | None = None
) -> datasets.DatasetDict:
    """Load a data set by Hub name or local folder: parquet files, WebDataset tars, or one folder of images per class.

    Args:
        source: as `datasets.load_dataset` takes it.
        name: its configuration, where it has several.
        splits: read the files of these alone; default: all.
        names: of the classes, where the data set does not have them.

    Returns:
        Its splits, with the pictures in a column `image` that is not decoded yet and the labels in a column `label`.

    Raises:
        ValueError: there is no single column of images and of labels, or no names for the labels; the message lists the
            columns.
    """
    data = _load(source, name, splits)
    columns = find_columns(next(iter(data.values())).features, source)
    data = data.select_columns(list(columns))
    data = data.rename_columns({column: role for column, role in columns.items() if column != role})
    label = next(iter(data.values())).features["label"]
    if not isinstance(label, datasets.ClassLabel):
        if names is None:
            raise ValueError(f"the labels of {source} are numbers without names: give the names of the classes")
        data = data.cast_column("label", datasets.ClassLabel(names=names))
    return data.cast_column("image", datasets.Image(decode=False))


def load_images(source: str, name: str | None = None, splits: list[str] | None = None) -> datasets.DatasetDict:
    """As [`load_labelled_images`], but with the column `image` alone, whether there are labels or not.

    A folder may hold images anywhere.

    Raises:
        ValueError: there is no single column of images; the message lists the columns.
    """
    data = _load(source, name, splits)
    image = find_image(next(iter(data.values())).features, source)
    data = data.select_columns([image])
    if image != "image":
        data = data.rename_column(image, "image")
    return data.cast_column("image", datasets.Image(decode=False))


def _load(source: str, name: str | None, splits: list[str] | None) -> datasets.DatasetDict:
    only = {}
    if splits is not None:
        builder = datasets.load_dataset_builder(source, name)
        only["data_files"] = {split: list(builder.config.data_files[split]) for split in splits}
        only["features"] = builder.info.features
    return datasets.load_dataset(source, name, **only)


def find_image(features: datasets.Features, source: str) -> str:
    """The only column of pictures.

    Raises:
        ValueError: there is none, or several.
    """
    images = [column for column, feature in features.items() if isinstance(feature, datasets.Image)]
    if len(images) != 1:
        raise ValueError(f"{source} must have one column for the images, got {images} of {features}")
    return images[0]


def find_columns(features: datasets.Features, source: str) -> dict[str, str]:
    """Which columns are the `image` and the `label`: the only pictures, and the only class labels, else whole numbers
    that are called label, labels or, as in WebDataset, cls.

    Raises:
        ValueError: there is not one of each.
    """
    image = find_image(features, source)
    labels = [column for column, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if not labels:
        numbers = (column for column in ("label", "labels", "cls") if column in features)
        labels = [column for column in numbers if "int" in getattr(features[column], "dtype", "")]
    if len(labels) != 1:
        raise ValueError(f"{source} must have one column for the labels, got {labels} of {features}")
    return {image: "image", labels[0]: "label"}


def pick_split(available: Iterable[str], *names: str) -> str:
    """The first of these splits that there is.

    Raises:
        ValueError: none is; the message lists those there are.
    """
    for name in names:
        if name in available:
            return name
    listed = ", ".join(repr(str(name)) for name in available)
    raise ValueError(f"there is no split {' or '.join(map(repr, names))}; there are {listed}")


def class_names(splits: datasets.DatasetDict) -> dict[int, str]:
    """Class names by label, for `id2label`."""
    return dict(enumerate(next(iter(splits.values())).features["label"].names))
