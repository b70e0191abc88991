"""What is learned: what a network takes and gives, its loss, and how good it is. No data sets, no training.

DESIGN: everything that is not the same for every kind of learning is in this room.
"""

from raysubset.tasks.spec import Spec

__all__ = ["Spec"]
