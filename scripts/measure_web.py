# Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
"""How far are the pixels that transformers.js makes from ours, in Node and in Chromium?

    vitae export vitae-nano-fashion --format web --output outputs/web
    python scripts/measure_web.py outputs/web --output results/web_pixels.json

Pictures are those of the package, resized to two sizes, with the filter that the exported settings name and with the
model's own. Differences are grey levels of 255. `make test-web` installs what this needs.
"""

import argparse
import json
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import Any

from photograph_app import chromium, serving_files

from vitae_hf.environment import environment
from vitae_hf.failures import run_command
from vitae_hf.files import PICTURES, output_file, write_json


PACKAGES = Path(__file__).parents[1] / "tests" / "javascript"
OFFLINE = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
IN_BROWSER = """
const packages = "/node_modules/@huggingface/transformers/dist";
const { AutoProcessor, RawImage, env } = await import(`${packages}/transformers.min.js`);
Object.assign(env, { allowLocalModels: true, allowRemoteModels: false, localModelPath: "/", useBrowserCache: false });
const { nearness } = await import("/nearness.mjs");
const { pixelValues, readPicture } = await import("/model/preprocessing.mjs");
const settings = await (await fetch("/model/original/preprocessor_config.json")).json();
const processor = await AutoProcessor.from_pretrained("model");
const found = {};
for (const name of arguments[0]) {
    const file = await (await fetch(`/${name}`)).blob();
    found[name] = await nearness({ processor, RawImage, pixelValues, settings }, file, await readPicture(file));
}
return found;
"""


def in_node(folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """For each picture, by name, the differences in Node; see `tests/javascript/nearness.mjs`."""
    command = ["node", PACKAGES / "nearness.mjs", folder, *pictures]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"Node failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def in_chromium(folder: Path, pictures: list[Path]) -> dict[str, Any]:
    """The same in a browser that reaches no other machine."""
    with tempfile.TemporaryDirectory() as root:
        for name in ("node_modules", "nearness.mjs"):
            (Path(root) / name).symlink_to(PACKAGES / name)
        (Path(root) / "model").symlink_to(folder)
        for picture in pictures:
            shutil.copy(picture, root)
        with serving_files(Path(root)) as (_, address), chromium(OFFLINE) as driver:
            driver.get(address)
            names = [picture.name for picture in pictures]
            return driver.execute_script(f"return (async function () {{ {IN_BROWSER} }})(...arguments)", names)


def main(argv: list[str] | None = None) -> dict:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="what `vitae export … --format web` wrote")
    parser.add_argument("--output", type=output_file, help="JSON file to write")
    arguments = parser.parse_args(argv)
    folder, pictures = arguments.folder.resolve(), list(PICTURES)
    version = json.loads(
        (PACKAGES / "node_modules/@huggingface/transformers/package.json").read_text(encoding="utf-8")
    )["version"]
    record = {
        "node": in_node(folder, pictures),
        "chromium": in_chromium(folder, pictures),
        "transformers_js": version,
        **environment(),
    }
    if arguments.output:
        write_json(record, arguments.output, indent=2)
    return record


if __name__ == "__main__":
    run_command(main)
