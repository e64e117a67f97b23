"""What a person reads: nothing in it steers a terminal, and every encoding of a terminal can show it."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import unicodedata
from pathlib import Path

import pytest
from helpers import save_letter_model
from rich.table import Table
from transformers import AutoTokenizer

import globenc
from globenc import cli
from globenc.printing import escaped, printable, readable_streams, say
from globenc.render.console import Console

EVIL = "\x1b]0;owned\x07\x1b[31m\r\n\x9b2J\u202e\u2066\x7f[bold]:smile:"
STEERING = [chr(c) for c in range(0x110000) if unicodedata.category(chr(c)) in ("Cc", "Cs")]
STEERING += list("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069\u2028\u2029")
ENCODINGS = {"ascii": True, "cp1252": True, "latin-1": False, "cp437": False, "shift_jis": False, "utf-16": False}
JAPANESE = "この映画 is a good film"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def evil(tmp_path_factory, model) -> str:
    """The same model in a folder, with labels and tokens whose names steer terminals."""
    folder = tmp_path_factory.mktemp("models") / f"evil{EVIL}"
    folder.mkdir()
    for file in Path(model).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    config |= {"id2label": {"0": f"no{EVIL}", "1": f"yes{EVIL}"}, "label2id": {f"no{EVIL}": 0, f"yes{EVIL}": 1}}
    (folder / "config.json").write_text(json.dumps(config))
    tokenizer = (folder / "tokenizer.json").read_text(encoding="utf-8")
    (folder / "tokenizer.json").write_text(tokenizer.replace('"[SEP]"', json.dumps(f"[SEP{EVIL}]")), encoding="utf-8")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"sep_token": f"[SEP{EVIL}]"}))
    assert AutoTokenizer.from_pretrained(folder)("a").tokens()[-1] == f"[SEP{EVIL}]"
    return str(folder)


def run(arguments: list[str], capture) -> tuple[int, bytes]:
    with pytest.raises(SystemExit) as stopped:
        cli.main(arguments)
    out, err = capture.readouterr()
    assert b"Traceback" not in err
    return stopped.value.code or 0, out + err


def assert_clean(printed: bytes) -> None:
    text = printed.decode()
    assert not [hex(ord(character)) for character in text if character in STEERING and character != "\n"]
    assert "\U0001f604" not in text


def test_printable():
    assert all(printable(f"a{character}b") in ("ab", "a b", "a\ufffdb") for character in STEERING)
    kept = "plain é 映画 ½ \U0001f600 שלום \ufffd"
    assert printable(kept) == kept


@pytest.mark.parametrize("character", STEERING[:70] + STEERING[-14:], ids=lambda c: f"{ord(c):04x}")
def test_json_is_the_same_and_steers_nothing(character):
    value = {f"k{character}": f"é{character}ü"}
    written = escaped(json.dumps(value, ensure_ascii=False))
    assert json.loads(written) == value
    assert character not in written
    assert "é" in written.encode().decode()


def test_console_takes_data_as_it_is(capsysbinary):
    table = Table(f"head{EVIL}", title=f"title{EVIL}", caption=f"caption{EVIL}")
    table.add_row(f"cell{EVIL}")
    console = Console()
    for what in (table, f"line{EVIL}"):
        console.print(what)
    printed = capsysbinary.readouterr().out
    assert_clean(printed)
    assert b"[bold]:smile:" in printed


def test_lines_on_standard_error_are_lines(capsysbinary, monkeypatch):
    say(f"globenc: warning: {EVIL}\nglobenc: wrote nothing")
    printed = capsysbinary.readouterr().err
    assert_clean(printed)
    assert printed.count(b"\n") == 1
    monkeypatch.setattr(sys, "stderr", None)
    say("nobody listens")


def test_attribute(evil, capsysbinary, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    page = tmp_path / f"page{EVIL}\udcff.html"
    for more in (
        [],
        ["--per-layer", "--position", "all"],
        ["--max-length", "4", "--html", str(page)],
        ["--position=-1"],
    ):
        code, printed = run(["attribute", "a good\x1b[31m film\u202e", "-m", evil, *more], capsysbinary)
        assert code == 0, printed
        assert_clean(printed)
        assert b"[bold]:smile:" in printed
    code, printed = run(["attribute", "a\x1b[31m\x9b film", "-m", evil, "--json"], capsysbinary)
    assert code == 0
    assert_clean(printed)
    assert json.loads(printed)["text"] == "a\x1b[31m\x9b film"
    assert EVIL in json.loads(printed)["label"]


def test_extract_and_evaluate(evil, capsysbinary, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    name = f"text{EVIL}"
    data, output = tmp_path / f"data{EVIL}.jsonl", tmp_path / "o\x1b[31mut"
    data.write_text("".join(json.dumps({name: text}) + "\n" for text in ("a b", "", "c d")))
    options = ["--text-column", name, "-m", evil]
    for command, more in (("extract", []), ("evaluate", ["--metrics", "correlation", "--methods", "W,N-Enc"])):
        folder = str(output / command)
        code, printed = run([command, str(data), "-o", folder, *options, *more], capsysbinary)
        assert code == 0, printed
        assert_clean(printed)
        assert b"o\xef\xbf\xbd[31mut" in printed
        for wrong in (["--method", EVIL], ["--id-column", EVIL], ["--limit", EVIL], [f"--{EVIL}"], ["-m", EVIL[:9]]):
            arguments = [command, str(data), "-o", f"{folder}{EVIL}", *options, *wrong]
            code, printed = run(arguments, capsysbinary)
            assert code in (1, 2)
            assert printed.startswith(b"globenc: error: ")
            assert_clean(printed)
            assert printed.count(b"\n") == 1
    page = (output / "evaluate" / "report.html").read_text(encoding="utf-8")
    assert not set(STEERING) & set(page) - {"\n"}
    assert json.loads((output / "evaluate" / "results.json").read_text(encoding="utf-8"))["data"] == [str(data)]


def test_evaluate_takes_file_names_that_are_not_utf8(model, capsysbinary, tmp_path):
    data = tmp_path / "data\udcff.jsonl"
    data.write_text('{"text": "a b"}\n{"text": "c d"}\n')
    arguments = ["evaluate", str(data), "-o", str(tmp_path / "out\udcff"), "-m", model, "--metrics", "correlation"]
    code, printed = run(arguments, capsysbinary)
    assert code == 0, printed
    assert_clean(printed)
    assert json.loads((tmp_path / "out\udcff" / "results.json").read_text())["data"] == [str(data)]


def test_errors_about_models(model, capsysbinary, tmp_path):
    for key, value in (("model_type", EVIL), ("architectures", [EVIL]), ("dtype", EVIL), ("hidden_act", EVIL)):
        for file in Path(model).iterdir():
            (tmp_path / file.name).write_bytes(file.read_bytes())
        config = json.loads((tmp_path / "config.json").read_text()) | {key: value}
        (tmp_path / "config.json").write_text(json.dumps(config))
        code, printed = run(["attribute", "a", "-m", str(tmp_path)], capsysbinary)
        assert_clean(printed)
        assert code in (0, 1)


def test_models_with_a_registered_family(capsysbinary, monkeypatch):
    globenc.register_encoder(
        f"mine{EVIL}",
        layers="encoder.layer",
        attention="attention.self",
        output_projection="attention.output.dense",
        attention_norm="attention.output.LayerNorm",
        output_norm="output.LayerNorm",
    )
    try:
        for width in ("80", "160"):
            monkeypatch.setenv("COLUMNS", width)
            code, printed = run(["models"], capsysbinary)
            assert code == 0
            assert_clean(printed)
        code, printed = run(["models", "--json"], capsysbinary)
        assert_clean(printed)
        assert f"mine{EVIL}" in [family["family"] for family in json.loads(printed)["families"]]
    finally:
        globenc.encoders.table.FAMILIES.pop(f"mine{EVIL}")


@pytest.mark.parametrize(("encoding", "thorough"), ENCODINGS.items(), ids=ENCODINGS)
def test_every_encoding(encoding, thorough, model, tmp_path, monkeypatch):
    """In the process, on streams that fail strictly; their own ways of failing are back afterwards."""
    monkeypatch.setenv("COLUMNS", "80")
    data = tmp_path / "映画.jsonl"
    data.write_text('{"テキスト": "a b"}\n{"テキスト": ""}\n', encoding="utf-8")
    files = [str(data), "-m", model, "-o"]
    arguments = [
        (0, ["attribute", JAPANESE, "-m", model]),
        (0, ["attribute", JAPANESE, "-m", model, "--per-layer", "--position", "all", "--top", "2"]),
        (0, ["--version"]),
        (0, ["--help"]),
        (0, ["evaluate", "--help"]),
        (1, ["attribute", JAPANESE, "-m", "./映画"]),
        (2, ["attribute", JAPANESE, "--method", "映画"]),
        (2, ["映画"]),
    ]
    if thorough:
        arguments += [
            (0, ["models"]),
            (0, ["extract", *files, str(tmp_path / "抽出"), "--text-column", "テキスト"]),
            (0, ["evaluate", *files, str(tmp_path / "評価"), "--text-column", "テキスト", "--metrics", "correlation"]),
        ]
    for code, command in arguments:
        streams = [io.TextIOWrapper(io.BytesIO(), encoding, errors="strict") for _ in range(2)]
        monkeypatch.setattr(sys, "stdout", streams[0])
        monkeypatch.setattr(sys, "stderr", streams[1])
        with pytest.raises(SystemExit) as stopped:
            cli.main(command)
        assert [stream.errors for stream in streams] == ["strict", "strict"]
        for stream in streams:
            stream.flush()
        out, err = (stream.buffer.getvalue().decode(encoding) for stream in streams)
        assert (stopped.value.code or 0) == code, err
        assert "codec" not in err
        assert out if code == 0 and command[0] != "extract" else err.startswith("globenc: ")
        if code == 0 and JAPANESE in command:
            assert "film" in out
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding, errors="strict"))
    with pytest.raises(SystemExit):
        cli.main(["attribute", JAPANESE, "-m", model, "--json"])
    assert json.loads(sys.stdout.buffer.getvalue().decode("utf-8"))["text"] == JAPANESE


def test_look_alikes(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii", errors="strict"))
    with readable_streams():
        print("│ 0.5 ± 0.1 … ╭─╮ ██▌ • ‘a’ 映 ½ \ufffd")
    sys.stdout.flush()
    assert sys.stdout.buffer.getvalue() == b"| 0.5 +- 0.1 ... +-+ ### * 'a' \\u6620 1/2 ?\n"


def test_an_argument_that_a_locale_took_to_pieces(model, capsysbinary):
    """What Python makes of UTF-8 in the locale C is read as the UTF-8 that it is."""
    taken = JAPANESE.encode().decode("ascii", "surrogateescape")
    for arguments in (["attribute", taken], ["attribute", "a", "--pair", taken]):
        code, printed = run([*arguments, "-m", model, "--json"], capsysbinary)
        assert code == 0
        assert JAPANESE in json.loads(printed).values()


@pytest.mark.skipif(os.name != "posix", reason="pseudo-terminals of POSIX")
def test_a_terminal(evil):
    """On a pseudo-terminal nothing of the data's comes out but what rich itself wrote around it."""
    import pty

    main, side = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "globenc", "attribute", "a good\x1b[35;1m film", "-m", evil],
        stdin=subprocess.DEVNULL,
        stdout=side,
        stderr=side,
        env={**os.environ, "TERM": "xterm-256color", "COLUMNS": "100"},
    )
    os.close(side)
    printed = b""
    while True:
        try:
            printed += os.read(main, 1 << 16)
        except OSError:  # nobody has the other side open any more
            break
    os.close(main)
    assert process.wait() == 0, printed
    assert b"\x1b[" in printed  # rich's own
    for data in (b"\x1b]0;", b"\x1b[31m", b"\x1b[35;1m", b"\x07", "\x9b".encode(), "\u202e".encode(), b"\x7f"):
        assert data not in printed
