// How the search ranks pages: answers to a question before measurements and words that are only defined.
"use strict";
const FIRST = /^(howto\/|troubleshooting$|conventions$|start$)/;
const LAST = /^(benchmarks$|comparison$|changelog$|notebooks\/)/;
const ENTRY = 100; // the score of an entry of the index, {index} in a page, that is what was searched

var Scorer = {
  score: ([docname, title, anchor, description, score, file, kind]) => {
    // Words of the glossary are entries too; "SyncBatchNorm", which has "BatchNorm" in it, is not what was searched.
    if (docname === "glossary" || (kind === "index" && score < ENTRY)) return score - ENTRY;
    const more = docname === "howto/masks_and_padding" ? 12 : FIRST.test(docname) ? 10 : LAST.test(docname) ? -20 : 0;
    return score + more;
  },
  objNameMatch: 30,
  objPartialMatch: 6,
  objPrio: { 0: 15, 1: 5, 2: -5 },
  objPrioDefault: 0,
  title: 15,
  partialTitle: 7,
  term: 5,
  partialTerm: 2,
};
