import enum


# transformers/image_utils.py; in sglang/srt: configs/deepseek_ocr.py, multimodal/internvl_utils.py
class InterpolationMode(enum.Enum):
    NEAREST = "nearest"
    NEAREST_EXACT = "nearest-exact"
    BILINEAR = "bilinear"
    BICUBIC = "bicubic"
    BOX = "box"
    HAMMING = "hamming"
    LANCZOS = "lanczos"


pil_to_tensor = None  # transformers/image_utils.py
