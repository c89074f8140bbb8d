// How the search ranks pages: answers to a question before measurements and words that are only defined.
"use strict";
const FIRST = /^(howto\/|troubleshooting$|conventions$|start$)/;
const LAST = /^(benchmarks$|comparison$|changelog$|notebooks\/)/;

var Scorer = {
  score: ([docname, title, anchor, description, score]) => {
    if (docname === "glossary") return score - 100; // what it defines counts 100
    const more = docname === "howto/masks_and_padding" ? 12 : FIRST.test(docname) ? 10 : LAST.test(docname) ? -20 : 0;
    return score + more;
  },
  objNameMatch: 11,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
