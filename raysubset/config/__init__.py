"""The settings of a run, with their defaults and help: frozen dataclasses that check themselves. No torch, no ray.

    config = Config(seed=3).with_overrides({"data.name": "mnist", "subsets.size": 5000})
    Config.from_dict(json.loads(text)) == config

A string after a field is its documentation and its `--help`.
"""

from raysubset.config.documentation import field_docs, show_fields
from raysubset.config.files import read_config
from raysubset.config.inputs import (
    ARROW_SUFFIXES,
    DATA_NAMES,
    DELIMITERS,
    EMBEDDED_NAMES,
    NUM_SUBSETS,
    TABLE_SUFFIXES,
    TEXT_SUFFIXES,
    DataConfig,
    ModelConfig,
    SubsetsConfig,
    kind_of,
    nothing_there,
    refuse_missing_data,
)
from raysubset.config.minimizing import (
    WHOLE_SUBSET,
    AveragingConfig,
    ExtrapolationConfig,
    MinimizeConfig,
    SkippingConfig,
    TrainingStage,
)
from raysubset.config.places import ActorsConfig, ClusterConfig, TrackingConfig
from raysubset.config.run import OF_SUBSET_PRETRAINING, Config, Learned, derive_seed, of_now
from raysubset.config.stages import (
    AGGREGATIONS,
    AggregationConfig,
    ConventionalConfig,
    FineTuningConfig,
    RoundsConfig,
    TrunkConfig,
)
from raysubset.config.task import TASK_NAMES, LossName, TaskConfig
from raysubset.config.trees import (
    check_number,
    differences,
    field_type,
    flatten,
    from_tree,
    list_of,
    nearest,
    parse_value,
    shapes_result,
    shaping,
)

show_fields(Config)
