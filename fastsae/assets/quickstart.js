"use strict";
// The page of a quickstart run: its first cards, and the index of all latents.
const cards = JSON.parse(document.getElementById("cards-data").textContent);
const byIndex = new Map(cards.map((card) => [card.index, card]));
const grid = document.getElementById("cards");
grid.append(...cards.slice(0, Number(grid.dataset.shown)).map(drawCard));

const list = document.getElementById("latents"), slot = document.getElementById("opened");
const query = document.getElementById("query"), found = document.getElementById("found");
const PORTION = 200;  // rows drawn at a time
const texts = new Map(cards.map((card) => [card, [card.index, card.title, ...card.fires_on.map((p) => p[0]), ...card.promotes.map((p) => p[0])].join("\u0001").toLowerCase()]));
let order = { key: "index", down: false }, rows = [], drawn = 0;

function rowOf(card) {
  const row = make("button", "latent", make("span", "number", String(card.index)), make("span", "title", card.title || "–"),
    make("span", "number", percent(card.density)), make("span", "number", figures(card.max_activation)));
  row.dataset.latent = card.index;
  row.addEventListener("click", () => { location.hash = `latent-${card.index}`; });
  return row;
}

function drawMore() {
  list.append(...rows.slice(drawn, drawn + PORTION).map(rowOf));
  drawn = Math.min(rows.length, drawn + PORTION);
}

function search() {
  const words = query.value.toLowerCase().split(/\s+/).filter(Boolean);
  const first = (card) => words.length && (String(card.index) === words[0] ? 2 : words.every((w) => card.title.toLowerCase().includes(w)) ? 1 : 0);
  rows = cards.filter((card) => words.every((word) => texts.get(card).includes(word)));
  rows.sort((a, b) => first(b) - first(a) || (order.down ? -1 : 1) * compare(a[order.key], b[order.key]) || a.index - b.index);
  list.replaceChildren();
  list.scrollTop = drawn = 0;
  drawMore();
  found.textContent = `${rows.length.toLocaleString("en")} of ${cards.length.toLocaleString("en")}`;
  for (const head of document.querySelectorAll("[data-sort]")) {
    head.setAttribute("aria-pressed", String(head.dataset.sort === order.key));
    head.dataset.down = order.down;
  }
}

function compare(a, b) {
  return typeof a === "string" ? a.localeCompare(b) : a - b;
}

function show(index, scroll) {
  const card = byIndex.get(index);
  if (!card) return;
  slot.replaceChildren(drawCard(card));
  for (const row of list.children) row.classList.toggle("open", Number(row.dataset.latent) === index);
  if (scroll) slot.scrollIntoView({ block: "nearest" });
}

function followHash() {
  const named = /^#latent-(\d+)$/.exec(location.hash);
  if (named) show(Number(named[1]), true);
}

for (const head of document.querySelectorAll("[data-sort]")) {
  head.addEventListener("click", () => {
    const key = head.dataset.sort, numeric = key !== "title" && key !== "index";
    order = { key, down: order.key === key ? !order.down : numeric };
    search();
  });
}
query.addEventListener("input", search);
list.addEventListener("scroll", () => { if (list.scrollTop + 2 * list.clientHeight > list.scrollHeight) drawMore(); });
addEventListener("hashchange", followHash);
search();
show(Number(slot.dataset.first), false);
followHash();
