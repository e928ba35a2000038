"""Values of parquet and arrow columns as JSON values."""

import datetime
import math
from collections.abc import Mapping
from typing import Any


def json_value(value: Any) -> Any:
    """A value of a parquet file as a JSON value.

    NaN, infinity and bytes that are no UTF-8 text become null, dates and times ISO text; lists and
    mappings are converted item by item.
    """
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    if isinstance(value, Mapping):
        return {str(name): json_value(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [json_value(inner) for inner in value]
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, datetime.timedelta):
        return value.total_seconds()
    if isinstance(value, bytes):
        try:
            return value.decode("utf-8")
        except UnicodeDecodeError:
            return None
    return str(value)  # decimal.Decimal and any other type


def to_microseconds(column: Any) -> Any:
    """Cast nanosecond times, which pandas writes and Python's datetime cannot represent."""
    import pyarrow as pa

    kind = column.type
    if pa.types.is_timestamp(kind) and kind.unit == "ns":
        return column.cast(pa.timestamp("us", kind.tz), safe=False)
    if pa.types.is_duration(kind) and kind.unit == "ns":
        return column.cast(pa.duration("us"), safe=False)
    if pa.types.is_time64(kind) and kind.unit == "ns":
        return column.cast(pa.time64("us"), safe=False)
    return column
