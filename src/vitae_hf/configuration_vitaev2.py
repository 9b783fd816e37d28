# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Every number that shapes a ViTAEv2 network, and its validation."""

from typing import Any, ClassVar

from huggingface_hub.dataclasses import strict

from .configuration_vitae import WINDOW_PADDINGS, ViTAEFamilyConfig, require


DROP_PATH_SCHEDULES = ("original", "linear")


@strict
class ViTAEv2Config(ViTAEFamilyConfig):
    r"""
    Configuration of a [`ViTAEv2Model`]. The defaults are ViTAEv2-S; `vitae_hf.config_from_preset` has the others.

    A network is a list of stages. Each stage is one *reduction cell*, which embeds its input at a lower resolution, and
    `depths[i]` *normal cells*. Fields marked "per stage" hold one entry for each stage.

    Args:
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Side, or (height, width), in pixels, of the images the network was made for. It takes any multiple of 32.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image.
        strides (`tuple[int, ...]`, *optional*, defaults to `(4, 2, 2, 2)`):
            Per stage, the factor by which the reduction cell shrinks its input: 4 or 2.
        reduction_kernel_sizes (`tuple[int, ...]`, *optional*, defaults to `(7, 3, 3, 3)`):
            Per stage, the kernel of the pyramid's convolutions.
        reduction_dilations (`tuple[tuple[int, ...]]`, *optional*, defaults to 1–4, 1–3, 1–2 and 1–2):
            Per stage, the dilations of the pyramid, one convolution each.
        reduction_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 64, 128, 256)`):
            Per stage, the output channels of each of the pyramid's convolutions, and the inner width of the reduction
            cell's convolution branch.
        reduction_conv_groups (`tuple[int, ...]`, *optional*, defaults to `(1, 16, 32, 64)`):
            Per stage, the groups of the convolutions in the reduction cell's convolution branch.
        reduction_num_attention_heads (`tuple[int, ...]`, *optional*, defaults to `(1, 1, 2, 4)`):
            Per stage, the attention heads of the reduction cell.
        hidden_sizes (`tuple[int, ...]`, *optional*, defaults to `(64, 128, 256, 512)`):
            Per stage, the width of its tokens.
        depths (`tuple[int, ...]`, *optional*, defaults to `(2, 2, 8, 2)`):
            Per stage, the number of normal cells.
        num_attention_heads (`tuple[int, ...]`, *optional*, defaults to `(1, 2, 4, 8)`):
            Per stage, the attention heads of the normal cells. The entry of a stage without normal cells is ignored.
        window_sizes (`tuple[int | None, ...]`, *optional*, defaults to `(7, 7, None, None)`):
            Per stage, the side of the windows inside of which tokens attend to each other. `None`: all attend to all.
        window_padding (`str`, *optional*, defaults to `"both"`):
            Where zeros are added to a map that windows do not fill: half of them on `"both"` sides, or all at the
            `"end"`, the bottom and the right. The backbones of RSP and SAMRS need `"end"`, since they were trained so.
        conv_groups (`tuple[int, ...]`, *optional*, defaults to `(1, 32, 64, 128)`):
            Per stage, the groups of the normal cells' convolutions. The entry of a stage without them is ignored.
        mlp_ratio (`float`, *optional*, defaults to 4.0):
            Inner width of the normal cells' MLP and of their convolution branch, over the width of the tokens.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout in the normal cells, after the attention projection and after both layers of the MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the normal cells' attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Largest rate of the normal cells' stochastic depth. Reduction cells have none.
        drop_path_schedule (`str`, *optional*, defaults to `"original"`):
            Which rate each normal cell gets, of rates that rise linearly from 0 to `drop_path_rate`, one for each cell.
            `"linear"` gives them out in order. `"original"` does as the authors' code: stage i begins with rate number
            `depths[i - 1]`, not with the one after the last of stage i - 1. It is the default because the published
            accuracies were reached with it. Only training uses these rates.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that linear weights are drawn from.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the LayerNorms of the normal cells.
        reduction_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorms of the reduction cells.
        frozen_stages (`int`, *optional*, defaults to 0):
            For backbones: how many of the first stages are not trained. They keep their BatchNorm statistics too.
        out_features (`list[str]`, *optional*):
            For backbones: the maps to return, out of `"stem"` (the image), `"stage1"`, …, `"stage4"`.
        out_indices (`list[int]`, *optional*):
            The same as numbers, of which 0 is the stem. Default: the last stage.

    Raises:
        ValueError: a keyword is almost the name of a field. Other unknown keywords are kept with a warning.
        `huggingface_hub.errors.StrictDataclassError`: a field has the wrong type, or a value that no ViTAEv2 network
            can have. The message names the field, the value and what was expected.

    Example:

    ```python
    >>> from vitae_hf import ViTAEv2Config, ViTAEv2Model

    >>> model = ViTAEv2Model(ViTAEv2Config())  # ViTAEv2-S with random weights
    >>> model.config.hidden_size
    512
    ```

    Source: Zhang et al. 2022, ViTAEv2 (arXiv 2202.10108), figure 3 and table 2.
    """

    model_type: ClassVar[str] = "vitaev2"
    per_stage_fields: ClassVar[tuple[str, ...]] = (
        *ViTAEFamilyConfig.per_stage_fields,
        "reduction_num_attention_heads",
        "window_sizes",
    )
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_vitaev2.ViTAEv2Config",
        "AutoModel": "modeling_vitaev2.ViTAEv2Model",
        "AutoModelForImageClassification": "modeling_vitaev2.ViTAEv2ForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_vitaev2.ViTAEv2ForMaskedImageModeling",
        "AutoBackbone": "modeling_vitaev2.ViTAEv2Backbone",
    }
    code_files: ClassVar[tuple[str, ...]] = (
        *ViTAEFamilyConfig.code_files,
        "configuration_vitaev2.py",
        "modeling_vitaev2.py",
    )

    strides: tuple[int, ...] | list[int] = (4, 2, 2, 2)
    reduction_kernel_sizes: tuple[int, ...] | list[int] = (7, 3, 3, 3)
    reduction_dilations: tuple[tuple[int, ...], ...] | list[list[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2), (1, 2))
    reduction_channels: tuple[int, ...] | list[int] = (64, 64, 128, 256)
    reduction_conv_groups: tuple[int, ...] | list[int] = (1, 16, 32, 64)
    reduction_num_attention_heads: tuple[int, ...] | list[int] = (1, 1, 2, 4)
    hidden_sizes: tuple[int, ...] | list[int] = (64, 128, 256, 512)
    depths: tuple[int, ...] | list[int] = (2, 2, 8, 2)
    num_attention_heads: tuple[int, ...] | list[int] = (1, 2, 4, 8)
    window_sizes: tuple[int | None, ...] | list[int | None] = (7, 7, None, None)
    window_padding: str = "both"
    conv_groups: tuple[int, ...] | list[int] = (1, 32, 64, 128)
    drop_path_schedule: str = "original"

    def drop_path_rates(self, stage_idx: int) -> list[float]:
        """Rates of a stage's normal cells, which `drop_path_schedule` chooses."""
        if self.drop_path_schedule == "linear":
            start = sum(self.depths[:stage_idx])
        else:
            start = self.depths[stage_idx - 1] if stage_idx else 0
        return self.linear_drop_path_rates(start, length=self.depths[stage_idx])

    def validate_architecture(self) -> None:
        """Check the fields against each other. `@strict` calls this after it has checked their types."""
        schedule = self.drop_path_schedule
        require(schedule in DROP_PATH_SCHEDULES, "drop_path_schedule", f"be one of {DROP_PATH_SCHEDULES}", schedule)
        padding = self.window_padding
        require(padding in WINDOW_PADDINGS, "window_padding", f"be one of {WINDOW_PADDINGS}", padding)
        super().validate_architecture()

    def _validate_reduction_cell(self, row: dict[str, Any], in_channels: int, where: str) -> None:
        super()._validate_reduction_cell(row, in_channels, where)
        self._validate_reduction_conv_branch(row, in_channels, where)
        hidden_size, heads, window = row["hidden_sizes"], row["reduction_num_attention_heads"], row["window_sizes"]
        divides = heads >= 1 and hidden_size % heads == 0
        require(divides, "reduction_num_attention_heads", f"divide the width {hidden_size}", heads, where)
        require(window is None or window >= 1, "window_sizes", "be at least 1, or None", window, where)


ViTAEv2Config.register_for_auto_class()

__all__ = ["ViTAEv2Config"]
