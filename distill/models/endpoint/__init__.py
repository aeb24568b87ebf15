"""A `Reasoner` over an OpenAI-compatible server: vLLM, SGLang, llama.cpp, or a hosted service."""

from distill.models.endpoint.reasoner import Endpoint
from distill.models.endpoint.settings import BatchSettings, EndpointSettings

__all__ = ["BatchSettings", "Endpoint", "EndpointSettings"]
