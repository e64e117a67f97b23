"""HTML pages from jinja2 templates: one shell, one stylesheet, everything escaped unless it is a template's own."""

from __future__ import annotations

import functools
import re
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from ..printing import printable


@functools.cache
def environment() -> Environment:
    """The templates in render/templates: values are escaped, and a missing one is an error.

    The filter `printable` replaces control characters.
    """
    made = Environment(
        loader=PackageLoader("globenc", "render/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters["printable"] = printable
    return made


def render_page(template: str, **context: Any) -> str:
    """One HTML file that needs no other: no script, no link; light or dark as the reader's system is.

    Args:
        template: file in render/templates, which extends page.html and fills its blocks `title` and `body`; also `kind`
            (a class of the body, for its width) where it needs one.
        context: the template's variables. Strings are escaped; `markupsafe.Markup` is taken as it is. Templates that
            serve notebooks too write `{{ look("class other", "declaration") }}` for the attributes of a tag.

    Raises:
        jinja2.TemplateNotFound: there is no such template.
        jinja2.UndefinedError: the template uses a variable that is not given.
    """
    return environment().get_template(template).render(context, look=_by_class)


def render_cell(template: str, **context: Any) -> str:
    """The same for a notebook's output cell: a fragment whose styles all stand in its tags."""
    return environment().get_template(template).render(context, look=_by_style)


def _by_class(names: str, declaration: str = "") -> Markup:
    """Attributes of a tag: its classes, and a declaration that is the tag's alone."""
    given = [("class", names), ("style", declaration)]
    return Markup(" ").join(Markup('{}="{}"').format(name, value) for name, value in given if value)


def _by_style(names: str, declaration: str = "") -> Markup:
    """The same by style alone."""
    styles = [*(_declarations()[name] for name in names.split()), declaration]
    return Markup('style="{}"').format(";".join(filter(None, styles)))


@functools.cache
def _declarations() -> dict[str, str]:
    """What page.css declares for single classes."""
    source = environment().get_template("page.css").render()
    return {name: given.strip().rstrip(";") for name, given in re.findall(r"^\.([\w-]+) \{([^}]*)\}", source, re.M)}
