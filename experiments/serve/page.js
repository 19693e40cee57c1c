"use strict";
// Shows one user: the list, the history, and the time-aware mask over the last events. Nothing comes from elsewhere.

const most = Object.fromEntries(Object.entries(document.body.dataset).map(([name, text]) => [name, Number(text)]));
const MASKED = Math.min(24, most.last); // events in the picture
const LISTED = Math.min(50, most.last); // events in the table
const SVG = "http://www.w3.org/2000/svg";
const at = (id) => document.getElementById(id);

// One element with its text, never as markup: titles and ids are data.
function element(name, text = "", attributes = {}, space = null) {
  const made = space ? document.createElementNS(space, name) : document.createElement(name);
  if (text !== "") made.textContent = text;
  for (const [key, value] of Object.entries(attributes)) made.setAttribute(key, value);
  return made;
}

async function ask(path, body) {
  const headers = {};
  const token = sessionStorage.getItem("token");
  if (token) headers.authorization = `Bearer ${token}`;
  if (body) headers["content-type"] = "application/json";
  const answer = await fetch(path, { method: body ? "POST" : "GET", headers, body: body && JSON.stringify(body) });
  if (answer.status === 401) at("token_label").hidden = false;
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error);
  return content;
}

function named(item) {
  const cell = element("td", item.title ?? item.item);
  if (item.title !== null) cell.append(" ", element("span", item.item, { class: "id" }));
  return cell;
}

function fill(table, header, rows) {
  const head = element("tr");
  for (const [name, kind] of header) head.append(element("th", name, kind ? { class: kind } : {}));
  table.replaceChildren(head, ...rows);
}

function showList(found) {
  at("next_about").textContent =
    found.source === "model"
      ? `after ${found.events} events; the score is a logit`
      : "unknown to the model: the most frequent items, the score is how often they occur";
  const rows = found.items.map((item, place) => {
    const row = element("tr");
    row.append(element("td", String(place + 1), { class: "number" }), named(item));
    row.append(element("td", item.score.toFixed(3), { class: "number" }));
    return row;
  });
  fill(at("next"), [["", "number"], ["Item"], ["Score", "number"]], rows);
}

const day = (second) => new Date(1000 * second).toISOString().slice(0, 16).replace("T", " ");

function showHistory(found) {
  const all = found.count === found.events.length;
  at("history_about").textContent = all ? `${found.count} events, newest first` : `the last ${found.events.length} of ${found.count} events, newest first`;
  const rows = [...found.events].reverse().map((event) => {
    const row = element("tr");
    row.append(named(event), element("td", day(event.timestamp), { class: "number" }));
    return row;
  });
  fill(at("history"), [["Item"], ["Time (UTC)", "number"]], rows);
}

function gap(seconds) {
  for (const [size, unit] of [[86400, "d"], [3600, "h"], [60, "min"]]) if (seconds >= size) return `${Math.round(seconds / size)} ${unit}`;
  return `${seconds} s`;
}

// A square per pair of events, the darker the more of the earlier one is left at the later one.
function picture(mask, events, layer) {
  const n = mask.length, size = 12, left = 46, top = 6;
  const title = `layer ${layer + 1}: rows and columns are the last ${n} events, oldest first`;
  const svg = element("svg", "", { viewBox: `0 0 ${left + n * size + 4} ${top + n * size + 4}`, role: "img", "aria-label": title }, SVG);
  for (let i = 0; i < n; i++) {
    const since = i === 0 ? "" : `+${gap(events[i].timestamp - events[i - 1].timestamp)}`;
    svg.append(element("text", since, { x: left - 5, y: top + i * size + 9, "text-anchor": "end" }, SVG));
    for (let j = 0; j <= i; j++) {
      const box = { x: left + j * size, y: top + i * size, width: size - 1, height: size - 1, "fill-opacity": mask[i][j].toFixed(3) };
      const square = element("rect", "", box, SVG);
      const about = `${events[j].title ?? events[j].item} at ${events[i].title ?? events[i].item}: ${mask[i][j].toFixed(3)}`;
      square.append(element("title", about, {}, SVG));
      svg.append(square);
    }
  }
  return svg;
}

function showMask(found) {
  at("mask_about").textContent = `${found.about_mask}${found.mask ? "; beside each row the time since the event before" : ""}`;
  at("mask").replaceChildren();
  (found.mask ?? []).forEach((mask, layer) => {
    if (found.mask.length > 1) at("mask").append(element("p", `layer ${layer + 1}`, { class: "about" }));
    at("mask").append(picture(mask, found.events.slice(-mask.length), layer));
  });
}

async function show() {
  at("error").textContent = "";
  if (at("token").value) sessionStorage.setItem("token", at("token").value);
  const user = at("user").value;
  history.replaceState(null, "", `?user=${encodeURIComponent(user)}`);
  const query = `user=${encodeURIComponent(user)}`;
  const body = { users: [user], k: Number(at("k").value), exclude_seen: at("unseen").checked };
  try {
    const [list, past, masked] = await Promise.all([
      ask("/v1/recommend", body),
      ask(`/v1/history?${query}&limit=${LISTED}`),
      ask(`/v1/history?${query}&limit=${MASKED}&mask=true`),
    ]);
    showList(list.results[0]);
    showHistory(past);
    showMask(masked);
    document.body.dataset.shown = user;
  } catch (error) {
    at("error").textContent = error.message;
  }
}

async function suggest() {
  try {
    const found = await ask(`/v1/users?limit=${Math.min(20, most.last)}&prefix=${encodeURIComponent(at("user").value)}`);
    at("users").replaceChildren(...found.users.map((user) => element("option", "", { value: user })));
    if (!at("user").value && found.users.length) at("user").placeholder = `such as ${found.users[0]}`;
  } catch (error) {
    at("error").textContent = error.message;
  }
}

at("form").addEventListener("submit", (event) => { event.preventDefault(); show(); });
at("user").addEventListener("input", suggest);
at("token").addEventListener("change", () => { sessionStorage.setItem("token", at("token").value); suggest(); });
at("k").max = most.k;
at("k").value = Math.min(10, most.k);
const wanted = new URLSearchParams(location.search).get("user");
if (wanted !== null) at("user").value = wanted;
suggest();
if (wanted) show();
