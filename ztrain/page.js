"use strict";
// What pages of ours share. No data but those of the element `payload`, and no node but by `make`.
const find = (id) => document.getElementById(id);
const payload = JSON.parse(find("payload").textContent);
find("payload").remove();
const CHUNK = 60;
const collator = new Intl.Collator("en", { numeric: true });

// The only maker of nodes: text becomes text, whatever is in it.
function make(tag, name, ...content) {
  const node = document.createElement(tag);
  if (name) node.className = name;
  node.append(...content.filter((part) => part !== null).map((part) => (part instanceof Node ? part : String(part))));
  return node;
}

// A picture of the page by its place, or the words that it cannot be read.
function tile(place, lazy) {
  const picture = payload.pictures[place];
  if (picture.fault !== undefined) {
    const fault = make("span", "tile fault", "cannot be read");
    fault.title = picture.fault;
    return fault;
  }
  const image = make("img");
  if (lazy) image.loading = "lazy";
  image.decoding = "async";
  image.alt = "";
  image.src = picture.url;
  return make("span", "tile", image);
}

const distinct = (values) => [...new Set(values.filter((value) => value !== null))].sort(collator.compare);

// Nodes are made a chunk at a time, when the end of the list comes near.
class List {
  constructor(body, more, draw, chunk = CHUNK) {
    Object.assign(this, { body, more, draw, chunk, items: [], made: 0 });
    more.addEventListener("click", () => this.grow());
    new IntersectionObserver((seen) => seen.some((one) => one.isIntersecting) && this.grow(), { rootMargin: "900px" }).observe(more);
  }
  show(items) {
    this.items = items;
    this.made = 0;
    this.body.replaceChildren();
    this.grow();
  }
  grow() {
    this.body.append(...this.items.slice(this.made, this.made + this.chunk).map(this.draw));
    this.made = Math.min(this.made + this.chunk, this.items.length);
    this.more.hidden = this.made === this.items.length;
    this.more.textContent = "Show more (" + (this.items.length - this.made).toLocaleString("en") + " left)";
  }
}

function choices(select, title, values, lacking) {
  const options = [["", title], ...values.map((value) => ["=" + value, value])];
  if (lacking) options.push(["none", "(none)"]);
  for (const [value, text] of options) {
    const option = make("option", "", text);
    option.value = value;
    select.append(option);
  }
  select.hidden = options.length === 1;
}

const fits = (choice, value) => choice === "" || (choice === "none" ? value === null : value === choice.slice(1));
