# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The base classes of the models, backbones and masked image models of ViTAE and ViTAEv2.

The shape key is in `layers_vitae.py`.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from os import PathLike
from typing import Any, Self

import torch
from torch import nn
from transformers import initialization as init
from transformers.backbone_utils import BackboneMixin, filter_output_hidden_states
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.modeling_outputs import (
    BackboneOutput,
    BaseModelOutputWithPooling,
    ImageClassifierOutput,
    MaskedImageModelingOutput,
)
from transformers.modeling_utils import PreTrainedModel, load_state_dict
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs
from transformers.utils.generic import can_return_tuple

from .attention_vitae import ViTAEAttention
from .configuration_vitae import ViTAEFamilyConfig
from .layers_vitae import ViTAEFamilyReductionCell, grid_tokens, tokens_to_map, unflatten


def nearest_multiples(side: int, stride: int) -> list[int]:
    """`side` itself if it is a multiple of `stride`, or else the multiples below (unless that is 0) and above it."""
    below = side // stride * stride
    return [multiple for multiple in sorted({below, -(-side // stride) * stride}) if multiple > 0] or [stride]


def without_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keywords without an `attention_mask` that is none, which PEFT, for one, gives to every model.

    Raises:
        ValueError: it is one.
    """
    if kwargs.get("attention_mask") is not None:
        raise ValueError("`attention_mask` must be None: all tokens of an image attend to each other")
    return {name: value for name, value in kwargs.items() if name != "attention_mask"}


def is_readable(file: str) -> bool:
    """Whether the header of a safetensors file can be read."""
    try:
        load_state_dict(file, map_location="meta")
    except Exception:  # the error of safetensors, which files on the Hub may not import
        return False
    return True


def check_four_bits(model: nn.Module) -> None:
    """Raise an error unless bitsandbytes can compute the layers that it has quantised to 4 bits.

    On processors with bfloat16 it packs weights in blocks of 64 inputs and 32 outputs at the first call, and fails
    there if they do not fit; elsewhere every width goes.

    Raises:
        ValueError: the widths of some layers do not fit.
    """
    layers = [
        (name, module)
        for name, module in model.named_modules()
        if getattr(module, "support_avx512bf16_for_cpu", False) and module.weight.device.type == "cpu"
    ]
    unfit = [(name, layer) for name, layer in layers if layer.in_features % 64 or layer.out_features % 32]
    if unfit:
        name, layer = unfit[0]
        raise ValueError(
            "bitsandbytes computes in 4 bits on this processor only where a layer's inputs are multiples of 64 and its"
            f" outputs multiples of 32; {len(unfit)} of {len(layers)} layers are not, such as {name} with"
            f" {layer.in_features} and {layer.out_features}: name them in `llm_int8_skip_modules`, or load in 8 bits"
        )


@torch.no_grad()
@init.guard_torch_init_functions()
def initialize_every_module(self: PreTrainedModel) -> None:
    """`initialize_weights` of a model, as the library has it for its own classes.

    In classes of others it leaves out modules without weights of their own, and with them what `_init_weights` does
    there to the weights of their parts. RT-DETR's boxes, and the proposals of Mask R-CNN, then begin wrong.
    """

    def apply(module: nn.Module, initialize: Callable[[nn.Module], None]) -> None:
        for child in module.children():
            apply(child, child._initialize_weights if isinstance(child, PreTrainedModel) else initialize)
        initialize(module)

    apply(self, self._initialize_weights)


@contextmanager
def own_class(model: nn.Module) -> Iterator[None]:
    """In this block, a model that FSDP2 has sharded is of its own class again.

    FSDP2 replaces a model's class by a subclass that torch makes: `(FSDPModule, class of the model)`. The library would
    take torch's source file for the code of the model and save a copy of it.
    """
    current_class = type(model)
    if current_class.__name__.startswith("FSDP"):
        model.__class__ = current_class.__bases__[-1]
    try:
        yield
    finally:
        model.__class__ = current_class


@dataclass
class ViTAEFamilyClassifierOutput(ImageClassifierOutput):
    """What a classifier returns: the library's `ImageClassifierOutput`, and the features that the scores come from.

    As a tuple (`return_dict=False`, an index or a slice) it is the library's, without the features, so that
    `loss, logits = model(..., return_dict=False)` works as with other classifiers.

    Attributes:
        pooler_output (`torch.Tensor` of shape `(B, hidden_size)`):
            What the linear classifier reads, as it reads it: no dropout and no other layer lies between the two. It is
            the `pooler_output` of the headless model.
    """

    pooler_output: torch.Tensor | None = None

    def to_tuple(self) -> tuple[Any, ...]:
        return tuple(value for name, value in self.items() if name != "pooler_output")


class ViTAEFamilyPreTrainedModel(PreTrainedModel):
    """Base class: how weights are initialised, loaded, saved, split over devices and checkpointed."""

    config: ViTAEFamilyConfig
    embeddings: Any  # base models have these two; torch knows of a submodule only that it is a module
    stages: Any
    main_input_name = "pixel_values"
    input_modalities: tuple[str, ...] = ("image",)  # type: ignore[assignment]  # as the library's own models have it
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True
    _can_compile_fullgraph = True
    # What only some classes of a family have. A class without a part ignores its weights when it loads a folder.
    optional_parts: tuple[str, ...] = ("classifier", "decoder", "mask_token")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if "_auto_class" not in vars(cls):  # not inherited: a user's class is saved as one once it is registered itself
            cls._auto_class = None

    def __init__(self, config: ViTAEFamilyConfig, *args: Any, **kwargs: Any):
        config.validate()  # a second time, since fields may have been set after the configuration was made
        if config.adds_to_scores:  # which these two cannot
            self._supports_flash_attn = self._supports_flex_attn = False
        super().__init__(config, *args, **kwargs)

    def post_init(self) -> None:
        super().post_init()  # turns the class's lists of names into sets
        # The sets keep the names that this network has, since FSDP fails on any other.
        classes = {type(module).__name__ for module in self.modules()}
        self._no_split_modules = set(self._no_split_modules or ()) & classes
        buffers = {name.rpartition(".")[-1] for name, _ in self.named_buffers()}
        self._keep_in_fp32_modules_strict = set(self._keep_in_fp32_modules_strict or ()) & buffers

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """[`PreTrainedModel.save_pretrained`], for models that FSDP2 has sharded too, see [`own_class`]."""
        with own_class(self):
            super().save_pretrained(*args, **kwargs)

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: str | PathLike[str] | None, *args: Any, **kwargs: Any
    ) -> Self:
        """[`PreTrainedModel.from_pretrained`]. Called by an Auto class that is to trust a folder's code, it loads the
        user's class with which the folder was saved: the library itself prefers classes that are installed, as this is.
        """
        auto_map = getattr(kwargs.get("config"), "auto_map", None) or {}
        saved, own = auto_map.get(cls._auto_class), f"{cls.__module__.rpartition('.')[2]}.{cls.__name__}"
        if saved is None or saved.rpartition("--")[2] == own or not kwargs.get("trust_remote_code"):
            return super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model_class: Any = get_class_from_dynamic_module(saved, str(pretrained_model_name_or_path), **kwargs)
        return model_class.from_pretrained(pretrained_model_name_or_path, *args, **kwargs)

    @classmethod
    def _can_set_attn_implementation(cls) -> bool:
        return True  # the library would search the file of the model for the attention, which is in another file

    @staticmethod
    def _load_pretrained_model(
        model: Any, state_dict: dict[str, Any] | None, checkpoint_files: list[str] | None, *args: Any, **kwargs: Any
    ) -> Any:
        """As in the library, but weights of `optional_parts` that this class lacks are ignored, a file that is damaged
        is named, and 4 bits are refused where [`check_four_bits`] says so."""
        # The names are set on this model and not on its class, which would hand them to every model that contains it.
        for part in model.optional_parts:
            if getattr(model, part, None) is None and getattr(model.base_model, part, None) is None:
                model._keys_to_ignore_on_load_unexpected.add(rf"^({model.base_model_prefix}\.)?{part}(\.|$)")
        try:
            loaded = PreTrainedModel._load_pretrained_model(model, state_dict, checkpoint_files, *args, **kwargs)
        except Exception as error:
            if type(error).__name__ != "SafetensorError":
                raise
            # Its message does not name the file.
            files = [str(file) for file in checkpoint_files or ()]
            damaged = [file for file in files if not is_readable(file)] or files
            raise OSError(f"the weights in {', '.join(damaged)} are damaged: {error}") from error
        check_four_bits(model)
        return loaded

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        """The authors' initialisation: truncated normal linears and PyTorch's default for convolutions."""
        if isinstance(module, nn.Conv2d):
            init.kaiming_uniform_(module.weight, a=math.sqrt(5))
            if module.bias is not None:
                bound = 1 / math.sqrt(module.weight[0].numel())
                init.uniform_(module.bias, -bound, bound)
        elif isinstance(module, nn.Linear):
            init.trunc_normal_(module.weight, std=self.config.initializer_range)
            if module.bias is not None:
                init.zeros_(module.bias)
        else:
            super()._init_weights(module)

    @property
    def base_model(self) -> "ViTAEFamilyPreTrainedModel":
        """The network without its head, which is the model itself if it has none."""
        return getattr(self, self.base_model_prefix, self)

    def get_input_embeddings(self) -> Any:  # a module with a `dtype`, of which `nn.Module` knows nothing
        """The module that turns pixels into tokens: patch embeddings, or the pyramid of the first reduction cell."""
        if self.base_model is not self:
            return self.base_model.get_input_embeddings()
        if self.config.is_plain:
            return self.embeddings
        first = self.stages[0].reduction_cell
        return first.pyramid_reduction if isinstance(first, ViTAEFamilyReductionCell) else first

    def resize_position_embeddings(self, new_image_size: int | tuple[int, int]) -> None:
        """Change the image size that the model is made for, for example to fine-tune it at that size.

        The output is the same as with `interpolate_pos_encoding=True` before.

        Args:
            new_image_size: side, or height and width, in pixels. The position table is resampled for it. Variants
                without one take every size anyway; then only the configuration changes.

        Raises:
            StrictDataclassError: the size is not a multiple of the stride. The model is then unchanged.
        """
        old_image_size, self.config.image_size = self.config.image_size, new_image_size
        try:
            self.config.validate()
        except Exception:
            self.config.image_size = old_image_size
            raise
        if self.config.is_plain:
            self.base_model.embeddings.resize(self.config.image_height_width)
        for module in self.modules():
            if isinstance(module, ViTAEAttention) and module.relative_positions and module.window_size is None:
                module.relative_positions.resize(self.config.grid_size)

    def validate_pixel_values(self, pixel_values: torch.Tensor | None) -> torch.Tensor:
        """The images as they are, or a `ValueError` unless they have a shape that this network takes."""
        if pixel_values is None:
            raise ValueError("You have to specify pixel_values.")
        if pixel_values.ndim != 4 or pixel_values.shape[1] != self.config.num_channels:
            raise ValueError(
                f"`pixel_values` must be (batch, {self.config.num_channels}, height, width), the channel count being"
                f" `config.num_channels`; got {tuple(pixel_values.shape)}."
            )
        stride = self.config.total_stride
        height, width = pixel_values.shape[-2:]
        if height % stride or width % stride or not height or not width:
            nearest = [" or ".join(str(side) for side in nearest_multiples(side, stride)) for side in (height, width)]
            raise ValueError(
                f"Both sides of the input must be multiples of {stride}, the total stride of this model; got height"
                f" {height} and width {width}. The nearest valid sizes are height {nearest[0]} and width {nearest[1]}."
            )
        return pixel_values


class ViTAEFamilyForImageClassification(ViTAEFamilyPreTrainedModel):
    """Base class of classifiers: a base model, and `classifier`, a linear layer on its pooled tokens."""

    classifier: nn.Module

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> ViTAEFamilyClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                As the base model takes it, like `interpolate_pos_encoding` and the other arguments.
            labels (`torch.Tensor` of shape `(B,)`, or `(B, num_labels)` for multi-label, *optional*):
                What to compute the loss against. `config.problem_type` names the loss; unset, it follows from the
                number of labels and their dtype, as everywhere in transformers.

        Returns:
            [`ViTAEFamilyClassifierOutput`]: `loss` (with `labels`), `logits` `(B, num_labels)`, `pooler_output`
            `(B, hidden_size)`, which the classifier reads, and, when asked for, `hidden_states` and `attentions`.
        """
        outputs = self.base_model(pixel_values, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        logits = self.classifier(outputs.pooler_output)
        loss = None if labels is None else self._loss(labels, logits, **kwargs)
        return ViTAEFamilyClassifierOutput(
            loss=loss,
            logits=logits,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            pooler_output=outputs.pooler_output,
        )

    def _loss(self, labels: torch.Tensor, logits: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        """The library's loss. Over accumulated batches, it has a mean of all labels for single-label problems alone."""
        loss = self.loss_function(labels, logits, self.config, **kwargs)
        total = kwargs.get("num_items_in_batch")
        if total is None or self.config.problem_type == "single_label_classification":
            return loss
        return loss * labels.numel() / total


class ViTAEFamilyBackbone(BackboneMixin, ViTAEFamilyPreTrainedModel):
    """Base class of backbones: feature maps of images of any size, and stages that are not trained.

    `out_features` or `out_indices` of the configuration choose the maps: `"stem"` (the input of the first stage),
    `"stage1"` and so on. `channels` has their widths in the same order. The first `frozen_stages` stages stay in
    evaluation mode and keep their weights and BatchNorm statistics while the rest is trained.
    """

    size_divisor: int
    """Images are padded to multiples of this many pixels."""

    def frozen_modules(self) -> list[nn.Module]:
        frozen = list(self.base_model.stages[: self.config.frozen_stages])
        if frozen and self.config.is_plain:
            frozen.append(self.base_model.embeddings)
        return frozen

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        # Here and not once at the start, because `from_pretrained` makes all weights trainable and then calls `eval`.
        for module in self.frozen_modules():
            module.eval().requires_grad_(False)
        return self

    def encode(
        self, pixel_values: torch.Tensor, **kwargs: Any
    ) -> tuple[BaseModelOutputWithPooling, list[torch.Tensor]]:
        """The outputs of the base model for images whose sides fit it, and the map for each of `out_features`."""
        outputs = self.base_model(pixel_values, **kwargs)
        maps = dict(zip(self.stage_names, outputs.hidden_states))
        return outputs, [maps[name] for name in self.out_features]

    @can_return_tuple
    @filter_output_hidden_states
    def forward(self, pixel_values: torch.Tensor, **kwargs: Unpack[TransformersKwargs]) -> BackboneOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                Normalised images of any size. They are padded with zeros on the right and at the bottom until both
                sides are multiples of `size_divisor` pixels.
            output_hidden_states, output_attentions, return_dict (`bool`, *optional*):
                As in the models.

        Returns:
            `BackboneOutput`: `feature_maps`, a tuple of maps `(B, channels[i], height / stride, width / stride)`, both
            sides rounded up. When asked for, also `hidden_states` and `attentions`, those of the padded images.
        """
        height, width = pixel_values.shape[-2:]
        padded = nn.functional.pad(pixel_values, (0, -width % self.size_divisor, 0, -height % self.size_divisor))
        outputs, maps = self.encode(padded, **kwargs)
        feature_maps: list[Any] = []
        for feature_map in maps:
            if feature_map.ndim == 4:  # rows and columns that cover nothing but padding are cut off
                stride = padded.shape[-1] // feature_map.shape[-1]
                rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
                feature_map = feature_map[..., :rows, :columns]
            feature_maps.append(feature_map)
        return BackboneOutput(
            feature_maps=tuple(feature_maps),
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )


def masked_pixel_loss(
    pixel_values: torch.Tensor, reconstruction: torch.Tensor, is_masked: torch.Tensor
) -> torch.Tensor:
    """Mean absolute error of the masked pixels, in float32; 0 if there are none.

    Args:
        pixel_values, reconstruction: `(B, channels, height, width)`.
        is_masked: `(B, 1, height, width)`.

    Source: Xie et al. 2022, "SimMIM: A Simple Framework for Masked Image Modeling", section 3.4.
    """
    error = (reconstruction.float() - pixel_values.float()).abs().mean(1, keepdim=True)
    return (error * is_masked).sum() / is_masked.sum().clamp(min=1)


class ViTAEFamilyForMaskedImageModeling(ViTAEFamilyPreTrainedModel):
    """Base class of networks that see images with masked patches and predict the pixels behind the masks.

    A mask is a learned colour in place of the pixels. Its token of SimMIM would come after the patch embeddings, but
    the first convolutions here overlap, and would show to the tokens beside a mask what is behind it. The colour begins
    as zero, the mean colour by which images are normalised. The decoder is one linear layer.

    Source: Xie et al. 2022, SimMIM (arXiv 2111.09886), figure 1. Masks of the mean colour before the first convolution:
    Li et al. 2023, "Architecture-Agnostic Masked Image Modeling: From ViT back to CNN" (arXiv 2205.13943), figure 3.
    """

    accepts_loss_kwargs = False  # the loss is a mean over the batch; the Trainer averages those of accumulated batches

    def __init__(self, config: ViTAEFamilyConfig):
        super().__init__(config)
        side = config.encoder_stride
        self.mask_token: nn.Parameter = nn.Parameter(torch.zeros(1, config.num_channels, 1, 1))
        self.decoder: nn.Sequential = nn.Sequential(
            nn.Conv2d(config.hidden_size, side**2 * config.num_channels, 1), nn.PixelShuffle(side)
        )

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if module is self:
            init.zeros_(self.mask_token)
        else:
            super()._init_weights(module)

    def masked_pixels(self, bool_masked_pos: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        """Which pixels the masked patches cover: (B, N) -> (B, 1, height, width)."""
        side = self.config.patch_size
        batch, _, height, width = pixel_values.shape
        rows, columns = height // side, width // side
        if bool_masked_pos.shape != (batch, rows * columns):
            raise ValueError(
                f"`bool_masked_pos` must be (batch, patches of {side}×{side} pixels), here {(batch, rows * columns)};"
                f" got {tuple(bool_masked_pos.shape)}"
            )
        grid = unflatten(bool_masked_pos.bool(), 1, (1, rows, columns))
        return grid.repeat_interleave(side, 2).repeat_interleave(side, 3)

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor | None = None,
        bool_masked_pos: torch.Tensor | None = None,
        interpolate_pos_encoding: bool | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> MaskedImageModelingOutput:
        r"""
        Args:
            pixel_values (`torch.Tensor` of shape `(B, num_channels, height, width)`):
                As in the base model, like `interpolate_pos_encoding` and the other arguments.
            bool_masked_pos (`torch.BoolTensor` of shape `(B, N)`, *optional*):
                Which of the N patches of `config.patch_size` pixels a side are masked, row by row. Default: none; then
                there is no loss.

        Returns:
            `MaskedImageModelingOutput`: `loss` (with `bool_masked_pos`), the mean absolute error of the masked pixels;
            `reconstruction`, images like `pixel_values`; and, when asked for, `hidden_states` and `attentions`. Only
            the masked pixels of a reconstruction mean something, since the loss does not see the others.

        Raises:
            ValueError: the shape of `pixel_values` or of `bool_masked_pos` is not as above.
        """
        images = seen = self.validate_pixel_values(pixel_values)
        if bool_masked_pos is not None:
            is_masked = self.masked_pixels(bool_masked_pos, images)
            seen = torch.where(is_masked, self.mask_token, images)
        outputs = self.base_model(seen, interpolate_pos_encoding=interpolate_pos_encoding, **kwargs)
        tokens = grid_tokens(outputs.last_hidden_state, self.config.has_class_token)
        height, width = (side // self.config.encoder_stride for side in images.shape[-2:])
        reconstruction = self.decoder(tokens_to_map(tokens, height, width))
        return MaskedImageModelingOutput(
            loss=None if bool_masked_pos is None else masked_pixel_loss(images, reconstruction, is_masked),
            reconstruction=reconstruction,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )
