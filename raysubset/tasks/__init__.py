"""Tasks: the shapes that a network takes and gives, its loss, and its quality. No data sets, no training.

task = Classification(ImageInputs((28, 28, 1), mean, std), class_names=("0", "1"))
inputs, targets = task.batch(rows, draws=None)
loss, measures = task.loss(network(inputs), targets), task.measure(network(inputs), targets)

Everything that differs between kinds of learning is in this room.
"""

from raysubset.tasks.classification import Classification, balanced_weights
from raysubset.tasks.columns import TableInputs, fit_columns, scales_of_targets, target_numbers
from raysubset.tasks.inputs import (
    FULL_RANGE,
    Augmentation,
    GreyRange,
    ImageInputs,
    TensorInputs,
    crop_and_flip,
    fit_tensors,
)
from raysubset.tasks.losses import EXACT_OUTPUTS, SAMPLED_TERMS, AbsoluteError, CrossEntropy, Huber, Loss, SquaredError
from raysubset.tasks.next_token import NextToken
from raysubset.tasks.own import fit_own_task
from raysubset.tasks.records import RecordedTask, outline, own_task, task_from_dict, task_to_dict
from raysubset.tasks.regression import Regression, strata_of_numbers
from raysubset.tasks.segmentation import Segmentation
from raysubset.tasks.spec import Spec
from raysubset.tasks.task import Rows, Task, added, errors_of, sums_of
from raysubset.tasks.vocabulary import Vocabulary, fit_vocabulary, windows_of
