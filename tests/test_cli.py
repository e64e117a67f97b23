"""The command line: what it prints, its exit codes, and that a failed run leaves no trace."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import get_args, get_type_hints

import matplotlib.image
import pytest
import torch
import typer
from helpers import save_letter_model, tiny_model

import globenc
from globenc import cli
from globenc.cli.attribute import attribute
from globenc.contributions.backend import BACKENDS
from globenc.methods import METHODS

KEYS = {"tokens", "scores", "words", "label", "probability", "method", "position", "model"}


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> str:
    """A folder with a random BERT of 3 layers that knows single letters, with its tokenizer."""
    return save_letter_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def run(capsysbinary, monkeypatch, tmp_path):
    """run(*arguments) -> exit code, standard output, standard error; in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def call(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main(arguments)
        out, err = capsysbinary.readouterr()
        assert b"Traceback" not in err
        return stopped.value.code or 0, out.decode(), err.decode()

    return call


def test_prints_a_ranked_table(run, model):
    code, out, err = run("attribute", "a good film", "--model", model)
    lines = out.splitlines()
    assert code == 0
    assert err == ""
    assert lines[0].split()[0] in ("no", "yes")
    ranked = [line.split()[0] for line in lines if "█" in line]
    assert sorted(ranked) == ["a", "film", "good"]
    assert "says how much, not for or against" in " ".join(out.split())


@pytest.mark.parametrize("position", ["cls", "mean", "all", "2", "-1", "0,2,-1"])
@pytest.mark.parametrize("layers", [False, True], ids=["last", "layers"])
def test_json_is_one_object_and_nothing_else(run, model, position, layers):
    code, out, err = run(
        "attribute", "a film", f"--position={position}", "--json", "-m", model, *["--per-layer"] * layers
    )
    found = json.loads(out)
    assert (code, err) == (0, "")
    assert found.keys() >= KEYS
    expected = int(position) if position.lstrip("-").isdigit() else position
    assert found["position"] == ([0, 2, -1] if position == "0,2,-1" else expected)
    assert (found["layer_scores"] is not None) == layers
    assert found["tokens"] == ["[CLS]", "a", "f", "##i", "##l", "##m", "[SEP]"]
    rows = found["scores"] if position in ("all", "0,2,-1") else [found["scores"]]
    assert [sum(row) for row in rows] == pytest.approx([1.0] * len(rows))
    assert len(rows) == {"all": 7, "0,2,-1": 3}.get(position, 1)


def test_json_equals_the_library(run, model):
    options = {"method": "W-Res", "position": -2, "per_layer": True, "row_normalize": True}
    _, out, _ = run(
        *("attribute", "a film", "--pair", "no film", "--method", "W-Res", "--position", "-2", "--per-layer"),
        *("--row-normalize", "--dtype", "float64", "--device", "cpu", "--backend", "torch", "--json", "-m", model),
    )
    explainer = globenc.GlobEnc.from_pretrained(model, "cpu", "float64", "torch")
    assert json.loads(out) == explainer("a film", "no film", **options).to_dict()


@pytest.mark.parametrize("method", METHODS)
def test_every_method(run, model, method):
    code, out, _ = run("attribute", "a film", "--method", method, "--json", "-m", model)
    assert (code, json.loads(out)["method"]) == (0, method)


def test_class_scores_are_shown_of_the_label_asked_for(run, model):
    _, out, _ = run("attribute", "a film", "--label", "no", "--reference", "origin", "-m", model)
    assert 'Which words speak for "no", and which against it?' in out
    assert "(reference origin)" in " ".join(out.split())
    explained = globenc.GlobEnc.from_pretrained(model)("a film", label="no", reference="origin")
    _, out, _ = run("attribute", "a film", "--label", "no", "--reference", "origin", "--json", "-m", model)
    found = json.loads(out)
    assert found == explained.to_dict()
    assert (found["explained_label"], found["reference"]) == ("no", "origin")
    assert sum(found["class_scores"]) + found["remainder"] == pytest.approx(found["logit"], abs=1e-4)
    number = json.loads(run("attribute", "a film", "--label", "0", "--json", "-m", model)[1])
    assert (number["explained_label"], number["reference"]) == ("no", "zero")


def test_class_scores_can_be_left_out(run, model, tmp_path):
    code, out, _ = run("attribute", "a film", "--no-class-scores", "--html", "a.html", "-m", model)
    assert code == 0
    assert "speak for" not in out + (tmp_path / "a.html").read_text(encoding="utf-8")
    found = json.loads(run("attribute", "a film", "--no-class-scores", "--json", "-m", model)[1])
    assert [found[name] for name in ("class_scores", "explained_label", "logit", "remainder", "reference")] == [
        None
    ] * 5


def test_page_and_picture_have_class_scores(run, model, tmp_path):
    assert run("attribute", "a film", "--html", "a.html", "--plot", "a.svg", "-m", model)[0] == 0
    for name in ("a.html", "a.svg"):
        written = (tmp_path / name).read_text(encoding="utf-8")
        assert "words against" in written, name
        assert "Which words speak for" in written, name


@pytest.mark.parametrize(
    ("label", "message"),
    [("maybe", "label must be one of this model's (0 no, 1 yes), got 'maybe'"), ("2", "label must be in 0..1")],
)
def test_a_label_that_does_not_exist(run, model, label, message):
    code, out, err = run("attribute", "a film", "--label", label, "-m", model)
    assert (code, out) == (1, "")
    assert err.startswith(f"globenc: error: {message}")


def test_text_from_file_and_standard_input(run, model, monkeypatch, tmp_path):
    (tmp_path / "text.txt").write_bytes("\ufeffa fílm\n".encode())
    _, out, _ = run("attribute", "--file", "text.txt", "--json", "-m", model)
    assert json.loads(out)["text"] == "a fílm"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"from here\n")))
    _, out, _ = run("attribute", "-f", "-", "--json", "-m", model)
    assert json.loads(out)["text"] == "from here"


def test_writes_page_and_picture(run, model, tmp_path):
    (tmp_path / "a.html").write_text("old")
    code, _, err = run("attribute", "a film", "--html", "a.html", "--plot", "a.png", "--per-layer", "-m", model)
    assert code == 0
    assert err == "globenc: wrote a.html\nglobenc: wrote a.png\n"
    assert (tmp_path / "a.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")
    height, width, _ = matplotlib.image.imread(tmp_path / "a.png").shape
    assert 500 < width < 2000
    assert 500 < height < 2000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_truncation_warns_and_says_so(run, model):
    code, out, err = run("attribute", "a b c d e f g", "--max-length", "5", "-m", model)
    assert code == 0
    assert err.startswith("globenc: warning: longer than the 5 tokens that fit")
    assert err.count("\n") == 1
    assert "4 of 9 tokens (44%) were cut off" in out


def test_warnings_of_others_are_not_shown(run, model, monkeypatch):
    def noisy(*arguments, **options):
        warnings.warn("from elsewhere", FutureWarning, stacklevel=1)
        return original(*arguments, **options)

    original = globenc.GlobEnc.from_pretrained
    monkeypatch.setattr(globenc.GlobEnc, "from_pretrained", noisy)
    assert run("attribute", "a film", "-m", model, "--json")[2] == ""


USAGE = {
    "no text": ([], "give the text in quotes"),
    "several arguments": (["a", "film"], "TEXT must be one argument, got 2: put the text in quotes"),
    "empty": ([" "], "TEXT is empty"),
    "not utf-8": (["a \udcff"], "TEXT is not valid UTF-8"),
    "text and file": (["a", "--file", "b"], "give TEXT or --file, not both"),
    "empty pair": (["a", "--pair", ""], "--pair is empty"),
    "method": (["a", "--method", "GlobEnc"], "method must be one of N-Enc, N-ResLN"),
    "position": (["a", "--position", "sep"], "position must be cls, mean, all, a token position"),
    "position list": (["a", "--position", "1,,2"], "position must be cls, mean, all, a token position"),
    "backend": (["a", "--backend", "jax"], "'jax' is not one of 'auto', 'reference', 'torch', 'triton'"),
    "dtype": (["a", "--dtype", "int8"], "'int8' is not one of 'float64', 'float32', 'bfloat16', 'float16'"),
    "device": (["a", "--device", "abacus"], "unknown device 'abacus'"),
    "option": (["a", "--bogus"], "No such option: --bogus"),
    "picture": (["a", "--plot", "a.doc"], "picture 'a.doc' must end in one of"),
    "label of nothing": (["a", "--label", "0", "--no-class-scores"], "--no-class-scores leaves them out"),
    "reference": (["a", "--reference", "mask"], "'mask' is not one of 'zero', 'model', 'origin'"),
    "same file": (["a", "--plot", "a.png", "--html", "./a.png"], "--html and --plot are the same file"),
}


@pytest.mark.parametrize(("arguments", "message"), USAGE.values(), ids=USAGE.keys())
def test_wrong_usage_is_one_sentence_and_exit_code_2(run, tmp_path, arguments, message):
    code, out, err = run("attribute", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith("globenc: error: ")
    assert message in err
    assert err.endswith(" (see globenc attribute --help)\n")
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


OLDER_NAMES = [
    (command, option, names)
    for command in ("attribute", "extract", "evaluate")
    for option, names in (("--target=1", ("--position", "--label")), ("--layers", ("--per-layer",)))
    if (command, option) != ("evaluate", "--layers")
]


@pytest.mark.parametrize(("command", "option", "names"), OLDER_NAMES, ids=lambda value: str(value).strip("-"))
def test_older_names_of_options_are_answered_by_what_is_meant(run, command, option, names):
    code, out, err = run(command, "a", option)
    assert (code, out) == (2, "")
    assert err.startswith(f"globenc: error: No such option: {option.split('=')[0]}: ")
    assert all(name in err for name in names)
    assert err.endswith(f" (see globenc {command} --help)\n")
    assert err.count("\n") == 1


@pytest.mark.parametrize(("command", "option"), [("models", "--target"), ("evaluate", "--layers")])
def test_older_names_mean_nothing_to_commands_without_the_option(run, command, option):
    code, _, err = run(command, option)
    assert code == 2
    assert err == f"globenc: error: No such option: {option} (see globenc {command} --help)\n"


def test_an_option_of_several_commands_has_one_help_text():
    """Options of one name differ only where the commands do different things with them."""
    helps: dict[str, set[str]] = {}
    commands = typer.main.get_command(cli.app).commands.values()
    for command in commands:
        for parameter in command.params:
            if parameter.param_type_name == "option":
                helps.setdefault(parameter.opts[0], set()).add(parameter.help)
    shared = {"--model", "--device", "--max-length", "--limit", "--position", "--per-layer", "--text-column", "--json"}
    assert all(len(helps[name]) == 1 for name in shared)
    assert {name for name, texts in helps.items() if len(texts) > 1} == {"--label-column", "--output", "--overwrite"}


def test_unknown_command_and_no_command(run):
    assert run("explain")[:2] == (2, "")
    code, out, _ = run()
    assert code == 2
    assert "Usage: globenc" in out


FAILED = {
    "no model": (["--model", "./nowhere/at/all"], "there is no folder './nowhere/at/all'"),
    "folder without model": (["--model", "."], "no model in folder '.': it has no config.json"),
    "position outside": (["--position", "9"], "position must be a token position inside the text, got 9 for 3 tokens"),
    "too short": (["--max-length", "2"], "max_length must be more than the 2 special tokens"),
    "output folder": (["--html", "no/such/folder.html"], "folder.html': No such file or directory"),
    "output is a folder": (["--html", "."], "it is not a regular file"),
    "device": (["--device", "cuda:99"], "no device 'cuda:99' here"),
    "triton": (["--backend", "triton", "--device", "cpu"], "backend='triton' cannot run here"),
}


@pytest.mark.parametrize(("arguments", "message"), FAILED.values(), ids=FAILED.keys())
def test_failure_is_one_sentence_and_exit_code_1(run, model, tmp_path, arguments, message, monkeypatch):
    monkeypatch.setattr("globenc_kernels.capability.interpreted", lambda: False)
    code, out, err = run("attribute", "a", "-m", model, *arguments)
    assert (code, out) == (1, "")
    assert err.startswith("globenc: error: ")
    assert message in err
    assert err.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "cannot be read: No such file or directory"), (b"a \xff", "is not UTF-8 text: byte 2")],
    ids=["missing", "latin-1"],
)
def test_text_files_that_cannot_be_read(run, tmp_path, content, message):
    if content is not None:
        (tmp_path / "text.txt").write_bytes(content)
    code, out, err = run("attribute", "--file", "text.txt")
    assert (code, out) == (1, "")
    assert message in err


def test_other_architectures_and_broken_files(run, model, tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]}')
    code, _, err = run("attribute", "a", "-m", ".")
    assert code == 1
    assert "got . of type 'gpt2'; supported: bert, roberta" in err
    for file in Path(model).iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "model.safetensors").write_bytes(b"\x01")
    code, _, err = run("attribute", "a", "-m", ".")
    assert code == 1
    assert "'.' cannot be loaded: " in err


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried ..."), "out of memory on the GPU: try --device cpu"),
        (MemoryError(), "out of memory: try a shorter --max-length"),
        (FloatingPointError("not finite.\nmore"), "not finite"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_errors_of_the_run(run, model, monkeypatch, error, message):
    def fail(*arguments, **options):
        raise error

    monkeypatch.setattr(globenc.GlobEnc, "__call__", fail)
    code, out, err = run("attribute", "a", "-m", model)
    assert (code, out) == (1, "")
    assert err.startswith(f"globenc: error: {message}")
    assert err.count("\n") == 1


def test_a_failed_run_leaves_the_files_of_the_last_one(run, model, monkeypatch, tmp_path):
    def fail(self, path):
        Path(path).write_text("half")
        raise OSError("no space left")

    (tmp_path / "a.html").write_text("old page")
    (tmp_path / "a.png").write_text("old picture")
    monkeypatch.setattr(globenc.Attribution, "save_html", fail)
    code, out, err = run("attribute", "a", "--html", "a.html", "--plot", "a.png", "-m", model)
    assert (code, out, err) == (1, "", "globenc: error: no space left\n")
    assert (tmp_path / "a.html").read_text() == "old page"
    assert (tmp_path / "a.png").read_text() == "old picture"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.html", "a.png"]


def test_outputs_are_checked_before_the_model_is_loaded(run, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(globenc.GlobEnc, "from_pretrained", never)
    assert run("attribute", "a", "--html", "no/such/folder.html")[0] == 1
    assert run("attribute", "a", "--plot", "no/such/folder.png")[0] == 1


def test_interrupt_is_130(run, monkeypatch, tmp_path):
    def interrupt(*arguments, **options):
        raise KeyboardInterrupt

    monkeypatch.setattr(globenc.GlobEnc, "from_pretrained", interrupt)
    assert run("attribute", "a", "--html", "a.html") == (130, "", "")
    assert list(tmp_path.iterdir()) == []


def test_choices_are_those_of_the_library():
    hints = get_type_hints(attribute)
    assert set(get_args(hints["backend"])) == set(BACKENDS)
    for name in get_args(get_args(hints["dtype"])[0]):
        assert getattr(torch, name).is_floating_point


@pytest.mark.parametrize("arguments", [["--help"], ["attribute", "--help"], ["models", "-h"]], ids=" ".join)
@pytest.mark.parametrize("width", [80, 120])
def test_help_fits_and_shows_examples(run, monkeypatch, arguments, width):
    monkeypatch.setenv("COLUMNS", str(width))
    code, out, _ = run(*arguments)
    assert code == 0
    assert max(len(line) for line in out.splitlines()) <= width
    assert "• globenc " in out


def test_help_of_attribute_names_every_method_and_says_what_scores_mean(run):
    _, out, _ = run("attribute", "--help")
    assert all(method in out for method in METHODS)
    assert "not whether it spoke for or against it" in " ".join(out.split())


def test_version(run):
    assert run("--version") == (0, f"globenc {globenc.__version__}\n", "")


def test_models_lists_every_family_and_the_default(run):
    code, out, _ = run("models")
    assert code == 0
    assert all(family.model_type in out for family in globenc.supported_encoders())
    assert "positions - pad id - 1" in out
    found = json.loads(run("models", "--json")[1])
    assert [family["family"] for family in found["families"]] == [f.model_type for f in globenc.supported_encoders()]
    assert found["default"]["name"] == "globenc-sst2-small"
    assert "Accuracy on the 872 validation sentences of SST-2: " in found["default"]["about"]


def test_default_model_as_a_program():
    """Through the real program and a pipe, in a locale without UTF-8."""
    done = subprocess.run(
        [sys.executable, "-m", "globenc", "attribute", "a charming and often affecting journey ½", "--json"],
        capture_output=True,
        env={**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"},
        check=True,
    )
    found = json.loads(done.stdout)
    assert done.stderr == b""
    assert (found["label"], found["model"]) == ("positive", "globenc-sst2-small")
    assert found["text"].endswith("½")


def test_closed_pipe_is_no_traceback():
    program = subprocess.Popen(
        [sys.executable, "-m", "globenc", "--help"], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    program.stdout.close()  # type: ignore[union-attr]
    assert program.stderr.read() == b""  # type: ignore[union-attr]
    assert program.wait() == 1


def test_what_loading_warns_of_is_said(run, wordpiece, tmp_path):
    """Warnings that name the caller's line reach people for whom the command is the caller."""
    folder = tmp_path / "choices"
    tiny_model("bert", torch.float32, head="MultipleChoice").save_pretrained(folder)
    wordpiece.save_pretrained(folder)
    code, out, err = run("attribute", "a film", "-m", str(folder), "--json")
    assert (code, json.loads(out)["label"]) == (0, None)
    assert "only the encoder of BertForMultipleChoice is taken" in err
