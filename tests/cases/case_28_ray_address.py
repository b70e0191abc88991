"""A stale RAY_ADDRESS: the message names an address that the user did not give, and not where it comes from; "nonsense" gives
"Invalid address format: nonsense". Kind: ray-project/ray#35010 #21592."""

from common import *

done = cli("run", "--storage-path", f"{DIR}/store", RAY_ADDRESS="127.0.0.1:1")
check("the message says that RAY_ADDRESS is set", "RAY_ADDRESS" in done.stderr, done.stderr.strip().splitlines()[-1])
