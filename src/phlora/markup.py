"""Text as it may be shown: control characters spelled out, and HTML for notebooks.

Notebooks put what is shown here into a page of their own, light or dark, on a screen of any width. So colours are the
page's own, with shades that are halfway through; every text of the user is escaped and has the direction of its own
script; and tables scroll within themselves.
"""

from __future__ import annotations

import html
import re
from collections.abc import Iterable, Sequence

# All control characters but tab and newline; what turns the direction of a whole line, breaks it, or is not seen;
# halves of surrogate pairs. The joiners of Persian and Hindi and the marks of right-to-left texts stay.
_UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2060-\u2064\u2066-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\U000e0000-\U000e007f]"
)

# Everything is within .phlora, so that nothing else of the page changes.
STYLE = """\
.phlora{max-width:60em;font-size:13px;line-height:1.5;color:inherit;overflow-wrap:anywhere}
.phlora .scroll{overflow-x:auto;max-width:100%}
.phlora table{border-collapse:collapse;margin:.5em 0;color:inherit}
.phlora td,.phlora th{padding:.2em .7em;text-align:start;color:inherit;border-bottom:1px solid rgba(127,127,127,.3)}
.phlora td.n,.phlora th.n{text-align:right;white-space:nowrap;font-variant-numeric:tabular-nums}
.phlora tr{background:transparent!important}
.phlora .dim{opacity:.7}
.phlora .lead{font-weight:600}
.phlora .warn,.phlora .error{white-space:pre-line}
.phlora .warn{border-inline-start:3px solid #d97706;padding-inline-start:.5em}
.phlora .error{border-inline-start:3px solid #dc2626;padding-inline-start:.5em}
.phlora pre{white-space:pre;overflow-x:auto;margin:.3em 0;padding:0;background:transparent;color:inherit}
.phlora .log{max-height:24em;overflow-y:auto;display:flex;flex-direction:column-reverse}
.phlora progress{width:12em;max-width:40%;vertical-align:middle}
.phlora .bar{display:inline-block;height:.7em;background:#2563eb;opacity:.75;min-width:1px}
.phlora .tokens{white-space:pre-wrap;font-family:monospace;padding:.4em;border:1px solid rgba(127,127,127,.3)}
.phlora .trained{background:rgba(34,160,80,.3);border-radius:2px}
.phlora details summary{cursor:pointer}
"""


def printable(text: str) -> str:
    """The text with control characters spelled out: data and models must not command a terminal, or mislead.

    >>> printable("\x1b[31m and \u202e")
    '\\\\x1b[31m and \\\\u202e'
    """
    return _UNPRINTABLE.sub(lambda match: _spelled_out(ord(match[0])), text)


def _spelled_out(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def escaped(text: object) -> str:
    """A text as part of a page: nothing in it is markup.

    >>> escaped("<b> & \x07")
    '&lt;b&gt; &amp; \\\\x07'
    """
    return html.escape(printable(str(text)))


def block(*parts: str) -> str:
    """Parts of HTML as what a notebook shows, with their style."""
    return f'<div class="phlora"><style>{STYLE}</style>{"".join(parts)}</div>'


def line(text: object, kind: str = "") -> str:
    """A paragraph in the direction of its own script.

    Args:
        kind: `lead`, `dim`, `warn` or `error`.
    """
    return f'<div{_class(kind)} dir="auto">{escaped(text)}</div>'


def preformatted(text: str) -> str:
    """Lines as they are set, from left to right."""
    return f'<pre dir="ltr">{escaped(text)}</pre>'


def table(head: Sequence[object], rows: Iterable[Sequence[object]], *, numbers: Sequence[int] = ()) -> str:
    """A table that scrolls within itself where it is too wide.

    Args:
        head: the titles of the columns; none: no line of titles.
        numbers: which columns stand at the right.
    """
    titles = "".join(_cell("th", cell, column in numbers) for column, cell in enumerate(head))
    lines = [
        "<tr>" + "".join(_cell("td", cell, column in numbers) for column, cell in enumerate(row)) + "</tr>"
        for row in rows
    ]
    above = f"<thead><tr>{titles}</tr></thead>" if head else ""
    return f'<div class="scroll"><table>{above}<tbody>{"".join(lines)}</tbody></table></div>'


def _cell(tag: str, content: object, is_number: bool) -> str:
    text = content.markup if isinstance(content, Markup) else escaped(content)
    # Numbers stand in their order also beside right-to-left text.
    attributes = ' class="n" dir="ltr"' if is_number else ' dir="auto"'
    return f"<{tag}{attributes}>{text}</{tag}>"


class Markup:
    """HTML that was made here, as the content of a cell."""

    def __init__(self, markup: str) -> None:
        self.markup = markup


def bar(share: float) -> Markup:
    """A bar of so much of the width that there is for it, from 0 to 1."""
    return Markup(f'<span class="bar" style="width:{12 * min(1.0, max(0.0, share)):.2f}em"></span>')


def folded(title: object, *parts: str) -> str:
    """Parts behind a title that opens them."""
    return f'<details><summary dir="auto">{escaped(title)}</summary>{"".join(parts)}</details>'


def _class(kind: str) -> str:
    return f' class="{kind}"' if kind else ""
