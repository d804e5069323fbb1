"""Serves a saved model by transformers' own server, in the protocol of OpenAI, with its thoughts.

    pip install -e '.[serve]'
    python examples/serve.py --model me/multicoco-1b --port 8000

`transformers serve` looks the model's class up among its own, so it must be told of ours before it starts. That, and
an answer 400 with the reason to a request that cannot be asked, is all that stands here. Then ask it by curl

    curl http://localhost:8000/v1/chat/completions -H 'Content-Type: application/json' -d '{
        "model": "me/multicoco-1b", "max_tokens": 64, "chat_template_kwargs": {"num_thoughts": 6},
        "messages": [{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.com/street.jpg"}},
            {"type": "text", "text": "How many cars are parked?"}]}]}'

or by OpenAI's client (a picture of yours is a URL too: `"data:image/jpeg;base64," + base64.b64encode(...).decode()`):

    client = openai.OpenAI(base_url="http://localhost:8000/v1", api_key="none")
    answer = client.chat.completions.create(
        model="me/multicoco-1b",
        messages=[{"role": "user", "content": [
            {"type": "image_url", "image_url": {"url": "https://example.com/street.jpg"}},
            {"type": "text", "text": "How many cars are parked?"}]}],
        extra_body={"chat_template_kwargs": {"num_thoughts": 6}},  # the checkpoint's own number without this line
    )
    print(answer.choices[0].message.content)

Requests are answered one after the other; thoughts count as tokens of the prompt in `usage`. A request may ask for any
number of them and for any address or file as a picture: strangers should reach it only through a gateway that checks.
"""

import argparse

import uvicorn
from fastapi import FastAPI
from fastapi.responses import JSONResponse
from transformers import AutoConfig, AutoProcessor
from transformers.cli.serving import model_manager
from transformers.cli.serving.chat_completion import ChatCompletionHandler
from transformers.cli.serving.completion import CompletionHandler
from transformers.cli.serving.response import ResponseHandler
from transformers.cli.serving.server import build_server
from transformers.cli.serving.systemone import SystemOneHandler
from transformers.cli.serving.transcription import TranscriptionHandler
from transformers.cli.serving.utils import GenerationState
from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

from multicoco import MultiCoCoConfig, MultiCoCoForConditionalGeneration, MultiCoCoProcessor


def register() -> None:
    """Makes our classes known under the names in a checkpoint, so that the server runs no code of the checkpoint."""
    AutoConfig.register(MultiCoCoConfig.model_type, MultiCoCoConfig, exist_ok=True)
    AutoProcessor.register(MultiCoCoConfig, MultiCoCoProcessor, exist_ok=True)
    name = MultiCoCoForConditionalGeneration.__name__
    # The server's own `transformers`, not ours: importing `AutoProcessor` makes a second module object of that name.
    setattr(model_manager.transformers, name, MultiCoCoForConditionalGeneration)
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES[MultiCoCoConfig.model_type] = name


def build(model: str, num_thoughts: int | None = None, device: str = "auto", dtype: str = "auto") -> FastAPI:
    """transformers' server with this model loaded."""
    register()
    manager = model_manager.ModelManager(device=device, dtype=dtype, force_model=model)
    state = GenerationState()
    defaults = {} if num_thoughts is None else {"num_thoughts": num_thoughts}  # those of a request win
    app = build_server(
        manager,
        ChatCompletionHandler(manager, state, chat_template_kwargs=defaults),
        completion_handler=CompletionHandler(manager, state),
        response_handler=ResponseHandler(manager, state, chat_template_kwargs=defaults),
        transcription_handler=TranscriptionHandler(manager, state),
        systemone_handler=SystemOneHandler(manager, state, chat_template_kwargs=defaults),
        generation_state=state,
    )

    @app.exception_handler(ValueError)
    async def refuse(request, error):
        body = {"message": str(error), "type": "invalid_request_error", "param": None, "code": None}
        return JSONResponse({"error": body}, status_code=400)

    return app


def main(arguments: list[str] | None = None) -> None:
    """Serves until it is interrupted."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder that train.py wrote, or its name on the Hub.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts of a request that asks for none; the checkpoint's own by default."
    )
    parser.add_argument("--host", default="localhost", help="Address to listen on; 0.0.0.0 for other machines too.")
    parser.add_argument("--port", type=int, default=8000, help="Port to listen on.")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda:0, ...")
    parser.add_argument("--dtype", default="auto", help="float32, bfloat16, ...; the checkpoint's own if auto.")
    args = parser.parse_args(arguments)

    app = build(args.model, args.num_thoughts, args.device, args.dtype)
    uvicorn.run(app, host=args.host, port=args.port)


if __name__ == "__main__":
    main()
