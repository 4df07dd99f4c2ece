// Charts as SVG, drawn to the width of their place. A chart of lines is a slider over its steps: the pointer, a finger
// or the arrow keys choose one, and the legend shows the values there.
const SIDE = { left: 46, right: 10, top: 10, bottom: 22 };

function ticks(low, high, count) {
  const rough = (high - low) / count || 1;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = [1, 2, 2.5, 5, 10].map((k) => k * power).find((s) => s >= rough);
  const found = [];
  for (let k = Math.ceil(low / step - 1e-9); k * step <= high + step * 1e-9; k++) found.push(Number((k * step).toPrecision(12)));
  return found;
}

function frame(figure, spec, height) {
  const width = Math.max(220, figure.clientWidth - parseFloat(getComputedStyle(figure).paddingLeft) * 2);
  const image = svg("svg", { viewBox: `0 0 ${width} ${height}`, height });
  return { width, height, image, inner: { x0: SIDE.left, x1: width - SIDE.right, y0: height - SIDE.bottom, y1: SIDE.top } };
}

function axes(place, xs, ys, toX, toY) {
  const { x0, x1, y0 } = place.inner;
  for (const y of ys) place.image.append(
    svg("line", { class: "gridline", x1: x0, x2: x1, y1: toY(y), y2: toY(y) }),
    svg("text", { x: x0 - 6, y: toY(y) + 4, "text-anchor": "end" }, show(y)));
  for (const x of xs) place.image.append(svg("text", { x: toX(x), y: y0 + 16, "text-anchor": "middle" }, show(x)));
}

function drawLines(figure, spec) {
  const place = frame(figure, spec, 180);
  const { x0, x1, y0, y1 } = place.inner;
  const points = spec.series.flatMap((line) => line.points).filter((p) => p[1] !== null);
  const steps = [...new Set(spec.series.flatMap((line) => line.points.map((p) => p[0])))].sort((a, b) => a - b);
  let low = Math.min(...points.map((p) => p[1])), high = Math.max(...points.map((p) => p[1]));
  const reach = 3 * Math.max(Math.abs(low), Math.abs(high)); // a limit far off would press the curve flat
  const limits = spec.limits.filter((limit) => Math.abs(limit.y) <= reach);
  for (const limit of limits) low = Math.min(low, limit.y), high = Math.max(high, limit.y);
  if (low > 0 && low < 0.6 * high) low = 0;
  if (low === 0 && high === 0) high = 1;
  if (low === high) low -= Math.abs(low) / 2 || 0.5, high += Math.abs(high) / 2 || 0.5;
  const first = steps[0], last = steps[steps.length - 1];
  const toX = (x) => (last > first ? x0 + ((x - first) / (last - first)) * (x1 - x0) : (x0 + x1) / 2);
  const toY = (y) => y0 - ((y - low) / (high - low)) * (y0 - y1);
  axes(place, ticks(first, last, 5).filter(Number.isInteger), ticks(low, high, 4), toX, toY);
  for (const limit of limits) place.image.append(svg("line", { class: "limit", x1: x0, x2: x1, y1: toY(limit.y), y2: toY(limit.y) }));
  spec.series.forEach((line, k) => {
    let path = "", pen = "M";
    for (const [x, y] of line.points) {
      if (y !== null) path += `${pen}${toX(x).toFixed(1)} ${toY(y).toFixed(1)}`;
      pen = y === null ? "M" : "L";
    }
    place.image.append(svg("path", { class: `s${k % 4}`, d: path }));
    if (line.points.length === 1) place.image.append(svg("circle", { class: `s${k % 4}`, cx: toX(line.points[0][0]), cy: toY(line.points[0][1]), r: 4 }));
  });
  const cursor = svg("g");
  place.image.append(cursor);
  const legend = el("ul", { class: "legend" });
  figure.replaceChildren(el("figcaption", {}, el("h4", {}, spec.title), el("small", {})), place.image, legend);
  const values = spec.series.map((line) => new Map(line.points));
  pointing(figure, place, spec, steps, (step) => {
    cursor.replaceChildren();
    if (step !== null) {
      cursor.append(svg("line", { class: "cursor", x1: toX(step), x2: toX(step), y1, y2: y0 }));
      values.forEach((map, k) => {
        if (typeof map.get(step) === "number") cursor.append(svg("circle", { class: `s${k % 4}`, cx: toX(step), cy: toY(map.get(step)), r: 4 }));
      });
    }
    const read = spec.series.map((line, k) => [line.name, step === null ? line.points[line.points.length - 1][1] : values[k].get(step)]);
    legend.replaceChildren(
      ...read.map(([name, value], k) => el("li", {}, el("i", { class: `s${k % 4}` }), el("span", {}, name), el("b", {}, show(value)))),
      ...spec.limits.map((limit) => el("li", {}, el("i", {}), el("span", {}, `limit ${limit.name.replaceAll("_", " ")}`), el("b", {}, show(limit.y)))));
    figure.querySelector("small").textContent = step === null ? `last of ${steps.length}` : `${spec.x} ${show(step)}`;
    return read.map(([name, value]) => `${name} ${show(value)}`).join(", ");
  }, toX);
}

function pointing(figure, place, spec, steps, choose, toX) {
  const { image } = place;
  let at = null; // index of the chosen step
  const set = (index) => {
    at = index === null ? null : Math.max(0, Math.min(steps.length - 1, index));
    const text = choose(at === null ? null : steps[at]);
    image.setAttribute("aria-valuenow", at === null ? steps.length - 1 : at);
    image.setAttribute("aria-valuetext", at === null ? `last: ${text}` : `${spec.x} ${steps[at]}: ${text}`);
  };
  fill(image, { tabindex: 0, role: "slider", "aria-label": spec.title, "aria-valuemin": 0, "aria-valuemax": steps.length - 1 }, []);
  const near = (event) => {
    const box = image.getBoundingClientRect();
    const x = ((event.clientX - box.left) / box.width) * place.width;
    let best = 0;
    steps.forEach((step, k) => { if (Math.abs(toX(step) - x) < Math.abs(toX(steps[best]) - x)) best = k; });
    set(best);
  };
  image.addEventListener("pointermove", near);
  image.addEventListener("pointerdown", near);
  image.addEventListener("pointerleave", (event) => { if (event.pointerType === "mouse") set(null); });
  image.addEventListener("blur", () => set(null));
  image.addEventListener("keydown", (event) => {
    const now = at === null ? steps.length : at;
    const moves = { ArrowLeft: now - 1, ArrowRight: now + 1, ArrowDown: now - 1, ArrowUp: now + 1, PageDown: now - 10, PageUp: now + 10, Home: 0, End: steps.length - 1, Escape: null };
    if (!(event.key in moves)) return;
    event.preventDefault();
    set(moves[event.key]);
  });
  set(null);
}

function drawReliability(figure, spec) {
  const width = frame(figure, spec, 1).width;
  const place = frame(figure, spec, Math.min(260, width));
  const { x0, x1, y0, y1 } = place.inner;
  const toX = (x) => x0 + x * (x1 - x0), toY = (y) => y0 - y * (y0 - y1);
  axes(place, [0, 0.5, 1], [0, 0.25, 0.5, 0.75, 1], toX, toY);
  place.image.append(svg("line", { class: "limit", x1: toX(0), y1: toY(0), x2: toX(1), y2: toY(1) }));
  const total = spec.bins.reduce((sum, bin) => sum + bin.n, 0) || 1;
  const tell = (bin) => `predicted ${show(bin.mean_prob)}, observed ${show(bin.frequency)}, n = ${show(bin.n)}`;
  for (const bin of spec.bins) place.image.append(svg("circle", { class: "s0", cx: toX(bin.mean_prob), cy: toY(bin.frequency), r: 3 + 14 * Math.sqrt(bin.n / total), "fill-opacity": 0.75 }, svg("title", {}, tell(bin))));
  fill(place.image, { role: "img", "aria-label": `${spec.title}: ${spec.bins.map(tell).join("; ")}` }, []);
  const numbers = [["calibration error", spec.ece], ["Brier score", spec.brier], ["pairs", total]];
  figure.replaceChildren(
    el("figcaption", {}, el("h4", {}, spec.title)), place.image,
    el("ul", { class: "legend" }, numbers.map(([name, value]) => el("li", {}, el("span", {}, name), el("b", {}, show(value))))));
}

// Draw every figure when it first comes near the window, and again when its width changes.
function drawCharts(charts) {
  const draw = { lines: drawLines, reliability: drawReliability };
  const widths = new Map();
  const redraw = new ResizeObserver((entries) => {
    for (const { target } of entries) {
      if (!target.clientWidth || widths.get(target) === target.clientWidth) continue;
      widths.set(target, target.clientWidth);
      const spec = charts[target.dataset.chart];
      draw[spec.kind](target, spec);
    }
  });
  for (const figure of document.querySelectorAll("[data-chart]")) redraw.observe(figure);
}
