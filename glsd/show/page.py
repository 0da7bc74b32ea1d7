"""One self-contained HTML page: light and dark, readable on a phone, without a request to anywhere."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #ffffff; --line: #d0d7de; --link: #0550ae; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6edf3; --soft: #9ea7b3; --paper: #0d1117; --line: #30363d; --link: #79b8ff; }
}
body { color: var(--ink); background: var(--paper); font: 16px/1.5 system-ui, sans-serif; max-width: 70rem;
  margin: 0 auto; padding: 1rem; }
h1, h2, h3 { line-height: 1.2; }
h2 { border-bottom: 1px solid var(--line); padding-bottom: .3rem; margin-top: 2.5rem; }
a { color: var(--link); }
p.soft, figcaption { color: var(--soft); font-size: .9rem; }
figure { margin: 1rem 0; }
figure img, figure svg { max-width: 100%; height: auto; }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 19rem), 1fr)); gap: .5rem; }
.charts figure { margin: 0; }
.wide { overflow-x: auto; }
table { border-collapse: collapse; }
th, td { border-bottom: 1px solid var(--line); padding: .3rem .8rem .3rem 0; text-align: left; vertical-align: top; }
pre { overflow-x: auto; border: 1px solid var(--line); padding: .8rem; }
nav ul { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; }
"""
# Even a text that looked like a link could load nothing.
POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Section(NamedTuple):
    """A heading and the HTML below it."""

    title: str
    body: str


def page(title: str, sections: Sequence[Section]) -> str:
    """Return the page. title is text; the sections' bodies are HTML, made by the functions below."""
    names = [f"s{number}" for number in range(len(sections))]
    links = "".join(
        f'<li><a href="#{name}">{html.escape(section.title)}</a></li>'
        for name, section in zip(names, sections, strict=True)
    )
    bodies = "".join(
        f'<section aria-labelledby="{name}"><h2 id="{name}">{html.escape(section.title)}</h2>{section.body}</section>'
        for name, section in zip(names, sections, strict=True)
    )
    return (
        f'<!DOCTYPE html><html lang="en"><head><meta charset="utf-8"><title>{html.escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'
        f'<body><header><h1>{html.escape(title)}</h1><nav aria-label="Sections"><ul>{links}</ul></nav></header>'
        f"<main>{bodies}</main></body></html>\n"
    )


def paragraph(text: str, *, soft: bool = False) -> str:
    """Return a paragraph of plain text."""
    return f"<p{' class=soft' if soft else ''}>{html.escape(text)}</p>"


def table(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """Return a table of texts and numbers, which scrolls by itself where the screen is narrow."""
    top = "".join(f'<th scope="col">{html.escape(str(cell))}</th>' for cell in head)
    lines = "".join(
        f"<tr>{''.join(f'<td>{html.escape(str(cell))}</td>' for cell in row)}</tr>" for row in rows
    )
    # Reached by the keyboard, so that it can be scrolled without a mouse.
    return (
        f'<div class="wide" tabindex="0" role="region" aria-label="{html.escape(head[0])} and more">'
        f"<table><thead><tr>{top}</tr></thead><tbody>{lines}</tbody></table></div>"
    )


def picture(file: Path | bytes, says: str) -> str:
    """Return a PNG inside of the page; ``says`` is its caption, and what a screen reader reads."""
    raw = file if isinstance(file, bytes) else file.read_bytes()
    data = base64.b64encode(raw).decode()
    text = html.escape(says)
    return f'<figure><img src="data:image/png;base64,{data}" alt="{text}"><figcaption>{text}</figcaption></figure>'


def charts(items: Sequence[tuple[str, str]]) -> str:
    """Return charts side by side, each an <svg> element with a caption."""
    figures = "".join(
        f"<figure>{svg}<figcaption>{html.escape(said)}</figcaption></figure>" for svg, said in items
    )
    return f'<div class="charts">{figures}</div>'


def folded(title: str, text: str) -> str:
    """Return a text that opens on a click."""
    label = html.escape(title)
    return (
        f"<details><summary>{label}</summary>"
        f'<pre tabindex="0" aria-label="{label}">{html.escape(text)}</pre></details>'
    )
