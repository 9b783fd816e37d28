# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""What is known of the authors' variants: the papers that describe them, their size, the accuracies that are printed.

The README's table and the cards of `model_cards/` take their figures from here. No accuracy is measured by us: the
authors print them in their papers and in the README of github.com/ViTAE-Transformer/ViTAE-Transformer, that of 13M in
an earlier version of it; those of remote sensing in the papers and in the READMEs of Remote-Sensing-RVSA and RSP.
"""

from typing import NamedTuple


class Paper(NamedTuple):
    """Where the authors describe a variant; `citation` is BibTeX."""

    title: str
    arxiv: str
    citation: str

    @property
    def url(self) -> str:
        return f"https://arxiv.org/abs/{self.arxiv}"


class Accuracy(NamedTuple):
    """On ImageNet-1k's validation images at 224², in percent, as printed by the authors; None: they print none.

    `real` is the top-1 accuracy with the reassessed labels of Beyer et al. 2020 (arXiv 2006.07159).
    """

    top1: float
    top5: float | None
    real: float | None


class Variant(NamedTuple):
    """A network of the authors.

    Args:
        papers: that describe it; the last one prints its figures.
        parameters: trainable ones, counted from the released network with 1,000 classes at 224².
        gmacs: multiply-adds for one image, in 1e9.
        printed: accuracy by the data that the weights were trained on; empty if the authors print none.
        has_weights: whether the authors released or announced weights.
        recipe: name in `recipes/`; default: the variant's own.
        note: a sentence for the card.
    """

    papers: tuple[Paper, ...]
    parameters: int
    gmacs: float
    printed: dict[str, Accuracy] = {}
    has_weights: bool = True
    recipe: str | None = None
    note: str = ""


IMAGENET_1K = "ImageNet-1k"
IMAGENET_22K = "ImageNet-22k, then ImageNet-1k"

VITAE = Paper(
    "ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias",
    "2106.03348",
    """\
@inproceedings{xu2021vitae,
  title={ViTAE: Vision Transformer Advanced by Exploring Intrinsic Inductive Bias},
  author={Xu, Yufei and Zhang, Qiming and Zhang, Jing and Tao, Dacheng},
  booktitle={Advances in Neural Information Processing Systems},
  year={2021}
}""",
)
VITAE_V2 = Paper(
    "ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond",
    "2202.10108",
    """\
@article{zhang2022vitaev2,
  title={ViTAEv2: Vision Transformer Advanced by Exploring Inductive Bias for Image Recognition and Beyond},
  author={Zhang, Qiming and Xu, Yufei and Zhang, Jing and Tao, Dacheng},
  journal={arXiv preprint arXiv:2202.10108},
  year={2022}
}""",
)
SCALED_UP = (VITAE, VITAE_V2)  # the second paper scales the first one's cells up

VARIANTS: dict[str, Variant] = {
    "vitae-t": Variant((VITAE,), 4_882_792, 1.757, {IMAGENET_1K: Accuracy(75.3, 92.7, 82.9)}),
    "vitae-6m": Variant((VITAE,), 6_610_024, 2.152, {IMAGENET_1K: Accuracy(77.9, 94.1, 84.9)}),
    "vitae-13m": Variant(
        (VITAE,),
        10_830_632,
        3.036,
        has_weights=False,
        note="It is the 13M network of the authors' code; the one of their paper is larger: `vitae-13m-paper`.",
    ),
    "vitae-13m-paper": Variant(
        (VITAE,),
        13_192_552,
        3.496,
        {IMAGENET_1K: Accuracy(81.0, 95.4, 86.9)},
        has_weights=False,
        recipe="vitae-13m",
        note="The authors print size and accuracy of a 13M network, but their code builds a smaller one. That it is"
        " this one is inferred from the size and from what the other variants have in common.",
    ),
    "vitae-s": Variant((VITAE,), 24_009_096, 6.180, {IMAGENET_1K: Accuracy(82.0, 95.9, 87.0)}),
    "vitae-b": Variant(
        SCALED_UP,
        89_341_672,
        18.08,
        {IMAGENET_1K: Accuracy(83.8, None, 89.4), IMAGENET_22K: Accuracy(84.8, None, 89.9)},
    ),
    "vitae-l": Variant(
        SCALED_UP,
        311_724_008,
        62.94,
        {IMAGENET_1K: Accuracy(86.0, None, 90.3), IMAGENET_22K: Accuracy(87.5, None, 90.8)},
    ),
    "vitae-h": Variant(
        SCALED_UP,
        644_528_360,
        129.63,
        {IMAGENET_1K: Accuracy(86.9, None, 90.6), IMAGENET_22K: Accuracy(88.0, None, 90.7)},
    ),
    "vitaev2-s": Variant((VITAE_V2,), 19_355_688, 5.753, {IMAGENET_1K: Accuracy(82.6, 96.2, 87.6)}),
    "vitaev2-48m": Variant((VITAE_V2,), 48_674_632, 13.34, {IMAGENET_1K: Accuracy(83.8, 96.6, 88.4)}),
    "vitaev2-b": Variant(
        (VITAE_V2,),
        89_693_352,
        24.37,
        {IMAGENET_1K: Accuracy(84.6, 96.9, 88.7), IMAGENET_22K: Accuracy(86.1, 97.9, 89.9)},
    ),
}
"""What is known of a network, by the name of its preset. A preset that is not here, such as `vitae-nano`, is ours."""


class Score(NamedTuple):
    """What the authors print of their weights after training for a task on a data set, in percent, by variety."""

    task: str
    dataset: str
    metric: str
    values: tuple[float, ...]


class RemoteSensing(NamedTuple):
    """Weights that the authors trained on pictures from the air, and released under MIT.

    Args:
        preset: the network's.
        what: it is, a noun with an article.
        paper: that prints its scores.
        repository: of the authors' code, on GitHub.
        parameters: of the network at 224², and in how many classes it ends there, or None.
        varieties: heads of the columns of scores.
        printed: rows of scores.
        recipes: names in `recipes/`.
        note: a sentence for the card.
    """

    preset: str
    what: str
    paper: Paper
    repository: str
    parameters: int
    num_labels: int | None
    varieties: tuple[str, ...]
    printed: tuple[Score, ...]
    recipes: tuple[str, ...] = ()
    note: str = ""


RVSA = Paper(
    "Advancing Plain Vision Transformer Towards Remote Sensing Foundation Model",
    "2208.03987",
    """\
@article{wang2022rvsa,
  title={Advancing Plain Vision Transformer Towards Remote Sensing Foundation Model},
  author={Wang, Di and Zhang, Qiming and Xu, Yufei and Zhang, Jing and Du, Bo and Tao, Dacheng and Zhang, Liangpei},
  journal={arXiv preprint arXiv:2208.03987},
  year={2022}
}""",
)
RSP = Paper(
    "An Empirical Study of Remote Sensing Pretraining",
    "2204.02825",
    """\
@article{wang2022rsp,
  title={An Empirical Study of Remote Sensing Pretraining},
  author={Wang, Di and Zhang, Jing and Du, Bo and Xia, Gui-Song and Tao, Dacheng},
  journal={arXiv preprint arXiv:2204.02825},
  year={2022}
}""",
)
_SCENES = "scene classification"
_RVSA_SCORES = (
    Score(_SCENES, "UCM, 5:5", "top-1", (99.56, 99.50)),
    Score(_SCENES, "AID, 2:8", "top-1", (97.03, 97.01)),
    Score(_SCENES, "AID, 5:5", "top-1", (98.48, 98.50)),
    Score(_SCENES, "NWPU, 1:9", "top-1", (93.93, 93.92)),
    Score(_SCENES, "NWPU, 2:8", "top-1", (95.69, 95.66)),
    Score("segmentation", "LoveDA", "mean IoU", (52.26, 52.44)),
    Score("segmentation", "Potsdam", "overall accuracy", (91.22, 91.15)),
    Score("segmentation", "iSAID", "mean IoU", (63.48, 64.49)),
    Score("rotated boxes", "DOTA", "mAP", (78.96, 78.99)),
    Score("rotated boxes", "DOTA, several scales", "mAP", (81.24, 81.18)),
    Score("rotated boxes", "DIOR-R", "mAP", (70.95, 71.05)),
)
REMOTE_SENSING: dict[str, RemoteSensing] = {
    "vitae-b-rvsa": RemoteSensing(
        "vitae-b-rvsa",
        "a ViTAE-B whose attention looks into windows that move, scale and turn (RVSA), fine-tuned",
        RVSA,
        "ViTAE-Transformer/Remote-Sensing-RVSA",
        89_724_968,
        1000,
        ("keys and values together", "apart"),
        _RVSA_SCORES,
        ("mae-b-millionaid", "vitae-b-rvsa", "upernet-vitae-b-rvsa-loveda", "upernet-vitae-b-rvsa-potsdam"),
    ),
    "vitaev2-s-rsp": RemoteSensing(
        "vitaev2-s-rsp",
        "a ViTAEv2-S trained to classify MillionAID, windows padded at the end as in its backbones",
        RSP,
        "ViTAE-Transformer/RSP",
        18_868_851,
        51,
        ("ViTAEv2-S",),
        (
            Score(_SCENES, "MillionAID, 51 classes", "top-1", (98.97,)),
            Score(_SCENES, "MillionAID, 51 classes", "top-5", (99.88,)),
        ),
    ),
    "vitae-b-mae": RemoteSensing(
        "vitae-b",
        "a masked autoencoder of ViTAE-B, trained on MillionAID without labels",
        RVSA,
        "ViTAE-Transformer/Remote-Sensing-RVSA",
        112_221_696,
        None,
        ("keys and values together", "apart"),
        _RVSA_SCORES,
        ("mae-b-millionaid",),
        "The scores are of networks with rotated windows (RVSA) that began with its encoder.",
    ),
}
"""What is known of weights for remote sensing, by the name of their card."""
