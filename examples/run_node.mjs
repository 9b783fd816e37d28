/**
 * Classify a picture in Node: `node run_node.mjs FOLDER PICTURE`.
 *
 * FOLDER is what `vitae export … --format web` writes. `npm install --ignore-scripts @huggingface/transformers` brings
 * all that is imported here.
 */
import { readFile } from "node:fs/promises";
import { basename, dirname, resolve } from "node:path";
import { pathToFileURL } from "node:url";
import { AutoModelForImageClassification, Tensor, env, softmax } from "@huggingface/transformers";
import sharp from "sharp";

const [folder, picture] = process.argv.slice(2).map((path) => resolve(path));
const { pixelValues } = await import(pathToFileURL(`${folder}/preprocessing.mjs`));
const settings = JSON.parse(await readFile(`${folder}/original/preprocessor_config.json`));
Object.assign(env, { localModelPath: dirname(folder), allowRemoteModels: false });
const model = await AutoModelForImageClassification.from_pretrained(basename(folder));

const upright = sharp(picture).autoOrient().toColourspace("srgb").removeAlpha();
const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
const pixels = pixelValues({ data, width: info.width, height: info.height }, settings);
const { logits } = await model({ pixel_values: new Tensor("float32", pixels.data, pixels.dims) });
const scores = Array.from(softmax(logits.data));
const best = scores.indexOf(Math.max(...scores));
console.log(`${model.config.id2label[best]}: ${scores[best].toFixed(4)}`);
