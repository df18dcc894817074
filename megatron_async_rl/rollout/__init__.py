"""PROCESS. One per SGLang server, which is its child: generates samples across weight updates."""
