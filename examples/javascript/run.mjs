// Runs single.onnx of a bundle: node run.mjs BUNDLE 101,2000,102 101,102
// Each argument after the bundle is one sequence of token ids. Prints one JSON object.
import { readFile } from "node:fs/promises";
import { join } from "node:path";
import * as ort from "onnxruntime-node";

const [bundle, ...texts] = process.argv.slice(2);
if (!bundle || !texts.length) {
  console.error("usage: node run.mjs BUNDLE ID,ID,… [ID,ID,… …]");
  process.exit(2);
}
const { model } = JSON.parse(await readFile(join(bundle, "manifest.json"), "utf8"));
const sequences = texts.map((text) => text.split(",").map(Number));

// Sequences are padded on the right; the mask says where tokens are.
const seq = Math.max(...sequences.map((ids) => ids.length));
const dims = [sequences.length, seq];
const ids = new Int32Array(dims[0] * seq);
const mask = new Int32Array(dims[0] * seq);
sequences.forEach((sequence, row) => {
  ids.set(sequence, row * seq);
  mask.fill(1, row * seq, row * seq + sequence.length);
});
// A threshold of 0 lets every token through, also one whose score underflows to 0.
const thresholds = model.thresholds.map((limit) => (limit <= 0 ? -1 : limit));
const inputs = {
  input_ids: new ort.Tensor("int32", ids, dims),
  attention_mask: new ort.Tensor("int32", mask, dims),
  thresholds: new ort.Tensor("float32", Float32Array.from(thresholds), [model.n_layers]),
};
if (model.n_token_types) {
  inputs.token_type_ids = new ort.Tensor("int32", new Int32Array(ids.length), dims);
}

// Given a path, ONNX Runtime finds weights.bin beside the graph.
const session = await ort.InferenceSession.create(join(bundle, "single.onnx"));
const { output, scores } = await session.run(inputs);
console.log(
  JSON.stringify({
    dims: output.dims,
    output: Array.from(output.data),
    scores: Array.from(scores.data),
  }),
);
