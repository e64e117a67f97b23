"""What several test files share: tiny models with awkward weights, inputs for them, and the row-by-row comparison."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from torch import Tensor, nn
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast

from globenc.capture import LayerEnd, LayerTrace, ScoredAttention
from globenc.encoders import LayerModules

METHODS = ("W", "W-FixedRes", "W-Res", "N", "N-FixedRes", "N-Res", "N-ResLN", "N-Enc")
STAGES = ("N", "N-Res", "N-ResLN", "N-Enc")
VOCABULARY = 90
CORPUS = [
    "a charming and often affecting journey .",
    "unflinchingly bleak and desperate",
    "allows us to hope that nolan is poised to embark a major career as a commercial yet inventive filmmaker .",
    "the acting , costumes , music , cinematography and sound are all astounding given the production 's locales .",
    "it 's slow -- very , very slow .",
]

_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "max_position_embeddings": 48,
    "pad_token_id": 0,
}
_ROBERTA = {**_BERT, "pad_token_id": 1, "bos_token_id": 0, "eos_token_id": 2, "type_vocab_size": 1}
_DEBERTA = {
    **_BERT,
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "max_relative_positions": 16,
    "type_vocab_size": 2,
}
_T5 = {
    "vocab_size": VOCABULARY,
    "d_model": 24,
    "d_kv": 6,
    "d_ff": 40,
    "num_layers": 3,
    "num_heads": 3,
    "relative_attention_num_buckets": 8,
    "pad_token_id": 0,
}
CONFIGS = {
    "bert": (transformers.BertConfig, _BERT),
    "roberta": (transformers.RobertaConfig, _ROBERTA),
    "xlm-roberta": (transformers.XLMRobertaConfig, _ROBERTA),
    "camembert": (transformers.CamembertConfig, _ROBERTA),
    "electra": (transformers.ElectraConfig, {**_BERT, "embedding_size": 24}),
    "electra-projected": (transformers.ElectraConfig, {**_BERT, "embedding_size": 10}),
    "distilbert": (
        transformers.DistilBertConfig,
        {
            "vocab_size": VOCABULARY,
            "dim": 24,
            "n_layers": 3,
            "n_heads": 3,
            "hidden_dim": 40,
            "max_position_embeddings": 48,
            "pad_token_id": 0,
        },
    ),
    # 6 steps over 2 groups: step 0-2 runs group 0, 3-5 group 1
    "albert": (
        transformers.AlbertConfig,
        {**_BERT, "embedding_size": 12, "num_hidden_layers": 6, "num_hidden_groups": 2},
    ),
    # each step runs two different layers
    "albert-inner": (
        transformers.AlbertConfig,
        {**_BERT, "embedding_size": 12, "num_hidden_layers": 2, "num_hidden_groups": 1, "inner_group_num": 2},
    ),
    "ernie": (transformers.ErnieConfig, {**_BERT, "use_task_id": True}),
    "data2vec-text": (transformers.Data2VecTextConfig, _ROBERTA),
    "nomic_bert": (transformers.NomicBertConfig, {**_BERT, "head_dim": 8}),
    "jina_embeddings_v3": (transformers.JinaEmbeddingsV3Config, {**_BERT, "pad_token_id": 1}),
    "deberta-v2": (transformers.DebertaV2Config, _DEBERTA),
    "deberta-v3": (
        transformers.DebertaV2Config,
        {
            **_DEBERTA,
            "share_att_key": True,
            "norm_rel_ebd": "layer_norm",
            "position_buckets": 4,
            "position_biased_input": False,
        },
    ),
    "deberta": (transformers.DebertaConfig, _DEBERTA),
    "mpnet": (transformers.MPNetConfig, _ROBERTA),
    "longformer": (transformers.LongformerConfig, {**_ROBERTA, "attention_window": [6, 6, 6]}),
    "big_bird": (
        transformers.BigBirdConfig,
        {**_BERT, "attention_type": "block_sparse", "block_size": 2, "num_random_blocks": 1},
    ),
    # a global layer and two that see three tokens to either side
    "modernbert": (
        transformers.ModernBertConfig,
        {**_BERT, "local_attention": 6, "global_attn_every_n_layers": 3, "attention_bias": True, "norm_bias": True},
    ),
    "eurobert": (transformers.EuroBertConfig, {**_BERT, "num_attention_heads": 6, "num_key_value_heads": 2}),
    "xlm-roberta-xl": (transformers.XLMRobertaXLConfig, _ROBERTA),
    "roberta-prelayernorm": (transformers.RobertaPreLayerNormConfig, _ROBERTA),
    "t5": (transformers.T5Config, _T5),
    "umt5": (transformers.UMT5Config, _T5),
    "esm": (
        transformers.EsmConfig,
        {**_ROBERTA, "mask_token_id": 4, "position_embedding_type": "rotary", "token_dropout": False},
    ),
}
FAMILIES = tuple(CONFIGS)
PRE_NORM = ("modernbert", "eurobert", "xlm-roberta-xl", "roberta-prelayernorm", "t5", "umt5", "esm")
NO_CLS = ("t5", "umt5")


def methods_of(model: nn.Module) -> tuple[str, ...]:
    """The methods that have a meaning for a model's family."""
    return tuple(m for m in METHODS if m != "N-ResLN" or model.config.model_type not in PRE_NORM)


def positions_of(model: nn.Module) -> tuple[str, ...]:
    """The named positions, but for "all"."""
    return ("mean",) if model.config.model_type in NO_CLS else ("cls", "mean")


def tiny_model(
    family: str = "bert",
    dtype: torch.dtype = torch.float64,
    head: str = "Model",
    seed: int = 0,
    attention: str | None = None,
    **config,
) -> transformers.PreTrainedModel:
    """A random model in evaluation mode: LayerNorm weights of both signs, no bias zero, attention far from uniform.

    The same seed gives the same weights in every dtype, up to its rounding.
    """
    make_config, options = CONFIGS[family]
    auto = getattr(transformers, "AutoModel" if head == "Model" else f"AutoModelFor{head}")
    if head == "Model" and family in NO_CLS:
        auto = {"t5": transformers.T5EncoderModel, "umt5": transformers.UMT5EncoderModel}[family]
    options = {**options, **config}
    config_object = make_config(**options)
    model = (
        auto._from_config(config_object, attn_implementation=attention)
        if family in NO_CLS and head == "Model"
        else auto.from_config(config_object, attn_implementation=attention)
    )
    randomize(model, seed)
    return model.to(dtype).eval()


def randomize(model: nn.Module, seed: int = 0) -> None:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for module in model.modules():
            for name, parameter in module.named_parameters(recurse=False):
                noise = torch.randn(parameter.shape, generator=generator)
                if "Norm" in type(module).__name__ and name == "weight":
                    parameter.copy_(torch.where(noise < -0.8, -1.0, 1.0) * (1 + 0.5 * noise.tanh()))
                elif parameter.ndim == 2 and not isinstance(module, nn.Embedding):
                    parameter.copy_(noise * 1.7 / parameter.shape[1] ** 0.5)
                else:
                    parameter.copy_(noise * 0.5)


def token_batch(lengths=(7,), left: bool = False, seed: int = 0, position_ids: bool = False) -> dict[str, Tensor]:
    """input_ids and attention_mask of random texts of these lengths; a text is the same in every batch and padding.

    `position_ids`: count real tokens from 0, as left padding needs.
    """
    longest = max(lengths)
    input_ids = torch.zeros(len(lengths), longest, dtype=torch.long)
    mask = torch.zeros_like(input_ids)
    for row, length in enumerate(lengths):
        generator = torch.Generator().manual_seed(1000 * seed + length)
        where = slice(longest - length, longest) if left else slice(0, length)
        input_ids[row, where] = torch.randint(5, VOCABULARY, (length,), generator=generator)
        mask[row, where] = 1
    inputs = {"input_ids": input_ids, "attention_mask": mask}
    if position_ids:
        inputs["position_ids"] = mask.cumsum(-1).sub(1).clamp(min=0)
    return inputs


def row_error(actual: Tensor, expected: Tensor) -> Tensor:
    """Largest difference in a row over the largest value of that row, [...] for [..., n]; in float64.

    A row of zeros must be met exactly: any difference there is infinite. NaN anywhere gives NaN.
    """
    actual, expected = actual.double(), expected.double()
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {list(actual.shape)} for {list(expected.shape)}")
    difference, size = (actual - expected).abs().amax(-1), expected.abs().amax(-1)
    return torch.where(difference == 0, 0.0, difference / size)


def assert_rows_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    error = row_error(actual, expected)
    assert bool((error <= tolerance).all()), f"row error {error.max():.2e} (allowed {tolerance:.0e})"


def raw(scores: Tensor, log2_scale: Tensor) -> Tensor:
    """The rollout's own values in float64."""
    return scores.double() * torch.exp2(log2_scale.double())[..., None]


def attention_state(model: transformers.PreTrainedModel) -> dict:
    """Everything about a model that an attribution could leave changed."""
    modules = dict(model.named_modules())
    hook_tables = [name for name in vars(model) if name.endswith("_hooks") or "_hooks_" in name]
    return {
        "hooks": {
            (name, table): list(getattr(module, table) or ())
            for name, module in modules.items()
            for table in hook_tables
        },
        "training": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "attention": {
            name: module.config._attn_implementation for name, module in modules.items() if hasattr(module, "config")
        },
        "config": model.config.to_dict(),
        "requires_grad": {name: parameter.requires_grad for name, parameter in model.named_parameters()},
        "grad": {name: id(parameter.grad) for name, parameter in model.named_parameters()},
        "versions": {name: parameter._version for name, parameter in model.named_parameters()},
    }


@dataclass(frozen=True)
class SyntheticLayer:
    """What a layer computed, tensor by tensor; attributes as in `LayerTrace`."""

    modules: LayerModules
    query: Tensor
    key: Tensor
    value: Tensor
    scaling: float
    context: Tensor
    mask: Tensor
    hidden_states: Tensor
    attention_norm_input: Tensor
    output_norm_input: Tensor
    output: Tensor

    def trace(self) -> LayerTrace:
        return LayerTrace(
            modules=self.modules,
            attention=ScoredAttention(self.query, self.key, self.value, self.scaling),
            context=self.context,
            mask=self.mask,
            padded=not bool(self.mask.all()),
            hidden_states=self.hidden_states,
            attention_norm_input=self.attention_norm_input,
            end=LayerEnd((self.output_norm_input,), self.output),
        )


def synthetic_layer(
    lengths=(7,),
    heads: int = 4,
    head_dim: int = 8,
    d: int | None = None,
    dtype: torch.dtype = torch.float64,
    kind: str = "random",
    residual: float = 1.0,
    seed: int = 0,
    outside: float = 0.35,
) -> SyntheticLayer:
    """A layer made of random numbers, consistent in all that the method uses.

    `kind`: "cancel" head 1 undoes head 0 up to one part in a thousand; "repeat" heads 1 and 0 are equal;
    "zero-values" no token has a value; "low-rank" all values are multiples of one vector; "staircase" every head takes
    back most of the sum of those before it, so that all together cancel though no head is near the span of others.
    """
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d = heads * head_dim if d is None else d
    batch, n = len(lengths), max(lengths)
    mask = torch.arange(n) < torch.tensor(lengths)[:, None]
    query, key, value = (random(batch, heads, n, head_dim) for _ in range(3))
    projection = nn.Linear(heads * head_dim, d).double()
    norm1, norm2 = nn.LayerNorm(d).double(), nn.LayerNorm(d, eps=1e-5).double()
    per_head = random(d, heads, head_dim) / (heads * head_dim) ** 0.5
    if kind in ("cancel", "repeat"):
        query[:, 1], key[:, 1], value[:, 1] = query[:, 0], key[:, 0], value[:, 0]
        per_head[:, 1] = per_head[:, 0] if kind == "repeat" else -per_head[:, 0] * (1 + 1e-3 * random(d, head_dim))
    if kind == "cancel":  # every head has its opposite: nothing but small remainders is left
        for h in range(2, heads, 2):
            query[:, h : h + 2], key[:, h : h + 2] = query[:, :2], key[:, :2]
            value[:, h + 1] = value[:, h]
            per_head[:, h + 1] = -per_head[:, h] * (1 + 1e-3 * random(d, head_dim))
    if kind == "zero-values":
        value.zero_()
    if kind == "low-rank":
        value[:] = value[:, :1, :1] * random(batch, heads, n, 1)
    if kind == "staircase":
        query.zero_()  # every head looks at all tokens alike
        value[:] = value[:, :1, :, :1]
        basis = torch.linalg.qr(random(d, heads)).Q
        per_head.zero_()
        per_head[:, 0, 0] = total = basis[:, 0]
        for h in range(1, heads):
            # a new direction holds a share of `outside` of the head's squared length, the rest goes against the sum
            step = (1 - outside) ** 0.5 * total.norm()
            direction = -((1 - outside) ** 0.5) * total / total.norm() + outside**0.5 * basis[:, h]
            per_head[:, h, 0] = step * direction
            total = total + per_head[:, h, 0]
    with torch.no_grad():
        projection.weight.copy_(per_head.flatten(1))
        projection.bias.copy_(random(d))
        for norm in (norm1, norm2):
            norm.weight.copy_(random(d))
            norm.bias.copy_(random(d))
    x = residual * random(batch, n, d)
    scaling = head_dim**-0.5
    scores = (query @ key.transpose(-1, -2) * scaling).masked_fill(~mask[:, None, None], -torch.inf)
    context = (scores.softmax(-1) @ value).transpose(1, 2).flatten(2)
    with torch.no_grad():
        y1 = projection(context) + x
        y2 = norm1(y1) + random(batch, n, d)
        output = norm2(y2)
    return SyntheticLayer(
        modules=LayerModules(nn.Identity(), nn.Identity(), projection.to(dtype), norm1.to(dtype), norm2.to(dtype)),
        query=query.to(dtype),
        key=key.to(dtype),
        value=value.to(dtype),
        scaling=scaling,
        context=context.to(dtype),
        mask=mask,
        hidden_states=x.to(dtype),
        attention_norm_input=y1.to(dtype),
        output_norm_input=y2.to(dtype),
        output=output.to(dtype),
    )


LETTERS = [chr(c) for c in range(ord("a"), ord("z") + 1)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


def save_letter_model(folder: Path) -> str:
    """A random BERT classifier of 3 layers that knows single letters, saved with its tokenizer; returns the folder."""
    vocabulary = [*SPECIAL, *LETTERS, *(f"##{letter}" for letter in LETTERS)]
    words = Tokenizer(models.WordPiece({token: k for k, token in enumerate(vocabulary)}, unk_token="[UNK]"))
    words.normalizer = normalizers.BertNormalizer()
    words.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    names = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    PreTrainedTokenizerFast(tokenizer_object=words, **names).save_pretrained(folder)
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=24,
        num_hidden_layers=3,
        num_attention_heads=3,
        intermediate_size=32,
        max_position_embeddings=40,
        id2label={0: "no", 1: "yes"},
    )
    BertForSequenceClassification(config).save_pretrained(folder)
    return str(folder)


_VISION = {
    "hidden_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "intermediate_size": 40,
    "image_size": 12,
    "patch_size": 4,
}
VISION = {
    "vit": (transformers.ViTConfig, _VISION),
    "deit": (transformers.DeiTConfig, _VISION),
    "dinov2": (transformers.Dinov2Config, {**_VISION, "mlp_ratio": 2}),
    "dinov2_with_registers": (
        transformers.Dinov2WithRegistersConfig,
        {**_VISION, "mlp_ratio": 2, "num_register_tokens": 2},
    ),
    "clip_vision_model": (transformers.CLIPVisionConfig, _VISION),
    "siglip_vision_model": (transformers.SiglipVisionConfig, _VISION),
}


def tiny_vision(family: str, dtype: torch.dtype = torch.float64, **config) -> transformers.PreTrainedModel:
    """A random vision encoder in evaluation mode, of 3 x 3 patches; weights as `tiny_model`."""
    make_config, options = VISION[family]
    model = transformers.AutoModel.from_config(make_config(**{**options, **config}))
    randomize(model)
    return model.to(dtype).eval()


def pictures(count: int = 2, size: tuple[int, int] = (12, 12), dtype: torch.dtype = torch.float64) -> Tensor:
    """pixel_values of random pictures."""
    return torch.randn(count, 3, *size, generator=torch.Generator().manual_seed(0), dtype=torch.float64).to(dtype)


def change_weights(folder: Path, change) -> None:
    """Replace the weights in a model's folder, a dict of tensors, by change(weights)."""
    weights = {name: tensor.clone() for name, tensor in change(load_file(folder / "model.safetensors")).items()}
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def change_json(folder: Path, file: str = "config.json", **fields) -> None:
    """Set fields of a JSON file in a model's folder; ... takes one away."""
    content = json.loads((folder / file).read_text()) | fields
    content = {name: value for name, value in content.items() if value is not ...}
    (folder / file).write_text(json.dumps(content))


def with_more(**more: torch.Tensor):
    """folder -> None: adds weights to those in the folder."""
    return lambda folder: change_weights(folder, lambda weights: weights | more)
