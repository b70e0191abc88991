"""Averages of minima that share no start: their units are permuted to correspond, then averaged, then REPAIRed.

soup = aligned_soup(minima, model, examples, config.minimize, matching="activations", repair=True)
"""

from raysubset.aggregation.alignment.soup import aligned_soup
from raysubset.aggregation.alignment.tracing import trace_units
