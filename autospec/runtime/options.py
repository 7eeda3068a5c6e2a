"""The options of generate: transformers' names, priorities and defaults; what is not supported is refused by name."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from autospec.errors import OptionError, unknown_option
from autospec.runtime.request import SamplingParams

# What transformers fills in where neither the user nor the checkpoint says anything.
_DEFAULTS: dict[str, Any] = {
    "do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, "min_p": None, "repetition_penalty": 1.0,
    "num_return_sequences": 1, "eos_token_id": None, "pad_token_id": None, "stop_strings": None, "max_new_tokens": None,
    "max_length": None,
}  # fmt: skip
_DEFAULT_NEW_TOKENS = 20
# What a keyword of None means, where it is not None.
_OFF = {
    "do_sample": False, "temperature": 1.0, "top_k": 0, "top_p": 1.0, "repetition_penalty": 1.0,
    "num_return_sequences": 1, "seed": 0,
}  # fmt: skip
# Options of ours that transformers does not have, or passes beside its configuration.
_EXTRA = {"seed": None, "tokenizer": None}
# Options without an effect on the tokens, or that describe what autospec does anyway.
_IGNORED = {
    "use_cache", "cache_implementation", "cache_config", "max_cache_len", "bos_token_id", "decoder_start_token_id",
    "transformers_version", "compile_config", "disable_compile", "early_stopping", "length_penalty", "is_assistant",
    "num_assistant_tokens", "num_assistant_tokens_schedule", "assistant_confidence_threshold", "assistant_lookbehind",
    "target_lookbehind", "assistant_early_exit", "max_matching_ngram_size", "assistant_ensemble_weight",
    "speculation_type", "continuous_batching_config", "prefill_chunk_size", "low_memory", "_from_model_config",
    "use_model_defaults", "use_mtp",
}  # fmt: skip
# Everything else that transformers knows, with the values at which it changes nothing.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "min_length": (0,), "min_new_tokens": (0,), "max_time": (), "num_beams": (1,), "num_beam_groups": (1,),
    "diversity_penalty": (0.0,), "top_h": (), "typical_p": (1.0,), "epsilon_cutoff": (0.0,), "eta_cutoff": (0.0,),
    "encoder_repetition_penalty": (1.0,), "no_repeat_ngram_size": (0,), "encoder_no_repeat_ngram_size": (0,),
    "bad_words_ids": (), "renormalize_logits": (False,), "forced_bos_token_id": (), "forced_eos_token_id": (),
    "remove_invalid_values": (False,), "exponential_decay_length_penalty": (), "suppress_tokens": (),
    "begin_suppress_tokens": (), "sequence_bias": (), "token_healing": (False,), "guidance_scale": (1.0,),
    "watermarking_config": (), "output_attentions": (False,), "output_hidden_states": (False,),
    "output_scores": (False,), "output_logits": (False,), "return_dict_in_generate": (False,),
    "prompt_lookup_num_tokens": (), "penalty_alpha": (), "dola_layers": (), "constraints": (), "force_words_ids": (),
    "logits_processor": (), "stopping_criteria": (), "prefix_allowed_tokens_fn": (), "assistant_model": (),
    "assistant_tokenizer": (), "synced_gpus": (False,), "negative_prompt_ids": (), "custom_generate": (),
    "inputs_embeds": (), "past_key_values": (), "position_ids": (), "token_type_ids": (), "head_mask": (),
}  # fmt: skip


_KNOWN = {*_DEFAULTS, *_EXTRA, *_IGNORED, *_NEUTRAL}


@dataclass(frozen=True)
class GenerateOptions:
    """What one call of generate asks for, checked."""

    max_new_tokens: int | None  # None: max_length decides
    max_length: int | None
    eos_ids: tuple[int, ...]
    pad_id: int
    sampling: SamplingParams
    seed: int
    num_return_sequences: int
    stop_strings: str | Sequence[str] | None
    tokenizer: Any

    def new_tokens(self, prompt_columns: int, max_positions: int) -> int:
        """How many tokens each row may emit, given the width of the padded prompt."""
        if self.max_new_tokens is not None:
            return self.max_new_tokens
        if self.max_length is None:
            return max(1, min(_DEFAULT_NEW_TOKENS, max_positions - prompt_columns))
        if self.max_length <= prompt_columns:
            raise OptionError(
                f"max_length is {self.max_length}, but the prompt alone has {prompt_columns} tokens",
                at=f"max_length={self.max_length}", where="generate", help="set max_new_tokens instead",
            )  # fmt: skip
        return self.max_length - prompt_columns


def parse(given: Mapping[str, Any], config: Mapping[str, Any] | None, defaults: Mapping[str, Any]) -> GenerateOptions:
    """Merge options by transformers' priority: keywords, then the given configuration, then the checkpoint's.

    Args:
        given: keyword arguments of generate.
        config: the generation_config argument as a dictionary.
        defaults: the checkpoint's generation config as a dictionary.
    """
    check_names("generate", given)
    merged: dict[str, Any] = {**_DEFAULTS, **_EXTRA}
    for layer in (defaults, config or {}):
        merged |= {name: value for name, value in layer.items() if value is not None}
    # A keyword of None switches an option off, as in transformers; in a configuration it means "not said".
    merged |= {name: _OFF.get(name) if value is None else value for name, value in given.items()}
    for name, neutral in _NEUTRAL.items():
        value = merged.get(name)
        if value is not None and value not in neutral and not (isinstance(value, (list, tuple)) and not value):
            raise OptionError(
                f"generate does not support {name} (got {value!r:.60})", at=f"{name}={value!r:.60}", where="generate",
                help=f"leave {name} out, or use transformers' own generate for it",
            )  # fmt: skip
    eos_ids = _ids(merged["eos_token_id"])
    pad_id = _integer(merged, "pad_token_id", None)
    copies = _integer(merged, "num_return_sequences", 1)
    assert copies is not None
    if copies > 1 and not merged["do_sample"]:
        raise OptionError("num_return_sequences above 1 needs do_sample=True: greedy sequences would all be the same",
                          at=f"num_return_sequences={copies}", where="generate",
                          help="set do_sample=True, or ask for one sequence")  # fmt: skip
    return GenerateOptions(
        max_new_tokens=_integer(merged, "max_new_tokens", 1), max_length=_integer(merged, "max_length", 1),
        eos_ids=eos_ids, pad_id=pad_id if pad_id is not None else (eos_ids[0] if eos_ids else 0),
        sampling=_sampling(merged), seed=_seed(merged), num_return_sequences=copies,
        stop_strings=merged["stop_strings"], tokenizer=merged["tokenizer"],
    )  # fmt: skip


def _seed(merged: Mapping[str, Any]) -> int:
    """The given seed; without one, sampling draws it from torch's generator, as transformers' sampling does."""
    seed = _integer(merged, "seed", None)
    if seed is None:
        seed = int(torch.randint(2**62, (1,))) if merged["do_sample"] is True else 0
    return seed


def check_names(where: str, given: Iterable[str]) -> None:
    """A name that neither transformers nor autospec knows is an error."""
    for name in given:
        if name not in _KNOWN:
            raise unknown_option(where, name, {*_DEFAULTS, *_EXTRA, *_NEUTRAL, "streamer", "generation_config"})


def _integer(merged: Mapping[str, Any], name: str, least: int | None) -> int | None:
    value = merged[name]
    if value is None:
        return None
    if isinstance(value, bool) or not hasattr(value, "__index__") or (least is not None and value < least):
        what = "an integer" if least is None else f"an integer of at least {least}"
        raise OptionError(f"{name} must be {what}, got {value!r:.40}", at=f"{name}={value!r:.40}", where="generate",
                          help=f"leave {name} out to keep its default")  # fmt: skip
    return operator.index(value)


def _number(merged: Mapping[str, Any], name: str) -> float:
    value = merged[name]
    try:
        if isinstance(value, (str, bool)):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise OptionError(f"{name} must be a number, got {value!r:.40}", at=f"{name}={value!r:.40}", where="generate",
                          help=f"leave {name} out to keep its default") from None  # fmt: skip


def _ids(value: Any) -> tuple[int, ...]:
    if value is None:
        return ()
    found: Iterable[Any] = value if isinstance(value, (list, tuple)) else [value]
    if hasattr(value, "tolist"):
        listed = value.tolist()
        found = listed if isinstance(listed, list) else [listed]
    try:
        listed = [operator.index(token) for token in found]
        if any(isinstance(token, bool) or token >= 2**31 for token in found):
            raise ValueError
        # Some checkpoints write -1 for "none".
        return tuple(dict.fromkeys(token for token in listed if token >= 0))
    except (TypeError, ValueError):
        raise OptionError(f"eos_token_id must be an id or a list of ids, got {value!r:.60}",
                          at=f"eos_token_id={value!r:.60}", where="generate",
                          help="for example eos_token_id=2") from None  # fmt: skip


def _sampling(merged: Mapping[str, Any]) -> SamplingParams:
    if not isinstance(merged["do_sample"], bool):
        raise OptionError(f"do_sample must be True or False, got {merged['do_sample']!r:.40}",
                          at=f"do_sample={merged['do_sample']!r:.40}", where="generate",
                          help="do_sample=False decodes greedily")  # fmt: skip
    penalty = _number(merged, "repetition_penalty")
    if not merged["do_sample"]:
        return SamplingParams(repetition_penalty=penalty)
    temperature = _number(merged, "temperature")
    if temperature <= 0:
        raise OptionError(
            f"temperature must be above 0 when do_sample=True, got {merged['temperature']}",
            at=f"temperature={merged['temperature']}", where="generate", help="greedy decoding is do_sample=False",
        )  # fmt: skip
    min_p = 0.0 if merged["min_p"] is None else _number(merged, "min_p")
    return SamplingParams(temperature, min(_integer(merged, "top_k", 0) or 0, 2**31 - 1), _number(merged, "top_p"), min_p, penalty)


def fields_of(generation_config: Any) -> Mapping[str, Any] | None:
    """The fields of a generation config; unknown ones are refused in a dictionary, checkpoints may carry them."""
    if generation_config is None:
        return None
    if isinstance(generation_config, Mapping):
        check_names("generation_config", generation_config)
        return generation_config
    if not hasattr(generation_config, "to_dict"):
        raise OptionError(f"generation_config must be a GenerationConfig, got {type(generation_config).__name__}",
                          at=f"generation_config={generation_config!r:.60}", where="generate",
                          help="pass transformers' GenerationConfig or a dictionary of its fields")  # fmt: skip
    fields: Mapping[str, Any] = generation_config.to_dict()
    return fields
