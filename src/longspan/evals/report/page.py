"""One file of HTML: a report's tables and pictures, for a browser of any width, light or dark.

Nothing is loaded from anywhere and no script runs: pictures are data in the page. Tables have captions and headings of
rows and columns, pictures say in words what they show. It does not know how scores are made.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Sequence
from dataclasses import dataclass

STYLE = """
:root{color-scheme:light dark;--ink:#1f2124;--soft:#5c6066;--line:#d9dce0;--back:#fff;--card:#f6f7f8;--bar:#0072b226;
--link:#005a8c}
@media (prefers-color-scheme:dark){:root{--ink:#e6e6e6;--soft:#a4a9b0;--line:#3a3e44;--back:#17191c;--card:#202327;
--bar:#56b4e93d;--link:#7cc4f0}}
*{box-sizing:border-box}
body{margin:0;background:var(--back);color:var(--ink);font:16px/1.5 system-ui,-apple-system,"Segoe UI",sans-serif}
main,header,footer{max-width:72rem;margin:0 auto;padding:0 1rem}
header{padding-top:1.5rem}footer{padding:1rem;color:var(--soft);font-size:.85rem}
h1{font-size:1.6rem;line-height:1.25;margin:0 0 .25rem}h2{font-size:1.3rem;margin:2.5rem 0 .5rem}
h3{font-size:1.05rem;margin:1.75rem 0 .5rem}p{margin:.5rem 0;max-width:46rem}a{color:var(--link)}
.soft,.caption,figcaption{color:var(--soft);font-size:.9rem}.caption{margin:1.25rem 0 -.35rem;max-width:none}
.unseen{position:absolute;width:1px;height:1px;overflow:hidden;clip-path:inset(50%);white-space:nowrap}
nav ul{list-style:none;display:flex;flex-wrap:wrap;gap:.25rem 1rem;padding:0;margin:.75rem 0}
dl{display:grid;grid-template-columns:max-content 1fr;gap:.15rem 1rem;margin:1rem 0;font-size:.9rem}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.scroll{overflow-x:auto;border:1px solid var(--line);border-radius:.5rem;margin:.75rem 0}
.scroll:focus-visible{outline:2px solid var(--link)}
table{border-collapse:collapse;width:100%;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{padding:.35rem .75rem;text-align:right;border-top:1px solid var(--line);white-space:nowrap}
thead th{border-top:0}
thead th{font-weight:600;background:var(--card)}th[scope=row],th.left,td.left{text-align:left;font-weight:400}
th[scope=row]{position:sticky;left:0;background:var(--back);min-width:7rem;max-width:16rem;white-space:normal}
tr.all th,tr.all td{font-weight:600}td small{display:block;color:var(--soft);font-size:.78rem;line-height:1.2}
td.bar{background:linear-gradient(to right,var(--bar) var(--share),transparent var(--share))}
td.wrap{white-space:normal;min-width:14rem;overflow-wrap:anywhere}
.pictures{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,26rem),1fr));gap:1rem;margin:.75rem 0}
figure{margin:0;background:var(--card);border-radius:.5rem;padding:.5rem}
figure.wide{grid-column:1/-1;background:#fff}
figure img{display:block;width:100%;height:auto;max-width:40rem;margin:0 auto}figure.wide img{max-width:none}
details{margin:.75rem 0}summary{cursor:pointer}
@media print{.scroll{overflow:visible}details{display:none}}
@media (max-width:30rem){th,td{padding:.3rem .45rem}th[scope=row]{max-width:9rem}dl{grid-template-columns:1fr}
dd{margin-bottom:.35rem}}
"""


@dataclass(frozen=True)
class Value:
    """A cell of a table."""

    text: str
    below: str = ""
    """Smaller, on a second line: an interval."""
    share: float | None = None
    """A bar behind the text, from 0 to 1; None: no bar."""
    words: bool = False
    """Whether it is text that may take several lines."""


@dataclass(frozen=True)
class Table:
    """A table whose first column names its rows."""

    caption: str
    head: Sequence[str]
    rows: Sequence[tuple[str, Sequence[Value]]]
    strong: str = ""
    """The name of a row that stands out."""


@dataclass(frozen=True)
class Picture:
    """An image and what it shows in words."""

    data: bytes
    kind: str
    """`svg+xml` or `png`."""
    alt: str
    caption: str = ""

    @property
    def wide(self) -> bool:
        """Whether it has several panels, and so takes the page's whole width on paper of its own."""
        return self.kind == "png"


@dataclass(frozen=True)
class Fold:
    """Something that is shown when it is asked for."""

    title: str
    parts: Sequence[Table | Sequence[Picture]]


Part = str | Table | Sequence[Picture] | Fold
"""A text is a heading."""


@dataclass(frozen=True)
class Section:
    """What one eval has to show, in this order."""

    title: str
    about: str
    parts: Sequence[Part] = ()


def page(
    title: str,
    about: str,
    facts: Sequence[tuple[str, str]],
    notes: Sequence[str],
    sections: Sequence[Section],
    *,
    made_by: str = "longspan eval report",
    how: str = "How it was measured",
) -> str:
    """Return a page as HTML.

    Args:
        title: of the page.
        about: a sentence under it.
        facts: names and values: model, device, versions.
        notes: what the reader must know before the figures.
        sections: at least one.
        made_by: the command, for the foot of the page.
        how: the title over the facts.
    """
    links = "".join(f'<li><a href="#part-{i}">{_text(each.title)}</a></li>' for i, each in enumerate(sections))
    nav = f'<nav aria-label="Sections"><ul>{links}</ul></nav>' if len(sections) > 1 else ""
    told = "".join(f"<dt>{_text(name)}</dt><dd>{_text(value)}</dd>" for name, value in facts)
    told = f'<section id="how"><h2>{_text(how)}</h2><dl>{told}</dl></section>\n' if told else ""
    warned = "".join(f"<p>{_text(note)}</p>" for note in notes)
    body = "".join(_section(f"part-{i}", each) for i, each in enumerate(sections))
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        # An icon that is named is not asked for.
        f'<title>{_text(title)}</title>\n<link rel="icon" href="data:,">\n<style>{STYLE}</style>\n</head>\n<body>\n'
        f"<header><h1>{_text(title)}</h1><p>{_text(about)}</p>{warned}{nav}</header>\n"
        f"<main>\n{body}{told}</main>\n<footer>Made by {_text(made_by)}.</footer>\n</body>\n</html>\n"
    )


def _section(anchor: str, section: Section) -> str:
    parts = "\n".join(_part(part) for part in section.parts)
    about = f'<p class="soft">{_text(section.about)}</p>' if section.about else ""
    return f'<section id="{anchor}"><h2>{_text(section.title)}</h2>{about}\n{parts}\n</section>\n'


def _part(part: Part) -> str:
    if isinstance(part, str):
        return f"<h3>{_text(part)}</h3>"
    if isinstance(part, Table):
        return _table(part)
    if isinstance(part, Fold):
        return f"<details><summary>{_text(part.title)}</summary>{''.join(map(_part, part.parts))}</details>"
    return f'<div class="pictures">{"".join(map(_picture, part))}</div>'


def _table(table: Table) -> str:
    head = "".join(f'<th scope="col"{_left(i)}>{_text(name)}</th>' for i, name in enumerate(table.head))
    rows = "".join(
        f'<tr{_all(table, name)}><th scope="row">{_broken(name)}</th>{"".join(map(_value, values))}</tr>\n'
        for name, values in table.rows
    )
    caption = _text(table.caption)
    # What scrolls must be reachable by keyboard, and say what it is. A table's own caption would scroll away with it.
    return (
        f'<p class="caption" aria-hidden="true">{caption}</p>'
        f'<div class="scroll" tabindex="0" role="region" aria-label="{caption}"><table>'
        f'<caption class="unseen">{caption}</caption><thead><tr>{head}</tr></thead>\n'
        f"<tbody>{rows}</tbody></table></div>"
    )


def _broken(text: str) -> str:
    """Return text that may take several lines between the options of a specification."""
    return re.sub(r"([,_]|:(?=[a-z])|/(?!/))(?=\S)", r"\1<wbr>", _text(text))


def _left(column: int) -> str:
    return ' class="left"' if column == 0 else ""


def _all(table: Table, name: str) -> str:
    return ' class="all"' if name == table.strong else ""


def _value(value: Value) -> str:
    below = f"<small>{_text(value.below)}</small>" if value.below else ""
    if value.words:
        return f'<td class="left wrap">{_text(value.text)}{below}</td>'
    if value.share is None:
        return f"<td>{_text(value.text)}{below}</td>"
    share = f"{100 * min(1.0, max(0.0, value.share)):.1f}%"
    return f'<td class="bar" style="--share:{share}">{_text(value.text)}{below}</td>'


def _picture(picture: Picture) -> str:
    data = base64.b64encode(picture.data).decode("ascii")
    caption = f"<figcaption>{_text(picture.caption)}</figcaption>" if picture.caption else ""
    wide = ' class="wide"' if picture.wide else ""
    image = f'<img alt="{_text(picture.alt)}" src="data:image/{picture.kind};base64,{data}">'
    return f"<figure{wide}>{image}{caption}</figure>"


def _text(text: str) -> str:
    """Return text as HTML; what is no Unicode (a stray byte of an answer) is shown as a question mark."""
    return html.escape(text.encode("utf-8", "replace").decode("utf-8"))
