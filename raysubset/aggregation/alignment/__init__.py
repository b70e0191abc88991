"""Averages of minima that share no start: their units are permuted to correspond, then averaged, then REPAIRed.

Measured, far ahead of the plain mean and behind the best member alone (jobs/aggregators_mnist.py).

soup = aligned_soup(minima, model, examples, config.minimize, matching="activations", repair=True)
"""

from raysubset.aggregation.alignment.soup import aligned_soup
from raysubset.aggregation.alignment.tracing import trace_units
