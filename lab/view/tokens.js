// One tab stop per strip: arrow keys, Home and End move between tokens. Without this script every token is a tab stop.
(() => {
  for (const strip of document.querySelectorAll(".lab-strip:not([data-keys])")) {
    strip.dataset.keys = "on";
    const tokens = [...strip.querySelectorAll(".t")];
    const focus = (token) => {
      tokens.forEach((other) => (other.tabIndex = other === token ? 0 : -1));
      token.focus();
    };
    tokens.forEach((token, place) => (token.tabIndex = place ? -1 : 0));
    strip.addEventListener("focusin", (event) => {
      const token = event.target.closest(".t");
      if (token) tokens.forEach((other) => (other.tabIndex = other === token ? 0 : -1));
    });
    strip.addEventListener("keydown", (event) => {
      const token = event.target.closest(".t");
      if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
      const shown = tokens.filter((other) => other.offsetParent !== null);
      const step = token.closest("[dir=rtl]") ? -1 : 1;
      const moves = { ArrowRight: step, ArrowLeft: -step, ArrowDown: 10, ArrowUp: -10 };
      const ends = { Home: 0, End: shown.length - 1 };
      const goal = event.key in ends ? ends[event.key] : event.key in moves ? shown.indexOf(token) + moves[event.key] : -1;
      if (event.key in ends || event.key in moves) {
        event.preventDefault();
        event.stopPropagation();
        focus(shown[Math.max(0, Math.min(shown.length - 1, goal))]);
      }
    });
  }
})();
