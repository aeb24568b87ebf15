"use strict";
// Deferral curves: the point under the pointer, or chosen by keys, is marked in all charts of a figure and read out.
// A point of data-points is its share of deferred posts, the ends of its interval or null, and the cells of the read-out.
const SVG = "http://www.w3.org/2000/svg";

function shape(svg, name, className) {
  const created = document.createElementNS(SVG, name);
  created.setAttribute("class", className);
  created.style.visibility = "hidden";
  return svg.appendChild(created);
}

// A chart: its lines, the SVG coordinates of their points, and the marks of the picked point.
function readChart(svg) {
  const lines = [...svg.querySelectorAll("polyline, circle.dot")];
  const places = lines.map((line) =>
    line.tagName === "circle" ? [{ x: line.cx.baseVal.value, y: line.cy.baseVal.value }] : [...line.points]);
  const [low, bottom, high, top] = svg.dataset.axis.split(" ").map(Number);
  const height = (value) => bottom + ((value - low) / (high - low)) * (top - bottom);
  return { svg, lines, places, height, whisker: shape(svg, "path", "whisker"), cursor: shape(svg, "circle", "cursor") };
}

function activate(figure) {
  const points = JSON.parse(figure.dataset.points);
  const charts = [...figure.querySelectorAll("svg")].map(readChart);
  const boxes = [...figure.querySelectorAll("input[type=checkbox]")];
  const names = boxes.map((box) => box.parentElement.textContent.trim());
  const picked = figure.querySelector(".picked");
  const titles = [...picked.closest("table").tHead.rows[0].cells].map((cell) => cell.textContent);
  const inUse = Number(figure.dataset.inUse);
  const shown = () => boxes.flatMap((box, policy) => (box.checked ? [policy] : []));
  let policy = Math.max(0, inUse);
  let index = 0;

  function show() {
    const visible = boxes[policy].checked;
    const [share, low, high, ...values] = points[policy][index];
    const hasInterval = low !== null && high !== null;
    for (const { places, height, whisker, cursor } of charts) {
      const { x, y } = places[policy][index];
      cursor.setAttribute("cx", x);
      cursor.setAttribute("cy", y);
      cursor.setAttribute("r", 5);
      if (hasInterval) whisker.setAttribute("d", `M${x} ${height(low)}V${height(high)}`);
      cursor.setAttribute("class", `cursor s${policy % 6}`);
      whisker.setAttribute("class", `whisker s${policy % 6}`);
      cursor.style.visibility = visible ? "visible" : "hidden";
      whisker.style.visibility = visible && hasInterval ? "visible" : "hidden";
    }
    const cells = visible ? [names[policy], ...values] : ["no policy is shown"];
    [...picked.cells].forEach((cell, column) => { cell.textContent = cells[column] ?? ""; });
    for (const { svg } of charts) {
      svg.setAttribute("aria-valuetext", cells.map((text, column) => `${titles[column]} ${text}`).join(", "));
      svg.setAttribute("aria-valuenow", share);
    }
  }

  function pick(chart, event) {
    const place = new DOMPoint(event.clientX, event.clientY).matrixTransform(chart.svg.getScreenCTM().inverse());
    let nearest = Infinity;
    for (const candidate of shown()) {
      chart.places[candidate].forEach(({ x, y }, at) => {
        const distance = Math.hypot(x - place.x, y - place.y);
        if (distance < nearest) [nearest, policy, index] = [distance, candidate, at];
      });
    }
    show();
  }

  function press(event) {
    const visible = shown();
    const step = { ArrowLeft: -1, ArrowRight: 1, PageDown: -10, PageUp: 10, Home: -Infinity, End: Infinity }[event.key];
    const turn = { ArrowUp: -1, ArrowDown: 1 }[event.key];
    if ((step === undefined && turn === undefined) || event.ctrlKey || event.altKey || event.metaKey) return;
    event.preventDefault();
    if (turn && visible.length) {
      policy = visible.at((visible.indexOf(policy) + turn) % visible.length);
    }
    index = Math.min(Math.max(index + (step ?? 0), 0), points[policy].length - 1);
    show();
  }

  function toggle() {
    boxes.forEach((box, at) => {
      for (const { lines } of charts) lines[at].style.display = box.checked ? "" : "none";
    });
    const band = figure.querySelector(".band");
    if (band) band.style.display = boxes[inUse].checked ? "" : "none";
    const visible = shown();
    if (visible.length && !visible.includes(policy)) {
      policy = visible[0];
      index = Math.min(index, points[policy].length - 1);
    }
    show();
  }

  // first, the point that defers as many posts as the cascade
  const distances = points[policy].map(([share]) => Math.abs(share - Number(figure.dataset.share)));
  index = distances.indexOf(Math.min(...distances));
  for (const chart of charts) {
    const attributes = { tabindex: 0, role: "slider", "aria-valuemin": 0, "aria-valuemax": 1 };
    for (const [name, value] of Object.entries(attributes)) chart.svg.setAttribute(name, value);
    for (const kind of ["pointermove", "pointerdown"]) chart.svg.addEventListener(kind, (event) => pick(chart, event));
    chart.svg.addEventListener("keydown", press);
    chart.svg.addEventListener("focus", show);
  }
  for (const box of boxes) {
    box.hidden = false;
    box.addEventListener("change", toggle);
  }
  picked.hidden = figure.querySelector(".hint").hidden = false;
  show();
}

document.querySelectorAll(".deferral").forEach(activate);
