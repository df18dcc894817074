"""PROCESS. One per SGLang server, its child: generates samples across weight updates."""
