// What scrolls sideways in its own box, a wide formula or table, can be reached and moved with the keyboard.
addEventListener("load", () => {
  const boxes = "mjx-container[display='true'], .pst-scrollable-table-container, .dt-scroll-body, .cell_output, pre";
  const reach = () => {
    for (const box of document.querySelectorAll(boxes)) {
      if (box.scrollWidth > box.clientWidth) box.tabIndex = 0;
      else box.removeAttribute("tabindex");
    }
  };
  new ResizeObserver(reach).observe(document.body);
  globalThis.MathJax?.startup?.promise.then(reach);
});
