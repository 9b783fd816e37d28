# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How good is a detector on pictures with boxes and masks, each whole and through its image processor?"""

from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ...data.samples import evenly_spread, rows_as_read
from ...evaluation.average_precision import LEAST_SCORE, MeanAveragePrecision, as_prediction
from ...evaluation.detections import draw_found, find_objects
from ...loading import label_names
from .data import DetectionDataset


def detection_figures(model: Any, processor: Any, data: DetectionDataset, num_workers: int = 0) -> dict[str, Any]:
    """The figures of [`MeanAveragePrecision`] over a split; of masks too if the data need them.

    Args:
        model: any detector of the library, Mask2Former, or one of this package's R-CNNs.
        processor: its image processor.
        data: whose rows are only read.
        num_workers: processes that read them.
    """
    metric = MeanAveragePrecision(list(label_names(model.config).values()), data.with_masks)
    for picture, objects, _ in tqdm(rows_as_read(data, num_workers), unit=" images"):
        found = find_objects(model, processor, picture, LEAST_SCORE)
        metric.add(prediction=as_prediction(found), reference=vars(objects))
    return metric.compute()


def predictions(model: Any, processor: Any, data: DetectionDataset, map_percent: float, pictures: int = 8) -> Figure:
    """Some pictures of a split, evenly spread, with what is there beside what was found."""
    rows = []
    for index in evenly_spread(len(data), pictures):
        picture, objects, _ = data.read(index)
        truth: dict[str, Any] = {"boxes": objects.boxes, "labels": objects.labels}
        if objects.masks is not None:
            truth["masks"] = objects.pixels(*picture.size[::-1])
        rows.append((picture, truth, find_objects(model, processor, picture)))
    title = f"average precision {map_percent:.1f} %, {len(data)} pictures"
    return draw_found(rows, list(label_names(model.config).values()), title)
