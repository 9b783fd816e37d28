"""The comparison of networks whose pieces are taken out: what it builds, what it shows them, and how it goes on."""

import json
from types import SimpleNamespace

import claims_pictures
import claims_report
import compare_claims
import measure_statistics
import pytest
import torch
from claims_networks import NETWORKS
from helpers import DATA
from kept_results import go_on
from safetensors.torch import save_file

from vitae_hf.layers_vitae import ViTAEFamilyNormalCell, ViTAEPyramidReduction


@pytest.mark.parametrize("preset", ["vitae-nano", "vitaev2-nano"])
def test_ablations_lack_what_their_name_says_and_learn_with_all_that_is_left(preset):
    torch.manual_seed(0)
    pictures = torch.randn(2, 3, 64, 64)
    sizes = {}
    for name, build in NETWORKS.items():
        if not name.startswith(preset):
            continue
        network = build()
        sizes[name] = network.num_parameters()
        network(pictures).logits.logsumexp(1).sum().backward()
        assert all(p.grad is not None for p in network.parameters() if p.requires_grad), name
        convs = [
            conv for module in network.modules() if isinstance(module, ViTAEPyramidReduction) for conv in module.convs
        ]
        sees_scales = any(conv.dilation != (1, 1) for conv in convs)
        branches = any("conv_branch" in weight for weight, _ in network.named_parameters())
        assert sees_scales == ("dilations of 1" not in name) and branches == ("no branch" not in name), name
    equal = [size for name, size in sizes.items() if not name.endswith("no branch")]
    assert max(equal) < 1.03 * min(equal) and min(sizes.values()) < 0.8 * min(equal)


@pytest.mark.parametrize(
    ("name", "order"),
    [
        ("vitae-nano, branch before attention", ["branch", "attention", "mlp"]),
        ("vitae-nano, branch after attention", ["attention", "branch", "mlp"]),
    ],
)
def test_the_order_of_a_cell_is_that_of_its_name(name, order):
    """Each part gets the sum of the tokens and of what came before."""
    cell = next(module for module in NETWORKS[name]().modules() if isinstance(module, ViTAEFamilyNormalCell))
    cell.layernorm_before = cell.layernorm_after = torch.nn.Identity()
    seen = []

    def part(label, factor):
        def compute(tokens, *_):
            seen.append((label, tokens.flatten()[0].item()))
            return factor * tokens

        return compute

    cell.convolve = part("branch", 1.0)
    cell.attention = torch.nn.Module()
    cell.attention.forward = lambda tokens, *_: (part("attention", 1.0)(tokens), None)
    cell.mlp = torch.nn.Module()
    cell.mlp.forward = part("mlp", 1.0)
    result = cell(torch.ones(1, 16, 64), 4, 4)
    assert seen == list(zip(order, (1.0, 2.0, 4.0))) and result.flatten()[0] == 8


def test_changes_leave_the_picture_as_it_was_trained_on_at_their_mildest_strength():
    images = claims_pictures.load(DATA, 200)[2][0][:8]
    trained = claims_pictures.framed(images)
    assert trained.shape == (8, 1, 64, 64) and trained[:, :, :16].max() == 0 and trained.max() > 0.9
    for change, unchanged in {"scale": 32, "resolution": 64, "shift": 0, "rotation": 0}.items():
        pictures = {strength: make() for strength, make in claims_pictures.changed(images, change).items()}
        assert torch.equal(pictures[unchanged], trained), change
        assert all(0 <= picture.min() and picture.max() <= 1 for picture in pictures.values())
    for size, first in {48: 20, 80: 12, 96: 40, 112: 36}.items():  # the middle of a garment is at a multiple of 32
        inside = claims_pictures.framed(torch.full_like(images, 255), size // 2, size)[0, 0] > 0
        assert inside.nonzero().min() == first and inside.sum() == (size // 2) ** 2
    large = claims_pictures.framed(images, 64)
    assert large.mean() == pytest.approx(4 * trained.mean().item(), rel=0.02)
    moved = claims_pictures.shifted(images, 16)
    assert moved.sum() == pytest.approx(trained.sum().item()) and torch.equal(
        moved[0, :, :, 16:], trained[0, :, :, :-16]
    )
    for damage in claims_pictures.DAMAGES:
        parts = list(claims_pictures.changed(images, damage).values())
        errors = [(make() - trained).abs().mean().item() for make in parts]
        assert errors == sorted(errors) and errors[0] > 0, damage


def test_weights_between_two_tests_have_the_accuracy_that_is_to_be_matched():
    """A classifier that is right on the first images with one half of its weight, and on all with the whole."""

    class Threshold(torch.nn.Linear):
        config = None

        def forward(self, pictures):
            found = (pictures.mean((1, 2, 3)) > 1 - 2 * self.weight.squeeze()).float()
            return SimpleNamespace(logits=torch.stack([torch.full_like(found, 0.5), found], 1))

    training = compare_claims.Training.__new__(compare_claims.Training)
    training.average = SimpleNamespace(module=Threshold(1, 1, bias=False))
    brightness = torch.linspace(0, 1, 200).reshape(-1, 1, 1, 1).expand(-1, 1, 64, 64)
    training.held_out, training.for_statistics = (brightness, torch.ones(200, dtype=torch.int64)), []
    training.below, training.above = {"weight": torch.zeros(1, 1)}, None
    assert training.matched() is None
    training.above = {"weight": torch.ones(1, 1)}
    top1 = compare_claims.accuracy(training.matched(), *training.held_out)
    assert top1 == pytest.approx(compare_claims.RECIPE["matched_percent"], abs=2)


def test_an_average_of_weights_has_statistics_of_its_own():
    """They are those of the images, not those that the network gathered while it learned."""
    images = claims_pictures.load(DATA, 200)[0]
    images = claims_pictures.framed(images[0][:64]), images[1][:64]
    settings = {"seed": 0, "network": "vitae-nano", "learning_rate": 1e-2}
    training = compare_claims.Training(settings, images, images)
    for _ in range(3):
        training.update()
    norm = next(m for m in training.average.module.modules() if isinstance(m, torch.nn.BatchNorm2d))
    followed = norm.running_mean.clone()
    training.tested(training.average.module)
    assert norm.num_batches_tracked == 1 and not training.average.module.training
    with torch.no_grad():
        seen = []
        handle = norm.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        training.average.module(compare_claims.networks_input(images[0]))
        handle.remove()
    torch.testing.assert_close(norm.running_mean, seen[0].mean((0, 2, 3)), atol=1e-4, rtol=0)
    assert not torch.allclose(norm.running_mean, followed, atol=1e-3)


def test_a_piece_is_worth_what_the_whole_network_has_more_with_the_same_seed():
    def run(network, seed, top1, larger):
        curves = {
            change: {str(strength): 50.0 for strength in strengths}
            for change, (_, strengths) in claims_pictures.CHANGES.items()
        }
        curves["scale"] |= {"32": 90.0, "38": larger, "46": larger, "54": larger, "64": larger}
        return {"network": network, "share": 0.1, "seed": seed, "top1_percent": top1, "curves": curves}

    names = "vitae-nano", "vitae-nano, no branch"
    runs = [run(names[0], 0, 90.0, 50.0), run(names[0], 1, 88.0, 66.0), run(names[0], 2, 91.0, 50.0)]
    runs += [run(names[1], 1, 86.0, 50.0), run(names[1], 0, 89.0, 58.0)]  # the third seed has not run yet
    table = claims_report.differences_table({"parameters": dict.fromkeys(names, 1), "runs": runs})
    cells = [cell.strip() for cell in table[-1].strip("|").split("|")]
    assert cells[:3] == [names[1], "2", "**+1.5 (+1.0 to +2.0)**"]
    assert cells[3:5] == ["+0.0 (+0.0 to +0.0)", "+5.0 (-10.0 to +20.0)"]  # smaller, larger: of the 80 above chance


def test_a_lead_is_over_the_network_that_was_trained_on_the_same_images():
    def run(network, share, seed, top1):
        return {"network": network, "share": share, "seed": seed, "top1_percent": top1}

    runs = [run("vitae-nano", 0.1, 0, 80.0), run("vitae-nano", 0.1, 1, 90.0), run("vitae-nano", 1.0, 0, 95.0)]
    runs += [run("swin", 0.1, 1, 88.0), run("swin", 0.1, 0, 79.0), run("swin", 0.1, 2, 50.0), run("vit", 1.0, 0, 96.0)]
    table = claims_report.leads_table({"runs": runs})
    assert table[0] == "| points | 10% | 100% |"
    assert table[2:] == [
        "| vitae-nano over swin | **+1.5 (+1.0 to +2.0)** | – |",
        "| vitae-nano over vit | – | -1.0 (-1.0 to -1.0) |",
    ]


def test_how_soon_networks_learn_is_told_at_an_accuracy_that_all_reach():
    def run(network, share, *top1):
        curve = [(6400 * (index + 1), 10.0 * (index + 1), value) for index, value in enumerate(top1)]
        return {"network": network, "share": share, "curve": curve, "held_out_percent": max(top1)}

    runs = [run(name, 0.1, 70.0, 80.0, 79.0, 85.0) for name in claims_report.WHOLE]
    runs[0] = run(claims_report.WHOLE[0], 0.1, 79.5, 90.0)  # the lowest best is 81, of the next
    runs += [run(claims_report.WHOLE[1], 0.1, 60.0, 70.0, 81.0), run(claims_report.WHOLE[0], 1.0, 95.0)]
    table = claims_report.learning_table({"parameters": dict.fromkeys(claims_report.WHOLE, 1), "runs": runs})
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in table[2:]]
    assert [row[0] for row in cells] == [
        f"10%: {what} to 80.0 %" for what in ("thousand pictures", "seconds of a core")
    ]
    assert cells[1][1:3] == ["20.0 (20.0–20.0)", "25.0 (20.0–30.0)"] and cells[0][1] == "12.8 (12.8–12.8)"


def test_what_a_longer_wait_gives_is_told():
    def run(network, *top1):
        curve = [(6400 * (index + 1), 10.0 * (index + 1), value) for index, value in enumerate(top1)]
        return {"network": network, "share": 1.0, "patience": 2, "curve": curve}

    runs = [run("swin", 80.0, 82.0, 81.0, 81.5, 85.0), run("swin", 80.0, 83.0, 84.0, 83.0), run("vit", 70.0, 71.0)]
    results = {"parameters": dict.fromkeys(("swin", "vit"), 1), "runs": runs}
    assert claims_report.waiting_table(results)[2:] == [
        "| 100%, as it was | 84.5 (84.0–85.0) | 71.0 (71.0–71.0) |",
        "| 100%, with the shorter wait | 83.0 (82.0–84.0) | 71.0 (71.0–71.0) |",
    ]
    assert claims_report.waiting_table({**results, "runs": runs[1:]}) == []


@pytest.mark.slow
def test_a_comparison_chooses_rates_between_worse_ones_tests_changes_and_goes_on(tmp_path, monkeypatch):
    """With little data. The accuracy of the runs that choose rates is made up: the best lies off the first grid."""
    small = {"updates_between_tests": 4, "warmup_updates": 2, "held_out": 60, "changed_test_images": 10}
    monkeypatch.setattr(compare_claims, "RECIPE", {**compare_claims.RECIPE, **small, "matched_percent": 5.0})
    train_once, done = compare_claims.train_once, []

    def made_up(settings):
        done.append(settings)
        if settings["part"] == "runs":
            return train_once(settings)
        distance = abs(settings["learning_rate"] - (8e-3 if settings["network"] == "swin" else 1e-3))
        return {"curve": [], "held_out_percent": 50 - 100 * distance}

    monkeypatch.setattr(compare_claims, "train_once", made_up)
    words = ["--data", str(DATA), "--output", str(tmp_path / "claims"), "--networks", "vitae-nano", "swin"]
    words += ["--seeds", "0", "--tests", "2", "--parts", "pieces"]
    assert compare_claims.main(words)["learning_rates"] == {"vitae-nano": 1e-3, "swin": 8e-3}
    tried = [settings["learning_rate"] for settings in done if settings["network"] == "swin"]
    assert tried[:5] == [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
    results = json.loads((tmp_path / "claims.json").read_text())
    for run in results["runs"]:
        assert len(run["curve"]) == 2 and run["curve"][1][0] == 2 * 4 * 64
        assert set(run["curves"]) == set(claims_pictures.CHANGES) and set(run["matched"]) >= set(
            claims_pictures.DAMAGES
        )
        assert (run["curves"]["resolution"]["48"] is None) == (run["network"] == "swin")
    report = (tmp_path / "claims.md").read_text()
    assert "| swin | 215,926 | 0.008 | 1 |" in report and (tmp_path / "claims_geometry.png").stat().st_size > 10_000
    count = len(done)
    compare_claims.main(words)
    assert len(done) == count  # nothing anew
    compare_claims.main([*words, "--networks", "vitae-nano", "--parts", "data", "--shares", "0.01", "0.1"])
    assert [settings["share"] for settings in done[count:]] == [0.01]
    assert "| vitae-nano |" in (tmp_path / "claims.md").read_text().split("## Data")[1]
    count = len(done)
    given = [*words, "--networks", "vitae-nano", "--learning_rate", "0.002", "--output", str(tmp_path / "one_rate")]
    assert compare_claims.main(given)["learning_rates"] == {"vitae-nano": 0.002}
    assert [(run["part"], run["learning_rate"]) for run in done[count:]] == [("runs", 0.002)]
    count = len(done)
    words = [*words, "--networks", "swin", "--rates_from", f"{tmp_path}/claims.json", "--output", f"{tmp_path}/again"]
    assert compare_claims.main(words)["learning_rates"] == {"swin": 8e-3}
    assert [(run["part"], run["learning_rate"]) for run in done[count:]] == [("runs", 8e-3)]


def test_statistics_of_damaged_pictures_change_what_networks_with_batchnorm_see(tmp_path, monkeypatch):
    small = {"held_out": 60, "changed_test_images": 20, "statistics_images": 64}
    monkeypatch.setattr(measure_statistics, "RECIPE", {**compare_claims.RECIPE, **small})
    for name in ("vitae-nano", "vit"):
        save_file(NETWORKS[name]().state_dict(), tmp_path / f"{name} 0.1 1.safetensors")
    (tmp_path / "vit 0.1 1 matched.safetensors").touch()
    words = [str(tmp_path), "--data", str(DATA), "--output", str(tmp_path / "out.json")]
    record = measure_statistics.main(words)
    runs = {run["network"]: run for run in json.loads((tmp_path / "out.json").read_text())["runs"]}
    assert list(runs) == ["vit", "vitae-nano"] and runs["vit"]["seed"] == 1
    for damage in claims_pictures.DAMAGES:
        assert all(before == after for before, after in runs["vit"][damage].values())  # it has no BatchNorm
        expected = [sum(way) / len(way) for way in zip(*runs["vitae-nano"][damage].values())]
        assert record["vitae-nano"][damage] == pytest.approx(expected, abs=0.05)
    assert any(before != after for d in claims_pictures.DAMAGES for before, after in runs["vitae-nano"][d].values())


def test_a_comparison_goes_on_with_the_settings_it_began_with(tmp_path):
    path, new = tmp_path / "folder" / "results.json", {"recipe": {"rate": 0.1, "steps": (1, 2)}, "runs": []}
    assert go_on(path, new, "recipe") is new and path.parent.is_dir()
    for damaged, complaint in {"{": "no JSON file that can be read", "[]": "has no recipe, no runs"}.items():
        path.write_text(damaged)
        with pytest.raises(ValueError, match=f"results.json is .*{complaint}"):
            go_on(path, new, "recipe")
    path.write_text(json.dumps({**new, "runs": [1]}))
    assert go_on(path, new, "recipe")["runs"] == [1]
    with pytest.raises(ValueError, match=r"is of another recipe, .*'steps': \[1, 2\].*: choose another --output"):
        go_on(path, {**new, "recipe": {"rate": 0.2}}, "recipe")


@pytest.fixture
def begun(tmp_path):
    """A comparison with one run, and the words for going on with it."""
    run = {"network": "vit", "share": 0.1, "learning_rate": 0.002, "seed": 0, "tests": 300, "patience": 6}
    run |= {"curve": [], "held_out_percent": 50.0, "top1_percent": 50.0}
    data = claims_pictures.digest(claims_pictures.load(DATA, compare_claims.RECIPE["held_out"]))
    record = {"recipe": compare_claims.RECIPE, "data": data, "parameters": {}, "rates": [], "runs": [run]}
    (tmp_path / "claims.json").write_text(json.dumps(record))
    words = ["--data", str(DATA), "--output", str(tmp_path / "claims"), "--networks", "vit", "--seeds", "0"]
    return words, record, tmp_path / "claims.json"


@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--patience", "19"], "has runs of vit with tests 300 and patience 6, not tests 300 and patience 19"),
        (["--learning_rate", "0.004"], "has runs of vit with learning_rate 0.002, not learning_rate 0.004"),
    ],
)
def test_runs_of_other_settings_are_not_mixed(begun, more, complaint):
    words, *_ = begun
    with pytest.raises(ValueError, match=f"claims.json {complaint}: choose another --output"):
        compare_claims.main([*words, *more])


@pytest.mark.parametrize("changed", ["data", "parameters"])
def test_runs_on_other_images_or_networks_are_not_mixed(begun, changed):
    words, record, path = begun
    path.write_text(
        json.dumps({**record, "data": "others"} if changed == "data" else {**record, "parameters": {"vit": 1}})
    )
    with pytest.raises(ValueError, match=f"is of another {'data' if changed == 'data' else 'vit'}.*: choose another"):
        compare_claims.main([*words, "--learning_rate", "0.002"])


def test_a_comparison_counts_from_one(begun, capsys):
    with pytest.raises(SystemExit):
        compare_claims.main([*begun[0], "--tests", "0"])
    assert "argument --tests: must be at least 1, got 0" in capsys.readouterr().err
