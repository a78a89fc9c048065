// A or B: pairs of two columns in a shuffled order on shuffled sides, votes as JSON, a win rate. After page.js.
const { columns, rows, drawn } = payload;
const FORMAT = "ztrain-votes";
const Z = 1.959963984540054; // the normal's 97.5 % point
const judged = columns.findLastIndex((column) => ["adapter", "checkpoint", "setting"].includes(column.role));
const firstSplice = columns.findIndex((column) => column.role === "splice");
const against = payload.baseline ?? (firstSplice >= 0 ? firstSplice : 0);
const ours = payload.best !== null && payload.best !== against ? payload.best : judged >= 0 && judged !== against ? judged : columns.findIndex((_, i) => i !== against);
let state = null; // { one, other, seeds, seed, pairs: [{ row, seed, swapped }], votes: [null, "one", "other" or "tie"], at }
let unsaved = false; // votes that no file holds

// mulberry32 (Tommy Ettinger, public domain): numbers in [0, 1), the same for the same seed.
function generator(seed) {
  let a = seed >>> 0;
  return () => {
    a = (a + 0x6d2b79f5) >>> 0;
    let t = Math.imul(a ^ (a >>> 15), 1 | a);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Pairs in a shuffled order; `swapped`: the first column is B.
function pairsOf(seeds, seed) {
  const draw = generator(seed);
  const pairs = rows.flatMap((row, i) => (seeds === "all" ? [...row.seeds.keys()] : [0]).map((k) => ({ row: i, seed: k })));
  for (let i = pairs.length - 1; i > 0; i--) {
    const j = Math.floor(draw() * (i + 1));
    [pairs[i], pairs[j]] = [pairs[j], pairs[i]];
  }
  // As many on one side as on the other, or one more: a habit of a side then favours nobody.
  const sides = pairs.map((_, i) => i % 2 === 1);
  for (let i = sides.length - 1; i > 0; i--) {
    const j = Math.floor(draw() * (i + 1));
    [sides[i], sides[j]] = [sides[j], sides[i]];
  }
  return pairs.map((pair, i) => ({ ...pair, swapped: sides[i] }));
}

// Rate of wins with ties as half, and Wilson's interval (E. B. Wilson, JASA 22, 1927).
function wilson(wins, ties, votes) {
  const p = (wins + ties / 2) / votes;
  const centre = p + (Z * Z) / (2 * votes);
  const half = Z * Math.sqrt((p * (1 - p)) / votes + (Z * Z) / (4 * votes * votes));
  const scale = 1 + (Z * Z) / votes;
  return { rate: p, low: Math.max((centre - half) / scale, 0), high: Math.min((centre + half) / scale, 1) };
}

function option(select, value, text) {
  const node = make("option", "", text);
  node.value = value;
  select.append(node);
}

function show(id) {
  for (const part of ["start", "ask", "result"]) find(part).hidden = part !== id;
  scrollTo(0, 0);
}

function begin(one, other, seeds, seed, votes) {
  const pairs = pairsOf(seeds, seed);
  state = { one, other, seeds, seed, pairs, votes: votes ?? pairs.map(() => null), at: 0 };
  state.at = Math.max(state.votes.indexOf(null), 0);
  if (state.votes.includes(null)) ask();
  else finish();
}

function ask() {
  const { row, seed, swapped } = state.pairs[state.at];
  const sides = swapped ? [state.other, state.one] : [state.one, state.other];
  find("picture-a").replaceChildren(tile(drawn[sides[0]][row][seed], false));
  find("picture-b").replaceChildren(tile(drawn[sides[1]][row][seed], false));
  find("asked-references").replaceChildren(...rows[row].references.map((place) => tile(place, false)));
  find("words").textContent = rows[row].prompt;
  find("words").scrollTop = 0;
  find("done").max = state.pairs.length;
  find("done").value = state.votes.filter((vote) => vote !== null).length;
  find("where").textContent = state.at + 1 + " of " + state.pairs.length;
  find("back").disabled = state.at === 0;
  show("ask");
}

// side: "a", "b" or "tie".
function vote(side) {
  const { swapped } = state.pairs[state.at];
  state.votes[state.at] = side === "tie" ? "tie" : (side === "a") !== swapped ? "one" : "other";
  unsaved = true;
  const next = state.votes.indexOf(null, state.at + 1);
  const open = next >= 0 ? next : state.votes.indexOf(null);
  if (open < 0) return finish();
  state.at = open;
  ask();
}

function back() {
  if (state.at === 0) return;
  state.at -= 1;
  ask();
}

function counts() {
  const count = (of) => state.votes.filter((vote) => vote === of).length;
  return { wins: count("one"), losses: count("other"), ties: count("tie") };
}

const percent = (share) => (100 * share).toFixed(1) + " %";

function finish() {
  const { wins, losses, ties } = counts();
  const votes = wins + losses + ties;
  const [one, other] = [columns[state.one].label, columns[state.other].label];
  const row = (name, value) => make("tr", "", make("td", "soft", make("bdi", "", name)), make("td", "", value));
  find("tally").replaceChildren(row("votes for " + one, wins), row("votes for " + other, losses), row("no difference", ties), row("not asked", state.pairs.length - votes));
  if (votes === 0) {
    find("verdict").textContent = "No vote yet: " + one + " against " + other;
    find("rate").textContent = "";
    for (const id of ["meter-span", "meter-mean"]) find(id).hidden = true;
  } else {
    const { rate, low, high } = wilson(wins, ties, votes);
    const decided = low > 0.5 ? one + " than for " + other : high < 0.5 ? other + " than for " + one : "";
    find("verdict").textContent = decided ? "Of these votes more are for " + decided : "Of these votes not clearly more are for either: " + one + ", " + other;
    find("rate").replaceChildren(percent(rate), " ", make("small", "", "[" + percent(low) + ", " + percent(high) + "] of " + votes + " votes for "), make("small", "", make("bdi", "", one)));
    for (const id of ["meter-span", "meter-mean"]) find(id).hidden = false;
    find("meter-span").style.left = 100 * low + "%";
    find("meter-span").style.width = 100 * (high - low) + "%";
    find("meter-mean").style.left = 100 * rate + "%";
  }
  find("on").hidden = votes === state.pairs.length;
  shown.show(state.pairs.map((pair, i) => ({ ...pair, vote: state.votes[i] })).filter((pair) => pair.vote !== null));
  show("result");
}

const shown = new List(find("shown"), find("more"), ({ row, seed, vote: chosen }) => {
  const words = make("p", "prompt", rows[row].prompt);
  words.dir = "auto";
  const named = (of, column) => make("div", columns[column].role, tile(drawn[column][row][seed], true), make("p", "caption", make("bdi", "", columns[column].label), chosen === of ? make("b", "", "✓ chosen") : chosen === "tie" ? make("span", "", "no difference") : null));
  const given = rows[row].references.map((place) => make("div", "given", tile(place, true), make("p", "caption", make("bdi", "", "reference"))));
  return make("article", "sheet row", make("header", "", words), make("div", "tiles", ...given, named("one", state.one), named("other", state.other)));
}, 24);

// --- votes as a file
function asJson() {
  const { wins, losses, ties } = counts();
  const votes = wins + losses + ties;
  return {
    format: FORMAT, version: 1, comparison: payload.fingerprint, title: payload.title, ztrain: payload.version,
    one: columns[state.one].name, other: columns[state.other].name, seeds: state.seeds, seed: state.seed,
    result: { wins, losses, ties, ...(votes ? wilson(wins, ties, votes) : { rate: null, low: null, high: null }) },
    pairs: state.pairs.length,
    votes: state.pairs.map((pair, i) => ({
      row: rows[pair.row].number, prompt: rows[pair.row].prompt, seed: rows[pair.row].seeds[pair.seed],
      a: columns[pair.swapped ? state.other : state.one].name, vote: state.votes[i],
    })).filter((entry) => entry.vote !== null),
  };
}

function save() {
  const url = URL.createObjectURL(new Blob([JSON.stringify(asJson(), null, 1) + "\n"], { type: "application/json" }));
  const link = make("a");
  link.href = url;
  link.download = "votes.json";
  link.click();
  unsaved = false;
  setTimeout(() => URL.revokeObjectURL(url), 10000);
}

// Goes on from saved votes, or says why it cannot.
function resume(text) {
  let saved;
  try {
    saved = JSON.parse(text);
  } catch {
    return "That file is no JSON; choose votes that this page saved.";
  }
  if (saved?.format !== FORMAT || saved.version !== 1 || !Array.isArray(saved.votes)) return "That file holds no votes of a ztrain report; choose votes that this page saved.";
  if (saved.comparison !== payload.fingerprint) return "Those votes are about another comparison; open the page that they were given on.";
  const [one, other] = [saved.one, saved.other].map((name) => columns.findIndex((column) => column.name === name));
  const pairs = ["first", "all"].includes(saved.seeds) && saved.seed >>> 0 === saved.seed ? pairsOf(saved.seeds, saved.seed) : [];
  const votes = pairs.map((pair) => {
    const [row, seed] = [rows[pair.row].number, rows[pair.row].seeds[pair.seed]];
    return saved.votes.find((entry) => entry?.row === row && entry.seed === seed)?.vote ?? null;
  });
  const known = votes.filter((vote) => ["one", "other", "tie"].includes(vote)).length;
  if (one < 0 || other < 0 || one === other || saved.pairs !== pairs.length || known !== saved.votes.length) return "Those votes do not fit the pictures of this page; open the page that they were given on.";
  begin(one, other, saved.seeds, saved.seed, votes);
  return "";
}

function tell(trouble) {
  find("trouble").textContent = trouble;
  find("trouble").hidden = trouble === "";
}

function countPairs() {
  const same = find("one").value === find("other").value;
  find("begin").disabled = same;
  find("pairs").textContent = same ? "Choose two different columns." : pairsOf(find("seeds").value, 0).length + " pairs";
}

for (const id of ["one", "other"]) columns.forEach((column, place) => option(find(id), place, column.label));
find("one").value = ours;
find("other").value = against;
find("seeds").parentNode.hidden = rows.every((row) => row.seeds.length < 2);
find("seed").value = parseInt(payload.fingerprint.slice(0, 6), 16);
countPairs();
find("setup").addEventListener("input", countPairs);
find("setup").addEventListener("submit", (event) => {
  event.preventDefault();
  begin(Number(find("one").value), Number(find("other").value), find("seeds").value, Number(find("seed").value));
});
find("load").addEventListener("change", async (event) => {
  const file = event.target.files[0];
  if (file) tell(resume(await file.text()));
});
for (const side of ["a", "b", "tie"]) find(side).addEventListener("click", () => vote(side));
find("back").addEventListener("click", back);
find("finish").addEventListener("click", finish);
find("save").addEventListener("click", save);
find("on").addEventListener("click", () => { state.at = Math.max(state.votes.indexOf(null), 0); ask(); });
document.addEventListener("keydown", (event) => {
  if (find("ask").hidden || event.repeat || event.ctrlKey || event.metaKey || event.altKey) return;
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const act = { a: () => vote("a"), b: () => vote("b"), " ": () => vote("tie"), ArrowLeft: back, Backspace: back }[key];
  if (!act) return;
  event.preventDefault();
  act();
});
// A focused button would take the space key for itself on its release.
document.addEventListener("keyup", (event) => { if (event.key === " " && !find("ask").hidden) event.preventDefault(); });
addEventListener("beforeunload", (event) => { if (unsaved) event.preventDefault(); });
