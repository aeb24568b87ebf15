"""The pair in service: one OpenAI-compatible address, and a page to try it on."""
