"""Trains an agent unchanged: it talks to OpenAI's or Anthropic's API, served by the rollout worker.

AgentWorkflow (workflow.py)     one episode per sample: opens a session, runs the agent, ends it
  AgentRunner (runner.py)         runs the agent in a process of its own (host.py) or a command
  Endpoint (server.py)            the HTTP server: a key per session; errors in the API's form
    apis/                         each API: JSON -> ChatRequest, Reply -> JSON; their description
    Session (session.py)          policy.generate for each turn, and the tool python in between
      History (history.py)          messages -> exact text and tokens
      Transcript (transcript.py)    the tree of all turns; its leaves become the sample
"""
