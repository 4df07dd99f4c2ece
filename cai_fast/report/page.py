"""The shell of a page: one HTML file that needs nothing else, and may ask for nothing else.

Its content security policy allows the very style and script that stand in it, by their hashes, and no request at all;
so neither a text of a run nor a later editor of the file can make it call home.
"""

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from functools import cache
from importlib import resources
from typing import Any

import jinja2
from markupsafe import Markup

SCRIPTS = ("dom.js", "diff.js", "chart.js", "browser.js", "page.js")


@cache
def _file(name: str) -> str:
    return resources.files("cai_fast.report").joinpath(name).read_text(encoding="utf-8")


def environment(**filters: Any) -> jinja2.Environment:
    """Templates of this folder; whatever is put into them is escaped."""
    loader = jinja2.FunctionLoader(_file)
    made = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True, lstrip_blocks=True)
    made.filters |= filters
    return made


def shell(title: str, body: str, *, links: Mapping[str, str] | None = None, data: Any = None,
          scripts: Sequence[str] = SCRIPTS) -> str:  # fmt: skip
    """The whole page around `body` (HTML that is safe already): style, navigation (`links`: anchor -> name), theme and
    red-team switches, and `data` (JSON values) for the scripts."""
    style, script = _file("style.css"), "\n".join(['"use strict";', *map(_file, scripts)])
    page = environment().get_template("template.html").render(
        title=title, body=Markup(body), links=links or {}, data=Markup(embedded(data)), style=Markup(style),
        script=Markup(script), style_hash=_source_hash(style), script_hash=_source_hash(script),
    )  # fmt: skip
    return page.encode("utf-8", "backslashreplace").decode()  # half a surrogate pair is no UTF-8


def embedded(data: Any) -> str:
    """JSON that can stand inside <script>: no character in it can end the element or begin a comment."""
    text = json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def _source_hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
