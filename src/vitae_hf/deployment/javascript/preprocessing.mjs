// Copyright 2026 The vitae-hf authors. Licensed under the Apache License, Version 2.0.
/**
 * The preprocessing of ViTAE's image processor, byte for byte that of its Pillow backend, in a browser or in Node.
 *
 * A picture is `{data, width, height}` with 8-bit RGB or RGBA, as `ImageData` and sharp's raw buffers are. Alpha is
 * dropped. Settings are the fields of the model's own `preprocessor_config.json`.
 */

/** A picture that is longer than this many times its width loses its ends before it is resized. */
const MAX_ASPECT_RATIO = 20;
/** The most pixels that a picture may have in a browser. */
export const MAX_PIXELS = 50e6;
/** Weights are whole numbers of 2^-22, as in Pillow, whose sums are then the same to the bit. */
const WEIGHT_BITS = 22;

const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));

/** Pillow's numbers for filters: how far each reaches, and its weight at a distance. Nearest, 0, is none of them. */
const FILTERS = {
  1: [3, (x) => (-3 <= x && x < 3 ? sinc(x) * sinc(x / 3) : 0)],
  2: [1, (x) => Math.max(0, 1 - Math.abs(x))],
  3: [2, cubic],
  4: [0.5, (x) => (-0.5 < x && x <= 0.5 ? 1 : 0)],
  5: [1, (x) => (Math.abs(x) < 1 ? sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)) : 0)],
};

function cubic(distance) {
  const x = Math.abs(distance);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * -0.5 : 0;
}

/** For each place of a resized line: the first place that it reads of the old line, and the weights from there on. */
function lineWeights(oldLength, newLength, [reach, filter]) {
  const scale = oldLength / newLength;
  const stretch = Math.max(scale, 1); // enlarging a picture needs no wider filter, reducing it does
  return Array.from({ length: newLength }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - reach * stretch + 0.5));
    const last = Math.min(oldLength, Math.trunc(centre + reach * stretch + 0.5));
    const weights = [];
    for (let x = first; x < last; x++) weights.push(filter((x - centre + 0.5) * (1 / stretch)));
    const sum = weights.reduce((a, b) => a + b, 0) || 1;
    const whole = (weight) => Math.trunc((weight / sum) * 2 ** WEIGHT_BITS + (weight / sum < 0 ? -0.5 : 0.5));
    return { first, weights: Int32Array.from(weights, whole) };
  });
}

/** Resize the lines of RGB bytes: `step` bytes lie between two places of a line, `stride` between two lines. */
function resizeLines(from, to, lines, places, [step, stride], [newStep, newStride]) {
  for (let line = 0; line < lines; line++) {
    for (let place = 0; place < places.length; place++) {
      const { first, weights } = places[place];
      let at = line * stride + first * step;
      let [red, green, blue] = [1, 1, 1].map((half) => half << (WEIGHT_BITS - 1));
      for (let i = 0; i < weights.length; i++, at += step) {
        red += weights[i] * from[at];
        green += weights[i] * from[at + 1];
        blue += weights[i] * from[at + 2];
      }
      const target = line * newStride + place * newStep;
      to[target] = red >> WEIGHT_BITS; // a `Uint8ClampedArray` cuts what is below 0 and above 255
      to[target + 1] = green >> WEIGHT_BITS;
      to[target + 2] = blue >> WEIGHT_BITS;
    }
  }
}

/** For each place of a resized line, the nearest place of the old one. */
function nearestPlaces(oldLength, newLength) {
  const scale = oldLength / newLength;
  let at = scale * 0.5; // added up, as Pillow does, since rounding differs from that of a product
  return Array.from({ length: newLength }, () => {
    const place = Math.floor(at);
    at += scale;
    return { first: place, weights: Int32Array.of(1 << WEIGHT_BITS) };
  });
}

/**
 * Resize a picture as `PIL.Image.resize` does: antialiased, first along rows, then along columns.
 * @param {{data: Uint8ClampedArray, width: number, height: number}} picture in RGB, without alpha
 * @param {number} resample Pillow's number of a filter, 0 to 5
 */
export function resize(picture, width, height, resample) {
  const places = (old, now) => (resample === 0 ? nearestPlaces(old, now) : lineWeights(old, now, FILTERS[resample]));
  let { data } = picture;
  if (width !== picture.width) {
    const rows = new Uint8ClampedArray(width * picture.height * 3);
    const columns = places(picture.width, width);
    resizeLines(data, rows, picture.height, columns, [3, picture.width * 3], [3, width * 3]);
    data = rows;
  }
  if (height !== picture.height) {
    const resized = new Uint8ClampedArray(width * height * 3);
    resizeLines(data, resized, width, places(picture.height, height), [width * 3, 3], [width * 3, 3]);
    data = resized;
  }
  return { data, width, height };
}

/** A part of a picture, in RGB. */
function crop({ data, width, height }, left, top, newWidth, newHeight) {
  const channels = data.length / (width * height);
  const part = new Uint8ClampedArray(newWidth * newHeight * 3);
  for (let y = 0, to = 0; y < newHeight; y++) {
    for (let x = 0, from = ((top + y) * width + left) * channels; x < newWidth; x++, from += channels) {
      for (let channel = 0; channel < 3; channel++) part[to++] = data[from + channel];
    }
  }
  return { data: part, width: newWidth, height: newHeight };
}

/** RGB without the far ends of a very long picture, which would be cropped after resizing anyway. */
function withoutFarEnds(picture) {
  const longest = MAX_ASPECT_RATIO * Math.min(picture.width, picture.height);
  const [width, height] = [picture.width, picture.height].map((side) => Math.min(side, longest));
  return crop(picture, Math.floor((picture.width - width) / 2), Math.floor((picture.height - height) / 2), width, height);
}

/** The size at which a picture just covers `size / crop_pct`. One side fits exactly, the other is rounded down. */
function resizedSize({ width, height }, { size, crop_pct }) {
  const [wantedHeight, wantedWidth] = [size.height, size.width].map((side) => Math.trunc(side / crop_pct));
  if (wantedHeight * width >= wantedWidth * height) return [Math.trunc((wantedHeight * width) / height), wantedHeight];
  return [wantedWidth, Math.trunc((wantedWidth * height) / width)];
}

/** A whole number; halves are rounded to even ones, as in Python. */
function round(number) {
  const below = Math.floor(number);
  return number - below === 0.5 ? below + (below % 2) : Math.round(number);
}

/** What each byte becomes in a channel, in float32 after each step. */
function byteValues(settings, channel) {
  const of = (numbers) => Math.fround(Array.isArray(numbers) ? numbers[channel] : numbers);
  return Float32Array.from({ length: 256 }, (_, byte) => {
    const value = settings.do_rescale ? Math.fround(byte * settings.rescale_factor) : byte;
    if (!settings.do_normalize) return value;
    return Math.fround(value - of(settings.image_mean)) / of(settings.image_std);
  });
}

/**
 * The part of a picture that the network gets, as RGB bytes.
 * @param {{data: Uint8Array | Uint8ClampedArray, width: number, height: number}} picture in RGB or RGBA
 * @param {object} settings the model's own `preprocessor_config.json`
 */
export function resizeAndCrop(picture, settings) {
  if (!settings.do_resize) return crop(picture, 0, 0, picture.width, picture.height);
  const whole = withoutFarEnds(picture);
  const resized = resize(whole, ...resizedSize(whole, settings), settings.resample);
  const { width, height } = settings.size;
  return crop(resized, round((resized.width - width) / 2), round((resized.height - height) / 2), width, height);
}

/**
 * RGB bytes as the network takes them: `data`, a `Float32Array`, and `dims`, `[1, 3, height, width]`.
 */
export function normalize({ data, width, height }, settings) {
  const values = new Float32Array(data.length);
  for (let channel = 0, to = 0; channel < 3; channel++) {
    const valueOf = byteValues(settings, channel);
    for (let from = channel; from < data.length; from += 3) values[to++] = valueOf[data[from]];
  }
  return { data: values, dims: [1, 3, height, width] };
}

/** The input of the network for a picture: `resizeAndCrop`, then `normalize`. */
export function pixelValues(picture, settings) {
  return normalize(resizeAndCrop(picture, settings), settings);
}

/**
 * Read a picture in a browser: upright, with the values that its file has, whatever colour profile it names.
 * @param {Blob} file
 * @throws {Error} with a sentence: the file is no picture, damaged, or has too many pixels
 */
export async function readPicture(file) {
  const image = new Image();
  image.src = URL.createObjectURL(file);
  try {
    await new Promise((resolve, reject) => Object.assign(image, { onload: resolve, onerror: reject }));
    if (image.naturalWidth * image.naturalHeight > MAX_PIXELS) {
      throw new Error(
        `The picture has too many pixels: ${image.naturalWidth}×${image.naturalHeight}, at most ${MAX_PIXELS / 1e6} million are read.`,
      );
    }
  } catch (error) {
    throw error instanceof Error ? error : new Error("This is not a picture that this browser can read.");
  } finally {
    URL.revokeObjectURL(image.src);
  }
  try {
    const options = { imageOrientation: "from-image", premultiplyAlpha: "none", colorSpaceConversion: "none" };
    return pixelsOf(await createImageBitmap(file, options));
  } catch {
    throw new Error("The picture is damaged: it starts like one, but cannot be read to its end.");
  }
}

/** The pixels of a bitmap. A canvas mixes colours with alpha, so that transparent pictures go through WebGL. */
function pixelsOf(bitmap) {
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d", { willReadFrequently: true });
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, width, height);
  let opaque = true;
  for (let at = 3; at < data.length; at += 4) opaque &&= data[at] === 255;
  return { data: (!opaque && pixelsByWebGL(bitmap)) || data, width, height };
}

function pixelsByWebGL(bitmap) {
  const gl = new OffscreenCanvas(1, 1).getContext("webgl");
  const { width, height } = bitmap;
  if (!gl || Math.max(width, height) > gl.getParameter(gl.MAX_TEXTURE_SIZE)) return null;
  gl.bindTexture(gl.TEXTURE_2D, gl.createTexture());
  gl.pixelStorei(gl.UNPACK_COLORSPACE_CONVERSION_WEBGL, gl.NONE);
  gl.texImage2D(gl.TEXTURE_2D, 0, gl.RGBA, gl.RGBA, gl.UNSIGNED_BYTE, bitmap);
  gl.bindFramebuffer(gl.FRAMEBUFFER, gl.createFramebuffer());
  gl.framebufferTexture2D(gl.FRAMEBUFFER, gl.COLOR_ATTACHMENT0, gl.TEXTURE_2D, gl.getParameter(gl.TEXTURE_BINDING_2D), 0);
  const data = new Uint8Array(width * height * 4);
  gl.readPixels(0, 0, width, height, gl.RGBA, gl.UNSIGNED_BYTE, data);
  return data;
}
