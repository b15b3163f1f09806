"""What the user says, as pydantic models."""

from graphq.config.config import QuantConfig, Resolution, Rule
from graphq.config.scheme import Scheme
from graphq.config.selectors import Selector
from graphq.config.spec import QuantSpec

__all__ = ["QuantConfig", "QuantSpec", "Resolution", "Rule", "Scheme", "Selector"]
