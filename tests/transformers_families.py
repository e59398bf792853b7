"""Small random models of the transformers package, one per family, with inputs and what of their results counts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

LENGTH, WIDTH, VOCABULARY = 9, 32, 99
_TEXT = {"vocab_size": VOCABULARY, "hidden_size": WIDTH, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
_TEXT |= {"max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_GROUPED = _TEXT | {"num_key_value_heads": 2}
_IMAGE = {
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 4,
}
_PAIR = {
    "vocab_size": VOCABULARY,
    "d_model": WIDTH,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "pad_token_id": 0,
}
_PAIR |= {"decoder_attention_heads": 4, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "bos_token_id": 1, "eos_token_id": 2}
_LATENT = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 4,
    "qk_nope_head_dim": 8,
    "v_head_dim": 12,
    "n_group": 1,
    "topk_group": 1,
}
_LATENT |= {"n_routed_experts": 2, "num_experts_per_tok": 2, "first_k_dense_replace": 1, "moe_intermediate_size": 16}


@dataclass(frozen=True)
class Family:
    """A family of models.

    Args:
        architecture: the class in transformers.
        config: the class of its configuration.
        options: the configuration's arguments.
        padding: "left", "right" or "none".
        generates: whether it generates text.
        chooses: whether it makes choices by comparing numbers (experts, keys), which a rounding may turn.
    """

    architecture: str
    config: str
    options: dict[str, Any]
    padding: str = "left"
    generates: bool = True
    chooses: bool = False

    def model(self, attention: str = "eager") -> Any:
        """In eval mode, with weights that make attention far from even."""
        import transformers

        torch.manual_seed(0)
        config = getattr(transformers, self.config)(**self.options)
        model = getattr(transformers, self.architecture)._from_config(config, attn_implementation=attention).eval()
        if "num_experts_per_tok" in self.options:
            model.set_experts_implementation("eager")  # the other one has no float64
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() >= 2:
                    parameter.normal_(0.0, parameter[0].numel() ** -0.5)
                elif parameter.abs().sum() == 0:
                    parameter.normal_(0.0, 0.3)
        return model

    @property
    def tokens(self) -> Tensor:
        return torch.randint(3, VOCABULARY, (2, LENGTH), generator=torch.Generator().manual_seed(1))

    @property
    def padded(self) -> Tensor:
        """1 for tokens, 0 for padding, [2, length]."""
        mask = torch.ones(2, LENGTH, dtype=torch.int64)
        mask[0, :3] = 0
        return mask.flip(1) if self.padding == "right" else mask

    def inputs(self, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
        """What the model is called with."""
        generator = torch.Generator().manual_seed(2)
        given: dict[str, Tensor] = {}
        if self.config == "WhisperConfig":
            return {"input_features": torch.randn(2, 8, 32, generator=generator).to(dtype), "decoder_input_ids": self.tokens}
        if "image_size" in self.options or "vision_config" in self.options:
            given["pixel_values"] = torch.randn(2, 3, 16, 16, generator=generator).to(dtype)
        if "image_size" not in self.options:
            given |= {"input_ids": self.tokens, "attention_mask": self.padded}
        if "decoder_start_token_id" in self.options:
            given["decoder_input_ids"] = self.tokens[:, :5]
        return given

    def counted(self, results: Any) -> dict[str, Tensor]:
        """Outputs and attention weights, without the rows of padding."""
        found = {name: t for name, t in _tensors(results) if "attentions" in name or name.endswith(("logits", "hidden_state", "embeds"))}
        return {name: self._without_padding(name, t) for name, t in found.items()}

    def _without_padding(self, name: str, tensor: Tensor) -> Tensor:
        if self.padding == "none" or "vision" in name or "image" in name:
            return tensor
        rows = self.padded.bool()
        if "attentions" in name and tensor.shape[2] == LENGTH:
            return tensor.transpose(1, 2)[rows]
        return tensor[rows] if tensor.shape[:2] == rows.shape else tensor


def _tensors(results: Any, name: str = "") -> Iterator[tuple[str, Tensor]]:
    """Every tensor of a model's output, with its path."""
    if isinstance(results, Tensor):
        yield name, results
    elif hasattr(results, "items"):
        for key, value in results.items():
            yield from _tensors(value, f"{name}.{key}")
    elif isinstance(results, (tuple, list)):
        for i, value in enumerate(results):
            yield from _tensors(value, f"{name}.{i}")


def _causal(name: str, **options: Any) -> Family:
    chooses = options.pop("chooses", False)
    base = _GROUPED if "n_embd" not in options else {k: _TEXT[k] for k in ("vocab_size", "pad_token_id", "bos_token_id", "eos_token_id")}
    return Family(f"{name}ForCausalLM", f"{name}Config", base | options, chooses=chooses)


FAMILIES: dict[str, Family] = {
    "llama": _causal("Llama"),
    "mistral": _causal("Mistral", sliding_window=4),
    "qwen3": _causal("Qwen3", head_dim=16),
    "gemma2": _causal("Gemma2", sliding_window=4, head_dim=8, attn_logit_softcapping=2.0, query_pre_attn_scalar=8),
    "gemma3": Family("Gemma3ForCausalLM", "Gemma3TextConfig", _GROUPED | {"sliding_window": 4, "head_dim": 8}),
    "gpt_oss": _causal("GptOss", sliding_window=4, head_dim=8, num_local_experts=2, num_experts_per_tok=2),
    "llama4": Family(
        "Llama4ForCausalLM",
        "Llama4TextConfig",
        _GROUPED | {"attention_chunk_size": 4, "head_dim": 8, "intermediate_size_mlp": 48, "num_local_experts": 2},
        chooses=True,
    ),
    "deepseek_v3": _causal("DeepseekV3", **_LATENT, num_key_value_heads=4),
    "deepseek_v32": _causal("DeepseekV32", **_LATENT, num_key_value_heads=4, index_topk=4, index_n_heads=2, index_head_dim=8, chooses=True),
    "gpt2": Family(
        "GPT2LMHeadModel",
        "GPT2Config",
        {
            "vocab_size": VOCABULARY,
            "n_embd": WIDTH,
            "n_layer": 2,
            "n_head": 4,
            "n_positions": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
        },
    ),
    "opt": Family(
        "OPTForCausalLM",
        "OPTConfig",
        {k: v for k, v in _TEXT.items() if k != "intermediate_size"} | {"ffn_dim": 48, "word_embed_proj_dim": WIDTH},
    ),
    "bert": Family("BertModel", "BertConfig", _TEXT, padding="right", generates=False),
    "modernbert": Family(
        "ModernBertModel",
        "ModernBertConfig",
        _TEXT | {"global_attn_every_n_layers": 2, "local_attention": 6, "cls_token_id": 1, "sep_token_id": 2},
        generates=False,
    ),
    "t5": Family(
        "T5ForConditionalGeneration",
        "T5Config",
        {"vocab_size": VOCABULARY, "d_model": WIDTH, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4, "decoder_start_token_id": 0},
        padding="right",
    ),
    "bart": Family("BartForConditionalGeneration", "BartConfig", _PAIR | {"max_position_embeddings": 64, "decoder_start_token_id": 2}),
    "whisper": Family(
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        _PAIR | {"num_mel_bins": 8, "max_source_positions": 16, "max_target_positions": 32, "decoder_start_token_id": 3},
        padding="none",
    ),
    "vit": Family("ViTModel", "ViTConfig", _IMAGE, padding="none", generates=False),
    "clip": Family(
        "CLIPModel", "CLIPConfig", {"text_config": _TEXT, "vision_config": _IMAGE, "projection_dim": 16}, padding="right", generates=False
    ),
}


def reference(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **options: Any
) -> tuple[Tensor, Tensor]:
    """Attention as an implementation of the package, in plain torch and in the inputs' dtype: eager's own softmax is float32 in float64, too."""
    heads, q_len, scaling = query.shape[1], query.shape[2], options.get("scaling")
    causal = getattr(module, "is_causal", True) if options.get("is_causal") is None else options["is_causal"]
    key, value = (t.repeat_interleave(heads // t.shape[1], 1) for t in (key, value))
    scores = query @ key.mT * (query.shape[-1] ** -0.5 if scaling is None else scaling)
    if options.get("softcap") is not None:
        scores = options["softcap"] * torch.tanh(scores / options["softcap"])
    if options.get("position_bias") is not None:
        scores = scores + options["position_bias"]
    if attention_mask is None and causal and q_len > 1:
        attention_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if options.get("indices") is not None:
        chosen = torch.zeros(scores.shape[0], q_len, scores.shape[-1], dtype=torch.bool)
        attention_mask = chosen.scatter(-1, options["indices"].long(), True)[:, None] & attention_mask
    if attention_mask is not None:
        scores = scores.masked_fill(~attention_mask, -1e100)
    if options.get("s_aux") is not None:
        scores = torch.cat([scores, options["s_aux"][:, None, None].expand(*scores.shape[:3], 1)], -1)
    probs = scores.softmax(-1)[..., : key.shape[2]]
    return (probs @ value).transpose(1, 2).contiguous(), probs


def evaluated(family: Family, model: Any, dtype: torch.dtype, run: Any = None) -> dict[str, Tensor]:
    """Outputs, weights, and the gradient of every parameter when something arrives at each of them."""
    model.zero_grad()
    results = family.counted((model if run is None else run)(**family.inputs(dtype), output_attentions=True))
    generator = torch.Generator().manual_seed(3)
    incoming = {name: torch.randn(t.shape, generator=generator, dtype=torch.float64).to(t.dtype) for name, t in results.items()}
    torch.autograd.backward(list(results.values()), list(incoming.values()))
    grads = {f"d{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {name: t.detach() for name, t in (results | grads).items()}
