"use strict";

const part = (name) => document.getElementById(name);
const viewer = new Viewer(part("viewer"));
const ended = ["succeeded", "failed", "cancelled"];
let followed = null; // id of the job that is shown

part("key").value = sessionStorage.getItem("key") || "";

/** The server's answer; its error is the message of what is thrown. */
async function ask(path, options = {}) {
  const key = part("key").value;
  if (key) sessionStorage.setItem("key", key);
  const headers = { ...options.headers, ...(key ? { Authorization: `Bearer ${key}` } : {}) };
  const answer = await fetch(path, { ...options, headers });
  if (answer.status === 401) part("keyLabel").hidden = false;
  if (!answer.ok) throw new Error((await answer.json()).error.message);
  return answer;
}

/** Do what a person has asked for; what is wrong with it stands below the form until the next time. */
async function told(work) {
  try {
    await work();
    part("message").textContent = "";
  } catch (error) {
    part("message").textContent = error.message;
  }
}

function asked() {
  const [width, height] = [part("width").value, part("height").value];
  const body = { prompt: part("prompt").value };
  if (width || height) body.size = `${width || height}x${height || width}`;
  for (const name of ["seed", "steps"]) if (part(name).value) body[name] = Number(part(name).value);
  return body;
}

async function draw() {
  const headers = { "Content-Type": "application/json", Prefer: "respond-async" };
  const answer = await ask("/v1/images/generations", { method: "POST", headers, body: JSON.stringify(asked()) });
  followed = (await answer.json()).id;
  await look();
}

function stateOf(job) {
  if (job.status !== "running") return job.status;
  const left = job.seconds_left === null ? "" : `, ${Math.ceil(job.seconds_left)} s left`;
  const stage = job.stages.length > 1 ? `stage ${job.stage + 1} of ${job.stages.length}, ` : "";
  return `${stage}step ${job.step} of ${job.stages[job.stage].steps}${left}`;
}

function line(job) {
  const item = document.createElement("li"), text = document.createElement("span");
  text.className = "text";
  text.title = text.textContent = job.asked.prompt;
  text.onclick = () => told(() => show(job));
  item.append(text);
  if (job.status === "running") {
    const bar = document.createElement("progress");
    bar.value = job.progress;
    item.append(bar);
  } else {
    const state = document.createElement("span");
    state.className = "state";
    state.textContent = job.status === "succeeded" ? job.asked.size : job.status;
    item.append(state);
  }
  const button = document.createElement("button");
  button.textContent = ended.includes(job.status) ? "Remove" : "Stop";
  button.onclick = () => told(async () => {
    await ask(`/v1/jobs/${job.id}`, { method: "DELETE" });
    await look();
  });
  item.append(button);
  return item;
}

async function show(job) {
  followed = job.id;
  const [width, height] = job.asked.size.split("x").map(Number);
  part("caption").textContent = `${job.asked.prompt} · ${job.asked.size} · seed ${job.asked.seed} · ${stateOf(job)}`;
  if (job.images.length) {
    viewer.show({ url: job.images[0], width, height });
  } else if (job.preview) {
    const answer = await ask(job.preview).catch(() => null); // it may have ended meanwhile
    if (answer) viewer.show({ image: await createImageBitmap(await answer.blob()), width, height });
  } else if (job.error) {
    part("caption").textContent += `: ${job.error.message}`;
  }
}

/** Show all jobs as they are now; says whether any goes on. */
async function look() {
  const { data } = await (await ask("/v1/jobs?limit=20")).json();
  part("jobs").replaceChildren(...data.map(line));
  if (followed === null && data.length) followed = data[0].id;
  const job = data.find((each) => each.id === followed);
  if (job && !(ended.includes(job.status) && shown === `${job.id} ${job.status}`)) {
    shown = `${job.id} ${job.status}`;
    await show(job);
  }
  return data.some((each) => !ended.includes(each.status));
}

let shown = "";

async function watch() {
  let isBusy = false;
  try {
    isBusy = await look();
  } catch (error) {
    part("message").textContent = error.message;
  }
  setTimeout(watch, isBusy ? 500 : 3000);
}

part("form").onsubmit = (event) => {
  event.preventDefault();
  told(draw);
};
told(async () => {
  const { data } = await (await ask("/v1/models")).json();
  part("model").textContent = data[0].id;
});
watch();
