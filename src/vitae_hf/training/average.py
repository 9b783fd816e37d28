# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The exponential moving average of the weights: a model of its own, which is evaluated and saved beside the other."""

from pathlib import Path
from typing import Any

from safetensors.torch import load_model
from timm.utils import ModelEmaV3
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .checkpoints import WholeCheckpoints, own_names


FOLDER = "ema"
"""Where the averaged model lies in the folder of a checkpoint or of the trained model."""


class WeightAverage(TrainerCallback):
    """Averages parameters and BatchNorm statistics after each update, on the device of the model.

    Attributes:
        model (`PreTrainedModel`, *optional*): the averaged copy; none before training begins.

    Args:
        trainer: whose model to average; it says `ema_decay` and `ema_warmup`.
    """

    def __init__(self, trainer: WholeCheckpoints):
        self.trainer = trainer
        self._average: Any = None  # timm's average, once training has begun

    @property
    def model(self) -> PreTrainedModel | None:
        return None if self._average is None else self._average.module

    def start(self, checkpoint: str | Path | None = None) -> None:
        """Begin the average with a copy of the model, or with the average in the checkpoint that the run resumes from.

        Raises:
            FileNotFoundError: the checkpoint holds no average.
        """
        args: Any = self.trainer.args  # with an `ema_decay`, or there were no average
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        self._average = ModelEmaV3(model, decay=args.ema_decay, use_warmup=args.ema_warmup)
        if checkpoint is not None:
            self.load(checkpoint)

    def load(self, checkpoint: str | Path) -> None:
        """Take over the average that a checkpoint holds.

        Raises:
            FileNotFoundError: it holds none.
        """
        weights = Path(checkpoint, FOLDER, "model.safetensors")
        if not weights.exists():
            raise FileNotFoundError(f"cannot resume the average of the weights: there is no {weights}")
        load_model(self._average.module, weights)

    def save(self, folder: str | Path) -> None:
        """Write the averaged model and its image processor into a folder of their own below this one."""
        with own_names(self._average.module):
            self._average.module.save_pretrained(Path(folder, FOLDER))
        if self.trainer.processing_class is not None:
            self.trainer.processing_class.save_pretrained(Path(folder, FOLDER))

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        self.start(self.trainer.resumed_from)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._average.update(self.trainer.accelerator.unwrap_model(self.trainer.model), step=state.global_step)
