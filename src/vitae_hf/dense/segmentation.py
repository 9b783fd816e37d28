# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""UperNet on a ViTAE backbone: how one is built, begun from a classifier, trained, evaluated and looked at."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from transformers import (
    MODEL_FOR_BACKBONE_MAPPING,
    AutoConfig,
    EvalPrediction,
    PreTrainedConfig,
    Trainer,
    UperNetConfig,
    UperNetForSemanticSegmentation,
)

from ..evaluation.metrics import MeanIoU
from ..training.trainer import ViTAETrainer
from .masks import IGNORED_CLASS


MOST_NAMES = 16  # classes in a legend


def dense_config(config: PreTrainedConfig, **changes) -> PreTrainedConfig:
    """A backbone's configuration with all of its maps: those of the stages, or in the class-token variants the four of
    the feature pyramid, 256 wide unless given.

    Args:
        config: of a network or a backbone, such as `config_from_preset("vitae-b")`.
        changes: fields to set, such as `drop_path_rate=0.2`, `frozen_stages=1`, `feature_pyramid_channels=128` or, for
            fewer maps, `out_features`.
    """
    fields = config.to_dict()
    for derived in ("out_features", "out_indices", "_out_features", "_out_indices", "stage_names", "architectures"):
        fields.pop(derived, None)
    if getattr(config, "has_class_token", False):
        fields["feature_pyramid_channels"] = config.feature_pyramid_channels or 256  # its maps are then the default
    else:
        fields["out_features"] = config.stage_names[1:]
    return type(config)(**{**fields, **changes})


def new_segmenter(
    config: PreTrainedConfig, names: dict[int, str], head_channels: int = 512
) -> UperNetForSemanticSegmentation:
    """A UperNet with random weights; with three maps or more, an auxiliary head on the third (stride 16), half as wide.

    Args:
        config: of the backbone; see [`dense_config`].
        names: of the classes, by number.
        head_channels: width of the head.
    """
    config = UperNetConfig(
        backbone_config=config,
        hidden_size=head_channels,
        use_auxiliary_head=len(config.out_features) > 2,  # the library's place for it is the third map
        auxiliary_channels=max(head_channels // 2, 1),
        id2label=names,
        label2id={name: index for index, name in names.items()},
        loss_ignore_index=IGNORED_CLASS,
    )
    return UperNetForSemanticSegmentation(config).train()  # which is also what freezes stages


def load_segmenter(
    folder: str | Path, names: dict[int, str], head_channels: int = 512, **changes
) -> UperNetForSemanticSegmentation:
    """A UperNet for these classes that begins with what was trained.

    Args:
        folder: or Hub name, of a classifier, a network without a head or a backbone, to which new heads are added, or
            of a UperNet, which keeps all of it that fits the classes.
        names, head_channels: as in [`new_segmenter`]; a UperNet keeps its width.
        changes: as in [`dense_config`].

    Raises:
        ValueError: the folder has not all weights of the backbone; the message names those that it lacks.
    """
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, UperNetConfig):
        fields = {**config.backbone_config.to_dict(), **changes}
        fields.pop("out_indices")  # says the same as `out_features`, which may have changed
        config.backbone_config = type(config.backbone_config)(**fields)
        config.id2label, config.label2id = names, {name: index for index, name in names.items()}
        model, loading = UperNetForSemanticSegmentation.from_pretrained(
            folder, config=config, ignore_mismatched_sizes=True, output_loading_info=True
        )
        lost = {*loading["missing_keys"], *(key[0] for key in loading["mismatched_keys"])}
        if lost := sorted(name for name in lost if ".classifier." not in name):
            raise ValueError(
                f"{folder} lacks {len(lost)} weights of this network, or has them of other sizes: {lost[:5]}"
            )
        return model.train()
    config = dense_config(config, **changes)
    backbone_class = MODEL_FOR_BACKBONE_MAPPING[type(config)]
    backbone, loading = backbone_class.from_pretrained(folder, config=config, output_loading_info=True)
    if missing := sorted(name for name in loading["missing_keys"] if not name.startswith("feature_pyramid.")):
        raise ValueError(f"{folder} lacks {len(missing)} weights of {backbone_class.__name__}: {missing[:5]}")
    model = new_segmenter(backbone.config, names, head_channels)
    model.backbone.load_state_dict(backbone.state_dict())
    return model


class SegmentationTrainer(ViTAETrainer):
    """Trains and evaluates a segmenter, with all that [`ViTAETrainer`] brings but its cosine: the schedule is
    `lr_scheduler_type`.

    Evaluation takes the mean IoU of the whole split at the size of the masks, batch by batch (`batch_eval_metrics`), so
    that no more than one batch of predictions is kept.

    Attributes:
        figures (`dict`, *optional*): of the last evaluation, by class too; see [`MeanIoU`].

    Raises:
        ValueError: one picture on the only device that trains, which BatchNorm cannot normalise when the head pools it
            to one pixel.
    """

    def __init__(self, model: UperNetForSemanticSegmentation, args, **kwargs):
        if args.train_batch_size * (args.world_size if args.sync_batch_norm else 1) < 2:
            raise ValueError(
                "UperNet pools pictures to one pixel and normalises over the batch: at least 2 pictures per device are"
                f" needed in training, got per_device_train_batch_size {args.per_device_train_batch_size}"
            )
        args.batch_eval_metrics = True
        if (
            model.backbone.out_features[-1] != model.backbone.stage_names[-1]
        ):  # what is behind the last map learns nothing
            args.ddp_find_unused_parameters = True
        self.figures = None
        self._iou = MeanIoU([model.config.id2label[index] for index in range(model.config.num_labels)])
        super().__init__(model, args, compute_metrics=self._count, **kwargs)
        # UperNet takes keywords but leaves `num_items_in_batch` alone: accumulation must divide its means of batches.
        self.model_accepts_loss_kwargs = False

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        return Trainer.create_scheduler(self, num_training_steps, optimizer)

    def compute_loss(self, model, inputs: dict, *args, **kwargs):
        """The network's own, but 0 for a batch whose masks say nothing: the mean over no pixels is no number."""
        if not (inputs["labels"] == IGNORED_CLASS).all():
            return super().compute_loss(model, inputs, *args, **kwargs)
        return 0 * super().compute_loss(
            model, {**inputs, "labels": torch.zeros_like(inputs["labels"])}, *args, **kwargs
        )

    def evaluation_loop(self, *args, **kwargs):
        self._iou.reset()  # an evaluation before may have been interrupted
        return super().evaluation_loop(*args, **kwargs)

    @torch.no_grad()
    def prediction_step(self, model, inputs: dict, prediction_loss_only: bool, ignore_keys=None):
        inputs = self._prepare_inputs(inputs)
        labels = inputs["labels"]
        with self.compute_loss_context_manager():
            logits = model(pixel_values=inputs["pixel_values"]).logits
        logits = torch.nn.functional.interpolate(logits.float(), labels.shape[-2:], mode="bilinear")
        losses = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORED_CLASS, reduction="sum")
        loss = losses / (labels != IGNORED_CLASS).sum().clamp(min=1)
        if prediction_loss_only:
            return loss, None, None
        return loss, logits.argmax(1).flatten(1), labels.flatten(1)  # flat, since processes differ in height and width

    def _count(self, result: EvalPrediction, compute_result: bool) -> dict[str, float]:
        self._iou.add_batch(predictions=result.predictions.cpu(), references=result.label_ids.cpu())
        if not compute_result:
            return {}
        self.figures = self._iou.compute()
        return {name: self.figures[name] for name in ("mean_iou", "pixel_accuracy", "mean_accuracy")}


@torch.no_grad()
def segment(model: UperNetForSemanticSegmentation, processor, picture: PIL.Image.Image) -> np.ndarray:
    """The class of each pixel of a picture: `(height, width)`."""
    pixel_values = processor(picture, return_tensors="pt").pixel_values.to(model.device, model.dtype)
    outputs = model.eval()(pixel_values)
    sizes = [picture.size[::-1]]
    return processor.post_process_semantic_segmentation(outputs, target_sizes=sizes)[0].cpu().numpy()


def class_colours(num_labels: int) -> np.ndarray:
    """A colour for each class, `(num_labels, 3)` from 0 to 1, none twice and none grey; the first 18 are far apart."""
    base = np.delete(np.array(colormaps["tab20"].colors), [14, 15], axis=0)
    base = np.concatenate([base[::2], base[1::2]])
    shades = [base * shade for shade in np.linspace(1, 0.3, -(-num_labels // len(base)))]
    return np.concatenate(shades)[:num_labels]


def draw_overlays(
    rows: list[tuple[PIL.Image.Image, np.ndarray, np.ndarray]], names: list[str], title: str, opacity: float = 0.65
) -> Figure:
    """Pictures beside their masks and what was predicted, with a legend of the classes that occur.

    Args:
        rows: picture, true mask and prediction, both `(height, width)`.
        names: of the classes; one called "background" is left uncoloured.
        opacity: of the colours.
    """
    colours = class_colours(len(names))
    lines = -(-len(rows) // 2)
    figure = Figure(figsize=(15, 0.9 + 1.95 * lines), layout="constrained")
    axes = figure.subplots(lines, 6, squeeze=False).reshape(-1, 3)
    for axis in axes.flat:
        axis.set_axis_off()
    for triple, (picture, mask, prediction) in zip(axes, rows):
        triple[0].imshow(picture)
        for axis, classes in zip(triple[1:], (mask, prediction)):
            axis.imshow(_overlay(np.asarray(picture.convert("L")) / 255, classes, colours, names, opacity))
    for column, what in enumerate(("picture", "truth", "prediction") * 2):
        figure.axes[column].set_title(what, fontsize=10)
    occurring = np.bincount(np.concatenate([classes.ravel() for row in rows for classes in row[1:]]), minlength=256)
    shown = [index for index in np.argsort(-occurring[: len(names)], kind="stable") if occurring[index]][:MOST_NAMES]
    shown = [index for index in sorted(shown) if names[index] != "background"]
    handles = [Patch(color=colours[index], label=names[index]) for index in shown]
    figure.legend(handles=handles, loc="outside lower center", ncols=10, frameon=False)
    figure.suptitle(title)
    return figure


def _overlay(picture: np.ndarray, classes: np.ndarray, colours: np.ndarray, names: list[str], opacity: float):
    """A grey picture `(height, width)` tinted by class: `(height, width, 3)`; black where a mask says nothing."""
    is_known = classes < len(names)
    tint = np.where(is_known[..., None], colours[np.where(is_known, classes, 0)], 0)
    share = opacity * np.where(is_known, np.array([name != "background" for name in names])[is_known * classes], 1)
    return picture[..., None] * (1 - share[..., None]) + tint * share[..., None]
