# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How do I use a checkpoint of ViTAE? Writes it as a folder that Transformers and the Hub understand.

    vitae convert ViTAE-S.pth.tar --output vitae-s --verify
    vitae convert work_dirs/upernet/latest.pth --output segmenter    # a UperNet, or by `--head drop` its backbone
    vitae convert MVRL/rvsa_vitae_b --output autoencoder            # by its name on the Hub

The folder holds configuration, safetensors weights, image processor, model code, checksums and a model card that says
what it was made of; that of a classifier class names too. Nothing in the checkpoint is executed, and no tensor is
resized. One that does not fit the network is an error that names it. Heads beside a backbone, and tensors that no
network reads, are left aside and counted.
"""

import argparse
from pathlib import Path
from typing import Any

from ..configuration_vitaev2 import WINDOW_PADDINGS
from ..environment import environment
from ..files import PICTURES
from ..hub.conversion import convert_checkpoint
from ..hub.kinds import in_words
from ..hub.original_files import WEIGHTS
from ..presets import PRESETS
from . import command_parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = command_parser("vitae convert", __doc__)
    parser.add_argument("checkpoint", help="file, or owner/name or hf://owner/name/file on the Hub")
    parser.add_argument("--output", type=Path, required=True, help="folder to write; it must not exist yet or be empty")
    parser.add_argument("--preset", choices=list(PRESETS), help="which network it is; default: recognised")
    parser.add_argument("--weights", choices=WEIGHTS, help="if the file has several sets; default: averaged ones")
    parser.add_argument("--prefix", help="of the network's tensors, if the file has several networks")
    parser.add_argument(
        "--head",
        choices=["keep", "drop"],
        default="keep",
        help="what to do with a classifier, or the heads of a UperNet",
    )
    parser.add_argument(
        "--window_padding", choices=WINDOW_PADDINGS, help="where ViTAEv2 pads maps for its windows; default: recognised"
    )
    parser.add_argument(
        "--rescaled_cells",
        type=int,
        nargs="+",
        metavar="CELL",
        help="cells of a plain backbone after which maps are taken, 3 5 7 11 for segmentation, -1 for detection;"
        " default: by the heads beside it",
    )
    parser.add_argument(
        "--labels", type=Path, help="JSON list of class names; default: ImageNet-1k's for 1,000 classes, or the run's"
    )
    parser.add_argument(
        "--verify",
        nargs="?",
        const=PICTURES[0],
        metavar="IMAGE",
        help="reload the folder and run an image (default: a photograph of a cat) through it",
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> dict[str, Any]:
    arguments = vars(parse(argv))
    record = convert_checkpoint(arguments.pop("checkpoint"), **arguments)
    print(f"{record['class']} of {record['preset']}, {record['parameters']:,} parameters")
    for name, what in (
        ("left_aside", "left aside, beside the network"),
        ("never_read", "left out, read by no network"),
    ):
        if record[name]:
            print(f"{what}: {in_words(record[name])} tensors")
    for sentence in record["assumed"]:
        print(f"assumed: {sentence}")
    if record["num_labels"] and not record["has_class_names"]:
        print("the classes have no names: --labels FILE gives them; until then they are LABEL_0, LABEL_1 and so on")
    return {**record, **environment()}
