"""SGLANG_EXTERNAL_MODEL_PACKAGE=cpu_models: SGLang finds these without importing all its models."""
