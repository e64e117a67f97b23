"""The shell of every page: its values are escaped, a missing one is an error, and it needs no other file."""

from __future__ import annotations

import re
from fnmatch import fnmatch
from pathlib import Path

import jinja2
import pytest

from globenc.render.page import environment, render_cell, render_page

ROOT = Path(__file__).parents[1]
TEMPLATES = ROOT / "globenc" / "render" / "templates"


def rendered(body: str, **context: object) -> str:
    """A page whose blocks are these, in the shell."""
    source = "{% extends 'page.html' %}{% block title %}{{ name }}{% endblock %}{% block body %}" + body
    return environment().from_string(source + "{% endblock %}").render(context)


def test_values_are_escaped():
    evil = '<script>alert("x")</script>\''
    source = rendered("<p title='{{ text }}'>{{ text }}</p>", name=evil, text=evil)
    assert "<script" not in source
    assert source.count("&lt;script&gt;alert(&#34;x&#34;)&lt;/script&gt;&#39;") == 3
    assert "a\ufffdb" in rendered("{{ text | printable }}", name="", text="a\x1bb")


def test_a_missing_value_and_a_missing_template_are_errors():
    with pytest.raises(jinja2.UndefinedError, match="'text' is undefined"):
        rendered("{{ text }}", name="a")
    with pytest.raises(jinja2.TemplateNotFound):
        render_page("none.html")
    with pytest.raises(jinja2.TemplateRuntimeError, match="Required block"):
        render_page("page.html")


def test_the_page_needs_no_other_file():
    source = rendered("", name="a")
    assert source.startswith("<!DOCTYPE html>")
    assert source.endswith("</html>\n")
    assert not any(part in source for part in ("http", "src=", "<script", "<link", "url(", "@import"))
    for media in ("(prefers-color-scheme: dark)", "print", "(max-width: 40rem)"):
        assert media in source


def test_a_page_writes_classes_and_a_notebook_cell_the_same_styles(monkeypatch):
    templates = {"a.html": "<p {{ look('block faint', 'width:1em') }}></p>", "b.html": "{{ look('unknown') }}"}
    inner = environment().loader
    monkeypatch.setattr(environment(), "loader", jinja2.ChoiceLoader([jinja2.DictLoader(templates), inner]))
    assert render_page("a.html") == '<p class="block faint" style="width:1em"></p>'
    assert render_cell("a.html") == '<p style="margin: .7em 0;opacity: .72;width:1em"></p>'
    with pytest.raises(KeyError, match="unknown"):
        render_cell("b.html")


def test_no_class_of_the_body_is_one_of_a_tag():
    """A rule of a single class would then hold for the whole page."""
    css = (TEMPLATES / "page.css").read_text(encoding="utf-8")
    kinds = {kind for path in TEMPLATES.glob("*.html") for kind in re.findall(r"kind %}([\w-]+)", path.read_text())}
    assert kinds
    assert not kinds & set(re.findall(r"^\.([\w-]+) \{", css, re.M))


def test_every_template_is_packaged():
    tomllib = pytest.importorskip("tomllib")  # of Python 3.11
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    patterns = settings["tool"]["setuptools"]["package-data"]["globenc"]
    for path in TEMPLATES.iterdir():
        assert any(fnmatch(path.relative_to(ROOT / "globenc").as_posix(), pattern) for pattern in patterns), path.name
