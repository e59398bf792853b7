"""Models of the transformers package on fused_attn: small random ones of many families, and a pretrained encoder, against its own eager attention."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from torch import Tensor

from fused_attn.cli.encoder import MODEL_PACKAGE, model_folder
from fused_attn.integrations.transformers import NAME, models, register, unregister
from fused_attn.integrations.transformers import attention as module
from fused_attn.integrations.transformers.mask_tensor import RowMask
from fused_attn_bench.measure import peak_bytes
from tests.transformers_families import FAMILIES, VOCABULARY, evaluated, reference

pytestmark = [
    pytest.mark.peers,
    pytest.mark.skipif(find_spec("transformers") is None, reason="transformers is not installed (make demo installs it)"),
]
REFERENCE = "in_plain_torch"
GENERATING = [name for name, family in FAMILIES.items() if family.generates]
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    import transformers

    transformers.utils.logging.set_verbosity_error()
    register()
    transformers.AttentionInterface.register(REFERENCE, reference)
    transformers.AttentionMaskInterface.register(REFERENCE, transformers.masking_utils.sdpa_mask)
    yield
    unregister()


@cache
def exact(name: str) -> dict[str, Tensor]:
    """What the family's model gives in float64."""
    return evaluated(FAMILIES[name], FAMILIES[name].model(REFERENCE).double(), torch.float64)


def hold(got: dict[str, Tensor], plain: dict[str, Tensor], right: dict[str, Tensor]) -> None:
    """Errors, as norms of tensors, are at most twice those of the package's eager attention, and a rounding of the result."""
    assert got.keys() == plain.keys() == right.keys()
    usual = torch.stack([t.norm() for name, t in right.items() if name.startswith("d")]).median()
    for name, truth in right.items():
        error, allowed = ((results[name].double() - truth).norm() for results in (got, plain))
        scale = torch.maximum(truth.norm(), usual) if name.startswith("d") else truth.norm()
        assert error <= 2 * allowed + torch.finfo(got[name].dtype).eps * scale, (name, error, allowed)


def joined(results: dict[str, Tensor]) -> dict[str, Tensor]:
    """The gradients as one vector: in bfloat16 those of single parameters are the noise of a few kinks."""
    rest = {name: t for name, t in results.items() if not name.startswith("d")}
    return rest | {"d": torch.cat([t.flatten() for name, t in sorted(results.items()) if name.startswith("d")])}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", FAMILIES)
def test_outputs_weights_and_gradients(name: str, dtype: torch.dtype) -> None:
    family = FAMILIES[name]
    if family.chooses and dtype == torch.bfloat16:
        pytest.skip("the model chooses experts or keys by numbers that bfloat16 rounds together")
    model = family.model().to(dtype)
    plain = evaluated(family, model, dtype)
    model.set_attn_implementation(NAME)
    got, right = evaluated(family, model, dtype), exact(name)
    weights = [key for key in right if "attentions" in key]
    assert len(weights) == (6 if "decoder_layers" in family.options or name == "t5" else 4 if name == "clip" else 2)
    if dtype == torch.bfloat16:
        got, plain, right = joined(got), joined(plain), joined(right)
    hold(got, plain, right)


@pytest.mark.parametrize("cache", [None, "static"], ids=["dynamic", "static"])
@pytest.mark.parametrize("name", GENERATING)
def test_generating(name: str, cache: str | None) -> None:
    """Left padding included; the scores of every step agree, not only the largest."""
    family = FAMILIES[name]
    inputs = {key: t for key, t in family.inputs().items() if not key.startswith("decoder")}
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    model, found = family.model(), []
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        found.append(model.generate(**inputs, **options, output_scores=True, return_dict_in_generate=True))
    assert torch.equal(found[0].sequences, found[1].sequences)
    for a, b in zip(found[0].scores, found[1].scores, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", FAMILIES)
def test_compiled(name: str) -> None:
    """In one graph, forward and backward: inductor for two, aot_eager for the rest."""
    family = FAMILIES[name]
    model = family.model(NAME)
    if "num_experts_per_tok" in family.options:
        model.set_experts_implementation("batched_mm")  # the plain one branches on values
    want = evaluated(family, model, torch.float32)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="inductor" if name in ("bert", "llama") else "aot_eager")
    got = evaluated(family, model, torch.float32, compiled)
    for name, right in want.items():
        torch.testing.assert_close(
            got[name], right, rtol=1e-3, atol=1e-4 * (1 + right.abs().max().item()), msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", ["llama", "gemma3", "llama4"])
def test_a_compiled_step_of_a_static_cache(name: str) -> None:
    """``generate`` makes masks outside and hands them to a graph of one step, which is compiled once."""
    family = FAMILIES[name]
    model, options = family.model(NAME), {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    want = model.generate(**family.inputs(), **options)
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model.forward = torch.compile(model.forward, fullgraph=True, backend="aot_eager")
    assert torch.equal(model.generate(**family.inputs(), **options), want)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 3


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_exported(name: str) -> None:
    family = FAMILIES[name]
    model, inputs = family.model(NAME), family.inputs() | ({"use_cache": False} if name == "llama" else {})
    program = torch.export.export(model, (), inputs, strict=False)
    assert any("fused_attn" in str(node.target) for node in program.graph.nodes)
    rows = family.padded.bool()
    torch.testing.assert_close(program.module()(**inputs)[0][rows], model(**inputs)[0][rows], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors", "reentrant"])
@pytest.mark.parametrize("name", ["gemma2", "t5"])
def test_checkpointing(name: str, reentrant: bool) -> None:
    family = FAMILIES[name]
    model = family.model(NAME).train()
    for part in model.modules():
        if isinstance(part, torch.nn.Dropout):
            part.p = 0.0

    def gradients() -> dict[str, Tensor]:
        model.zero_grad()
        model(**family.inputs(), use_cache=False)[0].square().sum().backward()
        return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}

    for part in model.modules():
        if hasattr(part, "attention_dropout"):
            part.attention_dropout = 0.0
        if hasattr(part, "dropout") and isinstance(part.dropout, float):
            part.dropout = 0.0
    want = gradients()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    got = gradients()
    assert got.keys() == want.keys()
    for key in want:
        torch.testing.assert_close(got[key], want[key])


@pytest.mark.parametrize("name", ["llama", "mistral", "llama4"])
def test_packed_sequences(name: str) -> None:
    """Position ids that start again are documents: each gives what it gives alone."""
    model = FAMILIES[name].model(NAME)
    tokens = torch.randint(3, VOCABULARY, (1, 12))
    positions = torch.cat([torch.arange(5), torch.arange(7)])[None]
    together = model(tokens, position_ids=positions, use_cache=False).logits
    alone = [model(part, use_cache=False).logits for part in (tokens[:, :5], tokens[:, 5:])]
    torch.testing.assert_close(together, torch.cat(alone, 1), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["bool", "float"])
def test_masks_of_ones_own(kind: str) -> None:
    family, generator = FAMILIES["llama"], torch.Generator().manual_seed(4)
    keep = (torch.rand(2, 1, 9, 9, generator=generator) > 0.4) | torch.eye(9, dtype=torch.bool)
    added = torch.zeros(keep.shape).masked_fill(~keep, torch.finfo(torch.float32).min)
    model, found = family.model(), []
    for implementation, mask in (("eager", added), (NAME, keep if kind == "bool" else added)):
        model.set_attn_implementation(implementation)
        found.append(model(family.tokens, attention_mask=mask).logits)
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-4)


def test_beams_and_weights_while_generating() -> None:
    family, found = FAMILIES["gpt2"], []
    model = family.model()
    for implementation in ("eager", NAME):
        model.set_attn_implementation(implementation)
        found.append(
            model.generate(
                **family.inputs(), max_new_tokens=4, num_beams=3, do_sample=False, output_attentions=True, return_dict_in_generate=True
            )
        )
    assert torch.equal(found[0].sequences, found[1].sequences)
    assert [t.shape for step in found[1].attentions for t in step] == [t.shape for step in found[0].attentions for t in step]


def test_new_models_take_the_name() -> None:
    import transformers

    config = transformers.BertConfig(**FAMILIES["bert"].options)
    model = transformers.AutoModel.from_config(config, attn_implementation=NAME)
    assert model.config._attn_implementation == NAME


def test_the_configuration_refuses_weights_for_all_calls() -> None:
    """The package's own rule, whatever the implementation but eager; migrating.md says so."""
    model = FAMILIES["bert"].model(NAME)
    with pytest.raises(ValueError, match="output_attentions"):
        model.config.output_attentions = True


def test_without_the_mask_function_padding_would_count() -> None:
    """What registering the attention alone would do: the masks matter in these models, and nothing warns."""
    import transformers

    family = FAMILIES["bert"]
    model = family.model(NAME)
    right = family.counted(model(**family.inputs()))
    transformers.AttentionMaskInterface._global_mapping.pop(NAME)
    wrong = family.counted(model(**family.inputs()))
    assert max((wrong[name] - right[name]).abs().max().item() for name in right) > 0.1


@pytest.mark.parametrize(
    ("architecture", "sizes"),
    [
        ("Bloom", {"hidden_size": 32, "n_layer": 2, "n_head": 4}),
        ("XGLM", {"d_model": 32, "ffn_dim": 32, "num_layers": 2, "attention_heads": 4}),
        ("MPNet", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}),
        ("Splinter", {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 32}),
        ("SwitchTransformersEncoder", {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 2, "num_heads": 4, "num_experts": 2}),
    ],
)
def test_models_that_add_their_masks_themselves(architecture: str, sizes: dict[str, Any]) -> None:
    """Built with the name, they would take a bool mask, or None for a causal one, without a word."""
    import transformers

    config = getattr(transformers, f"{architecture.removesuffix('Encoder')}Config")(vocab_size=VOCABULARY, **sizes)
    family, found = FAMILIES["bert"], []
    for implementation in ("eager", NAME):
        torch.manual_seed(0)
        model = getattr(transformers, f"{architecture}Model")._from_config(config, attn_implementation=implementation).eval()
        found += [model(family.tokens)[0], model(family.tokens, attention_mask=family.padded)[0]]
    for a, b in zip(found[:2], found[2:], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("window", [4, 16], ids=["window", "window of everything"])
def test_models_that_compute_with_their_mask(window: int) -> None:
    """DeepSeek V4 puts its mask together with a bias for compressed keys, and then asks the interface."""
    import transformers

    sizes = {"vocab_size": VOCABULARY, "hidden_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4, "head_dim": 8,
             "n_routed_experts": 4, "num_experts_per_tok": 2, "q_lora_rank": 8, "o_lora_rank": 8, "o_groups": 2, "qk_rope_head_dim": 4, "index_topk": 2,
             "index_n_heads": 2, "index_head_dim": 8, "max_position_embeddings": 64, "pad_token_id": 0, "num_key_value_heads": 1}  # fmt: skip
    kinds = ["compressed_sparse_attention", "sliding_attention"]
    rates = {"compressed_sparse_attention": 4, "heavily_compressed_attention": 4}
    config = transformers.DeepseekV4Config(**sizes, layer_types=kinds, compress_rates=rates, sliding_window=window)
    model = transformers.DeepseekV4ForCausalLM._from_config(config, attn_implementation="eager").eval()
    model.set_experts_implementation("eager")
    tokens = torch.randint(3, VOCABULARY, (2, 8))
    want = model(tokens, use_cache=False).logits
    model.set_attn_implementation(NAME)
    torch.testing.assert_close(model(tokens, use_cache=False).logits, want, rtol=1e-4, atol=1e-5)


def test_a_users_configuration_is_looked_up_as_the_packages() -> None:
    import transformers

    class Mine(transformers.BloomConfig):
        """Of a module of the user's own."""

    leaves = models.leaves_masks_to_attention
    assert leaves(transformers.NllbMoeConfig)  # nothing of it is loaded, and nothing kept
    from transformers import NllbMoeForConditionalGeneration as model

    transformers.BloomModel  # noqa: B018 - loads it
    assert not leaves(model.config_class) and not leaves(Mine) and leaves(transformers.LlamaConfig)


def test_weights_are_computed_when_asked_for_only(monkeypatch: pytest.MonkeyPatch) -> None:
    requests: list[bool] = []
    real = module.attention
    monkeypatch.setattr(module, "attention", lambda *a, **k: requests.append(k["return_aux"].probs) or real(*a, **k))
    model = FAMILIES["gpt2"].model(NAME)
    assert model(**FAMILIES["gpt2"].inputs()).attentions is None
    assert len(model(**FAMILIES["gpt2"].inputs(), output_attentions=True).attentions) == 2
    assert requests == [False, False, True, True]


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_memory_grows_with_the_length(name: str) -> None:
    """Left padding and windows included: never a byte per pair, of which there are many times more than anything else."""
    length, model = 4096, FAMILIES[name].model(NAME)
    rotary = {"max_position_embeddings": length}
    vars(model.config).update(rotary)
    tokens, padding = torch.randint(3, VOCABULARY, (1, length)), torch.ones(1, length, dtype=torch.int64)
    padding[0, :100] = 0
    with torch.no_grad():
        _, peak = peak_bytes(lambda: model.model(tokens, attention_mask=padding, use_cache=False), CPU)
    assert peak < length * length / 2


@pytest.mark.parametrize("name", ["mistral", "llama4", "gemma3"])
def test_masks_are_made_once_per_forward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[Any] = []
    real = module.Attend.__call__
    monkeypatch.setattr(
        module.Attend, "__call__", lambda self, m, q, k, v, mask, **o: masks.append(mask) or real(self, m, q, k, v, mask, **o)
    )
    FAMILIES[name].model(NAME)(**FAMILIES[name].inputs())
    assert len(masks) == 2 and all(isinstance(mask, RowMask) for mask in masks)
    assert len({id(mask) for mask in masks}) <= (1 if name == "mistral" else 2)


@pytest.mark.skipif(find_spec(MODEL_PACKAGE) is None, reason=f"{MODEL_PACKAGE} is not installed (make demo installs it)")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def test_a_pretrained_encoder(dtype: torch.dtype) -> None:
    import transformers

    folder = model_folder()
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, local_files_only=True)
    batch = dict(
        tokenizer(["A short one.", "Another sentence, which is quite a bit longer than the first."], padding=True, return_tensors="pt")
    )
    model = transformers.AutoModel.from_pretrained(folder, local_files_only=True).eval()
    rows = batch["attention_mask"].bool()

    def run(model: Any, implementation: str) -> list[Tensor]:
        model.set_attn_implementation(implementation)
        with torch.no_grad():
            results = model(**batch, output_attentions=True)
        return [results.last_hidden_state[rows], *(p.transpose(1, 2)[rows] for p in results.attentions)]

    right = run(copy.deepcopy(model).double(), REFERENCE)
    model = model.to(dtype)
    for got, plain, truth in zip(run(model, NAME), run(model, "eager"), right, strict=True):
        error, allowed = ((t.double() - truth).norm() for t in (got, plain))
        assert error <= 2 * allowed + torch.finfo(dtype).eps * truth.norm()


def test_unknown_backends_are_found_when_registered() -> None:
    with pytest.raises(ValueError, match=r"backend must be 'auto' or one of .*; got 'tpu'"):
        register("tpu")
