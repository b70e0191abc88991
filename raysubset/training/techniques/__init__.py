"""The sister methods: what varies a minimization between its steps. Each lives over one call of minimize()."""

from raysubset.training.techniques.chosen import Techniques
from raysubset.training.techniques.distillation import Distillation
