"""The recipe of the demo models: shapes, schedules and sizes, and a tiny one for a CPU."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Shape:
    """What distinguishes the two Llamas."""

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """One training run: AdamW, linear warm-up, then a cosine to zero."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup: int
    eval_every: int


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """Everything that decides what comes out, besides the installed packages."""

    seed: int = 0
    vocab_size: int = 4096
    context: int = 1024
    max_files: int | None = None  # per split; None: all
    target: Shape = Shape(
        hidden_size=256, intermediate_size=704, num_hidden_layers=8, num_attention_heads=8, num_key_value_heads=2
    )
    draft: Shape = Shape(
        hidden_size=128, intermediate_size=416, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    target_schedule: Schedule = Schedule(steps=12500, batch_size=128, learning_rate=3e-3, warmup=300, eval_every=250)
    draft_schedule: Schedule = Schedule(steps=5000, batch_size=128, learning_rate=4e-3, warmup=200, eval_every=250)
    written_rows: int = 16384  # rows the target writes, half greedily, half sampled at temperature 1
    written_batch: int = 4096
    written_prompt: int = 128  # tokens of training text that open such a row
    written_tokens: int = 256  # tokens the target adds
    written_share: float = 0.5  # of a draft batch
    text_weight: float = 0.1  # of the text's cross-entropy in the draft's loss; the rest is KL to the target
    eval_prompts: int = 256


SMOKE = Recipe(
    vocab_size=1024,
    context=128,
    max_files=40,
    target=Shape(
        hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    draft=Shape(
        hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=1
    ),
    target_schedule=Schedule(steps=40, batch_size=8, learning_rate=3e-3, warmup=5, eval_every=20),
    draft_schedule=Schedule(steps=40, batch_size=8, learning_rate=3e-3, warmup=5, eval_every=20),
    written_rows=16,
    written_batch=8,
    written_prompt=32,
    written_tokens=64,
    eval_prompts=4,
)


@dataclass(frozen=True, kw_only=True)
class HeadsRecipe:
    """Everything that decides the draft heads, besides the target and the installed packages."""

    seed: int = 0
    max_files: int | None = None
    # EAGLE-3
    draft_vocab_size: int = 3072
    intermediate_size: int = 1024
    num_kv_heads: int = 8
    unrolled_steps: int = 8
    decay: float = 0.8
    learning_rate: float = 3e-3
    steps: int = 3741
    # Medusa: the blocks alone, before the target's own lm_head
    medusa_heads: int = 4
    medusa_layers: int = 2
    medusa_steps: int = 1179
    # Data: each batch has rows of training text and rows that the target wrote after a cut of training text
    text_length: int = 1024
    text_rows: int = 5000
    text_batch: int = 4
    written_length: int = 160
    written_prompts: tuple[int, ...] = (32, 48, 64, 64, 96)  # tokens of the cut; the target fills the row
    written_rows: int = 90_000
    written_batch: int = 224
    generate_batch: int = 9000
    sampled_share: float = 0.2  # of the written rows: at temperature 1, the others greedily
    prompt_weight: float = 0.25  # of the cut, and of what repeats itself
    eval_every: int = 500
    # Evaluation: the target continues cuts of held-out text, greedily
    eval_prompts: int = 256
    eval_prompt_tokens: int = 64
    eval_new_tokens: int = 128


HEADS_SMOKE = HeadsRecipe(
    max_files=60,
    draft_vocab_size=1024,
    intermediate_size=256,
    num_kv_heads=2,
    steps=12,
    medusa_steps=6,
    text_length=128,
    text_rows=32,
    text_batch=2,
    written_length=64,
    written_prompts=(16, 24),
    written_rows=32,
    written_batch=4,
    generate_batch=16,
    eval_every=6,
    eval_prompts=6,
    eval_prompt_tokens=32,
    eval_new_tokens=32,
)
