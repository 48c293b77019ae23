"""What a model costs and how long it takes."""

from .macs import count_macs
from .throughput import Timing, time_interleaved

__all__ = ["Timing", "count_macs", "time_interleaved"]
