"""Cards of the authors' variants: as built, valid, true to their sources, and with code that runs."""

import json
import re
import shutil

import build_model_cards
import pytest
import torch
import yaml
from helpers import ASSETS, REPOSITORY
from hub_server import metadata_errors
from huggingface_hub import ModelCard
from transformers import AutoModelForImageClassification, AutoModelForPreTraining
from transformers.pipelines import SUPPORTED_TASKS

from vitae_hf import ViTAEImageProcessor, config_from_preset
from vitae_hf.files import RECIPES
from vitae_hf.hub.cards import PARITY, variant_card
from vitae_hf.hub.variants import IMAGENET_1K, REMOTE_SENSING, VARIANTS


CARDS = REPOSITORY / "model_cards"
SOURCE = {
    "preset": "any",
    "file": "theirs.pth",
    "sha256": "0" * 64,
    "parameters": 7,
    "num_labels": 1000,
    "image_size": 224,
}


def card(preset: str) -> ModelCard:
    return ModelCard.load(CARDS / f"{preset}.md")


def source_card(preset: str, is_imagenet_1k: bool = True, **overrides) -> ModelCard:
    """The card of a converted file."""
    source = {**SOURCE, "is_imagenet_1k": is_imagenet_1k, **overrides}
    return ModelCard(str(variant_card(preset, "converted", source)))


def paragraph(text: str, beginning: str) -> str:
    return " ".join(next(part for part in text.split("\n\n") if part.startswith(beginning)).split())


def test_the_cards_are_as_built_and_a_changed_one_is_noticed(tmp_path, capsys):
    names = VARIANTS.keys() | REMOTE_SENSING.keys()
    assert build_model_cards.main(["--check"])["cards"] == len(names)
    assert {path.stem for path in CARDS.glob("vitae*.md")} == names
    assert build_model_cards.main(["--output", str(tmp_path)])["changed"] == len(names)
    (tmp_path / "vitae-l.md").write_text(str(card("vitae-l")).replace("86.0", "86.1"))
    with pytest.raises(SystemExit, match="1"):
        build_model_cards.main(["--output", str(tmp_path), "--check"])
    assert "vitae-l.md; run this" in capsys.readouterr().err


@pytest.mark.parametrize("preset", VARIANTS)
def test_the_metadata_is_what_the_hub_takes_and_gives_the_printed_figures_back(preset):
    found = card(preset).data
    assert not metadata_errors(str(card(preset)))
    assert found.pipeline_tag in SUPPORTED_TASKS and found.library_name == "transformers"
    assert {f"arxiv:{paper.arxiv}" for paper in VARIANTS[preset].papers} < set(found.tags)
    printed = VARIANTS[preset].printed.get(IMAGENET_1K) if VARIANTS[preset].has_weights else None
    results = found.eval_results or []
    assert [result.metric_value for result in results] == [value for value in printed or () if value is not None]
    for result in results:
        assert result.verified is False and result.source_name == "as printed by the authors"
        assert (result.dataset_type, result.dataset_split) == ("ILSVRC/imagenet-1k", "validation")


@pytest.mark.parametrize(
    "text, replacement, error",
    [
        ("license: other", "license: apache", '"license" must be one of'),
        ("license_name: not-stated", "license_name: Not stated", '"license_name" must be'),
        ("license_link: https", "license_link: nowhere", '"license_link" must be'),
        ("- ILSVRC/imagenet-1k", "- all of it/x", '"datasets" must be'),
        ("      type: ILSVRC/imagenet-1k\n", "", "lacks dataset.type"),
        ("      value: 82.0\n", "", "lacks metrics.value"),
        ("tags:", "tags: [", "no YAML"),
    ],
)
def test_metadata_that_the_hub_would_refuse_is_found(text, replacement, error):
    good = str(card("vitae-s"))
    assert text in good and error in metadata_errors(good.replace(text, replacement, 1))[0]


@pytest.mark.parametrize("preset", VARIANTS)
def test_a_card_states_no_measured_figure_but_those_in_the_results(preset):
    """Measured are only distances from the authors' network; what is printed of the accuracy is said to be theirs."""
    text = card(preset).text
    measured = json.loads((PARITY).read_text())
    stated = paragraph(text, "**Equal to the authors' network**")
    if preset in measured["errors"]:
        errors = measured["errors"][preset]
        half = {dtype: f"{100 * errors[dtype]['max_over_range']:.2f} %" for dtype in ("bfloat16", "float16")}
        assert f"at most {errors['float32']['max_over_std']:.1e} of their standard deviation in float32" in stated
        assert f"{half['bfloat16']} of their range in bfloat16 and {half['float16']} in float16" in stated
        assert f"({measured['device']}, torch {measured['torch']}, {measured['date']};" in stated
    else:
        assert "not measured for this variant" in stated and "%" not in stated
    before, rest = text.split("## Size and accuracy\n")
    section, after = rest.split("## Training\n")
    assert section.count("measured") == 2 and "measured" not in before + after  # there, and that accuracy is not
    table = [line for line in section.splitlines() if line.startswith("| ")][1:]  # without its head
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table]
    printed = VARIANTS[preset].printed.values()
    assert [row[1:] for row in rows] == [["–" if value is None else str(value) for value in row] for row in printed]
    if printed:
        assert "as printed by the authors** for the variant; we have measured none of it" in text


@pytest.mark.parametrize("preset", VARIANTS)
def test_recipes_expect_what_the_authors_print(preset):
    about = yaml.safe_load((RECIPES / f"{VARIANTS[preset].recipe or preset}.yaml").read_text())["about"]
    if VARIANTS[preset].has_weights:
        assert about["expected"].startswith(f"{VARIANTS[preset].printed[IMAGENET_1K].top1} top-1")
    assert VARIANTS[preset].papers[-1].arxiv in about["source"]


@pytest.mark.parametrize("preset", ["vitae-t", "vitae-b", "vitaev2-s"])
def test_the_code_in_a_card_runs_as_it_is_written(preset, tmp_path, monkeypatch, capsys):
    """A card of each architecture, with one cell instead of all, in a folder that has the model and the picture."""
    depths = config_from_preset(preset).depths
    config = config_from_preset(preset, depths=(*[0] * (len(depths) - 1), 1))
    AutoModelForImageClassification.from_config(config).save_pretrained(tmp_path / "org" / preset)
    ViTAEImageProcessor().save_pretrained(tmp_path / "org" / preset)
    shutil.copy(ASSETS / "chelsea.png", tmp_path / "picture.jpg")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", card(preset).text, flags=re.DOTALL)
    for block in blocks:
        exec(compile(block, f"{preset}.md", "exec"), {})  # noqa: S102
    predictions, shape = capsys.readouterr().out.splitlines()
    assert predictions.count("'score'") == 3 and shape == f"torch.Size([1, {config.hidden_size}])"
    assert f"one row of {config.hidden_size} for" in blocks[1]


def test_a_converted_files_card_names_the_file_and_claims_nothing_that_is_not_known_of_it():
    whole = source_card("vitae-s")
    assert f"converted from `theirs.pth` (SHA-256 `{'0' * 64}`)" in whole.text
    assert 'model="converted"' in whole.text and "Whether this file reaches them is not tested" in whole.text
    assert whole.data.model_name == "converted" and whole.data.eval_results[0].metric_value == 82.0
    several = source_card("vitae-b")
    assert several.data.eval_results is None and "nor does it say which row it belongs to" in several.text
    for other in (
        source_card("vitae-s", is_imagenet_1k=False, num_labels=21841),
        source_card("vitae-b", image_size=384),
    ):
        assert other.data.eval_results is None and "says nothing about these weights" in other.text
        assert "as printed by the authors" not in other.text
    assert source_card("vitae-s", is_imagenet_1k=False).data.datasets is None
    assert "shorter side to 426 pixels" in source_card("vitae-b", image_size=384).text


@pytest.mark.parametrize("name", REMOTE_SENSING)
def test_cards_of_remote_sensing_print_the_scores_with_their_source_and_the_licence_with_its_own(name):
    known, found = REMOTE_SENSING[name], card(name)
    assert not metadata_errors(str(found)) and found.data.pipeline_tag in SUPPORTED_TASKS
    assert (found.data.license, found.data.eval_results) == ("mit", None)
    assert "Remote-Sensing-RVSA, issue 11" in found.text and known.paper.url in found.text
    assert "as printed by the authors** in the paper; we have measured none of it" in found.text
    for score in known.printed:
        values = " | ".join(f"{value:.2f}" for value in score.values)
        assert f"| {score.task} | {score.dataset} | {score.metric} | {values} |" in found.text
    auto_class = AutoModelForPreTraining if known.num_labels is None else AutoModelForImageClassification
    changes = {"conv_kernel_size": 1} if known.num_labels is None else {}
    with torch.device("meta"):
        model = auto_class.from_config(config_from_preset(known.preset, **changes))
    assert model.num_parameters() == known.parameters and f"{known.parameters:,} parameters" in found.text
    assert all((RECIPES / f"{recipe}.yaml").is_file() for recipe in known.recipes)
