"""Techniques that vary a minimization between its steps. Each object lives for one call of minimize()."""

from raysubset.training.techniques.chosen import Techniques
from raysubset.training.techniques.distillation import Distillation
