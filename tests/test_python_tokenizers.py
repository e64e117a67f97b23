"""Tokenizers that are written in Python and know no offsets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import transformers
from helpers import tiny_model
from tokenizer_cases import check_as_serial, words_of

import globenc
from globenc.tokenization import encode, long_texts

# Tokenizers written in Python


def tweets(loader, folder: Path):
    (folder / "vocab.txt").write_text(
        "".join(f"{piece} 9\n" for piece in ["a", "good", "film", "won@@", "der@@", "ful", "sinh_@@", "viên", ","])
    )
    merges = ["w o", "wo n", "d e", "de r", "f u", "fu l</w>", "f i", "fi l", "fil m</w>", "g o", "go o", "goo d</w>"]
    merges += ["s i", "si n", "sin h", "sinh _", "v i", "vi ê", "viê n</w>"]
    (folder / "bpe.codes").write_text("".join(f"{merge} 9\n" for merge in merges))
    return loader(str(folder / "vocab.txt"), str(folder / "bpe.codes"))


def esm(folder: Path):
    (folder / "esm.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", *"LAGVM", "<mask>"]))
    return transformers.EsmTokenizer(str(folder / "esm.txt"))


def legacy_bert(folder: Path):
    (folder / "bert.txt").write_text(
        "\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "fil", "##m", "good"])
    )
    return transformers.models.bert.tokenization_bert_legacy.BertTokenizerLegacy(str(folder / "bert.txt"))


IN_PYTHON = {
    "bertweet": (lambda folder: tweets(transformers.BertweetTokenizer, folder), "a wonderful good film", "good film"),
    "phobert": (lambda folder: tweets(transformers.PhobertTokenizer, folder), "a sinh_viên good", "wonderful film"),
    "bert": (legacy_bert, "a good film", "film good"),
    "esm": (esm, "L A G V", "V <mask> M"),
    "byt5": (lambda folder: transformers.ByT5Tokenizer(), "très  good 😀", "a film"),
    "canine": (lambda folder: transformers.CanineTokenizer(), "très  good 😀", "a film"),
    "perceiver": (lambda folder: transformers.PerceiverTokenizer(), "très  good 😀", "a film"),
}


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.slow if name == "canine" else ()) for name in IN_PYTHON]
)
def test_tokenizers_in_python(tmp_path, name):
    make, text, pair = IN_PYTHON[name]
    tokenizer = make(tmp_path)
    assert not tokenizer.is_fast
    words, e = words_of(tokenizer, text, pair)
    assert [word.text for word in words] == [*text.split(), *pair.split()]
    assert [word.segment for word in words] == [0] * len(text.split()) + [1] * len(pair.split())
    assert (e.offsets is not None) == (name in ("byt5", "canine", "perceiver"))
    if e.offsets is not None:
        assert all((text, pair)[word.segment][word.start : word.end] == word.text for word in words)
    for side in ("right", "left"):
        tokenizer.truncation_side = side
        for limit in (None, 7, 8, 9):
            check_as_serial(tokenizer, [text, pair], None, limit)
            check_as_serial(tokenizer, [text, pair], [pair, text], limit)


def test_unknown_pieces_of_a_word_stay_in_it(tmp_path):
    words, _ = words_of(tweets(transformers.BertweetTokenizer, tmp_path), "wonderxyz film")
    assert [(word.first, word.stop) for word in words][1][1] - [(word.first, word.stop) for word in words][1][0] == 1
    assert len(words) == 2


def test_the_page_of_a_pair_without_offsets(tmp_path):
    tokenizer = tweets(transformers.BertweetTokenizer, tmp_path)
    model = tiny_model("roberta", vocab_size=90)
    a = globenc.GlobEnc(model, tokenizer)("a wonderful film", text_pair="good film")
    assert [word.text for word in a.words()] == [
        "<s>", "a", "wonderful", "film", "</s>", "</s>", "good", "film", "</s>",
    ]  # fmt: skip
    from globenc.render.pieces import pieces

    assert "".join(piece.text for piece in pieces(a, a.words(), 0)) == "a wonderful film"
    assert "".join(piece.text for piece in pieces(a, a.words(), 1)) == "good film"


def test_a_long_text_in_python(tmp_path, monkeypatch):
    tokenizer = legacy_bert(tmp_path)
    text = "a good film " * 400
    whole = encode(tokenizer, [text], None, 20)[0]
    monkeypatch.setattr(long_texts, "PIECE_IN_PYTHON", 500)
    asked = []
    monkeypatch.setattr(tokenizer, "_tokenize", lambda text, f=tokenizer._tokenize: asked.append(len(text)) or f(text))
    found = encode(tokenizer, [text], None, 20)[0]
    assert max(asked) < 2500
    np.testing.assert_array_equal(found.ids, whole.ids)
    assert (found.lost, whole.lost) == (1600 - 18, 1600 - 18)


# A tokenizer without offsets


class SlowTokenizer(transformers.PreTrainedTokenizer):
    vocab_files_names = {}  # noqa: RUF012
    model_input_names = ["input_ids", "token_type_ids", "attention_mask"]  # noqa: RUF012

    def __init__(self, **kwargs):
        self.pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "bleak", "charm", "##ing", "and"]
        super().__init__(
            unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]", mask_token="[MASK]", **kwargs
        )

    @property
    def vocab_size(self):
        return len(self.pieces)

    def get_vocab(self):
        return {piece: i for i, piece in enumerate(self.pieces)}

    def _tokenize(self, text):
        return [piece for word in text.split() for piece in word.replace("charming", "charm ##ing").split()]

    def _convert_token_to_id(self, token):
        return self.get_vocab().get(token, 1)

    def _convert_id_to_token(self, index):
        return self.pieces[index]

    def build_inputs_with_special_tokens(self, first, second=None):
        return [2, *first, 3] + ([] if second is None else [*second, 3])

    def get_special_tokens_mask(self, token_ids_0, token_ids_1=None, already_has_special_tokens=False):
        if already_has_special_tokens:
            return [int(i in (0, 2, 3)) for i in token_ids_0]
        mask = [1] + [0] * len(token_ids_0) + [1]
        return mask if token_ids_1 is None else [*mask, *[0] * len(token_ids_1), 1]

    def create_token_type_ids_from_sequences(self, token_ids_0, token_ids_1=None):
        types = [0] * (len(token_ids_0) + 2)
        return types if token_ids_1 is None else types + [1] * (len(token_ids_1) + 1)


def test_slow_tokenizer(classifier):
    tokenizer = SlowTokenizer()
    assert not tokenizer.is_fast
    explainer = globenc.GlobEnc(classifier, tokenizer)
    a = explainer("charming and bleak")
    assert a.tokens == ["[CLS]", "charm", "##ing", "and", "bleak", "[SEP]"]
    assert a.offsets == [None] * 6
    assert [w.text for w in a.words()] == ["[CLS]", "charming", "and", "bleak", "[SEP]"]
    assert sum(w.score for w in a.words()) == pytest.approx(1, rel=1e-12)
    pair = explainer("charming", text_pair="bleak and bleak")
    assert pair.segments == [None, 0, 0, None, 1, 1, 1, None]
    with pytest.warns(UserWarning, match="tokens that fit"):
        assert explainer("bleak " * 60).truncated == 14
    assert [b.tokens for b in explainer(["bleak", "charming and"])] == [
        ["[CLS]", "bleak", "[SEP]"],
        ["[CLS]", "charm", "##ing", "and", "[SEP]"],
    ]


TEXT = "A charming and often affecting journey."
