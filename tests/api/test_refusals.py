"""Every bad input: an error of four lines, nothing half done, and the model works as before."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.models import captured, model, tiny
from harness.text import char_tokenizer
from safetensors.torch import load_file, save_file
from transformers import T5Config, T5ForConditionalGeneration, TextStreamer

import autospec
from autospec import api, frontend
from autospec.errors import CapacityError, CaptureError, CheckpointError, OptionError
from autospec.loading import check_causal_lm, draft_layers, load_model

Refused = Callable[..., Exception]
PLAIN = {"do_sample": False, "pad_token_id": 0}
TOKENIZER = char_tokenizer()


class _Put:
    """A streamer that remembers whether it was ever called."""

    def __init__(self) -> None:
        self.calls = 0

    def put(self, value: torch.Tensor) -> None:
        self.calls += 1

    def end(self) -> None:
        self.calls += 1


# name -> (kind, prompt, options, part of the message)
CALLS: dict[str, tuple[type[Exception], Any, dict[str, Any], str]] = {
    "unknown option": (OptionError, [[1]], {"max_new_token": 5}, "did you mean 'max_new_tokens'?"),
    "unsupported option": (OptionError, [[1]], {"num_beams": 4}, "generate does not support num_beams (got 4)"),
    "unsupported list": (OptionError, [[1]], {"bad_words_ids": [[3]]}, "generate does not support bad_words_ids"),
    "unsupported processor": (OptionError, [[1]], {"logits_processor": [print]}, "does not support logits_processor"),
    "unknown field": (OptionError, [[1]], {"generation_config": {"top_kk": 3}}, "did you mean 'top_k'?"),
    "wrong config": (OptionError, [[1]], {"generation_config": 7}, "must be a GenerationConfig, got int"),
    "no prompt": (OptionError, None, {}, "generate needs input_ids"),
    "no rows": (CapacityError, torch.zeros(0, 4, dtype=torch.int64), {}, "the prompt is empty"),
    "empty list": (CapacityError, [], {}, "the prompt is empty"),
    "floats": (OptionError, torch.ones(1, 4), {}, "got torch.float32"),
    "booleans": (OptionError, torch.ones(1, 4, dtype=torch.bool), {}, "got torch.bool"),
    "three axes": (OptionError, torch.ones(1, 4, 2, dtype=torch.int64), {}, "of shape (1, 4, 2)"),
    "text": (OptionError, "hello", {}, "generate takes token ids, not text"),
    "texts": (OptionError, [["hello"]], {}, "holds 'hello', which is no token id"),
    "ragged list with a mask": (OptionError, [[1], [2, 3]], {"attention_mask": [[1], [1, 1]]}, "no rectangular array"),
    "empty prompt": (CapacityError, [[5], []], {}, "the prompt of row 1 is empty"),
    "empty tensor": (CapacityError, torch.zeros(2, 0, dtype=torch.int64), {}, "the prompt is empty"),
    "masked prompt": (CapacityError, [[5, 6]], {"attention_mask": [[0, 0]]}, "the prompt of row 0 is empty"),
    "wrong mask": (OptionError, [[5, 6]], {"attention_mask": [[1]]}, "attention_mask has shape (1, 1)"),
    "hole": (OptionError, [[5] * 4] * 2, {"attention_mask": [[1] * 4, [1, 0, 1, 1]]}, "holes inside the prompt of row"),
    "hole after padding": (OptionError, [[5] * 5], {"attention_mask": [[0, 1, 0, 1, 0]]}, "holes inside the prompt"),
    "token too large": (OptionError, [[5], [64]], {}, "token id 64 is outside the vocabulary of 64"),
    "token negative": (OptionError, [[5, -2]], {}, "token id -2 is outside the vocabulary of 64"),
    "beyond the positions": (CapacityError, [[5] * 250], {"max_new_tokens": 7}, "the model has 256 positions"),
    "prompt beyond the positions": (CapacityError, [[5] * 300], {}, "300 prompt tokens and 1 new ones"),
    "max_length too small": (OptionError, [[5] * 9], {"max_length": 9, "max_new_tokens": None}, "max_length is 9, but"),
    "no new tokens": (OptionError, [[5]], {"max_new_tokens": 0}, "max_new_tokens must be an integer of at least 1"),
    "half a token": (OptionError, [[5]], {"max_new_tokens": 2.5}, "max_new_tokens must be an integer"),
    "temperature 0": (OptionError, [[5]], {"do_sample": True, "temperature": 0.0}, "temperature must be above 0"),
    "temperature in words": (OptionError, [[5]], {"do_sample": True, "temperature": "hot"}, "a number, got 'hot'"),
    "endless temperature": (OptionError, [[5]], {"do_sample": True, "temperature": float("inf")}, "between 1e-30 and 1e+30"),
    "scores that overflow": (OptionError, [[5]], {"do_sample": True, "temperature": 1e-45}, "between 1e-30 and 1e+30"),
    "penalty that overflows": (OptionError, [[5]], {"repetition_penalty": float("inf")}, "between 0.001 and 1000"),
    "top_p": (OptionError, [[5]], {"do_sample": True, "top_p": 1.5}, "top_p must be above 0 and at most 1"),
    "top_k": (OptionError, [[5]], {"do_sample": True, "top_k": -1}, "top_k must be an integer of at least 0"),
    "min_p": (OptionError, [[5]], {"do_sample": True, "min_p": 2}, "min_p must be between 0 and 1"),
    "penalty": (OptionError, [[5]], {"repetition_penalty": 0.0}, "repetition_penalty must be between 0.001 and 1000"),
    "greedy copies": (OptionError, [[5]], {"num_return_sequences": 2, "do_sample": False}, "needs do_sample=True"),
    "no copies": (OptionError, [[5]], {"num_return_sequences": 0}, "num_return_sequences must be an integer"),
    "seed": (OptionError, [[5]], {"seed": "x"}, "seed must be an integer"),
    "sampling in words": (OptionError, [[5]], {"do_sample": "no"}, "do_sample must be True or False, got 'no'"),
    "half an eos": (OptionError, [[5]], {"eos_token_id": 1.7}, "eos_token_id must be an id"),
    "an eos beyond any id": (OptionError, [[5]], {"eos_token_id": 2**70}, "eos_token_id must be an id"),
    "an id beyond any id": (OptionError, [[2**70]], {}, "is no token id"),
    "a mapping of something else": (OptionError, {"a": 1}, {}, "the mapping holds no input_ids"),
    "an additive mask": (OptionError, [[5, 6]], {"attention_mask": [[-1e9, 0.0]]}, "0 for padding and 1 for tokens"),
    "stop strings of numbers": (OptionError, [[5]], {"stop_strings": 5, "tokenizer": TOKENIZER}, "non-empty strings"),
    "no tokenizer": (OptionError, [[5]], {"stop_strings": "x", "tokenizer": 3}, "stop_strings needs the tokenizer"),
    "no streamer": (OptionError, [[5]], {"streamer": 5}, "a streamer needs put and end"),
    "two prompts": (OptionError, [[5]], {"inputs": [[6]]}, "both input_ids and inputs"),
    "eos in words": (OptionError, [[5]], {"eos_token_id": "end"}, "eos_token_id must be an id"),
    "many eos ids": (OptionError, [[5]], {"eos_token_id": list(range(9))}, "9 eos ids were given, at most 8"),
    "stop strings alone": (OptionError, [[5]], {"stop_strings": "x"}, "stop_strings needs the tokenizer"),
    "empty stop string": (OptionError, [[5]], {"stop_strings": ["a", ""], "tokenizer": TOKENIZER}, "non-empty strings"),
    "a streamer for two": (OptionError, [[5], [6]], {"streamer": TextStreamer(TOKENIZER)}, "a streamer takes one row"),
    "a streamer for copies": (
        OptionError, [[5]], {"streamer": TextStreamer(TOKENIZER), "do_sample": True, "num_return_sequences": 2},
        "a streamer takes one row",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_bad_calls_of_generate(optimized: Any, refused: Refused, case: str) -> None:
    kind, prompt, options, message = CALLS[case]
    fast = optimized("ngram")
    before = fast.generate([[7, 8, 9]], max_new_tokens=6, **PLAIN)
    sessions, metrics = dict(fast._sessions), fast.metrics
    state = {name: tensor.clone() for name, tensor in fast.session.state.items()}
    assert message in str(refused(kind, lambda: fast.generate(prompt, **options)))
    assert dict(fast._sessions) == sessions
    assert fast.metrics is metrics
    assert all(torch.equal(tensor, state[name]) for name, tensor in fast.session.state.items())
    assert torch.equal(fast.generate([[7, 8, 9]], max_new_tokens=6, **PLAIN), before)


def test_a_cache_that_is_too_small(optimized: Any, refused: Refused) -> None:
    fast, streamer = optimized("ngram", max_length=20), _Put()
    call = lambda: fast.generate([[5] * 15], max_new_tokens=6, streamer=streamer)  # noqa: E731
    assert "a request needs 21 tokens, the cache was limited to 20" in str(refused(CapacityError, call))
    assert streamer.calls == 0
    assert fast.generate([[5] * 15], max_new_tokens=5, **PLAIN).shape == (1, 20)


def test_a_machine_that_is_too_small(optimized: Any, refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized("plain")
    expected = fast.generate([[5], [6], [7], [8]], max_new_tokens=6, **PLAIN)
    one_row = api.state_bytes(fast.target, None, fast._shape(1, 7, False))
    monkeypatch.setattr(api, "_free_bytes", lambda device: one_row * 5)
    assert torch.equal(fast.generate([[5], [6], [7], [8]], max_new_tokens=6, **PLAIN), expected), "fewer rows at once"
    monkeypatch.setattr(api, "_free_bytes", lambda device: one_row - 1)
    fast._sessions.clear()
    assert "MB are free" in str(refused(CapacityError, lambda: fast.generate([[5]], max_new_tokens=6)))


def test_a_cache_that_is_there_already_is_not_charged_again(optimized: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fast = optimized("plain", page_size=7)
    first = fast.generate([[5, 6]], max_new_tokens=6, **PLAIN)
    monkeypatch.setattr(api, "_free_bytes", lambda device: 1)
    assert torch.equal(fast.generate([[5, 6]], max_new_tokens=6, **PLAIN), first)
    (old,) = fast._sessions
    monkeypatch.setattr(api, "_free_bytes", lambda device: 10**12 if old not in fast._sessions else 1)
    fast.generate([[5] * 150], max_new_tokens=6, **PLAIN)
    assert old not in fast._sessions, "the caches of other shapes make room"


def test_explain_keeps_to_the_limits(optimized: Any) -> None:
    fast = optimized("plain", max_length=24)
    assert fast.program.shape.max_length == 24
    assert "rows of 24 tokens" in fast.explain()


def test_optimize_leaves_threads_and_training_flags_alone() -> None:
    threads = torch.get_num_threads()
    module = model("target")
    assert threads == 1
    autospec.optimize(module, None, compile="eager")
    assert torch.get_num_threads() == threads
    part = next(part for name, part in module.named_modules() if name.endswith("mlp"))
    part.train()
    try:
        with pytest.raises(autospec.CaptureError, match="training mode"):
            autospec.optimize(module, None, compile="eager")
        assert part.training
    finally:
        part.eval()


def test_without_a_seed_sampling_follows_torch(optimized: Any) -> None:
    fast, options = optimized("ngram"), {"do_sample": True, "max_new_tokens": 12, "pad_token_id": 0}
    torch.manual_seed(1)
    first, second = fast.generate([[5, 6]], **options), fast.generate([[5, 6]], **options)
    assert not torch.equal(first, second)
    torch.manual_seed(1)
    assert torch.equal(fast.generate([[5, 6]], **options), first)


# name -> (kind, arguments of optimize, part of the message)
ARGUMENTS: dict[str, tuple[type[Exception], dict[str, Any], str]] = {
    "compile": (OptionError, {"compile": "tvm"}, "compile must be 'inductor' or 'eager', got 'tvm'"),
    "speculation": (OptionError, {"speculation": "ngrm"}, "did you mean 'ngram'?"),
    "speculation type": (OptionError, {"speculation": 3}, "a configuration, got int"),
    "max_batch_size": (OptionError, {"max_batch_size": 0}, "max_batch_size must be a positive integer, got 0"),
    "max_length": (OptionError, {"max_length": True}, "max_length must be a positive integer, got True"),
    "page_size": (OptionError, {"page_size": 1.5}, "page_size must be a positive integer, got 1.5"),
    "batch_buckets": (OptionError, {"batch_buckets": (16, 0)}, "batch_buckets must be positive integers, got (16, 0)"),
    "batch_buckets type": (OptionError, {"batch_buckets": 16}, "batch_buckets must be positive integers, got 16"),
    "positions": (CapacityError, {"max_length": 257}, "max_length is 257, but the model has 256 positions"),
    "unknown pass": (OptionError, {"passes": ["-fuse-linear"]}, "did you mean '-fuse-linears'?"),
    "pass without minus": (OptionError, {"passes": "fold-noops"}, "write '-fold-noops' to leave it out"),
    "required pass": (OptionError, {"passes": ["-page-kv-cache"]}, "page-kv-cache cannot be left out"),
    "passes type": (OptionError, {"passes": 3}, "got int"),
}  # fmt: skip


@pytest.mark.parametrize("case", ARGUMENTS)
def test_bad_arguments_of_optimize(refused: Refused, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    kind, arguments, message = ARGUMENTS[case]
    monkeypatch.setattr(frontend, "capture_model", lambda module, name="target": captured("target"))
    options = {"compile": "eager", **arguments}
    assert message in str(refused(kind, lambda: autospec.optimize(model("target"), **options)))


def _configs() -> dict[str, tuple[Callable[[], Any], str]]:
    ngram, draft, auto = autospec.NGramConfig, autospec.DraftTargetConfig, autospec.AutoConfig
    return {
        "typo": (lambda: ngram(max_draft_length=3), "did you mean 'max_draft_len'?"),
        "surplus": (lambda: ngram(1, 2, False, 4), "NGramConfig takes at most 3 options without a name, got 4"),
        "no drafts": (lambda: ngram(0), "max_draft_len must be a positive integer, got 0"),
        "half a draft": (lambda: ngram(1.5), "max_draft_len must be a positive integer, got 1.5"),
        "n-gram of one": (lambda: ngram(4, 1), "max_matching_ngram_size must be at least 2"),
        "auto n-gram of one": (lambda: auto(max_matching_ngram_size=1), "max_matching_ngram_size must be at least 2"),
        "no plain step": (lambda: auto((2, 4)), "with 0 among them"),
        "unsorted": (lambda: auto((0, 4, 2)), "draft_lens must be a tuple of integers"),
        "no lengths": (lambda: auto(("a", 0)), "draft_lens must be a tuple of integers"),
        "no draft": (lambda: draft(None), "DraftTargetConfig needs a draft"),
        "no layers": (lambda: draft("x", num_draft_layers=0), "num_draft_layers must be a positive integer, got 0"),
        "draft typo": (lambda: draft("x", max_draft_ln=3), "did you mean 'max_draft_len'?"),
    }


@pytest.mark.parametrize("case", _configs())
def test_bad_configurations(refused: Refused, case: str) -> None:
    make, message = _configs()[case]
    assert message in str(refused(OptionError, make))


def test_an_encoder_decoder_model(refused: Refused) -> None:
    config = T5Config(d_model=16, d_kv=8, d_ff=16, num_layers=1, num_heads=2, vocab_size=32, decoder_start_token_id=0)
    t5 = T5ForConditionalGeneration(config).eval()
    assert "an encoder-decoder model" in str(refused(CaptureError, lambda: autospec.optimize(t5, compile="eager")))


def test_what_is_no_language_model(refused: Refused) -> None:
    linear = torch.nn.Linear(2, 2).eval()
    assert "not a Hugging Face causal LM" in str(refused(CaptureError, lambda: autospec.optimize(linear)))
    assert "must be a loaded module or a path" in str(refused(OptionError, lambda: autospec.optimize(5)))


def test_a_model_in_training_mode(refused: Refused) -> None:
    training = tiny("llama").train()
    assert "training mode" in str(refused(CaptureError, lambda: autospec.optimize(training, compile="eager")))
    assert training.training, "the model is left as it was found"


def test_a_model_that_mixes_tokens_outside_attention() -> None:
    """The split-invariance probe: each token sees the mean of the embeddings so far."""
    mixing = tiny("llama", seed=4)
    embed = mixing.model.embed_tokens
    embed.register_forward_hook(lambda module, args, out: out + out.cumsum(1) * 0.1)
    before = dict(mixing.config.to_dict())
    with pytest.raises(CaptureError) as caught:
        autospec.optimize(mixing, compile="eager")
    assert caught.value.where == "LlamaForCausalLM"
    assert caught.value.help
    assert mixing.config.to_dict() == before, "the configuration is left as it was found"
    assert mixing.config._attn_implementation != "autospec"


def test_a_draft_of_another_vocabulary(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frontend, "capture_model", lambda module, name="target": captured("target"))
    other = tiny("llama", vocab_size=65)
    call = lambda: autospec.optimize(model("target"), autospec.DraftTargetConfig(other), compile="eager")  # noqa: E731
    assert "the draft model has a vocabulary of 65, the target of 64" in str(refused(OptionError, call))


def test_too_many_draft_layers(refused: Refused) -> None:
    with draft_layers(model("small"), 1):
        pass

    def enter() -> None:
        with draft_layers(model("small"), 2):
            raise AssertionError("two layers were accepted")

    assert "num_draft_layers is 2, but the draft has 1 layers" in str(refused(OptionError, enter))


def test_a_truncated_draft_is_put_together_again() -> None:
    """Only the outermost list of layers is cut: a list of as many experts inside a layer stays."""
    draft = tiny("llama", num_hidden_layers=3)
    for layer in draft.model.layers:
        layer.experts = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(3)])
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        before = draft(ids).logits

    def fail_inside() -> None:
        with draft_layers(draft, 2):
            assert len(draft.model.layers) == draft.config.num_hidden_layers == 2
            assert len(draft.model.layers[0].experts) == 3
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert len(draft.model.layers) == draft.config.num_hidden_layers == 3
    with torch.no_grad():
        assert torch.equal(draft(ids).logits, before)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint in two or more shards."""
    path = tmp_path_factory.mktemp("checkpoint")
    model("target").save_pretrained(path, max_shard_size="20KB")
    assert len(list(path.glob("*.safetensors"))) > 1
    return path


def _copy(source: Path, target: Path) -> Path:
    target.mkdir()
    for file in source.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def test_a_checkpoint_that_is_whole(saved: Path) -> None:
    loaded = load_model(str(saved), "model")
    check_causal_lm(loaded)
    ids = torch.tensor([[1, 2, 3]])
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model("target")(ids).logits)
    assert not loaded.training


def test_broken_checkpoints(saved: Path, tmp_path: Path, refused: Refused) -> None:
    """Cut in half, a shard missing, a tensor missing, a tensor of another shape, noise, no configuration."""

    def message(path: Path) -> str:
        return str(refused(CheckpointError, lambda: load_model(path, "model")))

    half = _copy(saved, tmp_path / "half")
    shard = sorted(half.glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes()[: shard.stat().st_size // 2])
    assert "the checkpoint cannot be loaded" in message(half)

    gone = _copy(saved, tmp_path / "gone")
    sorted(gone.glob("*.safetensors"))[0].unlink()
    assert "the checkpoint cannot be loaded" in message(gone)

    lacking = _copy(saved, tmp_path / "lacking")
    shard = sorted(lacking.glob("*.safetensors"))[0]
    tensors = load_file(shard)
    name = sorted(tensors)[0]
    save_file({key: tensor for key, tensor in tensors.items() if key != name}, shard, {"format": "pt"})
    index = lacking / "model.safetensors.index.json"
    entries = json.loads(index.read_text())
    del entries["weight_map"][name]
    index.write_text(json.dumps(entries))
    assert "the checkpoint lacks 1 tensors" in message(lacking)
    assert name in message(lacking)

    shaped = _copy(saved, tmp_path / "shaped")
    shard = sorted(shaped.glob("*.safetensors"))[0]
    save_file({**tensors, name: torch.zeros(3, 3)}, shard, {"format": "pt"})
    assert "cannot be loaded" in message(shaped) or "of the wrong shape" in message(shaped)

    noise = _copy(saved, tmp_path / "noise")
    sorted(noise.glob("*.safetensors"))[0].write_bytes(b"not a checkpoint")
    assert "the checkpoint cannot be loaded" in message(noise)

    bare = _copy(saved, tmp_path / "bare")
    (bare / "config.json").unlink()
    assert "the folder has no config.json" in message(bare)

    corrupt = _copy(saved, tmp_path / "corrupt")
    (corrupt / "config.json").write_text("{")
    assert "the checkpoint cannot be loaded" in message(corrupt)


def test_a_draft_is_loaded_in_the_targets_dtype(saved: Path) -> None:
    target = tiny("llama").to(torch.bfloat16)
    assert next(load_model(saved, "speculative_model", like=target).parameters()).dtype == torch.bfloat16
