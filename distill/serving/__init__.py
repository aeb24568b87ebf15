"""The cascade as a service: an OpenAI-compatible HTTP gateway with a web page."""
