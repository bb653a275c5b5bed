"""A server of vLLM's completions interface for tests: a backbone behind `POST /v1/completions` on this machine, which reads `prompt_embeds` and nothing else.

What vLLM refuses is refused here as well: what is not base64, what is no tensor or needs more than tensors to load, another number of
dimensions, another width, whole numbers. It knows nothing of `ept`.
"""

import base64
import contextlib
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import torch


def read_embeds(text, model):
    """The tensor of one prompt, [tokens, width], in the server's number format; `ValueError` for anything else."""
    width = model.config.hidden_size
    try:
        tensor = torch.load(io.BytesIO(base64.b64decode(text, validate=True)), weights_only=True, map_location="cpu")
    except Exception as error:  # of base64 or of the unpickler, whatever the bytes make of them
        raise ValueError(f"`prompt_embeds` cannot be read: {type(error).__name__}") from error
    if not isinstance(tensor, torch.Tensor):
        raise ValueError("`prompt_embeds` is no tensor")
    if tensor.dim() == 3:
        tensor = tensor.squeeze(0)
    if tensor.dim() != 2 or tensor.shape[1] != width or not tensor.is_floating_point():
        raise ValueError(f"`prompt_embeds` must be [tokens, {width}] of a floating-point type; got {list(tensor.shape)}, {tensor.dtype}")
    return tensor.to(model.dtype)


def complete(request, model, tokenizer):
    """The answer to a completion request: greedy, each prompt by itself."""
    if request.get("temperature", 1) != 0:
        raise ValueError("this server is greedy; set temperature to 0")
    given, choices = request["prompt_embeds"], []
    for index, text in enumerate([given] if isinstance(given, str) else given):
        embeds = read_embeds(text, model)[None]
        options = dict(max_new_tokens=request.get("max_tokens", 16), do_sample=False)
        with torch.no_grad():
            ids = model.generate(inputs_embeds=embeds, attention_mask=torch.ones(embeds.shape[:2], dtype=torch.long), **options)[0].tolist()
        token_ids = {"token_ids": ids} if request.get("return_token_ids") else {}
        choices.append({"index": index, "text": tokenizer.decode(ids, skip_special_tokens=True), "finish_reason": "length", **token_ids})
    return {"object": "text_completion", "model": request["model"], "choices": choices}


@contextlib.contextmanager
def serving(model, tokenizer):
    """A server for the time of a `with`, on a free port of 127.0.0.1; gives its address."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            try:
                if self.path != "/v1/completions":
                    raise ValueError(f"no such path: {self.path}")
                status, answer = 200, complete(json.loads(self.rfile.read(int(self.headers["Content-Length"]))), model, tokenizer)
            except (ValueError, KeyError) as error:
                status, answer = 400, {"error": {"message": str(error), "type": "BadRequestError", "code": 400}}
            body = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
