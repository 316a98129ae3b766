"""Hugging Face models, small and with random weights, on fastseq's attention: what "eager" computes, to rounding."""

from __future__ import annotations

import importlib.util
import re
import sys
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import fastseq
from fastseq.testing import assert_all_close_to_truth

if importlib.util.find_spec("transformers") is None:
    pytest.skip("needs transformers", allow_module_level=True)

import transformers  # noqa: E402
from transformers import AttentionInterface, AttentionMaskInterface, masking_utils  # noqa: E402

from fastseq.integrations import transformers as integration  # noqa: E402
from fastseq.integrations import transformers_masks as masks  # noqa: E402

LAYERS, BATCH, TIME, VOCABULARY = 2, 3, 11, 50
WIDTHS = {"hidden_size": 32, "num_hidden_layers": LAYERS, "num_attention_heads": 4, "intermediate_size": 48}
SIZES = {"vocab_size": VOCABULARY, **WIDTHS}
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}
DECODER = {**SIZES, **SPECIAL, "num_key_value_heads": 2, "head_dim": 8}


class Case(NamedTuple):
    """A model class and its configuration; ``dropout``: what the configuration calls that of the weights."""

    model: str
    config: Any
    dropout: str = ""
    attentions: int = LAYERS
    torch: str = "sdpa"  # whose error bounds ours: torch's fused attention, where it can run the model


def config(name: str, **options: Any) -> Any:
    return getattr(transformers, name)(**options)


CASES = {
    "bert": Case(
        "BertForMaskedLM",
        lambda: config("BertConfig", **SIZES, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0),
        "attention_probs_dropout_prob",
    ),
    "distilbert": Case(
        "DistilBertForMaskedLM",
        lambda: config(
            "DistilBertConfig", vocab_size=VOCABULARY, dim=32, n_layers=LAYERS, n_heads=4, hidden_dim=48, dropout=0.0,
            attention_dropout=0.0,
        ),
        "attention_dropout",
    ),
    "gpt2": Case(
        "GPT2LMHeadModel",
        lambda: config(
            "GPT2Config", vocab_size=VOCABULARY, n_embd=32, n_layer=LAYERS, n_head=4, n_positions=64, attn_pdrop=0.0,
            resid_pdrop=0.0, embd_pdrop=0.0, **SPECIAL,
        ),
        "attn_pdrop",
    ),
    "vit": Case(
        "ViTForImageClassification",
        lambda: config(
            "ViTConfig", **WIDTHS, image_size=12, patch_size=4, num_labels=5, hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        ),
        "attention_probs_dropout_prob",
    ),
    "t5": Case(
        "T5ForConditionalGeneration",
        lambda: config(
            "T5Config", vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=48, num_layers=LAYERS, num_heads=4, dropout_rate=0.0,
            relative_attention_num_buckets=8, relative_attention_max_distance=10, decoder_start_token_id=0, pad_token_id=0,
            eos_token_id=None,
        ),
        attentions=3 * LAYERS,
    ),
    "llama": Case("LlamaForCausalLM", lambda: config("LlamaConfig", **DECODER), "attention_dropout"),
    "mistral": Case("MistralForCausalLM", lambda: config("MistralConfig", **DECODER, sliding_window=4), "attention_dropout"),
    "gemma2": Case(
        "Gemma2ForCausalLM",
        lambda: config(
            "Gemma2Config", **DECODER, sliding_window=4, attn_logit_softcapping=0.5, final_logit_softcapping=5.0,
            query_pre_attn_scalar=8, layer_types=["sliding_attention", "full_attention"],
        ),
        "attention_dropout",
        torch="eager",
    ),
    "gpt_oss": Case(
        "GptOssForCausalLM",
        lambda: config(
            "GptOssConfig", **DECODER, sliding_window=4, num_local_experts=2, num_experts_per_tok=1,
            layer_types=["sliding_attention", "full_attention"],
        ),
        "attention_dropout",
        torch="eager",
    ),
}  # fmt: skip
DECODERS = ("gpt2", "llama", "mistral", "gemma2", "gpt_oss")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The calls of fastseq's attention that the integration makes: their options, or ``short`` of those that need none."""
    made: list[dict[str, Any]] = []

    def counted(function, short):
        def counting(*args, **kwargs):
            result = function(*args, **kwargs)
            if result is not None:
                made.append({"short": True} if short else kwargs)
            return result

        return counting

    monkeypatch.setattr(integration, "fused_attention", counted(integration.fused_attention, False))
    monkeypatch.setattr(integration, "attention_output", counted(integration.attention_output, True))
    own = integration.eager

    def shortest(gradients):
        known = own.shortest.get(gradients)
        return known and (counted(known[0], True), known[1])

    whole = counted(own.scaled_dot_product_attention, True)
    eager = SimpleNamespace(scaled_dot_product_attention=whole, shortest=SimpleNamespace(get=shortest))
    monkeypatch.setattr(integration, "eager", eager)
    monkeypatch.setattr(integration.masks, "SHORT", 0)  # as long sequences are treated
    integration.register()
    return made


@pytest.fixture(autouse=True)
def finite_eager_masks(monkeypatch):
    """The lowest fp64 number is -inf in the fp32 softmax of many eager functions, and a row that sees nothing then NaN."""

    def eager_mask(*args, **kwargs):
        mask = masking_utils.eager_mask(*args, **kwargs)
        return None if mask is None else mask.clamp(min=torch.finfo(torch.float32).min)

    monkeypatch.setitem(AttentionMaskInterface._global_mapping, "eager", eager_mask)


def model_of(case: str, implementation: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    """In training mode: dropout is 0 unless ``changes`` says otherwise."""
    torch.manual_seed(0)
    configuration = CASES[case].config()
    for name, value in changes.items():
        setattr(configuration, name, value)
    configuration._attn_implementation = implementation
    configuration._experts_implementation = "eager"
    model = getattr(transformers, CASES[case].model)(configuration)
    with torch.no_grad():
        for parameter in model.parameters():  # attention that matters: far from uniform weights, sinks and biases that are not 0
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return model.to(dtype).train()


def padding_of(padding: str, batch: int = BATCH, time: int = TIME) -> Tensor | None:
    """[B, T] of 0 and 1, as tokenizers give it."""
    seen = torch.ones(batch, time, dtype=torch.long)
    if padding == "none":
        return None
    for row in range(1, batch):
        place = slice(time - 3 * row, time) if padding == "right" else slice(0, 3 * row)
        seen[row, place] = 0
    return seen


def inputs_of(case: str, padding: str) -> dict[str, Any]:
    torch.manual_seed(1)
    if case == "vit":
        return {"pixel_values": torch.randn(BATCH, 3, 12, 12)}
    given: dict[str, Any] = {"input_ids": torch.randint(1, VOCABULARY, (BATCH, TIME))}
    if case == "t5":
        given["decoder_input_ids"] = torch.randint(1, VOCABULARY, (BATCH, TIME - 2))
    seen = padding_of(padding)
    return given if seen is None else {**given, "attention_mask": seen}


def valid_rows(case: str, given: dict[str, Any], rows: Tensor) -> Tensor:
    """[B, T, ..] of a decoder without what padded queries give: eager averages values there, of which no model makes use."""
    seen = given.get("attention_mask")
    return rows if seen is None or case == "t5" else rows[seen.bool()]


def outcome(case: str, model: Any, given: dict[str, Any]) -> dict[str, Tensor]:
    """Logits, and the gradient of every parameter."""
    given = {name: t.to(model.dtype) if name == "pixel_values" else t for name, t in given.items()}
    logits = valid_rows(case, given, model(**given).logits)
    generator = torch.Generator().manual_seed(2)
    (logits * torch.randn(logits.shape, generator=generator, dtype=torch.float64).to(logits.dtype)).sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    for name in found:
        if re.search(r"k\w*\.bias$", name):  # 0 but for rounding, which the gradient of the values' bias gives a scale
            beside = name.replace("key", "value").replace("k_", "v_")
            assert beside != name
            found[name] = torch.cat((found[name], found[beside]))
    return {"logits": logits.detach(), **found}


PADDED = [(case, padding) for case in CASES for padding in ("none", "right", "left") if case != "vit" or padding == "none"]


@pytest.mark.parametrize("case, padding", PADDED)
def test_logits_and_gradients(case, padding, calls):
    """Some models round within their norms to fp32 even when in fp64; the bound is as wide as torch's own error shows."""
    given = inputs_of(case, padding)
    truth = outcome(case, model_of(case, "eager", torch.float64), given)
    theirs = outcome(case, model_of(case, CASES[case].torch), given)
    assert not calls
    ours = outcome(case, model_of(case, "fastseq"), given)
    assert len(calls) == CASES[case].attentions
    assert_all_close_to_truth(ours, theirs, truth)


@pytest.mark.parametrize("case, padding", [pair for pair in PADDED if pair[1] != "left"])
def test_short_sequences_go_the_short_way(case, padding, calls, monkeypatch):
    """What "sdpa" can do is called without a detour where sequences are short, with the same result."""
    monkeypatch.setattr(integration.masks, "SHORT", 256 * 256)
    given = inputs_of(case, padding)
    truth = outcome(case, model_of(case, "eager", torch.float64), given)
    theirs = outcome(case, model_of(case, CASES[case].torch), given)
    ours = outcome(case, model_of(case, "fastseq"), given)
    assert len(calls) == CASES[case].attentions
    assert all("short" in call for call in calls) or case in ("gemma2", "gpt_oss")  # softcap, sinks
    assert_all_close_to_truth(ours, theirs, truth)


ENCODER_DECODER = {"d_model": 16, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16}
ENCODER_DECODER |= {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}


def informer() -> tuple[Any, dict[str, Any]]:
    past, future = torch.rand(BATCH, 9), torch.rand(BATCH, 6)
    given = {"past_values": past, "past_time_features": torch.randn(BATCH, 9, 1), "past_observed_mask": torch.ones_like(past)}
    given |= {"future_values": future, "future_time_features": torch.randn(BATCH, 6, 1)}
    sizes = {"prediction_length": 6, "context_length": 8, "lags_sequence": [1], "num_time_features": 1}
    return transformers.InformerModel(config("InformerConfig", **ENCODER_DECODER, **sizes)), given


def pegasus_x() -> tuple[Any, dict[str, Any]]:
    source, target = torch.randint(1, VOCABULARY, (BATCH, 16)), torch.randint(1, VOCABULARY, (BATCH, 7))
    sizes = {"vocab_size": VOCABULARY, "encoder_attention_heads": 2, "decoder_attention_heads": 2}
    configuration = config("PegasusXConfig", **ENCODER_DECODER, **sizes, num_global_tokens=2, block_size=4)
    return transformers.PegasusXModel(configuration), {"input_ids": source, "decoder_input_ids": target}


@pytest.mark.parametrize("short", [0, 256 * 256])
@pytest.mark.parametrize("build", [informer, pegasus_x])
def test_models_that_do_not_know_sdpa(build, short, monkeypatch):
    """The mask of a causal decoder is added to their own scores (Informer), or says what their modules do not (Pegasus-X)."""
    monkeypatch.setattr(integration.masks, "SHORT", short)

    def outputs(implementation: str, dtype: torch.dtype) -> dict[str, Tensor]:
        torch.manual_seed(0)
        model, given = build()
        model.set_attn_implementation(implementation)
        given = {name: t.to(dtype) if t.is_floating_point() else t for name, t in given.items()}
        torch.manual_seed(1)  # Informer draws the keys that it looks at
        found = model.to(dtype).train()(**given, use_cache=False).last_hidden_state
        generator = torch.Generator().manual_seed(2)
        (found * torch.randn(found.shape, generator=generator, dtype=torch.float64).to(dtype)).sum().backward()
        gradients = {name: p.grad for name, p in model.decoder.named_parameters() if p.grad is not None}
        return {"output": found.detach(), **{name: g for name, g in gradients.items() if not name.endswith("k_proj.bias")}}  # 0

    truth, theirs = outputs("eager", torch.float64), outputs("eager", torch.float32)
    assert_all_close_to_truth(outputs("fastseq", torch.float32), theirs, truth)


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("case", ["bert", "gpt2", "t5"])
def test_dropout_in_training(case, padding):
    """The kernels drop what the reference drops: the bits of a seed are defined."""
    given, results = inputs_of(case, padding), []
    for backend in ("auto", "reference"):
        model = model_of(case, "fastseq").train()
        for module in model.modules():
            for name in ("p", "dropout", "attention_dropout"):
                if isinstance(getattr(module, name, None), float):
                    setattr(module, name, 0.3)
        torch.manual_seed(5)
        with fastseq.use_backend(backend):
            results.append(model(**given).logits)
    torch.testing.assert_close(*(valid_rows(case, given, logits) for logits in results))


@pytest.mark.parametrize("case", CASES)
def test_attention_outputs(case):
    """The weights of every head in every layer, where the query is not padding; asked for, and only then."""
    given = inputs_of(case, "none" if case == "vit" else "left")
    model = model_of(case, "fastseq").eval()
    with torch.no_grad():
        found = [
            m(**{n: t.to(m.dtype) if n == "pixel_values" else t for n, t in given.items()}, output_attentions=True)
            for m in (model, model_of(case, "eager").eval(), model_of(case, "eager", torch.float64).eval())
        ]
        assert model(**given).get("attentions") is None
    names = ("encoder_attentions", "decoder_attentions", "cross_attentions") if case == "t5" else ("attentions",)
    results: list[dict[str, Tensor]] = [{}, {}, {}]
    for name in names:
        for result, output in zip(results, found, strict=True):
            assert len(output[name]) == LAYERS
            for layer, weights in enumerate(output[name]):
                result[f"{name} {layer}"] = valid_rows(case, given, weights.transpose(1, 2))
    assert_all_close_to_truth(*results)


def test_gradient_through_attention_outputs():
    given = inputs_of("bert", "right")
    results = []
    for implementation, dtype in (("fastseq", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        model = model_of("bert", implementation, dtype)
        output = model(**given, output_attentions=True)
        sum((weights * weights).sum() for weights in output.attentions).backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None and "query" in name})
    assert len(results[0]) == 2 * LAYERS
    assert_all_close_to_truth(*results)


@pytest.mark.parametrize("case", [name for name in CASES if CASES[name].dropout])
def test_dropout_is_of_training_only(case):
    model = model_of(case, "fastseq", **{CASES[case].dropout: 0.5})
    given = inputs_of(case, "none")
    with torch.no_grad():
        dropped = torch.cat([(w == 0).flatten() for w in model(**given, output_attentions=True).attentions])
        kept = torch.cat([(w == 0).flatten() for w in model.eval()(**given, output_attentions=True).attentions])
    of_mask = kept.float().mean()
    expected = of_mask + 0.5 * (1 - of_mask)
    assert abs(dropped.float().mean() - expected) < 0.05
    assert torch.equal(dropped & kept, kept)


@pytest.mark.parametrize("case", [*DECODERS, "t5"])
def test_generation(case, calls):
    """Greedy, through the cache, prompts padded on the left: token for token. In fp64, so that no rounding decides."""
    given = inputs_of(case, "left")
    given.pop("decoder_input_ids", None)
    options = {"max_new_tokens": 9, "min_new_tokens": 9, "do_sample": False}
    eager = model_of(case, "eager", torch.float64).eval().generate(**given, **options)
    assert not calls
    ours = model_of(case, "fastseq", torch.float64).eval().generate(**given, **options)
    assert torch.equal(ours, eager)
    assert len(calls) == LAYERS * 9 if case != "t5" else LAYERS * (1 + 2 * 9)
    assert len(set(ours[:, -9:].flatten().tolist())) > 1


@pytest.mark.parametrize("cache", ["static", "offloaded"])
@pytest.mark.parametrize("padding", ["none", "left"])
def test_generation_with_another_cache(cache, padding, calls):
    given = inputs_of("llama", padding)
    options = {"max_new_tokens": 5, "do_sample": False}
    eager = model_of("llama", "eager", torch.float64).eval().generate(**given, **options)
    if cache == "static":
        options["cache_implementation"] = cache
    else:
        options["past_key_values"] = transformers.DynamicCache()  # without a config every layer keeps all of its keys
    assert torch.equal(model_of("llama", "fastseq", torch.float64).eval().generate(**given, **options), eager)
    assert len(calls) == LAYERS * 5


@pytest.mark.parametrize("padding", ["none", "left", "right"])
@pytest.mark.parametrize("case", DECODERS)
def test_prefill_in_pieces(case, padding, calls):
    """Several queries behind a cache: their mask is a band with an offset, and has no elements."""
    given = inputs_of(case, padding)
    seen = given.get("attention_mask")
    results = []
    for implementation, dtype in (("fastseq", torch.float32), ("eager", torch.float32), ("eager", torch.float64)):
        model = model_of(case, implementation, dtype).eval()
        cache = transformers.DynamicCache(config=model.config)
        rows = []
        with torch.no_grad():
            for begin, end in ((0, 5), (5, 9), (9, TIME)):
                mask = None if seen is None else seen[:, :end]
                ids = given["input_ids"][:, begin:end]
                rows.append(model(input_ids=ids, attention_mask=mask, past_key_values=cache).logits)
        results.append({"logits": valid_rows(case, given, torch.cat(rows, 1))})
    assert_all_close_to_truth(*results)
    assert any(call.get("offset") for call in calls)
    assert all(call.get("mask") is None or call["attn_mask"].shape[2] == 1 for call in calls)


@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("case", ["llama", "gemma2"])
def test_documents_in_one_row(case, weights, calls):
    """Positions that start again separate texts; each is a sequence of a packed call, unless weights are asked for."""
    positions = torch.tensor([[*range(4), *range(7)], [*range(TIME)], [*range(1), *range(8), *range(2)]])
    given = {"input_ids": inputs_of(case, "none")["input_ids"], "position_ids": positions}
    given |= {"output_attentions": weights, "use_cache": False}
    truth = outcome(case, model_of(case, "eager", torch.float64), given)
    theirs = outcome(case, model_of(case, "eager" if weights else CASES[case].torch), given)
    assert_all_close_to_truth(outcome(case, model_of(case, "fastseq"), given), theirs, truth)
    assert len(calls) == LAYERS
    for call in calls:
        if weights:
            assert call["attn_mask"].shape == (BATCH, 1, TIME, TIME)
        else:
            assert call["cu_seqlens_q"].tolist() == [0, 4, 11, 22, 23, 31, 33] and call["max_seqlen_q"] == 11


def test_documents_and_position_bias():
    text = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
    within = (masking_utils.causal_mask_function, torch.zeros(2, 11, dtype=torch.long), text)
    mask = masks.mask(2, 11, 11, mask_function=masking_utils.packed_sequence_compatibility_function(*within))
    q, k, v = torch.randn(3, 2, 2, 11, 8)
    bias = torch.randn(1, 2, 11, 11)
    out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, position_bias=bias)
    seen = (text[:, None, :, None] == text[:, None, None, :]).tril()
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, bias.masked_fill(~seen, -torch.inf))
    torch.testing.assert_close(out, expected.transpose(1, 2))


def test_which_backend_ran():
    model = model_of("bert", "eager").eval()
    model.set_attn_implementation("fastseq")
    told = fastseq.explain(model, **inputs_of("bert", "right"))
    assert [query.op for query, _, _ in told.calls] == ["attention"]
    assert "k_lengths" in str(told)


@pytest.mark.parametrize("padding", ["none", "right"])
def test_compiled(padding):
    """Masks of a compiled model have elements; without padding it looks for texts in a row, as their number is unknown then."""
    given = {**inputs_of("llama", padding), "use_cache": False}
    model = model_of("llama", "fastseq").eval()
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        torch.testing.assert_close(compiled(**given).logits[0], model(**given).logits[0])


@pytest.mark.parametrize("padding", ["none", "left", "right", "documents"])
def test_compiled_layer(padding):
    """A region that is compiled alone gets the mask from outside."""
    if padding == "documents":
        text = torch.tensor([[0] * 4 + [1] * 7, [0] * 11])
        within = (masking_utils.causal_mask_function, torch.zeros(2, 11, dtype=torch.long), text)
        mask = masks.mask(2, 11, 11, mask_function=masking_utils.packed_sequence_compatibility_function(*within))
    else:
        seen = padding_of(padding, batch=2)
        function = masking_utils.sliding_window_causal_mask_function(3)
        mask = masks.mask(2, TIME, TIME, mask_function=function, attention_mask=None if seen is None else seen.bool())
    assert isinstance(mask, masks.BandMask)
    q, k, v = torch.randn(3, 2, 2, TIME, 8)
    module = torch.nn.Module()

    def layer(q, k, v, mask):
        return integration.attention(module, q, k, v, mask)[0]

    torch._dynamo.reset()
    found = torch.compile(layer, backend="aot_eager", fullgraph=True)(q, k, v, mask)
    assert mask.elements is None
    torch.testing.assert_close(found, layer(q, k, v, mask | False))


def test_gradient_checkpointing():
    given = inputs_of("gpt2", "right")
    expected = outcome("gpt2", model_of("gpt2", "fastseq"), given)
    model = model_of("gpt2", "fastseq")
    model.activation_checkpointing_enable()
    found = outcome("gpt2", model, given)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


FUNCTIONS = {
    "causal": masking_utils.causal_mask_function,
    "bidirectional": masking_utils.bidirectional_mask_function,
    "sliding": masking_utils.sliding_window_causal_mask_function(3),
    "sliding both ways": masking_utils.sliding_window_bidirectional_mask_function(2),
    "two causal windows": masking_utils.and_masks(
        masking_utils.sliding_window_causal_mask_function(5), masking_utils.sliding_window_causal_mask_function(3)
    ),
    "chunked": masking_utils.chunked_causal_mask_function(4, torch.tensor([0, 1, 2])),
}


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("padding", ["none", "right", "left"])
@pytest.mark.parametrize(
    "q_length, kv_length, q_offset, kv_offset",
    [(7, 7, 0, 0), (1, 7, 6, 0), (3, 7, 4, 0), (3, 5, 6, 4), (4, 9, 0, 0), (1, 9, 3, 0)],
)
def test_mask_says_what_sdpas_says(name, padding, q_length, kv_length, q_offset, kv_offset):
    seen = padding_of(padding, time=q_offset + q_length)
    seen = None if seen is None else seen.bool()
    causal = "causal" in name or name in ("sliding", "chunked")
    given = (BATCH, q_length, kv_length, q_offset, kv_offset, FUNCTIONS[name], seen)
    local = {"local_size": 4} if name == "chunked" else {}
    expected = masking_utils.sdpa_mask(*given, allow_is_causal_skip=False)
    mask = masks.mask(*given, allow_is_causal_skip=causal, allow_is_bidirectional_skip=not causal, **local)
    top_left = torch.ones(q_length, kv_length, dtype=torch.bool).tril()
    meant = top_left if causal and q_length > 1 else torch.ones_like(top_left)
    assert (mask is None) == torch.equal(expected, meant.expand_as(expected))
    if mask is None:
        return
    assert mask.shape == expected.shape and mask.dtype == torch.bool
    assert isinstance(mask, masks.BandMask) == (name != "chunked")
    parts = sum(t.numel() for t in (mask.keys, mask.lengths) if t is not None) if name != "chunked" else 0
    assert parts <= BATCH * kv_length
    assert torch.equal(mask | False, expected)
    asked = masks.mask(*given, allow_is_causal_skip=False, allow_is_bidirectional_skip=False)
    assert type(asked) is Tensor and torch.equal(asked, expected)


@pytest.mark.parametrize("name", ["causal", "bidirectional", "sliding"])
@pytest.mark.parametrize("padding", ["none", "ones", "right", "left"])
@pytest.mark.parametrize(
    "q_length, kv_length, q_offset, kv_offset", [(7, 7, 0, 0), (1, 7, 6, 0), (1, 7, 3, 0), (3, 7, 4, 0), (1, 5, 6, 2)]
)
def test_short_mask_is_sdpas(name, padding, q_length, kv_length, q_offset, kv_offset, monkeypatch):
    """Element for element, and None where that is None; a model that changes it changes nothing of the caller's."""
    monkeypatch.setattr(integration.masks, "SHORT", 256 * 256)
    time = kv_length + kv_offset
    seen = torch.ones(BATCH, time, dtype=torch.bool) if padding == "ones" else padding_of(padding, time=time)
    seen = None if seen is None else seen.bool()
    before = None if seen is None else seen.clone()
    given = (BATCH, q_length, kv_length, q_offset, kv_offset, FUNCTIONS[name], seen)
    skips = {"allow_is_causal_skip": name == "causal", "allow_is_bidirectional_skip": name == "bidirectional"}
    expected, found = masking_utils.sdpa_mask(*given, **skips), masks.mask(*given, **skips)
    assert (found is None) == (expected is None)
    if found is not None:
        assert type(found) is Tensor and torch.equal(found, expected)
        found.zero_()
    assert seen is None or torch.equal(seen, before)


def test_a_short_mask_takes_few_operations(monkeypatch):
    """As many as it has to: between the layers of a small model each costs more than the attention of a token."""
    monkeypatch.setattr(integration.masks, "SHORT", 256 * 256)
    ways = []
    monkeypatch.setattr(masking_utils, "sdpa_mask", lambda *args, **kwargs: ways.append(args))
    seen = padding_of("left", time=7).bool()
    for q_length, q_offset in ((1, 6), (7, 0)):
        for function in (FUNCTIONS["causal"], FUNCTIONS["bidirectional"]):
            masks.mask(BATCH, q_length, 7, q_offset, 0, function, seen, allow_is_bidirectional_skip=True)
            masks.mask(BATCH, q_length, 7, q_offset, 0, function, seen | True, allow_is_bidirectional_skip=True)
            masks.mask(BATCH, q_length, 7, q_offset, 0, function, None, allow_is_bidirectional_skip=True)
    assert not ways


def test_a_changed_mask_is_obeyed():
    """Elements that a model reads may be changed: from then on they are the mask."""
    seen = padding_of("right").bool()
    mask = masks.mask(BATCH, TIME, TIME, attention_mask=seen)
    assert isinstance(mask, masks.BandMask) and mask.elements is None
    q, k, v = torch.randn(3, BATCH, 2, TIME, 8)
    module = torch.nn.Module()
    plain, _ = integration.attention(module, q, k, v, mask)
    mask[:, :, 3] = False
    changed, _ = integration.attention(module, q, k, v, mask)
    assert not changed[:, 3].any() and plain[:, 3].any()
    rest = [i for i in range(TIME) if i != 3]
    torch.testing.assert_close(changed[:, rest], plain[:, rest])


@pytest.mark.parametrize("window", [None, 3, 5, 6])
@pytest.mark.parametrize("is_causal", [None, True, False])
@pytest.mark.parametrize("tq", [1, 6])
def test_without_a_mask(tq, is_causal, window):
    """Several queries: causal from the first key on, as the module says. One: at the last key."""
    q, k, v = torch.randn(BATCH, 4, tq, 8), *torch.randn(2, BATCH, 2, 6, 8)
    module = torch.nn.Module()
    module.is_causal = False
    distance = torch.arange(6) - torch.arange(6)[:, None]
    seen = torch.ones_like(distance, dtype=torch.bool)
    if window:
        seen = distance.abs() < window
    if is_causal:
        seen = seen & (distance <= 0)
    out, weights = integration.attention(module, q, k, v, None, is_causal=is_causal, sliding_window=window)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen[-tq:], enable_gqa=True)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    assert weights is None and out.is_contiguous()


@pytest.mark.parametrize("gradients", [False, True])
@pytest.mark.parametrize("masked", ["none", "bool", "added"])
@pytest.mark.parametrize("tq", [1, 6])
def test_a_window_that_hides_nothing_more_goes_the_short_way(tq, masked, gradients, monkeypatch):
    """Mistral and Gemma tell a window in every call: beside a mask that has it, and where the rows are no longer."""
    for name in ("attention_output", "fused_attention"):
        monkeypatch.setattr(integration, name, None)
    q, k, v = torch.randn(BATCH, 4, tq, 8), *torch.randn(2, BATCH, 2, 6, 8)
    given = [t.requires_grad_(gradients) for t in (q, k, v)]
    distance = torch.arange(6) - torch.arange(6)[:, None]
    seen = (distance <= 0) if masked == "none" else (distance <= 0) & (distance > -3)
    mask = None if masked == "none" else seen[-tq:].expand(BATCH, 1, -1, -1)
    if masked == "added":
        mask = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    window = 6 if masked == "none" else 3
    out, _ = integration.attention(torch.nn.Module(), *given, mask, scaling=0.4, is_causal=True, sliding_window=window)
    expected = torch.nn.functional.scaled_dot_product_attention(*given, seen[-tq:], scale=0.4, enable_gqa=True).transpose(1, 2)
    torch.testing.assert_close(out, expected)
    if gradients:
        found, wanted = (torch.autograd.grad(y.square().sum(), given) for y in (out, expected))
        torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("added", [False, True])
def test_mask_and_position_bias_of_a_token(added, monkeypatch):
    """A token of T5 beside a padded prompt goes the shortest way, and a row that sees nothing gives zeros."""
    monkeypatch.setattr(integration, "attention_output", None)
    q, (k, v) = torch.randn(BATCH, 2, 1, 8), torch.randn(2, BATCH, 2, 6, 8)
    mask, bias = torch.rand(BATCH, 1, 1, 6) > 0.4, torch.randn(1, 2, 1, 6)
    mask[0], mask[1:, ..., 2] = False, True
    lowest = torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)
    with torch.no_grad():
        out, _ = integration.attention(torch.nn.Module(), q, k, v, lowest if added else mask, position_bias=bias)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, lowest + bias).transpose(1, 2)
    torch.testing.assert_close(out[1:], expected[1:])
    assert not out[0].any()


def test_floating_mask_and_position_bias():
    """Both are added; a single query row set serves every sequence."""
    q, (k, v) = torch.randn(1, 2, 5, 8), torch.randn(2, BATCH, 2, 6, 8)
    added = torch.randn(BATCH, 1, 5, 6)
    bias = torch.randn(1, 2, 5, 6, requires_grad=True)
    out, weights = integration.attention(torch.nn.Module(), q, k, v, added, position_bias=bias, output_attentions=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q.expand(BATCH, -1, -1, -1), k, v, added + bias)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    torch.testing.assert_close(weights @ v, expected)
    (found,) = torch.autograd.grad(out.square().sum(), bias)
    (wanted,) = torch.autograd.grad(expected.square().sum(), bias)
    torch.testing.assert_close(found, wanted)


@pytest.mark.parametrize("masked", ["none", "bool", "band", "added"])
def test_keys_that_a_model_selects(masked):
    """Models that tell the implementations they do not know which keys a query sees (DeepSeek V3.2): the others are hidden."""
    q, k, v = torch.randn(3, BATCH, 2, TIME, 8)
    indices = torch.stack([torch.stack([torch.randperm(TIME)[:4] for _ in range(TIME)]) for _ in range(BATCH)])
    seen = torch.zeros(BATCH, 1, TIME, TIME, dtype=torch.bool).scatter(-1, indices[:, None], True)
    causal = torch.ones(TIME, TIME, dtype=torch.bool).tril().expand(BATCH, 1, TIME, TIME)
    mask = {
        "none": None,
        "bool": causal,
        "band": masks.mask(BATCH, TIME, TIME, attention_mask=padding_of("right").bool()),
        "added": torch.zeros(causal.shape).masked_fill(~causal, torch.finfo(torch.float32).min),
    }[masked]
    if masked == "band":
        assert isinstance(mask, masks.BandMask)
        causal = mask | False
    seen = seen if masked == "none" else seen & causal
    out, _ = integration.attention(torch.nn.Module(), q, k, v, mask, indices=indices.int(), is_causal=True)
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2)
    rows = seen.any(-1)[:, 0]  # a mask that is added shows all keys where it hides all
    torch.testing.assert_close(out[rows], expected[rows])


def test_blocks_of_keys_that_a_model_selects():
    """The module knows what its blocks are (MiniMax)."""

    class Indexer:
        def build_block_mask(self, block_indices, mask, keys, dtype, device, position_ids):
            blocks = torch.zeros(*block_indices.shape[:3], -(-keys // 4), dtype=torch.bool).scatter(-1, block_indices, True)
            seen = blocks.repeat_interleave(4, -1)[..., :keys].repeat_interleave(2, 1)
            seen = seen & (torch.arange(keys) <= position_ids[:, None, :, None] if mask is None else mask)
            return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)

    module = torch.nn.Module()
    module.indexer = Indexer()
    q, k, v = torch.randn(BATCH, 4, 3, 8), *torch.randn(2, BATCH, 4, TIME, 8)
    block_indices = torch.tensor([0, 2]).expand(BATCH, 2, 3, 2)
    out, _ = integration.attention(module, q, k, v, None, block_indices=block_indices)
    seen = (torch.arange(TIME) // 4 != 1) & (torch.arange(TIME) <= torch.arange(TIME - 3, TIME)[:, None])
    torch.testing.assert_close(out, torch.nn.functional.scaled_dot_product_attention(q, k, v, seen).transpose(1, 2))


@pytest.mark.parametrize("padding", ["none", "right"])
@pytest.mark.parametrize("weights", [False, True])
def test_a_sink_for_each_query(weights, padding):
    """A logit that takes part in the softmax of a query and has no value."""
    q, k, v, sinks = (torch.randn(BATCH, 2, TIME, n, requires_grad=True) for n in (8, 8, 8, 1))
    seen = padding_of(padding)
    mask = masks.mask(BATCH, TIME, TIME, attention_mask=None if seen is None else seen.bool(), allow_is_causal_skip=False)
    out, found = integration.attention(torch.nn.Module(), q, k, v, mask, sinks=sinks, output_attentions=weights)
    scores = (q @ k.mT * 8**-0.5).masked_fill(~(mask | False), -torch.inf)
    expected = torch.cat((scores, sinks), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(out, (expected @ v).transpose(1, 2))
    if weights:
        torch.testing.assert_close(found, expected)
    ours = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
    torch.testing.assert_close(ours, torch.autograd.grad((expected @ v).square().sum(), (q, k, v, sinks)))


def small(model: str, configuration: Any, implementation: str) -> Any:
    torch.manual_seed(0)
    configuration._attn_implementation = implementation
    made = getattr(transformers, model)(configuration).eval()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15)
    return made


@pytest.mark.parametrize("short", [0, 256 * 256])
@pytest.mark.parametrize("kept", [1, 4])
def test_a_model_that_cuts_queries_off(kept, short, monkeypatch):
    """Gemma 4 computes the last layers for the last queries alone, unless "sdpa" has no mask that says where they stand."""
    if not hasattr(transformers, "Gemma4ForCausalLM"):
        pytest.skip("needs Gemma 4")
    monkeypatch.setattr(integration.masks, "SHORT", short)
    found = []
    for implementation in ("eager", "fastseq"):
        sizes = dict(**DECODER, global_head_dim=8, sliding_window=4, num_kv_shared_layers=1, hidden_size_per_layer_input=4)
        sizes |= dict(vocab_size_per_layer_input=VOCABULARY, layer_types=["full_attention", "full_attention"])
        model = small("Gemma4ForCausalLM", config("Gemma4TextConfig", **sizes), implementation)
        with torch.no_grad():
            found.append(model(input_ids=inputs_of("gemma4", "none")["input_ids"], logits_to_keep=kept).logits)
    assert found[0].shape[1] == kept
    torch.testing.assert_close(*found)


def test_convert_says_what_to_do():
    model = transformers.BertForMaskedLM(CASES["bert"].config())
    with pytest.warns(UserWarning, match="nothing to convert in BertForMaskedLM .*; 1 left alone"):
        report = fastseq.convert(model)
    (row,) = report.skipped
    assert row.names == ("",) and not row.unsupported
    words = 'register(), then set_attn_implementation("fastseq")'
    assert row.reason.endswith(f"now 'sdpa': fastseq.integrations.transformers.{words}")
    integration.register()
    model.set_attn_implementation("fastseq")
    with pytest.warns(UserWarning, match="nothing to convert in BertForMaskedLM .*; 0 left alone"):
        fastseq.convert(model)
    model.set_attn_implementation("eager")
    outer = torch.nn.Sequential(model, torch.nn.LSTM(4, 6))
    report = fastseq.convert(outer)
    assert [row.names for row in report.converted] == [("1",)] and [row.names for row in report.skipped] == [("0",)]
    assert not fastseq.convert(torch.nn.Sequential(model, torch.nn.LSTM(4, 6)), "LSTM").skipped


def test_convert_says_nothing_of_models_without_attention():
    sizes = {"embedding_size": 8, "hidden_sizes": [8], "depths": [1], "layer_type": "basic"}
    outer = torch.nn.Sequential(transformers.ResNetModel(config("ResNetConfig", **sizes)), torch.nn.LSTM(4, 6))
    assert not fastseq.convert(outer).skipped


def test_errors():
    q, k, v = torch.randn(3, 2, 2, 5, 8)
    module = torch.nn.Module()
    with pytest.raises(RuntimeError, match=r"attention_mask must be \[B, H or 1, Tq, Tk\], got \[5, 5\]"):
        integration.attention(module, q, k, v, torch.ones(5, 5, dtype=torch.bool))
    with pytest.raises(RuntimeError, match=r"got \[2, 1, 5, 4\]"):
        integration.attention(module, q, k, v, torch.ones(2, 1, 5, 4, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="paged cache"):
        integration.attention(module, q, k, v, None, cache=object())
    for name in ("sdpa", "eager", ""):
        with pytest.raises(ValueError, match="another implementation"):
            integration.register(name)
    with pytest.raises(TypeError, match="must be a str, not NoneType"):
        integration.register(None)


def test_another_name():
    integration.register("fastseq_again")
    try:
        assert AttentionInterface()["fastseq_again"] is integration.attention
        assert AttentionMaskInterface()["fastseq_again"] is masks.mask
    finally:
        del AttentionInterface._global_mapping["fastseq_again"], AttentionMaskInterface._global_mapping["fastseq_again"]


@pytest.mark.parametrize("missing", ["transformers", "transformers.utils.output_capturing"])
def test_transformers_missing_or_too_old(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    if missing != "transformers":
        monkeypatch.delattr("transformers.utils.output_capturing")
    spec = importlib.util.spec_from_file_location("fastseq.integrations.again", integration.__file__)
    with pytest.raises(ImportError, match=r"needs transformers 5\.\d+ or newer .*transformers>=5\.\d+.*found") as caught:
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    assert ("found none" in str(caught.value)) == (missing == "transformers")
