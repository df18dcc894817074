from sglang.srt.models.glm4_moe import EntryClass  # noqa: F401
