"""Draw the curves and write README.md, the model card: every number in it is a measured one.

training.json has the two models, heads.json, where it is, their draft heads.

python -m model_zoo.demo.card [folder]
"""

import json
import sys
from pathlib import Path
from typing import Any

SAMPLES = 4
TITLES = {"eagle3": "EAGLE-3", "medusa": "Medusa"}
DRAFTS = {
    "eagle3_tree": "EAGLE-3, dynamic tree: 59 nodes, 8 levels, top-k 10",
    "eagle3_chain": "EAGLE-3, chain of 8",
    "medusa_chain": "Medusa, chain",
}
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


def draw_heads(record: dict[str, Any], path: Path) -> None:
    """The heads' loss, agreement per draft token, and the acceptance length of a chain on held-out text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    with plt.rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, (left, middle, right) = plt.subplots(1, 3, figsize=(13, 4), layout="constrained")
        for name, colour in (("eagle3", "#2b6cb0"), ("medusa", "#dd6b20")):
            if name not in record:
                continue
            history = record[name]
            label = f"{TITLES[name]}, {history['parameters'] / 1e6:.2f}M"
            left.plot([p[0] for p in history["train"]], [p[1] for p in history["train"]], color=colour, lw=2, label=label)
            steps, lengths = zip(*history["scores"], strict=True)
            right.plot(steps, lengths, color=colour, lw=2, marker="o", ms=4, label=label)
            right.annotate(f"{lengths[-1]:.2f}", (steps[-1], lengths[-1]), xytext=(4, 0), textcoords="offset points",
                           color=colour, va="center")  # fmt: skip
            depths = len(history["train"][-1][2])
            for depth in range(depths):
                shares = [100 * p[2][depth] for p in history["train"]]
                middle.plot([p[0] for p in history["train"]], shares, color=colour, lw=1.2, alpha=1 - 0.8 * depth / depths)
        left.set(xlabel="steps", ylabel="loss (nats per token)")
        left.legend(frameon=False, fontsize=9)
        middle.set(xlabel="steps", ylabel="training tokens (%)")
        middle.set_title("each draft token is the target's (paler: deeper)", fontsize=10)
        right.set(xlabel="steps", ylabel="tokens per step", ylim=(1, None))
        right.set_title("a chain drafted on held-out text", fontsize=10)
        for axes in (left, middle, right):
            axes.grid(alpha=0.2)
        figure.savefig(path, dpi=110)
        plt.close(figure)


def acceptance_table(result: dict[str, Any]) -> str:
    """Acceptance lengths and acceptance per depth of every kind of draft."""
    lines = [
        "| draft | tokens per step | with loops | accepted at depth 1, 2, ... (%) |",
        "| --- | ---: | ---: | --- |",
    ]
    for key, title in DRAFTS.items():
        if f"{key}_all" in result:
            new, everything = result[f"{key}_outside_loops"], result[f"{key}_all"]
            rates = " ".join(f"{100 * rate:.0f}" for rate in new["per_depth"])
            lines.append(f"| {title} | {new['acceptance_length']:.2f} | {everything['acceptance_length']:.2f} | {rates} |")
    return "\n".join(lines)


def heads_text(record: dict[str, Any]) -> str:
    """The card's section on the draft heads."""
    result, recipe, where = (record[key] for key in ("evaluation", "recipe", "environment"))
    eagle3, train = record["eagle3"], record["data"]["train"]
    medusa = ""
    if "medusa" in record:
        medusa = f"""`medusa/` has {recipe["medusa_heads"]} Medusa heads of {recipe["medusa_layers"]} residual blocks,
{record["medusa"]["parameters"] / 1e6:.2f}M parameters in all, before the target's own lm_head. A Medusa head does not
see the tokens drafted before its own, and heads this small guess accordingly: they are here to be run, not for speed.
"""
    return f"""## Draft heads

`eagle3/` is an EAGLE-3 head of {eagle3["parameters"] / 1e6:.2f}M parameters (draft vocabulary
{recipe["draft_vocab_size"]:,} of 4,096, which covers {eagle3["draft_vocabulary_covers"]:.1%} of the training tokens;
SwiGLU width {recipe["intermediate_size"]}; it reads the outputs of layers 1, 3 and 4 and shares the target's embeddings).
{medusa}
{acceptance_table(result)}

Greedy decoding after {result["requests"]} cuts of {result["prompt_tokens"]} tokens of held-out packages,
{recipe["eval_new_tokens"]} tokens each. *Tokens per step* is the mean acceptance length, bonus included, over the steps
before the text repeats itself; *with loops* counts all steps. Drafted in plain PyTorch (`drafting.py`) with the bundled
bf16 weights in float32.

![heads](heads.png)

```
python -m model_zoo.demo.train_heads
```

EAGLE-3: training-time test of {recipe["unrolled_steps"]} steps weighted {recipe["decay"]}^i, soft cross-entropy to the
target's softmax restricted to the draft vocabulary, AdamW, peak learning rate {recipe["learning_rate"]}, clip 0.5, bf16
autocast; {eagle3["train"][-1][0]:,} steps, {eagle3["tokens"] / 1e6:,.0f} M tokens, {eagle3["seconds"] / 60:.1f} minutes
on one {where["device"]} with torch {where["torch"]} and transformers {where["transformers"]}. Each step takes
{recipe["text_batch"]} rows of {recipe["text_length"]} tokens of training text and {recipe["written_batch"]} rows of
{recipe["written_length"]} that the target wrote after cuts of it ({recipe["written_rows"]:,} rows,
{recipe["sampled_share"]:.0%} sampled at temperature 1, the others greedy; the cut itself and repetitions count
{recipe["prompt_weight"]}). The checkpoint was chosen by drafting chains on {recipe["eval_prompts"] // 2} other cuts of the
held-out text. The data are those of a machine like the target's: {train["files"]:,} files, {train["tokens"]:,} tokens,
split by package in the same way. `heads.json` has the curves.

"""


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


def card_text(record: dict[str, Any], prompts: list[dict[str, Any]], heads: dict[str, Any] | None = None) -> str:
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
that mean something, on any machine and without a download. [mla/](mla/README.md) is a smaller model apart from these,
with DeepSeek-V3's architecture.

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

{heads_text(heads) if heads else ""}## What it writes

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
    """Write the pictures and README.md from the folder's training.json, heads.json and prompts.json."""
    record = json.loads((folder / "training.json").read_text())
    prompts = json.loads((folder / "prompts.json").read_text())
    draw_losses(record, folder / "loss.png")
    heads = None
    if (folder / "heads.json").is_file():
        heads = json.loads((folder / "heads.json").read_text())
        draw_heads(heads, folder / "heads.png")
    (folder / "README.md").write_text(card_text(record, prompts, heads))


if __name__ == "__main__":
    render_card(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).parent)
