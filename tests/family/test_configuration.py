"""Configurations are a closed, validated set of fields, and the presets are the published networks."""

import json

import pytest
import torch
from helpers import GOLDEN, REPOSITORY, class_token_config, pyramid_config
from huggingface_hub.errors import StrictDataclassError
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, UperNetConfig

from vitae_hf import (
    PRESETS,
    ViTAEConfig,
    ViTAEForImageClassification,
    ViTAEv2Config,
    config_from_preset,
    configuration_vitae,
)
from vitae_hf.hub.original_names import original_layout
from vitae_hf.hub.variants import IMAGENET_1K, VARIANTS


FIGURES = {name: (variant.parameters, variant.gmacs) for name, variant in VARIANTS.items()}
FIGURES |= {
    "vitae-nano": (216_074, 0.012),
    "vitaev2-nano": (192_970, 0.011),
    "vitae-nano-mae": (189_898, 0.014),
}  # ours
FIGURES |= {"vitae-b-rvsa": (89_724_968, 17.67), "vitaev2-s-rsp": (18_868_851, 5.752)}  # for remote sensing


@pytest.mark.parametrize("name", PRESETS)
def test_presets_have_the_published_parameters_and_multiply_adds(name):
    parameters, gmacs = FIGURES[name]
    config = config_from_preset(name, attn_implementation="eager")
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model = AutoModelForImageClassification.from_config(config).eval()
        model(torch.empty(1, 3, config.image_size, config.image_size))
    assert sum(parameter.numel() for parameter in model.parameters()) == parameters
    assert counter.get_total_flops() / 2e9 == pytest.approx(gmacs, abs=0.005 if gmacs > 10 else 0.0005)


def test_the_readme_states_these_figures():
    readme = (REPOSITORY / "README.md").read_text()
    for name, (parameters, gmacs) in FIGURES.items():
        row = next(line for line in readme.splitlines() if line.startswith(f"| `{name}` |"))
        assert f" {parameters:,} | {gmacs:.5g} |" in row.replace("**", ""), name
        if name in VARIANTS:
            printed = VARIANTS[name].printed.get(IMAGENET_1K)
            accuracy = " / ".join("–" if value is None else str(value) for value in printed) if printed else "–"
            assert row.split(" | ")[3] == accuracy, name


def test_the_defaults_are_the_variants_called_s():
    assert config_from_preset("vitae-s", num_labels=2).to_dict() == ViTAEConfig().to_dict()
    assert config_from_preset("vitaev2-s", num_labels=2).to_dict() == ViTAEv2Config().to_dict()


def test_overrides_reach_the_configuration():
    config = config_from_preset("vitae-s", num_labels=10, image_size=384)
    assert (config.num_labels, config.image_size, config.hidden_size) == (10, 384, 384)
    named = config_from_preset("vitae-b", id2label={0: "cat", 1: "dog", 2: "fox"}, image_size=(224, 448))
    assert named.num_labels == 3 and named.image_height_width == (224, 448)
    assert config_from_preset("vitae-nano", label2id={"cat": 0, "dog": 1}).id2label == {0: "cat", 1: "dog"}
    assert config_from_preset("vitae-nano", id2label=["cat", "dog"]).label2id == {"cat": 0, "dog": 1}


@pytest.mark.parametrize(
    "arguments, overrides, message",
    [
        (["vitae-z"], {}, "unknown preset 'vitae-z'; did you mean 'vitae-"),
        (["vitae_s"], {}, "did you mean 'vitae-s'"),
        (["ViTAE-B"], {}, "did you mean 'vitae-b'"),
        ([None], {}, "unknown preset None"),
        (["vitae-s"], {"hiden_sizes": (1,)}, "no field 'hiden_sizes'; did you mean 'hidden_sizes'"),
        (["vitae-s"], {"depths": (0, 14)}, "must have 2 entries as `depths` has"),
        (["vitae-s"], {"image_size": 225}, "`image_size` must be a positive multiple of the total stride 16, got 225"),
    ],
)
def test_a_wrong_preset_field_or_value_is_a_value_error_that_says_what_to_write(arguments, overrides, message):
    with pytest.raises(ValueError, match=message):
        config_from_preset(*arguments, **overrides)


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("reduction_types", ("performer", "pyramid", "pyramid"), "`reduction_types` in stage 1 must be one of"),
        ("reduction_types", ("patch", "pyramid", "pyramid"), '"patch" as the only stage'),
        ("strides", (3, 2, 2), "`strides` in stage 1 must be 2 or 4, got 3"),
        ("strides", (4, 2, 1), "`strides` in stage 3 must be at least 2"),
        ("reduction_kernel_sizes", (3, 3, 3), "`reduction_kernel_sizes` in stage 1 must be at least 4"),
        ("reduction_dilations", ((1, 2), (), (1, 2)), "`reduction_dilations` in stage 2 must be dilations"),
        ("reduction_channels", (8, 8, 15), "`reduction_channels` times the number of dilations, 30, got 32"),
        ("reduction_conv_groups", (1, 3, 1), "`reduction_conv_groups` in stage 2 must divide"),
        ("hidden_sizes", (15, 24, 32), "`hidden_sizes` in stage 1 must be even"),
        ("depths", (0, -1, 2), "`depths` in stage 2 must be at least 0, got -1"),
        ("num_attention_heads", (1, 5, 2), "`num_attention_heads` in stage 2 must divide the width 24, got 5"),
        ("conv_groups", (1, 6, 7), "`conv_groups` in stage 3 must divide the widths"),
        ("mlp_ratio", 0.0, "`mlp_ratio` must be a positive number"),
        ("mlp_ratio", float("nan"), "`mlp_ratio` must be a positive number, got nan"),
        ("mlp_ratio", 1e308, "`mlp_ratio` in stage 2 must give a width of 1 to 2147483647, got 1e\\+308"),
        ("mlp_ratio", 0.001, "`mlp_ratio` in stage 2 must give a width of 1 to 2147483647, got 0.001"),
        ("hidden_sizes", (16, 24, 10**300), "`hidden_sizes` must be at most 2147483647, got 1000"),
        ("layer_norm_eps", 0, "`layer_norm_eps` must be a positive number"),
        ("num_channels", 0, "`num_channels` must be at least 1"),
        ("depths", (), "`depths` must have an entry for each stage"),
        ("conv_branch_depth", 4, "`conv_branch_depth` must be 2 or 3, got 4"),
        ("drop_path_rate", 1.0, "`drop_path_rate` must be at least 0 and below 1"),
        ("reduction_dropout_prob", -0.1, "`reduction_dropout_prob` must be at least 0"),
        ("num_channels", "three", "num_channels"),
        ("conv_kernel_size", 5, "`conv_kernel_size` must be 3 or 1, got 5"),
        ("frozen_stages", 4, "`frozen_stages` must be a number of stages, 0 to 3, got 4"),
        ("cell_stages", True, '`cell_stages` must be left out unless the only stage is "patch", got True'),
        ("feature_pyramid_channels", 8, "`feature_pyramid_channels` must be left out unless the only stage is"),
    ],
)
def test_a_value_that_no_network_can_have_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        pyramid_config(**{field: value})


@pytest.mark.parametrize(
    "field, value, message",
    [
        ("window_sizes", (7, 7), "`window_sizes` must have 4 entries"),
        ("window_sizes", (0, 7, None, None), "`window_sizes` in stage 1 must be at least 1, or None, got 0"),
        ("reduction_num_attention_heads", (1, 3, 2, 4), "`reduction_num_attention_heads` in stage 2 must divide"),
        ("strides", (4, 2, 2, 1), "`strides` in stage 4 must be 2 or 4"),
        ("drop_path_schedule", "cosine", "`drop_path_schedule` must be one of"),
        ("window_padding", "start", "`window_padding` must be one of .*, got 'start'"),
        ("image_size", 48, "`image_size` must be a positive multiple of the total stride 32"),
    ],
)
def test_a_value_that_no_second_version_can_have_is_named(field, value, message):
    with pytest.raises(StrictDataclassError, match=message):
        ViTAEv2Config(**{field: value})


def test_drop_path_is_dealt_as_in_the_authors_code_or_in_order():
    """Theirs: stage i takes the rates from number `depths[i - 1]` on, instead of from where the stage before ended."""
    theirs, in_order = (
        ViTAEv2Config(drop_path_rate=0.13),
        ViTAEv2Config(drop_path_rate=0.13, drop_path_schedule="linear"),
    )
    rates = [round(0.01 * index, 6) for index in range(14)]
    slices = {"original": ((0, 2), (2, 4), (2, 10), (8, 10)), "linear": ((0, 2), (2, 4), (4, 12), (12, 14))}
    for config in (theirs, in_order):
        for stage_idx, (start, end) in enumerate(slices[config.drop_path_schedule]):
            assert config.drop_path_rates(stage_idx) == pytest.approx(rates[start:end])
    with torch.device("meta"):
        model = AutoModelForImageClassification.from_config(theirs)
    assert model.vitaev2.stages[3].normal_cells[1].drop_path.rate == pytest.approx(0.09)


@pytest.mark.parametrize(
    "typed",
    [lambda folder, **keywords: ViTAEConfig(**keywords)]
    + [auto.from_pretrained for auto in (ViTAEConfig, AutoConfig, ViTAEForImageClassification, AutoModel)],
    ids=["constructor", "configuration", "AutoConfig", "model", "AutoModel"],
)
@pytest.mark.parametrize(
    "keyword, message",
    [
        ("hidden_size", "no field 'hidden_size'; did you mean 'hidden_sizes'"),
        ("layer_norm_epsilon", "did you mean 'layer_norm_eps'"),
        ("num_hidden_layers", "no field 'num_hidden_layers': it follows from others"),
        ("patch_size", "no field 'patch_size': it follows from others"),
    ],
)
def test_a_keyword_that_is_almost_a_field_or_follows_from_fields_is_an_error(typed, keyword, message, tmp_path):
    pyramid_config().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        typed(tmp_path, **{keyword: 64})


def test_what_a_file_holds_is_kept_whatever_its_name(tiny_config, tmp_path):
    config = tiny_config()
    config.layer_norm_epsilon, config.made_by = 1, "a later version"
    config.save_pretrained(tmp_path)
    UperNetConfig(backbone_config=config).save_pretrained(tmp_path / "segmenter")
    saved = json.loads((tmp_path / "config.json").read_text())
    nested = UperNetConfig(backbone_config=config).to_dict()["backbone_config"]  # which has no version
    for loaded in (
        AutoConfig.from_pretrained(tmp_path),
        type(config).from_json_file(tmp_path / "config.json"),
        type(config).from_dict({"layer_norm_epsilon": 1, "made_by": "a later version"}),
        type(config)(**saved),
        AutoConfig.for_model(**nested),
        UperNetConfig.from_pretrained(tmp_path / "segmenter").backbone_config,
    ):
        assert (loaded.layer_norm_epsilon, loaded.made_by) == (1, "a later version")
    assert AutoConfig.from_pretrained(tmp_path).to_diff_dict() == config.to_diff_dict()
    derived = {"num_hidden_layers": 99, "hidden_size": 99, "stage_names": ["stem"]}
    assert type(config).from_dict({**saved, **derived}).to_dict() == type(config).from_dict(saved).to_dict()


def test_patch_size_and_encoder_stride_follow_from_the_strides_and_can_be_written_back(tiny_config, tmp_path):
    config = tiny_config()
    expected = (16, 16) if config.is_plain else (4, 16)
    assert (config.patch_size, config.encoder_stride) == expected
    assert not {"patch_size", "encoder_stride"} & set(config.to_dict())
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    loaded.update({"image_size": 96, "patch_size": expected[0], "encoder_stride": expected[1]})
    assert (loaded.image_size, loaded.patch_size, loaded.encoder_stride) == (96, *expected)
    with pytest.raises(ValueError, match="`encoder_stride` must be 16, which follows from other fields, got 32"):
        loaded.update({"encoder_stride": 32})


@pytest.mark.parametrize("given", ["id2label", "label2id"])
def test_names_and_numbers_of_labels_follow_each_other_when_only_one_is_given(given, tiny_config, tmp_path):
    id2label, label2id = {0: "cat", 1: "dog", 2: "fox"}, {"cat": 0, "dog": 1, "fox": 2}
    keyword = {given: {"id2label": id2label, "label2id": label2id}[given]}
    tiny_config().save_pretrained(tmp_path)  # of five labels
    config_class = type(tiny_config())
    for config in (
        config_class(**keyword),
        config_from_preset("vitaev2-nano" if config_class is ViTAEv2Config else "vitae-b", **keyword),
        config_class.from_pretrained(tmp_path, **keyword),
        AutoConfig.from_pretrained(tmp_path, num_labels=3, **keyword),
        AutoModelForImageClassification.from_config(AutoConfig.from_pretrained(tmp_path, **keyword)).config,
    ):
        assert (config.id2label, config.label2id, config.num_labels) == (id2label, label2id, 3)
    assert config_class.from_pretrained(tmp_path, id2label=["cat", "dog", "fox"]).id2label == id2label  # names alone
    both = config_class.from_pretrained(tmp_path, id2label=id2label, label2id={**label2id, "vixen": 2})
    assert both.id2label == id2label and both.label2id["vixen"] == 2


def test_an_unknown_keyword_is_named_in_a_warning_and_the_librarys_own_are_not(tmp_path, monkeypatch):
    warnings = []
    monkeypatch.setattr(configuration_vitae.logger, "warning", lambda message, *names: warnings.append(message % names))
    ViTAEConfig(num_classes=10)
    assert warnings == ["ViTAEConfig has no field 'num_classes'; nothing will read it."]
    ViTAEConfig(num_labels=10, attn_implementation="eager", torch_dtype="float16", output_attentions=True)
    config = ViTAEConfig()
    config.use_cache, config.made_by = False, "a test"  # the Trainer sets the first, users may set what they like
    config.save_pretrained(tmp_path)
    assert ViTAEConfig.from_pretrained(tmp_path).made_by == "a test"
    assert len(warnings) == 1


def test_a_field_that_was_set_to_nonsense_later_is_found_when_a_model_is_made():
    config = pyramid_config()
    config.num_attention_heads = (1, 5, 2)
    with pytest.raises(StrictDataclassError, match="`num_attention_heads` in stage 2 must divide"):
        ViTAEForImageClassification(config)


def test_configurations_survive_saving(tmp_path):
    config = pyramid_config(out_features=["stage1", "stage3"], image_size=(64, 96))
    config.save_pretrained(tmp_path)
    reloaded = ViTAEConfig.from_pretrained(tmp_path)
    assert reloaded.to_dict() == config.to_dict()
    assert reloaded.hidden_sizes == config.hidden_sizes  # tuples again, not lists
    assert ViTAEConfig.from_pretrained(tmp_path, drop_path_rate=0.3).drop_path_rate == 0.3
    assert json.loads((tmp_path / "config.json").read_text())["model_type"] == "vitae"


def test_backbone_fields_follow_the_library():
    config = pyramid_config(out_indices=[1, 3])
    assert config.stage_names == ["stem", "stage1", "stage2", "stage3"]
    assert config.out_features == ["stage1", "stage3"] and config.out_indices == [1, 3]
    assert pyramid_config().out_features == ["stage3"] and pyramid_config().num_hidden_layers == 3
    with pytest.raises(ValueError, match="out_features must be a subset"):
        pyramid_config(out_features=["stage4"])
    with pytest.raises(ValueError, match=r"got \['stage2'\]; with `cell_stages=True` each cell of a plain"):
        class_token_config(out_features=["stage2"])
    with pytest.raises(ValueError, match="`reshape_hidden_states` must be True for a feature pyramid"):
        class_token_config(reshape_hidden_states=False, feature_pyramid_channels=8)


@pytest.mark.parametrize(
    "name",
    [
        "vitae-t",
        "vitae-6m",
        "vitae-13m",
        "vitae-s",
        "vitae-b",
        "vitae-l",
        "vitae-h",
        "vitaev2-s",
        "vitaev2-48m",
        "vitaev2-b",
    ],
)
def test_every_preset_has_the_tensors_of_the_released_network(name):
    layout = {}
    for original, parts in original_layout(config_from_preset(name)).items():
        shape = next(iter(parts.values()))
        layout[original] = "x".join(map(str, (len(parts) * shape[0], *shape[1:]))) if shape else "-"
    released = (line.split("\t") for line in (GOLDEN / "keys" / f"{name}.tsv").read_text().splitlines())
    assert layout == {key: shape for key, shape, _ in released if not key.endswith("relative_position_index")}
