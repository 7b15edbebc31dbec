() => {
  // Arrow keys, Home and End lead from tab to tab and from patch to patch, Enter and the space bar press them: Gradio's
  // own tabs know the Tab key alone.
  const moves = (columns) => ({
    ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity, ...(columns && {ArrowDown: columns, ArrowUp: -columns}),
  });
  document.addEventListener("keydown", (event) => {
    const here = event.target.closest("#tabs [role=tab], #board button");
    if (!here || event.altKey || event.ctrlKey || event.metaKey) return;
    const group = here.closest("[role=tablist], [role=group]");
    const all = [...group.querySelectorAll("button")];
    const move = moves(Number(group.dataset.columns || 0))[event.key];
    if (move === undefined) return;
    event.preventDefault();
    const aim = all.indexOf(here) + move;
    if (Number.isFinite(move)) all[aim]?.focus();
    else all.at(move > 0 ? -1 : 0).focus();
  });
  // Gradio shows an uploaded image a frame before it tells of the upload. An observer is called before that frame is
  // drawn: old answers go with the old image. They are shown again when the upload was answered. Images that come with
  // their answers, as examples do, are data.
  let known = document.querySelector("#image img")?.src;
  new MutationObserver(() => {
    const image = document.querySelector("#image img");
    if (!image || image.src === known) return;
    known = image.src;
    if (!known.startsWith("data:")) document.querySelector("#tabs").classList.add("old");
  }).observe(document.body, {subtree: true, childList: true, attributes: true, attributeFilter: ["src"]});
}
