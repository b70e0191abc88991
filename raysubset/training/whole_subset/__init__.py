"""Deterministic minimization with the whole subset's gradient: L-BFGS, CG, Gauss-Newton, Levenberg-Marquardt.

minimize(model, examples, MinimizeConfig(optimizer="cg", epochs=100, gradient_tolerance=1e-5), seed=0) uses this
package.
"""

from raysubset.training.whole_subset.driver import minimize_whole
