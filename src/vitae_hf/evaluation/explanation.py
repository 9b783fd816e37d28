# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What a classifier saw in an image: where its attention looks, which branch of its cells did the work, and Grad-CAM.

Source: Abnar & Zuidema 2020, "Quantifying Attention Flow in Transformers" (rollout); Selvaraju et al. 2017, "Grad-CAM".
"""

import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.figure import Figure, SubFigure
from matplotlib.image import AxesImage
from matplotlib.ticker import PercentFormatter
from pytorch_grad_cam import GradCAM
from pytorch_grad_cam.utils.model_targets import ClassifierOutputTarget
from torch import nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from ..attention_vitae import join_windows, split_into_windows
from ..data.pictures import as_pictures, denormalised
from ..layers_vitae import ViTAEFamilyCell, ViTAEFamilyReductionCell, grid_tokens, tokens_to_map
from ..loading import any_size_options, best_labels, label_names
from ..messages import listed
from ..modeling_base_vitae import ViTAEFamilyPreTrainedModel
from ..rotated_windows_vitae import ViTAERotatedWindowAttention
from .plain_text import plain_text


@dataclass
class Explanation:
    """What [`explain`] finds out about one image. A cell's maps have one value for each position of its grid of tokens.

    Attributes:
        image: uint8 `(height, width, 3)`, what the network saw, after resizing and cropping.
        labels: the five likeliest classes (all if there are fewer) as `{"label", "score"}`, the best first.
        target: the class that `grad_cam` explains.
        target_label: the name of that class.
        grad_cam: float32 `(height, width)` from 0 to 1: how much each place of the image raises the score of the
            target. All 0 if no place does.
        cells: names of the cells that have an attention and a convolution branch, in order of depth, such as
            `"stage 1, reduction"` and `"stage 3, cell 1"`, see [`cell_name`]. The lists below are in the same order.
        stages: for each cell the number of its stage, from 1.
        attention: for each cell a map of where its attention looks: the attention that a position receives, averaged
            over all positions that attend and over the heads. Sums to 1. `None` for random features, which never
            compute attention weights.
        rollout: for each stage with softmax attention (by its number, from 1) a map as in `attention`, for all cells of
            the stage together.
        attention_share: for each cell a map of how much of what it adds to a token comes from its attention:
            |attention| / (|attention| + |convolution|). In a reduction cell the attention includes its value residual.
        convolution_share: for each cell the rest, `1 - attention_share`.
        seconds: how long the explanation took.
    """

    image: np.ndarray
    labels: list[dict[str, Any]]
    target: int
    target_label: str
    grad_cam: np.ndarray
    cells: list[str]
    stages: list[int]
    attention: list[np.ndarray | None]
    rollout: dict[int, np.ndarray]
    attention_share: list[np.ndarray]
    convolution_share: list[np.ndarray]
    seconds: float


def stage_name(stage: int) -> str:
    return f"stage {stage}"


def cell_name(stage: int, cell: int | None) -> str:
    """What people call a cell: stages and their normal cells are numbered from 1, and `None` is the reduction cell."""
    return f"{stage_name(stage)}, reduction" if cell is None else f"{stage_name(stage)}, cell {cell}"


class Cell(NamedTuple):
    name: str
    stage: int
    module: ViTAEFamilyCell


def two_branch_cells(model: ViTAEFamilyPreTrainedModel) -> list[Cell]:
    """The cells with an attention and a convolution branch, in order of depth."""
    cells = []
    has_reduction_cells = not model.config.is_plain
    for number, stage in enumerate(model.base_model.stages, start=1):
        if has_reduction_cells and isinstance(stage.reduction_cell, ViTAEFamilyReductionCell):
            cells.append(Cell(cell_name(number, None), number, stage.reduction_cell))
        for cell_number, cell in enumerate(stage.normal_cells, start=1):
            cells.append(Cell(cell_name(number, cell_number), number, cell))
    return cells


def attention_matrix(
    weights: torch.Tensor, height: int, width: int, window_size: int | None, window_padding: str
) -> torch.Tensor:
    """The attention weights of one image, averaged over heads, in float32. Each row of a real token sums to 1.

    Args:
        weights: `(windows, heads, T, T)`. Without a `window_size` there is one window, the whole grid.

    Returns:
        `(windows, T, T)`. Rows and columns of the padding at the border are zero.
    """
    matrix = weights.mean(1, dtype=torch.float32)
    if window_size is not None:
        ones = matrix.new_ones(1, height * width, 1)
        is_real = split_into_windows(ones, height, width, window_size, window_padding)  # (windows, T, 1)
        matrix = matrix * is_real * is_real.transpose(1, 2)
        matrix = matrix / matrix.sum(-1, keepdim=True).clamp_min(torch.finfo(torch.float32).tiny)
    return matrix


def received(
    matrix: torch.Tensor, height: int, width: int, window_size: int | None, window_padding: str, has_class_token: bool
) -> np.ndarray:
    """The attention that each position of the grid receives from all positions: `(windows, T, T)` -> `(height, width)`.

    The map sums to 1. A class token is left out on both sides, since the classifier reads the other tokens only.
    """
    first = int(has_class_token)  # the number of the first token of the grid
    totals = matrix[:, first:, first:].sum(1)  # (windows, tokens of the window)
    if window_size is not None:
        totals = join_windows(totals.unsqueeze(-1), 1, height, width, window_size, window_padding)
    totals = totals.reshape(height, width)
    return (totals / totals.sum()).cpu().numpy()


def window_kind(cell: Cell) -> int | str | None:
    """Side of the windows of a cell's attention, none if it has no windows, or `"rotated"`."""
    attention = cell.module.attention
    return "rotated" if isinstance(attention, ViTAERotatedWindowAttention) else getattr(attention, "window_size", None)


class _Recorder:
    """Hooks that turn what a cell computes into maps at once, so that only one matrix of attention is in memory."""

    def __init__(self, cells: list[Cell], has_class_token: bool):
        self.has_class_token = has_class_token
        self.attention: dict[str, np.ndarray | None] = {}
        self.shares: dict[str, np.ndarray] = {}
        self.rollout: dict[int, np.ndarray] = {}
        self.handles: list[RemovableHandle] = []
        self._norms: dict[str, dict[str, torch.Tensor]] = {}
        self._products: dict[int, torch.Tensor] = {}
        kinds: dict[int, set[int | str | None]] = {}
        for cell in cells:
            kinds.setdefault(cell.stage, set()).add(window_kind(cell))
        # Where windows differ from cell to cell, or lie between the tokens, products of matrices mean nothing.
        self._stages_with_rollout = {
            stage for stage, found in kinds.items() if len(found) == 1 and "rotated" not in found
        }
        for cell in cells:
            for branch, hook in (("attention", self._see_attention), ("conv_branch", self._see_convolution)):
                module = getattr(cell.module, branch)
                self.handles.append(
                    module.register_forward_hook(lambda module, args, output, c=cell, h=hook: h(c, args, output))
                )

    def _see_attention(
        self, cell: Cell, args: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor | None]
    ) -> None:
        states, weights = output
        _, height, width = args
        norm = torch.linalg.vector_norm(grid_tokens(states, self.has_class_token)[0].float(), dim=-1)
        self._see_norm(cell, "attention", norm.view(height, width))
        self.attention[cell.name] = None
        if weights is None or window_kind(cell) == "rotated":
            return
        windows = cell.module.attention.window_size, cell.module.attention.window_padding
        matrix = attention_matrix(weights, height, width, *windows)
        self.attention[cell.name] = received(matrix, height, width, *windows, self.has_class_token)
        if cell.stage not in self._stages_with_rollout:
            return
        step = (matrix + torch.eye(matrix.shape[-1], device=matrix.device)) / 2
        before = self._products.get(cell.stage)
        self._products = {cell.stage: step if before is None else step @ before}
        self.rollout[cell.stage] = received(self._products[cell.stage], height, width, *windows, self.has_class_token)

    def _see_convolution(self, cell: Cell, args: Any, output: torch.Tensor) -> None:
        self._see_norm(cell, "convolution", torch.linalg.vector_norm(output[0].float(), dim=0))

    def _see_norm(self, cell: Cell, branch: str, norm: torch.Tensor) -> None:
        """Keep the norm of one branch; when the cell's other branch has run too, compute the share of attention."""
        norms = self._norms.setdefault(cell.name, {})
        norms[branch] = norm
        if len(norms) == 2:
            total = norms["attention"] + norms["convolution"]
            share = torch.where(total > 0, norms["attention"] / total, 0.5)  # 0.5 where neither adds anything
            self.shares[cell.name] = share.cpu().numpy()

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """In this block, the model is in evaluation mode, needs no gradients and does not run compiled code."""
    modes = [(module, module.training) for module in model.modules()]
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    model.eval().requires_grad_(False)
    try:
        with torch.compiler.set_stance("force_eager"), torch.inference_mode(False):
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in trained:
            parameter.requires_grad_(True)


@contextmanager
def _eager_attention(cells: list[Cell]) -> Iterator[None]:
    """In this block, softmax attention computes its weights."""
    configs = {id(config): config for cell in cells if (config := getattr(cell.module.attention, "config", None))}
    before = [(config, config._attn_implementation) for config in configs.values()]
    for config in configs.values():
        config._attn_implementation = "eager"
    try:
        yield
    finally:
        for config, implementation in before:
            config._attn_implementation = implementation


class _Logits(nn.Module):
    """A classifier whose output is its logits, as the package for Grad-CAM expects."""

    def __init__(self, model: ViTAEFamilyPreTrainedModel):
        super().__init__()
        self.model = model
        self.options = any_size_options(model)

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Does nothing: the gradients belong to whoever trains the model."""

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        outputs = self.model(
            pixel_values, output_attentions=False, output_hidden_states=False, return_dict=True, **self.options
        )
        return outputs.logits.float()


def last_tokens(model: ViTAEFamilyPreTrainedModel) -> nn.Module:
    """The module that gives the last tokens, whose mean the classifier reads."""
    stage = model.base_model.stages[-1]
    if len(stage.normal_cells):
        return stage.normal_cells[-1]
    return model.base_model.embeddings if model.config.is_plain else stage.reduction_cell


def grad_cam(model: ViTAEFamilyPreTrainedModel, pixel_values: torch.Tensor, target: int) -> np.ndarray:
    """Grad-CAM of a class on the last tokens: `(1, 3, height, width)` -> float32 `(height, width)` from 0 to 1.

    The weights must not require gradients. The graph then begins at these tokens, so that nothing before is kept.
    """
    height, width = (side // model.config.total_stride for side in pixel_values.shape[-2:])
    layer = last_tokens(model)

    def reshape(tokens: torch.Tensor) -> torch.Tensor:
        feature_map = tokens_to_map(grid_tokens(tokens, model.config.has_class_token), height, width)
        return feature_map.float()  # NumPy has no bfloat16

    handle = layer.register_forward_hook(lambda module, args, output: output.requires_grad_())
    try:
        with torch.enable_grad(), GradCAM(_Logits(model), [layer], reshape) as cam:
            return cam(pixel_values, [ClassifierOutputTarget(target)])[0]
    finally:
        handle.remove()


def class_of(label: str, id2label: dict[int, str]) -> int:
    """The number of the class with this label.

    Raises:
        ValueError: there is no such class; the message lists the most similar labels.
    """
    for index, name in id2label.items():
        if name == label:
            return index
    similar = get_close_matches(label, id2label.values(), n=5, cutoff=0)
    raise ValueError(f"the model has no class {label!r}; of its {len(id2label)} these are closest: {listed(similar)}")


def _target_class(target: int | str | None, logits: torch.Tensor, id2label: dict[int, str]) -> int:
    if target is None:
        return int(logits.argmax())
    if isinstance(target, str):
        return class_of(target, id2label)
    if not 0 <= target < len(logits):
        raise ValueError(f"`target` must be a class from 0 to {len(logits) - 1}, or a label; got {target!r}")
    return target


def _as_image(pixel_values: torch.Tensor, processor: Any) -> np.ndarray:
    """(1, C, H, W) -> (H, W, 3), uint8: grey, the mean of all channels, where these are not red, green and blue.

    Values that were not rescaled have no bounds that are known: the lowest becomes black, and the highest white.
    """
    mean, std = (processor.image_mean, processor.image_std) if processor.do_normalize else ([0.0], [1.0])
    if not processor.do_rescale:
        values = denormalised(pixel_values, mean, std)
        lowest, highest = values.aminmax()
        pixel_values, mean, std = (values - lowest) / (highest - lowest).clamp(min=1e-12), [0.0], [1.0]
    picture = as_pictures(pixel_values, mean, std)[0]
    if picture.shape[-1] == 3:
        return picture
    return picture.mean(-1, keepdims=True).round().astype(np.uint8).repeat(3, -1)


def _run(
    model: ViTAEFamilyPreTrainedModel, cells: list[Cell], pixel_values: torch.Tensor
) -> tuple[torch.Tensor, _Recorder]:
    """Classify an image: its logits, on the CPU, and a record of what the cells did."""
    recorder = _Recorder(cells, model.config.has_class_token)
    try:
        with torch.no_grad(), _eager_attention(cells):
            logits = _Logits(model)(pixel_values)[0].cpu()
    finally:
        recorder.remove()
    if not logits.isfinite().all():
        raise ValueError("the scores of the image are not finite")
    return logits, recorder


def explain(model: PreTrainedModel, processor: Any, image: Any, target: int | str | None = None) -> Explanation:
    """Find out what a classifier saw in an image.

    Args:
        model: an image classifier of this family, in any mode, dtype and attention implementation, compiled or not.
            It is changed while this function runs and then restored, so explain one image at a time.
        processor: its image processor.
        image: one picture, in any form that the processor takes: PIL, array, path.
        target: the class to explain by Grad-CAM, as number or label; default: the likeliest class.

    Raises:
        ValueError: the model is no classifier of this family, the image cannot be read, there is more than one image,
            there is no class `target`, or the scores are not finite.
    """
    started = time.perf_counter()
    model = getattr(model, "_orig_mod", model)  # the model inside of what `torch.compile` returned
    is_classifier = isinstance(getattr(model, "classifier", None), nn.Linear)
    if not isinstance(model, ViTAEFamilyPreTrainedModel) or not is_classifier:
        raise ValueError(f"expected an image classifier of the ViTAE family, got {type(model).__name__}")
    pictures = processor(image, return_tensors="pt").pixel_values
    if len(pictures) != 1:
        raise ValueError(f"expected one image, got {len(pictures)}")
    pixel_values, cells = pictures.to(model.device, model.dtype), two_branch_cells(model)
    id2label = label_names(model.config)
    with _evaluating(model):
        logits, seen = _run(model, cells, pixel_values)
        target = _target_class(target, logits, id2label)
        heat = grad_cam(model, pixel_values, target)
    shares = [seen.shares[cell.name] for cell in cells]
    return Explanation(
        image=_as_image(pictures, processor),
        labels=best_labels(model.config, logits),
        target=target,
        target_label=id2label[target],
        grad_cam=heat,
        cells=[cell.name for cell in cells],
        stages=[cell.stage for cell in cells],
        attention=[seen.attention[cell.name] for cell in cells],
        rollout=seen.rollout,
        attention_share=shares,
        convolution_share=[1 - share for share in shares],
        seconds=time.perf_counter() - started,
    )


MOST_CELLS = 6
"""The number of cells that a picture has room for."""
MOST_ATTENTION = 5
"""Where the scale of colours ends, in multiples of the mean. A longer one would make most of the map dark."""
BRANCH_COLOURS = "PuOr"
"""matplotlib's colours from orange (convolution) to purple (attention)."""


@plain_text
def draw(explanation: Explanation) -> Figure:
    """Draw an explanation.

    From top to bottom: the image, its scores, Grad-CAM and the rollout of the last stage; attention and branch shares
    of up to six cells; the mean shares of all cells.
    """
    count = len(explanation.cells)
    shown = np.linspace(0, count - 1, min(MOST_CELLS, count)).round().astype(int).tolist()
    height, width = explanation.image.shape[:2]
    tall = 2.2 * min(max(height / width, 0.4), 2.5)
    heights = [1.3 * tall + 0.5, 2 * tall + 1, 2.6]
    figure = Figure(figsize=(14, sum(heights)), layout="constrained")
    overview, cells, depth = figure.subfigures(3, 1, height_ratios=heights, hspace=0.03, squeeze=False)[:, 0]
    _draw_overview(overview, explanation)
    _draw_cells(cells, explanation, shown)
    _draw_depth(depth.subplots(), explanation)
    return figure


def draw_grey(axis: Axes, image: np.ndarray, title: str) -> None:
    """Draw an image, uint8 `(height, width, 3)`, in pale grey."""
    axis.imshow(image.mean(-1), cmap="gray", vmin=-255, vmax=255)
    axis.set_title(title, fontsize=10)
    axis.set_axis_off()


def draw_heat(axis: Axes, image: np.ndarray, heat: np.ndarray, title: str, **options: Any) -> AxesImage:
    """Draw a map over an image in pale grey.

    Args:
        image: uint8 `(height, width, 3)`.
        heat: `(h, w)`, a grid of any size that covers the image.
        **options: as for `imshow`.
    """
    draw_grey(axis, image, title)
    height, width = image.shape[:2]
    return axis.imshow(heat, extent=(-0.5, width - 0.5, height - 0.5, -0.5), alpha=0.7, **options)


def _draw_overview(figure: SubFigure, explanation: Explanation) -> None:
    image = explanation.image
    picture, bars, cam, flow = figure.subplots(1, 4)
    picture.imshow(image)
    picture.set_axis_off()
    picture.set_title("what the network saw", fontsize=10)
    _draw_scores(bars, explanation)
    heat = draw_heat(cam, image, explanation.grad_cam, f"Grad-CAM: {_short(explanation.target_label)}", cmap="inferno")
    figure.colorbar(heat, ax=cam, shrink=0.8).set_ticks([0, 1], labels=["least", "most"])
    if not explanation.rollout:
        flow.set_axis_off()
        return
    stage, rollout = list(explanation.rollout.items())[-1]
    title = f"attention rollout of {stage_name(stage)}"
    heat = draw_heat(flow, image, rollout * rollout.size, title, cmap="inferno", vmin=0)
    figure.colorbar(heat, ax=flow, shrink=0.8, label="over the mean")


def _draw_scores(axis: Axes, explanation: Explanation) -> None:
    best = explanation.labels[::-1]
    colours = ["tab:red" if entry["label"] == explanation.target_label else "tab:gray" for entry in best]
    axis.barh(range(len(best)), [entry["score"] for entry in best], color=colours, height=0.4)
    for line, entry in enumerate(best):
        axis.text(0.01, line + 0.25, f"{_short(entry['label'])} {entry['score']:.1%}", fontsize=10)
    height, width = explanation.image.shape[:2]
    axis.set(xlim=(0, 1), ylim=(-0.4, len(best) - 0.2), yticks=[], xticks=[], box_aspect=max(height / width, 0.6))
    axis.spines[["top", "right", "bottom"]].set_visible(False)
    axis.set_title("scores", fontsize=10)


def _short(label: str) -> str:
    return textwrap.fill(label, 26, max_lines=1, placeholder="…")


def _draw_cells(figure: SubFigure, explanation: Explanation, shown: list[int]) -> None:
    """Draw the attention of the shown cells in the upper line, their branch shares in the lower."""
    image, looks = explanation.image, None
    upper, lower = figure.subplots(2, max(4, len(shown)), squeeze=False)
    for axis in (*upper, *lower):
        axis.set_axis_off()
    relative = {index: heat * heat.size for index in shown if (heat := explanation.attention[index]) is not None}
    highest = min(MOST_ATTENTION, max((heat.max() for heat in relative.values()), default=1))
    for axis, below, index in zip(upper, lower, shown):
        name, heat, share = explanation.cells[index], relative.get(index), explanation.attention_share[index]
        if heat is not None:
            looks = draw_heat(axis, image, heat, name, cmap="inferno", vmin=0, vmax=highest)
        else:
            draw_grey(axis, image, name)
            axis.text(0.5, 0.5, "no matrix\nof tokens", ha="center", va="center", transform=axis.transAxes)
        shares = draw_heat(below, image, share, f"{share.mean():.0%} attention", cmap=BRANCH_COLOURS, vmin=0, vmax=1)
    if looks is not None:
        extend = "max" if highest == MOST_ATTENTION else "neither"
        figure.colorbar(looks, ax=upper, shrink=0.8, extend=extend, label="where attention looks,\nover the mean")
    bar = figure.colorbar(shares, ax=lower, shrink=0.8, label="what a cell\nadds to a token")
    bar.set_ticks([0, 0.5, 1], labels=["convolution", "half", "attention"])


def _draw_depth(axis: Axes, explanation: Explanation) -> None:
    """Draw the shares of all cells: their mean over tokens, and error bars for the middle 80 % of the tokens."""
    places, shares = np.arange(len(explanation.cells)), explanation.attention_share
    means = np.array([share.mean() for share in shares])
    low, high = np.transpose([np.quantile(share, (0.1, 0.9)) for share in shares])
    purple, orange = colormaps[BRANCH_COLOURS](0.85), colormaps[BRANCH_COLOURS](0.25)
    axis.fill_between(places, means, 1, color=orange, alpha=0.4, label="convolution")
    axis.fill_between(places, 0, means, color=purple, alpha=0.4, label="attention")
    axis.errorbar(
        places, means, (means - low, high - means), color="black", marker="o", capsize=3, label="mean, 80 % of tokens"
    )
    is_crowded = len(places) > 9
    axis.set_xticks(
        places, explanation.cells, fontsize=9, rotation=40 if is_crowded else 0, ha="right" if is_crowded else "center"
    )
    axis.set(ylim=(0, 1), xlim=(places[0] - 0.2, places[-1] + 0.2))
    axis.set_title("share of the two branches over depth", fontsize=10)
    axis.yaxis.set_major_formatter(PercentFormatter(1))
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False)
