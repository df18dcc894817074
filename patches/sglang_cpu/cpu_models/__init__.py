"""Models SGLang finds without importing all of sglang.srt.models: SGLANG_EXTERNAL_MODEL_PACKAGE=cpu_models."""
