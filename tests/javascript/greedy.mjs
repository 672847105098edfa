// transformers.js. Reads a job and prints its results as tests/client_helpers.py says.
import { readFileSync } from "node:fs";
import { AutoModelForCausalLM, AutoTokenizer, env, Tensor } from "@huggingface/transformers";

env.allowRemoteModels = false;

const { directory, jobs } = JSON.parse(readFileSync(0, "utf8"));
const tokenizer = await AutoTokenizer.from_pretrained(directory);
const model = await AutoModelForCausalLM.from_pretrained(directory);

function promptOf({ tokens, text, messages }) {
  if (tokens !== undefined) return tokens;
  if (text !== undefined) return tokenizer.encode(text);
  return tokenizer.apply_chat_template(messages, { add_generation_prompt: true, return_tensor: false }).input_ids;
}

async function greedy(prompt, max_new_tokens) {
  const input_ids = new Tensor("int64", prompt.map(BigInt), [1, prompt.length]);
  const output = await model.generate({ input_ids, max_new_tokens, do_sample: false });
  return Array.from(output.data, Number).slice(prompt.length);
}

const results = [];
for (const job of jobs) {
  const prompt = promptOf(job);
  results.push({ prompt, generated: job.max_tokens ? await greedy(prompt, job.max_tokens) : [] });
}
console.log(JSON.stringify(results));
