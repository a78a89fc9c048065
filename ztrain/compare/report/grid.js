// Rows of pictures with filters, one picture large, and two columns under one slider. After figures.js.
const chosenColumns = new Set(columns.keys());
rows.forEach((row, index) => { row.index = index; row.lower = row.prompt.toLowerCase(); });
const perPicture = metrics.map((metric, place) => ({ ...metric, place })).filter((metric) => metric.values !== null);
const firstSplice = columns.findIndex((column) => column.role === "splice");
const judged = columns.map((column, place) => ({ column, place })).filter(({ column }) => ["adapter", "checkpoint", "setting"].includes(column.role));
const before = baseline ?? (firstSplice >= 0 ? firstSplice : 0);
const after = best !== null && best !== before ? best : judged.filter(({ place }) => place !== before).at(-1)?.place ?? Math.min(before + 1, columns.length - 1);

// The mean over the seeds that can tell; null where none can.
function score(metric, column, row, seed) {
  const all = metric.values[column][row];
  const told = (seed === null ? all : [all[seed] ?? null]).filter((value) => value !== null);
  return told.length ? told.reduce((sum, value) => sum + value, 0) / told.length : null;
}

function caption(name, value, metric) {
  const label = make("bdi", "", name);
  label.title = name;
  return make("p", "caption", label, value === null || value === undefined ? null : make("b", "", figure(value, Math.max(metric.digits, 2))));
}

function given(row, lazy) {
  const shots = row.references.map((place, i) => [row.references.length > 1 ? "reference " + (i + 1) : "reference", place]);
  if (row.target !== null) shots.push(["target", row.target]);
  return shots.map(([name, place]) => make("div", "given", tile(place, lazy), caption(name, null)));
}

function shot(column, row, seed) {
  const node = make("button", "shot", tile(drawn[column][row.index][seed], true));
  node.type = "button";
  node.ariaLabel = columns[column].label + ", seed " + row.seeds[seed];
  node.dataset.at = [column, row.index, seed].join();
  node.addEventListener("click", () => open(column, row.index, seed));
  return node;
}

const seedChosen = () => (find("seed").value === "" ? null : Number(find("seed").value));
const metricChosen = () => perPicture[find("metric").value];

function drawRow(row) {
  const [seed, metric] = [seedChosen(), metricChosen()];
  const words = make("p", "prompt", row.prompt);
  words.dir = "auto";
  const style = row.style === null ? null : make("span", "tag", row.style);
  if (style) style.dir = "auto";
  const tiles = [...chosenColumns].sort((a, b) => a - b).map((column) => {
    const seeds = row.seeds.map((_, i) => i).filter((i) => seed === null || i === seed);
    const shots = seeds.map((i) => shot(column, row, i));
    const value = metric ? score(metric, column, row.index, seed) : null;
    return make("div", columns[column].role, shots.length > 1 ? make("div", "seeds", ...shots) : shots[0] ?? null, caption(columns[column].label, value, metric));
  });
  const shots = [...given(row, true), ...tiles];
  const side = make("div", "tiles" + (shots.length <= 12 ? " few" : ""), ...shots);
  side.style.setProperty("--tiles", Math.max(shots.length, 6));
  const node = make("article", "sheet row", make("header", "", words, style), side);
  node.dataset.row = row.index;
  return node;
}

const list = find("grid") ? new List(find("grid"), find("more"), drawRow, 12) : null;

function filter() {
  const [text, style, order] = [find("text").value.toLowerCase(), find("style").value, find("order").value];
  const [seed, metric] = [seedChosen(), metricChosen()];
  const [one, other] = [Number(find("one").value), Number(find("other").value)];
  find("pair").hidden = order === "data";
  find("other").hidden = order !== "apart" && order !== "gain";
  const key = {
    data: () => 0,
    highest: (row) => score(metric, one, row, seed),
    lowest: (row) => score(metric, one, row, seed),
    apart: (row) => Math.abs(score(metric, one, row, seed) - score(metric, other, row, seed)),
    gain: (row) => score(metric, one, row, seed) - score(metric, other, row, seed),
  }[order];
  const tells = (row) => order === "data" || [one, ...(order === "apart" || order === "gain" ? [other] : [])].every((column) => score(metric, column, row, seed) !== null);
  const sign = order === "lowest" ? 1 : -1;
  const found = rows.filter((row) => row.lower.includes(text) && fits(style, row.style))
    .map((row) => ({ row, last: !tells(row.index), key: tells(row.index) ? key(row.index) : 0 }));
  found.sort((a, b) => a.last - b.last || sign * (a.key - b.key));
  list.show(found.map(({ row }) => row));
  find("count").replaceChildren(make("b", "", found.length.toLocaleString("en")), " of " + rows.length.toLocaleString("en") + " rows");
  find("nothing").hidden = found.length > 0;
}

function columnSelect(id, chosen) {
  columns.forEach((column, place) => option(find(id), place, short(column.label, 48)));
  find(id).value = chosen;
}

function startGrid() {
  choices(find("style"), "All styles", distinct(rows.map((row) => row.style)), rows.some((row) => row.style === null) && rows.some((row) => row.style !== null));
  const most = Math.max(...rows.map((row) => row.seeds.length));
  option(find("seed"), "", "All seeds");
  for (let i = 0; i < most; i++) option(find("seed"), i, "Seed " + (i + 1) + " of " + most);
  find("seed").hidden = most < 2;
  find("seed").options[1].defaultSelected = true;
  perPicture.forEach((metric, i) => option(find("metric"), i, metric.title));
  find("metric-label").hidden = perPicture.length === 0;
  const orders = { data: "as in the data" };
  if (perPicture.length) Object.assign(orders, { highest: "highest score of", lowest: "lowest score of" });
  if (perPicture.length && columns.length > 1) Object.assign(orders, { apart: "largest difference of", gain: "first most above second" });
  for (const [value, text] of Object.entries(orders)) option(find("order"), value, text);
  columnSelect("one", after);
  columnSelect("other", before);
  const boxes = columns.map((column, place) => {
    const box = make("input");
    box.type = "checkbox";
    box.name = "shown";
    box.value = place;
    box.checked = box.defaultChecked = true;
    box.addEventListener("input", () => chosenColumns[box.checked ? "add" : "delete"](place));
    return make("label", "", box, make("bdi", "", column.label));
  });
  find("column-list").append(...boxes);
  find("filters").addEventListener("input", filter);
  find("filters").addEventListener("submit", (event) => event.preventDefault());
  find("filters").addEventListener("reset", () => setTimeout(() => {
    columns.forEach((_, place) => chosenColumns.add(place));
    find("one").value = after;
    find("other").value = before;
    filter();
  }));
  document.addEventListener("click", (event) => { if (!find("columns").contains(event.target)) find("columns").open = false; });
  filter();
}

// --- one picture, large
const dialog = find("large");
let at = { column: 0, row: 0, seed: 0 };

function drawLarge() {
  const [row, column] = [rows[at.row], columns[at.column]];
  at.seed = Math.min(at.seed, row.seeds.length - 1);
  const place = drawn[at.column][at.row][at.seed];
  find("large-picture").replaceChildren(tile(place, false));
  const size = payload.pictures[place];
  find("large-name").className = "caption " + column.role;
  find("large-name").replaceChildren(make("bdi", "", column.label), "seed " + row.seeds[at.seed] + " · " + size.width + " × " + size.height);
  find("large-given").replaceChildren(...given(row, false));
  find("words").textContent = row.prompt;
  const order = list.items.findIndex((one) => one.index === at.row);
  find("at").textContent = "row " + (order + 1).toLocaleString("en") + " of " + list.items.length.toLocaleString("en");
  find("large-scores").replaceChildren(...perPicture.flatMap((metric) => {
    const value = metric.values[at.column][at.row][at.seed] ?? null;
    const mean = metric.means[at.column];
    const digits = Math.max(metric.digits, 2);
    const told = make("dd", "", value === null ? "–" : figure(value, digits), make("small", "", mean ? "  mean " + figure(mean[0], digits) : ""));
    return [make("dt", "", metric.title), told];
  }));
}

function open(column, row, seed) {
  at = { column, row, seed };
  drawLarge();
  if (!dialog.open) dialog.showModal();
}

// Along the columns that are shown, seed by seed; along the rows that the filters let through.
function move(across, down) {
  const places = [...chosenColumns].sort((a, b) => a - b).flatMap((column) => rows[at.row].seeds.map((_, seed) => ({ column, seed })))
    .filter(({ seed }) => seedChosen() === null || seed === seedChosen());
  const here = places.findIndex(({ column, seed }) => column === at.column && seed === at.seed);
  const there = places[Math.min(Math.max(here + across, 0), places.length - 1)];
  const order = list.items.findIndex((row) => row.index === at.row);
  const next = Math.min(Math.max(order + down, 0), list.items.length - 1);
  while (list.made <= next) list.grow();
  at = { ...at, ...there, row: list.items[next].index };
  drawLarge();
}

dialog.addEventListener("keydown", (event) => {
  const by = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] }[event.key];
  if (by === undefined) return;
  event.preventDefault();
  move(...by);
});
dialog.addEventListener("click", (event) => { if (event.target === dialog) dialog.close(); });
dialog.addEventListener("close", () => document.querySelector('[data-at="' + [at.column, at.row, at.seed].join() + '"]')?.focus());
find("before").addEventListener("click", () => move(-1, 0));
find("after").addEventListener("click", () => move(1, 0));
find("close").addEventListener("click", () => dialog.close());
document.addEventListener("keydown", (event) => {
  if (event.key !== "/" || dialog.open || !list || event.target.matches("input, select")) return;
  event.preventDefault();
  find("text").focus();
});

// --- two columns under one slider
function cutAt() {
  const share = Number(find("cut").value);
  find("wipe-left").style.clipPath = "inset(0 " + (100 - share) + "% 0 0)";
  find("edge").style.left = share + "%";
  find("name-left").style.opacity = share > 12 ? 1 : 0;
  find("name-right").style.opacity = share < 88 ? 1 : 0;
}

function drawWipe() {
  const row = rows[find("slide-row").value];
  for (const side of ["left", "right"]) {
    const column = Number(find(side).value);
    const picture = payload.pictures[drawn[column][row.index][0]];
    find("wipe-" + side).src = picture.url;
    find("name-" + side).textContent = short(columns[column].label, 40);
    if (side === "left") find("wipe").style.aspectRatio = picture.width + " / " + picture.height;
  }
  find("slide-given").replaceChildren(...given(row, false));
  find("slide-words").textContent = row.prompt;
  find("slide-before").disabled = row.index === 0;
  find("slide-after").disabled = row.index === rows.length - 1;
}

function stepRow(by) {
  find("slide-row").value = Math.min(Math.max(Number(find("slide-row").value) + by, 0), rows.length - 1);
  drawWipe();
}

function startWipe() {
  columnSelect("left", before);
  columnSelect("right", after);
  rows.forEach((row) => option(find("slide-row"), row.index, row.index + 1 + ": " + short(row.prompt, 60)));
  for (const id of ["left", "right", "slide-row"]) find(id).addEventListener("input", drawWipe);
  find("slide-before").addEventListener("click", () => stepRow(-1));
  find("slide-after").addEventListener("click", () => stepRow(1));
  find("cut").addEventListener("input", cutAt);
  find("cut").addEventListener("keydown", (event) => {
    const by = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if (by === undefined) return;
    event.preventDefault();
    stepRow(by);
  });
  // A range follows the pointer with the half of its thumb left out at both ends; the picture's edge must not.
  const follow = (event) => {
    const box = find("wipe").getBoundingClientRect();
    find("cut").value = (100 * (event.clientX - box.left)) / box.width;
    cutAt();
  };
  find("cut").addEventListener("pointermove", (event) => { if (event.buttons) follow(event); });
  find("cut").addEventListener("pointerup", follow);
  drawWipe();
  cutAt();
}

if (list) {
  startGrid();
  startWipe();
}
