"""Images written by ray.data itself (read_images … write_parquet) are refused; in a process that has not imported ray.data
the message speaks of large_list. Kind: ray-project/ray#18301 #22140. Starts a local Ray."""

from common import *
import ray

for c in ("cat", "dog"):
    for i in range(10):
        put(f"i/{c}/{i}.png")
ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="error", num_cpus=2)
ray.data.read_images(f"{DIR}/i", include_paths=True).map(
    lambda r: {"image": r["image"], "label": r["path"].split("/")[-2]}
).write_parquet(f"{DIR}/p")
f = load(f"{DIR}/p")
check(
    "Parquet of ray.data is read, or refused with what to do in ray.data",
    not isinstance(f, ValueError) or "ray.data" in str(f),
    f,
)
