# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The image processor of Faster and Mask R-CNN: DETR's preparation of pictures, boxes and masks of what was found."""

import os
from pathlib import Path
from shutil import copyfile
from typing import Any

import torch
from transformers import DeformableDetrImageProcessor


class RCNNImageProcessor(DeformableDetrImageProcessor):
    """Prepares pictures as DETR's processors do, and makes boxes and masks of what [`RCNNForObjectDetection`] gives."""

    def to_dict(self) -> dict[str, Any]:
        """The settings, and where `AutoImageProcessor` finds this class without this package."""
        # By backend, as the library has it too: a plain name makes its pipelines look for a processor of videos.
        reference = f"{Path(__file__).stem}.{type(self).__name__}"
        auto_map = {"AutoImageProcessor": {"torchvision": reference}}
        return super().to_dict() if self._auto_class else {**super().to_dict(), "auto_map": auto_map}

    def save_pretrained(
        self, save_directory: str | os.PathLike[str], push_to_hub: bool = False, **kwargs: Any
    ) -> list[str]:
        """Save `preprocessor_config.json` and this file, so that the folder loads without this package."""
        Path(save_directory).mkdir(parents=True, exist_ok=True)
        copyfile(__file__, Path(save_directory) / Path(__file__).name)
        return super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _get_files_timestamps(self, working_dir: str | os.PathLike[str]) -> dict[str, float]:
        """Without the code: `push_to_hub=True` uploads what is newer, and the code was copied just before."""
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if not name.endswith(".py")}

    def _update_annotation_for_padded_image(
        self, annotation: dict, input_image_size: Any, output_image_size: Any, padding: Any, update_bboxes: bool
    ) -> dict:
        """Pad masks. Boxes stay shares of the picture, as the model takes them, and not of what it is padded to."""
        return super()._update_annotation_for_padded_image(
            annotation, input_image_size, output_image_size, padding, update_bboxes=False
        )

    def post_process_object_detection(  # type: ignore[override]  # boxes come chosen, so there is no `top_k`
        self, outputs: Any, threshold: float = 0.5, target_sizes: Any = None, mask_threshold: float = 0.5
    ) -> list[dict[str, torch.Tensor]]:
        """What was found in each picture.

        Args:
            outputs: of the model.
            threshold: what scores must be above.
            target_sizes: height and width of each picture; by default boxes are shares of it, and masks are left out.
            mask_threshold: from which value on a pixel belongs to a mask.

        Returns:
            `scores` and `labels` `(N,)`, `boxes` `(N, 4)` as left, top, right and bottom, and `masks` `(N, height,
            width)`, true where an object is, if the model has masks.
        """
        from torchvision.models.detection.roi_heads import paste_masks_in_image

        found = []
        for picture, logits in enumerate(outputs.logits.float()):
            scores, labels = logits.sigmoid().max(-1) if logits.numel() else (logits.new_zeros(0), logits.new_zeros(0))
            kept = scores > threshold
            centre, sides = outputs.pred_boxes[picture][kept].float().chunk(2, dim=-1)
            boxes = torch.cat([centre - sides / 2, centre + sides / 2], dim=-1)
            one = {"scores": scores[kept], "labels": labels[kept].long(), "boxes": boxes}
            if target_sizes is not None:
                height, width = (int(side) for side in target_sizes[picture])
                one["boxes"] = boxes * boxes.new_tensor([width, height, width, height])
                if (of_all := outputs.get("pred_masks")) is not None:
                    masks = of_all[picture][kept, None].float()
                    one["masks"] = paste_masks_in_image(masks, one["boxes"], (height, width))[:, 0] >= mask_threshold
            found.append(one)
        return found

    def post_process_instance_segmentation(
        self,
        outputs: Any,
        threshold: float = 0.5,
        mask_threshold: float = 0.5,
        overlap_mask_area_threshold: float = 0.8,
        target_sizes: Any = None,
    ) -> list[dict[str, Any]]:
        """One map of each picture on which every pixel belongs to the object with the highest score.

        Args:
            outputs, threshold, mask_threshold: as in `post_process_object_detection`.
            overlap_mask_area_threshold: an object of whose mask others hide more than the rest is left out.
            target_sizes: height and width of each picture.

        Returns:
            `segmentation` `(height, width)`, the `id` of an object at each pixel or -1, and `segments_info`, a list of
            `id`, `label_id` and `score`.

        Raises:
            ValueError: `target_sizes` are missing, or the model has no masks.
        """
        if target_sizes is None or outputs.get("pred_masks") is None:
            raise ValueError("masks of whole pictures need `target_sizes`, and a model with masks (`with_masks`)")
        results = []
        for one, size in zip(
            self.post_process_object_detection(outputs, threshold, target_sizes, mask_threshold), target_sizes
        ):
            segmentation = torch.full([int(side) for side in size], -1, dtype=torch.int64)
            segments: list[dict[str, Any]] = []
            for index in one["scores"].argsort(descending=True).tolist():
                mask = one["masks"][index].cpu()
                visible = mask & (segmentation < 0)
                if visible.any() and visible.sum() >= overlap_mask_area_threshold * mask.sum():
                    segmentation[visible] = len(segments)
                    label, score = int(one["labels"][index]), round(one["scores"][index].item(), 6)
                    segments.append({"id": len(segments), "label_id": label, "was_fused": False, "score": score})
            results.append({"segmentation": segmentation, "segments_info": segments})
        return results


__all__ = ["RCNNImageProcessor"]
