"use strict";
// Draws a card: what `fastsae.features.cards.Card` holds of one latent. Every page that shows a
// latent draws it by this, with card.css. Texts are a model's: they become text nodes, never markup.

function make(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children);
  return made;
}

function figures(x, digits = 3) {
  if (x === null) return "–";
  return Math.abs(x) >= 1000 ? x.toLocaleString("en", { maximumFractionDigits: 0 })
    : String(Number(x.toPrecision(digits)));
}

function percent(share, digits = 3) {
  return share === null ? "–" : share > 0 && share < 0.0001 ? "<0.01%" : figures(100 * share, digits) + "%";
}

// A token's text, its line ends and outer spaces made visible. In running text a line end is a mark
// and a space: excerpts stay as low as they are long.
function visible(text, alone) {
  const out = document.createDocumentFragment();
  const shown = text === "" ? "◌" : text.replace(/\t/g, "⇥");
  for (const part of shown.split(alone ? /(\n|↵|^ +| +$)/ : /(\n|↵)/)) {
    if (/^[\n↵]$/.test(part)) out.append(make("i", "ws", "↵"), alone ? "" : part === "\n" ? " " : "");
    else if (/^ +$/.test(part) && alone) out.append(make("i", "ws", part.length > 2 ? `␣×${part.length}` : "␣".repeat(part.length)));
    else if (part) out.append(part);
  }
  return out;
}

function glowing(element, share) {
  element.classList.add("on");
  element.style.setProperty("--a", Math.max(0, Math.min(1, share || 0)).toFixed(2));
  return element;
}

function histogramOf(card) {
  const most = Math.max(1, ...card.histogram), bins = card.histogram.length, width = card.max_activation / bins;
  const bars = card.histogram.map((count, i) => {
    const bar = glowing(make("i"), (i + 1) / bins);
    bar.style.height = count ? `max(2px, ${(100 * count / most).toFixed(1)}%)` : "0";
    const column = make("span", "", bar);
    column.title = `${figures(i * width)} to ${figures((i + 1) * width)}: ${count.toLocaleString("en")} tokens`;
    return column;
  });
  const scale = make("div", "scale", ...card.histogram.map((_, i) => glowing(make("i"), (i + 1) / bins)));
  const ends = make("div", "ends", make("span", "", "0"), make("span", "", "activation"), make("span", "", figures(card.max_activation)));
  const figure = make("div", "histogram", make("div", "columns", ...bars), scale, ends);
  figure.setAttribute("role", "img");
  figure.setAttribute("aria-label", `Activations where it fires, 0 to ${figures(card.max_activation)}`);
  return figure;
}

function effectsOf(name, pairs) {
  return make("div", "", make("h4", "", name), ...pairs.slice(0, 5).map(([token, value]) =>
    make("div", "effect", make("code", "chip", visible(token, true)), make("span", "", value === null ? "–" : (value < 0 ? "−" : "+") + Math.abs(value).toFixed(2)))));
}

function exampleOf(example, card, heading) {
  const text = make("p", "excerpt", ...example.pieces.map((piece, i) => {
    const activation = example.activations[i];
    if (activation === 0) return visible(piece, false);
    const span = glowing(make("span", i === example.peak ? "peak" : "", visible(piece, false)), activation / card.max_activation);
    span.title = figures(activation);
    return span;
  }));
  const name = make("span", "document", example.document);
  name.title = example.document;
  return make("div", "example", make("div", "source", make("b", "", heading), name), text);
}

function drawCard(card) {
  const link = make("a", "", `latent ${card.index}`);
  link.href = `#latent-${card.index}`;
  const examples = card.intervals.flatMap((interval) => interval.examples.map((example, i) =>
    exampleOf(example, card, i ? "" : `${100 * interval.low}–${100 * interval.high}% of its maximum · ${percent(interval.share, 2)} of firings`)));
  return make("article", "panel card", make("h3", "", card.title),
    make("p", "facts", link, ` · fires on ${percent(card.density)} of tokens · a raised token follows ${percent(card.agreement, 2)} of the time`),
    histogramOf(card),
    make("div", "effects", effectsOf("raises", card.promotes), effectsOf("lowers", card.suppresses)),
    ...examples);
}
