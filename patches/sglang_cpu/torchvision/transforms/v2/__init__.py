from . import functional  # noqa: F401  transformers/image_processing_utils.py
