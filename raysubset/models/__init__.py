"""Networks by name: small ones whose Q can exceed one, torchvision's, and the user's own. No training, no files.

model = build_model(ModelConfig(), Spec(inputs=(1, 8, 8), outputs=(10,)), seed=0)
"""

from raysubset.models.building import architecture, build_model
from raysubset.models.properties import (
    averaged_names,
    copied,
    deep_copy,
    dtype_of,
    generators_restored,
    has_batch_norm,
    has_dropout,
    learning_batch_norms,
    lost_in_copies,
    modes_restored,
    modules_in_training,
    num_parameters,
    tied_names,
    torch_as_new,
    trainable_names,
)
from raysubset.models.users import needs_default_layout, unwrapped
