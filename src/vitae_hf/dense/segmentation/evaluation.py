# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How good is a segmenter on pictures with masks, each at its own size, whole or in windows?"""

from typing import Any

from matplotlib.figure import Figure
from tqdm.auto import tqdm

from ...data.samples import evenly_spread, rows_as_read
from ...evaluation.detections import segment
from ...evaluation.metrics import MeanIoU
from ...evaluation.windows import Windows
from ...loading import label_names
from .data import SegmentationDataset
from .figures import draw_overlays


def segmentation_figures(
    model: Any, processor: Any, data: SegmentationDataset, windows: Windows | None = None, num_workers: int = 0
) -> dict[str, Any]:
    """The figures of [`MeanIoU`] over all pixels of a split, at the size of the masks.

    Args:
        model: any of the library's models for semantic segmentation.
        processor: its image processor.
        data: whose rows are only read.
        windows: in which the pictures are looked at; default: whole.
        num_workers: processes that read them.
    """
    metric = MeanIoU(list(label_names(model.config).values()))
    for picture, mask, _ in tqdm(rows_as_read(data, num_workers), unit=" images"):
        metric.add_batch(predictions=segment(model, processor, picture, windows), references=mask)
    return metric.compute()


def overlays(
    model: Any,
    processor: Any,
    data: SegmentationDataset,
    mean_iou_percent: float,
    pictures: int = 8,
    windows: Windows | None = None,
) -> Figure:
    """Some pictures of a split, evenly spread, beside their true and predicted masks."""
    rows = []
    for index in evenly_spread(len(data), pictures):
        picture, mask, _ = data.read(index)
        rows.append((picture, mask, segment(model, processor, picture, windows)))
    title = f"mean IoU {mean_iou_percent:.1f} %, {len(data)} pictures"
    return draw_overlays(rows, list(label_names(model.config).values()), title)
