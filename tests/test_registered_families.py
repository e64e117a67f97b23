"""A family that the user registers: other names, residual and norms where the method wants them."""

from __future__ import annotations

import pytest
import torch
import transformers
from helpers import METHODS, assert_rows_close, randomize, token_batch
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import globenc

pytestmark = pytest.mark.usefixtures("family_table")


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
