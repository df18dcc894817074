"""The names of torchvision that SGLang 0.5.21 and transformers 5.12 import.

Both import their image code for text models too, but never run it.
"""

from . import io, transforms  # noqa: F401

__version__ = "0.0.0"  # transformers/models/auto/image_processing_auto.py compares it with 0.27
