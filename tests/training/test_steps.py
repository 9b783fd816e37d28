"""A step of training gives Python no number: on meta tensors, which have none, whatever asks for one fails.

`.item()`, `bool(tensor)`, `.cpu()` or a shape that depends on numbers would make the process wait for its GPU in each
step, and then the GPU for the process. What a step must know, it asks by a Readback.
"""

from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.state import AcceleratorState, PartialState
from helpers import class_token_config, images, pyramid_config, windowed_config
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoModelForImageClassification, TrainerCallback, TrainerControl, TrainerState


pytest.importorskip("datasets")  # which a bare machine with a GPU may lack

from vitae_hf import ViTAEForMaskedImageModeling, ViTAEForPreTraining
from vitae_hf.data.augmentation import AugmentationArguments, DeviceAugmentation, DeviceNormalization, soft_target_loss
from vitae_hf.data.samples import collate
from vitae_hf.dense.backbone import dense_config
from vitae_hf.dense.segmentation.data import collate_masks
from vitae_hf.dense.segmentation.model import new_segmenter
from vitae_hf.dense.segmentation.trainer import SegmentationTrainer
from vitae_hf.training import callbacks, trainer
from vitae_hf.training.arguments import ViTAETrainingArguments
from vitae_hf.training.callbacks import StopOnSignal
from vitae_hf.training.readback import Readback
from vitae_hf.training.reconstruction import MaskedImageTrainer, ReconstructionTrainer
from vitae_hf.training.trainer import ViTAETrainer


class OnMeta(TorchDispatchMode):
    """Lets no operation take or give a tensor of another device, which is also how a copy from the CPU would begin."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        tensors = [value for value in tree_leaves((args, kwargs, result)) if isinstance(value, torch.Tensor)]
        assert all(tensor.is_meta for tensor in tensors), operation
        return result


@pytest.fixture
def events(monkeypatch) -> list[str]:
    """Puts trainers on torch's meta device. Says in what order they do a step's parts, ask for a number and read it."""
    seen = []

    class Unread(Readback):
        def __init__(self, answer):
            assert answer.is_meta and answer.dim() == 0
            seen.append("asked")

        def __bool__(self):
            seen.append("read")
            return True

    def note(owner: type, method: str, event: str) -> None:
        original = getattr(owner, method)
        noted = lambda *args, **kwargs: (original(*args, **kwargs), seen.append(event))[0]  # noqa: E731
        monkeypatch.setattr(owner, method, noted)

    def step(self, *args, original: Callable = ViTAETrainer.training_step):
        with OnMeta() if self.state.global_step else nullcontext():  # the first moves means and deviations of pixels
            return original(self, *args)

    note(Accelerator, "backward", "backward")
    note(AcceleratedOptimizer, "step", "update")
    for module in (trainer, callbacks):
        monkeypatch.setattr(module, "Readback", Unread)
    monkeypatch.setattr(ViTAETrainer, "training_step", step)
    monkeypatch.setattr(ViTAETrainer, "_finalize_training", lambda *_: None)  # gives the mean loss of the run
    monkeypatch.setattr(torch, "Generator", lambda device=None, make=torch.Generator: make())  # none is made on meta
    monkeypatch.setattr(PartialState, "default_device", torch.device("meta"))
    monkeypatch.setenv("ACCELERATE_TORCH_DEVICE", "meta")
    yield seen
    AcceleratorState._reset_state(reset_partial_state=True)


WITHOUT_LABELS = {"data_collator": collate, "augmentation": DeviceNormalization()}
KINDS = {
    ViTAETrainer: {"data_collator": collate, "compute_loss_func": soft_target_loss},
    ReconstructionTrainer: WITHOUT_LABELS,
    MaskedImageTrainer: {**WITHOUT_LABELS, "mask_patch_size": 16, "mask_ratio": 0.6},
    SegmentationTrainer: {"data_collator": collate_masks},
}


def train(cls: type, model, samples: list[dict], folder, callback: TrainerCallback | None = None, **options):
    """The trainer after two updates; by AdamW as it is without `fused`, which refuses meta tensors."""
    settings = {"max_steps": 2, "per_device_train_batch_size": 4, "optim": "adamw_torch", "ema_decay": 0.9, **options}
    silent = {"report_to": "none", "logging_strategy": "no", "save_strategy": "no", "disable_tqdm": True}
    arguments = ViTAETrainingArguments(folder, remove_unused_columns=False, **settings, **silent)
    run = cls(model, arguments, train_dataset=samples, **KINDS[cls])
    if cls is ViTAETrainer:
        run.augmentation = DeviceAugmentation(5, AugmentationArguments(erasing_prob=1.0))
    if callback is not None:
        run.add_callback(callback)
    run.train()
    assert run.state.global_step == 2
    return run


def pictures(**labels) -> list[dict]:
    return [{"pixel_values": image, "names": index, **labels} for index, image in enumerate(images(16))]


def assert_on_meta(run: ViTAETrainer) -> None:
    moments = [moment for moments in run.optimizer.state.values() for name, moment in moments.items() if name != "step"]
    assert moments and all(tensor.is_meta for tensor in [*moments, *run.averaged_model.state_dict().values()])


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.0, "gradient_checkpointing": True}], ids=["", "recipe"])
def test_a_classifiers_step(tiny_config, events, tmp_path, options):
    """Erasing, mixing, drop path, forward, loss, backward, clipping, optimizer, schedule, average."""
    model = AutoModelForImageClassification.from_config(tiny_config(drop_path_rate=0.1))
    assert_on_meta(train(ViTAETrainer, model, pictures(labels=1), tmp_path, **options))
    assert events == ["asked", "backward", "read", "update"] * 2  # read while the GPU does the backward pass


def test_a_step_of_accumulated_batches(events, tmp_path):
    model = AutoModelForImageClassification.from_config(pyramid_config())
    options = {"gradient_accumulation_steps": 2, "frozen_batch_norm": True}
    assert_on_meta(train(ViTAETrainer, model, pictures(labels=1), tmp_path, **options))
    assert events == ["asked", "backward", "read", "asked", "backward", "read", "update"] * 2


def test_a_masked_autoencoders_step(events, tmp_path):
    model = ViTAEForPreTraining(class_token_config(conv_kernel_size=1, norm_pix_loss=True))
    assert_on_meta(train(ReconstructionTrainer, model, pictures(), tmp_path))
    assert events == ["asked", "backward", "read", "update"] * 2


def test_a_masked_image_models_step(events, tmp_path):
    model = ViTAEForMaskedImageModeling(pyramid_config(drop_path_rate=0.1))
    assert_on_meta(train(MaskedImageTrainer, model, pictures(), tmp_path))
    assert events == ["asked", "backward", "read", "update"] * 2


@pytest.mark.parametrize("make_config", [pyramid_config, windowed_config, class_token_config])
def test_a_segmenters_step(make_config, events, tmp_path):
    model = new_segmenter(dense_config(make_config(drop_path_rate=0.1)), dict(enumerate("abcde")), head_channels=8)
    masks = pictures(labels=torch.zeros(64, 64, dtype=torch.long))
    assert_on_meta(train(SegmentationTrainer, model, masks, tmp_path))
    assert events == ["asked", "backward", "read", "update"] * 2


def test_processes_ask_each_other_whether_to_stop_and_read_it_an_update_later(events, monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda told, op: events.append(f"reduced on {told.device}"))
    stop, control = StopOnSignal(), TrainerControl()
    args = SimpleNamespace(world_size=2, device=torch.device("meta"), save_only_model=False)
    stop.on_step_end(args, TrainerState(), control)
    assert events == ["reduced on meta", "asked"] and not stop.received and not control.should_training_stop
    stop.on_step_end(args, TrainerState(), control)
    assert events[2:] == ["reduced on meta", "asked", "read"]
    assert stop.received and control.should_training_stop and control.should_save


def test_what_is_read_back_is_what_was_asked():
    assert Readback(torch.tensor(True)) and Readback(torch.tensor(2.0)) and not Readback(torch.tensor(0.0))


def test_reading_back_from_a_gpu_waits_for_the_copy_first(monkeypatch):
    """On a fake GPU, which has no number to give in the end."""
    waited = []
    event = SimpleNamespace(synchronize=lambda: waited.append(True))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: SimpleNamespace(record_event=lambda: event))
    with FakeTensorMode():
        answer = Readback(torch.ones((), device="cuda"))
        assert not waited
        with pytest.raises(DataDependentOutputException):
            bool(answer)
    assert waited


@pytest.mark.gpu
def test_reading_back_does_not_wait_for_what_the_gpu_was_given_later():
    answer = Readback(torch.ones((), device="cuda"))
    torch.cuda._sleep(2_000_000_000)  # cycles: about a second
    end = torch.cuda.current_stream().record_event()
    assert answer and not end.query()


class ForbidWaiting(TrainerCallback):
    """Makes waiting for the GPU an error in every update but the first, until all other callbacks have run."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step:
            torch.cuda.set_sync_debug_mode("error")

    def on_step_end(self, *args, **kwargs):
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.gpu
def test_a_step_on_a_gpu_waits_for_nothing(tiny_config, tmp_path):
    """With what meta tensors cannot show: bfloat16, pinned memory, fused AdamW."""
    model = AutoModelForImageClassification.from_config(tiny_config(drop_path_rate=0.1))
    options = {"optim": "adamw_torch_fused", "callback": ForbidWaiting()}
    try:
        train(ViTAETrainer, model, pictures(labels=1), tmp_path, **options)
    finally:
        torch.cuda.set_sync_debug_mode("default")
