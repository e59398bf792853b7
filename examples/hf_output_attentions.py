"""Attention weights of a Hugging Face model, together with fused attention.

Runs as a script or cell by cell, on a CPU too, and checks itself against the package's eager attention. Needs transformers.
"""

# %% A small GPT-2 with random weights: a model whose attention is never told that somebody wants its weights.
import torch
import transformers

from fused_attn.integrations.transformers import register

register()
torch.manual_seed(0)
sizes = {"vocab_size": 100, "n_embd": 64, "n_layer": 2, "n_head": 4, "initializer_range": 0.3}
config = transformers.GPT2Config(**sizes, bos_token_id=1, eos_token_id=2)
model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="fused_attn").eval()
tokens = torch.randint(3, 100, (2, 40))
padding = torch.ones_like(tokens)
padding[0, :8] = 0  # the first sentence is shorter: padded on the left, as for generating


# %% Weights per call, with gradients through them: how much does the last token look at the first one that is no padding?
def measured(implementation: str) -> tuple[torch.Tensor, ...]:
    """The next token's logits, every layer's weights [batch, heads, length, length], and a gradient through the last layer's."""
    model.set_attn_implementation(implementation)
    embedded = model.get_input_embeddings()(tokens).detach().requires_grad_()
    results = model(inputs_embeds=embedded, attention_mask=padding, output_attentions=True)
    looked = results.attentions[-1][0, :, -1, 8].sum()
    (gradient,) = torch.autograd.grad(looked, embedded)
    return results.logits[:, -1].detach(), torch.stack(results.attentions).detach(), gradient


logits, weights, gradient = measured("fused_attn")
for layer, by_head in enumerate(weights[:, 0, :, -1].unbind()):
    print(f"layer {layer}: the last token of the first sentence looks most at tokens {by_head.argmax(-1).tolist()}, one for each head")


# %% The same from eager attention. What stands in rows of padding is used by nothing, and differs: zeros here, even weights there.
right_logits, right_weights, right_gradient = measured("eager")
rows = padding.bool()
torch.testing.assert_close(logits, right_logits, rtol=1e-4, atol=1e-4)
torch.testing.assert_close(weights.transpose(2, 3)[:, rows], right_weights.transpose(2, 3)[:, rows], rtol=1e-4, atol=1e-5)
torch.testing.assert_close(gradient, right_gradient, rtol=1e-3, atol=1e-4)
assert weights[:, 0, :, :8].eq(0).all()

# %% Generating is as without weights; both caches work.
options = {"attention_mask": padding, "max_new_tokens": 8, "do_sample": False, "pad_token_id": 0}
texts = []
for implementation in ("eager", "fused_attn"):
    model.set_attn_implementation(implementation)
    texts.append(model.generate(tokens, **options))
assert torch.equal(*texts)
print(f"weights agree to {(weights - right_weights).transpose(2, 3)[:, rows].abs().max():.1e}, generated tokens are the same")
