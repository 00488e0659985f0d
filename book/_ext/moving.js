// Draws each figure that moves in the place of its still picture.  It is bundled with Vega, Vega-Lite and Vega-Embed.
const GAP = 20, MARGIN = 74, NARROW = 560, STEP = 120; // px, px, px, ms; the first two as in gstlib/book/moving.py

// the specification's panels as wide as the page allows, beneath each other on a telephone
function fit(spec, width) {
  if (spec.hconcat && width < NARROW) {
    spec.vconcat = spec.hconcat;
    delete spec.hconcat;
  }
  if (spec.hconcat) width = (width - GAP * (spec.hconcat.length - 1)) / spec.hconcat.length;
  for (const part of [...(spec.hconcat || []), ...(spec.vconcat || []), ...(spec.layer || [])]) fit(part, width);
  if (spec.width) spec.width = Math.floor(width - MARGIN);
  return spec;
}

// a button that moves one of the controls on by a step at a time, from the beginning where it has reached its end
function player(view, { name, bind }) {
  const button = document.createElement("button");
  let timer;
  const stop = () => {
    timer = clearInterval(timer);
    button.textContent = "▶ Play";
  };
  const step = () => {
    const next = view.signal(name) + bind.step;
    if (next > bind.max || !button.isConnected) return stop();
    view.signal(name, next).run();
  };
  button.type = "button";
  button.onclick = () => {
    if (timer) return stop();
    if (view.signal(name) >= bind.max) view.signal(name, bind.min).run();
    button.textContent = "⏸ Pause";
    timer = setInterval(step, STEP);
  };
  stop();
  return button;
}

async function draw(figure) {
  const spec = JSON.parse(figure.querySelector("script").textContent);
  const width = figure.clientWidth, before = figure.view;
  const bound = (spec.params || []).filter(param => param.bind && param.value !== undefined);
  if (before) for (const param of bound) param.value = before.signal(param.name);
  if (width < NARROW) spec.config.legend.columns = 2;
  const stage = document.createElement("div"), controls = document.createElement("div");
  controls.className = "controls";
  const { view } = await vegaEmbed(stage, fit(spec, width), {
    actions: false, bind: controls, defaultStyle: false, renderer: "svg", tooltip: { disableDefaultStyle: true },
  });
  const played = bound.find(param => param.name === spec.usermeta?.play);
  if (played) controls.prepend(player(view, played));
  figure.querySelectorAll(".still, .controls, .stage").forEach(old => old.remove());
  stage.className = "stage";
  figure.prepend(controls, stage);
  before?.finalize();
  Object.assign(figure, { view, drawn: width });
}

for (const figure of document.querySelectorAll("figure.moving")) {
  let waiting;
  // also the first time; a failure leaves the still picture where it is
  new ResizeObserver(() => {
    clearTimeout(waiting);
    if (figure.clientWidth && figure.clientWidth !== figure.drawn) {
      waiting = setTimeout(() => draw(figure), figure.drawn ? 200 : 0);
    }
  }).observe(figure);
}
