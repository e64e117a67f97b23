"""Every family of the table: complete, equal to the reference, the same alone and in a batch."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import (
    CONFIGS,
    FAMILIES,
    METHODS,
    PRE_NORM,
    STAGES,
    VISION,
    assert_rows_close,
    methods_of,
    pictures,
    positions_of,
    raw,
    row_error,
    tiny_model,
    tiny_vision,
    token_batch,
)

import globenc
from globenc.encoders import Encoder

LAYERS = {"albert": 6, "albert-inner": 4}


# these compute a softmax (Longformer) or LayerNorm (DeBERTa) in float32 whatever the model's dtype
ROUNDING = {"deberta": 1e-6, "longformer": 1e-6}


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("family", FAMILIES)
def test_completeness_gap(family, attention):
    if attention == "sdpa" and not _has_sdpa(family):
        pytest.skip(f"{family} has no such attention")
    model = tiny_model(family, attention=attention)
    gap = globenc.completeness_gap(model, **token_batch((9, 4, 1)))
    assert gap.shape == (LAYERS.get(family, 3), 3, 9)
    assert float(gap.max()) < ROUNDING.get(family, 1e-12)
    assert bool((gap[:, 1, 4:] == 0).all())
    assert bool((gap[:, 0] > 0).any())  # it is measured, not assumed


@pytest.mark.parametrize("family", FAMILIES)
def test_norms_stand_where_the_family_says(family):
    """In a pre-LN layer the first residual sum goes past its norm into the output: with the norm's output replaced by
    zeros, every token gets the same vector beside it. In a post-LN layer the sum is lost with the norm's output."""
    encoder = Encoder.of(tiny_model(family))
    layer, sums, outputs = encoder.layers[0], [], []

    def zeroed(module, args, output):
        sums.append(args[0])
        return torch.zeros_like(output)

    def note(module, args, output):
        outputs.append(output[0] if isinstance(output, tuple) else output)

    hooks = [layer.attention_norm.register_forward_hook(zeroed), layer.module.register_forward_hook(note)]
    with torch.no_grad():
        encoder.model(**token_batch((9,)))
    for hook in hooks:
        hook.remove()
    beside = outputs[0] - sums[0]
    same_for_all = float((beside - beside[:, :1]).abs().max()) < 1e-9
    assert same_for_all == encoder.family.pre_norm


@pytest.mark.parametrize("family", FAMILIES)
def test_the_longest_text_is_what_the_flags_say(family):
    """The longest text that a model is said to take runs, and one token more is refused before the model sees it."""
    model = tiny_model(family)
    encoder = Encoder.of(model)
    longest, table = encoder.max_length, getattr(model.config, "max_position_embeddings", None)
    if encoder.takes_any_length or longest is None:
        beyond = token_batch(((table or longest or 48) + 3,))
        assert globenc.attribute(model, position="mean", **beyond).scores.isfinite().all()
        return
    assert globenc.attribute(model, **token_batch((longest,))).scores.isfinite().all()
    with pytest.raises(ValueError, match=f"takes at most {longest}: truncate the text"):
        globenc.attribute(model, **token_batch((longest + 1,)))
    with pytest.raises((IndexError, RuntimeError)):  # the model itself takes no more either
        model(**token_batch((longest + 1,)))


def _has_sdpa(family):
    return family not in ("deberta", "deberta-v2", "deberta-v3", "mpnet", "longformer", "big_bird")


@pytest.mark.parametrize("method", METHODS)
def test_torch_equals_reference(family_model, method):
    inputs = token_batch((9, 4, 1))
    if method not in methods_of(family_model):
        with pytest.raises(
            ValueError, match=f"method {method!r} has no meaning for {family_model.config.model_type!r}"
        ):
            globenc.contribution_maps(family_model, method=method, **inputs)
        return
    # the two take the attention block's output from the model and from their own weights
    tolerance = ROUNDING.get(family_model.config.model_type, 1e-12) if method == "W-Res" else 1e-12
    maps = [globenc.contribution_maps(family_model, method=method, backend=b, **inputs) for b in ("torch", "reference")]
    assert_rows_close(*maps, tolerance)
    for position in positions_of(family_model):
        fast, direct = (
            globenc.attribute(family_model, method=method, position=position, per_layer=True, backend=backend, **inputs)
            for backend in ("torch", "reference")
        )
        assert_rows_close(
            raw(fast.layer_scores, fast.layer_log2_scale), raw(direct.layer_scores, direct.layer_log2_scale), tolerance
        )


@pytest.mark.parametrize("stage", STAGES)
def test_mixing_ratios_equal_reference(family_model, stage):
    inputs = token_batch((9, 4))
    if stage not in methods_of(family_model):
        with pytest.raises(ValueError, match=f"method {stage!r} has no meaning for {family_model.config.model_type!r}"):
            globenc.mixing_ratios(family_model, method=stage, **inputs)
        return
    fast, direct = (
        globenc.mixing_ratios(family_model, method=stage, backend=backend, **inputs)
        for backend in ("torch", "reference")
    )
    rounding = ROUNDING.get(family_model.config.model_type, 0)
    torch.testing.assert_close(fast, direct, rtol=max(1e-12, rounding), atol=max(1e-14, rounding))
    real = inputs["attention_mask"].bool()
    assert bool((fast[:, real] > 0).all())
    assert bool((fast <= 1).all())
    assert bool((fast[:, ~real] == 0).all())


def test_mixing_ratios_of_other_methods_are_refused(bert):
    with pytest.raises(ValueError, match="method must be one of N, N-Res, N-ResLN, N-Enc here; got 'W-Res'"):
        globenc.mixing_ratios(bert, method="W-Res", **token_batch((4,)))


def test_batch_invariance(family_model):
    pad, (position, *_) = family_model.config.pad_token_id, positions_of(family_model)
    batch = token_batch((9, 4, 6))
    batch["input_ids"][batch["attention_mask"] == 0] = pad
    together = globenc.attribute(family_model, position=position, **batch)
    for row, length in enumerate((9, 4, 6)):
        alone = globenc.attribute(family_model, position=position, **token_batch((length,)))
        assert_rows_close(together.scores[row : row + 1, :length], alone.scores, 1e-12)
        torch.testing.assert_close(together.log2_scale[row : row + 1], alone.log2_scale, rtol=0, atol=1e-12)
        assert bool((together.scores[row, length:] == 0).all())


def test_float32_families(family_model):
    inputs = token_batch((9, 4))
    exact = globenc.contribution_maps(family_model, **inputs)
    same = [f for f in FAMILIES if CONFIGS[f][0] is type(family_model.config) and _same(family_model, f)]
    single = tiny_model(max(same, key=lambda f: len(CONFIGS[f][1])), torch.float32)
    assert_rows_close(globenc.contribution_maps(single, **inputs), exact, 2e-5)


def _same(model, family):
    return all(getattr(model.config, name, None) == value for name, value in CONFIGS[family][1].items())


def test_distilbert_and_bert_agree():
    """The same weights under the names of two families."""
    bert = tiny_model("bert", type_vocab_size=1)
    distil = tiny_model("distilbert")
    names = {
        "attention.q_lin": "attention.self.query",
        "attention.k_lin": "attention.self.key",
        "attention.v_lin": "attention.self.value",
        "attention.out_lin": "attention.output.dense",
        "sa_layer_norm": "attention.output.LayerNorm",
        "ffn.lin1": "intermediate.dense",
        "ffn.lin2": "output.dense",
        "output_layer_norm": "output.LayerNorm",
    }
    for theirs, ours in zip(distil.transformer.layer, bert.encoder.layer, strict=True):
        for a, b in names.items():
            theirs.get_submodule(a).load_state_dict(ours.get_submodule(b).state_dict())
    for name in ("word_embeddings", "position_embeddings", "LayerNorm"):
        distil.embeddings.get_submodule(name).load_state_dict(bert.embeddings.get_submodule(name).state_dict())
    with torch.no_grad():  # DistilBERT has no token types
        distil.embeddings.position_embeddings.weight += bert.embeddings.token_type_embeddings.weight[0]
    inputs = token_batch((9, 4))
    assert_rows_close(globenc.contribution_maps(distil, **inputs), globenc.contribution_maps(bert, **inputs), 1e-11)


def test_table_names_the_families():
    known = [family.model_type for family in globenc.supported_encoders()]
    assert known[:7] == ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert"]
    configs = {make.model_type for make, _ in [*CONFIGS.values(), *VISION.values()]}
    assert set(known) == configs, "every family of the table is tested, from a tiny config"
    assert all(family.examples for family in globenc.supported_encoders())


def test_row_error_of_the_wrong_family_is_large():
    """The comparisons above can fail: another family's random model gives other numbers."""
    inputs = token_batch((9,))
    a, b = (globenc.contribution_maps(tiny_model("bert", seed=seed), **inputs) for seed in (0, 1))
    assert float(row_error(a, b).max()) > 0.01


def test_completeness_sees_what_follows_the_output_norm():
    """The layer's output is checked against what the next layer reads: its own formula cannot see this."""
    torch.manual_seed(0)
    config = transformers.BertConfig(
        hidden_size=16, num_attention_heads=2, num_hidden_layers=2, intermediate_size=32, vocab_size=50
    )
    model = transformers.BertModel(config).double().eval()
    inputs = {"input_ids": torch.randint(0, 50, (1, 7))}
    assert globenc.completeness_gap(model, **inputs).max() < 1e-12
    for layer in model.encoder.layer:  # something behind the norm that the family's names do not know of
        layer.register_forward_hook(lambda module, args, output: output * 1.5)
    gap = globenc.completeness_gap(model, **inputs)
    assert gap[0].max() > 0.1


@pytest.mark.parametrize("model", [lambda: tiny_model("t5"), lambda: tiny_vision("siglip_vision_model")])
def test_families_without_a_token_for_the_whole(model):
    inputs = {"pixel_values": pictures()} if "vision" in model().config.model_type else token_batch((5,))
    with pytest.raises(ValueError, match=r"position 'cls' has no meaning for '.*use position='mean'"):
        globenc.attribute(model(), **inputs)


@pytest.mark.parametrize("family", PRE_NORM)
def test_pre_norm_layers_add_to_the_residual_stream(family):
    model, inputs = tiny_model(family), token_batch((9, 4))
    maps = [globenc.contribution_maps(model, method=method, **inputs) for method in ("N-Enc", "N-Res")]
    assert torch.equal(*maps)


def test_a_model_without_token_types_takes_its_tokenizers_zeros():
    """DeBERTa-v3: type_vocab_size is 0, and the tokenizer gives token_type_ids all the same."""
    model, inputs = tiny_model("deberta-v3", type_vocab_size=0), token_batch((7,))
    types = torch.zeros_like(inputs["input_ids"])
    scores = globenc.attribute(model, token_type_ids=types, **inputs).scores
    assert torch.equal(scores, globenc.attribute(model, **inputs).scores)
