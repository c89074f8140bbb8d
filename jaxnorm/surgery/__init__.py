"""Working on a trained model: fold, convert, freeze, swap, inspect, recalibrate, adapt."""

from jaxnorm.surgery._fold import Folded, FoldedNorm, Report, fold

__all__ = ["Folded", "FoldedNorm", "Report", "fold"]
