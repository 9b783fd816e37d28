/**
 * How far are the pixels of transformers.js from the exact ones? In Node and in browsers.
 *
 * `node nearness.mjs FOLDER PICTURE…` prints for each picture and each of `CASES` the difference in grey levels of 255,
 * mean and largest, as JSON. FOLDER is an exported model, whose size and crop are replaced.
 */

/** Side of the input, share that the crop keeps, filter; the last one is what the model names itself. */
export const CASES = [
  [224, 0.9, 1],
  [64, 1, 1],
  [224, 0.9, 3],
  [64, 1, 3],
];

function greyLevels(exact, other, deviations) {
  const plane = exact.length / deviations.length;
  const differences = exact.map((value, at) => 255 * deviations[Math.floor(at / plane)] * Math.abs(value - other[at]));
  return { mean: differences.reduce((a, b) => a + b, 0) / exact.length, largest: differences.reduce((a, b) => Math.max(a, b)) };
}

/**
 * @param {{processor, RawImage, pixelValues, settings}} tools of transformers.js, and of the exported folder
 * @param {Blob} file
 * @param {{data, width, height}} picture the pixels of that file
 */
export async function nearness({ processor, RawImage, pixelValues, settings }, file, picture) {
  const found = [];
  for (const [side, crop_pct, resample] of CASES) {
    const size = { height: side, width: side };
    Object.assign(processor.image_processor, { size: { shortest_edge: Math.trunc(side / crop_pct) }, crop_size: size, resample });
    const { pixel_values } = await processor(await RawImage.fromBlob(file));
    const exact = pixelValues(picture, { ...settings, size, crop_pct });
    found.push({ side, crop_pct, resample, ...greyLevels(exact.data, pixel_values.data, settings.image_std) });
  }
  return found;
}

async function main(folder, ...pictures) {
  const [{ readFile }, { basename, dirname }, { default: sharp }, { AutoProcessor, RawImage, env }] = await Promise.all(
    ["node:fs/promises", "node:path", "sharp", "@huggingface/transformers"].map((name) => import(name)),
  );
  Object.assign(env, { localModelPath: dirname(folder), allowRemoteModels: false });
  const { pixelValues } = await import(`${folder}/preprocessing.mjs`);
  const settings = JSON.parse(await readFile(`${folder}/original/preprocessor_config.json`));
  const processor = await AutoProcessor.from_pretrained(basename(folder));
  const found = {};
  for (const path of pictures) {
    const upright = sharp(path).autoOrient().toColourspace("srgb").removeAlpha();
    const { data, info } = await upright.raw().toBuffer({ resolveWithObject: true });
    const picture = { data, width: info.width, height: info.height };
    found[basename(path)] = await nearness({ processor, RawImage, pixelValues, settings }, new Blob([await readFile(path)]), picture);
  }
  console.log(JSON.stringify(found));
}

if (globalThis.process?.argv[1]?.endsWith("nearness.mjs")) await main(...process.argv.slice(2));
