// Arrow keys, Home and End move between the tokens of a strip, which becomes one tab stop once it is entered.
// Listens on the document, so one copy serves every strip of a page. Without this script every token is a tab stop.
(() => {
  if (window.labTokenKeys) return;
  window.labTokenKeys = true;
  const around = (token) => [...token.closest(".lab-strip").querySelectorAll(".t")];
  const tokenOf = (event) => event.target.closest?.(".lab-strip .t");
  document.addEventListener("focusin", (event) => {
    const token = tokenOf(event);
    if (token) around(token).forEach((other) => (other.tabIndex = other === token ? 0 : -1));
  });
  document.addEventListener("keydown", (event) => {
    const token = tokenOf(event);
    if (!token || event.altKey || event.ctrlKey || event.metaKey) return;
    const shown = around(token).filter((other) => !other.closest("details:not([open])"));
    const forward = token.closest("[dir=rtl]") ? -1 : 1;
    const here = shown.indexOf(token);
    const goals = {
      ArrowRight: here + forward, ArrowLeft: here - forward, ArrowDown: here + 10, ArrowUp: here - 10, Home: 0, End: shown.length - 1,
    };
    if (!(event.key in goals)) return;
    event.preventDefault();
    event.stopPropagation();
    shown[Math.max(0, Math.min(shown.length - 1, goals[event.key]))].focus();
  }, true);
})();
