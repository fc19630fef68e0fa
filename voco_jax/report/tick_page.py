"""index.html of a contact sheet: its tiles, each with a box to tick, and the list of those ticked.

One file beside the pages, with a little JavaScript; it loads nothing but the pages that are looked
at. The ticks are kept in the browser; "Save" writes them for `prepare --exclude`.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import jinja2

from voco_jax.files import write_atomically

PER_VIEW = 40  # tiles that are shown at once


@dataclass(frozen=True)
class Tile:
    """A tile on a page's picture."""

    id: str  # of the volume
    section: str
    reasons: tuple[str, ...]  # why it is odd
    page: str  # file name of the picture
    place: tuple[int, int, int, int]  # left, top, and the page's width and height, pixels


def write_tick_page(path: Path, cache: str, tiles: Sequence[Tile], size: tuple[int, int]) -> None:
    """Writes the page.

    Args:
        path: of index.html, beside the pages.
        cache: whose volumes these are.
        tiles: in the order in which they are shown.
        size: of a tile, pixels.

    Raises:
        OSError: it cannot be written.
    """
    width, height = size
    rows = []
    for tile in tiles:
        left, top, page_width, page_height = tile.place
        # As CSS wants them: the page's width in tiles; where the tile is in what is left beside it.
        share_x = 100 * left / max(page_width - width, 1)
        share_y = 100 * top / max(page_height - height, 1)
        look = (tile.page, round(share_x, 3), round(share_y, 3), round(100 * page_width / width, 3))
        rows.append((tile.id, tile.section, tile.reasons, *look))
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    html = environment.from_string(_PAGE).render(
        cache=cache, rows=rows, width=width, height=height, per_view=PER_VIEW
    )
    write_atomically(path, html)


_PAGE = r"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src 'self' file: data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'; base-uri 'none'; form-action 'none'">
<title>Contact sheet: {{ cache }}</title>
<style>
:root { color-scheme: light dark; --paper: #fff; --ink: #1c1c20; --pale: #63636b; --line: #d5d5da;
 --bar: #f4f4f6; --mark: #c2281d; --button: #e9e9ee; }
@media (prefers-color-scheme: dark) { :root { --paper: #141417; --ink: #ececef; --pale: #a0a0a8;
 --line: #3a3a42; --bar: #1e1e23; --mark: #ff6358; --button: #2c2c33; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink);
 font: 14px/1.45 system-ui, sans-serif; }
header { position: sticky; top: 0; z-index: 1; padding: 10px 16px; background: var(--bar);
 border-bottom: 1px solid var(--line); }
h1 { margin: 0 0 6px; font-size: 15px; font-weight: 600; overflow-wrap: anywhere; }
.row { display: flex; flex-wrap: wrap; gap: 8px; align-items: center; }
input[type=search], select, button { font: inherit; color: inherit; background: var(--paper);
 border: 1px solid var(--line); border-radius: 5px; padding: 4px 8px; max-width: 100%; }
button { background: var(--button); cursor: pointer; }
button:disabled { opacity: .45; cursor: default; }
.pale { color: var(--pale); }
main { display: grid; gap: 12px; padding: 14px 16px 40px;
 grid-template-columns: repeat(auto-fill, minmax(min(100%, {{ width }}px), 1fr)); }
label.tile { display: block; max-width: {{ width }}px; cursor: pointer; border-radius: 6px;
 overflow: hidden; border: 2px solid var(--line); }
label.tile:has(input:checked) { border-color: var(--mark); }
label.tile:has(input:checked) .picture { opacity: .4; }
.picture { aspect-ratio: {{ width }} / {{ height }}; background-color: #18181b;
 background-repeat: no-repeat; }
.name { display: flex; gap: 7px; padding: 6px 8px; align-items: flex-start;
 overflow-wrap: anywhere; }
.name input { margin: 3px 0 0; flex: none; accent-color: var(--mark); }
.why { color: var(--mark); font-size: 12.5px; }
@media (max-width: 700px) { header { position: static; } }
p.none { padding: 30px 16px; }
</style>
</head>
<body>
<header>
<h1>{{ cache }}</h1>
<div class="row">
<input type="search" id="search" placeholder="search" aria-label="search names and reasons">
<select id="filter" aria-label="which volumes"></select>
<button id="tick">Tick all of these</button>
<button id="untick">Untick all of these</button>
<button id="save">Save exclude.txt</button>
<span id="count" role="status"></span>
</div>
<div class="row pale">
<button id="back">Back</button><span id="where"></span><button id="on">On</button>
<span>Tick what is to be left out, save, then: prepare ... --exclude exclude.txt --prune</span>
</div>
<noscript>This page needs JavaScript; the pictures are page_0001.png and so on.</noscript>
</header>
<main id="tiles"></main>
<script>
"use strict";
const CACHE = {{ cache | tojson }}, PER_VIEW = {{ per_view }};
const ROWS = {{ rows | tojson }};
const $ = (id) => document.getElementById(id);
const KEY = "voco_jax contact sheet: " + CACHE;
let ticked = new Set(), view = [], start = 0;  // ticked: on larger sheets of this cache, too
try {
  ticked = new Set(JSON.parse(localStorage.getItem(KEY) || "[]"));
} catch (error) { /* a browser that keeps nothing */ }

const tickedHere = () => ROWS.map((row) => row[0]).filter((id) => ticked.has(id));

function keep() {
  try { localStorage.setItem(KEY, JSON.stringify([...ticked])); } catch (error) { /* as above */ }
  const count = tickedHere().length;
  $("count").textContent = count + " of " + ROWS.length + " ticked";
  $("save").disabled = !count;
}

function kindOf(reason) {
  return reason.split(":")[0].replace(/^same voxels as .*/, "same voxels");
}

function fillFilter() {
  const kinds = new Map();
  for (const row of ROWS) for (const kind of new Set(row[2].map(kindOf)))
    kinds.set(kind, (kinds.get(kind) || 0) + 1);
  const odd = ROWS.filter((row) => row[2].length).length;
  const choices = [["all", "all: " + ROWS.length], ["odd", "odd: " + odd],
    ["plain", "not odd: " + (ROWS.length - odd)], ["ticked", "ticked"]];
  for (const [kind, count] of [...kinds].sort((a, b) => b[1] - a[1]))
    choices.push(["kind " + kind, kind + ": " + count]);
  for (const [value, text] of choices) $("filter").add(new Option(text, value));
}

function wanted(row) {
  const filter = $("filter").value, words = $("search").value.trim().toLowerCase();
  if (words && !(row[0] + " " + row[2].join(" ")).toLowerCase().includes(words)) return false;
  if (filter === "odd") return row[2].length > 0;
  if (filter === "plain") return !row[2].length;
  if (filter === "ticked") return ticked.has(row[0]);
  return filter === "all" || row[2].some((reason) => "kind " + kindOf(reason) === filter);
}

function make(tag, name, text) {
  const made = document.createElement(tag);
  if (name) made.className = name;
  if (text) made.textContent = text;
  return made;
}

function tileOf([id, section, reasons, page, x, y, size]) {
  const tile = make("label", "tile"), picture = make("div", "picture"), line = make("div", "name");
  picture.style.backgroundImage = "url(" + page + ")";
  picture.style.backgroundSize = size + "% auto";
  picture.style.backgroundPosition = x + "% " + y + "%";
  const box = make("input");
  box.type = "checkbox";
  box.checked = ticked.has(id);
  box.addEventListener("change", () => {
    box.checked ? ticked.add(id) : ticked.delete(id);
    keep();
  });
  const words = make("span", "", id);
  if (section === "validation") words.append(make("span", "pale", " validation"));
  if (reasons.length) words.append(make("div", "why", reasons.join("; ")));
  line.append(box, words);
  tile.append(picture, line);
  return tile;
}

function draw() {
  start = Math.max(0, Math.min(start, Math.floor((view.length - 1) / PER_VIEW) * PER_VIEW));
  const shown = view.slice(start, start + PER_VIEW);
  $("tiles").replaceChildren(...shown.map(tileOf));
  if (!shown.length) $("tiles").append(make("p", "none pale", "No volume is like that."));
  $("where").textContent = view.length
    ? start + 1 + " to " + (start + shown.length) + " of " + view.length : "none";
  $("back").disabled = start === 0;
  $("on").disabled = start + PER_VIEW >= view.length;
}

function choose() { view = ROWS.filter(wanted); start = 0; draw(); }

function move(by) { start += by; draw(); scrollTo(0, 0); }

function tickAll(on) {
  for (const row of view) on ? ticked.add(row[0]) : ticked.delete(row[0]);
  keep();
  draw();
}

function save() {
  const ids = tickedHere();
  const plain = ids.every((id) => id === id.trim() && !/[\r\n]|^# /.test(id));
  const quoted = ids.map((id) => '"' + id.replaceAll('"', '""') + '"');
  const text = (plain ? ids : ["id", ...quoted]).join("\n") + "\n";
  const link = make("a");
  link.href = URL.createObjectURL(new Blob([text], { type: "text/plain;charset=utf-8" }));
  link.download = plain ? "exclude.txt" : "exclude.csv";
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 10000);
}

$("search").addEventListener("input", choose);
$("filter").addEventListener("change", choose);
$("tick").addEventListener("click", () => tickAll(true));
$("untick").addEventListener("click", () => tickAll(false));
$("save").addEventListener("click", save);
$("back").addEventListener("click", () => move(-PER_VIEW));
$("on").addEventListener("click", () => move(PER_VIEW));
fillFilter();
keep();
choose();
</script>
</body>
</html>
"""
