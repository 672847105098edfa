"""Plain ONNX Runtime, without lfm_edge. Reads a job and prints its results as tests/client_helpers.py says."""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime

TYPES = {"tensor(float)": np.float32, "tensor(int8)": np.int8}


def empty_past(session):
    """Zeros for every tensor of the state; the one dimension without a size is the number of positions held."""
    return {past.name: np.zeros([size if isinstance(size, int) else 0 for size in past.shape], TYPES[past.type])
            for past in session.get_inputs() if past.name.startswith("past")}


def past_name(present):
    return present.replace("present_conv.", "past_conv.").replace("present.", "past_key_values.")


def greedy(session, prompt, max_tokens):
    names = [output.name for output in session.get_outputs()]
    past, new, generated = empty_past(session), prompt, []
    for _ in range(max_tokens):
        mask = np.ones((1, len(prompt) + len(generated)), np.int64)
        logits, *present = session.run(None, {"input_ids": np.array([new]), "attention_mask": mask, **past})
        past = dict(zip(map(past_name, names[1:]), present, strict=True))
        new = [int(logits[0, -1].argmax())]
        generated += new
    return generated


if __name__ == "__main__":
    job = json.load(sys.stdin)
    loaded = onnxruntime.InferenceSession(next(Path(job["directory"], "onnx").glob("*.onnx")))
    print(json.dumps([{"prompt": each["tokens"], "generated": greedy(loaded, each["tokens"], each["max_tokens"])}
                      for each in job["jobs"]]))
