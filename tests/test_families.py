"""Every family of the table, a family registered by the user, and models that are none."""

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
    randomize,
    raw,
    row_error,
    tiny_model,
    tiny_vision,
    token_batch,
)
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import globenc
from globenc.encoders.table import FAMILIES as FAMILIES_KNOWN

LAYERS = {"albert": 6, "albert-inner": 4}
# these compute a softmax (Longformer) or LayerNorm (DeBERTa) in float32 whatever the model's dtype
ROUNDING = {"deberta": 1e-6, "longformer": 1e-6}


@pytest.fixture(autouse=True)
def table():
    """The table of families is as it was after each test."""
    before = dict(FAMILIES_KNOWN)
    yield
    FAMILIES_KNOWN.clear()
    FAMILIES_KNOWN.update(before)


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


# A family of the user's own: other names, residual and norms where the method wants them.


class ToyConfig(PreTrainedConfig):
    model_type = "toy-encoder"

    def __init__(self, vocab_size=90, width=12, heads=3, depth=2, is_decoder=False, **kwargs):
        super().__init__(**kwargs)
        self.vocab_size, self.width, self.heads, self.depth = vocab_size, width, heads, depth
        self.is_decoder = is_decoder


class ToyAttention(nn.Module):
    is_causal = False

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.qkv = nn.Linear(config.width, 3 * config.width)

    def forward(self, states, attention_mask=None):
        batch, n, width = states.shape
        q, k, v = self.qkv(states).view(batch, n, 3, self.config.heads, -1).permute(2, 0, 3, 1, 4)
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, None)
        out, _ = attend(self, q, k, v, attention_mask, scaling=0.3, dropout=0.0)
        return out.reshape(batch, n, width)


class ToyLayer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.mix = ToyAttention(config)
        self.out = nn.Linear(config.width, config.width)
        self.first_norm = nn.LayerNorm(config.width)
        self.up, self.down = nn.Linear(config.width, 20), nn.Linear(20, config.width)
        self.second_norm = nn.LayerNorm(config.width)
        self.key_like = nn.Linear(config.width, config.width)

    def forward(self, states, attention_mask):
        states = self.first_norm(states + self.out(self.mix(states, attention_mask)))
        return self.second_norm(states + self.down(self.up(states).relu()))


class ToyEncoder(PreTrainedModel):
    config_class = ToyConfig
    _supports_sdpa = True
    _supports_attention_backend = True

    def __init__(self, config):
        super().__init__(config)
        self.words = nn.Embedding(config.vocab_size, config.width)
        self.blocks = nn.ModuleList(ToyLayer(config) for _ in range(config.depth))
        self.post_init()

    def get_input_embeddings(self):
        return self.words

    def forward(self, input_ids, attention_mask=None):
        from transformers.masking_utils import create_bidirectional_mask

        states = self.words(input_ids)
        mask = create_bidirectional_mask(self.config, states, attention_mask)
        for block in self.blocks:
            states = block(states, mask)
        return transformers.modeling_outputs.BaseModelOutput(last_hidden_state=states)


TOY = {
    "layers": "blocks",
    "attention": "mix",
    "output_projection": "out",
    "attention_norm": "first_norm",
    "output_norm": "second_norm",
}


@pytest.fixture
def toy() -> ToyEncoder:
    model = ToyEncoder(ToyConfig()).double().eval()
    randomize(model)
    return model


def test_registered_family(toy):
    inputs = token_batch((9, 4))
    with pytest.raises(ValueError, match="register_encoder"):
        globenc.attribute(toy, **inputs)
    family = globenc.register_encoder("toy-encoder", **TOY, examples="toy")
    assert family in globenc.supported_encoders()
    assert float(globenc.completeness_gap(toy, **inputs).max()) < 1e-12
    for method in METHODS:
        maps = [globenc.contribution_maps(toy, method=method, backend=b, **inputs) for b in ("torch", "reference")]
        assert_rows_close(*maps, 1e-12)
    with torch.no_grad():
        own = toy(**inputs).last_hidden_state
    real = inputs["attention_mask"].bool()
    torch.testing.assert_close(globenc.attribute(toy, **inputs).model_output.last_hidden_state[real], own[real])


def test_registered_family_with_layers_from_a_function(toy):
    inputs = token_batch((9, 4))
    globenc.register_encoder("toy-encoder", **TOY)
    expected = globenc.attribute(toy, **inputs).scores
    globenc.register_encoder("toy-encoder", **{**TOY, "layers": lambda base: list(base.blocks)})
    assert torch.equal(globenc.attribute(toy, **inputs).scores, expected)


def test_wrong_projection_shows_as_a_gap(toy):
    globenc.register_encoder("toy-encoder", **{**TOY, "output_projection": "key_like"})
    assert float(globenc.completeness_gap(toy, **token_batch((9,))).max()) > 0.01


def test_wrong_residual_shows_as_a_gap(toy):
    """A pre-LN block: what enters the attention is not what is added to its output."""

    class PreNorm(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block, self.norm = block, nn.LayerNorm(12).double()

        def forward(self, states, mask):
            block = self.block
            mixed = block.first_norm(states + block.out(block.mix(self.norm(states), mask)))
            return block.second_norm(mixed + block.down(block.up(mixed).relu()))

    toy.blocks = nn.ModuleList(PreNorm(block) for block in toy.blocks)
    globenc.register_encoder("toy-encoder", **{k: v if k == "layers" else f"block.{v}" for k, v in TOY.items()})
    assert float(globenc.completeness_gap(toy, **token_batch((9,))).max()) > 0.01


WRONG = {
    "no-such-layers": ({"layers": "stack"}, r"layers='stack' does not exist in ToyEncoder"),
    "no-such-attention": ({"attention": "attn"}, r"attention='attn' does not exist in ToyLayer"),
    "no-such-norm": ({"output_norm": "norm2"}, r"output_norm='norm2' does not exist in ToyLayer"),
    "projection-is-a-norm": (
        {"output_projection": "first_norm"},
        "output_projection .* must be a plain torch.nn.Linear",
    ),
    "projection-of-another-shape": ({"output_projection": "up"}, "output_projection"),
    "norm-is-linear": ({"attention_norm": "out"}, "attention_norm .* must be a torch.nn.LayerNorm, got Linear"),
    "norms-swapped": ({"attention_norm": "second_norm", "output_norm": "first_norm"}, "register_encoder"),
    "one-norm-for-both": ({"output_norm": "first_norm"}, "output_norm"),
    "attention-without-interface": ({"attention": "up"}, "register_encoder"),
    "no-layers": ({"layers": lambda base: []}, "at least one encoder layer"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_wrong_names_are_clear_errors(toy, wrong):
    names, message = WRONG[wrong]
    globenc.register_encoder("toy-encoder", **{**TOY, **names})
    for call in (globenc.attribute, globenc.contribution_maps, globenc.completeness_gap):
        with pytest.raises((ValueError, RuntimeError), match=message) as error:
            call(toy, **token_batch((9,)))
        assert "toy-encoder" in str(error.value) or "encoder" in str(error.value)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("attention", None), ("attention", ""), ("output_norm", 3), ("layers", None), ("layers", 3)],
)
def test_register_encoder_refuses(argument, value):
    with pytest.raises(TypeError, match=argument):
        globenc.register_encoder("toy-encoder", **{**TOY, argument: value})
    assert "toy-encoder" not in {family.model_type for family in globenc.supported_encoders()}


def test_register_encoder_knows_its_arguments():
    with pytest.raises(TypeError, match="residual"):
        globenc.register_encoder("toy-encoder", **TOY, residual="x")


def test_table_names_the_families():
    known = [family.model_type for family in globenc.supported_encoders()]
    assert known[:7] == ["bert", "roberta", "xlm-roberta", "camembert", "electra", "distilbert", "albert"]
    configs = {make.model_type for make, _ in [*CONFIGS.values(), *VISION.values()]}
    assert set(known) == configs, "every family of the table is tested, from a tiny config"
    assert all(family.examples for family in globenc.supported_encoders())


def _gpt2():
    config = transformers.GPT2Config(vocab_size=50, n_embd=8, n_layer=1, n_head=2, n_positions=16)
    return transformers.GPT2Model(config)


def _t5():
    config = transformers.T5Config(vocab_size=50, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    return transformers.T5ForConditionalGeneration(config)


def _deberta(**options):
    config = transformers.DebertaV2Config(
        vocab_size=50, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, **options
    )
    return transformers.DebertaV2Model(config)


def _clip():
    tower = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    return transformers.CLIPModel(transformers.CLIPConfig(text_config=tower, vision_config=tower))


SUPPORTED = r"bert, roberta, xlm-roberta, camembert, electra, distilbert, albert, .*siglip_vision_model"
NOT_ENCODERS = {
    "gpt2": (_gpt2, ValueError, rf"GPT2Model of type 'gpt2'; supported: {SUPPORTED}.*register_encoder\('gpt2'"),
    "t5": (_t5, ValueError, r"T5ForConditionalGeneration of type 't5', an encoder-decoder.*load its encoder, T5Enc"),
    "deberta": (lambda: _deberta(conv_kernel_size=3), ValueError, "a convolution between its layers"),
    "clip": (_clip, ValueError, "CLIPModel of type 'clip', which has two: pass its vision tower, model.vision_model"),
    "bert-decoder": (
        lambda: tiny_model("bert", is_decoder=True),
        ValueError,
        "BertModel configured as a decoder .* load it with is_decoder=False",
    ),
    "plain-module": (lambda: nn.Linear(2, 2), TypeError, "must be a transformers encoder .* got Linear"),
    "no-module": (lambda: "bert-base-uncased", TypeError, "must be a transformers encoder .* got str"),
    "nothing": (lambda: None, TypeError, "must be a transformers encoder .* got NoneType"),
}


@pytest.mark.parametrize("which", NOT_ENCODERS)
def test_models_that_are_no_encoders(which):
    make, error, message = NOT_ENCODERS[which]
    model = make()
    for call in (globenc.attribute, globenc.contribution_maps, globenc.mixing_ratios, globenc.completeness_gap):
        with pytest.raises(error, match=message):
            call(model, input_ids=torch.tensor([[5, 6]]))
    with pytest.raises(error, match=message):
        globenc.GlobEnc(model)


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


def test_deberta_is_complete_but_for_its_layer_norm():
    """What is left of its gap is its own LayerNorm, which rounds to float32: with torch's there is none."""
    model = tiny_model("deberta")
    for layer in model.encoder.layer:
        for output in (layer.attention.output, layer.output):
            norm = nn.LayerNorm(24, eps=output.LayerNorm.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(output.LayerNorm.state_dict())
            output.LayerNorm = norm
    assert float(globenc.completeness_gap(model, **token_batch((9, 4))).max()) < 1e-12


@pytest.fixture
def exact_longformer(monkeypatch):
    """Longformer with its softmax in the model's dtype."""
    softmax = nn.functional.softmax
    monkeypatch.setattr(nn.functional, "softmax", lambda scores, dim, dtype=None: softmax(scores, dim))
    return tiny_model("longformer")


@pytest.mark.parametrize("lengths", [(5,), (19,), (31, 4, 18)], ids=str)
@pytest.mark.parametrize("where", [(), (0,), (0, 2), (3,)], ids=str)
def test_longformer_with_global_tokens(exact_longformer, where, lengths):
    inputs = token_batch(lengths)
    inputs["global_attention_mask"] = torch.zeros_like(inputs["input_ids"])
    inputs["global_attention_mask"][:, list(where)] = 1
    inputs["global_attention_mask"][0, 4] = 1  # texts have different ones
    assert float(globenc.completeness_gap(exact_longformer, **inputs).max()) < 1e-12
    for method in METHODS:
        maps = [
            globenc.contribution_maps(exact_longformer, method=method, backend=b, **inputs)
            for b in ("torch", "reference")
        ]
        assert_rows_close(*maps, 1e-12)
    for options in ({}, {"position": "mean"}, {"position": [0, 3, -1]}, {"row_normalize": True}, {"position": "all"}):
        fast, direct = (
            globenc.attribute(exact_longformer, per_layer=True, backend=b, **options, **inputs)
            for b in ("torch", "reference")
        )
        assert_rows_close(fast.layer_scores, direct.layer_scores, 1e-12)
    with torch.no_grad():
        own = exact_longformer(**inputs).last_hidden_state
    assert torch.equal(globenc.attribute(exact_longformer, **inputs).model_output.last_hidden_state, own)


def test_longformer_sees_no_further_than_its_window():
    maps = globenc.contribution_maps(tiny_model("longformer"), **token_batch((19,)))[:, 0]
    distance = (torch.arange(19)[:, None] - torch.arange(19)).abs()
    assert bool((maps[:, distance > 3] == 0).all())
    assert bool((maps[:, distance <= 3] > 0).all())


@pytest.mark.parametrize("lengths", [(8,), (19,), (24, 15)], ids=str)
def test_bigbird_sparse_and_full(lengths):
    """Texts of more than 14 tokens go through sparse attention here, shorter ones through full attention."""
    model, inputs = tiny_model("big_bird"), token_batch(lengths)
    assert float(globenc.completeness_gap(model, **inputs).max()) < 1e-12
    maps = [globenc.contribution_maps(model, backend=b, **inputs) for b in ("torch", "reference")]
    assert_rows_close(*maps, 1e-12)
    weights = globenc.contribution_maps(model, method="W", **inputs)
    torch.testing.assert_close(weights.sum(-1), inputs["attention_mask"].double().expand(3, -1, -1))
    assert model.attention_type == "block_sparse"
    assert bool((weights[:, 0, lengths[0] // 2] == 0).any()) == (lengths[0] > 14)


def test_bigbird_itself_depends_on_the_batch():
    """Its blocks count from the end of the padded batch: why its attribution is not that of the text alone."""
    model = tiny_model("big_bird")
    with torch.no_grad():
        together = model(**token_batch((30, 21))).last_hidden_state[1, :21]
        alone = model(**token_batch((21,))).last_hidden_state[0]
    assert float((together - alone).abs().max()) > 0.01


@pytest.mark.parametrize("lengths", [(1200,), (1200, 700, 3)], ids=str)
@pytest.mark.parametrize("left", [False, True], ids=["padded-right", "padded-left"])
def test_windows_of_modernbert(lengths, left):
    """Several blocks of queries; what the model itself computes with transformers' masks is the same."""
    model = tiny_model("modernbert", num_hidden_layers=2, global_attn_every_n_layers=2, local_attention=60)
    inputs = token_batch(lengths, left=left, position_ids=left)
    out = globenc.attribute(model, position="mean", **inputs)
    real = inputs["attention_mask"].bool()
    with torch.no_grad():
        own = model(**inputs).last_hidden_state
    torch.testing.assert_close(out.model_output.last_hidden_state[real], own[real], rtol=0, atol=1e-12)
    assert float(globenc.completeness_gap(model, **inputs).max()) < 1e-12
    if len(lengths) == 1:
        maps = [globenc.contribution_maps(model, backend=b, **inputs) for b in ("torch", "reference")]
        assert_rows_close(*maps, 1e-12)
        distance = (torch.arange(1200)[:, None] - torch.arange(1200)).abs()
        assert bool((maps[0][1, 0, distance > 30] == 0).all())
        assert bool((maps[0][1, 0, distance <= 30] > 0).all())
        assert bool((maps[0][0] > 0).all())
        direct = globenc.attribute(model, position="mean", backend="reference", **inputs)
        assert_rows_close(out.scores, direct.scores, 1e-12)


@pytest.mark.parametrize("family", VISION)
def test_pictures(family):
    model, pixels = tiny_vision(family), pictures()
    assert float(globenc.completeness_gap(model, pixel_values=pixels).max()) < 1e-12
    for method in METHODS:
        if method == "N-ResLN":
            continue
        maps = [
            globenc.contribution_maps(model, method=method, backend=b, pixel_values=pixels)
            for b in ("torch", "reference")
        ]
        assert_rows_close(*maps, 1e-12)
    out = globenc.attribute(model, position="mean", pixel_values=pixels)
    with torch.no_grad():
        own = model(pixel_values=pixels).last_hidden_state
    assert torch.equal(out.model_output.last_hidden_state, own)
    special = next(f for f in globenc.supported_encoders() if f.model_type == family).special_tokens(model.config)
    assert out.scores.shape == (2, 9 + len(special))
    alone = globenc.attribute(model, position="mean", pixel_values=pixels[1:])
    assert_rows_close(alone.scores, out.scores[1:], 1e-12)


def test_pictures_of_another_size():
    wide = pictures(1, (20, 12))
    assert globenc.attribute(tiny_vision("dinov2"), pixel_values=wide).scores.shape == (1, 16)
    model = tiny_vision("vit")
    assert globenc.attribute(model, pixel_values=wide, interpolate_pos_encoding=True).scores.shape == (1, 16)
    with pytest.raises(ValueError, match="pixel_values must be 12 x 12 for this model, got 20 x 12"):
        globenc.attribute(model, pixel_values=wide)


@pytest.mark.parametrize(
    ("pixels", "message"),
    [
        (None, "give pixel_values, a tensor .* got nothing"),
        ([[1.0]], "give pixel_values, a tensor .* got list"),
        (torch.zeros(3, 12, 12).double(), r"shape \[batch, 3, height, width\]"),
        (torch.zeros(1, 1, 12, 12).double(), r"shape \[batch, 3, height, width\]"),
        (torch.zeros(0, 3, 12, 12).double(), "no empty dimension"),
        (torch.zeros(1, 3, 12, 12), "pixel_values must be torch.float64 for this model, got torch.float32"),
    ],
)
def test_wrong_pictures(pixels, message):
    with pytest.raises(ValueError, match=message):
        globenc.attribute(tiny_vision("vit"), pixel_values=pixels)


@pytest.mark.parametrize("model", [lambda: tiny_model("t5"), lambda: tiny_vision("siglip_vision_model")])
def test_families_without_a_token_for_the_whole(model):
    inputs = {"pixel_values": pictures()} if "vision" in model().config.model_type else token_batch((5,))
    with pytest.raises(ValueError, match=r"position 'cls' has no meaning for '.*use position='mean'"):
        globenc.attribute(model(), **inputs)


def test_layer_scale_of_dinov2_is_part_of_the_projection():
    model, pixels = tiny_vision("dinov2"), pictures()
    before = globenc.contribution_maps(model, method="N", pixel_values=pixels)
    with torch.no_grad():
        model.encoder.layer[0].layer_scale1.lambda1.mul_(3)
    assert_rows_close(globenc.contribution_maps(model, method="N", pixel_values=pixels)[0], 3 * before[0], 1e-12)


@pytest.mark.parametrize("family", PRE_NORM)
def test_pre_norm_layers_add_to_the_residual_stream(family):
    model, inputs = tiny_model(family), token_batch((9, 4))
    maps = [globenc.contribution_maps(model, method=method, **inputs) for method in ("N-Enc", "N-Res")]
    assert torch.equal(*maps)


def test_registered_pre_norm_family(toy):
    """The toy's layers with their norms in front."""

    class PreNormLayer(ToyLayer):
        def forward(self, states, attention_mask):
            states = states + self.out(self.mix(self.first_norm(states), attention_mask))
            return states + self.down(self.up(self.second_norm(states)).relu())

    for block in toy.blocks:
        block.__class__ = PreNormLayer
    names = {**TOY, "attention_norm": "second_norm", "output_norm": None}
    globenc.register_encoder("toy-encoder", **names)
    inputs = token_batch((9, 4))
    assert float(globenc.completeness_gap(toy, **inputs).max()) < 1e-12
    maps = [globenc.contribution_maps(toy, backend=b, **inputs) for b in ("torch", "reference")]
    assert_rows_close(*maps, 1e-12)
    globenc.register_encoder("toy-encoder", **{**names, "attention_norm": "first_norm"})
    with pytest.raises(RuntimeError, match=r"a norm ran before the attention.* correct them with globenc.register"):
        globenc.attribute(toy, **inputs)
    assert float(globenc.completeness_gap(toy, **inputs).max()) > 0.01


def test_a_model_without_token_types_takes_its_tokenizers_zeros():
    """DeBERTa-v3: type_vocab_size is 0, and the tokenizer gives token_type_ids all the same."""
    model, inputs = tiny_model("deberta-v3", type_vocab_size=0), token_batch((7,))
    types = torch.zeros_like(inputs["input_ids"])
    scores = globenc.attribute(model, token_type_ids=types, **inputs).scores
    assert torch.equal(scores, globenc.attribute(model, **inputs).scores)
