// Tips, the table of scores, the map of a sweep, the previews by step. After page.js.
const { columns, rows, drawn, metrics, axes, baseline, best } = payload;

// A number as the tables write it: a true minus, no negative zero.
function figure(value, digits) {
  const text = value.toFixed(digits);
  return (/[1-9]/.test(text) ? text : text.replace("-", "")).replace("-", "\u2212");
}

function option(select, value, text) {
  const node = make("option", "", text);
  node.value = value;
  select.append(node);
  return node;
}

function short(text, longest) {
  return text.length <= longest ? text : text.slice(0, longest - 1) + "…";
}

// --- tips: what is hovered, tapped or focused says what it means
const tip = find("tip");

function showTip(of) {
  tip.textContent = of.dataset.tip;
  tip.hidden = false;
  const at = of.getBoundingClientRect();
  const [width, height] = [tip.offsetWidth, tip.offsetHeight];
  const left = Math.min(Math.max(at.left + at.width / 2 - width / 2, 8), innerWidth - width - 8);
  const above = at.top - height - 8;
  tip.style.left = Math.max(left, 8) + "px";
  tip.style.top = (above >= 8 ? above : Math.min(at.bottom + 8, innerHeight - height - 8)) + "px";
}

const tipped = (event) => (event.target instanceof Element ? event.target.closest("[data-tip]") : null);
for (const kind of ["pointerover", "focusin", "click"]) {
  document.addEventListener(kind, (event) => {
    const of = tipped(event);
    if (of) showTip(of);
    else if (kind !== "focusin") tip.hidden = true;
  });
}
document.addEventListener("focusout", () => { tip.hidden = true; });
document.addEventListener("keydown", (event) => { if (event.key === "Escape") tip.hidden = true; });
addEventListener("scroll", () => { tip.hidden = true; }, { passive: true, capture: true });

find("all-lines")?.addEventListener("click", (event) => {
  document.querySelectorAll("[data-more]").forEach((line) => { line.hidden = false; });
  event.currentTarget.remove();
});

// --- a sweep: one metric over two axes, the others held
function said(value) {
  return value === null ? "none" : value === true ? "yes" : value === false ? "no" : String(value);
}

function drawMap() {
  const metric = metrics[find("map-metric").value];
  const [x, y] = [find("map-x").value, find("map-y").value];
  const held = {};
  for (const select of find("map-rest").querySelectorAll("select")) {
    select.parentNode.hidden = select.dataset.axis === x || select.dataset.axis === y;
    if (!select.parentNode.hidden) held[select.dataset.axis] = axes[select.dataset.axis][select.value];
  }
  const at = (across, down) => columns.findIndex((column) => {
    const wanted = { ...held, [x]: across, ...(y === "" ? {} : { [y]: down }) };
    return Object.keys(column.settings).length > 0 && Object.entries(wanted).every(([axis, value]) => column.settings[axis] === value);
  });
  const downs = y === "" ? [null] : axes[y];
  const cells = downs.map((down) => axes[x].map((across) => at(across, down)));
  const known = cells.flat().filter((place) => place >= 0 && metric.means[place]).map((place) => metric.means[place][0]);
  const [low, high] = [Math.min(...known), Math.max(...known)];
  const head = make("tr", "", make("th", "", y), ...axes[x].map((value) => make("th", "", said(value))));
  const body = cells.map((line, i) => make("tr", "", make("th", "", y === "" ? "" : said(downs[i])), ...line.map((place) => {
    const mean = place < 0 ? null : metric.means[place];
    if (!mean) return make("td", "soft", "–");
    const cell = make("td", place === best ? "best" : "", figure(mean[0], metric.digits));
    let share = high > low ? (mean[0] - low) / (high - low) : 0.5;
    if (metric.direction === "lower") share = 1 - share;
    cell.style.background = "color-mix(in oklab, var(--adapter) " + Math.round(8 + 62 * share) + "%, var(--well))";
    if (share > 0.62) cell.style.color = "var(--sheet)";
    const limits = mean[1] === null ? "" : " [" + figure(mean[1], metric.digits) + ", " + figure(mean[2], metric.digits) + "]";
    cell.dataset.tip = columns[place].label + "\n" + metric.title + " " + figure(mean[0], metric.digits) + limits;
    cell.tabIndex = 0;
    return cell;
  })));
  find("map").replaceChildren(make("thead", "", head), make("tbody", "", ...body));
  const words = { higher: "darker is higher, and better", lower: "darker is lower, and better", neither: "darker is higher" };
  find("map-note").textContent = x + " across" + (y === "" ? "" : ", " + y + " down") + "; " + words[metric.direction] + ". The framed cell is the best by the rule.";
}

if (find("map")) {
  const varied = Object.keys(axes).filter((axis) => axes[axis].length > 1);
  metrics.forEach((metric, i) => option(find("map-metric"), i, metric.title));
  varied.forEach((axis) => { option(find("map-x"), axis, axis); option(find("map-y"), axis, axis); });
  option(find("map-y"), "", "(nothing)");
  find("map-y").value = varied[1] ?? "";
  for (const axis of varied) {
    const select = make("select");
    select.dataset.axis = axis;
    select.name = "held-" + axis;
    axes[axis].forEach((value, i) => option(select, i, said(value)));
    const chosen = best === null ? 0 : axes[axis].indexOf(columns[best].settings[axis]);
    select.value = Math.max(chosen, 0);
    find("map-rest").append(make("label", "", axis + " ", select));
  }
  find("map-controls").addEventListener("input", (event) => {
    if (find("map-x").value === find("map-y").value) {
      const other = event.target.id === "map-x" ? "map-y" : "map-x";
      find(other).value = varied.find((axis) => axis !== event.target.value) ?? "";
    }
    drawMap();
  });
  find("map-controls").addEventListener("submit", (event) => event.preventDefault());
  drawMap();
}

// --- previews through the steps
if (find("strip")) {
  const stops = columns.map((column, place) => ({ place, step: column.step }))
    .filter((stop) => stop.step !== null && columns[stop.place].role === "checkpoint").sort((a, b) => a.step - b.step);
  const shown = rows.slice(0, 12).map((row, i) => {
    const moving = tile(drawn[stops[0].place][i][0], false);
    const words = make("p", "prompt", row.prompt);
    words.dir = "auto";
    const named = (name, node) => make("div", "", node, make("p", "caption", make("span", "", name)));
    const shots = [row.references.length ? named("reference", tile(row.references[0], true)) : null, named("this step", moving),
      row.target === null ? null : named("target", tile(row.target, true))];
    find("strip").append(make("div", "", make("div", "pair", ...shots), words));
    return moving.querySelector("img");
  });
  const slider = find("step");
  slider.max = stops.length - 1;
  const show = () => {
    const stop = stops[slider.value];
    find("step-name").textContent = "step " + stop.step.toLocaleString("en");
    shown.forEach((image, i) => { image.src = payload.pictures[drawn[stop.place][i][0]].url; });
  };
  let playing = 0;
  const stopPlaying = () => {
    clearInterval(playing);
    playing = 0;
    find("play").textContent = "▶ Play";
    find("play").ariaPressed = "false";
  };
  find("play").addEventListener("click", () => {
    if (playing) return stopPlaying();
    if (slider.value === slider.max) slider.value = 0;
    show();
    find("play").textContent = "❚❚ Stop";
    find("play").ariaPressed = "true";
    playing = setInterval(() => {
      slider.value = Number(slider.value) + 1;
      show();
      if (slider.value === slider.max) stopPlaying();
    }, 700);
  });
  slider.addEventListener("input", () => { stopPlaying(); show(); });
  slider.value = slider.max;
  show();
}

find("copy")?.addEventListener("click", async () => {
  const code = find("loading");
  try {
    await navigator.clipboard.writeText(code.textContent);
    find("copy").textContent = "Copied";
  } catch {
    getSelection().selectAllChildren(code); // where a browser lets no page from disk write: the text is ready to copy
    find("copy").textContent = "Selected: press Ctrl+C";
  }
});
