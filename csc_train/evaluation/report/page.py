"""What the HTML pages have in common: each is one file that needs no network.

`page.head.jinja`, `page.css.jinja` and `page.js.jinja` are included by the templates of the pages.
"""

from typing import Any

import jinja2

_ENVIRONMENT = jinja2.Environment(
    loader=jinja2.PackageLoader("csc_train.evaluation.report", "."),
    undefined=jinja2.StrictUndefined,
    autoescape=True,
    trim_blocks=True,
    lstrip_blocks=True,
)
# By default it sorts the keys, and so the systems, and writes NaN and Infinity, which no browser reads.
_ENVIRONMENT.policies["json.dumps_kwargs"] = {"ensure_ascii": False, "allow_nan": False}


def render(template: str, **facts: Any) -> str:
    """A template of this package as a page."""
    return _ENVIRONMENT.get_template(template).render(**facts)
