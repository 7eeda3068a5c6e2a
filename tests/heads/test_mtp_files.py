"""MTP modules as families write them: read from the checkpoint, they guess what plain PyTorch guesses, or are refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from harness.graphs import evaluate
from harness.models import captured, model
from harness.mtp import LAYERS, WRITINGS, Made
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

import autospec
from autospec.capture_head import capture_head
from autospec.config import Eagle3Config, MTPConfig
from autospec.errors import AutospecError, CheckpointError, OptionError
from autospec.heads import mtp_files
from autospec.heads.mtp import MTPHead
from autospec.heads.mtp_files import load_mtp
from autospec.ir.match import calls
from autospec.kernels.latent_attention import latent_attention
from autospec.kernels.select_keys import select_keys
from autospec.loading import check_head, load_mtp_modules

MODULES = {"deepseek_v3": 1, "glm_moe_dsa": 2, "glm4_moe": 2, "qwen3_next": 3, "mimo": 3}
CLOSE = 1e-4  # float32, logits of order 10; measured 4e-6 at most


def made_of(kind: str, folder: Path, modules: int | None = None) -> tuple[Made, Any]:
    """A checkpoint and its target."""
    made = Made(kind, folder, modules or MODULES[kind])
    return made, AutoModelForCausalLM.from_pretrained(folder).eval()


def _inputs(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randint(0, 64, (2, 9), generator=generator), torch.randn(2, 9, 32, generator=generator),
            torch.arange(9).expand(2, -1))  # fmt: skip


@torch.no_grad()
def difference(head: MTPHead, made: Made) -> float:
    """The largest deviation of any module's logits or recycled hidden states from those by hand."""
    ids, hidden, positions = _inputs()
    errors = [0.0]
    for depth in range(made.modules):
        pairs = zip(head(depth, ids, hidden, positions), made.run(depth, ids, hidden, positions), strict=True)
        errors += [float((mine - wanted).abs().max()) for mine, wanted in pairs]
    return max(errors)


@pytest.mark.parametrize("kind", WRITINGS)
def test_every_naming_gives_the_logits_of_plain_pytorch(kind: str, tmp_path: Path) -> None:
    made, target = made_of(kind, tmp_path)
    head = load_mtp(tmp_path, target, 8)
    assert len(head.depths) == made.modules
    assert head.report is not None
    layout = {"mimo": "mimo", "qwen3_next": "qwen"}.get(kind, "deepseek")
    assert head.report.layout == layout
    assert difference(head, made) < CLOSE
    assert len(load_mtp(tmp_path, target, 1).depths) == len(head.first(1).depths) == 1


class Late(torch.nn.Module):
    """Rotary positions of which the first two are the same: those after it are one too low."""

    def __init__(self, rotary: Any) -> None:
        super().__init__()
        self.rotary = rotary

    def forward(self, x: Tensor, positions: Tensor) -> Any:
        return self.rotary(x, (positions - 1).clamp(min=0))


@pytest.mark.parametrize("kind", ["mimo", "deepseek_v3"])
def test_a_swapped_order_or_a_wrong_side_of_the_norm_is_caught(kind: str, tmp_path: Path) -> None:
    made, target = made_of(kind, tmp_path)
    head = load_mtp(tmp_path, target, 8)
    right = head.layout
    head.layout = dataclasses.replace(right, is_embedding_first=not right.is_embedding_first)
    assert difference(head, made) > 1
    head.layout = dataclasses.replace(right, recycles_normed=False)
    assert difference(head, made) > 1
    head.layout = right
    block: Any = head.depths[0]
    block.embed_norm, block.hidden_norm = block.hidden_norm, block.embed_norm
    assert difference(head, made) > 1
    block.embed_norm, block.hidden_norm = block.hidden_norm, block.embed_norm
    rotary, head.rotary_emb = head.rotary_emb, Late(head.rotary_emb)
    assert difference(head, made) > 0.1
    head.rotary_emb = rotary
    assert difference(head, made) < CLOSE


def test_captured_modules_keep_latents_and_guess_the_same(tmp_path: Path) -> None:
    """Modules of DeepSeek-V3; of the target's graph only the width of its hidden states matters here."""
    made, target = made_of("deepseek_v3", tmp_path)
    head = capture_head(load_mtp(tmp_path, target, 1), captured("target"))
    assert len(list(calls(head.first, latent_attention))) == head.facts.num_kv_layers == 1
    assert head.facts.bytes_per_token == (12 + 4) * 4
    ids, hidden, positions = _inputs()
    values = {"input_ids": ids, "taps": hidden, "hidden": hidden, "position_ids": positions, **head.weights}
    wanted = made.run(0, ids, hidden, positions)
    for graph in (head.first, head.following):
        for mine, theirs in zip(evaluate(graph, values), wanted, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=0, atol=CLOSE)


def test_captured_modules_have_indexers_of_their_own(tmp_path: Path) -> None:
    """Made like the last layer of the target that has one."""
    made, target = made_of("glm_moe_dsa", tmp_path, 1)
    assert target.config.indexer_types == ["full", "shared"]
    head = capture_head(load_mtp(tmp_path, target, 1), captured("target"))
    assert len(list(calls(head.first, select_keys))) == 1
    assert head.facts.bytes_per_token == (12 + 4 + 8) * 4
    ids, hidden, positions = _inputs()
    values = {"input_ids": ids, "taps": hidden, "hidden": hidden, "position_ids": positions, **head.weights}
    for mine, theirs in zip(evaluate(head.first, values), made.run(0, ids, hidden, positions), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=0, atol=CLOSE)


def test_from_a_path_to_tokens(tmp_path: Path) -> None:
    """Three modules for four tokens, from the target's own checkpoint; the state's K/V layers stand behind the target's."""
    _, target = made_of("mimo", tmp_path)
    prompt = [[5, 9, 33, 2, 9]]
    expected = target.generate(torch.tensor(prompt), max_new_tokens=12, do_sample=False)
    fast = autospec.optimize(str(tmp_path), MTPConfig(max_draft_len=4), compile="eager")
    assert torch.equal(fast.generate(prompt, max_new_tokens=12, do_sample=False), expected)
    assert f"k_pages.{LAYERS + 2}" in fast.program.state_slots()
    assert f"k_pages.{LAYERS + 3}" not in fast.program.state_slots()


def test_as_many_modules_are_read_as_the_draft_has_levels(tmp_path: Path) -> None:
    _, target = made_of("mimo", tmp_path)
    asked = [MTPConfig(max_draft_len=2), MTPConfig(tmp_path, max_draft_len=7), MTPConfig(str(tmp_path), use_mtp_vanilla=False)]
    assert [len(load_mtp_modules(one, target).depths) for one in asked] == [2, 3, 1]
    assert len(load_mtp_modules(MTPConfig(load_mtp(tmp_path, target, 3), max_draft_len=2), target).depths) == 2


def test_copies_of_the_target_are_shared_and_others_are_kept(tmp_path: Path) -> None:
    made, target = made_of("deepseek_v3", tmp_path)
    prefix = f"model.layers.{LAYERS}"
    made.tensors[f"{prefix}.embed_tokens.weight"] = made.whole.model.embed_tokens.weight.detach().clone()
    made.tensors[f"{prefix}.shared_head.head.weight"] = made.whole.lm_head.weight.detach() * 2
    made.write()
    head = load_mtp(tmp_path, target, 1)
    assert head.report is not None
    assert head.report.shared == (f"{prefix}.embed_tokens.weight",)
    ids, hidden, positions = _inputs()
    with torch.no_grad():
        logits, _ = head(0, ids, hidden, positions)
    torch.testing.assert_close(logits, 2 * made.run(0, ids, hidden, positions)[0], rtol=0, atol=CLOSE)


def test_shards_are_read_by_name(tmp_path: Path) -> None:
    made, target = made_of("qwen3_next", tmp_path, 1)
    (tmp_path / "model.safetensors").unlink()
    own = {name for name in made.tensors if name.startswith("mtp.")}
    shards = {"a.safetensors": set(made.tensors) - own, "b.safetensors": own}
    for file, names in shards.items():
        save_file({name: made.tensors[name] for name in names}, tmp_path / file)
    index = {name: file for file, names in shards.items() for name in names}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    assert difference(load_mtp(tmp_path, target, 1), made) < CLOSE


def _in_blocks(made: Made, block: tuple[int, int]) -> None:
    """Quantize the block's matrices as DeepSeek-V3's files are, and give the model by hand the values that remain."""
    config = json.loads((made.folder / "config.json").read_text())
    (made.folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"weight_block_size": block}}))
    own = made.whole.state_dict()
    for name, value in list(made.tensors.items()):
        if not name.startswith(f"model.layers.{LAYERS}.") or "_proj" not in name or "eh_proj" in name:
            continue
        rows, columns = value.shape
        blocks = -(-rows // block[0]), -(-columns // block[1])
        scale = 0.01 + torch.rand(blocks, generator=torch.Generator().manual_seed(rows))
        wide = scale.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
        quantized = (value / wide).clamp(-400, 400).to(torch.float8_e4m3fn)
        made.tensors |= {name: quantized, f"{name}_scale_inv": scale}
        left = (quantized.float() * wide).to(torch.bfloat16).float()
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(gate|up|down)_proj\.weight", name):
            stacked = own[f"{match[1]}.{'down' if match[3] == 'down' else 'gate_up'}_proj"][int(match[2])]
            gate, up = stacked.chunk(2)
            {"down": stacked, "gate": gate, "up": up}[match[3]].copy_(left)
        else:
            own[name].copy_(left)
    made.write()


@pytest.mark.parametrize("block", [(16, 16), (128, 128), (5, 12)])
def test_float8_blocks_are_read_as_deepseek_publishes_them(block: tuple[int, int], tmp_path: Path) -> None:
    made, target = made_of("deepseek_v3", tmp_path)
    _in_blocks(made, block)
    assert difference(load_mtp(tmp_path, target, 1), made) < CLOSE


def test_scales_that_are_taken_for_another_block_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the rows of blocks are read from below."""
    made, target = made_of("deepseek_v3", tmp_path)
    _in_blocks(made, (16, 16))
    right = mtp_files.dequantized

    def turned(tensors: dict[str, Tensor], *rest: Any) -> dict[str, Tensor]:
        return right({name: x.flip(0) if name.endswith("_scale_inv") else x for name, x in tensors.items()}, *rest)

    monkeypatch.setattr(mtp_files, "dequantized", turned)
    assert difference(load_mtp(tmp_path, target, 1), made) > 0.1


def _drop(made: Made) -> None:
    del made.tensors["model.mtp_layers.0.hidden_layernorm.weight"]


def _add(made: Made) -> None:
    made.tensors["model.mtp_layers.0.mlp.gate.weight"] = torch.zeros(3)


def _misshape(made: Made) -> None:
    made.tensors["model.mtp_layers.0.self_attn.q_proj.bias"] = torch.zeros(3)


def _quantize(made: Made) -> None:
    made.tensors["model.mtp_layers.0.mlp.up_proj.weight_scale"] = torch.zeros(3)


def _rescale(made: Made) -> None:
    made.tensors["model.mtp_layers.0.mlp.up_proj.weight_scale_inv"] = torch.zeros(3, 3)


def _remove(made: Made) -> None:
    for name in [name for name in made.tensors if "mtp_layers" in name]:
        del made.tensors[name]


@pytest.mark.parametrize(("spoil", "rule"), [
    (_drop, "it lacks model.mtp_layers.0.hidden_layernorm.weight"),
    (_add, "it has the unknown model.mtp_layers.0.mlp.gate.weight"),
    (_misshape, "misshapen are model.mtp_layers.0.self_attn.q_proj.bias [3] instead of [32]"),
    (_quantize, "the MTP modules are quantized"),
    (_rescale, "a scale of [3, 3] does not fit a weight of [48, 32] in blocks of [128, 128]"),
    (_remove, "the checkpoint has no MTP modules"),
])  # fmt: skip
def test_what_does_not_fit_is_refused(spoil: Callable[[Made], None], rule: str, tmp_path: Path) -> None:
    made, target = made_of("mimo", tmp_path, 1)
    spoil(made)
    made.write()
    _refused(CheckpointError, rule, lambda: load_mtp_modules(MTPConfig(), target))


def _refused(kind: type[AutospecError], rule: str, call: Callable[[], Any]) -> None:
    with pytest.raises(kind) as caught:
        call()
    lines = str(caught.value).splitlines()
    assert [line[:7].strip() for line in lines[1:]] == ["at", "in", "help"], f"not four lines:\n{caught.value}"
    assert rule in lines[0]


@pytest.mark.parametrize(("rule", "call"), [
    ("use_mtp_vanilla must be True or False", lambda: MTPConfig(use_mtp_vanilla="yes")),
    ("does not say which checkpoint", lambda: load_mtp_modules(MTPConfig(), model("target"))),
    ("must be an MTPHead or a path, got int", lambda: load_mtp_modules(MTPConfig(3), model("target"))),
    ("Eagle3Config was given MTP modules", lambda: check_head(Eagle3Config("x"), captured("mtp"))),
    ("MTPConfig was given an EAGLE-3 head", lambda: check_head(MTPConfig(), captured("eagle"))),
])  # fmt: skip
def test_what_is_asked_wrongly_is_refused(rule: str, call: Callable[[], Any]) -> None:
    _refused(OptionError, rule, call)


def test_a_target_without_such_parts_is_refused(tmp_path: Path) -> None:
    Made("mimo", tmp_path)
    _refused(CheckpointError, "the target has no decoder", lambda: load_mtp(tmp_path, torch.nn.Linear(2, 2), 1))
