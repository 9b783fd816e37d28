# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Train UperNet with a ViTAE backbone to say what each pixel of a picture is.

    vitae segment --config upernet-vitaev2-s-ade20k --dataset FOLDER \
        --class_names FILE --model_name_or_path outputs/vitaev2-s --output_dir outputs/ade20k
    vitae segment --preset vitae-nano --head_channels 64 --dataset examples/garment_scenes \
        --short_side 96 --crop_size 96 --output_dir outputs/scenes          # `make segmentation-demo` does more of it

`--dataset` is a Hub name or a folder, with one column of pictures called image and one of masks called mask, annotation
or label: a class at each pixel, 255 for none. The backbone begins with a trained classifier or backbone
(`--model_name_or_path`; a trained UperNet goes on whole) or at random (`--preset`). Every argument of the library's
`TrainingArguments` works; resuming, SIGTERM, averaged weights and layer-wise decay are as in `vitae train`. At the
end the folder holds the model (`ema/` with averaged weights, if there are any), `eval_results.json`,
`segmentation_metrics.json` with the figures of each class, `overlays.png`, `training_curves.png` and a model card.
"""

import dataclasses
import json
import shutil
import signal
from functools import partial
from pathlib import Path

import numpy as np
from transformers import SegformerImageProcessor, set_seed

from .. import config_from_preset
from ..data.sources import pick_split
from ..dense.masks import (
    MaskAugmentationArguments,
    SegmentationDataset,
    collate_masks,
    evaluation_sample,
    load_masked_images,
    mask_class_names,
    segmentation_transform,
)
from ..dense.segmentation import (
    SegmentationTrainer,
    dense_config,
    draw_overlays,
    load_segmenter,
    new_segmenter,
    segment,
)
from ..environment import environment
from ..failures import about
from ..files import find_model
from ..hub.cards import TEMPLATES, draw_curves, model_card
from ..training.arguments import parse_arguments
from ..training.checkpoints import last_checkpoint
from ..training.trainer import ViTAETrainingArguments


TASK = "image-segmentation"


@dataclasses.dataclass
class RunArguments:
    """What to train on what."""

    dataset: str = dataclasses.field(metadata={"help": "Hub name or local folder of pictures and masks."})
    dataset_name: str | None = dataclasses.field(default=None, metadata={"help": "Its configuration, if several."})
    train_split: str = "train"
    eval_split: str | None = dataclasses.field(default=None, metadata={"help": "Default: validation, else test."})
    class_names: Path | None = dataclasses.field(
        default=None, metadata={"help": "Text file with a class on each line, for data that do not name theirs."}
    )
    reduce_labels: bool = dataclasses.field(
        default=False, metadata={"help": "0 in a mask is no class, and 1 the first, as in ADE20K."}
    )
    preset: str | None = dataclasses.field(default=None, metadata={"help": "From scratch: a name of PRESETS."})
    model_name_or_path: str | None = dataclasses.field(
        default=None, metadata={"help": "A classifier, backbone or UperNet to begin with."}
    )
    head_channels: int = dataclasses.field(default=512, metadata={"help": "Width of a new head."})
    drop_path_rate: float | None = dataclasses.field(default=None, metadata={"help": "Default: the backbone's."})
    frozen_stages: int = dataclasses.field(
        default=0, metadata={"help": "So many first stages of the backbone are not trained."}
    )
    overlays: int = dataclasses.field(default=8, metadata={"help": "Pictures to draw what was predicted on."})

    def __post_init__(self):
        if (self.preset is None) == (self.model_name_or_path is None):
            raise ValueError("give either --preset, to train from scratch, or --model_name_or_path, to begin with")
        for name in ("overlays", "head_channels"):
            if getattr(self, name) < 1:
                raise ValueError(f"--{name} must be at least 1, got {getattr(self, name)}")


def parse(argv: list[str] | None):
    """Arguments from the command line over those of `--config`, as (run, augmentation, training)."""
    run, augmentation, training = parse_arguments(
        argv,
        (RunArguments, MaskAugmentationArguments, ViTAETrainingArguments),
        "vitae segment",
        __doc__,
        lr_scheduler_type="polynomial",  # mmsegmentation's "poly"; linear unless the keywords say otherwise
        lr_scheduler_kwargs={"power": 1.0, "lr_end": 0.0},
        per_device_eval_batch_size=1,  # pictures of an evaluation differ in size
        dataloader_drop_last=True,  # BatchNorm cannot normalise a last batch of one
    )
    if training.label_smoothing_factor:
        raise ValueError("--label_smoothing_factor does not go with segmentation")
    if training.push_to_hub:
        raise ValueError("--push_to_hub is for classifiers; publish a segmenter by its `push_to_hub`")
    return run, augmentation, training


def build_model(run: RunArguments, names: dict[int, str]):
    """UperNet with a new backbone, or with a trained one."""
    changes = {"frozen_stages": run.frozen_stages}
    if run.drop_path_rate is not None:
        changes["drop_path_rate"] = run.drop_path_rate
    if run.preset is not None:
        return new_segmenter(dense_config(config_from_preset(run.preset), **changes), names, run.head_channels)
    with about(run.model_name_or_path):
        return load_segmenter(find_model(run.model_name_or_path), names, run.head_channels, **changes)


def build_trainer(
    run: RunArguments, augmentation: MaskAugmentationArguments, training: ViTAETrainingArguments
) -> SegmentationTrainer:
    with training.main_process_first(desc="data"):
        splits = load_masked_images(run.dataset, run.dataset_name)
    run.train_split = pick_split(splits, run.train_split)
    run.eval_split = pick_split(splits, *([run.eval_split] if run.eval_split else ("validation", "test")))
    names = mask_class_names(splits, run.class_names)
    processor = SegformerImageProcessor(
        size={"shortest_edge": augmentation.short_side, "longest_edge": 4 * augmentation.short_side},
        do_reduce_labels=run.reduce_labels,
    )
    transform = segmentation_transform(augmentation)
    common = {"num_labels": len(names), "reduce_labels": run.reduce_labels}
    train_data = SegmentationDataset(splits[run.train_split], transform, seed=training.seed, **common)
    eval_data = SegmentationDataset(splits[run.eval_split], partial(evaluation_sample, processor), **common)
    train_data.check()
    eval_data.check()
    return SegmentationTrainer(
        build_model(run, names),
        training,
        data_collator=collate_masks,
        train_dataset=train_data,
        eval_dataset=eval_data,
        processing_class=processor,
    )


def write_reports(trainer: SegmentationTrainer, run: RunArguments, augmentation, record: dict, loss: float) -> None:
    """Figures by class, pictures and the model card, beside the model and in the folder of the averaged weights."""
    training, output, data = trainer.args, Path(trainer.args.output_dir), trainer.eval_dataset
    (output / "segmentation_metrics.json").write_text(json.dumps(trainer.figures, indent=1) + "\n")
    draw_curves(trainer.state.log_history, output / "training_curves.png", TASK)
    model = trainer.model if trainer.ema is None else trainer.ema.module
    names = [model.config.id2label[index] for index in range(model.config.num_labels)]
    rows = []
    for index in np.unique(np.linspace(0, len(data) - 1, run.overlays).astype(int)).tolist():
        picture, mask, _ = data.read(index)
        rows.append((picture, mask, segment(model, trainer.processing_class, picture)))
    title = f"mean IoU {record['mean_iou_percent']:.1f} %, {len(data)} pictures"
    draw_overlays(rows, names, title).savefig(output / "overlays.png", dpi=110)
    settings = {
        "optimizer": training.optim.value,
        "learning rate": f"{training.learning_rate:g}, {training.lr_scheduler_type.value}",
        "weight decay": f"{training.weight_decay:g}",
        "epochs": round(trainer.state.epoch, 2),
        "updates": trainer.state.global_step,
        "global batch": training.global_batch_size,
        "average of the weights": training.ema_decay or "none",
        "augmentation": ", ".join(f"{name} {value}" for name, value in vars(augmentation).items()),
        "drop path": getattr(model.config.backbone_config, "drop_path_rate", "none"),
        "frozen stages": run.frozen_stages,
        "seed": training.seed,
    }
    card = model_card(
        TEMPLATES / "segmentation.md",
        task=TASK,
        model_name=output.name,
        backbone=type(model.backbone).__name__,
        parameters=model.num_parameters(),
        num_labels=model.config.num_labels,
        origin="trained from scratch" if run.preset else f"begun with `{run.model_name_or_path}`",
        dataset=run.dataset,
        train_images=f"{len(trainer.train_dataset):,}",
        eval_split=run.eval_split,
        eval_images=f"{len(data):,}",
        short_side=augmentation.short_side,
        image_mean=trainer.processing_class.image_mean,
        image_std=trainer.processing_class.image_std,
        averaged=trainer.ema is not None,
        metrics={**trainer.figures, "loss": loss},
        settings=settings,
        environment=", ".join(f"{name} {record[name]}" for name in ("device", "torch", "transformers", "date")),
    )
    for folder in [output] if trainer.ema is None else [output, output / "ema"]:
        card.save(folder / "README.md")
        for name in ("overlays.png", "training_curves.png") if folder != output else ():
            shutil.copy(output / name, folder)


def main(argv: list[str] | None = None) -> dict:
    run, augmentation, training = parse(argv)
    if training.resume_from_checkpoint is None and (earlier := last_checkpoint(training.output_dir)):
        raise ValueError(
            f"{earlier} is of an earlier run: continue it by --resume_from_checkpoint last, or choose another"
            " --output_dir"
        )
    set_seed(training.seed)
    trainer = build_trainer(run, augmentation, training)
    trainer.train(resume_from_checkpoint=training.resume_from_checkpoint)
    if trainer.stop.received and trainer.state.global_step < trainer.state.max_steps:
        checkpoint = last_checkpoint(training.output_dir)
        return {"stopped_at_step": trainer.state.global_step, "checkpoint": str(checkpoint), **environment()}
    trainer.save_model()
    metrics = trainer.evaluate()
    trainer.save_metrics("eval", metrics)
    trainer.save_state()
    output = Path(training.output_dir)
    record = {
        "model": str(output / "ema" if trainer.ema is not None else output),
        "eval_split": run.eval_split,
        "mean_iou_percent": round(metrics["eval_mean_iou"], 2),
        "pixel_accuracy_percent": round(metrics["eval_pixel_accuracy"], 2),
        "constant_mean_iou_percent": round(trainer.figures["constant_mean_iou"], 2),
        "eval_loss": round(metrics["eval_loss"], 4),
        "updates": trainer.state.global_step,
        "seconds": round(trainer.throughput.seconds),
        "images_per_s": trainer.throughput.images_per_s and round(trainer.throughput.images_per_s, 1),
        "learning_rate": training.learning_rate,
        "seed": training.seed,
        **environment(training.device.type),
    }
    if training.should_save:
        write_reports(trainer, run, augmentation, record, metrics["eval_loss"])
    return record


def status(record: dict) -> int:
    return 128 + signal.SIGTERM if "stopped_at_step" in record else 0
