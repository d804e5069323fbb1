"""The model card of a run: README.md with metadata that the Hub reads, made from the files in the run's folder.

    python model_card.py out                                                  # again, after `score.py --model out`
    python model_card.py out --model_id me/multicoco-1b --controls out-pause out-no_thoughts --license mit

`train.py` writes the card at the end of every run. It reads config.json, settings.json and results.json (of
`train.py`), scores.json in the folder or in its `scores/` (of `score.py`), diagnosis.json in the folder or in its
`diagnosis/` (of `diagnose.py`), and adapter_config.json if adapters were trained. What is not there is not claimed.
"""

import argparse
from collections.abc import Sequence

from multicoco.training.card import write_card


def main(words: Sequence[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="Folder of a finished run; its README.md is written anew.")
    parser.add_argument(
        "--model_id", help="Name on the Hub, as me/multicoco-1b; where the run was pushed if not given."
    )
    parser.add_argument("--controls", nargs="+", default=[], help="Folders of other finished runs to stand beside it.")
    parser.add_argument("--license", help="Licence of the weights; the base model's if not given.")
    write_card(**vars(parser.parse_args(words)))


if __name__ == "__main__":
    main()
