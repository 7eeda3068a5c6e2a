"""EAGLE-3 checkpoints of every layout compute what the algorithm says, pass after pass.

The algorithm is written out below on the raw tensors of the file: own norm, own rotary embedding, own attention over a
history of keys and values, own arithmetic of the vocabularies and of the taps. Planted bugs show that the comparison sees
what it should.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from autospec.errors import CheckpointError, OptionError
from autospec.heads.checkpoint import load_head, save_head
from autospec.heads.eagle3 import Eagle3Head

PROMPT, PASSES = 6, 5
HEADS, KV_HEADS, HEAD_DIM, LAYERS = 4, 2, 8, 9

VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "safeailab-bin": ("safeailab", "pytorch_model.bin", {}),
    "safeailab-safetensors": ("safeailab", "model.safetensors", {}),
    "safeailab-whole-vocabulary": ("safeailab", "pytorch_model.bin", {"pruned": False}),
    "safeailab-narrow": ("safeailab", "pytorch_model.bin", {"hidden": 24}),
    "specforge": ("specforge", "model.safetensors", {}),
    "specforge-ids": ("specforge", "model.safetensors", {"ids": [0, 3, 8]}),
    "specforge-3.1": ("specforge", "model.safetensors", {"fc_norm": True, "norm_output": True}),
    "specforge-linear-rope": ("specforge", "model.safetensors", {"rope_scaling": {"type": "linear", "factor": 2.0}}),
    "specforge-2-layers": ("specforge", "model.safetensors", {"layers": 2, "deeper_norm": "hidden_norm"}),
    "speculators": ("speculators", "model.safetensors", {"ids": [2, 4, 6]}),
    "speculators-no-ids": ("speculators", "model.safetensors", {}),
    "speculators-norm-before-residual": ("speculators", "model.safetensors", {"ids": [1, 4, 9], "norm_before_residual": True}),
    "speculators-norm-before-fc": ("speculators", "model.safetensors", {"norm_before_fc": True}),
    "speculators-fc-norm": ("speculators", "model.safetensors", {"fc_norm": True}),
    "speculators-norm-output": ("speculators", "model.safetensors", {"norm_output": True}),
    "speculators-narrow": ("speculators", "model.safetensors", {"hidden": 24, "norm_before_residual": True}),
    "speculators-own-embeddings": ("speculators", "model.safetensors", {"own_embeddings": True}),
    "speculators-2-layers": ("speculators", "model.safetensors", {"layers": 2, "norm_before_residual": True}),
    "speculators-5-taps": ("speculators", "model.safetensors", {"ids": [1, 2, 4, 6, 8], "fc_norm": True}),
    "speculators-qwen3": ("speculators", "model.safetensors", {"qwen3": True, "layers": 2}),
    "speculators-biases": ("speculators", "model.safetensors", {"bias": True}),
}


def rms_norm(x: Tensor, weight: Tensor) -> Tensor:
    return x / torch.sqrt((x * x).mean(-1, keepdim=True) + 1e-3) * weight


def rotate(x: Tensor, position: int, factor: float) -> Tensor:
    """x [heads, D] turned by a position, the two halves of D being the two coordinates."""
    half = HEAD_DIM // 2
    angles = position / factor * torch.tensor([500.0 ** (-i / half) for i in range(half)])
    a, b = x[:, :half], x[:, half:]
    return torch.cat([a * angles.cos() - b * angles.sin(), b * angles.cos() + a * angles.sin()], dim=-1)


class Reference:
    """The algorithm on raw tensors: one row at a time, keys and values remembered."""

    def __init__(self, raw: Any) -> None:
        self.raw, self.t = raw, raw.tensors
        self.history: dict[int, list[tuple[Tensor, Tensor]]] = {}

    def taps(self, hidden_states: list[Tensor]) -> Tensor:
        """hidden_states[j] is the input of layer j and the output of layer j - 1."""
        ids = self.raw.options.get("ids")
        if ids is None:
            picked = [2, LAYERS // 2, LAYERS - 3]
        elif self.raw.layout == "speculators":
            picked = ids
        else:
            picked = [one + 1 for one in ids]
        rows = [hidden_states[one] for one in picked]
        if self.raw.options["fc_norm"]:
            rows = [rms_norm(row, self.t[f"fc_norm.{index}.weight"]) for index, row in enumerate(rows)]
        wide = torch.cat(rows, dim=-1)
        if self.raw.options["norm_before_fc"]:
            wide = rms_norm(wide, self.t["input_norm.weight"])
        return wide @ self.t["fc.weight"].T

    def layer(self, index: int, x: Tensor, residual: Tensor, position: int) -> Tensor:
        at = f"layers.{index}." if index or self.raw.layout == "speculators" else "midlayer."

        def project(name: str, value: Tensor) -> Tensor:
            out = self.t[f"{at}{name}.weight"] @ value
            return out + self.t[f"{at}{name}.bias"] if f"{at}{name}.bias" in self.t else out

        q = project("self_attn.q_proj", x).view(HEADS, HEAD_DIM)
        k = project("self_attn.k_proj", x).view(KV_HEADS, HEAD_DIM)
        v = project("self_attn.v_proj", x).view(KV_HEADS, HEAD_DIM)
        if self.raw.options.get("qwen3"):
            q = rms_norm(q, self.t[f"{at}self_attn.q_norm.weight"])
            k = rms_norm(k, self.t[f"{at}self_attn.k_norm.weight"])
        factor = (self.raw.options.get("rope_scaling") or {"factor": 1.0})["factor"]
        q, k = rotate(q, position, factor), rotate(k, position, factor)
        past = self.history.setdefault(index, [])
        past.append((k, v))
        heads = []
        for head in range(HEADS):
            kv = head // (HEADS // KV_HEADS)
            keys, values = torch.stack([k[kv] for k, _ in past]), torch.stack([v[kv] for _, v in past])
            heads.append(torch.softmax(keys @ q[head] / HEAD_DIM**0.5, dim=0) @ values)
        out = residual + project("self_attn.o_proj", torch.cat(heads))
        y = rms_norm(out, self.t[f"{at}post_attention_layernorm.weight"])
        gated = nn.functional.silu(project("mlp.gate_proj", y)) * project("mlp.up_proj", y)
        return out + project("mlp.down_proj", gated)

    def row(self, token: int, g: Tensor, position: int) -> tuple[Tensor, Tensor]:
        at = "layers.0." if self.raw.layout == "speculators" else "midlayer."
        embeddings = self.t.get("embed_tokens.weight", self.raw.embed_tokens)
        normed = rms_norm(g, self.t[f"{at}hidden_norm.weight"])
        x = torch.cat([rms_norm(embeddings[token], self.t[f"{at}input_layernorm.weight"]), normed])
        out = self.layer(0, x, normed if self.raw.options["norm_before_residual"] else g, position)
        for index in range(1, self.raw.options.get("layers", 1)):
            name = self.raw.options.get("deeper_norm", "input_layernorm")
            out = self.layer(index, rms_norm(out, self.t[f"layers.{index}.{name}.weight"]), out, position)
        last = rms_norm(out, self.t["norm.weight"])
        return self.t["lm_head.weight"] @ last, last if self.raw.options["norm_output"] else out

    def draft(self, tokens: list[int], hidden_states: list[Tensor]) -> tuple[Tensor, list[int]]:
        """Rows of the prompt from the target's states, then passes on what the head says itself."""
        g = self.taps(hidden_states)
        all_logits, drafted = [], []
        for position, token in enumerate(tokens):
            logits, recycled = self.row(token, g[position], position)
            all_logits.append(logits)
        for position in itertools.count(len(tokens)):
            best = int(all_logits[-1].argmax())
            drafted.append(best + int(self.t["d2t"][best]) if "d2t" in self.t else best)
            if len(drafted) > PASSES:
                return torch.stack(all_logits), drafted
            logits, recycled = self.row(drafted[-1], recycled, position)
            all_logits.append(logits)
        raise AssertionError


def draft(head: Eagle3Head, tokens: list[int], hidden_states: list[Tensor]) -> tuple[Tensor, list[int]]:
    """The same with our head, fed all rows again in every pass."""
    taps = torch.cat([hidden_states[after + 1] for after in head.spec.tap_after], dim=-1)
    hidden, fed = head.fuse(taps[None]), list(tokens)
    drafted: list[int] = []
    while True:
        positions = torch.arange(len(fed))[None]
        logits, recycled = head(torch.tensor([fed]), hidden, positions)
        drafted.append(int(head.vocabulary()[logits[0, -1].argmax()]))
        if len(drafted) > PASSES:
            return logits[0], drafted
        fed.append(drafted[-1])
        hidden = torch.cat([hidden, recycled[:, -1:]], dim=1)


@torch.no_grad()
def agree(raw: Any, head: Eagle3Head, truth: Any = None) -> bool:
    """Whether a head drafts what the algorithm drafts from the file (`truth`, where it is another one)."""
    generator = torch.Generator().manual_seed(5)
    width = raw.embed_tokens.shape[1]
    hidden_states = [torch.randn(PROMPT, width, generator=generator) * (1 + j / 3) for j in range(LAYERS + 1)]
    tokens = torch.randint(len(raw.embed_tokens), (PROMPT,), generator=generator).tolist()
    wanted, wanted_tokens = Reference(truth or raw).draft(tokens, hidden_states)
    got, got_tokens = draft(head, tokens, hidden_states)
    same = got.shape == wanted.shape and torch.allclose(got, wanted, atol=2e-5, rtol=1e-4)
    return same and got_tokens == wanted_tokens


def load(folder: Path, raw: Any) -> Eagle3Head:
    head = load_head(folder, **raw.target)
    assert isinstance(head, Eagle3Head)
    assert not head.training
    return head


@pytest.mark.parametrize("name", VARIANTS)
def test_a_file_drafts_what_the_algorithm_drafts(name: str, raw: Callable[..., Any], tmp_path: Path) -> None:
    layout, weights, options = VARIANTS[name]
    written = raw(layout, **options)
    head = load(written.write(tmp_path, weights), written)
    assert head.report is not None
    assert head.report.layout == layout
    assert head.report.tap_after == head.spec.tap_after
    assert agree(written, head)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_saved_loads_as_it_was(name: str, raw: Callable[..., Any], tmp_path: Path) -> None:
    layout, weights, options = VARIANTS[name]
    written = raw(layout, **options)
    head = load(written.write(tmp_path / "raw", weights), written)
    for other in ("safeailab", "specforge", "speculators"):
        try:
            save_head(head, tmp_path / other, other)
        except OptionError as error:
            assert other != layout
            assert "ignore" in str(error)  # noqa: PT017
            continue
        again = load(tmp_path / other, written)
        assert again.report is not None
        assert again.report.layout == other
        assert again.spec.tap_after == head.spec.tap_after
        ours, theirs = head.own_state(), again.own_state()
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
        assert torch.equal(again.vocabulary(), head.vocabulary())
        assert agree(written, again)


@pytest.mark.parametrize("layout", ["safeailab", "specforge", "speculators"])
def test_names_and_configuration_are_those_of_the_layout(layout: str, raw: Callable[..., Any], tmp_path: Path) -> None:
    """A file that we wrote holds the names and the numbers that its maker would have written."""
    import json

    from safetensors.torch import load_file

    written = raw(layout, ids=[2, 4, 6])
    save_head(load(written.write(tmp_path / "raw"), written), tmp_path / "ours", layout)
    assert load_file(tmp_path / "ours" / "model.safetensors").keys() == written.tensors.keys()
    config = json.loads((tmp_path / "ours" / "config.json").read_text())
    for key in ("architectures", "draft_vocab_size", "eagle_config", "eagle_aux_hidden_state_layer_ids", "speculators_model_type"):
        assert config.get(key) == written.config.get(key)
    sizes = config.get("transformer_layer_config", config)
    for key, value in written.config.get("transformer_layer_config", written.config).items():
        if key not in ("architectures", "transformer_layer_config", "model_type"):
            assert sizes.get(key) == value, key


def test_taps_are_converted_once(raw: Callable[..., Any], tmp_path: Path) -> None:
    cases = {
        "safeailab": (None, (1, 3, 5), "no ids"), "specforge": ([1, 3, 5], (1, 3, 5), "outputs"),
        "speculators": ([2, 4, 6], (1, 3, 5), "inputs"),
    }  # fmt: skip
    for layout, (ids, after, words) in cases.items():
        written = raw(layout, ids=ids)
        report = load(written.write(tmp_path / layout), written).report
        assert report is not None
        assert report.tap_after == after
        assert words in report.tap_convention
        assert str(after) in str(report)


def test_equal_embeddings_are_the_targets(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("speculators")
    written.tensors["embed_tokens.weight"] = written.embed_tokens.clone()
    head = load(written.write(tmp_path / "same"), written)
    assert head.embed_tokens.weight.data_ptr() == written.embed_tokens.data_ptr()
    assert head.report is not None
    assert head.report.shared == ("embed_tokens.weight",)
    assert "embed_tokens.weight" not in head.own_state()
    written.tensors["embed_tokens.weight"][3, 3] += 1
    head = load(written.write(tmp_path / "other"), written)
    assert head.report is not None
    assert head.report.shared == ()
    assert "embed_tokens.weight" in head.own_state()


@pytest.mark.parametrize("pruned", [True, False])
def test_an_lm_head_that_is_left_out_is_the_targets(pruned: bool, raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge", pruned=pruned)
    del written.tensors["lm_head.weight"]
    head = load(written.write(tmp_path), written)
    whole = raw("specforge", pruned=pruned)
    whole.tensors["lm_head.weight"] = whole.lm_head[whole.tensors["t2d"]] if pruned else whole.lm_head
    assert agree(written, head, whole)
    assert (head.lm_head.weight.data_ptr() == written.lm_head.data_ptr()) is not pruned
    save_head(head, tmp_path / "again")
    assert agree(written, load(tmp_path / "again", written), whole)


def test_names_with_a_prefix_shards_and_flags_in_eagle_config(raw: Callable[..., Any], tmp_path: Path) -> None:
    """As NVIDIA's trainers write them."""
    import json

    from safetensors.torch import save_file

    written = raw("specforge", norm_before_fc=True)
    bare = ("lm_head.weight", "d2t", "t2d")
    tensors = {name if name in bare else f"model.{name}": value for name, value in written.tensors.items()}
    tensors = {name.replace("midlayer.", "layers.0."): value for name, value in tensors.items()}
    config = {name: value for name, value in written.config.items() if name != "norm_before_fc"}
    config["eagle_config"] = {"norm_before_fc": True}
    names = sorted(tensors)
    halves = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in halves.items():
        save_file({name: tensors[name] for name in part}, tmp_path / file)
    index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert agree(written, load(tmp_path, written))
    (tmp_path / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"not there: b\.safetensors"):
        load(tmp_path, written)


def test_what_is_assumed_is_said(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("speculators")
    del written.config["norm_before_residual"]
    report = load(written.write(tmp_path / "a"), written).report
    assert report is not None
    assert "norm_before_residual" in report.notes[0]
    written = raw("safeailab")
    written.config["num_hidden_layers"] = 40  # as in the file for Vicuna 13B
    head = load(written.write(tmp_path / "b"), written)
    assert head.report is not None
    assert "40 layers" in head.report.notes[0]
    assert agree(written, head)
    written = raw("specforge", fc_norm=True)
    del written.config["fc_norm"]
    head = load(written.write(tmp_path / "c"), written)
    assert head.report is not None
    assert "assumed true" in head.report.notes[0]
    assert agree(written, head)


def test_queries_with_a_bias_and_outputs_without(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge", bias=True)
    del written.tensors["midlayer.self_attn.o_proj.bias"]
    del written.config["attention_bias"]
    assert agree(written, load(written.write(tmp_path), written))


def test_the_attend_hook_gets_every_layers_keys_and_values(raw: Callable[..., Any], tmp_path: Path) -> None:
    """One row at a time over a cache of the caller's gives what all rows at once give."""
    written = raw("speculators", layers=2)
    head = load(written.write(tmp_path), written)
    ids, positions = torch.randint(96, (1, 5)), torch.arange(5)[None]
    hidden = torch.randn(1, 5, 32)
    with torch.no_grad():
        whole = head(ids, hidden, positions)
        cache: dict[int, tuple[Tensor, Tensor]] = {}

        def attend(layer: int, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
            if layer in cache:
                k, v = torch.cat([cache[layer][0], k], dim=2), torch.cat([cache[layer][1], v], dim=2)
            cache[layer] = (k, v)
            k, v = k.repeat_interleave(2, dim=1), v.repeat_interleave(2, dim=1)
            return ((q @ k.transpose(-1, -2) * scale).softmax(-1) @ v).transpose(1, 2)

        head.attend = attend
        rows = [head(ids[:, t : t + 1], hidden[:, t : t + 1], positions[:, t : t + 1]) for t in range(5)]
    for part in (0, 1):
        torch.testing.assert_close(torch.cat([row[part] for row in rows], dim=1), whole[part], atol=1e-5, rtol=1e-5)


# Planted bugs


def test_an_embedding_after_the_hidden_state_is_seen(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge")
    head = load(written.write(tmp_path), written)
    with torch.no_grad():
        for name in ("q_proj", "k_proj", "v_proj"):
            weight = getattr(head.layers[0].self_attn, name).weight
            weight.copy_(torch.cat(weight.chunk(2, dim=1)[::-1], dim=1))
    assert not agree(written, head)


@pytest.mark.parametrize("flag", ["norm_before_residual", "norm_output"])
@pytest.mark.parametrize("is_on", [True, False])
def test_a_flag_that_is_ignored_is_seen(flag: str, is_on: bool, raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("speculators", **{flag: is_on})
    assert agree(written, load(written.write(tmp_path / "right"), written))
    written.config[flag] = not is_on
    assert not agree(written, load(written.write(tmp_path / "wrong"), written))


@pytest.mark.parametrize("step", [-1, 1])
def test_taps_off_by_one_are_seen(step: int, raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge", ids=[2, 4, 6])
    written.config["eagle_config"]["eagle_aux_hidden_state_layer_ids"] = [2 + step, 4 + step, 6 + step]
    assert not agree(written, load(written.write(tmp_path), written))


def test_the_other_convention_is_seen(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge", ids=[2, 4, 6])
    written.config["eagle_aux_hidden_state_layer_ids"] = written.config.pop("eagle_config")["eagle_aux_hidden_state_layer_ids"]
    assert not agree(written, load(written.write(tmp_path), written))


def test_taps_in_another_order_are_seen(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge")
    head = load(written.write(tmp_path), written)
    with torch.no_grad():
        head.fc.weight.copy_(torch.cat(head.fc.weight.chunk(3, dim=1)[::-1], dim=1))
    assert not agree(written, head)


def test_d2t_as_absolute_ids_is_seen(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge")
    head = load(written.write(tmp_path / "right"), written)
    head.d2t = head.vocabulary()
    assert not agree(written, head)
    written.tensors["d2t"] = written.tensors["d2t"] + torch.arange(len(written.tensors["d2t"]))
    with pytest.raises(CheckpointError, match=r"out of range|not injective|different target tokens"):
        load(written.write(tmp_path / "wrong"), written)
    written.tensors["d2t"] = torch.arange(len(written.tensors["d2t"]))  # ids that are injective and in range as offsets
    with pytest.raises(CheckpointError, match="different target tokens"):
        load(written.write(tmp_path / "identity"), written)


def test_a_swapped_norm_is_seen(raw: Callable[..., Any], tmp_path: Path) -> None:
    written = raw("specforge")
    head = load(written.write(tmp_path), written)
    layer: Any = head.layers[0]
    layer.hidden_norm, layer.input_layernorm = layer.input_layernorm, layer.hidden_norm
    assert not agree(written, head)
