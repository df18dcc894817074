"""Just enough of torchvision for SGLang 0.5.21 and transformers 5.12 to import.

Both load their image code for text models too; it never runs.
"""

from . import io, transforms  # noqa: F401

__version__ = "0.0.0"  # transformers/models/auto/image_processing_auto.py compares it with 0.27
