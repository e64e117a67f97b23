"""Who imports whom: arrows point down, the equations stand alone, kernels know nothing of models."""

from __future__ import annotations

import ast
import graphlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE, KERNELS = ROOT / "globenc", ROOT / "kernels" / "globenc_kernels"

# A module may import those above it in this list of lists, never those on its own line or below.
LAYERS = [
    ["_version", "methods", "equations", "class_score_equations", "passages", "model_state", "predictions", "printing"],
    ["errors", "text_spans"],
    ["encoders"],
    ["capture", "inputs"],
    ["contributions"],
    ["rollouts"],
    ["forward_pass"],
    ["layer_rollouts"],
    ["functional", "layer_maps", "frozen"],
    ["render"],
    ["results"],
    ["attribution", "images", "tokenization", "loading", "progress", "class_score_batches"],
    ["batching", "texts"],
    ["batch_results", "metrics"],
    ["explainer"],
    ["extraction"],
    ["evaluation"],
    ["cli"],
    ["__main__"],
]


def imported(path: Path) -> set[str]:
    """Modules a file imports anywhere in it; its own package's ones as `.name`."""
    return imports_of(path.read_text(encoding="utf-8"))


def imports_of(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            start = "." * node.level + (node.module or "")
            names.update([start] if node.module else [start + alias.name for alias in node.names])
    return names


def foreign(path: Path) -> set[str]:
    """Top-level names of what a file imports from outside the standard library and its own package."""
    tops = {name.split(".")[0] for name in imported(path) if not name.startswith(".")}
    return tops - set(sys.stdlib_module_names) - {"__future__"}


def inside(path: Path, name: str) -> str | None:
    """Which module of globenc `name` is, as seen from `path`; None for others."""
    for prefix in ("globenc.", *(["."] if path.parent == PACKAGE else ["..."[: len(path.parts) - len(PACKAGE.parts)]])):
        if name.startswith(prefix) and not name[len(prefix) :].startswith("."):
            return name[len(prefix) :].split(".")[0]
    return None


def violations(path: Path, level: int) -> list[str]:
    allowed = {name for names in LAYERS[:level] for name in names}
    own = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
    used = {inside(path, name) for name in imported(path)} - {None, own}
    return sorted(used - allowed)


def test_the_list_is_complete():
    known = {name for names in LAYERS for name in names}
    here = {
        p.stem if p.is_file() else p.name
        for p in PACKAGE.iterdir()
        if p.suffix == ".py" or (p / "__init__.py").exists()
    }
    assert here - known == {"__init__"}


@pytest.mark.parametrize("module", [name for names in LAYERS for name in names])
def test_arrows_point_down(module):
    level = next(i for i, names in enumerate(LAYERS) if module in names)
    files = (
        [PACKAGE / f"{module}.py"] if (PACKAGE / f"{module}.py").exists() else sorted((PACKAGE / module).glob("*.py"))
    )
    if not files:
        pytest.skip(f"{module} is not written yet")
    for path in files:
        assert violations(path, level) == [], path.name


def circle(package: Path) -> list[str]:
    """Modules of a package that import one another in a circle; empty where there is none."""
    inner = {
        path.stem: {name[1:].split(".")[0] for name in imported(path) if name[:1] == "." != name[1:2]}
        for path in package.glob("*.py")
    }
    try:
        tuple(graphlib.TopologicalSorter(inner).static_order())
    except graphlib.CycleError as error:
        return error.args[1]
    return []


PACKAGES = sorted({path.parent.relative_to(ROOT) for path in PACKAGE.rglob("*.py")})


@pytest.mark.parametrize("package", PACKAGES, ids=str)
def test_no_circle_in_a_package(package):
    assert circle(ROOT / package) == []


def test_a_circle_can_be_found(tmp_path):
    for name, source in (("a", "from .b import x"), ("b", "from . import c"), ("c", "def f():\n    from .a import y")):
        (tmp_path / f"{name}.py").write_text(source)
    assert set(circle(tmp_path)) == {"a", "b", "c"}


def test_arrows_can_point_up(tmp_path, monkeypatch):
    """The check above finds a wrong import, wherever in the file it stands."""
    monkeypatch.setattr(sys.modules[__name__], "PACKAGE", tmp_path)
    for source in (
        "from .functional import attribute",
        "from globenc.functional import attribute",
        "import globenc.functional",
        "def f():\n    from . import functional",
    ):
        path = tmp_path / "rollouts.py"
        path.write_text(source)
        level = next(i for i, names in enumerate(LAYERS) if "functional" in names)
        assert violations(path, level) == ["functional"], source
        assert violations(path, level + 1) == []


def circles(folder: Path) -> list[list[str]]:
    """Modules of a package that import one another in a ring, each ring once."""
    below = {
        path.stem: {name[1:].split(".")[0] for name in imported(path) if name[0] == "." and name[1] != "."}
        for path in folder.glob("*.py")
    }
    rings = []

    def walk(module: str, way: list[str]) -> None:
        for name in sorted(below.get(module, ())):
            if name in way:
                rings.append(sorted(way[way.index(name) :]))
            elif name not in done:
                walk(name, [*way, name])
        done.add(module)

    done: set[str] = set()
    for module in sorted(below):
        walk(module, [module])
    return [ring for k, ring in enumerate(rings) if ring not in rings[:k]]


@pytest.mark.parametrize("package", ["cli", "encoders", "evaluation", "extraction", "metrics", "render"])
def test_no_circle_inside_a_package(package):
    assert circles(PACKAGE / package) == []


def test_circles_are_found(tmp_path):
    for name, source in {
        "a": "from .b import x",
        "b": "from . import c",
        "c": "def f():\n    from .a import y",
    }.items():
        (tmp_path / f"{name}.py").write_text(source)
    assert circles(tmp_path) == [["a", "b", "c"]]


def test_the_design_page_maps_every_module():
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    page = text.split("<!-- map:begin -->")[1].split("<!-- map:end -->")[0]
    modules = {name for names in LAYERS for name in names} - {"_version", "__main__"}
    mapped = {name.removesuffix("/") for name in re.findall(r"`([a-z_]+/?)`", page)}
    assert modules <= mapped, modules - mapped


def test_equations_import_torch_alone():
    assert imported(PACKAGE / "equations.py") - {"__future__"} == {"dataclasses", "torch"}
    assert foreign(PACKAGE / "equations.py") == {"torch"}


def test_methods_import_nothing():
    assert foreign(PACKAGE / "methods.py") == set()


def test_kernels_never_import_globenc():
    files = sorted(KERNELS.rglob("*.py"))
    assert files
    for path in files:
        assert foreign(path) <= {"torch", "triton", "globenc_kernels"}, path.name


def test_only_two_files_know_the_kernels():
    users = {path.stem for path in PACKAGE.rglob("*.py") if "globenc_kernels" in foreign(path)}
    assert users == {"backend", "triton_backend"}


def test_kernels_folder_is_no_package():
    """A regular package named `kernels` would shadow the one that transformers imports when present."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (KERNELS / "__init__.py").exists()


def run(code: str, *paths: Path) -> str:
    search = [str(path) for path in (ROOT, ROOT / "kernels", *paths)]
    code = f"import sys; sys.path[:0] = {search!r}\n{code}"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    return result.stdout


def test_works_without_triton():
    """Importing and using globenc does not need triton, and asking for it says so."""
    output = run(
        """
sys.modules["triton"] = None
import torch, transformers, globenc
sizes = dict(vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8)
config = transformers.BertConfig(**sizes)
model = transformers.BertModel(config)
print(globenc.attribute(model, input_ids=torch.tensor([[3, 4, 5]])).scores.shape)
try:
    globenc.attribute(model, input_ids=torch.tensor([[3, 4, 5]]), backend="triton")
except RuntimeError as error:
    print(error)
"""
    )
    assert "torch.Size([1, 3])" in output
    assert "backend='triton' cannot run here" in output


def test_importing_is_light():
    """What only pictures and the command line need is imported there, not by `import globenc`."""
    for path in PACKAGE.glob("*.py"):
        if path.stem not in ("cli", "__main__", "progress"):
            top = ast.parse(path.read_text(encoding="utf-8")).body
            names = {
                n
                for node in top
                if isinstance(node, ast.Import | ast.ImportFrom)
                for n in imports_of(ast.unparse(node))
            }
            assert not {name.split(".")[0] for name in names} & {"matplotlib", "typer", "rich", "triton"}, path.name


def test_public_names():
    import globenc

    for name in globenc.__all__:
        assert hasattr(globenc, name), name
    asked_for = {
        "GlobEnc",
        "attribute",
        "contribution_maps",
        "mixing_ratios",
        "rollout",
        "register_encoder",
        "completeness_gap",
    }
    assert asked_for <= set(globenc.__all__)
    assert callable(globenc.rollout)  # the function, whatever modules have been imported since
    assert set(globenc.__all__) <= set(dir(globenc))
    with pytest.raises(AttributeError, match="has no attribute 'atribute'"):
        globenc.atribute  # noqa: B018


def test_editors_see_the_names_that_are_imported_at_first_use():
    import globenc

    (block,) = [node for node in ast.parse((PACKAGE / "__init__.py").read_text()).body if isinstance(node, ast.If)]
    seen = {a.asname: node.module for node in block.body if isinstance(node, ast.ImportFrom) for a in node.names}
    assert seen.pop("metrics") is None
    assert seen == globenc._LAZY
