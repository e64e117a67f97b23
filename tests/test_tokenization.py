"""Tokens and words: exactly the tokenizer's tokens, cut without touching it, and words as they stand in the text."""

from __future__ import annotations

import itertools
import json
import random
import subprocess
import sys
import threading
import warnings

import numpy as np
import pytest
import transformers
from helpers import CORPUS, tiny_model
from tokenizer_cases import check_as_serial, words_of
from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

import globenc
from globenc.text_spans import joined
from globenc.tokenization import encode, long_texts

SPECIAL = ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]


NAMES = {"bos_token": "<s>", "eos_token": "</s>", "cls_token": "<s>", "sep_token": "</s>"}


NAMES |= {"unk_token": "<unk>", "pad_token": "<pad>", "mask_token": "<mask>"}


# blanks of all sorts, ligatures, fractions, accents apart, emoji of several parts, scripts without blanks
HARD = "  a good  film, très ﬁne \u200bcafe\u0301 x½ 👩\u200d👩\u200d👧 這部 iPhone手機 go\x00od don't 1999 <mask>b\n\n"


HARD_WORDS = {
    "a", "good", "très", "ﬁne", "cafe\u0301", "x½", "👩\u200d👩\u200d👧", "iPhone", "go\x00od", "1999", "b",
}  # fmt: skip


def template(pair: str = "<s> $A </s> </s> $B </s>") -> processors.TemplateProcessing:
    return processors.TemplateProcessing(single="<s> $A </s>", pair=pair, special_tokens=[("<s>", 0), ("</s>", 2)])


def made(model, trainer, pre=None, norm=None, post=None) -> transformers.PreTrainedTokenizerFast:
    tokenizer = Tokenizer(model)
    tokenizer.normalizer, tokenizer.pre_tokenizer = norm, pre
    tokenizer.train_from_iterator(CORPUS, trainer)
    if post is not None:
        tokenizer.post_processor = post
    return transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **NAMES)


def unigram(pre, norm=None) -> transformers.PreTrainedTokenizerFast:
    trainer = trainers.UnigramTrainer(vocab_size=120, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)
    return made(models.Unigram(), trainer, pre, norm, template())


def bytes_of(pre, post) -> transformers.PreTrainedTokenizerFast:
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    return made(models.BPE(), trainer, pre, None, post)


def sentencepiece() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary and merges of a byte-fallback BPE without word boundaries, whose pieces hold no blank inside."""
    tokens = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256)), *"\u2581abcdefghijklmnopqrstuvwxyz,.'"]
    merges = [("g", "o"), ("o", "d"), ("go", "od"), ("f", "i"), ("l", "m"), ("fi", "lm"), ("\u2581", "a")]
    merges += [("\u2581", "good"), ("\u2581", "film")]
    return {token: i for i, token in enumerate(dict.fromkeys([*tokens, *(a + b for a, b in merges)]))}, merges


def llama(**options) -> transformers.LlamaTokenizer:
    vocab, merges = sentencepiece()
    return transformers.LlamaTokenizer(
        vocab=vocab,
        merges=merges,
        pad_token="<pad>",
        mask_token="<mask>",
        add_bos_token=True,
        add_eos_token=True,
        **options,
    )


def gemma() -> transformers.GemmaTokenizer:
    vocab, merges = sentencepiece()
    vocab |= {"<bos>": len(vocab), "<eos>": len(vocab) + 1}
    return transformers.GemmaTokenizer(vocab=vocab, merges=merges)


def roberta(prefix: bool) -> processors.RobertaProcessing:
    return processors.RobertaProcessing(("</s>", 2), ("<s>", 0), trim_offsets=True, add_prefix_space=prefix)


def level(**options) -> pre_tokenizers.ByteLevel:
    return pre_tokenizers.ByteLevel(**{"add_prefix_space": False, **options})


BARE = {
    "byte-trimmed": lambda: bytes_of(level(), roberta(False)),
    "byte-prefix": lambda: bytes_of(level(add_prefix_space=True), roberta(True)),
    "byte-blanks": lambda: bytes_of(level(), template("<s> $A </s> $B:1 </s>:1")),
    "byte-no-template": lambda: bytes_of(level(), None),
    "byte-whole": lambda: bytes_of(level(use_regex=False), template()),
    "metaspace": lambda: unigram(pre_tokenizers.Metaspace(), normalizers.NFKC()),
    "metaspace-whole": lambda: unigram(pre_tokenizers.Metaspace(split=False), normalizers.NFKC()),
    "unigram-whole": lambda: unigram(None),
    "characters": lambda: unigram(pre_tokenizers.Split("", "isolated")),
    "llama": llama,
    "gemma": gemma,
}


NAMED = ["wordpiece", *BARE]


WITHOUT_WORDS = ["byte-whole", "metaspace-whole", "unigram-whole", "characters", "llama", "gemma"]


@pytest.fixture(scope="module")
def zoo(wordpiece) -> dict[str, transformers.PreTrainedTokenizerFast]:
    return {
        "wordpiece": transformers.PreTrainedTokenizerFast(
            tokenizer_object=wordpiece.backend_tokenizer,
            **wordpiece.special_tokens_map,
            model_input_names=wordpiece.model_input_names,
        ),
        **{name: make() for name, make in BARE.items()},
    }


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", NAMED)
def test_as_the_tokenizer_itself(zoo, name, side):
    tokenizer = zoo[name]
    tokenizer.truncation_side = side
    generator = random.Random(0)
    vocabulary = HARD.split(" ")
    texts, pairs = (
        [" ".join(generator.choices(vocabulary, k=k)) or "a" for k in (1, 2, 9, 30, 30, 9)] for _ in range(2)
    )
    pairs.reverse()
    try:
        for limit in (None, 9, 10, 31):
            check_as_serial(tokenizer, texts, None, limit)
            check_as_serial(tokenizer, texts, pairs, limit)
    finally:
        tokenizer.truncation_side = "right"


def test_changes_of_the_tokenizer_are_seen():
    """Added tokens, other special tokens, a subclass that looks at the text first."""

    class Shouting(transformers.PreTrainedTokenizerFast):
        def _encode_plus(self, text, *args, **kwargs):
            return super()._encode_plus([t.lower() for t in text], *args, **kwargs)

    tokenizer = bytes_of(level(), None)
    for change in (
        lambda: tokenizer.add_tokens(["zork", AddedToken("flim", lstrip=True, single_word=True)]),
        lambda: tokenizer.add_special_tokens({"additional_special_tokens": ["<x>"]}),
        lambda: setattr(tokenizer, "add_bos_token", True),
        lambda: setattr(tokenizer, "split_special_tokens", True),
        lambda: setattr(tokenizer.backend_tokenizer, "normalizer", normalizers.Lowercase()),
    ):
        check_as_serial(tokenizer, ["A zork  flim <x>good <mask>"], None, None)
        check_as_serial(tokenizer, ["A zork  flim <x>good <mask>"] * 2, ["b"] * 2, 8)
        change()
        check_as_serial(tokenizer, ["A zork  flim <x>good <mask>"], None, 8)
    loud = Shouting(tokenizer_object=tokenizer.backend_tokenizer, **NAMES)
    assert encode(loud, ["GOOD"], None, None)[0].ids.tolist() == encode(loud, ["good"], None, None)[0].ids.tolist()


@pytest.mark.parametrize("what", ["tokens", pytest.param("scores", marks=pytest.mark.slow)])
def test_threads_get_what_one_alone_gets(explainer, what):
    """400 mixed calls of four threads, while a fifth cuts and pads with the same tokenizer."""
    tokenizer = explainer.tokenizer
    long = " ".join(["unflinchingly bleak and charming"] * 60)
    calls = [
        ("a charming journey", None, 48),
        (long, None, 48),
        (long, "bleak", 21),
        ("bleak", long, 16),
        (long, long, 17),
        ("a a a a a", None, 5),
    ]

    def answer(text: str, pair: str | None, limit: int):
        if what == "scores":
            a = explainer(text, text_pair=pair, max_length=limit)
            return a.tokens, a.truncated, a.segments, a.scores.tolist()
        e = encode(tokenizer, [text], None if pair is None else [pair], limit)[0]
        return e.ids.tolist(), e.lost, e.segments.tolist(), e.offsets.tolist()

    wrong, stop = [], threading.Event()

    def call(seed: int) -> None:
        try:
            for k in random.Random(seed).choices(range(len(calls)), k=100):
                if answer(*calls[k]) != alone[k]:
                    wrong.append(calls[k])
        except Exception as error:
            wrong.append(error)

    def meddle() -> None:
        while not stop.is_set():
            tokenizer(["a b c d e"] * 3, truncation=True, max_length=4, padding="max_length")
            tokenizer("a b c", truncation=False, padding=False)
            stop.wait(0.002)

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)  # more changes between threads, and sooner
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        alone = [answer(*each) for each in calls]
        threads = [threading.Thread(target=call, args=(seed,)) for seed in range(4)]
        other = threading.Thread(target=meddle)
        for thread in (*threads, other):
            thread.start()
        for thread in threads:
            thread.join()
        stop.set()
        other.join()
    sys.setswitchinterval(interval)
    tokenizer.backend_tokenizer.no_truncation()
    tokenizer.backend_tokenizer.no_padding()
    assert wrong == []
    assert sum(lost > 0 for _, lost, *_ in alone) == 5


# Words


@pytest.mark.parametrize("name", NAMED)
def test_words_stand_in_the_text(zoo, name):
    tokenizer = zoo[name]
    words, e = words_of(tokenizer, HARD, "good film")
    assert {word.text for word in words if word.segment == 0} >= HARD_WORDS
    assert [word.text for word in words if word.segment == 1] == ["good", "film"]
    covered = []
    for word in words:
        assert (HARD, "good film")[word.segment][word.start : word.end] == word.text == word.text.strip() != ""
        assert not any(character.isspace() for character in word.text)
        covered += range(word.first, word.stop)
    assert covered == np.flatnonzero(e.segments >= 0).tolist()  # every token is of one word
    own = [word for word in words if word.segment == 0]
    assert all(a.end <= b.start for a, b in itertools.pairwise(own))
    for (start, end), segment in zip(e.offsets.tolist(), e.segments.tolist(), strict=True):
        token = "" if segment < 0 else (HARD, "good film")[segment][start:end]
        assert token.strip() in (token, "")


@pytest.mark.parametrize("name", WITHOUT_WORDS)
def test_words_of_tokenizers_without_word_boundaries(zoo, name):
    for text in ("a good film, don't (really)", "film.", "good.film", "x\ty\u3000z"):
        words, _ = words_of(zoo[name], text)
        assert "".join(word.text for word in words) == "".join(text.split())
        assert all(word.text.isalnum() or len(word.text) == 1 for word in words), words


@pytest.mark.parametrize("name", ["wordpiece", "byte-blanks", "byte-trimmed", "metaspace"])
def test_words_are_the_tokenizers_own_where_it_has_any(zoo, name):
    tokenizer, text = zoo[name], "it 's a yet inventive filmmaker . very, very slow -- don't"
    words, e = words_of(tokenizer, text)
    own = [w for w in tokenizer(text).word_ids() if w is not None]
    ours = e.word_ids[e.segments >= 0]
    assert (np.diff(ours) != 0).tolist() == (np.diff(own) != 0).tolist()
    assert "filmmaker" in [word.text for word in words]


def test_a_token_of_blanks_goes_with_its_neighbour(zoo):
    for name in ("byte-blanks", "byte-trimmed", "metaspace"):
        words, _ = words_of(zoo[name], "good   film \n\n")
        assert [word.text for word in words] == ["good", "film"]
        assert words[0].stop - words[0].first < words[1].stop - words[1].first
    words, _ = words_of(zoo["byte-blanks"], "\u200b")
    assert [word.text for word in words] == ["\u200b"]


def test_scripts_without_blanks():
    """A word is a character or what one token holds; katakana and Latin letters stay together."""
    tokenizer = bytes_of(level(), template())
    for text, expected in {
        "这部电影很好。good": ["这", "部", "电", "影", "很", "好", "。", "good"],
        "コンピューターは速い": ["コンピューター", "は", "速", "い"],
        "หนังดี": ["ห", "นั", "ง", "ดี"],
        "영화가 좋다": ["영화가", "좋다"],
        "नमस्ते दुनिया": ["नमस्ते", "दुनिया"],
    }.items():
        assert [word.text for word in words_of(tokenizer, text)[0]] == expected


def test_an_inserted_blank_takes_no_character(zoo):
    """Trimmed offsets behind a special token in the text lack their first character in the tokenizer itself."""
    words, _ = words_of(zoo["byte-prefix"], "a <mask>good <mask>x")
    assert [word.text for word in words] == ["a", "<mask>", "good", "<mask>", "x"]


def test_added_tokens_side_by_side(explainer):
    words = explainer("a [MASK][MASK] film").words()
    assert [word.text for word in words] == ["[CLS]", "a", "[MASK]", "[MASK]", "film", "[SEP]"]


@pytest.mark.parametrize("name", ["byte-blanks", "llama", "metaspace-whole"])
def test_one_word_is_one_word_in_extract_and_json(tmp_path, zoo, name):
    """No blank before it, whether it stands first or not; what is written points at it."""
    tokenizer = zoo[name]
    model = tiny_model("bert", vocab_size=600, max_position_embeddings=200)
    explainer = globenc.GlobEnc(model, tokenizer)
    texts = ["good", " good", "a good  film.\n", "film  good"]
    globenc.extract([{"text": t} for t in texts], tmp_path / "out", model=explainer, words=True, progress=False)
    table = globenc.load_extract(tmp_path / "out").to_pylist()
    assert sum(row["words"].count("good") for row in table) == 4
    for row, text, a in zip(table, texts, explainer(texts), strict=True):
        read = json.loads(a.to_json())
        words = [word for word in read["words"] if word["segment"] is not None]
        assert row["words"] == [word["text"] for word in words] == [text[w["start"] : w["end"]] for w in words]
        np.testing.assert_allclose(row["word_scores"], [word["score"] for word in words], rtol=1e-5)
        assert sum(word.score for word in a.words()) == pytest.approx(1, rel=1e-12)
        parts = sum(passage.score for passage in a.sentences())
        assert parts == pytest.approx(sum(word.score for word in a.words() if not word.special), rel=1e-9)
        for start, end in zip(row["start"], row["end"], strict=True):
            token = "" if start is None else text[start:end]
            assert token.strip() in (token, "")


@pytest.mark.parametrize(
    ("pieces", "word"),
    [
        (["wonder@@", "ful"], "wonderful"),
        (["wonder@@"], "wonder"),
        (["charm", "##ing"], "charming"),
        (["fil", "m</w>"], "film"),
        (["\u2581", "film"], "film"),
        (["\u2581caf", "<0xC3>", "<0xA9>"], "café"),
        (["\u0120caf", "Ã©"], "café"),
        (["<0x0A>"], "<0x0A>"),
        (["##"], "##"),
        (["[UNK]"], "[UNK]"),
    ],
)
def test_names_without_marks(pieces, word):
    assert joined(pieces) == word


# Very long texts

LONG = {
    "words": "a good film, unflinchingly bleak  and desperate .\n" * 300,
    "no-blank": "acharmingjourney" * 700,
    "unknown-run": "a good film " + "ß" * 5000 + " and bleak" * 900,
    "blanks": "a" + " " * 5000 + "film " * 1500,
    "cjk": "這部電影很好" * 1200,
    "emoji": "👩\u200d👩\u200d👧😀" * 1200,
}


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("name", ["wordpiece", "byte-blanks", "metaspace"])
def test_a_long_text_is_read_as_if_whole(zoo, monkeypatch, name, side):
    tokenizer = zoo[name]
    tokenizer.truncation_side = side
    try:
        for kind, text in LONG.items():
            for columns in ([text], [text, "short film"], ["short film", text], [text, LONG["words"]]):
                arguments = ([columns[0]], columns[1:] or None, 51)
                monkeypatch.setattr(long_texts, "PIECE", 1 << 20)
                whole = encode(tokenizer, *arguments)[0]
                if len(columns) == 1:  # of pairs the tokenizer itself makes all pairs of parts
                    own = tokenizer(text, truncation=True, max_length=51, verbose=False)
                    assert whole.ids.tolist() == own["input_ids"]
                monkeypatch.setattr(long_texts, "PIECE", 700)
                found = encode(tokenizer, *arguments)[0]
                for field in ("ids", "offsets", "segments", "word_ids"):
                    np.testing.assert_array_equal(getattr(found, field), getattr(whole, field), f"{kind} {field}")
                assert abs(found.lost - whole.lost) <= (0 if kind == "words" else 40), kind
    finally:
        tokenizer.truncation_side = "right"


MEMORY = """
import resource, sys
import globenc
from globenc.tokenization import encode
tokenizer = globenc.GlobEnc.from_pretrained().tokenizer
encode(tokenizer, ["a film"], None, 512)
text = sys.argv[1] * (int(sys.argv[2]) // len(sys.argv[1]))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
encoding = encode(tokenizer, [text], None, 512)[0]
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024, len(encoding), encoding.lost)
"""


@pytest.mark.slow
@pytest.mark.parametrize("text", ["good film ", "abcdefgh", "好电影", "😀👍", '{"a":12,"bc":"film"},'])
def test_memory_of_a_long_text(text):
    """50 MB of UTF-8: at most 150 MB beside the text itself."""
    size = 50_000_000 // len(text.encode()) * len(text)
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, text, str(size)], capture_output=True, text=True, check=True, timeout=900
    )
    grown, tokens, _ = map(int, done.stdout.split())
    assert grown < 150
    assert tokens in (3, 512)
