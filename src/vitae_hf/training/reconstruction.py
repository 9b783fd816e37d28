# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Training on images without labels, and pictures of how a network reconstructs the patches hidden from it."""

from pathlib import Path
from typing import Any

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState
from transformers.integrations import TensorBoardCallback
from transformers.trainer_utils import EvalLoopOutput

from ..data.pictures import as_pictures
from ..decoder_vitae import patch_statistics, patchify, random_mask, unpatchify
from ..modeling_vitae import ViTAEForPreTraining
from .arguments import ViTAETrainingArguments
from .trainer import ViTAETrainer


class ReconstructionTrainer(ViTAETrainer):
    """Trains a model that hides patches of its images by chance; every evaluation hides the same patches.

    An evaluation leaves the random state as it was, so that training goes on as if there had been none.
    """

    model: Any  # a masked autoencoder; subclasses train others

    def __init__(self, model: PreTrainedModel, args: ViTAETrainingArguments, **kwargs: Any):
        args.label_names = ["pixel_values"]  # the library computes no loss in an evaluation that has no labels
        super().__init__(model, args, **kwargs)
        self.mask_patch_size: int = model.config.patch_size  # side in pixels of what is hidden or not

    def draw_noise(self, pixel_values: torch.Tensor, generator: torch.Generator | None = None) -> torch.Tensor:
        """A number for each patch: those with the lowest numbers stay visible."""
        patches = pixel_values[0, 0].numel() // self.mask_patch_size**2
        return torch.rand(len(pixel_values), patches, device=pixel_values.device, generator=generator)

    def reconstruct(
        self, model: Any, pixel_values: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """See [`reconstruct`]."""
        return reconstruct(model, pixel_values, noise)

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> EvalLoopOutput:
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)


class MaskedImageTrainer(ReconstructionTrainer):
    """The same for a masked image model, which is told what to hide.

    Args:
        mask_patch_size: side in pixels of what is hidden or not, a multiple of the model's patches.
        mask_ratio: the share that is hidden.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        args: ViTAETrainingArguments,
        mask_patch_size: int,
        mask_ratio: float,
        **kwargs: Any,
    ):
        super().__init__(model, args, **kwargs)
        self.mask_patch_size = mask_patch_size
        self.mask_ratio = mask_ratio

    def masked_positions(self, pixel_values: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Which patches of the model are hidden: (B, 3, height, width), (B, masks) -> (B, N)."""
        scale = self.mask_patch_size // self.model.config.patch_size
        _, _, mask = random_mask(noise, self.mask_ratio)
        grid = mask.bool().unflatten(1, (-1, pixel_values.shape[-1] // self.mask_patch_size))
        return grid.repeat_interleave(scale, 1).repeat_interleave(scale, 2).flatten(1)

    def compute_loss(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        pixel_values = inputs["pixel_values"]
        masked = self.masked_positions(pixel_values, self.draw_noise(pixel_values))
        return super().compute_loss(model, {**inputs, "bool_masked_pos": masked}, *args, **kwargs)

    @torch.no_grad()
    def reconstruct(
        self, model: Any, pixel_values: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        masked = self.masked_positions(pixel_values, noise)
        is_masked = model.masked_pixels(masked, pixel_values)
        predicted = model(pixel_values, bool_masked_pos=masked).reconstruction.float()
        return pixel_values.masked_fill(is_masked, float("nan")), torch.where(is_masked, predicted, pixel_values)


@torch.no_grad()
def reconstruct(
    model: ViTAEForPreTraining, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images whose masked patches are blank, and images in which the model's predictions fill them.

    A model that predicts normalised patches (`norm_pix_loss`) says nothing about their brightness and contrast: each
    prediction gets the mean and standard deviation of the patch that was hidden, so the picture shows only structure.

    Args:
        model: in training or evaluation mode, which it stays in.
        pixel_values: normalised images `(B, 3, height, width)`, on the device of the model.
        noise: `(B, N)`, which decides what patches are masked.

    Returns:
        Two tensors like `pixel_values`; the first is NaN where an image is masked.
    """
    patch_size = model.config.total_stride
    height, width = (side // patch_size for side in pixel_values.shape[-2:])
    outputs = model(pixel_values, noise=noise)
    patches, predicted = patchify(pixel_values.float(), patch_size), outputs.logits.float()
    if model.config.norm_pix_loss:
        mean, std = patch_statistics(patches)
        predicted = predicted * std + mean
    is_masked = outputs.mask.bool().unsqueeze(-1)
    blank, pasted = patches.masked_fill(is_masked, float("nan")), torch.where(is_masked, predicted, patches)
    return unpatchify(blank, patch_size, (height, width)), unpatchify(pasted, patch_size, (height, width))


def draw_reconstructions(columns: dict[str, np.ndarray], path: Path, most_per_line: int = 2) -> None:
    """Write a grid of images: each line shows `most_per_line` images, each of them once in every column.

    Args:
        columns: title -> uint8 `(B, height, width, 3)`.
        path: file to write.
    """
    count, height, width = next(iter(columns.values())).shape[:3]
    groups = min(most_per_line, count)
    lines, across = -(-count // groups), groups * len(columns)
    figure = Figure(figsize=(1.6 * across, 1.6 * lines * height / width + 0.3), layout="constrained")
    axes = figure.subplots(lines, across, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index in range(count):
        for column, (title, pictures) in enumerate(columns.items()):
            axis = axes[index // groups, index % groups * len(columns) + column]
            axis.imshow(pictures[index])
            if index < groups:
                axis.set_title(title, fontsize=9)
    figure.savefig(path, dpi=120)


class DrawReconstructions(TrainerCallback):
    """At each evaluation, writes `reconstructions/step-….png` into the output folder, and to TensorBoard if it is on.

    Attributes:
        path (`Path`): of the last picture; not there before the first evaluation.

    Args:
        trainer: whose evaluated model to use.
        pixel_values: normalised images `(B, 3, height, width)`; the same patches of them are hidden each time.
        image_mean, image_std: by which they were normalised.
    """

    path: Path

    def __init__(
        self,
        trainer: ReconstructionTrainer,
        pixel_values: torch.Tensor,
        image_mean: list[float],
        image_std: list[float],
    ):
        self.trainer = trainer
        self.pixel_values = pixel_values
        self.image_mean = image_mean
        self.image_std = image_std
        self.noise: torch.Tensor = trainer.draw_noise(pixel_values, torch.Generator().manual_seed(0))

    def on_evaluate(self, args: Any, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        model: Any = self.trainer.evaluated_model
        pixel_values, noise = self.pixel_values.to(args.device), self.noise.to(args.device)
        # All processes compute it, since each may hold a part of the weights; one draws.
        blank, pasted = self.trainer.reconstruct(model.eval(), pixel_values, noise)
        if not state.is_world_process_zero:
            return
        tensors = {"input": self.pixel_values, "visible": blank, "reconstruction": pasted}
        columns = {name: as_pictures(images, self.image_mean, self.image_std) for name, images in tensors.items()}
        self.path = Path(args.output_dir) / "reconstructions" / f"step-{state.global_step:06}.png"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        draw_reconstructions(columns, self.path)
        for callback in self.trainer.callback_handler.callbacks:
            if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
                picture = np.asarray(PIL.Image.open(self.path).convert("RGB"))
                callback.tb_writer.add_image("reconstructions", picture, state.global_step, dataformats="HWC")
