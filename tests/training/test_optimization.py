"""Learning rates and weight decay per parameter and step, against a plain reading of the recipe and against timm."""

import pytest
import torch
from timm.scheduler import CosineLRScheduler
from transformers import AutoModel, AutoModelForImageClassification

from vitae_hf.training.optimization import cosine_schedule, layer_names, parameter_groups, scaled_learning_rate


def by_name(model, **options) -> dict[str, tuple[float, float]]:
    groups = parameter_groups(model, **{"learning_rate": 1.0, "weight_decay": 0.05, **options})
    assert all(len(group["params"]) == len(group["names"]) for group in groups)
    return {name: (group["lr"], group["weight_decay"]) for group in groups for name in group["names"]}


def test_weights_decay_and_nothing_else_does(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config())
    groups = by_name(model)
    assert groups.keys() == dict(model.named_parameters()).keys()
    for name, (learning_rate, weight_decay) in groups.items():
        is_weight = name.endswith("weight") and "norm" not in name.split(".")[-2]
        assert (learning_rate, weight_decay) == (1.0, 0.05 if is_weight else 0.0), name
    assert len(parameter_groups(model, 1.0, 0.05)) == 2


def test_each_layer_learns_slower_than_the_one_above(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config())
    expected = ["embeddings"] if model.config.is_plain else []
    for stage, depth in enumerate(model.config.depths):
        expected += [] if model.config.is_plain else [f"stages.{stage}.reduction_cell"]
        expected += [f"stages.{stage}.normal_cells.{cell}" for cell in range(depth)]
    expected += ["head"]
    assert layer_names(model) == expected
    for name, (learning_rate, _) in by_name(model, layer_decay=0.5).items():
        layer = next((layer for layer in expected if f"{model.base_model_prefix}.{layer}." in name), "head")
        assert learning_rate == pytest.approx(0.5 ** (len(expected) - 1 - expected.index(layer))), name


def test_frozen_parameters_are_left_out_and_a_base_model_works(tiny_config):
    model = AutoModel.from_config(tiny_config())
    model.stages[0].requires_grad_(False)
    assert not any(name.startswith("stages.0") for name in by_name(model, layer_decay=0.9))


def test_a_layer_decay_out_of_range_is_named(tiny_config):
    with pytest.raises(ValueError, match="`layer_decay` must be above 0 and at most 1, got 1.5"):
        parameter_groups(AutoModel.from_config(tiny_config()), 1.0, 0.05, layer_decay=1.5)


@pytest.mark.parametrize("warmup_steps", [0, 30])
def test_the_schedule_equals_timms_at_every_step(warmup_steps):
    def optimizer():
        return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-3)

    ours, theirs = optimizer(), optimizer()
    schedule = cosine_schedule(ours, 2e-3, steps=300, warmup_steps=warmup_steps)
    reference = CosineLRScheduler(
        theirs, t_initial=300, lr_min=1e-5, warmup_t=warmup_steps, warmup_lr_init=1e-6, t_in_epochs=False
    )
    for step in range(330):  # thirty of them cool down
        reference.step_update(step)
        assert ours.param_groups[0]["lr"] == pytest.approx(theirs.param_groups[0]["lr"], rel=1e-9), step
        ours.step()
        schedule.step()


def test_layers_keep_their_proportion_along_the_schedule(tiny_config):
    model = AutoModelForImageClassification.from_config(tiny_config())
    optimizer = torch.optim.AdamW(parameter_groups(model, 1e-3, 0.05, layer_decay=0.8))
    first = [group["lr"] for group in optimizer.param_groups]
    schedule = cosine_schedule(optimizer, 1e-3, steps=10)
    for _ in range(5):
        optimizer.step()
        schedule.step()
    now = [group["lr"] for group in optimizer.param_groups]
    assert now[0] < first[0] and [a / b for a, b in zip(now, now[1:])] == pytest.approx(
        [a / b for a, b in zip(first, first[1:])]
    )


def test_the_learning_rate_scales_with_the_batch():
    assert scaled_learning_rate(1e-3, 1024) == 2e-3
    assert scaled_learning_rate(3e-4, 2048) == pytest.approx(1.5e-4 * 2048 / 256)  # as He et al. 2022 state it


def test_a_rate_below_the_floor_stays_where_it_is():
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1e-6)
    schedule = cosine_schedule(optimizer, 1e-6, steps=4, warmup_steps=1, warmup_learning_rate=1e-5, floor=1e-5)
    for _ in range(6):
        assert schedule.get_last_lr() == [1e-6]
        schedule.step()
