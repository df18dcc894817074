"""Trains an agent unchanged: it talks to OpenAI's or Anthropic's API, served by the rollout worker.

AgentWorkflow (workflow.py)     one episode per sample: opens a session, runs the agent, ends it
  AgentRunner (runner.py)         runs the agent in a process of its own (host.py) or a command
  Endpoint (server.py)            the HTTP server: a key per session; errors in the API's form
    chat.py, responses.py, anthropic.py   each API: request -> ChatRequest, Turn -> reply
    Session (session.py)          messages -> exact tokens -> policy.generate -> Turn
      Transcript (transcript.py)    the tree of all requests; its leaves become the sample
"""
