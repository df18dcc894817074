ImageReadMode = decode_image = None  # transformers/image_utils.py
