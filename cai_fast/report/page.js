// Theme, red-team switch, and the start of everything.
function themeSwitch(button) {
  const themes = ["system", "light", "dark"];
  let now = 0;
  button.hidden = false;
  button.addEventListener("click", () => {
    now = (now + 1) % themes.length;
    if (now) document.documentElement.dataset.theme = themes[now];
    else delete document.documentElement.dataset.theme;
    button.textContent = `Theme: ${themes[now]}`;
  });
}

// Remembered while the page is open, and no longer.
function revealSwitch(button) {
  button.hidden = false;
  button.addEventListener("click", () => {
    red.shown = !red.shown;
    button.setAttribute("aria-pressed", red.shown);
    button.textContent = red.shown ? "Hide red-team text" : "Show red-team text";
    for (const update of red.listeners) update();
  });
}

function start() {
  const data = JSON.parse(document.getElementById("data").textContent);
  themeSwitch(document.getElementById("theme"));
  if (data === null) return;
  const principles = data.principles ?? {};
  const kinds = { chains: chainBrowser(principles), comparisons: comparisonBrowser(principles), answers: answerBrowser() };
  for (const place of document.querySelectorAll("[data-browser]")) makeBrowser(place, data[place.dataset.browser], kinds[place.dataset.browser]);
  if (red.listeners.length) revealSwitch(document.getElementById("reveal"));
  drawCharts(data.charts ?? []);
}

start();
