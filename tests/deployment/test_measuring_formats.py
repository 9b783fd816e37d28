# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""Every format has a row: its figures, or why there are none."""

import json
from types import SimpleNamespace

import measure_formats
import pytest
from helpers import ASSETS

from vitae_hf.deployment.exporting import BACKENDS
from vitae_hf.files import PICTURES


NANO = ASSETS / "vitae-nano-fashion"


def row(name: str) -> dict:
    pictures = list(map(str, PICTURES))
    return measure_formats.one_row(SimpleNamespace(row=name, source=NANO, photographs=pictures, rounds=1, threads=1))


@pytest.mark.slow
def test_rows_are_measured_in_processes_of_their_own_and_one_that_crashes_leaves_the_others(tmp_path):
    words = ["--networks", "vitae-nano", "--formats", "onnx", "torch_float32", "--python", "onnx=/bin/false"]
    words += ["--rounds", "1", "--threads", "1", "--output", str(tmp_path / "found")]
    record = measure_formats.main(words)
    assert json.loads((tmp_path / "found.json").read_text()) == record
    rows = record["networks"]["vitae-nano"]
    assert rows["onnx"] == {"error": "status 1: "} and list(rows) == ["onnx", "torch_float32"]
    figures = rows["torch_float32"]
    assert figures["max_over_std"] < 1e-5 and figures["same_top1_percent"] == 100
    assert 0 < figures["milliseconds"] and len(figures["milliseconds_rounds"]) == 1
    assert 0.9 < figures["bytes"] / (NANO / "model.safetensors").stat().st_size < 1.1
    assert set(figures["needs"]) == {"transformers", "torch"}
    lines = (tmp_path / "found.md").read_text().splitlines()
    assert lines[-2] == "| onnx |  | | | | status 1:  |" and lines[-1].startswith("| torch_float32 | 0.9 | ")


def test_a_row_that_cannot_be_measured_says_why(monkeypatch):
    monkeypatch.setattr("vitae_hf.deployment.exporting.PACKAGES", {"litert": ("no_such_package",)})
    assert row("litert")["error"].startswith("the format litert takes no_such_package, not installed here")

    def explode(*arguments) -> None:
        raise RuntimeError("no kernel\nat all")

    monkeypatch.setattr(measure_formats, "build", explode)
    assert row("onnx") == {"error": "no kernel at all"}


def test_every_format_of_export_has_a_row():
    assert set(BACKENDS) <= set(measure_formats.NEEDS)
    with pytest.raises(SystemExit):
        measure_formats.parse(["--formats", "tflite"])
