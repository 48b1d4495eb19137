// Measures each frame, and writes the results as base64 of JSON into the page.

function describe(element) {
  return (element.textContent || element.tagName).trim().replace(/\s+/g, " ").slice(0, 60);
}

// Parts that reach beyond the window and beyond every box that scrolls.
function overflows(doc, width) {
  return [...doc.querySelectorAll("body *")]
    .filter((node) => !node.closest(".scroll, pre") && node.getClientRects().length)
    .filter((node) => {
      const box = node.getBoundingClientRect();
      return box.right > width + 1 || box.left < -1;
    })
    .map(describe);
}

// Texts of pictures that reach beyond the picture: they would be cut off.
function cutOff(doc) {
  return [...doc.querySelectorAll("svg")].flatMap((svg) => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll("text")]
      .filter((text) => {
        const box = text.getBoundingClientRect();
        return box.left < frame.left - 2 || box.right > frame.right + 2
          || box.top < frame.top - 2 || box.bottom > frame.bottom + 2;
      })
      .map(describe);
  });
}

// Words of table cells that stand on two lines. A hyphen is a place to break.
function brokenWords(doc) {
  const broken = [];
  for (const cell of doc.querySelectorAll("th, td")) {
    const walker = doc.createTreeWalker(cell, NodeFilter.SHOW_TEXT);
    while (walker.nextNode()) {
      for (const match of walker.currentNode.data.matchAll(/[^\s\-\/]+/g)) {
        if (match[0].length > 24) continue;
        const range = doc.createRange();
        range.setStart(walker.currentNode, match.index);
        range.setEnd(walker.currentNode, match.index + match[0].length);
        const tops = new Set([...range.getClientRects()].map((box) => Math.round(box.top)));
        if (tops.size > 1) broken.push(match[0]);
      }
    }
  }
  return broken;
}

// Pictures without a text for those who cannot see them: a title and a description, by their ids.
function withoutText(doc) {
  const texts = (svg) => (svg.getAttribute("aria-labelledby") || "").split(/\s+/)
    .map((id) => id && doc.getElementById(id)?.textContent.trim());
  return [...doc.querySelectorAll("svg")]
    .filter((svg) => svg.getAttribute("role") !== "img" || texts(svg).length < 2
      || !texts(svg).every(Boolean))
    .map(describe);
}

function luminance(colour) {
  const parts = colour.match(/[\d.]+/g).slice(0, 3).map((part) => {
    const share = part / 255;
    return share <= 0.04045 ? share / 12.92 : ((share + 0.055) / 1.055) ** 2.4;
  });
  return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2];
}

function contrast(first, second) {
  const [high, low] = [luminance(first), luminance(second)].sort((a, b) => b - a);
  return (high + 0.05) / (low + 0.05);
}

// Texts of the page and of pictures that can hardly be read on the ground of the page. White, and
// black in a heat map, are for texts in coloured cells.
function faint(doc, view) {
  const ground = view.getComputedStyle(doc.body).backgroundColor;
  const colour = (node) => view.getComputedStyle(node)[node.closest("svg") ? "fill" : "color"];
  const inCell = (node) => node.closest("svg") && (colour(node) === "rgb(255, 255, 255)"
    || (colour(node) === "rgb(0, 0, 0)" && node.closest("svg").querySelector("image")));
  return [...doc.querySelectorAll("p, li, td, th, summary, figcaption, svg text")]
    .filter((node) => !inCell(node) && contrast(colour(node), ground) < 4.5)
    .map(describe);
}

function measure(frame) {
  const view = frame.contentWindow;
  const doc = frame.contentDocument;
  if (opened) doc.querySelectorAll("details").forEach((part) => { part.open = true; });
  const width = view.innerWidth;
  const first = doc.querySelector("nav");
  return {
    width,
    dark: view.matchMedia("(prefers-color-scheme: dark)").matches,
    ground: luminance(view.getComputedStyle(doc.body).backgroundColor),
    scrollWidth: doc.documentElement.scrollWidth,
    pictures: doc.querySelectorAll("svg").length,
    tables: doc.querySelectorAll("table").length,
    lead: first ? Math.round(first.getBoundingClientRect().top) : null,
    overflows: overflows(doc, width),
    cutOff: cutOff(doc),
    brokenWords: brokenWords(doc),
    faint: faint(doc, view),
    withoutText: withoutText(doc),
  };
}

window.onload = () => {
  const results = {};
  document.querySelectorAll("iframe").forEach((frame) => {
    results[frame.dataset.key] = measure(frame);
  });
  const bytes = new TextEncoder().encode(JSON.stringify(results));
  document.getElementById("result").textContent =
    btoa(Array.from(bytes, (byte) => String.fromCharCode(byte)).join(""));
};
