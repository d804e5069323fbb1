"""What the tests of other programs share: a model trained on Trails, boards that it has not seen, our own answers."""

import contextlib
import json

import pytest

from multicoco import MultiCoCoProcessor, score
from multicoco.recipes.trails.prepare import write_split


NUM_BOARDS = 100


@pytest.fixture(scope="session")
def folder(trails):
    """The trained checkpoint, saved anew: the code in it is what these tests test, and lighteval writes into it."""
    return str(trails)


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """The file of the boards' records; the pictures lie beside it."""
    data = tmp_path_factory.mktemp("boards")
    write_split(data, "test", NUM_BOARDS, size=4, max_arrows=5, seed=0)
    return data / "test.jsonl"


@pytest.fixture(scope="session")
def boards(data):
    """The records, with absolute paths of their pictures."""
    records = [json.loads(line) for line in data.read_text().splitlines()]
    return [{**record, "images": [str(data.parent / path) for path in record["images"]]} for record in records]


@pytest.fixture(scope="session")
def score_boards(folder, data, tmp_path_factory):
    """`score_boards(num_thoughts)`: what score.py finds, the accuracy and each board's prediction."""
    found = {}

    def ask(num_thoughts):
        if num_thoughts not in found:
            output_dir = tmp_path_factory.mktemp("scores")
            flags = ["--model", folder, "--data", data, "--num_thoughts", num_thoughts, "--output_dir", output_dir]
            (row,) = score.main(list(map(str, [*flags, "--use_cpu", "--batch_size", 50])))
            (path,) = (output_dir / "predictions").iterdir()
            lines = [json.loads(line) for line in path.read_text().splitlines()[1:]]
            lines.sort(key=lambda line: line["index"])
            found[num_thoughts] = row["accuracy"], [line["prediction"] for line in lines]
        return found[num_thoughts]

    return ask


@pytest.fixture(scope="session")
def budget(folder):
    """The checkpoint's own number of thoughts."""
    return MultiCoCoProcessor.from_pretrained(folder).num_thoughts


class Passes:
    """How often a model called its language model in each forward: once without thoughts, `n + 1` times with `n`."""

    def __init__(self):
        self.counts = []

    def check(self, num_prefills, num_thoughts):
        """The thoughts were fed: every prefill took its passes, every step of decoding one."""
        assert self.counts.count(num_thoughts + 1) == num_prefills
        assert set(self.counts) <= {1, num_thoughts + 1}


@contextlib.contextmanager
def counted_passes(model):
    passes = Passes()

    def begin(module, args):
        passes.counts.append(0)

    def count(module, args):
        passes.counts[-1] += 1

    handles = [
        model.register_forward_pre_hook(begin),
        model.model.language_model.register_forward_pre_hook(count),
    ]
    try:
        yield passes
    finally:
        for handle in handles:
            handle.remove()


def answer_of(text):
    """What stands behind the mark of an answer, as score.py reads it."""
    return text.rsplit("### ", 1)[-1].strip()
