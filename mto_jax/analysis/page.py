"""An HTML page that needs nothing else: its style, tables, and pictures with captions.

What is called HTML in an argument is taken as it is; all other text is escaped here.

Charts are drawn dark on transparent ground; where the reader prefers a dark page their colours are inverted, hues kept.
"""

import base64
import html
import io
from collections.abc import Callable, Sequence

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

STYLE = """
:root { color-scheme: light dark; --line: #8884; --dim: #666; --back: #fff; --text: #222; }
body { background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; margin: 0 auto;
  max-width: 1500px; padding: 1rem 1.2rem 4rem; overflow-wrap: anywhere; }
h1 { font-size: 1.5rem; line-height: 1.25; margin: .6rem 0; }
h2 { font-size: 1.2rem; margin: 2.4rem 0 .6rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .5rem; }
p { max-width: 80ch; margin: .6rem 0; }
p.note, figcaption { color: var(--dim); }
p.legend { max-width: none; }
figcaption { font-size: .85rem; line-height: 1.35; margin-bottom: .3rem; }
figcaption b { color: var(--text); }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 320px), 1fr)); gap: 1rem 1.4rem;
  align-items: end; }
.wide { grid-template-columns: repeat(auto-fill, minmax(min(100%, 560px), 1fr)); align-items: start; }
.grid > * { min-width: 0; }
figure { margin: 0; }
img { display: block; width: 100%; height: auto; }
.photo { background: #fff; border-radius: 4px; }
.scroll { overflow-x: auto; overflow-wrap: normal; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; }
td, th { border-bottom: 1px solid var(--line); padding: .25rem 1.2rem .25rem 0; text-align: left; vertical-align: top; }
th { font-weight: 600; }
th, td:first-child { white-space: nowrap; }
td:first-child { color: var(--dim); }
summary { cursor: pointer; margin: .8rem 0; }
.key { white-space: nowrap; margin-right: 1em; }
.key i { display: inline-block; width: .8em; height: .8em; border-radius: 2px; margin-right: .4em; }
@media (prefers-color-scheme: dark) {
  :root { --back: #16181c; --text: #ddd; --dim: #a0a0a0; }
  .chart, .key i { filter: invert(.9) hue-rotate(180deg); }
  .photo { filter: brightness(.85); }
}
"""
COLOURS = ('#3f7fd0', '#e07b28', '#4a9e4a', '#c94f4f', '#8d6cc0', '#8a6a50', '#d077b4', '#5aa9b5')


def document(title: str, parts: Sequence[str]) -> str:
    """The full page, with `title` as its heading. `parts`: HTML."""
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{html.escape(title)}</title><style>{STYLE}</style></head>'
        f'<body><h1>{html.escape(title)}</h1>{"".join(parts)}</body></html>'
    )


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table that scrolls by itself where it is too wide. Cells are HTML already, so that they may hold marks."""
    head = ''.join(f'<th>{h}</th>' for h in heads)
    body = ''.join('<tr>' + ''.join(f'<td>{c}</td>' for c in r) + '</tr>' for r in rows)
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def plain_table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """`table` with cells of plain text."""
    return table(heads, [[html.escape(c) for c in r] for r in rows])


def grid(parts: Sequence[str], wide: bool = False) -> str:
    """As many of the parts side by side as fit."""
    return f'<div class="grid{" wide" * wide}">{"".join(parts)}</div>'


def note(text: str) -> str:
    """A remark in small print. `text` is HTML."""
    return f'<p class="note">{text}</p>'


def legend(names: Sequence[str]) -> str:
    """Which line is whose; nothing for a single one."""
    return f'<p class="legend">{" ".join(keys(names))}</p>' if len(names) > 1 else ''


def keys(names: Sequence[str]) -> list[str]:
    """Each name behind a spot of its line's colour, as HTML."""
    return [_key(c, n) for c, n in zip(colours(len(names)), names, strict=True)]


def colours(count: int) -> list[str]:
    """Colours of so many lines, all different."""
    if count <= len(COLOURS):
        return list(COLOURS[:count])
    return [mpl.colors.to_hex(mpl.colormaps['turbo'](i / (count - 1))) for i in range(count)]


def chart(draw: Callable[[Axes], None], title: str, text: str, xlabel: str, ylabel: str) -> str:
    """What `draw` puts on the axes, under a caption; `xlabel` (of an integer axis) and `ylabel` have units."""
    fig = Figure(figsize=(4.2, 2.5), layout='constrained')
    axis = fig.subplots()
    draw(axis)
    axis.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axis.set_xlabel(xlabel)
    axis.set_ylabel(ylabel)
    out = io.BytesIO()
    with mpl.rc_context({'svg.fonttype': 'none', 'font.family': 'sans-serif'}):
        fig.savefig(out, format='svg', transparent=True, dpi=150, metadata={'Date': None, 'Creator': None})
    return _figure('chart', 'svg+xml', out.getvalue(), title, text)


def photo(png: bytes, title: str, text: str) -> str:
    """A PNG under a caption."""
    return _figure('photo', 'png', png, title, text)


def _key(colour, name):
    return f'<span class="key"><i style="background:{colour}"></i>{html.escape(name)}</span>'


def _figure(kind, form, content, title, text):
    caption = f'<b>{html.escape(title)}</b> {html.escape(text)}'.rstrip()
    source = f'data:image/{form};base64,{base64.b64encode(content).decode()}'
    alt = html.escape(f'{title}: {text}' if text else title)
    return f'<figure><figcaption>{caption}</figcaption><img class="{kind}" alt="{alt}" src="{source}"></figure>'
