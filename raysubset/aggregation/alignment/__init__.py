"""Minima that share no start made one: their units permuted to correspond, then the mean, then REPAIR.

soup = aligned_soup(minima, model, examples, config.minimize, matching="activations", repair=True)
"""

from raysubset.aggregation.alignment.soup import aligned_soup
from raysubset.aggregation.alignment.tracing import trace_units
