"""Names and settings of transformers' ViTMAEForPreTraining.

Two generations of names exist: `legacy` (releases before 5), with the query, key and value of a
block under `attention.attention`, and `v5`, with shorter ones. Every release loads legacy files.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor

from model.config import CHANNELS, ModelConfig
from model.vit import NORM_EPS

Tensors = Mapping[str, Tensor]
State = dict[str, Tensor]
HFNames = Literal["v5", "legacy"]
"""Generation of transformers' parameter names."""
# Prefixes are compared whole, up to the last dot: "norm" does not match "decoder_norm".
_HF_FIXED = {
    "cls_token": "vit.embeddings.cls_token",
    "pos_embed": "vit.embeddings.position_embeddings",
    "patch_embed.proj": "vit.embeddings.patch_embeddings.projection",
    "norm": "vit.layernorm",
    "mask_token": "decoder.mask_token",
    "decoder_pos_embed": "decoder.decoder_pos_embed",
    "decoder_embed": "decoder.decoder_embed",
    "decoder_norm": "decoder.decoder_norm",
    "decoder_pred": "decoder.decoder_pred",
}
_HF_STACKS = {
    "blocks": {"v5": "vit.layers", "legacy": "vit.encoder.layer"},
    "decoder_blocks": {
        "v5": "decoder.decoder_layers",
        "legacy": "decoder.decoder_layers",
    },
}
_HF_BLOCK = {
    "v5": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.o_proj",
        "mlp.fc1": "mlp.fc1",
        "mlp.fc2": "mlp.fc2",
    },
    "legacy": {
        "norm1": "layernorm_before",
        "norm2": "layernorm_after",
        "attn.proj": "attention.output.dense",
        "mlp.fc1": "intermediate.dense",
        "mlp.fc2": "output.dense",
    },
}
_HF_QKV = {
    "v5": ("attention.q_proj", "attention.k_proj", "attention.v_proj"),
    "legacy": (
        "attention.attention.query",
        "attention.attention.key",
        "attention.attention.value",
    ),
}


def rename_to_hf(state: Tensors, names: HFNames) -> State:
    """Translate a full state dict of ours, splitting the fused query-key-value tensors.

    Args:
        state: Tensors by our names.
        names: Generation of names.

    Returns:
        Tensors by transformers' names.
    """
    out: State = {}
    for name, value in state.items():
        if ".attn.qkv." in name:
            # Rows of the fused matrix: first all of the query's, then the key's, the value's.
            parts = value.chunk(3)
            part_names = _hf_qkv_names(name, names)
            for part_name, part in zip(part_names, parts, strict=True):
                # Copies, because savers refuse or duplicate tensors that share memory.
                out[part_name] = part.clone()
        else:
            out[_hf_name(name, names)] = value
    return out


def _hf_name(name: str, names: HFNames) -> str:
    stem, _, leaf = name.rpartition(".")
    if name in _HF_FIXED:
        return _HF_FIXED[name]
    if stem in _HF_FIXED:
        return f"{_HF_FIXED[stem]}.{leaf}"
    stack, number, inner = stem.split(".", 2)
    their_stack = _HF_STACKS[stack][names]
    their_inner = _HF_BLOCK[names][inner]
    return f"{their_stack}.{number}.{their_inner}.{leaf}"


def _hf_qkv_names(name: str, names: HFNames) -> list[str]:
    stack, number, _, _, leaf = name.split(".")
    their_stack = _HF_STACKS[stack][names]
    prefix = f"{their_stack}.{number}"
    return [f"{prefix}.{inner}.{leaf}" for inner in _HF_QKV[names]]


def rename_from_hf(state: Tensors) -> State:
    """Undo `rename_to_hf`, for either generation of names; an encoder saved alone may lack the
    `vit.` prefix.

    Args:
        state: Tensors by transformers' names.

    Returns:
        Tensors by our names; what has no name here, or lacks a partner, keeps its own.
    """
    named = {}
    for name, value in state.items():
        named[_plain_hf_name(name)] = value
    fixed = {}
    for ours, theirs in _HF_FIXED.items():
        fixed[theirs] = ours
    out: State = {}
    for name, value in named.items():
        stem, _, leaf = name.rpartition(".")
        if name in fixed:
            out[fixed[name]] = value
        elif stem in fixed:
            out[f"{fixed[stem]}.{leaf}"] = value
        else:
            out.update(_block_from_hf(name, value, named))
    return out


def _plain_hf_name(name: str) -> str:
    # transformers 5 writes this odd name when it saves a model that it had loaded from legacy
    # names.
    name = name.replace("decoder.decoder_encoder.layer.", "decoder.decoder_layers.")
    if name.startswith(("vit.", "decoder.")):
        return name
    return f"vit.{name}"


def _block_from_hf(name: str, value: Tensor, state: Tensors) -> State:
    """Translate one tensor of a block; query, key and value become one tensor when the query comes
    by."""
    stem, _, leaf = name.rpartition(".")
    for generation in ("v5", "legacy"):
        for ours, theirs in _HF_STACKS.items():
            stack = re.escape(theirs[generation])
            found = re.fullmatch(rf"{stack}\.(\d+)\.(.+)", stem)
            if not found:
                continue
            number, inner = found.groups()
            block = {}
            for our, their in _HF_BLOCK[generation].items():
                block[their] = our
            if inner in block:
                our_inner = block[inner]
                return {f"{ours}.{number}.{our_inner}.{leaf}": value}
            qkv = _HF_QKV[generation]
            query, _, _ = qkv
            if inner == query:
                stack = theirs[generation]
                parts = []
                for part in qkv:
                    parts.append(f"{stack}.{number}.{part}.{leaf}")
                # Without a partner it keeps its name, which the strict check will then show.
                if not all(part in state for part in parts):
                    return {name: value}
                fused = torch.cat([state[part] for part in parts])
                return {f"{ours}.{number}.attn.qkv.{leaf}": fused}
            # Key and value are in the fused tensor already.
            if inner in qkv:
                return {}
    return {name: value}


def hf_config(config: ModelConfig) -> dict[str, Any]:
    """Write the config.json of a ViTMAEForPreTraining.

    Args:
        config: The model.

    Returns:
        JSON-ready settings; layer_norm_eps is set, because transformers' own default is 1e-12.
    """
    # A list, as a reader of config.json will have it: JSON has no tuples.
    image_size: int | list[int]
    if isinstance(config.image_size, int):
        image_size = config.image_size
    else:
        image_size = list(config.image_size)
    return {
        "architectures": ["ViTMAEForPreTraining"],
        "model_type": "vit_mae",
        "image_size": image_size,
        "patch_size": config.patch_size,
        "num_channels": CHANNELS,
        "hidden_size": config.embed_dim,
        "num_hidden_layers": config.depth,
        "num_attention_heads": config.num_heads,
        "intermediate_size": int(config.embed_dim * config.mlp_ratio),
        "decoder_hidden_size": config.decoder_embed_dim,
        "decoder_num_hidden_layers": config.decoder_depth,
        "decoder_num_attention_heads": config.decoder_num_heads,
        "decoder_intermediate_size": int(config.decoder_embed_dim * config.mlp_ratio),
        "mask_ratio": config.mask_ratio,
        "norm_pix_loss": config.norm_pix_loss,
        "hidden_act": "gelu",
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
        "initializer_range": 0.02,
        "layer_norm_eps": NORM_EPS,
        "qkv_bias": True,
    }
