"""Facts about draft-head checkpoints: how each layout is recognised, names its tensors and counts its taps.

Three layouts of EAGLE-3 and one of Medusa. They differ in names and in what the configuration calls things, not in the
network: the flags below change it, and every layout may carry every flag.

Taps. A config names target layers; readers disagree on what a number means. Ids inside `eagle_config` count outputs (id j
is the output of 0-based layer j: SpecForge, SGLang, TensorRT-LLM); ids at the top level count inputs (id j is the input
of layer j, so the output of layer j - 1, and 0 is the embedding: speculators, vLLM). SafeAILab names none: its target
collects the inputs of layers 2, L // 2 and L - 3. Converted checkpoints copied ids from one convention into the other
without shifting them, so the convention is an assumption that the loader reports and `agreement` can check.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class TapNaming:
    """Where a configuration names its taps.

    Args:
        path: keys from the root of config.json.
        shift: what is added to an id to get the 0-based layer whose output is read.
        counts: the convention, in words.
    """

    path: tuple[str, ...]
    shift: int
    counts: str


@dataclass(frozen=True, kw_only=True)
class HeadLayout:
    """One way of writing a draft head.

    Args:
        name: what the loader calls it, and `save_head` takes.
        recognised: how a file of it is told from the others.
        weights: names of weight files, in the order in which they are looked for.
        keys: parts of tensor names, ours -> theirs; the first that fits is replaced.
        deeper_keys: the same for every decoder layer but the first.
        layer_config: key of the decoder layer's own configuration (None: it is the root).
        flags: switches of the network and their value where the configuration says nothing.
        knows: what the layout's own readers know beyond one Llama layer and three taps; the rest is not written in it.
        one_layer: its readers build one decoder layer whatever num_hidden_layers says (a file for Vicuna 13B says 40).
        taps: where taps are written; every layout is read from all of `TAP_NAMINGS`.
        config: what a written config.json says besides sizes.
    """

    name: str
    recognised: str
    weights: tuple[str, ...] = ("model.safetensors", "pytorch_model.bin")
    keys: Mapping[str, str] = field(default_factory=dict)
    deeper_keys: Mapping[str, str] = field(default_factory=dict)
    layer_config: str | None = None
    flags: Mapping[str, bool] = field(default_factory=dict)
    knows: tuple[str, ...] = ()
    one_layer: bool = False
    taps: TapNaming | None = None
    config: Mapping[str, Any] = field(default_factory=dict)


COUNTS_OUTPUTS = TapNaming(
    path=("eagle_config", "eagle_aux_hidden_state_layer_ids"), shift=0, counts="ids count layer outputs"
)
COUNTS_INPUTS = TapNaming(path=("eagle_aux_hidden_state_layer_ids",), shift=-1, counts="ids count layer inputs")
TAP_NAMINGS = (COUNTS_OUTPUTS, COUNTS_INPUTS)
DEFAULT_TAPS = "no ids in the file: outputs of layers 1, L/2-1 and L-4"
MIN_LAYERS_FOR_DEFAULT_TAPS = 7

FLAGS = {"norm_before_residual": False, "norm_before_fc": False, "fc_norm": False, "norm_output": False}

# The norm over all taps is called input_norm by those who have it. A decoder layer after the first has one norm before its
# attention: input_layernorm (speculators, vLLM, SpecForge's P-EAGLE) or hidden_norm (SGLang); both are read.
_COMMON_KEYS = {"norm_before_fc.": "input_norm."}
_DEEPER_KEYS = {"hidden_norm.": "input_layernorm."}

SAFEAILAB = HeadLayout(
    name="safeailab",
    recognised="midlayer.* tensors; architectures do not say LlamaForCausalLMEagle3",
    keys={"layers.0.": "midlayer.", **_COMMON_KEYS},
    deeper_keys=_DEEPER_KEYS,
    flags=FLAGS,
    one_layer=True,
    taps=COUNTS_OUTPUTS,
    config={"architectures": ["LlamaForCausalLM"], "model_type": "llama"},
)
SPECFORGE = HeadLayout(
    name="specforge",
    recognised="architectures: LlamaForCausalLMEagle3",
    keys={"layers.0.": "midlayer.", **_COMMON_KEYS},
    deeper_keys=_DEEPER_KEYS,
    flags=FLAGS,
    knows=("fc_norm", "norm_output", "more_layers"),
    taps=COUNTS_OUTPUTS,
    config={"architectures": ["LlamaForCausalLMEagle3"], "model_type": "llama"},
)
SPECULATORS = HeadLayout(
    name="speculators",
    recognised="speculators_model_type: eagle3",
    keys=_COMMON_KEYS,
    deeper_keys=_DEEPER_KEYS,
    layer_config="transformer_layer_config",
    flags=FLAGS,
    knows=(*FLAGS, "qk_norm", "fc_bias", "attention_bias", "more_layers", "other_than_3_taps"),
    taps=COUNTS_INPUTS,
    config={"architectures": ["Eagle3Speculator"], "speculators_model_type": "eagle3", "speculators_version": "0.3.0"},
)
# The final layer of version 2 files is the target's lm_head. The hub's configs say 2 heads where the file has 5.
MEDUSA = HeadLayout(
    name="medusa",
    recognised="medusa_num_heads in config.json, tensors {head}.{block}.linear.weight",
    weights=("medusa_lm_head.safetensors", "medusa_lm_head.pt", "model.safetensors", "pytorch_model.bin"),
)
EAGLE3_LAYOUTS = {layout.name: layout for layout in (SAFEAILAB, SPECFORGE, SPECULATORS)}

# Tensors that are in files and that no drafting reads.
# Names may begin with "model." (lm_head, d2t and t2d never do), and flags may stand in eagle_config: NVIDIA writes so.
UNREAD = (r"t2d", r"verifier_lm_head\.weight", r"verifier_norm\.weight", r"(.*\.)?rotary_emb\.inv_freq")

# Heads that share names with these but are other networks.
OTHER_HEADS = {
    r".*\.kv_a_proj_with_mqa\.weight": "its attention is MLA",
    r"mask_hidden": "it drafts in parallel (P-EAGLE)",
}
ROPE_TYPES = ("default", "linear", "llama3", "yarn")  # the others depend on the length that was seen
LAYER_MODEL_TYPES = ("llama", "qwen3")  # what speculators builds; qwen3 norms queries and keys
