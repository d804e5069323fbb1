"""Asks a saved model by transformers' pipeline: it needs nothing of this package, only `trust_remote_code`.

    python examples/pipeline.py --model me/multicoco-1b --image street.jpg --question "How many cars are parked?"

For many prompts give `pipeline` a list and `batch_size=8`, or see examples/generate_batch.py.
"""

import argparse

from transformers import pipeline


def main(arguments: list[str] | None = None) -> str:
    """Prints the answer, and returns it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder that train.py wrote, or its name on the Hub.")
    parser.add_argument("--image", required=True, help="Path or URL of a picture.")
    parser.add_argument("--question", required=True, help="What is asked about it.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts before the answer; the checkpoint's own by default."
    )
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    args = parser.parse_args(arguments)

    ask = pipeline("image-text-to-text", model=args.model, trust_remote_code=True)
    content = [{"type": "image", "url": args.image}, {"type": "text", "text": args.question}]
    messages = [{"role": "user", "content": content}]
    number = {} if args.num_thoughts is None else {"num_thoughts": args.num_thoughts}  # of the chat template
    answers = ask(text=messages, **number, max_new_tokens=args.max_new_tokens, return_full_text=False)
    print(answers[0]["generated_text"])
    return answers[0]["generated_text"]


if __name__ == "__main__":
    main()
