# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Every number that shapes a ViTAE network, and its validation."""

import math
from dataclasses import fields
from difflib import get_close_matches
from os import PathLike
from pathlib import Path
from shutil import copyfile
from typing import Any, ClassVar, Self

from huggingface_hub.dataclasses import strict
from transformers.backbone_utils import BackboneConfigMixin
from transformers.configuration_utils import PreTrainedConfig
from transformers.utils import logging


logger = logging.get_logger(__name__)

# Keywords that the library accepts in addition to the fields of `PreTrainedConfig`.
LIBRARY_FIELDS: set[str] = {
    "attn_implementation",
    "auto_map",
    "model_type",
    "name_or_path",
    "num_labels",
    "output_attentions",
    "quantization_config",
    "torch_dtype",
}
LABEL_FIELDS: tuple[str, ...] = ("id2label", "label2id")
LARGEST: int = 2**31 - 1  # the largest size of a tensor's dimension
REDUCTION_TYPES: tuple[str, ...] = ("random_feature", "pyramid", "patch")
WINDOW_PADDINGS: tuple[str, ...] = ("both", "end")
WINDOW_TYPES: tuple[str, ...] = ("plain", "rotated", "rotated_apart")


def as_tuple(value: Any) -> Any:
    """Lists, and lists in lists, as tuples."""
    return tuple(as_tuple(item) for item in value) if isinstance(value, (list, tuple)) else value


def require(condition: bool, field: str, expected: str, value: Any, where: str = "") -> None:
    """Raise a `ValueError` with the field, what was expected and the value, unless the condition holds."""
    if not condition:
        raise ValueError(f"`{field}`{where} must {expected}, got {value!r}.")


class PatchSize(int):
    """The side of square patches in pixels. The library's depth estimators divide by it; VitPose asks for each side."""

    def __getitem__(self, axis: int) -> int:
        return (int(self), int(self))[axis]


def refuse_misspelt(config_class: Any, name: str) -> None:
    """Raise a `ValueError` if this is almost the name of a field."""
    known = [field.name.removeprefix("_") for field in fields(config_class)]
    if name not in known and (similar := get_close_matches(name, known, n=1, cutoff=0.85)):
        raise ValueError(f"{config_class.__name__} has no field {name!r}; did you mean {similar[0]!r}?")


def complete_labels(config: Any) -> None:
    """Make `id2label` of the names alone, as a data set has them, and each of the two label fields of the other."""
    if isinstance(config.id2label, (list, tuple)):
        config.id2label = dict(enumerate(config.id2label))
    if config.label2id is None and config.id2label is not None:
        config.label2id = {label: int(index) for index, label in config.id2label.items()}
    elif config.id2label is None and config.label2id is not None:
        config.id2label = {int(index): label for label, index in config.label2id.items()}


@strict
class ViTAEFamilyConfig(BackboneConfigMixin, PreTrainedConfig):
    """Base class of the configurations. [`ViTAEConfig`] and [`ViTAEv2Config`] describe the fields."""

    attribute_map: ClassVar[dict[str, str]] = {"num_hidden_layers": "num_stages"}
    # Trainer hands everything else that a model returns to `compute_metrics`, and would keep the features of a split.
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["pooler_output"]
    per_stage_fields: ClassVar[tuple[str, ...]] = (
        "strides",
        "reduction_kernel_sizes",
        "reduction_dilations",
        "reduction_channels",
        "reduction_conv_groups",
        "hidden_sizes",
        "depths",
        "num_attention_heads",
        "conv_groups",
    )
    # For folders that load without this package: the class for each Auto class, and the code that is saved with them.
    auto_classes: ClassVar[dict[str, str]] = {}
    code_files: ClassVar[tuple[str, ...]] = (
        "configuration_vitae.py",
        "attention_vitae.py",
        "layers_vitae.py",
        "modeling_base_vitae.py",
    )

    image_size: int | list[int] | tuple[int, int] = 224
    num_channels: int = 3
    strides: tuple[int, ...] | list[int] = ()
    reduction_kernel_sizes: tuple[int, ...] | list[int] = ()
    reduction_dilations: tuple[tuple[int, ...], ...] | list[list[int]] = ()
    reduction_channels: tuple[int, ...] | list[int] = ()
    reduction_conv_groups: tuple[int, ...] | list[int] = ()
    hidden_sizes: tuple[int, ...] | list[int] = ()
    depths: tuple[int, ...] | list[int] = ()
    num_attention_heads: tuple[int, ...] | list[int] = ()
    conv_groups: tuple[int, ...] | list[int] = ()
    mlp_ratio: float | int = 4.0
    hidden_dropout_prob: float | int = 0.0
    attention_probs_dropout_prob: float | int = 0.0
    drop_path_rate: float | int = 0.1
    initializer_range: float | int = 0.02
    layer_norm_eps: float | int = 1e-6
    reduction_layer_norm_eps: float | int = 1e-5
    frozen_stages: int = 0
    _out_features: list[str] | None = None
    _out_indices: list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("image_size", *self.per_stage_fields):  # lists in JSON
            setattr(self, name, as_tuple(getattr(self, name)))
        self.stage_names: list[str] = self.feature_map_names
        self.set_output_features_output_indices(
            out_indices=kwargs.pop("out_indices", None), out_features=kwargs.pop("out_features", None)
        )
        # Saved configurations have these two keys, which nobody types. Their unknown names are kept without a warning.
        is_saved = "model_type" in kwargs or "stage_names" in kwargs
        kwargs.pop("stage_names", None)  # follows from `depths`
        for name in () if is_saved else kwargs:
            self.check_typed_name(name)
            if name not in LIBRARY_FIELDS and not name.startswith("_"):
                logger.warning("%s has no field %r; nothing will read it.", type(self).__name__, name)
        kwargs = {name: value for name, value in kwargs.items() if not self.is_derived(name)}
        complete_labels(self)
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """[`PreTrainedConfig.from_dict`]. Unknown names in a saved dictionary are kept, but keywords are checked.

        Raises:
            ValueError: a keyword is almost the name of a field, or names something that follows from the fields.
        """
        for name in kwargs:
            cls.check_typed_name(name)
        labels = {name: kwargs.pop(name) for name in LABEL_FIELDS if name in kwargs}
        if isinstance(names := labels.get("id2label"), (list, tuple)):
            labels["id2label"] = dict(enumerate(names))
        if any(labels.values()):  # both label fields of the dictionary are replaced, since they belong together
            config_dict = {name: value for name, value in config_dict.items() if name not in LABEL_FIELDS} | labels
        return super().from_dict({"model_type": cls.model_type, **config_dict}, **kwargs)

    @classmethod
    def from_json_file(cls, json_file: str | PathLike[str]) -> Self:
        return cls.from_dict(cls._dict_from_json_file(json_file))

    @classmethod
    def check_typed_name(cls, name: str) -> None:
        """Raise a `ValueError` if this is almost the name of a field, or names something that follows from fields."""
        refuse_misspelt(cls, name)
        if cls.is_derived(name):
            raise ValueError(f"{cls.__name__} has no field {name!r}: it follows from others.")

    @classmethod
    def is_derived(cls, name: str) -> bool:
        """Whether this name follows from the fields and cannot be set, such as `num_hidden_layers`."""
        attribute = getattr(cls, cls.attribute_map.get(name, name), None)
        return isinstance(attribute, property) and attribute.fset is None

    def update(self, config_dict: dict[str, Any]) -> None:
        """[`PreTrainedConfig.update`]. What follows from the fields may be among the values, if it is what follows.

        Programs write back what they have read, as the library's example for masked image modelling does.

        Raises:
            ValueError: a value that follows from fields is another one.
        """
        for name, value in config_dict.items():
            if self.is_derived(name):
                follows = getattr(self, name)
                require(value == follows, name, f"be {follows}, which follows from other fields", value)
            else:
                setattr(self, name, value)

    @property
    def feature_map_names(self) -> list[str]:
        """Names of the maps that a backbone can return."""
        return ["stem"] + [f"stage{index}" for index in range(1, self.num_backbone_stages + 1)]

    @property
    def num_stages(self) -> int:
        return len(self.depths)

    @property
    def num_backbone_stages(self) -> int:
        """The stages that `out_features` and `frozen_stages` of a backbone count."""
        return self.num_stages

    @property
    def hidden_size(self) -> int:
        """Width of the last stage's tokens and of `pooler_output`."""
        return self.hidden_sizes[-1]

    @property
    def total_stride(self) -> int:
        """Both sides of an image must be multiples of this many pixels."""
        return math.prod(self.strides)

    @property
    def patch_size(self) -> PatchSize:
        """Side in pixels of the patches that can be masked one by one: the stride of the first stage."""
        return PatchSize(self.strides[0])

    @property
    def encoder_stride(self) -> int:
        """The library's name for `total_stride` where images are reconstructed: the side in pixels of a last token."""
        return self.total_stride

    @property
    def is_plain(self) -> bool:
        """Whether this is a plain variant, one stage after patch embeddings, which only [`ViTAEConfig`] has."""
        return False

    @property
    def has_class_token(self) -> bool:
        """Whether a class token comes before the tokens of the grid, which only plain variants have."""
        return False

    @property
    def adds_to_scores(self) -> bool:
        """Whether attention scores are more than products of queries and keys, which some implementations cannot do."""
        return False

    @property
    def image_height_width(self) -> tuple[int, int]:
        height, width = [self.image_size] * 2 if isinstance(self.image_size, int) else self.image_size
        return height, width

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]  # the library reads it, never sets it
        """Which modules of the base model FSDP2 shards one by one, when the library shards a model while loading it."""
        return {"stages.*.reduction_cell": "free_full_weight", "stages.*.normal_cells.*": "free_full_weight"}

    def linear_drop_path_rates(self, start: int, length: int) -> list[float]:
        """`length` rates, from number `start` on, of those that rise linearly from 0 to `drop_path_rate`."""
        last = max(sum(self.depths) - 1, 1)
        return [self.drop_path_rate * index / last for index in range(start, start + length)]

    def validate_architecture(self) -> None:
        """Check the fields against each other. `@strict` calls this after it has checked their types."""
        require(self.num_stages >= 1, "depths", "have an entry for each stage", self.depths)
        require(self.num_channels >= 1, "num_channels", "be at least 1", self.num_channels)
        for name in ("initializer_range", "layer_norm_eps", "reduction_layer_norm_eps", "mlp_ratio"):
            number = getattr(self, name)
            require(0 < number < math.inf, name, "be a positive number", number)
        for name in self.per_stage_fields:
            entries = getattr(self, name)
            require(len(entries) == self.num_stages, name, f"have {self.num_stages} entries as `depths` has", entries)
        for name in ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate"):
            require(0 <= getattr(self, name) < 1, name, "be at least 0 and below 1", getattr(self, name))
        last = self.num_backbone_stages
        is_stage = 0 <= self.frozen_stages <= last
        require(is_stage, "frozen_stages", f"be a number of stages, 0 to {last}", self.frozen_stages)
        for name in self.per_stage_fields:
            for entry in getattr(self, name):
                largest = max(entry, default=0) if isinstance(entry, tuple) else entry
                is_size = not isinstance(largest, int) or largest <= LARGEST
                require(is_size, name, f"be at most {LARGEST}", largest)
        for stage_idx in range(self.num_stages):
            row = {name: getattr(self, name)[stage_idx] for name in self.per_stage_fields}
            in_channels = self.hidden_sizes[stage_idx - 1] if stage_idx else self.num_channels
            self._validate_reduction_cell(row, in_channels, where=f" in stage {stage_idx + 1}")
            self._validate_normal_cells(row, where=f" in stage {stage_idx + 1}")
        sides, stride = self.image_height_width, self.total_stride
        is_multiple = all(side > 0 and side % stride == 0 for side in sides)
        require(is_multiple, "image_size", f"be a positive multiple of the total stride {stride}", self.image_size)

    def _validate_reduction_cell(self, row: dict[str, Any], in_channels: int, where: str) -> None:
        kernel_size, stride, dilations = (row["reduction_kernel_sizes"], row["strides"], row["reduction_dilations"])
        for name in ("reduction_channels", "reduction_conv_groups", "hidden_sizes", "strides"):
            require(row[name] >= 1, name, "be at least 1", row[name], where)
        require(min(dilations, default=0) >= 1, "reduction_dilations", "be dilations of at least 1", dilations, where)
        require(kernel_size >= stride, "reduction_kernel_sizes", f"be at least {stride}", kernel_size, where)

    def _validate_reduction_conv_branch(self, row: dict[str, Any], in_channels: int, where: str) -> None:
        stride, groups = row["strides"], row["reduction_conv_groups"]
        require(stride in (2, 4), "strides", "be 2 or 4", stride, where)
        widths = (in_channels, row["reduction_channels"], row["hidden_sizes"])
        divides = all(width % groups == 0 for width in widths)
        require(divides, "reduction_conv_groups", f"divide the widths {widths}", groups, where)

    def _validate_normal_cells(self, row: dict[str, Any], where: str) -> None:
        depth, hidden_size, num_heads = row["depths"], row["hidden_sizes"], row["num_attention_heads"]
        require(depth >= 0, "depths", "be at least 0", depth, where)
        if depth == 0:
            return
        divides = num_heads >= 1 and hidden_size % num_heads == 0
        require(divides, "num_attention_heads", f"divide the width {hidden_size}", num_heads, where)
        inner = self.mlp_ratio * hidden_size
        require(1 <= inner <= LARGEST, "mlp_ratio", f"give a width of 1 to {LARGEST}", self.mlp_ratio, where)
        widths, groups = (hidden_size, int(inner)), row["conv_groups"]
        divides = groups >= 1 and all(width % groups == 0 for width in widths)
        require(divides, "conv_groups", f"divide the widths {widths}", groups, where)

    def save_pretrained(self, save_directory: str | PathLike[str], push_to_hub: bool = False, **kwargs: Any) -> None:
        """Save `config.json` and the code files, so that every Auto class can load the folder without this package.

        A user's class that was registered by `register_for_auto_class` takes the place of ours. See
        [`PreTrainedConfig.save_pretrained`] for the arguments.
        """
        folder = Path(save_directory)
        folder.mkdir(parents=True, exist_ok=True)
        # The library has just saved the model's own code. What else the configuration names is of an earlier folder.
        named = getattr(self, "auto_map", None) or {}
        texts = {key: name for key, name in named.items() if isinstance(name, str)}  # others are of tokenizers
        own = {key: name for key, name in texts.items() if (folder / f"{name.partition('.')[0]}.py").exists()}
        self.auto_map: dict[str, str] = {**self.auto_classes, **own}
        for name in self.code_files:
            source = Path(__file__).with_name(name)
            # If this file was loaded as remote code, the model's files may be in another cache folder. The library then
            # copies them itself.
            if source.exists():
                copyfile(source, folder / name)
        super().save_pretrained(save_directory, push_to_hub=push_to_hub, **kwargs)

    def _get_files_timestamps(self, working_dir: str | PathLike[str]) -> dict[str, float]:
        """Without the code: `push_to_hub=True` uploads what is newer, and the code was copied just before."""
        times = super()._get_files_timestamps(working_dir)
        return {name: time for name, time in times.items() if not name.endswith(".py")}


@strict
class ViTAEConfig(ViTAEFamilyConfig):
    r"""
    Configuration of a [`ViTAEModel`]. The defaults are ViTAE-S; `vitae_hf.config_from_preset` has the other variants.

    A network is a list of stages. Each stage is one *reduction cell*, which embeds its input at a lower resolution, and
    `depths[i]` *normal cells*. Fields marked "per stage" hold one entry for each stage.

    Args:
        image_size (`int` or `tuple[int, int]`, *optional*, defaults to 224):
            Side, or (height, width), in pixels, of the images the network was made for. It fixes the position table of
            the plain variants; the pyramid variants take any multiple of the total stride.
        num_channels (`int`, *optional*, defaults to 3):
            Channels of the input image.
        reduction_types (`tuple[str, ...]`, *optional*, defaults to `("random_feature", "random_feature", "pyramid")`):
            Per stage, the kind of reduction cell: `"random_feature"` (dilated pyramid, random-feature attention and a
            convolution branch) or `"pyramid"` (the dilated pyramid alone). `("patch",)` stands for one stage without a
            reduction cell, after a patch embedding with learned positions: the plain variants.
        class_token (`bool`, *optional*, defaults to `True`):
            Plain variants: whether a class token comes before the patches.
        strides (`tuple[int, ...]`, *optional*, defaults to `(4, 2, 2)`):
            Per stage, the factor by which the reduction cell shrinks its input: 4 or 2, or the patch size.
        reduction_kernel_sizes (`tuple[int, ...]`, *optional*, defaults to `(7, 3, 3)`):
            Per stage, the kernel of the pyramid's convolutions. A patch embedding's kernel equals its stride.
        reduction_dilations (`tuple[tuple[int, ...]]`, *optional*, defaults to `((1, 2, 3, 4), (1, 2, 3), (1, 2))`):
            Per stage, the dilations of the pyramid, one convolution each.
        reduction_channels (`tuple[int, ...]`, *optional*, defaults to `(64, 64, 192)`):
            Per stage, the output channels of each of the pyramid's convolutions, and the inner width of the reduction
            cell's convolution branch.
        reduction_conv_groups (`tuple[int, ...]`, *optional*, defaults to `(1, 1, 1)`):
            Per stage, the groups of the convolutions in the reduction cell's convolution branch.
        reduction_dropout_prob (`float`, *optional*, defaults to 0.1):
            Dropout after the attention projection and the MLP of the random-feature reduction cells. As in the authors'
            code, it does not depend on `hidden_dropout_prob`.
        hidden_sizes (`tuple[int, ...]`, *optional*, defaults to `(96, 192, 384)`):
            Per stage, the width of its tokens.
        depths (`tuple[int, ...]`, *optional*, defaults to `(0, 0, 14)`):
            Per stage, the number of normal cells.
        num_attention_heads (`tuple[int, ...]`, *optional*, defaults to `(1, 1, 6)`):
            Per stage, the attention heads of the normal cells. The entry of a stage without normal cells is ignored.
        conv_groups (`tuple[int, ...]`, *optional*, defaults to `(1, 1, 96)`):
            Per stage, the groups of the normal cells' convolutions. The entry of a stage without them is ignored.
        conv_branch_depth (`int`, *optional*, defaults to 3):
            Convolutions in the branch of a normal cell: 3, or 2 as in the plain variants.
        conv_kernel_size (`int`, *optional*, defaults to 3):
            Kernel of the convolutions in the branch of a normal cell: 3, or 1 for a masked autoencoder, whose visible
            patches have no neighbours. `from_pretrained` of all other classes expands kernels of 1 to 3.
        qkv_bias (`bool`, *optional*, defaults to `True`):
            Whether queries, keys and values of the normal cells have a bias.
        window_size (`int`, *optional*):
            Plain variants without a class token, like the next four: side of the windows, in patches, inside of which
            the tokens of a cell attend to each other. Default: all attend to all.
        window_type (`str`, *optional*, defaults to `"plain"`):
            What moves with the content of a window: nothing (`"plain"`), the place of its keys and values together
            (`"rotated"`: they shift, scale and turn, for each head), or the places of both by themselves
            (`"rotated_apart"`).
        window_padding (`str`, *optional*, defaults to `"both"`):
            Where the grid is padded to fill its windows: on `"both"` sides, each by half, or at the `"end"`.
        global_attn_indexes (`tuple[int, ...]`, *optional*, defaults to `()`):
            The cells, counted from 0, in which all tokens attend to all although the others have windows.
        use_rel_pos (`bool`, *optional*, defaults to `False`):
            Whether scores depend on how many rows and columns lie between two tokens. Rotated windows always do.
        mlp_ratio (`float`, *optional*, defaults to 3.0):
            Inner width of the normal cells' MLP and of their convolution branch, over the width of the tokens.
        hidden_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout in the normal cells, after the attention projection and after both layers of the MLP.
        attention_probs_dropout_prob (`float`, *optional*, defaults to 0.0):
            Dropout on the normal cells' attention weights.
        drop_path_rate (`float`, *optional*, defaults to 0.1):
            Stochastic depth of the last normal cell; the rates rise linearly from 0 over all normal cells.
        initializer_range (`float`, *optional*, defaults to 0.02):
            Standard deviation of the truncated normal that linear weights are drawn from.
        layer_norm_eps (`float`, *optional*, defaults to 1e-6):
            Epsilon of the LayerNorms of the normal cells and of the plain variants' final one.
        reduction_layer_norm_eps (`float`, *optional*, defaults to 1e-5):
            Epsilon of the LayerNorms of the reduction cells.
        feature_pyramid_channels (`int`, *optional*):
            For backbones of plain variants: the width of four maps that are made from the last one, as in ViTDet,
            and returned by default. With 16×16 patches their strides are 4, 8, 16 and 32. Default: no such maps.
        rescaled_cells (`tuple[int, ...]`, *optional*):
            For backbones of plain variants: four cells, counted from 0, after which these four maps are taken; they are
            only rescaled and stay as wide as the tokens. `(-1,)` rescales the normalised output of the last cell to all
            four. Default: no such maps.
        cell_stages (`bool`, *optional*, defaults to `False`):
            For backbones of plain variants, like the next three: whether each cell is a stage, as in the backbones of
            DINOv2 and BEiT: `"stage1"` is then the output of the first cell and not of the last, `hidden_states` are
            the input of the first cell and the output of each, and `frozen_stages` counts cells.
        apply_layernorm (`bool`, *optional*, defaults to `False`):
            Whether the outputs of stages are normalised, all by one LayerNorm, before they are returned. A masked
            autoencoder's folder has its weights; beside other weights it is new.
        reshape_hidden_states (`bool`, *optional*, defaults to `True`):
            `False`: return tokens `(B, T, C)` in place of maps, as DPT, Depth Anything, ZoeDepth and VitPose take them.
            Images are then cut to whole patches, not padded.
        return_class_token (`bool`, *optional*, defaults to `True`):
            Whether these tokens begin with the class token, as the depth estimators need it, or leave it out, as
            VitPose needs it.
        mask_ratio (`float`, *optional*, defaults to 0.75):
            For masked autoencoders ([`ViTAEForPreTraining`]), like the next five: the share of the patches that the
            encoder does not see.
        decoder_hidden_size (`int`, *optional*, defaults to 512):
            Width of the decoder's tokens.
        decoder_num_hidden_layers (`int`, *optional*, defaults to 8):
            Transformer blocks of the decoder.
        decoder_num_attention_heads (`int`, *optional*, defaults to 16):
            Attention heads of each block.
        decoder_intermediate_size (`int`, *optional*, defaults to 2048):
            Inner width of the MLP of each block.
        norm_pix_loss (`bool`, *optional*, defaults to `False`):
            Whether each patch of the target is normalised by its own mean and standard deviation.
        frozen_stages (`int`, *optional*, defaults to 0):
            For backbones: how many of the first stages are not trained. They keep their BatchNorm statistics too.
        out_features (`list[str]`, *optional*):
            For backbones: the maps to return, out of `"stem"` (the input of the first stage), `"stage1"`, `"stage2"`, …
            and those of the feature pyramid, `"p2"` to `"p5"`, which are named after their strides 2² to 2⁵. Plain
            variants have one stage, or with `cell_stages` one for each cell.
        out_indices (`list[int]`, *optional*):
            The same as numbers, of which 0 is the stem. Default: the last stage.

    Raises:
        ValueError: a keyword is almost the name of a field. Other unknown keywords are kept with a warning.
        `huggingface_hub.errors.StrictDataclassError`: a field has the wrong type, or a value that no ViTAE network can
            have. The message names the field, the value and what was expected.

    Example:

    ```python
    >>> from vitae_hf import ViTAEConfig, ViTAEModel

    >>> model = ViTAEModel(ViTAEConfig())  # ViTAE-S with random weights
    >>> model.config.hidden_size
    384
    ```

    Source: Xu et al. 2021, ViTAE (arXiv 2106.03348), figure 2 and table 1.
    """

    model_type: ClassVar[str] = "vitae"
    per_stage_fields: ClassVar[tuple[str, ...]] = ("reduction_types", *ViTAEFamilyConfig.per_stage_fields)
    auto_classes: ClassVar[dict[str, str]] = {
        "AutoConfig": "configuration_vitae.ViTAEConfig",
        "AutoModel": "modeling_vitae.ViTAEModel",
        "AutoModelForImageClassification": "modeling_vitae.ViTAEForImageClassification",
        "AutoModelForMaskedImageModeling": "modeling_vitae.ViTAEForMaskedImageModeling",
        "AutoModelForPreTraining": "modeling_vitae.ViTAEForPreTraining",
        "AutoBackbone": "modeling_vitae.ViTAEBackbone",
    }
    code_files: ClassVar[tuple[str, ...]] = (
        *ViTAEFamilyConfig.code_files,
        "decoder_vitae.py",
        "embeddings_vitae.py",
        "modeling_vitae.py",
        "rotated_windows_vitae.py",
    )

    reduction_types: tuple[str, ...] | list[str] = ("random_feature", "random_feature", "pyramid")
    strides: tuple[int, ...] | list[int] = (4, 2, 2)
    reduction_kernel_sizes: tuple[int, ...] | list[int] = (7, 3, 3)
    reduction_dilations: tuple[tuple[int, ...], ...] | list[list[int]] = ((1, 2, 3, 4), (1, 2, 3), (1, 2))
    reduction_channels: tuple[int, ...] | list[int] = (64, 64, 192)
    reduction_conv_groups: tuple[int, ...] | list[int] = (1, 1, 1)
    reduction_dropout_prob: float | int = 0.1
    hidden_sizes: tuple[int, ...] | list[int] = (96, 192, 384)
    depths: tuple[int, ...] | list[int] = (0, 0, 14)
    num_attention_heads: tuple[int, ...] | list[int] = (1, 1, 6)
    conv_groups: tuple[int, ...] | list[int] = (1, 1, 96)
    conv_branch_depth: int = 3
    conv_kernel_size: int = 3
    class_token: bool = True
    qkv_bias: bool = True
    window_size: int | None = None
    window_type: str = "plain"
    window_padding: str = "both"
    global_attn_indexes: tuple[int, ...] | list[int] = ()
    use_rel_pos: bool = False
    mlp_ratio: float | int = 3.0
    feature_pyramid_channels: int | None = None
    rescaled_cells: tuple[int, ...] | list[int] = ()
    cell_stages: bool = False
    apply_layernorm: bool = False
    reshape_hidden_states: bool = True
    return_class_token: bool = True
    mask_ratio: float | int = 0.75
    decoder_hidden_size: int = 512
    decoder_num_hidden_layers: int = 8
    decoder_num_attention_heads: int = 16
    decoder_intermediate_size: int = 2048
    norm_pix_loss: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        for name in ("global_attn_indexes", "rescaled_cells"):
            setattr(self, name, as_tuple(getattr(self, name)))
        if not (kwargs.get("out_features") or kwargs.get("out_indices")):
            kwargs["out_features"] = self.feature_pyramid_names or None
        try:
            super().__post_init__(**kwargs)
        except ValueError as error:
            if self.cell_stages or "stage_names" not in str(error) or not self.is_plain:
                raise
            raise ValueError(f"{error}; with `cell_stages=True` each cell of a plain variant is a stage") from None

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Self:
        """As in the base class. Where other maps exist, it is also decided anew which of them a backbone returns."""
        makes_maps = ("feature_pyramid_channels", "rescaled_cells", "cell_stages")
        if any(name in kwargs for name in makes_maps):
            derived = ("out_features", "out_indices", "stage_names")
            config_dict = {name: value for name, value in config_dict.items() if name not in derived}
            for name in (*makes_maps, "out_features", "out_indices"):
                if name in kwargs:
                    config_dict[name] = kwargs.pop(name)
        return super().from_dict(config_dict, **kwargs)

    @property
    def num_backbone_stages(self) -> int:
        return sum(self.depths) if self.cell_stages else self.num_stages

    @property
    def feature_map_names(self) -> list[str]:
        return super().feature_map_names + self.feature_pyramid_names

    @property
    def feature_pyramid_names(self) -> list[str]:
        if self.feature_pyramid_channels is None and not self.rescaled_cells:
            return []
        level = round(math.log2(self.total_stride))
        return [f"p{level - 2}", f"p{level - 1}", f"p{level}", f"p{level + 1}"]

    @property
    def is_plain(self) -> bool:
        """Whether this is a plain variant: patch embeddings with positions, then one stage."""
        return self.reduction_types[0] == "patch"

    @property
    def has_class_token(self) -> bool:
        return self.is_plain and self.class_token

    @property
    def adds_to_scores(self) -> bool:
        return self.use_rel_pos or self.window_type != "plain"

    @property
    def grid_size(self) -> tuple[int, int]:
        """Rows and columns of the last stage for images of `image_size`."""
        height, width = self.image_height_width
        return height // self.total_stride, width // self.total_stride

    @property
    def base_model_fsdp_plan(self) -> dict[str, str]:  # type: ignore[override]  # as above
        """Which modules of the base model FSDP2 shards one by one, when the library shards a model while loading it."""
        first = "embeddings" if self.is_plain else "stages.*.reduction_cell"
        return {first: "free_full_weight", "stages.*.normal_cells.*": "free_full_weight"}

    def drop_path_rates(self, stage_idx: int) -> list[float]:
        """Rates of a stage's normal cells, which rise linearly over the cells of all stages."""
        return self.linear_drop_path_rates(start=sum(self.depths[:stage_idx]), length=self.depths[stage_idx])

    def validate_architecture(self) -> None:
        """Check the fields against each other. `@strict` calls this after it has checked their types."""
        require(self.conv_branch_depth in (2, 3), "conv_branch_depth", "be 2 or 3", self.conv_branch_depth)
        require(self.conv_kernel_size in (1, 3), "conv_kernel_size", "be 3 or 1", self.conv_kernel_size)
        rate = self.reduction_dropout_prob
        require(0 <= rate < 1, "reduction_dropout_prob", "be at least 0 and below 1", rate)
        types = self.reduction_types
        require("patch" not in types or len(types) == 1, "reduction_types", 'have "patch" as the only stage', types)
        super().validate_architecture()
        self._validate_decoder()
        self._validate_windows()
        self._validate_feature_pyramid()
        self._validate_cell_stages()

    def _validate_windows(self) -> None:
        size, kind, padding = self.window_size, self.window_type, self.window_padding
        require(kind in WINDOW_TYPES, "window_type", f"be one of {WINDOW_TYPES}", kind)
        require(padding in WINDOW_PADDINGS, "window_padding", f"be one of {WINDOW_PADDINGS}", padding)
        require(size is None or size >= 2, "window_size", "be at least 2", size)
        needs_grid = size is not None or self.use_rel_pos
        is_grid = self.is_plain and not self.class_token
        require(
            is_grid or not needs_grid,
            "window_size" if size else "use_rel_pos",
            'be left out unless the only stage is "patch" and `class_token` is False',
            size or self.use_rel_pos,
        )
        if kind != "plain":
            require(size is not None, "window_size", "be set for rotated windows", size)
            require(padding == "both", "window_padding", 'be "both" for rotated windows', padding)
        are_cells = all(0 <= index < self.depths[0] for index in self.global_attn_indexes)
        expected = f"number cells from 0 to {self.depths[0] - 1}"
        require(are_cells or not is_grid, "global_attn_indexes", expected, self.global_attn_indexes)
        given = bool(self.global_attn_indexes)
        require(not given or size is not None, "window_size", "be set for `global_attn_indexes`", size)

    def _validate_feature_pyramid(self) -> None:
        channels, cells, stride = self.feature_pyramid_channels, self.rescaled_cells, self.total_stride
        if channels is None and not cells:
            return
        name, value = ("rescaled_cells", cells) if cells else ("feature_pyramid_channels", channels)
        require(not cells or channels is None, "rescaled_cells", "be left out beside `feature_pyramid_channels`", cells)
        require(self.is_plain, name, 'be left out unless the only stage is "patch"', value)
        is_power = stride >= 4 and stride & (stride - 1) == 0
        require(is_power, "strides", "be a power of 2 from 4 on for a feature pyramid", self.strides)
        require(self.hidden_size % 4 == 0, "hidden_sizes", "be a multiple of 4 for a pyramid", self.hidden_sizes)
        require(channels is None or channels >= 1, "feature_pyramid_channels", "be at least 1", channels)
        last = self.depths[0] - 1
        are_cells = cells in ((), (-1,)) or (len(cells) == 4 and all(0 <= cell <= last for cell in cells))
        require(are_cells, "rescaled_cells", f"be (-1,) or number four cells from 0 to {last}", cells)

    def _validate_cell_stages(self) -> None:
        for name in ("cell_stages", "apply_layernorm", "reshape_hidden_states", "return_class_token"):
            value, default = getattr(self, name), getattr(type(self), name)
            require(self.is_plain or value == default, name, 'be left out unless the only stage is "patch"', value)
        tokens, has_pyramid = not self.reshape_hidden_states, bool(self.feature_pyramid_names)
        require(not (tokens and has_pyramid), "reshape_hidden_states", "be True for a feature pyramid", False)

    def _validate_decoder(self) -> None:
        require(0 < self.mask_ratio < 1, "mask_ratio", "be above 0 and below 1", self.mask_ratio)
        width, num_heads = self.decoder_hidden_size, self.decoder_num_attention_heads
        require(width > 0 and width % 4 == 0, "decoder_hidden_size", "be a positive multiple of 4", width)
        divides = num_heads >= 1 and width % num_heads == 0
        require(divides, "decoder_num_attention_heads", f"divide `decoder_hidden_size` {width}", num_heads)
        for name in ("decoder_num_hidden_layers", "decoder_intermediate_size"):
            require(getattr(self, name) >= 1, name, "be at least 1", getattr(self, name))

    def _validate_reduction_cell(self, row: dict[str, Any], in_channels: int, where: str) -> None:
        kind, stride, kernel_size = row["reduction_types"], row["strides"], row["reduction_kernel_sizes"]
        require(kind in REDUCTION_TYPES, "reduction_types", f"be one of {REDUCTION_TYPES}", kind, where)
        super()._validate_reduction_cell(row, in_channels, where)
        dilations, hidden_size = row["reduction_dilations"], row["hidden_sizes"]
        if kind == "patch":
            require(kernel_size == stride, "reduction_kernel_sizes", f"be the patch size {stride}", kernel_size, where)
            require(dilations == (1,), "reduction_dilations", "be (1,) for patches", dilations, where)
        else:
            require(stride > 1, "strides", "be at least 2", stride, where)
        if kind == "random_feature":
            require(hidden_size % 2 == 0, "hidden_sizes", "be even for random features", hidden_size, where)
            self._validate_reduction_conv_branch(row, in_channels, where)
        else:
            width = row["reduction_channels"] * len(dilations)
            expected = f"be `reduction_channels` times the number of dilations, {width}"
            require(hidden_size == width, "hidden_sizes", expected, hidden_size, where)


ViTAEConfig.register_for_auto_class()

__all__ = ["ViTAEConfig"]
