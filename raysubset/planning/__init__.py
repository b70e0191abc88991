"""What can be known and refused before anything runs: subsets, Q, advice, planned passes.

plan = make_plan(config, full_set)      # plan; soundness checks that network, recipes and batches fit one another
notes = idle_settings(config)           # warnings of settings that were changed and are not used
"""

from raysubset.planning.idle_settings import idle_settings
from raysubset.planning.plan import Plan, actor_bytes, make_plan, manifest, planned_steps
from raysubset.planning.soundness import refuse_fresh_weights, workers_of_stages
