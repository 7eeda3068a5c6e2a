"""Draw loss.png and write README.md, the model card, from training.json: every number in the card is a measured one.

python -m model_zoo.demo.card [folder]
"""

import json
import sys
from pathlib import Path
from typing import Any

SAMPLES = 4
TITLE = "A small Llama that writes Python, and its draft model"


def draw_losses(record: dict[str, Any], path: Path) -> None:
    """Train and held-out loss of both models, and the draft's agreement, against tokens seen."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    colours = {"target": "#2b6cb0", "draft": "#dd6b20"}
    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), width_ratios=[3, 2], layout="constrained")
        for name, colour in colours.items():
            history = record[name]
            label = f"{name}, {history['parameters'] / 1e6:.2f}M"
            tokens, losses = zip(*history["train"], strict=True)
            left.plot(
                [t / 1e6 for t in tokens], losses, color=colour, alpha=0.35, lw=1, label=f"{label}: training text"
            )
            tokens, losses, _ = zip(*history["held_out"], strict=True)
            left.plot([t / 1e6 for t in tokens], losses, color=colour, lw=2, label=f"{label}: held-out packages")
            left.annotate(
                f"{losses[-1]:.2f}", (tokens[-1] / 1e6, losses[-1]), xytext=(4, 0), textcoords="offset points",
                color=colour, va="center",
            )  # fmt: skip
        first = record["draft"]["held_out"][0]
        left.set(
            xlabel="tokens seen (millions)", ylabel="cross-entropy (nats per token)", xscale="log",
            xlim=(first[0] / 1e6, None), ylim=(None, 1.05 * first[1]),
        )  # fmt: skip
        left.legend(frameon=False, fontsize=9, loc="upper right")
        tokens, _, agreement = zip(*record["draft"]["held_out"], strict=True)
        right.plot([t / 1e6 for t in tokens], [100 * a for a in agreement], color=colours["draft"], lw=2)
        right.set(xlabel="tokens seen by the draft (millions)", ylabel="held-out tokens (%)")
        right.set_title("the draft's greedy token is the target's", fontsize=10)
        for axes in (left, right):
            axes.grid(alpha=0.2)
        figure.savefig(path, dpi=130)
        plt.close(figure)


def packages_table(split: dict[str, Any], rows: int) -> str:
    """The largest packages as a table, the others in one sentence."""
    items = list(split["packages"].items())
    lines = ["| package | version | licence | files | kB |", "| --- | --- | --- | ---: | ---: |"]
    for name, row in items[:rows]:
        lines.append(f"| {name} | {row['version']} | {row['licence']} | {row['files']} | {row['bytes'] / 1000:,.0f} |")
    others = [f"{name} {row['version']} ({row['licence']})" for name, row in items[rows:]]
    if others:
        lines += ["", f"<details><summary>and {len(others)} smaller ones</summary>", "", ", ".join(others) + ".", ""]
        lines += ["</details>"]
    return "\n".join(lines)


def sizes_table(record: dict[str, Any]) -> str:
    """The two shapes and runs side by side."""
    names = ("target", "draft")
    rows: list[tuple[str, list[str]]] = [
        ("parameters", [f"{record[n]['parameters']:,}" for n in names]),
        ("hidden size, layers", [f"{s['hidden_size']}, {s['num_hidden_layers']}" for s in shapes(record)]),
        ("heads, KV heads", [f"{s['num_attention_heads']}, {s['num_key_value_heads']}" for s in shapes(record)]),
        ("SwiGLU width", [str(s["intermediate_size"]) for s in shapes(record)]),
        ("steps", [f"{record['recipe'][f'{n}_schedule']['steps']:,}" for n in names]),
        ("tokens seen", [f"{record[n]['tokens'] / 1e6:,.0f} M" for n in names]),
        ("training time", [f"{record[n]['seconds'] / 60:.1f} min" for n in names]),
        ("final training loss", [f"{record[n]['train'][-1][1]:.3f}" for n in names]),
        ("held-out loss", [f"{record['evaluation'][f'{n}_loss']:.3f}" for n in names]),
    ]
    lines = ["| | target | draft |", "| --- | ---: | ---: |"]
    return "\n".join(lines + [f"| {title} | {values[0]} | {values[1]} |" for title, values in rows])


def shapes(record: dict[str, Any]) -> list[dict[str, int]]:
    """The target's and the draft's shape."""
    return [record["recipe"]["target"], record["recipe"]["draft"]]


def samples(prompts: list[dict[str, Any]], completions: list[str]) -> str:
    """Prompts and what the target wrote after them."""
    parts = []
    for prompt, completion in list(zip(prompts, completions, strict=True))[:SAMPLES]:
        source = f"`{prompt['file']}` of {prompt['package']} {prompt['version']} ({prompt['licence']})"
        parts.append(f"{source}:\n\n```python\n{prompt['text']}\n# --- the target goes on ---{completion}\n```")
    return "\n\n".join(parts)


def card_text(record: dict[str, Any], prompts: list[dict[str, Any]]) -> str:
    """The card as Markdown."""
    data, result, where, recipe = (record[key] for key in ("data", "evaluation", "environment", "recipe"))
    train, held_out, own = data["train"], data["held_out"], result["own_text"]
    dropped = ", ".join(f"{reason} {count:,}" for reason, count in data["dropped_files"].items())
    chain = next(key for key in own if key.startswith("all_chain"))
    return f"""---
license: apache-2.0
language: code
library_name: transformers
pipeline_tag: text-generation
---

# {TITLE}

`target/` is a Llama of {record["target"]["parameters"] / 1e6:.2f}M parameters trained on Python source. `draft/` is a
Llama of {record["draft"]["parameters"] / 1e6:.2f}M that imitates it, to be used as its speculative draft model; the
tokenizer is in `target/`. They are here so that speculative decoding can be shown, tested and measured with weights
that mean something, on any machine and without a download.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("model_zoo/demo/target")
target = AutoModelForCausalLM.from_pretrained("model_zoo/demo/target", dtype="float32")
```

## Numbers

{sizes_table(record)}

Losses are nats per token; "held-out" is text of packages that neither model saw. The target's held-out loss is
{result["held_out_bits_per_byte"]:.3f} bits per byte. The held-out losses and the agreement are those of the bundled
bf16 weights, computed in float32.

| how often the draft's greedy token is the target's | tokens | agreement | chain of 4 |
| --- | ---: | ---: | ---: |
| held-out text | {held_out["tokens"]:,} | {result["held_out_agreement"]:.1%} | |
| text the target wrote greedily | {own["all_tokens"]:,} | {own["all_agreement"]:.1%} | {own[chain]:.2f} |
| the same, before it starts to repeat itself | {own["outside_loops_tokens"]:,} | {own["outside_loops_agreement"]:.1%} \
| {own[chain.replace("all", "outside_loops")]:.2f} |

*Chain of 4*: mean acceptance length (tokens per step, bonus included) that four drafted tokens per step reach on these
texts, computed from the agreement. The target wrote after {own["prompts"]} cuts of {own["prompt_tokens"]} tokens at
even distances in the held-out text. Most of what it writes greedily at such length is repetition; the last row is the
one to quote.

![losses](loss.png)

## Training

```
python -m model_zoo.demo.train
```

from the root of a checkout, seed {recipe["seed"]}: {record["seconds"] / 60:.1f} minutes in all on one
{where["device"]}, collecting the data and evaluating included, with Python {where["python"]},
torch {where["torch"]}, transformers {where["transformers"]}. A GPU adds in no fixed order, so a second run gives
slightly other weights; other installed packages give other data.

* Target: AdamW, peak learning rate {recipe["target_schedule"]["learning_rate"]}, cosine to zero, bf16 autocast,
  batches of {recipe["target_schedule"]["batch_size"]} random windows of {recipe["context"]} tokens.
* Draft: peak learning rate {recipe["draft_schedule"]["learning_rate"]}, loss {1 - recipe["text_weight"]:.0%} KL to the
  target's distribution and {recipe["text_weight"]:.0%} cross-entropy on the text. {recipe["written_share"]:.0%} of each
  batch is text of the target's own: {recipe["written_rows"]:,} pieces of training text of {recipe["written_prompt"]}
  tokens, each continued by {recipe["written_tokens"]}, half of them greedily, half sampled at temperature 1.

`training.json` holds the curves and everything this card says; `python -m model_zoo.demo.card` renders it again.

## Data

{train["bytes"] / 1e6:.1f} MB of Python in {train["files"]:,} files ({train["tokens"]:,} tokens) from
{len(train["packages"])} packages whose metadata name an MIT, BSD, Apache, PSF or similar licence (`corpus.py` lists
every accepted term); the standard library, "python" below, counts as PSF-2.0. Vendored code, whose licence may be
another, was left out. Dropped files, by reason: {dropped}.

{packages_table(train, 15)}

Held out, by package: {held_out["bytes"] / 1e6:.2f} MB in {held_out["files"]} files.

{packages_table(held_out, 15)}

**Tokenizer**: byte-level BPE of {recipe["vocab_size"]:,} entries learned from a quarter of the training files,
{held_out["bytes"] / held_out["tokens"]:.2f} bytes per token on held-out text. A line break and the indentation after
it are one token where they are common. `<|endoftext|>` (0) stands before each file and is bos and eos; `<|pad|>` (1) is
only padding. The tokenizer adds no bos by itself.

## What it writes

`prompts.json` has {len(prompts)} prompts cut from held-out packages, of the versions named with them, preferably such
that the target does not loop at once. Greedy completions of {SAMPLES} of them:

{samples(prompts, result["completions"])}

## Limits

It has the shape of Python and the idioms of the packages above, and no understanding: it calls functions that do not
exist, and greedily it soon repeats itself. Its context is {recipe["context"]} tokens. It may reproduce lines of its
training data. Held-out files are whole packages, but code travels between packages: a training file was dropped when a
third of its long lines stand in held-out files, and shorter quotations were not looked for. Use it to test decoding,
not to write code.

## Licence

The weights are under Apache-2.0. The prompts are quotations of their packages, under the licences named with them.
"""


def render_card(folder: Path) -> None:
    """Write loss.png and README.md from the folder's training.json and prompts.json."""
    record = json.loads((folder / "training.json").read_text())
    prompts = json.loads((folder / "prompts.json").read_text())
    draw_losses(record, folder / "loss.png")
    (folder / "README.md").write_text(card_text(record, prompts))


if __name__ == "__main__":
    render_card(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
