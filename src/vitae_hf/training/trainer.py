# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The library's Trainer with the authors' optimizer settings, device augmentation and an average of the weights."""

import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from accelerate.data_loader import prepare_data_loader
from safetensors.torch import load_model
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.data import DataLoader
from transformers import ProgressCallback, Trainer, TrainingArguments
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.trainer_utils import rotate_checkpoints

from ..data.augmentation import DeviceAugmentation, DeviceNormalization
from ..data.samples import PictureDataset, RepeatedAugmentation
from ..messages import listed
from .callbacks import (
    AverageWeights,
    ImageProgress,
    SeedEachProcess,
    StopOnSignal,
    TellDatasetEpoch,
    Throughput,
    outlive_sigterm,
)
from .checkpoints import flush, last_checkpoint, not_finite, unfinished_mark, updates
from .optimization import cosine_schedule, parameter_groups


@dataclass
class ViTAETrainingArguments(TrainingArguments):
    """`TrainingArguments`, and the parts of the authors' recipe that these lack.

    `learning_rate` is the full one, already scaled (`scaled_learning_rate`); `warmup_steps` is the library's: updates,
    or a share of the run if below 1. The schedule is the authors', whatever `lr_scheduler_type`. Where the library
    leaves speed to the user, the defaults here follow the machine: on a GPU that has them bfloat16, TF32, pinned memory
    and copies that do not wait, and persistent workers where there are workers. Say `False` to turn one off.
    """

    bf16: bool | None = field(default=None, metadata={"help": "bfloat16 autocast; default: on a GPU that has it."})
    dataloader_pin_memory: bool | None = field(default=None, metadata={"help": "Default: where there is a GPU."})
    dataloader_persistent_workers: bool | None = field(default=None, metadata={"help": "Default: with workers."})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "A loss that is not finite is an error."})

    layer_decay: float = field(default=1.0, metadata={"help": "Learning rate of a layer over that of the one above."})
    warmup_learning_rate: float = field(default=1e-6, metadata={"help": "Learning rate of the first update."})
    min_learning_rate: float = field(default=1e-5, metadata={"help": "Floor of the cosine."})
    cooldown_epochs: float = field(
        default=0.0, metadata={"help": "The last so many of `num_train_epochs` are trained at the floor."}
    )
    channels_last: bool = field(
        default=True, metadata={"help": "Lay pixels and convolutions out by channels, which convolves faster."}
    )
    repeated_augmentation: int = field(
        default=1, metadata={"help": "Each picture is so often in its batch, each time augmented otherwise."}
    )
    ema_decay: float | None = field(
        default=None, metadata={"help": "Keep an exponential moving average of the weights with this decay."}
    )
    ema_warmup: bool = field(
        default=False, metadata={"help": "Let the decay rise to `ema_decay`, for runs too short for it."}
    )
    sync_batch_norm: bool = field(
        default=False, metadata={"help": "BatchNorm statistics of the batches of all GPUs together, not of each."}
    )
    frozen_batch_norm: bool = field(
        default=False, metadata={"help": "Train with the BatchNorm statistics that the model came with."}
    )

    def __post_init__(self):
        has_gpu = torch.cuda.is_available() and not self.use_cpu
        has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
        if self.bf16 is None:
            self.bf16 = has_bf16 and not self.fp16
        if self.tf32 is None and has_bf16:  # the same generations of GPUs have both
            self.tf32 = True
        if self.dataloader_pin_memory is None:
            self.dataloader_pin_memory = has_gpu
        if self.dataloader_persistent_workers is None:
            self.dataloader_persistent_workers = self.dataloader_num_workers > 0
        if self.ddp_find_unused_parameters is None:
            self.ddp_find_unused_parameters = False  # every parameter of ViTAE is used
        if self.accelerator_config is None and self.dataloader_pin_memory:
            self.accelerator_config = {"non_blocking": True}
        super().__post_init__()
        if self.n_gpu > 1:
            raise ValueError(
                f"one process cannot train on {self.n_gpu} GPUs: start `torchrun --nproc_per_node {self.n_gpu}` with"
                " the same script and arguments, or choose one GPU by CUDA_VISIBLE_DEVICES"
            )
        if self.repeated_augmentation < 1:
            raise ValueError(f"`repeated_augmentation` must be at least 1, got {self.repeated_augmentation}")
        if self.data_seed is None:
            self.data_seed = self.seed  # the order of the data must not hang on a process's own random state
        if self.sync_batch_norm and self.frozen_batch_norm:
            raise ValueError("`sync_batch_norm` and `frozen_batch_norm` exclude each other: frozen ones use no batch")
        if self.ema_decay is not None and not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be at least 0 and below 1, got {self.ema_decay}")
        if not 0 <= self.cooldown_epochs < self.num_train_epochs:
            raise ValueError(
                f"`cooldown_epochs` must be at least 0 and below `num_train_epochs`, {self.num_train_epochs};"
                f" got {self.cooldown_epochs}"
            )

    @property
    def device(self) -> torch.device:
        """The library's, but CPUs have no number: transformers 5.17 gives it to `torch.load`, which has no "cpu:0"."""
        return torch.device("cpu") if super().device.type == "cpu" else super().device

    @property
    def global_batch_size(self) -> int:
        """Images of one update, over all devices and accumulated batches."""
        return self.train_batch_size * self.world_size * self.gradient_accumulation_steps


class ViTAETrainer(Trainer):
    """A Trainer that follows [`ViTAETrainingArguments`].

    With `ema_decay`, `evaluate` and `predict` use the averaged weights once training has begun, every checkpoint and
    the saved model hold them as a complete model in their folder `ema/`, and a resumed run continues the average.
    Parameters and BatchNorm statistics are averaged alike, after each update, on the device of the model.

    A checkpoint counts once all of it is written ([`last_checkpoint`]): until then the ones before it are kept, and one
    that cannot be written is removed. A loss that is not finite stops the run before the update, with a
    `FloatingPointError` that names step and samples; so do weights and buffers that are not finite, of the model or the
    average, before anything is written. SIGTERM saves and stops; `stop.received` then says so.

    With several processes each draws its own randomness (drop path, mixup, erasing), as one process would for each
    part of the batch; the weights begin equal. All evaluate with the BatchNorm statistics of the first, which saves.

    Raises:
        ValueError: `ema_decay` with FSDP, or `sync_batch_norm` with several processes on CPUs.
    """

    def __init__(self, *args, augmentation: DeviceAugmentation | DeviceNormalization | None = None, **kwargs):
        """
        Args:
            augmentation: what to do to each training batch on the device, after the data loader; see there.
            args, kwargs: the library's.
        """
        super().__init__(*args, **kwargs)
        if self.args.sync_batch_norm and self.args.world_size > 1:
            if self.args.device.type == "cpu":
                raise ValueError(
                    "`sync_batch_norm` needs GPUs, by torch; on CPUs use `frozen_batch_norm` or larger batches"
                )
            torch.nn.SyncBatchNorm.convert_sync_batchnorm(self.model)
        if self.args.channels_last and not self.is_fsdp_enabled:  # FSDP2 takes no weights laid out so
            self.model.to(memory_format=torch.channels_last)
        self.augmentation = augmentation
        self.ema = None
        self._resumed_from = None
        self._names = None
        self._is_checked = False
        self.stop, self.throughput = StopOnSignal(), Throughput()
        self.add_callback(self.stop)
        self.add_callback(self.throughput)
        if self.pop_callback(ProgressCallback) is not None:
            self.add_callback(ImageProgress())
        self.add_callback(TellDatasetEpoch(self))
        self.add_callback(SeedEachProcess())
        if self.args.ema_decay is not None:
            self.add_callback(AverageWeights(self))

    def train(self, resume_from_checkpoint: str | Path | bool | None = None, **kwargs):
        """As the library's; `"last"` resumes from the newest whole checkpoint, or begins where there is none.

        Raises:
            ValueError: the checkpoint is not whole: it is being written, or the run that wrote it was killed. Or it is
                from the middle of an epoch of streamed data that were dealt to other numbers of processes or workers.
        """
        self._is_checked = False
        if self._deals_rows and self.args.repeated_augmentation > 1:
            raise ValueError("`repeated_augmentation` needs the data in memory: it does not go with streaming")
        if resume_from_checkpoint in ("true", "True"):  # from a command line
            resume_from_checkpoint = True
        if resume_from_checkpoint == "last":
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
        elif resume_from_checkpoint and resume_from_checkpoint is not True:
            checkpoint = Path(resume_from_checkpoint)
            if updates(checkpoint) < 0:
                raise ValueError(
                    f"{checkpoint} is not a whole checkpoint to resume from; the last one in {checkpoint.parent} is"
                    f" {last_checkpoint(checkpoint.parent)}"
                )
        if self.args.should_save:
            for mark in Path(self.args.output_dir).glob("checkpoint-*.unfinished"):
                shutil.rmtree(mark.with_suffix(""), ignore_errors=True)
                mark.unlink()
        resumed = str(resume_from_checkpoint) if isinstance(resume_from_checkpoint, Path) else resume_from_checkpoint
        return super().train(resume_from_checkpoint=resumed, **kwargs)

    def _run_epoch(self, *args, **kwargs):
        if self.state.global_step >= self.state.max_steps:  # resumed when it was done: not one update more
            self.control.should_training_stop = True
        else:
            super()._run_epoch(*args, **kwargs)

    @property
    def _deals_rows(self) -> bool:
        return isinstance(self.train_dataset, PictureDataset) and self.train_dataset.deals_rows

    @property
    def _dealing(self) -> dict[str, int]:
        """What decides which rows of streamed data a worker reads."""
        return {
            "processes": self.args.world_size,
            "workers": self.args.dataloader_num_workers,
            "batch_size": self.args.train_batch_size,
        }

    def check_dealing(self) -> None:
        """Before an epoch goes on that a checkpoint interrupted."""
        saved = Path(self._resumed_from) / "dealing.json"
        if self._deals_rows and saved.exists() and json.loads(saved.read_text()) != self._dealing:
            raise ValueError(
                f"{self._resumed_from} is from a stream dealt to {saved.read_text()}; resume it so, not with"
                f" {json.dumps(self._dealing)}"
            )

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()
        if self.is_fsdp_enabled and self.args.ema_decay is not None:
            raise ValueError(
                "`ema_decay` does not work with FSDP: sharded weights are not averaged; use DDP or no average"
            )
        if self.accelerator.is_fsdp2:
            # Accelerate would cast weights to bfloat16 but not the statistics of BatchNorm, which torch refuses:
            # weights stay in float32, and `autocast_smart_context_manager` lowers the precision as under DDP.
            self.accelerator.state.fsdp_plugin.mixed_precision_policy = MixedPrecisionPolicy()

    def autocast_smart_context_manager(self, *args, **kwargs):
        if self.accelerator.is_fsdp2:
            return self.accelerator.autocast()
        return super().autocast_smart_context_manager(*args, **kwargs)

    def _get_learning_rate(self) -> float:
        """The head's, which is the full one."""
        return max(group["lr"] for group in self.optimizer.param_groups)

    def create_optimizer(self, model=None):
        if self.optimizer is None:
            model = self.model if model is None else model
            optimizer_class, options = self.get_optimizer_cls_and_kwargs(self.args, model)
            groups = parameter_groups(model, self.args.learning_rate, self.args.weight_decay, self.args.layer_decay)
            for group in groups:
                del group["names"]
            self.optimizer = optimizer_class(groups, **options)
        return self.optimizer

    def create_scheduler(self, num_training_steps: int, optimizer=None):
        if self.lr_scheduler is None:
            cosine_share = 1 - self.args.cooldown_epochs / self.args.num_train_epochs
            self.lr_scheduler = cosine_schedule(
                self.optimizer if optimizer is None else optimizer,
                self.args.learning_rate,
                steps=round(num_training_steps * cosine_share),
                warmup_steps=self.args.get_warmup_steps(num_training_steps),
                warmup_learning_rate=self.args.warmup_learning_rate,
                floor=self.args.min_learning_rate,
            )
            self._created_lr_scheduler = True
        return self.lr_scheduler

    def _prepare_inputs(self, inputs: dict) -> dict:
        inputs = super()._prepare_inputs(inputs)
        if "names" in inputs:
            self._names = inputs["names"]
            inputs = {name: value for name, value in inputs.items() if name != "names"}
        if self.args.channels_last:
            inputs = {**inputs, "pixel_values": inputs["pixel_values"].contiguous(memory_format=torch.channels_last)}
        return inputs

    def training_step(self, model, inputs: dict, num_items_in_batch=None):
        if self.augmentation is not None:
            inputs = self._prepare_inputs(inputs)
            pixel_values, labels = self.augmentation(inputs["pixel_values"], inputs.get("labels"))
            inputs = {**inputs, "pixel_values": pixel_values}
            if labels is not None:
                inputs["labels"] = labels
        if not self._is_checked:
            self._check_smallest_batch(model, inputs)
            self._is_checked = True
        loss = super().training_step(model, inputs, num_items_in_batch)
        if not torch.isfinite(loss):
            raise FloatingPointError(
                f"the loss of step {self.state.global_step + 1} is {loss.item()}, at learning rate"
                f" {self._get_learning_rate():.3g}, for a batch of {self._names}; the last checkpoint is"
                f" {last_checkpoint(self.args.output_dir)}"
            )
        return loss

    def _check_smallest_batch(self, model: torch.nn.Module, inputs: dict) -> None:
        """Before the first step: BatchNorm cannot normalise maps of one pixel over a batch of one picture.

        Raises:
            ValueError: an epoch has such a batch, of pictures whose maps become so small.
        """
        shared = self.args.sync_batch_norm and self.args.world_size > 1
        if shared or self.args.frozen_batch_norm or self._smallest_batch() > 1:
            return
        pixel_values = self._prepare_inputs(inputs)["pixel_values"][:1]
        with self.compute_loss_context_manager():
            norms = one_value_norms(self.accelerator.unwrap_model(model, keep_torch_compile=False), pixel_values)
        if norms:
            batch, size = self._train_batch_size, "×".join(map(str, pixel_values.shape[-2:]))
            which, remedies = "every batch", "a larger `per_device_train_batch_size`"
            if batch > 1:
                which = f"the last batch of {len(self.train_dataset):,} in batches of {batch}"
                remedies = "another `per_device_train_batch_size`, `dataloader_drop_last`"
            raise ValueError(
                f"{which} has one picture, and pictures of {size} pixels become maps of one pixel, which BatchNorm"
                f" cannot normalise by themselves, at {listed(norms)}: choose {remedies}, larger pictures, or"
                " `frozen_batch_norm`"
            )

    def _smallest_batch(self) -> int:
        """Pictures in the smallest batch that a process will train on."""
        batch = self._train_batch_size
        images = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else batch
        batches = -(-images // batch)
        fills_up = self.args.world_size > 1 and self.accelerator.even_batches and not self._deals_rows
        is_reached = self.state.max_steps * self.args.gradient_accumulation_steps >= batches
        if self.args.dataloader_drop_last or fills_up or not is_reached:
            return batch
        return images % batch or batch

    def get_train_dataloader(self):
        batch = self.args.train_batch_size * self.args.world_size
        images = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else batch
        if self.args.dataloader_drop_last and not self._deals_rows and images < batch:
            raise ValueError(
                f"{images} training images do not fill one batch of {batch}, and `dataloader_drop_last` leaves out what"
                " does not: use smaller batches"
            )
        loader = self._get_streaming_dataloader() if self._deals_rows else super().get_train_dataloader()
        # A loader takes its workers' seed from here and not from the random state of training, which it would move on
        # once more in a resumed run, where its workers are started again.
        getattr(loader, "base_dataloader", loader).generator = torch.Generator()
        return _keep_workers(loader)

    def _get_train_sampler(self, train_dataset=None):
        repeats = self.args.repeated_augmentation
        return RepeatedAugmentation(self.train_dataset, repeats) if repeats > 1 else super()._get_train_sampler()

    def _get_streaming_dataloader(self) -> DataLoader:
        loader = DataLoader(
            self.train_dataset,
            self._train_batch_size,
            collate_fn=self.data_collator,
            num_workers=self.args.dataloader_num_workers,
            pin_memory=self.args.dataloader_pin_memory,
            persistent_workers=self.args.dataloader_persistent_workers,
            prefetch_factor=self.args.dataloader_prefetch_factor,
            multiprocessing_context=self.args.dataloader_multiprocessing_context,
        )
        return prepare_data_loader(  # the stream deals rows to processes itself
            loader,
            self.args.device,
            num_processes=1,
            process_index=0,
            put_on_device=True,
            dispatch_batches=False,
            non_blocking=self.args.dataloader_pin_memory,
        )

    def num_examples(self, dataloader) -> int:
        return getattr(dataloader.dataset, "total", None) or super().num_examples(dataloader)

    def compute_loss(self, model, *args, **kwargs):
        if self.args.frozen_batch_norm:
            for module in model.modules():
                if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
                    module.eval()
        return super().compute_loss(model, *args, **kwargs)

    def get_eval_dataloader(self, *args, **kwargs):
        with self._whole_split():
            return _keep_workers(super().get_eval_dataloader(*args, **kwargs))

    def get_test_dataloader(self, *args, **kwargs):
        with self._whole_split():
            return _keep_workers(super().get_test_dataloader(*args, **kwargs))

    @contextmanager
    def _whole_split(self):
        """`dataloader_drop_last` is for training: an evaluation that left images out would be wrong."""
        drop_last, self.args.dataloader_drop_last = self.args.dataloader_drop_last, False
        try:
            yield
        finally:
            self.args.dataloader_drop_last = drop_last

    def start_average(self) -> None:
        """Make the averaged copy, from the checkpoint that is resumed or from the weights as they are."""
        from timm.utils import ModelEmaV3

        model = self.accelerator.unwrap_model(self.model)
        self.ema = ModelEmaV3(model, decay=self.args.ema_decay, use_warmup=self.args.ema_warmup)
        if self._resumed_from is not None:
            weights = Path(self._resumed_from) / "ema" / "model.safetensors"
            if not weights.exists():
                raise FileNotFoundError(f"cannot resume the average of the weights: there is no {weights}")
            load_model(self.ema.module, weights)

    def update_average(self) -> None:
        self.ema.update(self.accelerator.unwrap_model(self.model), step=self.state.global_step)

    def evaluation_loop(self, *args, metric_key_prefix: str = "eval", **kwargs):
        trained = self.model
        if self.ema is not None:
            self.model = self.ema.module
        try:
            self._share_statistics(self.model)
            output = super().evaluation_loop(*args, metric_key_prefix=metric_key_prefix, **kwargs)
        finally:
            self.model = trained
        if self.compute_loss_func is not None and output.label_ids is not None:
            # The library's is a mean of batch means, and with several processes images that fill the last count twice.
            logits, labels = torch.from_numpy(output.predictions), torch.from_numpy(output.label_ids)
            output.metrics[f"{metric_key_prefix}_loss"] = self.compute_loss_func(
                ImageClassifierOutput(logits=logits), labels
            ).item()
        return output

    def _share_statistics(self, model: torch.nn.Module) -> None:
        """BatchNorm statistics of process 0 for all: each has counted its own batches, DDP's last one, FSDP's all."""
        if self.args.world_size > 1:
            for buffer in model.buffers():
                torch.distributed.broadcast(buffer, src=0)

    def _check_finite(self) -> None:
        """Before a model is written: it could be in the place of a good one."""
        if not (self.args.should_save or self.is_fsdp_enabled or self.is_deepspeed_enabled):  # else the writer knows
            return
        averaged = [] if self.ema is None else not_finite(self.ema.module)
        if names := not_finite(self.model) + [f"ema.{name}" for name in averaged]:
            raise FloatingPointError(
                f"nothing was written after step {self.state.global_step}, since not all values are finite of"
                f" {listed(names)}; the last checkpoint is {last_checkpoint(self.args.output_dir)}"
            )

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        if not _internal_call:
            self._check_finite()
        super().save_model(output_dir, _internal_call)
        if self.ema is not None and self.args.should_save:
            folder = Path(output_dir or self.args.output_dir) / "ema"
            self.ema.module.save_pretrained(folder)
            if self.processing_class is not None:
                self.processing_class.save_pretrained(folder)

    def _save_checkpoint(self, model, trial):
        self._check_finite()
        run = Path(self._get_output_dir(trial=trial))
        checkpoint = run / f"checkpoint-{self.state.global_step}"
        unfinished = unfinished_mark(checkpoint)
        if self.args.should_save:
            run.mkdir(parents=True, exist_ok=True)
            unfinished.touch()
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        try:
            super()._save_checkpoint(model, trial)
            if self._deals_rows and self.args.should_save:
                (checkpoint / "dealing.json").write_text(json.dumps(self._dealing))
        except Exception as error:
            if self.args.world_size == 1:  # else others may still be writing; the next start removes it
                shutil.rmtree(checkpoint, ignore_errors=True)
                unfinished.unlink(missing_ok=True)
            raise OSError(
                f"{checkpoint} could not be written ({shutil.disk_usage(run).free / 2**20:.0f} MiB are free there):"
                f" {error}; the last checkpoint is {last_checkpoint(run)}"
            ) from error
        finally:
            self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            flush(checkpoint)
            unfinished.unlink()
            rotate_checkpoints(str(run), limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True)

    def _load_best_model(self):
        super()._load_best_model()
        if self.ema is not None and self.state.best_model_checkpoint is not None:
            load_model(self.ema.module, Path(self.state.best_model_checkpoint) / "ema" / "model.safetensors")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None):
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        self._resumed_from = resume_from_checkpoint


class ViTAEPreTrainer(ViTAETrainer):
    """Trains a masked autoencoder; every evaluation hides the same patches and leaves the random state of training."""

    def evaluation_loop(self, *args, **kwargs):
        devices = [self.args.device] if self.args.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(self.args.seed)
            return super().evaluation_loop(*args, **kwargs)


@torch.no_grad()
def one_value_norms(model: torch.nn.Module, pixel_values: torch.Tensor) -> list[str]:
    """Names of the BatchNorms that learn statistics from maps of one pixel when the model sees this picture `(1, …)`.

    The model looks at it in evaluation mode, which changes and draws nothing, and is in training mode then.
    """
    norms, found = {}, []
    for name, module in model.train().named_modules():
        is_batch_norm = isinstance(module, torch.nn.modules.batchnorm._BatchNorm) and module.training
        if is_batch_norm and not getattr(module, "is_frozen", False):
            norms[module] = name

    def look(module, args):
        if args[0][0, 0].numel() == 1:
            found.append(norms[module])

    hooks = [norm.register_forward_pre_hook(look) for norm in norms]
    devices = [pixel_values.device] if pixel_values.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):  # a masked autoencoder does draw
            model.eval()(pixel_values=pixel_values)
    finally:
        for hook in hooks:
            hook.remove()
        model.train()
    return found


def _keep_workers(loader: DataLoader) -> DataLoader:
    """The loader, with workers that outlive a SIGTERM to all processes."""
    base = getattr(loader, "base_dataloader", loader)
    base.worker_init_fn = partial(outlive_sigterm, trainer=os.getpid(), then=base.worker_init_fn)
    return loader
