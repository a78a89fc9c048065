const { rows, refused, copy, charted } = payload;

function several(nodes) {
  return make("span", "several" + (nodes.length === 1 ? " one" : nodes.length > 4 ? " many" : ""), ...nodes);
}

const splits = distinct(rows.map((row) => row.split));
const written = (score) => (score === null ? "–" : score.toFixed(2));
rows.forEach((row, index) => { row.index = index; row.lower = row.prompt.toLowerCase(); });

function tag(text, name) {
  const node = make("span", "tag" + (name ? " " + name : ""), text);
  node.dir = "auto";
  node.title = text;
  return node;
}

function card(row) {
  const sure = row.score !== null && row.score >= copy;
  const node = make("button", "card" + (sure ? " copy" : ""));
  node.type = "button";
  node.dataset.row = row.index;
  const prompt = make("span", "prompt", row.prompt);
  prompt.dir = "auto";
  const score = make("span", "score" + (sure ? " hot" : ""), written(row.score));
  score.title = row.score === null ? "no copy score" : "copy score " + row.score;
  node.append(
    make("span", "pair" + (row.references.length ? "" : " alone"), ...(row.references.length ? [several(row.references.map((place) => tile(place, true))), make("i", "", "→")] : []), tile(row.target, true)),
    make("span", "line", prompt, score),
    make("span", "tags", row.style === null ? null : tag(row.style), tag(row.split, "split s" + (splits.indexOf(row.split) % 6)),
      row.way === null ? null : tag(row.way)),
  );
  node.addEventListener("click", () => open(row.index));
  return node;
}

const ORDERS = {
  highest: (a, b) => (b.score ?? -1) - (a.score ?? -1),
  lowest: (a, b) => (a.score ?? 2) - (b.score ?? 2),
  data: () => 0,
  longest: (a, b) => b.prompt.length - a.prompt.length,
};
const list = new List(find("grid"), find("more"), card);

function filter() {
  const [style, split, way] = ["style", "split", "way"].map((id) => find(id).value);
  const text = find("text").value.toLowerCase();
  const [low, high] = ["low", "high"].map((id) => (find(id).value === "" ? null : Number(find(id).value)));
  const within = (score) =>
    (low === null && high === null) || (score !== null && (low === null || score >= low) && (high === null || score <= high));
  const found = rows.filter((row) =>
    fits(style, row.style) && fits(split, row.split) && fits(way, row.way) && within(row.score) && row.lower.includes(text));
  list.show(found.sort(ORDERS[find("order").value]));
  find("count").replaceChildren(make("b", "", found.length.toLocaleString("en")), " of " + rows.length.toLocaleString("en") + " shown");
  find("nothing").hidden = found.length > 0;
}

for (const [id, title] of [["style", "All styles"], ["split", "All splits"], ["way", "All ways"]]) {
  choices(find(id), title, distinct(rows.map((row) => row[id])), rows.some((row) => row[id] === null) && rows.some((row) => row[id] !== null));
}
if (rows.every((row) => row.score === null)) {
  find("order").querySelectorAll("[value=highest], [value=lowest]").forEach((option) => option.remove());
  find("low").parentNode.hidden = true;
}
find("filters").addEventListener("input", filter);
find("filters").addEventListener("submit", (event) => event.preventDefault());
find("filters").addEventListener("reset", () => setTimeout(filter));
for (const button of document.querySelectorAll("[data-style]")) {
  const style = charted[button.dataset.style];
  button.disabled = rows.every((row) => row.style !== style);
  button.addEventListener("click", () => {
    find("style").value = "=" + style;
    filter();
    find("triplets").scrollIntoView();
  });
}
document.querySelectorAll("[data-low]").forEach((bar) => bar.addEventListener("click", () => {
  find("low").value = bar.dataset.low;
  find("high").value = bar.dataset.high;
  filter();
  find("triplets").scrollIntoView();
}));

// --- one triplet, large
const dialog = find("large");
let current = 0;

function figure(place, name, role) {
  const picture = payload.pictures[place];
  const size = picture.fault === undefined ? " · " + picture.width + " × " + picture.height : "";
  const caption = make("figcaption", "", role + size + " · ", make("bdi", "code", name));
  return make("figure", "", tile(place, false), caption);
}

function draw() {
  const row = list.items[current];
  const last = row.references.length;
  const references = row.references.map((place, i) => figure(place, row.names[i], last > 1 ? "reference " + (i + 1) : "reference"));
  find("large-pair").replaceChildren(...(last ? [several(references), make("i", "", "→")] : []), figure(row.target, row.names[last], "target"));
  find("large-pair").classList.toggle("alone", last === 0);
  find("words").textContent = row.prompt;
  find("at").textContent = (current + 1).toLocaleString("en") + " of " + list.items.length.toLocaleString("en");
  const facts = [["split", row.split], ["style", row.style ?? "–"], ["way", row.way ?? "–"], ["copy score", row.score ?? "–"], ...row.columns, ["row", row.place]];
  find("details").replaceChildren(...facts.flatMap(([name, value]) => {
    const text = make("dd", "", value);
    text.dir = "auto";
    return [make("dt", "", name), text];
  }));
  find("before").disabled = current === 0;
  find("after").disabled = current === list.items.length - 1;
}

function open(index) {
  current = list.items.findIndex((row) => row.index === index);
  draw();
  dialog.showModal();
}

function step(by) {
  current = Math.min(Math.max(current + by, 0), list.items.length - 1);
  while (list.made <= current) list.grow();
  draw();
}

dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1 }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  step(by);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => list.body.children[current]?.focus());
find("before").addEventListener("click", () => step(-1));
find("after").addEventListener("click", () => step(1));
find("close").addEventListener("click", () => dialog.close());
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || dialog.open || event.target.matches("input, select")) return;
  event.preventDefault();
  find("text").focus();
});

// --- what was refused
if (refused.length) {
  const table = new List(find("refused-rows"), find("refused-more"), (cells) => {
    return make("tr", "", ...cells.map((cell, i) => make("td", i === 0 ? "code" : "", make("bdi", "", cell))));
  });
  choices(find("stage"), "All stages", distinct(refused.map((cells) => cells[1])), false);
  const narrow = () => {
    const text = find("reason").value.toLowerCase();
    const found = refused.filter(([name, stage, reason]) =>
      fits(find("stage").value, stage) && (name.toLowerCase().includes(text) || reason.toLowerCase().includes(text)));
    table.show(found);
    find("refused-count").textContent = found.length.toLocaleString("en") + " of " + refused.length.toLocaleString("en") + " listed";
  };
  find("refusals").addEventListener("input", narrow);
  find("refusals").addEventListener("submit", (event) => event.preventDefault());
  narrow();
} else if (find("refusals")) {
  find("refusals").hidden = find("refused-sheet").hidden = true;
}
filter();
