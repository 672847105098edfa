"""Hold a large NPU bundle against the quantized reference on the simulator: a prefill chunk, then some decode steps.

    python examples/python/simulate.py BUNDLE [--soc NAME] [--tokens N]

`lfm-edge verify` does more of that, and takes hours at 1.2B, where the simulator takes half a minute for a token. The
reference holds the weights in float32. Both take the same tokens: prompts that the checkpoint ships with their answers,
or a built-in text. Each row is printed as it comes, and at the end how often both had the same best token.
"""

import argparse
import time

from lfm_edge import open_bundle
from lfm_edge.harness.parity import compare
from lfm_edge.harness.quality import read_tasks
from lfm_edge.harness.verify import quantized_reference, quantized_weights, text_for


def main(directory, soc, tokens):
    bundle = open_bundle(directory)
    manifest = bundle.manifest
    text = text_for(bundle, read_tasks(bundle), manifest.options.prefill_chunk + tokens)
    steps = [text[:manifest.options.prefill_chunk], *([token] for token in text[manifest.options.prefill_chunk:])]
    reference = quantized_reference(bundle, quantized_weights(bundle, bundle.source()))
    expected = [reference.prefill(step) for step in steps]
    del reference
    session = bundle.session(soc=soc)
    print(session.remark, flush=True)
    same = 0
    for step, theirs in zip(steps, expected, strict=True):
        start = time.monotonic()
        ours = session.prefill(step)
        row = compare("", [ours], [theirs])
        same += row.top1_agreement == 1
        print(f"{len(step):4d} tokens to position {session.position}: cosine {row.cosine:.6f}, largest error "
              f"{row.logit_error:.4f} of the spread, KL {row.kl_divergence:.2e} nats, best token "
              f"{'the same' if row.top1_agreement == 1 else 'ANOTHER'}; {time.monotonic() - start:.0f} s", flush=True)
    print(f"best token the same in {same} of {len(steps)} steps, {same / len(steps):.1%}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("bundle")
    parser.add_argument("--soc", help="one of the chips that the bundle was compiled for; the first without it")
    parser.add_argument("--tokens", type=int, default=4, help="decode steps after the chunk (default: 4)")
    options = parser.parse_args()
    main(options.bundle, options.soc, options.tokens)
