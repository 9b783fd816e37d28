/** What transformers.js makes of an exported model: `node transformers_js.mjs FOLDER PICTURE…` prints it as JSON. */
import { readFile } from "node:fs/promises";
import { basename, dirname } from "node:path";
import { AutoModel, AutoProcessor, RawImage, Tensor, env, pipeline } from "@huggingface/transformers";
import sharp from "sharp";

const [folder, ...pictures] = process.argv.slice(2);
Object.assign(env, { localModelPath: dirname(folder), allowRemoteModels: false });
const name = basename(folder);
const { pixelValues } = await import(`${folder}/preprocessing.mjs`);
const settings = JSON.parse(await readFile(`${folder}/original/preprocessor_config.json`));
const [model, processor] = await Promise.all([AutoModel, AutoProcessor].map((auto) => auto.from_pretrained(name)));

async function describe(path) {
  const upright = sharp(path).autoOrient().toColourspace("srgb").removeAlpha();
  const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
  const pixels = pixelValues({ data, width: info.width, height: info.height }, settings);
  const outputs = await model({ pixel_values: new Tensor("float32", pixels.data, pixels.dims) });
  const { pixel_values } = await processor(await RawImage.read(path));
  const entries = Object.entries(outputs).map(([key, tensor]) => [key, Array.from(tensor.data)]);
  return { pixels: Array.from(pixels.data), own_pixels: Array.from(pixel_values.data), ...Object.fromEntries(entries) };
}

const described = [];
for (const path of pictures) described.push(await describe(path));
const labels = {};
for (const dtype of ["fp32", "fp16", "q8"]) {
  const classify = await pipeline("image-classification", name, { dtype });
  labels[dtype] = await Promise.all(pictures.map(async (path) => (await classify(path, { top_k: 1 }))[0].label));
}
const extract = await pipeline("image-feature-extraction", name);
const features = (await extract(pictures[0], { pool: true })).tolist();
console.log(JSON.stringify({ pictures: described, labels, features }));
