# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What `compare_claims.py` found, as tables and pictures: means and ranges over the seeds."""

import statistics
from itertools import product
from pathlib import Path

from claims_networks import WHOLE
from claims_pictures import DAMAGES, FRAME, GARMENT, SHARE_OF_PIECES
from matplotlib.figure import Figure

from vitae_hf.files import write_text


GEOMETRY = ("scale", "resolution", "shift", "rotation")
AXES = {
    "scale": "side of the garment in the frame (pixels)",
    "resolution": "side of the frame (pixels)",
    "shift": "shift (pixels)",
    "rotation": "turn (degrees)",
    "noise": "standard deviation of noise",
    "blur": "standard deviation of blur (pixels)",
    "contrast": "contrast left",
    "occlusion": "side of the square (pixels)",
}
TRAINED = {"scale": str(GARMENT), "resolution": str(FRAME), "shift": "0", "rotation": "0"}
"""The strength of each change at which pictures are as in training."""
SIZES_FOR_ALL = ("96", "128")  # the frames that every network can take
SHORT_OF_THE_LOWEST = 1.0  # percent of accuracy
CHANCE = 10.0  # accuracy of a guess among ten classes, in percent
COLUMNS = ("smaller", "larger", "resolution", "shift", "rotation", *DAMAGES)


def spread(values: list[float]) -> str:
    """Mean and range."""
    if not values:
        return "–"
    return f"{statistics.mean(values):.1f} ({min(values):.1f}–{max(values):.1f})"


def mean_of(curve: dict[str, float]) -> float:
    return statistics.mean(curve.values())


def kept(record: dict, column: str) -> float:
    """What a run keeps of its accuracy above chance, in percent, on average over the strengths of a change.

    The strength of the training pictures is left out. Of the sides of garments those below and above that in training
    are apart; they are about evenly spaced in their logarithm.
    """
    change = "scale" if column in ("smaller", "larger") else column
    curve = {name: top1 for name, top1 in record["curves"][change].items() if name != TRAINED.get(change)}
    if change == "scale":
        curve = {side: top1 for side, top1 in curve.items() if (int(side) < GARMENT) == (column == "smaller")}
    elif change == "resolution":
        curve = {size: curve[size] for size in SIZES_FOR_ALL}
    clean = record["curves"]["scale"][TRAINED["scale"]]
    return 100 * (mean_of(curve) - CHANCE) / (clean - CHANCE)


def of(results: dict, network: str, share: float) -> list[dict]:
    return [run for run in results["runs"] if (run["network"], run["share"]) == (network, share)]


def by_seed(runs: list[dict], others: list[dict]) -> list[tuple[dict, dict]]:
    """Pairs of runs with one seed, which were trained on the same images."""
    first, second = ({run["seed"]: run for run in part} for part in (runs, others))
    return [(first[seed], second[seed]) for seed in sorted(first.keys() & second.keys())]


def rows(header: list[str], cells: list[list[str]]) -> list[str]:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *cells]
    return ["| " + " | ".join(line) + " |" for line in lines]


def pieces_table(results: dict) -> list[str]:
    """For each network its accuracy, and what it keeps of it on changed pictures."""
    header = ["network", "parameters", "rate", "seeds", "top-1, %", *(f"kept: {name}" for name in COLUMNS)]
    cells = []
    for network, parameters in results["parameters"].items():
        if runs := [run for run in of(results, network, SHARE_OF_PIECES) if "curves" in run]:
            start = [network, f"{parameters:,}", f"{runs[0]['learning_rate']:g}", str(len(runs))]
            changes = [spread([kept(run, change) for run in runs]) for change in COLUMNS]
            cells.append([*start, spread([run["top1_percent"] for run in runs]), *changes])
    return rows(header, cells) if cells else []


def pieces_of(results: dict) -> dict[str, str]:
    """Every network that lacks a piece, with the whole one."""
    return {name: name.split(",")[0] for name in results["parameters"] if name not in WHOLE}


def differences_table(results: dict) -> list[str]:
    """What a piece is worth: the whole network's figures less those without the piece, trained on the same images.

    Bold where the difference has one sign with every seed.
    """
    header = ["without", "seeds", "top-1, points", *(f"kept: {name}" for name in COLUMNS)]
    figures = [lambda run: run["top1_percent"], *(lambda run, column=column: kept(run, column) for column in COLUMNS)]
    cells = []
    for network, whole in pieces_of(results).items():
        done = ([run for run in of(results, name, SHARE_OF_PIECES) if "curves" in run] for name in (whole, network))
        if pairs := by_seed(*done):
            differences = [[figure(one) - figure(other) for one, other in pairs] for figure in figures]
            cells.append([network, str(len(pairs)), *map(signed, differences)])
    return rows(header, cells) if cells else []


def signed(differences: list[float]) -> str:
    """Mean and range of differences, bold if several have all one sign."""
    text = f"{statistics.mean(differences):+.1f} ({min(differences):+.1f} to {max(differences):+.1f})"
    is_sure = len(differences) > 1 and (min(differences) > 0 or max(differences) < 0)
    return f"**{text}**" if is_sure else text


def matched_table(results: dict) -> list[str]:
    """Accuracy on damaged pictures of networks as they were when their accuracy on held-out images was the same.

    Updates are those to the first test with at least this accuracy.
    """
    header = ["network", "seeds", "updates", "whole pictures", *DAMAGES]
    recipe, cells = results["recipe"], []
    each = recipe["updates_between_tests"]
    for network in results["parameters"]:
        if runs := [run for run in of(results, network, SHARE_OF_PIECES) if "matched" in run]:
            tests = [
                next(i for i, test in enumerate(run["curve"], 1) if test[2] >= recipe["matched_percent"])
                for run in runs
            ]
            updates = "–".join(f"{count * each:,}" for count in sorted({min(tests), max(tests)}))
            found = [run["matched"] for run in runs]
            damages = [spread([mean_of(one[damage]) for one in found]) for damage in DAMAGES]
            clean = spread([one["top1_percent"] for one in found])
            cells.append([network, str(len(found)), updates, clean, *damages])
    return rows(header, cells) if cells else []


def data_table(results: dict) -> list[str]:
    """Accuracy of the whole networks, by the share of the training images."""
    shares = sorted({run["share"] for run in results["runs"]})
    networks = [
        name
        for name in results["parameters"]
        if any(of(results, name, share) for share in shares if share != SHARE_OF_PIECES)
    ]
    cells = [
        [network, *(spread([run["top1_percent"] for run in of(results, network, share)]) for share in shares)]
        for network in networks
    ]
    return rows(["network", *(f"{share:.0%}" for share in shares)], cells) if cells else []


def leads_table(results: dict) -> list[str]:
    """What each whole ViTAE has more than each of the others when trained on the same images, by their share."""
    shares = sorted({run["share"] for run in results["runs"]})
    cells = []
    for ours, theirs in product(WHOLE[:2], WHOLE[2:]):
        pairs = [by_seed(of(results, ours, share), of(results, theirs, share)) for share in shares]
        leads = [[one["top1_percent"] - other["top1_percent"] for one, other in found] for found in pairs]
        if any(leads):
            cells.append([f"{ours} over {theirs}", *(signed(lead) if lead else "–" for lead in leads)])
    return rows(["points", *(f"{share:.0%}" for share in shares)], cells) if cells else []


def learning_table(results: dict) -> list[str]:
    """What the whole networks take, on each share of the images, to an accuracy that they all reach.

    It is one percent short of the best accuracy on held-out images of the run whose best is the lowest: to come to
    one's own best takes longer than to pass it.
    """
    networks = [name for name in results["parameters"] if name in WHOLE]
    cells = []
    for share in sorted({run["share"] for run in results["runs"]}):
        runs = {network: of(results, network, share) for network in networks}
        if not all(runs.values()):
            continue
        wanted = min(run["held_out_percent"] for found in runs.values() for run in found) - SHORT_OF_THE_LOWEST
        reached = {
            network: [next(test for test in run["curve"] if test[2] >= wanted) for run in found]
            for network, found in runs.items()
        }
        for what, index, unit in (("thousand pictures", 0, 1000), ("seconds of a core", 1, 1)):
            figures = [spread([test[index] / unit for test in reached[network]]) for network in networks]
            cells.append([f"{share:.0%}: {what} to {wanted:.1f} %", *figures])
    return rows(["", *networks], cells) if cells else []


def ended_early(run: dict) -> list:
    """The learning curve of a run as far as it would have gone if it had waited for its least number of tests alone.

    On large shares it waits for some epochs, which takes more tests.
    """
    highest, since = -1.0, 0
    for index, (*_, top1) in enumerate(run["curve"], 1):
        highest, since = (top1, 0) if top1 > highest else (highest, since + 1)
        if since == run["patience"]:
            return run["curve"][:index]
    return run["curve"]


def waiting_table(results: dict) -> list[str]:
    """The best accuracy on held-out images, and what it would have been if all runs had waited for as many tests."""
    networks = [name for name in results["parameters"] if name in WHOLE]
    cells = []
    for share in sorted({run["share"] for run in results["runs"]}):
        runs = {network: of(results, network, share) for network in networks}
        curves = {network: [(run["curve"], ended_early(run)) for run in found] for network, found in runs.items()}
        if all(whole == early for found in curves.values() for whole, early in found):
            continue
        for index, what in enumerate(("as it was", "with the shorter wait")):
            best = {
                network: [max(top1 for *_, top1 in pair[index]) for pair in curves[network]] for network in networks
            }
            cells.append([f"{share:.0%}, {what}", *(spread(best[network]) for network in networks)])
    return rows(["held-out top-1, %", *networks], cells) if cells else []


def band(axis, xs: list[float], columns: list[list[float]], label: str) -> None:
    """A line through the means and a band over the range."""
    line = axis.plot(xs, [statistics.mean(column) for column in columns], marker=".", label=label)[0]
    axis.fill_between(xs, list(map(min, columns)), list(map(max, columns)), alpha=0.15, color=line.get_color())


def draw_changes(results: dict, changes: tuple[str, ...], networks: list[str], path: Path) -> None:
    """Accuracy over the strength of each change."""
    figure = Figure(figsize=(11, 7.5), layout="constrained")
    for axis, change in zip(figure.subplots(2, 2).flat, changes):
        for network in networks:
            curves = [run["curves"][change] for run in of(results, network, SHARE_OF_PIECES) if "curves" in run]
            strengths = [name for name in (curves[0] if curves else ()) if curves[0][name] is not None]
            if strengths:
                columns = [[curve[name] for curve in curves] for name in strengths]
                band(axis, list(map(float, strengths)), columns, network)
        axis.set(xlabel=AXES[change], ylabel="top-1 (%)", title=change)
        axis.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3)
    figure.savefig(path, dpi=110)


def draw_learning(results: dict, path: Path) -> None:
    """Accuracy over the share of the images, and that of each seed on the largest share over pictures and time."""
    shares = sorted({run["share"] for run in results["runs"]})
    largest = shares[-1]
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    by_share, by_pictures, by_seconds = figure.subplots(1, 3)
    for network in results["parameters"]:
        done = [(share, of(results, network, share)) for share in shares]
        done = [(share, runs) for share, runs in done if runs]
        if len(done) < 2:
            continue
        columns = [[run["top1_percent"] for run in runs] for _, runs in done]
        band(by_share, [100 * share for share, _ in done], columns, network)
        colour = by_share.lines[-1].get_color()
        for run in of(results, network, largest):
            seen, seconds, top1 = zip(*run["curve"])
            by_pictures.plot([count / 1000 for count in seen], top1, color=colour, linewidth=0.9)
            by_seconds.plot(seconds, top1, color=colour, linewidth=0.9)
    by_share.set(xscale="log", xlabel="training images used (%)", ylabel="top-1 on the test images (%)")
    by_pictures.set(
        xlabel=f"thousand pictures seen ({largest:.0%} of the images)", ylabel="top-1 on held-out images (%)"
    )
    by_seconds.set(xscale="log", xlabel="seconds of one core for training", ylabel="top-1 on held-out images (%)")
    for axis in (by_share, by_seconds):
        axis.xaxis.set_major_formatter("{x:g}")
        axis.xaxis.set_minor_formatter("")
    by_share.set_xticks([100 * share for share in shares])
    for axis in figure.axes:
        axis.grid(alpha=0.3)
    by_share.legend(fontsize="small")
    figure.savefig(path, dpi=110)


def write_report(results: dict, path: Path) -> None:
    """Write tables beside the JSON file, and pictures as soon as there is something to draw."""
    titles = {
        "Pieces, scale and damage": pieces_table(results),
        "What the pieces are worth": differences_table(results),
        "Damage at equal accuracy": matched_table(results),
        "Data": data_table(results),
        "Leads": leads_table(results),
        "Learning": learning_table(results),
        "Waiting": waiting_table(results),
    }
    parts = ["\n".join([f"## {title}", "", *table, ""]) for title, table in titles.items() if table]
    write_text("\n".join(parts), path.with_suffix(".md"))
    networks = list(results["parameters"])
    whole = [name for name in networks if name in WHOLE]
    if any("curves" in run for run in results["runs"]):
        for name, changes in {"geometry": GEOMETRY, "damage": DAMAGES}.items():
            draw_changes(results, changes, whole, path.with_name(f"{path.stem}_{name}.png"))
        for family in ("vitae-nano", "vitaev2-nano"):
            pieces = [name for name in networks if name.split(",")[0] == family]
            draw_changes(results, GEOMETRY, pieces, path.with_name(f"{path.stem}_{family}.png"))
    if any(run["share"] != SHARE_OF_PIECES for run in results["runs"]):
        draw_learning(results, path.with_name(f"{path.stem}_learning.png"))
