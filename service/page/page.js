// The page: asks /classify twice for the same photo, plain and enhanced, and swaps the memory.
// Whatever comes from the service or the user reaches the document through textContent alone.

const at = (id) => document.getElementById(id);
const POLL_MS = 250;
const TOP = 5; // bars a column

// All the state there is: what was chosen, what the service offers, and the request under way.
const state = { photo: null, preview: null, memories: [], sets: [], request: null, swapping: false, answered: false };

class Refused extends Error {
  constructor(status, message) { super(message); this.status = status; }
}

async function call(path, { admin = false, ...options } = {}) {
  const [apiKey, adminKey] = [at("api-key").value, at("admin-key").value];
  const key = admin ? adminKey || apiKey : apiKey || adminKey;
  const headers = { ...options.headers, ...(key && { Authorization: `Bearer ${key}` }) };
  let reply;
  try {
    reply = await fetch(path, { cache: "no-store", ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refused(0, "The service does not answer. Is it still running?");
  }
  const body = await reply.json().catch(() => null);
  if (!reply.ok || body === null) throw new Refused(reply.status, body?.error?.message ?? `${reply.status} ${reply.statusText}`);
  return body;
}

// ---- what the service offers

const chosenMemory = () => state.memories.find((memory) => memory.name === at("memory").value);
const memoryPath = (memory) => `memories/${encodeURIComponent(memory.name)}`;

async function loadOffers() {
  state.sets = (await call("label-sets")).data;
  fill(at("label-set"), state.sets.map(({ name, labels }) => [name, `${name} (${labels} labels)`]), at("label-set").value);
  const memories = await call("memories", { admin: true }).catch(menuRefused);
  state.memories = memories.data;
  fill(at("memory"), state.memories.map(({ name }) => [name, name]), at("memory").value || memories.default);
  showMemory();
}

// Without the admin key there is no menu, and the default memory still answers.
function menuRefused(error) {
  if (error.status !== 401 && error.status !== 403) throw error;
  at("swap-note").textContent = `The default memory answers. To choose or swap: ${error.message}`;
  return { data: [] };
}

function showMemory() {
  const memory = chosenMemory();
  fill(at("version"), (memory?.versions ?? []).map((version) => [version, version === memory.current ? `${version} · live` : version]), memory?.current);
  const serving = memory?.current ? `${memory.name}@${memory.current} · ${memory.pairs.toLocaleString("en")} pairs` : `${memory?.name} is not live`;
  at("serving").textContent = memory ? serving : "default memory";
  offerSources();
  offerSwap();
}

function fill(select, options, chosen) {
  select.replaceChildren(...options.map(([value, text]) => new Option(text, value, false, value === chosen)));
  select.disabled = options.length === 0;
}

// ---- labels

const sourceInput = (value) => document.querySelector(`input[name=source][value=${value}]`);
const source = () => document.querySelector("input[name=source]:checked").value;
let sourceChosen = false; // once the user has picked a source, none is picked for them

function offerSources() {
  sourceInput("set").disabled = state.sets.length === 0;
  if (!sourceChosen || sourceInput(source()).disabled) {
    sourceInput(state.sets.length ? "set" : "own").checked = true;
  }
  showSource();
}

function showSource() {
  for (const pane of document.querySelectorAll("[data-pane]")) pane.hidden = pane.dataset.pane !== source();
}

function ownLabels() {
  const lines = at("labels").value.split("\n").map((line) => line.trim()).filter(Boolean);
  return [...new Set(lines)];
}

function addLabels(form) {
  if (source() === "set") return form.append("label_set", at("label-set").value);
  const labels = ownLabels();
  if (labels.length === 0) throw new Refused(0, "There are no labels to choose from: write one a line.");
  return form.append("labels", JSON.stringify(labels));
}

// ---- the photo

function takePhoto(file) {
  if (!file) return;
  state.photo = file;
  if (state.preview) URL.revokeObjectURL(state.preview);
  state.preview = URL.createObjectURL(file);
  at("preview").src = state.preview;
  at("drop-title").textContent = file.name || "pasted photo";
  at("drop-hint").textContent = "Drop, paste or choose another one at any time.";
  compare();
}

// ---- compare

function classify(enhance, signal) {
  const form = new FormData();
  form.append("file", state.photo);
  addLabels(form);
  const options = { enhance, neighbors: enhance !== "none", top_k: TOP, ...(chosenMemory() && { memory: chosenMemory().name }) };
  for (const [name, value] of Object.entries(options)) form.append(name, value);
  return call("classify", { method: "POST", body: form, signal });
}

async function compare() {
  if (!state.photo) return showError(new Refused(0, "There is no photo yet: drop one, paste one, or choose one."));
  state.request?.abort();
  const request = state.request = new AbortController();
  setBusy(true);
  try {
    const [plain, enhanced] = await Promise.all([classify("none", request.signal), classify("both", request.signal)]);
    showAnswer(plain, enhanced);
  } catch (error) {
    if (request.signal.aborted) return; // a newer request has taken over, and shows its own answer
    request.abort();
    showError(error);
  }
  setBusy(false);
}

function setBusy(busy) {
  at("results").setAttribute("aria-busy", busy);
  at("go").textContent = busy ? "Comparing…" : "Compare";
  if (busy && at("results").dataset.view !== "answer") showSkeleton();
}

function showSkeleton() {
  for (const id of ["plain", "enhanced"]) at(id).replaceChildren(...Array.from({ length: TOP }, () => element("li", "bar skeleton")));
  at("neighbors").replaceChildren();
  for (const id of ["verdict", "neighbors-note", "fine", "answered-by"]) at(id).textContent = "";
  show("answer");
}

// ---- drawing

function element(tag, className, ...children) {
  const made = document.createElement(tag);
  if (className) made.className = className;
  made.append(...children); // strings become text nodes
  return made;
}

function show(view) {
  const results = at("results");
  results.dataset.view = view;
  if (view !== "empty" && results.getBoundingClientRect().top > 0.7 * innerHeight) results.scrollIntoView(); // a narrow screen has it below the form
}

const percent = (share) => `${(100 * share).toFixed(1)} %`;

function gauge(share) {
  const fillBar = element("span", "fill");
  fillBar.style.width = `${100 * Math.min(1, Math.max(0, share))}%`;
  const track = element("span", "track", fillBar);
  track.setAttribute("aria-hidden", "true");
  return track;
}

function bar({ label, score }, tag) {
  const name = element("span", "name", label);
  if (tag) name.append(" ", element("span", "tag", tag));
  return element("li", "bar", name, element("span", "value", percent(score)), gauge(score));
}

function showAnswer(plain, enhanced) {
  const [before, after] = [plain.data[0], enhanced.data[0]];
  const changed = before[0].label !== after[0].label;
  at("plain").replaceChildren(...before.map((row) => bar(row)));
  at("enhanced").replaceChildren(...after.map((row, i) => bar(row, i === 0 && changed ? "new answer" : "")));
  at("results").dataset.changed = changed;
  at("answered-by").textContent = `with ${enhanced.memory ?? "no memory"}`;
  at("verdict").replaceChildren(...(changed
    ? ["The memory changed the answer: ", element("del", "", before[0].label), " → ", element("ins", "", after[0].label)]
    : ["Both say ", element("b", "", after[0].label), `: ${percent(before[0].score)} plain, ${percent(after[0].score)} enhanced.`]));
  showNeighbors(enhanced.neighbors?.[0] ?? [], after[0].label);
  at("fine").textContent = `model ${enhanced.model} · memory ${enhanced.memory ?? "none"} · fusion ${enhanced.fusion}`;
  at("announce").textContent = at("verdict").textContent;
  state.answered = true;
  show("answer");
}

function showNeighbors(neighbors, answer) {
  const heaviest = Math.max(...neighbors.map(({ weight }) => weight), 1e-9);
  const agrees = ({ caption }) => caption.toLowerCase().includes(answer.toLowerCase());
  at("neighbors").replaceChildren(...neighbors.map((neighbor) => {
    const caption = element("th", "", neighbor.caption);
    caption.scope = "row";
    const similarity = element("td", "", gauge(neighbor.score), element("span", "value", neighbor.score.toFixed(3)));
    const weight = element("td", "weight", gauge(neighbor.weight / heaviest), element("span", "value", percent(neighbor.weight)));
    return element("tr", agrees(neighbor) ? "agrees" : "", caption, similarity, weight);
  }));
  const agreeing = neighbors.filter(agrees).length;
  at("neighbors-note").textContent = neighbors.length === 0
    ? "None was near enough: the enhanced vector is the plain one."
    : `${agreeing} of the ${neighbors.length} nearest name the answer.`;
}

function showError(error) {
  at("error").textContent = error.message;
  const hints = { 401: "Enter your key under Memory, Keys, or open the link that the service printed at its start.", 403: "Enter the admin key under Memory, Keys.", 429: "The service is busy. Try again in a moment." };
  at("error-hint").textContent = hints[error.status] ?? "";
  if (error.status === 401 || error.status === 403) at("keys").open = true;
  show("error");
}

// ---- swap

function offerSwap() {
  const memory = chosenMemory();
  const wanted = at("version").value;
  at("swap").hidden = !memory || wanted === memory.current || state.swapping;
  at("swap").textContent = `Swap ${memory?.name ?? ""} to ${wanted}`;
}

async function swap() {
  const [memory, version] = [chosenMemory(), at("version").value];
  state.swapping = true;
  offerSwap();
  try {
    let job = await call(`${memoryPath(memory)}/activate`, {
      admin: true, method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify({ version }),
    });
    while (job.state !== "done" && job.state !== "failed") {
      at("swap-note").textContent = `Swapping to ${version}${job.phase ? `: ${job.phase}` : ""}… requests go on meanwhile.`;
      await new Promise((resolve) => setTimeout(resolve, POLL_MS));
      job = await call(`jobs/${encodeURIComponent(job.id)}`, { admin: true });
    }
    if (job.state === "failed") throw new Refused(0, job.error ?? "The swap failed; the memory in service was kept.");
    at("swap-note").textContent = `Serving ${memory.name}@${version}.`;
  } catch (error) {
    at("swap-note").textContent = error.message;
    if (error.status === 401 || error.status === 403) at("keys").open = true;
  }
  state.swapping = false;
  await loadOffers().catch(showError);
  if (state.answered) compare();
}

// ---- events

function again() {
  if (state.photo) compare();
}

function listen() {
  const drop = at("drop");
  at("ask").addEventListener("submit", (event) => { event.preventDefault(); compare(); });
  at("file").addEventListener("change", (event) => takePhoto(event.target.files[0]));
  at("preview").addEventListener("load", () => { at("preview").hidden = false; drop.classList.add("filled"); });
  at("preview").addEventListener("error", () => { at("preview").hidden = true; drop.classList.remove("filled"); });
  document.addEventListener("dragover", (event) => { event.preventDefault(); drop.classList.add("over"); });
  document.addEventListener("dragleave", (event) => { if (!event.relatedTarget) drop.classList.remove("over"); });
  document.addEventListener("drop", (event) => { event.preventDefault(); drop.classList.remove("over"); takePhoto(event.dataTransfer.files[0]); });
  document.addEventListener("paste", (event) => takePhoto(event.clipboardData.files[0]));
  at("sources").addEventListener("change", () => { sourceChosen = true; showSource(); if (source() !== "own") again(); });
  for (const id of ["labels", "label-set"]) at(id).addEventListener("change", again);
  at("memory").addEventListener("change", () => { showMemory(); again(); });
  at("version").addEventListener("change", offerSwap);
  at("swap").addEventListener("click", swap);
  for (const id of ["api-key", "admin-key"]) at(id).addEventListener("change", () => { at("swap-note").textContent = ""; loadOffers().then(again, showError); });
}

// The link that the service prints at its start holds the admin token; a fragment never leaves the browser.
function takeToken() {
  const token = new URLSearchParams(location.hash.slice(1)).get("token");
  if (!token) return;
  at("admin-key").value = token;
  history.replaceState(null, "", location.pathname + location.search);
}

takeToken();
listen();
loadOffers().catch((error) => { at("serving").textContent = "not connected"; showError(error); });
