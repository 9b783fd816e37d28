# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""The benchmark measures what it says, and keeps what is measured when a network cannot run."""

import json
import statistics

import pytest
import torch
from helpers import LINES, drawn
from torch import nn

from vitae_hf.commands import benchmark
from vitae_hf.deployment import benchmarking
from vitae_hf.deployment.benchmarking import Setup, Workload, count_work, interleave, peak_memory, saved_activations
from vitae_hf.deployment.folding import FoldedBatchNorm
from vitae_hf.hub.variants import VARIANTS


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run in which one size is none of `vitaev2-nano`'s, and memory is made up: the folder and the record."""
    folder = tmp_path_factory.mktemp("benchmark")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(benchmark, "memory_in_own_process", lambda case: {"peak_mib": 900.0, "idle_peak_mib": 600.0})
        patch.setattr(benchmarking.MatrixProduct, "SIDES", {"cpu": (64, 128)})
        options = "--networks vitae-nano vitaev2-nano --reference timm:test_vit --batch_size 2 --mode training"
        sizes = "--size 64 --size 80 96 --rounds 3 --seconds 0.01 --threads 1"
        record = benchmark.main([*options.split(), *sizes.split(), "--output", str(folder / "tiny.json")])
    return folder, record


def test_a_run_writes_json_a_table_and_a_picture(run):
    folder, record = run
    assert json.loads((folder / "tiny.json").read_text()) == json.loads(json.dumps(record))
    first_row = (folder / "tiny.md").read_text().splitlines()[2]
    assert (
        first_row.startswith("| vitae-nano | training | float32 | 64×64 | 2 | 0.012 |") and "| 900 | 300 |" in first_row
    )
    assert set(LINES) <= drawn(folder / "tiny.png")[1]  # bars of each of three networks
    assert record["settings"]["reference"] == "timm:test_vit" and {"torch", "commit", "threads"} <= record.keys()


def test_the_figures_agree_with_each_other(run):
    _, record = run
    by_case = {(row["network"], row["image_size"]): row for row in record["results"] if "error" not in row}
    for (_, size), row in by_case.items():
        reference = by_case["timm:test_vit", size]
        rounds = zip(row["images_per_s_rounds"], reference["images_per_s_rounds"])
        ratios = [own * row["gmacs"] / (other * reference["gmacs"]) for own, other in rounds]
        assert len(ratios) == 3
        assert row["relative_efficiency"]["median"] == pytest.approx(statistics.median(ratios))
        assert row["relative_efficiency"]["highest"] == pytest.approx(max(ratios))
        assert row["images_per_s"] == statistics.median(row["images_per_s_rounds"])
        assert 0 < row["fraction_of_peak"]["lowest"] <= row["fraction_of_peak"]["median"]
    assert by_case["timm:test_vit", (64, 64)]["relative_efficiency"] == {"median": 1, "lowest": 1, "highest": 1}


def test_a_size_that_a_network_cannot_take_is_named_and_the_others_figures_are_kept(run):
    folder, record = run
    (failed,) = [row for row in record["results"] if "error" in row]
    assert (failed["network"], failed["image_size"]) == ("vitaev2-nano", (80, 96))
    assert "ValueError" in failed["error"] and "multiple" in failed["error"]
    assert "- vitaev2-nano, training, float32, 80×96, batch 2: ValueError" in (folder / "tiny.md").read_text()
    assert len(record["results"]) == 6


@pytest.mark.slow
def test_memory_is_that_of_a_fresh_process():
    held = torch.ones(2**29, dtype=torch.uint8)  # 512 MiB of this process
    measured = benchmark.memory_in_own_process(Setup("vitae-nano", (64, 64), 2, "training"))
    assert held.all() and measured["peak_mib"] < peak_memory("cpu") - 400
    assert 100 < measured["idle_peak_mib"] < measured["peak_mib"]
    assert measured["saved_mib_per_image"] > 1


def test_a_process_that_fails_is_named_beside_the_figures(run, monkeypatch):
    monkeypatch.setattr(benchmark.sys, "executable", "false")
    row = {**run[1]["results"][0], **benchmark.memory_in_own_process(Setup("vitae-nano"))}
    assert "- vitae-nano, training, float32, 64×64, batch 2: exit status 1" in benchmark.table([row])


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--networks", "vitae-x"], "unknown networks ['vitae-x']"),
        (["--threads", "0"], "--threads must be at least 1, got 0"),
        (["--batch_size", "8", "0"], "--batch_size must be at least 1, got 0"),
        (["--reference", "timm:no_such_network"], "unknown networks ['timm:no_such_network']"),
        (["--size", "1", "2", "3"], "--size takes a side, or height and width"),
    ],
)
def test_what_it_does_not_know_is_refused_before_anything_is_measured(arguments, message, capsys):
    with pytest.raises(SystemExit):
        benchmark.main(arguments)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["vitae-t", "vitaev2-s"])
def test_the_work_is_the_published_figure(name):
    parameters, gmacs = count_work(name, (224, 224))
    assert (parameters, round(gmacs, 3)) == (VARIANTS[name].parameters, VARIANTS[name].gmacs)


def test_the_work_of_others_is_that_of_their_papers():
    """As printed: ViT-S (DeiT) 4.6, Swin-T 4.5, ConvNeXt-T 4.5, ResNet-50 4.1."""
    printed = {"vit-s": 4.6, "deit-s": 4.6, "swin-t": 4.5, "convnext-t": 4.5, "resnet-50": 4.1, "timm:resnet50": 4.1}
    assert {name: round(count_work(name, (224, 224))[1], 1) for name in printed} == printed


def test_networks_with_learned_positions_have_those_of_the_size():
    ours, theirs = (count_work(name, (96, 64)) for name in ("vit-s", "timm:vit_small_patch16_224"))
    assert ours == theirs and ours[0] == count_work("vit-s", (224, 224))[0] - (196 - 24) * 384


class Clock:
    """A clock that only moves when a function under test says how long it took."""

    def __init__(self, monkeypatch):
        self.now = 0.0
        monkeypatch.setattr(benchmarking.time, "perf_counter", lambda: self.now)

    def spend(self, seconds: float) -> None:
        self.now += seconds


def test_functions_take_turns_and_one_that_fails_costs_only_its_own_times(monkeypatch):
    calls, clock = [], Clock(monkeypatch)

    def failing():
        calls.append("failing")
        clock.spend(0.5)
        if calls.count("failing") > 4:
            raise RuntimeError("out of\nmemory")

    def slow():
        calls.append("slow")
        clock.spend(0.25)

    seconds, errors = interleave({"failing": failing, "slow": slow}, 2, 0.0, "cpu")
    assert errors == {"failing": "RuntimeError: out of memory"}
    assert seconds == {"slow": [0.25, 0.25]}
    # Three calls each to warm up, then one each in the first round, and in the second the one that fails.
    assert calls == 3 * ["failing"] + 3 * ["slow"] + 2 * ["failing", "slow"]


def test_a_turn_is_as_long_as_asked(monkeypatch):
    calls, clock = [], Clock(monkeypatch)
    interleave({"slow": lambda: calls.append(clock.spend(0.25))}, 1, 2.0, "cpu")
    assert len(calls) == 3 + 8


def test_saved_activations_are_counted_once_and_without_weights(monkeypatch):
    class Network(nn.Sequential):
        def __init__(self):
            super().__init__(nn.Flatten(), nn.Linear(12, 12), nn.Linear(12, 1000))

        def forward(self, pixels):
            return super().forward(pixels).exp().sigmoid().sigmoid()

    monkeypatch.setattr(benchmarking, "build_network", lambda network, image_size: Network())
    workload = Workload(Setup("made up", (2, 2), 2, "training"))
    numbers = 2 * 12 + 2 * 12 + 3 * 2 * 1000 + 2 * 1000  # inputs of the layers, three results, logarithms of the loss
    labels_and_weight = 2 * 8 + 4
    assert 4 * numbers <= saved_activations(workload) <= 4 * numbers + labels_and_weight


def test_autocast_keeps_float32_weights_and_half_precision_does_not():
    for dtype, weights, logits in [("autocast", torch.float32, torch.bfloat16), ("bfloat16",) + 2 * (torch.bfloat16,)]:
        workload = Workload(Setup("vitae-nano", (64, 64), dtype=dtype))
        assert (workload.model.dtype, workload.logits().dtype) == (weights, logits)


def test_prepared_networks_are_compared_with_the_reference_as_it_is(monkeypatch):
    monkeypatch.setattr(benchmarking.MatrixProduct, "SIDES", {"cpu": (64,)})
    options = "--networks vitae-nano --reference timm:test_vit --prepare both --size 64 --rounds 1 --seconds 0.01"
    rows = benchmark.main([*options.split(), "--threads", "1", "--batch_size", "2", "--skip_memory"])["results"]
    assert [benchmark.name_of(row) for row in rows] == ["vitae-nano", "vitae-nano, prepared", "timm:test_vit"]
    assert all(row["relative_efficiency"] for row in rows)
    options = "--networks vitae-nano --reference vitaev2-nano --prepare yes --size 64 --rounds 1 --seconds 0.01"
    rows = benchmark.main([*options.split(), "--threads", "1", "--batch_size", "2", "--skip_memory"])["results"]
    assert len(rows) == 2 and all(row["relative_efficiency"] for row in rows)  # the reference is prepared too
    modules = Workload(Setup("vitae-nano", (64, 64), prepared=True)).model.modules()
    assert any(isinstance(module, FoldedBatchNorm) for module in modules)


def test_checkpointing_saves_less():
    saved = [
        saved_activations(Workload(Setup(network, (64, 64), 2, "training", checkpointing=checkpointing)))
        for network in ("vitae-nano", "timm:test_vit")
        for checkpointing in (False, True)
    ]
    assert saved[1] < saved[0] / 2 and saved[3] < saved[2] / 2


@pytest.mark.parametrize("preset, limit", [("vitae-t", 60.1e6), ("vitae-s", 140.3e6), ("vitaev2-s", 148.8e6)])
def test_activations_saved_for_an_image(preset, limit):
    """In bytes; at most four fifths of what the authors' code saves (about 75, 182, 186 MB)."""
    assert saved_activations(Workload(Setup(preset, batch_size=2, mode="training"))) / 2 <= limit
