"""Working on a trained model: fold, convert, freeze, swap, inspect, recalibrate, adapt."""

from jaxnorm.surgery._convert import CONVENTIONS, Convention, Converted, convert
from jaxnorm.surgery._fold import Folded, fold
from jaxnorm.surgery._report import FoldedNorm, Report

__all__ = ["CONVENTIONS", "Convention", "Converted", "Folded", "FoldedNorm", "Report", "convert", "fold"]
