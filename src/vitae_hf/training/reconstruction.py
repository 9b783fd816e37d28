# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Pictures of what a masked autoencoder makes of patches that it does not see."""

from pathlib import Path

import numpy as np
import PIL.Image
import torch
from matplotlib.figure import Figure
from transformers import Trainer, TrainerCallback
from transformers.integrations import TensorBoardCallback

from ..data.pictures import as_pictures
from ..decoder_vitae import patch_statistics, patchify, unpatchify
from ..modeling_vitae import ViTAEForPreTraining


@torch.no_grad()
def reconstruct(
    model: ViTAEForPreTraining, pixel_values: torch.Tensor, noise: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Images with their masked patches blank, and with these as the model predicts them, in its normalised pixels.

    Where the model predicts normalised patches (`norm_pix_loss`), each gets the mean and standard deviation that the
    masked patch has: the picture then shows structure, not whether the model knows how bright it is.

    Args:
        model: in the mode it is to be used in.
        pixel_values: `(B, 3, height, width)`, on its device.
        noise: `(B, N)`, which decides the mask.

    Returns:
        Two tensors like `pixel_values`, the first NaN where an image is masked.
    """
    patch_size = model.config.total_stride
    grid_size = tuple(side // patch_size for side in pixel_values.shape[-2:])
    outputs = model(pixel_values, noise=noise)
    patches, predicted = patchify(pixel_values.float(), patch_size), outputs.logits.float()
    if model.config.norm_pix_loss:
        mean, std = patch_statistics(patches)
        predicted = predicted * std + mean
    is_masked = outputs.mask.bool().unsqueeze(-1)
    blank, pasted = patches.masked_fill(is_masked, float("nan")), torch.where(is_masked, predicted, patches)
    return tuple(unpatchify(images, patch_size, grid_size) for images in (blank, pasted))


def draw_reconstructions(columns: dict[str, np.ndarray], path: Path, most_per_line: int = 2) -> None:
    """Write a grid: the images of each column side by side, `most_per_line` such groups in a line.

    Args:
        columns: title -> uint8 `(B, height, width, 3)`.
        path: what to write.
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

    Args:
        trainer: whose model, or its averaged weights, to use.
        pixel_values: normalised images `(B, 3, height, width)`; the same patches of them are hidden each time.
        image_mean, image_std: what they were normalised by.
    """

    def __init__(self, trainer: Trainer, pixel_values: torch.Tensor, image_mean: list[float], image_std: list[float]):
        self.trainer, self.pixel_values = trainer, pixel_values
        self.image_mean, self.image_std = image_mean, image_std
        num_patches = pixel_values[0, 0].numel() // trainer.model.config.total_stride**2
        self.noise = torch.rand(len(pixel_values), num_patches, generator=torch.Generator().manual_seed(0))
        self.path = None  # of the last picture

    def on_evaluate(self, args, state, control, **kwargs):
        model = self.trainer.model if self.trainer.ema is None else self.trainer.ema.module
        pixel_values, noise = self.pixel_values.to(args.device), self.noise.to(args.device)
        # in all processes, since each may hold a part of the weights
        blank, pasted = reconstruct(model.eval(), pixel_values, noise)
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
