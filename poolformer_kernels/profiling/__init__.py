"""What a model costs, layer by layer, and how long it takes."""

from .limits import LimitProbes, Limits, measure_limits
from .macs import count_macs
from .paper import paper_figures
from .profile import Profile, Row, profile
from .throughput import Timing, time_interleaved

__all__ = [
    "LimitProbes",
    "Limits",
    "Profile",
    "Row",
    "Timing",
    "count_macs",
    "measure_limits",
    "paper_figures",
    "profile",
    "time_interleaved",
]
