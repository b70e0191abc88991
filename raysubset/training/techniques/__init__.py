"""Techniques that vary a minimization between its steps. Each object lives for one call of minimize()."""

from raysubset.training.techniques.distillation import Distillation
from raysubset.training.techniques.hooks import Techniques
