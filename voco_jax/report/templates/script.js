
"use strict";

// Pictures over training: one at a time, with a slider. Without a script all are shown.
document.querySelectorAll(".frames").forEach((box) => {
  const frames = Array.from(box.querySelectorAll(".frame"));
  if (frames.length < 2) return;
  const slider = box.querySelector(".slider");
  const input = document.createElement("input");
  Object.assign(input, { type: "range", min: 0, max: frames.length - 1, step: 1 });
  input.setAttribute("aria-label", "picture of which step");
  const said = document.createElement("output");
  const show = (place) => {
    frames.forEach((frame, i) => { frame.hidden = i !== place; });
    input.value = place;
    said.textContent = "step " + frames[place].dataset.step + " (" + (place + 1) + " of " + frames.length + ")";
    input.setAttribute("aria-valuetext", said.textContent);
  };
  input.addEventListener("input", () => show(Number(input.value)));
  const button = (text, to) => {
    const made = document.createElement("button");
    made.type = "button";
    made.textContent = text;
    made.addEventListener("click", () => show(to));
    return made;
  };
  slider.append(button("first", 0), input, button("last", frames.length - 1), said);
  slider.hidden = false;
  box.classList.add("enhanced");
  show(frames.length - 1);
});

// Curves: values at the pointer, from the lines themselves and the ends of the axes.
document.querySelectorAll(".canvas").forEach((canvas) => {
  const svg = canvas.querySelector("svg");
  const tip = canvas.querySelector(".tip");
  const at = {};
  ["x0", "x1", "y0", "y1", "log", "percent", "left", "right", "top", "bottom"].forEach((name) => {
    at[name] = Number(svg.getAttribute("data-" + name));
  });
  const curves = Array.from(svg.querySelectorAll("g[data-label]")).map((group) => ({
    label: group.dataset.label,
    colour: group.getAttribute("class"),
    points: group.querySelector("polyline").getAttribute("points").trim().split(" ")
      .map((pair) => pair.split(",").map(Number)),
  }));
  const pointer = document.createElementNS("http://www.w3.org/2000/svg", "line");
  pointer.setAttribute("class", "pointer");
  pointer.setAttribute("y1", at.top);
  pointer.setAttribute("y2", at.bottom);
  const value = (y) => {
    const share = (at.bottom - y) / (at.bottom - at.top);
    const found = at.log
      ? at.y0 * Math.pow(at.y1 / at.y0, share)
      : at.y0 + share * (at.y1 - at.y0);
    return at.percent ? (100 * found).toFixed(1) + " %" : String(Number(found.toPrecision(3)));
  };
  const hide = () => { tip.hidden = true; pointer.remove(); };
  const move = (event) => {
    const box = svg.getBoundingClientRect();
    const scale = svg.viewBox.baseVal.width / box.width;
    const x = (event.clientX - box.left) * scale;
    if (x < at.left - 8 || x > at.right + 8) { hide(); return; }
    const nearest = curves.map((curve) => curve.points.reduce(
      (best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best)));
    const closest = nearest.reduce(
      (best, point) => (Math.abs(point[0] - x) < Math.abs(best[0] - x) ? point : best));
    pointer.setAttribute("x1", closest[0]);
    pointer.setAttribute("x2", closest[0]);
    svg.append(pointer);
    const step = at.x0 + (closest[0] - at.left) / (at.right - at.left) * (at.x1 - at.x0);
    tip.replaceChildren();
    const head = document.createElement("b");
    head.textContent = "step " + Math.round(step);
    tip.append(head);
    nearest.forEach((point, i) => {
      const row = document.createElement("div");
      row.className = curves[i].colour;
      const text = document.createElement("span");
      text.textContent = (curves.length > 1 ? curves[i].label + " " : "") + value(point[1]);
      row.append(document.createElement("i"), text);
      tip.append(row);
    });
    tip.hidden = false;
    const place = closest[0] / scale;
    const left = place + 12 + tip.offsetWidth > box.width ? place - 12 - tip.offsetWidth : place + 12;
    tip.style.left = Math.max(0, left) + "px";
    tip.style.top = "8px";
  };
  svg.addEventListener("pointermove", move);
  svg.addEventListener("pointerdown", move);
  svg.addEventListener("pointerleave", hide);
});

// On paper nothing can be opened.
window.addEventListener("beforeprint", () => {
  document.querySelectorAll("details:not([open])").forEach((one) => {
    one.open = true;
    one.dataset.printed = "";
  });
});
window.addEventListener("afterprint", () => {
  document.querySelectorAll("details[data-printed]").forEach((one) => {
    one.open = false;
    delete one.dataset.printed;
  });
});
