"""Working on a trained model: fold, convert, freeze, swap, inspect, recalibrate, adapt."""

from jaxnorm.surgery._causes import Finding
from jaxnorm.surgery._check import Checked, check
from jaxnorm.surgery._convert import CONVENTIONS, Convention, Converted, ConvertedNorms, convert, convert_norms
from jaxnorm.surgery._fold import Folded, fold
from jaxnorm.surgery._freeze import freeze, frozen, frozen_mask, unfreeze
from jaxnorm.surgery._inspect import Inspection, NormState, inspect
from jaxnorm.surgery._recalibrate import adapt, recalibrate
from jaxnorm.surgery._report import FoldedNorm, Report
from jaxnorm.surgery._swap import swap, swapped

__all__ = [
    "CONVENTIONS",
    "Checked",
    "Convention",
    "Converted",
    "ConvertedNorms",
    "Finding",
    "Folded",
    "FoldedNorm",
    "Inspection",
    "NormState",
    "Report",
    "adapt",
    "check",
    "convert",
    "convert_norms",
    "fold",
    "freeze",
    "frozen",
    "frozen_mask",
    "inspect",
    "recalibrate",
    "swap",
    "swapped",
    "unfreeze",
]
