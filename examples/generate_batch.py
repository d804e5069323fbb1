"""Answers a file of records in batches and writes one JSON line for each.

    python examples/generate_batch.py --model OpenGVLab/InternVL3-1B --data mine.jsonl --output answers.jsonl
    python examples/generate_batch.py --model out --data mine.jsonl --output answers.jsonl --num_beams 4

Prompts are padded on the left; each answer is the one that the record alone would get. To score answers, see score.py.
"""

import argparse
import json

from multicoco import OWN, MultiCoCoForConditionalGeneration, MultiCoCoProcessor, load_records, question_text


def main(arguments: list[str] | None = None) -> None:
    """Writes the file of answers."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="Folder or Hub name.")
    parser.add_argument(
        "--data", required=True, help="Records, see docs/data.md; `steps` and `answer` are not needed."
    )
    parser.add_argument("--output", required=True, help="JSONL file of ids and answers.")
    parser.add_argument(
        "--num_thoughts", type=int, help="Thoughts before each answer; the checkpoint's own by default."
    )
    parser.add_argument("--num_beams", type=int, default=1, help="1: greedy.")
    parser.add_argument("--batch_size", type=int, default=8, help="Records at a time.")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="Longest answer.")
    args = parser.parse_args(arguments)

    processor = MultiCoCoProcessor.from_pretrained(args.model)
    model = MultiCoCoForConditionalGeneration.from_pretrained(args.model, dtype="auto", device_map="auto")
    num_thoughts = OWN if args.num_thoughts is None else args.num_thoughts
    records = load_records(args.data, needs_steps=False, needs_answer=False)
    with open(args.output, "w", encoding="utf-8") as file:
        for start in range(0, len(records), args.batch_size):
            batch = records[start : start + args.batch_size]
            prompts = processor.apply_chat_template(
                [[{"role": "user", "content": question_text(record)}] for record in batch],
                num_thoughts=num_thoughts,
                add_generation_prompt=True,
            )
            inputs = processor(
                images=[record["images"] for record in batch],
                text=prompts,
                padding=True,
                return_tensors="pt",
            ).to(model.device, model.dtype)
            output = model.generate(**inputs, max_new_tokens=args.max_new_tokens, num_beams=args.num_beams)
            answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            for record, answer in zip(batch, answers, strict=True):
                file.write(json.dumps({"id": record["id"], "answer": answer.strip()}, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
