"""A server with the routes of vLLM and llama.cpp that docs/serve-elsewhere.md uses, computed by transformers."""

import json
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer


class Engine:
    """A text-only model behind the routes `/v1/chat/completions`, `/apply-template` and `/completion`."""

    def __init__(self, folder: Path) -> None:
        self.model = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.tokenizer = AutoTokenizer.from_pretrained(folder)

    def reply(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        """The reply to a request."""
        if path == "/v1/chat/completions":
            return self._chat(body)
        if path == "/apply-template":
            prompt = self._render(body["messages"], body["chat_template_kwargs"], add_generation_prompt=True)
            return {"prompt": prompt}
        text, *tokens = body["prompt"]
        logprobs = self._logprobs([*self.tokenizer.encode(text, add_special_tokens=False), *tokens])[-1]
        values, ids = logprobs.topk(min(body["n_probs"], len(logprobs)))
        top = [{"id": id, "logprob": value} for id, value in zip(ids.tolist(), values.tolist(), strict=True)]
        return {"completion_probabilities": [{"top_logprobs": top}]}

    def _chat(self, body: Mapping[str, Any]) -> dict[str, Any]:
        assert body["continue_final_message"] and not body["add_generation_prompt"] and body["max_tokens"] == 1
        text = self._render(body["messages"], body["chat_template_kwargs"], continue_final_message=True)
        ids = self.tokenizer.encode(text, add_special_tokens=body["add_special_tokens"])
        logprobs = self._logprobs(ids)
        top = [{"token": f"token_id:{id}", "logprob": float(logprobs[-1, id])} for id in body["logprob_token_ids"]]
        token = top[0] | {"top_logprobs": top}
        message = {"role": "assistant", "content": "x"}
        choice = {"index": 0, "finish_reason": "length", "message": message, "logprobs": {"content": [token]}}
        prompt: list[dict[str, Any] | None] = [None]
        prompt += [{str(id): {"logprob": float(row[id])}} for row, id in zip(logprobs, ids[1:], strict=False)]
        shown = prompt if body["prompt_logprobs"] is not None else None
        return {"id": "1", "object": "chat.completion", "created": 0, "model": body["model"], "choices": [choice],
                "prompt_logprobs": shown}  # fmt: skip

    def _render(self, messages: Any, variables: Mapping[str, Any], **options: bool) -> str:
        return str(self.tokenizer.apply_chat_template(messages, tokenize=False, **options, **variables))

    @torch.inference_mode()
    def _logprobs(self, ids: list[int]) -> torch.Tensor:
        logits: torch.Tensor = self.model(torch.tensor([ids])).logits[0]
        return logits.log_softmax(-1)


@contextmanager
def serve(folder: Path) -> Iterator[str]:
    """Serve an exported folder. Gives the address."""
    engine = Engine(folder)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            content = json.dumps(engine.reply(self.path, body)).encode()
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()
