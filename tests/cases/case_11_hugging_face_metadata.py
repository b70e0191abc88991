"""Schema metadata of `datasets` without features is no ValueError but an AttributeError with a traceback."""

from common import *

pq.write_table(table().replace_schema_metadata({"huggingface": '{"info": null}'}), "m.parquet")
try:
    f = load("m.parquet")
    check(
        "metadata without features is overlooked or refused by name",
        not isinstance(f, ValueError) or "m.parquet" in str(f),
        f,
    )
except Exception as error:
    check("metadata without features is overlooked or refused by name", False, repr(error))
