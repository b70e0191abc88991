"""Minimization with the whole subset's gradient, which is deterministic: L-BFGS, conjugate gradients,
Gauss-Newton, Levenberg-Marquardt.

minimize(model, examples, MinimizeConfig(optimizer="cg", epochs=100, gradient_tolerance=1e-5), seed=0) comes here.
"""

from raysubset.training.whole_subset.driver import minimize_whole
