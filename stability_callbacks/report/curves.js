// Draws the curves so that they can be zoomed and read under the pointer, in the place of the drawings in the page.
"use strict";
(() => {
  const root = document.documentElement;
  const MARGIN = 6; // above a plot, for the upper half of its highest label
  const rem = parseFloat(getComputedStyle(root).fontSize);
  const color = (property) => getComputedStyle(root).getPropertyValue(property).trim();
  const pixels = (width) => width * devicePixelRatio;

  function number(value) {
    if (typeof value === "string") return value; // not finite
    const size = Math.abs(value);
    if (size && (size < 1e-3 || size >= 1e6)) return String(Number(value.toPrecision(3)).toExponential()).replace("e+", "e");
    return size >= 1000 ? Math.round(value).toLocaleString("en-US") : String(Number(value.toPrecision(4)));
  }

  const range = (first, last) =>
    first === last ? `step ${first.toLocaleString("en-US")}` : `steps ${first.toLocaleString("en-US")} to ${last.toLocaleString("en-US")}`;

  function roundValues(low, high, most, least = 0) {
    const unit = 10 ** Math.floor(Math.log10((high - low) / most));
    const factor = [1, 2, 5, 10, 20].find((each) => (high - low) / (unit * each) <= most - 1);
    const step = Math.max(unit * factor, least);
    const found = [];
    for (let index = Math.ceil(low / step - 1e-9); index <= high / step + 1e-9; index++) found.push(index * step);
    return found;
  }

  function decades(low, high, most) {
    const first = Math.ceil(Math.log10(low) - 1e-9), last = Math.floor(Math.log10(high) + 1e-9);
    const every = Math.max(Math.ceil((last - first + 1) / most), 1);
    const found = [];
    for (let exponent = first; exponent <= last; exponent++) if (exponent % every === 0) found.push(10 ** exponent);
    return found.length < 2 ? roundValues(low, high, most) : found;
  }

  // What is drawn: gaps where a value is not finite; on a logarithmic scale nothing lies below its end.
  function table(curves, { logarithmic, range }) {
    const tables = curves.map(({ steps, values }) => [
      // Several values of one step stay apart, or else the last would hide the others.
      steps.map((step, place) => (step === steps[place - 1] ? step + 1e-4 * (place - steps.indexOf(step)) : step)),
      values.map((value) => (typeof value === "string" ? null : logarithmic ? Math.max(value, range[0]) : value)),
    ]);
    return uPlot.join(tables);
  }

  // The first place in a sorted list that is not below a value.
  function placeOf(list, value) {
    let low = 0, high = list.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (list[middle] < value) low = middle + 1;
      else high = middle;
    }
    return low;
  }

  // The points of a curve between two steps, or the one that is nearest to their middle.
  function pointsAt({ steps, dots }, low, high, reach) {
    const first = placeOf(steps, low), last = placeOf(steps, high);
    if (first < last) return [first, last];
    const middle = (low + high) / 2;
    const nearest = first > 0 && (first === steps.length || middle - steps[first - 1] < steps[first] - middle) ? first - 1 : first;
    return dots && Math.abs(steps[nearest] - middle) > reach ? null : [nearest, nearest + 1];
  }

  function told({ values }, [first, last]) {
    const part = values.slice(first, last);
    const finite = part.filter((value) => typeof value === "number");
    const least = number(Math.min(...finite)), most = number(Math.max(...finite));
    const broken = [...new Set(part.filter((value) => typeof value === "string"))];
    return [...(finite.length ? [least === most ? least : `${least} to ${most}`] : []), ...broken].join(", ");
  }

  function line(text, property, shape) {
    const element = document.createElement("div");
    if (property) {
      const sign = document.createElement("span");
      sign.className = shape;
      sign.style.background = `var(${property})`;
      element.append(sign);
    }
    element.append(text);
    return element;
  }

  function showPointer(plot, pointer, data) {
    const { left } = plot.cursor;
    pointer.hidden = left === undefined || left < 0;
    if (pointer.hidden) return;
    const [low, high] = [left - 1, left + 1].map((x) => plot.posToVal(x, "x"));
    const reach = 3 * (high - low);
    const lines = [];
    let first = Infinity, last = -Infinity;
    for (const curve of data.curves) {
      const points = curve.steps.length ? pointsAt(curve, low, high, reach) : null;
      if (!points) continue;
      if (!curve.dots || !lines.length) {
        first = Math.min(first, curve.steps[points[0]]);
        last = Math.max(last, curve.steps[points[1] - 1]);
      }
      lines.push(line(`${curve.name}: ${told(curve, points)}`, curve.color, "swatch"));
    }
    const marks = data.marks.filter(({ step }) => Math.abs(step - (low + high) / 2) < reach);
    lines.push(...marks.slice(0, 4).map((mark) => line(mark.text, mark.color, "dot")));
    if (first <= last) lines.unshift(line(range(first, last)));
    pointer.hidden = !lines.length;
    pointer.replaceChildren(...lines);
    const width = plot.over.clientWidth, start = plot.over.offsetLeft;
    const onTheRight = left < width / 2;
    pointer.style.left = onTheRight ? `${start + left + 0.8 * rem}px` : "";
    pointer.style.right = onTheRight ? "" : `${width - left + 0.8 * rem}px`;
  }

  function verticals(plot, steps, width, share, opacity) {
    const { ctx, bbox } = plot;
    ctx.save();
    ctx.lineWidth = pixels(width);
    ctx.globalAlpha = opacity;
    for (const { step, property } of steps) {
      const there = plot.valToPos(step, "x", true), half = ctx.lineWidth / 2;
      if (there < bbox.left || there > bbox.left + bbox.width) continue;
      const x = Math.min(Math.max(there, bbox.left + half), bbox.left + bbox.width - half);
      ctx.strokeStyle = color(property);
      ctx.beginPath();
      ctx.moveTo(x, bbox.top);
      ctx.lineTo(x, bbox.top + share * bbox.height);
      ctx.stroke();
    }
    ctx.restore();
  }

  function draw(figure) {
    const data = JSON.parse(figure.querySelector("script").textContent);
    const [low, high] = data.span, [bottom, top] = data.range;
    const drawing = figure.querySelector(".drawing"), { width, height } = drawing.getBoundingClientRect();
    const yAxis = drawing.getBoundingClientRect().left - figure.querySelector(".ticks").getBoundingClientRect().left;
    const place = document.createElement("div"), pointer = document.createElement("div"), button = document.createElement("button");
    place.className = "zoomable";
    pointer.className = "pointer";
    button.type = "button";
    button.textContent = "whole run";
    pointer.hidden = button.hidden = true;
    const whole = () => plot.setScale("x", { min: low, max: high });
    button.addEventListener("click", whole);

    let zoomed = false;
    const toX = (plot, min, max) => {
      if (min === null || !(max > min)) [min, max] = [low, high];
      zoomed = min > low || max < high;
      return [min, max];
    };
    const toY = (plot, min, max) => {
      if (!zoomed || min === null) return [bottom, top];
      if (data.logarithmic) {
        const margin = Math.max((max / min) ** 0.05, 1.1);
        return [min / margin, max * margin];
      }
      const margin = 0.06 * (max - min) || 0.1 * Math.abs(max) || 1;
      return [min - margin, max + margin];
    };
    const axis = {
      stroke: () => color("--muted"),
      font: `${0.72 * rem}px system-ui, sans-serif`,
      ticks: { show: false },
      filter: (plot, splits) => splits,
      values: (plot, splits) => splits.map(number),
    };
    const upwards = data.curves.slice().reverse().sort((one, other) => one.dots - other.dots); // the first line over others
    const broken = data.curves.flatMap(({ steps, values }) =>
      steps.filter((step, index) => typeof values[index] === "string").map((step) => ({ step, property: "--kind-nonfinite" })),
    );
    const marks = data.marks.map((mark) => ({ step: mark.step, property: mark.color }));
    const plot = new uPlot(
      {
        width: width + yAxis,
        height: height + MARGIN,
        padding: [MARGIN, 0, 0, 0],
        legend: { show: false },
        scales: {
          x: { time: false, range: toX },
          y: { range: toY, distr: data.logarithmic ? 3 : 1 },
        },
        axes: [
          { ...axis, size: 1.15 * rem, gap: 3, grid: { show: false }, splits: (plot, i, min, max) => roundValues(min, max, Math.max(Math.min(8, Math.floor(width / 45)), 2), 1) },
          {
            ...axis,
            size: yAxis,
            gap: 5,
            grid: { stroke: () => color("--grid"), width: 1 },
            splits: (plot, i, min, max) => (data.logarithmic ? decades : roundValues)(min, max, 5),
          },
        ],
        series: [
          {},
          ...upwards.map((curve) => ({
            stroke: () => color(curve.color),
            width: 1.5,
            pxAlign: 0,
            ...(curve.dots
              ? { paths: () => null, points: { show: true, size: 5, fill: () => color(curve.color) } }
              : { points: { size: 4, fill: () => color(curve.color), filter: lonePoints } }),
          })),
        ],
        cursor: {
          y: false,
          drag: { x: true, y: false, dist: 5 },
          points: { show: false },
          bind: { dblclick: () => whole },
        },
        hooks: {
          drawAxes: [(plot) => verticals(plot, marks, 1.5, 1, 0.4)],
          draw: [(plot) => verticals(plot, broken, 3, 1 / 12, 1)],
          setCursor: [(plot) => showPointer(plot, pointer, data)],
          setScale: [() => (button.hidden = !zoomed)],
        },
      },
      table(upwards, data),
      place,
    );
    place.append(pointer, button);
    figure.append(place);
    figure.classList.add("live");
    whole();
    return { plot, place, height };
  }

  // Points that no line reaches: those between gaps.
  function lonePoints(plot, series, show, gaps) {
    const values = plot.data[series];
    const known = values.map((value, index) => index).filter((index) => values[index] !== undefined);
    return known.filter(
      (index, at) => values[index] !== null && values[known[at - 1]] == null && values[known[at + 1]] == null,
    );
  }

  const drawn = new Map();
  function fit(figure) {
    if (!figure.clientWidth) return; // in a close-up that is not open
    if (!drawn.has(figure)) drawn.set(figure, draw(figure));
    const { plot, place, height } = drawn.get(figure);
    if (place.clientWidth !== plot.width) plot.setSize({ width: place.clientWidth, height: height + MARGIN });
  }
  const observer = new ResizeObserver((entries) => entries.forEach(({ target }) => fit(target)));
  for (const figure of document.querySelectorAll(".chart")) {
    fit(figure);
    observer.observe(figure);
  }
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => drawn.forEach(({ plot }) => plot.redraw(false)));
})();
