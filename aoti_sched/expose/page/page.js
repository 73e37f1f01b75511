// The live page: draws the reports that /stream sends, and keeps the last five minutes of them.

const KEPT = 300; // reports
const WINDOW = 10; // seconds that rates and quantiles are about, as in `aoti-sched top`
const COLOURS = 8; // --line-1 to --line-8 of the style sheet
const COLUMNS = [
  { name: "runner", text: true },
  { name: "device", text: true },
  { name: "rate", show: (value) => `${number(value)}/s` },
  { name: "errors", show: (value) => `${number(value)}/s`, bad: (value) => value > 0 },
  { name: "queued", show: whole },
  { name: "running", show: whole },
  { name: "p50", show: seconds },
  { name: "p99", show: seconds },
  { name: "batch", show: (value) => (value === null ? "-" : value.toFixed(1)) },
  { name: "epoch", show: whole },
  { name: "memory", show: bytes },
  { name: "state", text: true, bad: (value) => !["ok", "parked", "updating"].includes(value) },
];
const CHARTS = [
  { title: "Requests", unit: "completed per second", of: (row) => row.rateNow, show: number },
  { title: "Latency", unit: "p99 of the last 10 seconds", of: (row) => row.p99, show: seconds },
  { title: "Queue", unit: "requests that wait", of: (row) => row.queued, show: number },
  { title: "Batches", unit: "mean requests in a run", of: (row) => row.batch, show: number },
];

const reports = [];
const points = []; // of each report: its time, and the rows by key; null rows for a gap
const sorting = { column: "rate", descending: true };
let charts = [];
let drawnKeys = "";

// --- numbers -------------------------------------------------------------------------------------

function histogram(runner, of, outcome) {
  // Adds up the histograms of all priorities, as RunnerStats.histogram does.
  const total = { least: 0, counts: [], sum: 0, max: 0 };
  for (const part of runner.ended) {
    if (part.outcome !== outcome) continue;
    const one = part[of];
    total.least = one.least;
    one.counts.forEach((count, index) => { total.counts[index] = (total.counts[index] ?? 0) + count; });
    total.sum += one.sum;
    total.max = Math.max(total.max, one.max);
  }
  return total;
}

function between(old, now) {
  const counts = now.counts.map((count, index) => count - (old.counts[index] ?? 0));
  if (old.counts.length > now.counts.length || counts.some((count) => count < 0)) return now;
  return { least: now.least, counts, sum: now.sum - old.sum, max: now.max };
}

const countOf = (one) => one.counts.reduce((sum, count) => sum + count, 0);

function quantile(one, part) {
  const wanted = part * countOf(one);
  let before = 0;
  let low = 0;
  for (const [index, count] of one.counts.entries()) {
    const high = index < 53 ? one.least * 2 ** (index >> 1) * (index % 2 ? 1.5 : 1) : one.max;
    if (count && before + count >= wanted) {
      return Math.min(one.max, low + ((high - low) * (wanted - before)) / count);
    }
    before += count;
    low = high;
  }
  return one.max;
}

function stateOf(runner) {
  if (runner.health !== "ok") return runner.health;
  if (runner.phase !== "OPEN") return runner.phase.toLowerCase();
  return runner.parked ? "parked" : runner.updating ? "updating" : "ok";
}

function runnerOf(report, device, name) {
  // A runner that was not there yet has done nothing. Names may be those of every object.
  const own = (things, key) => (things && Object.hasOwn(things, key) ? things[key] : undefined);
  return own(own(report.stats.devices, device)?.runners, name) ?? { ended: [], completed: 0 };
}

function requestsOfARun(old, runner) {
  // As `aoti-sched top` has it: batches count from their launch.
  const counts = (one) => {
    const requests = one.ended.reduce((sum, part) => sum + countOf(part.run), 0);
    return [requests, requests - (one.batched ?? 0) + (one.batches ?? 0)];
  };
  let [requests, runs] = counts(runner);
  const [before, runsBefore] = counts(old);
  if (requests >= before) [requests, runs] = [requests - before, runs - runsBefore];
  return requests && runs > 0 ? requests / runs : null;
}

function rowsOf(report) {
  const last = reports.at(-2) ?? report;
  const before = reports.find((one) => one !== report && report.uptime - one.uptime <= WINDOW) ?? last;
  const found = new Map();
  for (const device of Object.values(report.stats.devices)) {
    for (const runner of Object.values(device.runners)) {
      const old = runnerOf(before, device.name, runner.name);
      const recent = runnerOf(last, device.name, runner.name);
      const lately = (of, outcome) => between(histogram(old, of, outcome), histogram(runner, of, outcome));
      const total = lately("total", "completed");
      const done = countOf(total);
      // Each by itself, since those of a runner that was loaded anew are compared with another's.
      const others = new Set(runner.ended.map((part) => part.outcome));
      others.delete("completed");
      others.delete("cancelled");
      const errors = [...others].reduce((sum, outcome) => sum + countOf(lately("total", outcome)), 0);
      const time = report.uptime - before.uptime;
      const step = report.uptime - last.uptime;
      found.set(`${runner.name} on ${device.name}`, {
        runner: runner.name,
        device: device.name,
        rate: time > 0 ? done / time : 0,
        rateNow: step > 0 ? Math.max(0, runner.completed - recent.completed) / step : null,
        errors: time > 0 ? errors / time : 0,
        queued: runner.queued + runner.waiting,
        running: runner.running,
        p50: done ? quantile(total, 0.5) : null,
        p99: done ? quantile(total, 0.99) : null,
        batch: requestsOfARun(old, runner),
        epoch: runner.epoch,
        memory: runner.memory,
        state: stateOf(runner),
      });
    }
  }
  return found;
}

// --- words ---------------------------------------------------------------------------------------

function whole(value) { return value.toLocaleString("en"); }

function number(value) {
  if (value === null || value === undefined) return "-";
  return value.toLocaleString("en", { maximumSignificantDigits: 3 });
}

function seconds(value) {
  if (value === null || value === undefined) return "-";
  if (value === 0) return "0 s";
  if (value < 1e-3) return `${number(value * 1e6)} µs`;
  if (value < 1) return `${number(value * 1e3)} ms`;
  return `${number(value)} s`;
}

function bytes(value) {
  for (const unit of ["B", "KiB", "MiB", "GiB"]) {
    if (value < 1024) return unit === "B" ? `${value} B` : `${value.toFixed(1)} ${unit}`;
    value /= 1024;
  }
  return `${value.toFixed(1)} TiB`;
}

function clock(value) {
  return new Date(value * 1000).toLocaleTimeString([], { hourCycle: "h23" });
}

function age(value) {
  for (const [unit, length] of [["d", 86400], ["h", 3600], ["min", 60]]) {
    if (value >= 2 * length) return `${Math.floor(value / length)} ${unit}`;
  }
  return `${Math.floor(value)} s`;
}

function element(name, text = "", kind = "") {
  const made = document.createElement(name);
  made.textContent = text;
  if (kind) made.className = kind;
  return made;
}

// --- devices -------------------------------------------------------------------------------------

function gauge(name, part, of, text) {
  const made = element("div", "", "gauge");
  const track = element("div", "", "track");
  const filled = element("div");
  filled.style.width = `${of ? Math.min(100, (100 * part) / of) : 0}%`;
  track.append(filled);
  made.append(element("span", name), track, element("b", text));
  return made;
}

function drawDevices(devices) {
  const cards = devices.map((device) => {
    const card = element("article");
    const { memory, cores, free_cores: free } = device;
    const title = element("h2", device.name);
    title.append(element("small", `${whole(device.queued)} queued`));
    const limit = memory.limit === null ? "" : ` of ${bytes(memory.limit)}`;
    card.append(
      title,
      gauge("lanes", device.busy_lanes, device.lanes, `${device.busy_lanes} of ${device.lanes}`),
      gauge("cores", cores - free, cores, `${cores - free} of ${cores}`),
      gauge("memory", memory.used, memory.limit, bytes(memory.used) + limit),
    );
    if (device.lost) card.append(element("p", `lost: ${device.lost}`, "lost"));
    return card;
  });
  document.querySelector("#devices").replaceChildren(...cards);
}

// --- charts --------------------------------------------------------------------------------------

function makeCharts(keys) {
  charts.forEach((chart) => chart.destroy());
  const section = document.querySelector("#charts");
  section.replaceChildren();
  const style = getComputedStyle(document.documentElement);
  const ink = style.getPropertyValue("--faint");
  const grid = { stroke: style.getPropertyValue("--line"), width: 1 };
  charts = CHARTS.map((kind) => {
    const card = element("article");
    const title = element("h2", kind.title);
    title.append(element("small", kind.unit));
    card.append(title);
    section.append(card);
    const chart = new uPlot(
      {
        width: card.clientWidth - 24,
        height: 180,
        cursor: { sync: { key: "time" } },
        scales: { y: { range: (_, __, most) => [0, most > 0 ? most * 1.1 : 1] } },
        axes: [
          { stroke: ink, grid, size: 32, space: 80, values: (_, values) => values.map(clock) },
          { stroke: ink, grid, size: 64, values: (_, values) => values.map(kind.show) },
        ],
        series: [
          { label: "time", value: (_, value) => (value === null ? "-" : clock(value)) },
          ...keys.map((key, index) => ({
            label: key,
            stroke: style.getPropertyValue(`--line-${(index % COLOURS) + 1}`),
            width: 2,
            points: { show: false },
            value: (_, value) => kind.show(value),
          })),
        ],
      },
      dataOf(kind, keys),
      card,
    );
    new ResizeObserver(() => chart.setSize({ width: card.clientWidth - 24, height: 180 })).observe(card);
    return chart;
  });
}

function dataOf(kind, keys) {
  const times = points.map((point) => point.time);
  const lines = keys.map((key) => points.map((point) => {
    const row = point.rows?.get(key);
    return row ? kind.of(row) : null;
  }));
  return [times, ...lines];
}

function drawCharts() {
  const keys = [...new Set(points.flatMap((point) => [...(point.rows?.keys() ?? [])]))].sort();
  if (keys.join("\n") !== drawnKeys) {
    drawnKeys = keys.join("\n");
    makeCharts(keys);
  } else {
    charts.forEach((chart, index) => chart.setData(dataOf(CHARTS[index], keys)));
  }
}

// --- table ---------------------------------------------------------------------------------------

function makeTable() {
  const cells = COLUMNS.map((column) => {
    const cell = element("th", "", column.text ? "text" : "");
    const button = element("button", column.name);
    button.type = "button";
    button.addEventListener("click", () => {
      sorting.descending = sorting.column === column.name ? !sorting.descending : !column.text;
      sorting.column = column.name;
      drawTable(points.at(-1)?.rows ?? new Map());
    });
    cell.append(button);
    return cell;
  });
  document.querySelector("#runners thead tr").replaceChildren(...cells);
}

function drawTable(rows) {
  document.querySelectorAll("#runners th").forEach((cell, index) => {
    if (COLUMNS[index].name !== sorting.column) cell.removeAttribute("aria-sort");
    else cell.setAttribute("aria-sort", sorting.descending ? "descending" : "ascending");
  });
  const sign = sorting.descending ? -1 : 1;
  const compare = (a, b) => {
    const [one, other] = [a[sorting.column], b[sorting.column]];
    if (one === other) return a.runner < b.runner ? -1 : 1;
    if (one === null || other === null) return one === null ? 1 : -1;
    return one < other ? -sign : sign;
  };
  const drawn = [...rows.values()].sort(compare).map((row) => {
    const line = element("tr");
    line.dataset.runner = row.runner;
    for (const column of COLUMNS) {
      const value = row[column.name];
      const cell = element("td", column.show ? column.show(value) : value, column.text ? "text" : "");
      cell.dataset.column = column.name;
      if (column.bad?.(value)) cell.classList.add("bad");
      else if (column.name === "state") cell.classList.add("good");
      line.append(cell);
    }
    return line;
  });
  document.querySelector("#runners tbody").replaceChildren(...drawn);
}

// --- reports -------------------------------------------------------------------------------------

function take(report) {
  const last = reports.at(-1);
  if (last && (report.pid !== last.pid || report.uptime < last.uptime)) {
    reports.length = 0; // another process
    points.push({ time: report.time - 0.001, rows: null });
  } else if (last && report.uptime === last.uptime) {
    return; // the same moment
  }
  reports.push(report);
  const rows = rowsOf(report);
  points.push({ time: report.time, rows });
  if (reports.length > WINDOW * 10) reports.shift();
  if (points.length > KEPT) points.shift();
  document.title = `${report.name} (aoti_sched)`;
  document.querySelector("#name").textContent = report.name;
  document.querySelector("#about").textContent =
    `process ${report.pid}, exposed for ${age(report.uptime)}`;
  drawDevices(Object.values(report.stats.devices));
  drawTable(rows);
  drawCharts();
}

function show(state) {
  document.body.dataset.state = state;
  document.querySelector("#state").textContent = state;
}

function listen() {
  const source = new EventSource("/stream?interval=1");
  source.addEventListener("stats", (event) => {
    show("live");
    take(JSON.parse(event.data));
  });
  source.addEventListener("error", () => {
    show("reconnecting");
    if (source.readyState === EventSource.CLOSED) setTimeout(listen, 2000); // it was refused
  });
}

makeTable();
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
  drawnKeys = "";
  drawCharts();
});
listen();
