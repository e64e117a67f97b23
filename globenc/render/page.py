"""HTML pages from jinja2 templates: one shell, one stylesheet, everything escaped unless it is a template's own."""

from __future__ import annotations

import functools
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

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
        context: the template's variables. Strings are escaped; `markupsafe.Markup` is taken as it is.

    Raises:
        jinja2.TemplateNotFound: there is no such template.
        jinja2.UndefinedError: the template uses a variable that is not given.
    """
    return environment().get_template(template).render(context)
