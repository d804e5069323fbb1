"""`diagnose.py` on models with planted behaviour, on random ones, and against the plain definition in float64."""

import dataclasses
import html.parser
import json
import re
import shutil
import subprocess

import numpy as np
import pytest
import torch
from reference import reference_embeds, widened

from multicoco import MultiCoCoForConditionalGeneration, diagnose
from multicoco.evaluation import diagnosis as diagnosing
from multicoco.evaluation import experiments, measurements, verdicts
from multicoco.evaluation import page as diagnosis_page
from multicoco.evaluation.settings import parse_settings
from multicoco.evaluation.subject import Subject
from multicoco.recipes.trails.prepare import COLOURS, cell_name, prepare
from multicoco.recipes.trails.start_model import make_model, make_processor
from multicoco.records import load_records


NUM_SAMPLES, NUM_THOUGHTS = 24, 3
HOSTILE = '<script>alert("x")</script> & \'</style>'
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome", "chrome"))), None)
COLOUR_OF = {cell_name(row, column): list(COLOURS)[(4 * row + column) % 8] for row in range(4) for column in range(4)}

# Places in the 128 dimensions of a planted model: the colour of a cell's name, what thoughts carry, what is answered.
FLAG, CELL, CARRIED, ANSWERED, MARKERS, OTHERS = 0, 8, 16, 24, 100, 104


def plant(processor, reads: int | None, num_thoughts: int = NUM_THOUGHTS, num_answers: int = 8):
    """
    A model, made by hand, that answers with the colour that belongs to the start cell's name (`COLOUR_OF`).

    One head looks at the cell's name from everywhere, so that every thought carries the colour. With `reads`, another
    head looks from the end of the block at the thought of this index, and only that is answered; with `None` the
    answer comes from the cell itself and thoughts are ignored. All else (second layer, MLPs) adds nothing. With two
    answers, colours of even number are answered by the first, the others by the second.
    """
    model = make_model(processor, seed=0).eval()
    tokenizer, language_model = processor.tokenizer, model.model.language_model
    for name, parameter in language_model.named_parameters():
        if "norm" not in name:
            parameter.data.zero_()
    table = model.get_input_embeddings().weight.data
    table[:, OTHERS:] = torch.randn(len(table), 128 - OTHERS, generator=torch.Generator().manual_seed(0))
    for place, token in enumerate(("<|start-latent|>", "<|latent|>", "<|end-latent|>")):
        table[tokenizer.convert_tokens_to_ids(token)] = torch.eye(128)[MARKERS + place]
    for cell, colour in COLOUR_OF.items():
        number = list(COLOURS).index(colour)
        (cell_id,), (answer_id,) = (tokenizer.encode(word) for word in (f" {cell}", f"### {colour}"))
        table[cell_id] = torch.eye(128)[FLAG] + torch.eye(128)[CELL + number]
        table[answer_id] = torch.eye(128)[ANSWERED + number]
    model.tie_weights()
    head, attention = 32, language_model.layers[0].self_attn
    frequencies = language_model.rotary_emb.inv_freq  # 16 pairs: place f with place f + 16
    colours = torch.arange(8)
    # Head 0 (keys and values 0): the slowest pair hardly turns, so the key's flag alone decides.
    attention.q_proj.bias.data[15] = 30
    attention.k_proj.weight.data[15, FLAG] = 30
    attention.v_proj.weight.data[colours, CELL + colours] = 1
    attention.o_proj.weight.data[CARRIED + colours, colours] = 100
    if reads is None:
        attention.o_proj.weight.data[ANSWERED + colours, colours] = 100
    else:  # Head 2 (keys and values 1): a turned query is largest at one distance
        distance = (num_thoughts - reads) * frequencies
        attention.q_proj.bias.data[2 * head : 3 * head] = 100 * torch.cat([distance.cos(), -distance.sin()])
        attention.k_proj.bias.data[head : head + 16] = 100
        attention.v_proj.weight.data[head + colours, CARRIED + colours] = 1
        attention.o_proj.weight.data[ANSWERED + colours % num_answers, 2 * head + colours] = 100
    model.config.num_thoughts = num_thoughts
    return model


def save(model, processor, folder):
    processor.num_thoughts = model.config.num_thoughts
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def trails_processor():
    return make_processor(size=4, max_arrows=5)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, trails_processor):
    """
    `trails/cells.jsonl`: boards whose answer is the colour of the start cell's name, one question of them hostile;
    `trails/train.jsonl`: the same boards with their own answers. Checkpoints: `reads-0` ... and `ignores`, planted;
    `random`, in float64; `silent`, the same without a thought block.
    """
    folder = tmp_path_factory.mktemp("diagnose")
    prepare(folder / "trails", num_train=NUM_SAMPLES, num_val=0)
    lines = []
    for number, line in enumerate((folder / "trails" / "train.jsonl").read_text().splitlines()):
        record = json.loads(line)
        record["answer"] = COLOUR_OF[re.search(r"Start at (\w\d)", record["question"])[1]]
        record["steps"] = record["steps"][:2]
        if number == 1:
            record |= {"question": record["question"] + HOSTILE, "id": HOSTILE}
        lines.append(json.dumps(record))
    (folder / "trails" / "cells.jsonl").write_text("\n".join(lines))
    for reads in range(NUM_THOUGHTS):
        save(plant(trails_processor, reads), trails_processor, folder / f"reads-{reads}")
    save(plant(trails_processor, None), trails_processor, folder / "ignores")
    model = make_model(trails_processor, seed=1).to(torch.float64).eval()
    for name, num_thoughts in (("silent", None), ("random", NUM_THOUGHTS)):
        model.config.num_thoughts = num_thoughts
        save(model, trails_processor, folder / name)
    return folder


def flags(folder, model, output_dir, *more, data="cells"):
    words = ["--model", folder / model, "--data", folder / "trails" / f"{data}.jsonl", "--output_dir", output_dir]
    words += ["--report", output_dir / "report.html", "--batch_size", 64, "--max_new_tokens", 1, "--num_drawn", 2]
    return [str(word) for word in (*words, "--num_attention", 3, *more)]


@pytest.fixture(scope="module")
def reports(folder):
    """Of each planted model what diagnosis.json holds; `reads-1` has the random model as its control."""
    found = {}
    for name in ("reads-0", "reads-1", "reads-2", "ignores"):
        more = ("--control", folder / "random") if name == "reads-1" else ()
        found[name] = diagnose.main(flags(folder, name, folder / "out" / name, *more))
    return found


# --- planted behaviour -------------------------------------------------------------------------------------------


def test_thoughts_are_found_to_be_used_where_there_are_only_two_answers(folder, trails_processor, tmp_path):
    """A decoy with another answer than the own one has the donor's: only donors of the own answer can tell."""
    save(plant(trails_processor, 1, num_answers=2), trails_processor, folder / "two-answers")
    lines = []
    for line in (folder / "trails" / "cells.jsonl").read_text().splitlines():
        record = json.loads(line)
        record["answer"] = list(COLOURS)[list(COLOURS).index(record["answer"]) % 2]
        lines.append(json.dumps(record))
    (folder / "trails" / "two.jsonl").write_text("\n".join(lines))
    report = diagnose.main(flags(folder, "two-answers", tmp_path / "out", data="two"))
    found = report["thoughts"]
    assert found["following"]["own_picture"]["test"]["difference"] == 0
    assert found["followed"] == ["same_answer"]
    assert (found["verdict"], found["used_indices"]) == (verdicts.USED, [1])


def flip_rates(report, place):
    return {
        kind: [
            report["experiments"][experiments.name_of(kind, index, place, NUM_THOUGHTS)]["flips"]["rate"]
            for index in range(NUM_THOUGHTS)
        ]
        for kind in experiments.KINDS
    }


@pytest.mark.parametrize("reads", range(NUM_THOUGHTS))
@pytest.mark.parametrize("place", ["inside", "after"])
def test_a_model_that_reads_one_thought_is_found_to_use_that_index(reports, reads, place):
    report = reports[f"reads-{reads}"]
    assert report["experiments"]["intact"]["accuracy"]["rate"] == 1
    assert report["thoughts"]["verdict"] == verdicts.USED
    assert report["thoughts"]["used_indices"] == [reads]
    for kind, rates in flip_rates(report, place).items():
        assert rates[reads] > 0.5, kind
        assert [rate for index, rate in enumerate(rates) if index != reads] == [0] * (NUM_THOUGHTS - 1), kind


@pytest.mark.parametrize("reads", range(NUM_THOUGHTS))
def test_answers_follow_the_donor_of_the_thoughts_that_are_read(reports, reads):
    thoughts = reports[f"reads-{reads}"]["thoughts"]
    for found in thoughts["following"].values():  # these thoughts hold the answer, whatever the picture
        assert found["donor"]["rate"] == 1
        assert found["decoy"]["rate"] < 0.5
    assert thoughts["stays"]["rate"] == 0
    assert thoughts["stays_with_same_answer"]["rate"] == 1


def test_a_model_that_ignores_its_thoughts_is_not_shown_to_use_them(reports):
    report = reports["ignores"]
    assert report["experiments"]["intact"]["accuracy"]["rate"] == 1
    assert report["thoughts"]["verdict"] == verdicts.NOT_SHOWN
    assert report["thoughts"]["harmful"] == report["thoughts"]["used_indices"] == []
    assert flip_rates(report, "inside") == {kind: [0] * NUM_THOUGHTS for kind in experiments.KINDS}
    assert report["thoughts"]["stays"]["rate"] == 1


@pytest.mark.parametrize("name", ["reads-1", "ignores"])
def test_a_picture_that_no_answer_reads_is_not_shown_to_be_used(reports, name):
    picture = reports[name]["picture"]
    assert picture["verdict"] == picture["through_verdict"] == verdicts.NOT_SHOWN


def test_the_answer_of_a_model_that_reads_a_thought_needs_nothing_else(reports):
    """The bottleneck: hidden from the answer, the question is still in the thought; without reading it, it is lost."""
    accuracy = {
        name: {
            sees: reports[name]["experiments"][f"sees-{sees}"]["accuracy"]["rate"]
            for sees in ("no_image", "thoughts_only")
        }
        for name in ("reads-1", "ignores")
    }
    assert accuracy["reads-1"] == {"no_image": 1, "thoughts_only": 1}
    assert accuracy["ignores"]["no_image"] == 1
    assert accuracy["ignores"]["thoughts_only"] < 0.5


def test_thoughts_that_all_samples_share_are_called_collapsed(reports):
    """A thought of the planted models is one of 8 vectors, whatever the index; a random model's differ."""
    for name in ("reads-1", "ignores"):
        found = reports[name]["geometry"]
        assert min(found["spread"]) > measurements.COLLAPSED_SHARE
        assert max(found["effective_rank"]) < 8
    constant = {"spread": [0.5, 0.001], "cosine_with_next": [0.999]}
    assert len(measurements.collapse_warnings(constant)) == 2
    assert measurements.collapse_warnings({"spread": [0.5, 0.02], "cosine_with_next": [0.9]}) == []


def test_pause_thoughts_are_not_shown_to_be_used_though_zeros_do_harm(folder, tmp_path, trails_processor):
    """What is the same for every sample carries nothing: unfamiliar input is not evidence."""
    model = plant(trails_processor, 1)
    model.config.mode, model.config.thought_feedback = (
        "pause_loop",
        "latent",
    )  # a thought is the latent token's embedding: it carries one colour for all
    table = model.get_input_embeddings().weight.data
    table[model.config.latent_token_id, CARRIED] = 5
    records = [json.loads(line) for line in (folder / "trails" / "cells.jsonl").read_text().splitlines()]
    for record in records:
        record |= {"images": [str(folder / "trails" / record["images"][0])], "answer": list(COLOURS)[0]}
    (tmp_path / "red.jsonl").write_text("\n".join(map(json.dumps, records)))
    save(model, trails_processor, tmp_path / "pause")
    words = flags(tmp_path, "pause", tmp_path / "out", "--allow_outside", "True")
    words[words.index("--data") + 1] = str(tmp_path / "red.jsonl")
    report = diagnose.main(words)
    assert report["experiments"]["intact"]["accuracy"]["rate"] == 1
    assert report["experiments"]["zero-all"]["accuracy"]["rate"] < 0.5
    assert report["thoughts"]["verdict"] == verdicts.NOT_SHOWN
    assert len(report["geometry"]["warnings"]) == 2


def test_answers_that_follow_the_donor_only_under_its_picture_count(folder, tmp_path, reports):
    """Thoughts that hold a place: predictions as such a model gives them, put in the place of the recorded ones."""
    shutil.copytree(folder / "out" / "reads-1", tmp_path / "out")
    kept = next((tmp_path / "out" / "experiments").glob("reads-1-*"))

    def lines(name):
        return [json.loads(line) for line in (kept / f"{name}.jsonl").read_text().splitlines()]

    header, *own = lines("swap-all")
    wrong = [header, *({**line, "prediction": "none"} for line in own)]
    (kept / "swap-all.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    report = diagnose.main(flags(folder, "reads-1", tmp_path / "out"))
    assert report["thoughts"]["followed"] == ["donors_picture"]
    assert report["thoughts"]["verdict"] == verdicts.USED
    header, *_ = lines("swap-picture")
    wrong = [header, *({**line, "prediction": "none"} for line in own)]
    (kept / "swap-picture.jsonl").write_text("".join(json.dumps(line) + "\n" for line in wrong))
    report = diagnose.main(flags(folder, "reads-1", tmp_path / "out"))
    assert report["thoughts"]["harmful"] == list(experiments.KINDS)
    assert report["thoughts"]["verdict"] == verdicts.NOT_SHOWN


def test_random_models_yield_no_false_verdict(folder, tmp_path, trails_processor):
    """
    20 seeds; all of them answer with one of 8 colours, so that some answers are right and thoughts may change them.
    Under the rule a false verdict has a probability of at most 5 % a model, much less as the tests are exact ones.
    """
    vocabulary = set(range(len(trails_processor.tokenizer)))
    allowed = {trails_processor.tokenizer.encode(f"### {colour}")[0] for colour in COLOURS}
    changed = 0
    for seed in range(20):
        model = make_model(trails_processor, seed=100 + seed).eval()
        model.generation_config.suppress_tokens = sorted(vocabulary - allowed)
        model.config.num_thoughts = 1
        save(model, trails_processor, tmp_path / "random")
        words = flags(tmp_path, "random", tmp_path / str(seed), "--seed", seed, "--num_attention", 1, "--num_drawn", 0)
        words[words.index("--data") + 1] = str(folder / "trails" / "train.jsonl")
        report = diagnose.main(words)
        assert report["thoughts"]["verdict"] == verdicts.NOT_SHOWN, seed
        assert report["picture"]["verdict"] == report["picture"]["through_verdict"] == verdicts.NOT_SHOWN, seed
        changed += (report["experiments"]["swap-all"]["flips"]["rate"] or 0) > 0  # `None`: all answers are the same
    assert changed >= 5  # else nothing was tested


# --- interventions, from scratch ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def scratch(folder):
    """
    A diagnosis of the random model on 6 samples in float64, its results, and the thoughts of each picture by plain
    recompute.
    """
    arguments = parse_settings(
        diagnose.DiagnoseArguments,
        "",
        flags(folder, "random", folder / "scratch", "--max_samples", 6, "--batch_size", 4),
    )
    arguments.max_new_tokens = 4
    records = load_records(arguments.data)[:6]
    with widened():
        subject = Subject(arguments.model, records, arguments, torch.device("cpu"))
        diagnosis = diagnosing.Diagnosis(subject, output_dir=arguments.output_dir, batch_size=arguments.batch_size)
        results = diagnosis.run()
        subject.load()
        thoughts = {
            picture: torch.stack([plain_embeds(subject, results, row, picture)[1] for row in range(6)])
            for picture in ("own", "grey", "other")
        }
    return diagnosis, results, thoughts


def plain_embeds(subject, results, row, picture="own", edit=None):
    """(T, D) embeddings of one prompt and its thoughts (n, D), whole prefixes again for every thought."""
    others = {"other": results.pictures, "swap": results.donors["swap"]}
    source = int(others[picture][row]) if picture in others else row
    pixels = subject.collator.prompts([subject.dataset.prompt(source, 0)])["pixel_values"].double()
    if picture == "grey":
        image_processor = subject.processor.image_processor
        grey = np.full((56, 56, 3), 127.5) / 255
        pixels[0] = torch.from_numpy((grey - image_processor.image_mean) / image_processor.image_std).permute(2, 0, 1)
    ids = torch.tensor(subject.dataset.prompt(row, NUM_THOUGHTS)["input_ids"])
    with torch.no_grad():
        embeds, thoughts = reference_embeds(subject.model, ids, pixels, edit)
    return embeds, torch.stack(thoughts)


def plain_answer(subject, embeds):
    """Greedy tokens, the whole sequence again for every one, decoded."""
    model, tokens = subject.model, []
    with torch.no_grad():
        while len(tokens) < 4 and model.generation_config.eos_token_id not in tokens:
            hidden = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0, -1]
            scores = model.lm_head(hidden)
            scores[model.generation_config.suppress_tokens] = -torch.inf
            tokens.append(int(scores.argmax()))
            embeds = torch.cat([embeds, model.get_input_embeddings().weight[tokens[-1:]]])
    return subject.processor.tokenizer.decode(tokens, skip_special_tokens=True)


def plain_edit(subject, results, thoughts, experiment, row):
    """What an experiment feeds, straight from its name and the thoughts of a plain recompute."""
    kind, *rest = experiment.name.split("-")
    model = subject.model

    def replaced(thought, index):
        own = thoughts["own"]
        return {
            "zero": lambda: torch.zeros_like(thought),
            "mean": lambda: own[:, index].mean(dim=0, keepdim=True),
            "noise": lambda: thought.norm() * results.noise[row, index][None],
            "pause": lambda: model.get_input_embeddings().weight[model.config.latent_token_id][None],
            "swap": lambda: own[results.donors["swap"][row], index][None],
            "swap_same": lambda: own[results.donors["swap_same"][row], index][None],
            "decoy": lambda: own[results.donors["decoy"][row], index][None],
        }[kind]()

    def edit(thought, index):
        if rest[-1] == "thoughts":
            return thoughts[kind][row, index][None]
        if rest[-1] == "answer":
            return thoughts["own"][row, index][None]
        if rest[-1] == "after":
            thought = thoughts["own"][row, index][None]
        return replaced(thought, index) if rest[0] in ("all", "picture", str(index)) else thought

    return edit


PLAIN = (
    *(f"{kind}-all" for kind in experiments.KINDS),
    *("zero-0-inside", "zero-0-after", "mean-1-inside", "mean-1-after", "noise-0-inside", "noise-1-after"),
    *("noise-all-after", "pause-2-inside", "swap-0-inside", "swap-1-after", "swap_same-all", "swap-picture"),
    *("decoy-picture", "grey-thoughts", "grey-answer", "other-thoughts", "other-answer"),
)


@pytest.mark.parametrize("name", PLAIN)
def test_an_intervention_equals_a_recompute_from_scratch_with_the_edited_embeddings(scratch, name):
    diagnosis, results, thoughts = scratch
    experiment = next(item for item in diagnosis.second if item.name == name)
    rows = [1, 4, 5]
    with widened():
        lines, fed = diagnosis.ask(dataclasses.replace(experiment, records=True), rows, results)
        for place, row in enumerate(rows):
            if not results.changed(experiment)[row]:
                continue
            edit = plain_edit(diagnosis.subject, results, thoughts, experiment, row)
            embeds, expected = plain_embeds(diagnosis.subject, results, row, experiment.picture, edit)
            torch.testing.assert_close(fed[place], expected, atol=1e-9, rtol=0)
            assert lines[place]["text"] == plain_answer(diagnosis.subject, embeds)
            kept = results.lines[name][row]  # asked with other neighbours
            assert kept["text"] == lines[place]["text"]


def test_pictures_are_those_of_a_recompute_from_scratch(scratch):
    _, results, thoughts = scratch
    for picture, name in (("own", "intact"), ("grey", "grey-both"), ("other", "other-both")):
        torch.testing.assert_close(results.thoughts[name], thoughts[picture], atol=1e-9, rtol=0)
    assert not torch.allclose(thoughts["own"], thoughts["grey"], atol=1e-3)
    assert (results.pictures != np.arange(6)).all()
    torch.testing.assert_close(results.noise.norm(dim=-1), torch.ones(6, NUM_THOUGHTS, dtype=torch.float64))


def test_recorded_thoughts_fed_again_change_nothing(scratch):
    diagnosis, results, _ = scratch
    again = experiments.Experiment("again", NUM_THOUGHTS, feed="intact")
    lines, _ = diagnosis.ask(again, range(6), results)
    assert [line["text"] for line in lines] == [line["text"] for line in results.lines["intact"]]


def test_donors_have_the_answer_they_should_and_as_many_tiles():
    answers, tiles = ["a", "b", "a", "b", "a", "c"], [[1], [1], [1], [2], [2], [1]]
    for seed in range(20):
        rng = np.random.default_rng(seed)
        same, other = (experiments.choose_donors(answers, tiles, rng, same=wanted) for wanted in (True, False))
        assert same.tolist() == [2, -1, 0, -1, -1, -1]
        assert other[3] == 4
        assert other[4] == 3
        for sample, donor in enumerate(other):
            assert answers[donor] != answers[sample]
            assert tiles[donor] == tiles[sample]


def test_lens_and_attention_equal_plain_ones(scratch):
    diagnosis, results, thoughts = scratch
    subject, model = diagnosis.subject, diagnosis.subject.model
    with widened():
        lens = measurements.read_lens(subject, NUM_THOUGHTS, batch_size=4)
        attention = measurements.measure_attention(subject, NUM_THOUGHTS, num_samples=3, num_drawn=2)
    expected = model.lm_head(thoughts["own"]).topk(5).indices
    assert lens == expected.tolist()
    for sample in attention:
        assert len(sample["shares"]) == NUM_THOUGHTS + 1
        for shares in sample["shares"]:
            assert sum(shares) == pytest.approx(1)
        assert sample["shares"][0][2] == 0  # before the first thought there is none to look at
    assert len(attention[0]["picture"][0]) == 16
    assert sum(attention[0]["picture"][-1]) == pytest.approx(attention[0]["shares"][-1][0])
    assert model.config._attn_implementation == "sdpa"

    model.set_attn_implementation("eager")
    with torch.no_grad(), widened():
        embeds, _ = plain_embeds(subject, results, 0)
        output = model.model.language_model(inputs_embeds=embeds[None], use_cache=False, output_attentions=True)
    model.set_attn_implementation("sdpa")
    weights = torch.stack(output.attentions)[:, 0].mean(dim=(0, 1))  # over layers and heads: (T, T)
    ids = torch.tensor(subject.dataset.prompt(0, NUM_THOUGHTS)["input_ids"])
    latents, image = ids == model.config.latent_token_id, ids == model.config.image_token_id
    for query, shares in zip([*(latents.nonzero().flatten() - 1).tolist(), -1], attention[0]["shares"], strict=True):
        expected = [weights[query][group].sum() for group in (image, ~image & ~latents, latents)]
        assert shares == pytest.approx([float(share) for share in expected])


def test_a_failed_look_at_attention_leaves_the_model_as_it_was(scratch, monkeypatch):
    """An error inside, as of memory, left the slow attention and a hook in every layer behind."""
    subject = scratch[0].subject
    layers = subject.model.model.language_model.layers

    def fail(module, args, output):
        assert subject.model.config._attn_implementation == "eager"
        raise MemoryError

    before = [dict(layer.self_attn._forward_hooks) for layer in layers]
    monkeypatch.setattr(measurements, "_mean_over_heads", fail)
    with pytest.raises(MemoryError):
        measurements.measure_attention(subject, NUM_THOUGHTS, num_samples=1, num_drawn=0)
    assert subject.model.config._attn_implementation == "sdpa"
    assert [dict(layer.self_attn._forward_hooks) for layer in layers] == before


def test_the_lens_of_constant_thoughts_reads_the_states_before_them(scratch, monkeypatch):
    """Else a control would show nothing, whatever its states hold."""
    diagnosis, results, _ = scratch
    subject, model = diagnosis.subject, diagnosis.subject.model
    monkeypatch.setattr(model.config, "thought_feedback", "latent_one_pass")
    constant = model.get_input_embeddings().weight[model.config.latent_token_id]
    with widened():
        lens = measurements.read_lens(subject, NUM_THOUGHTS, batch_size=4)
        embeds, _ = plain_embeds(subject, results, 1, edit=lambda thought, index: constant[None])
        states = model.model.language_model(inputs_embeds=embeds[None], use_cache=False).last_hidden_state[0]
    assert lens[1] == model.lm_head(states)[-NUM_THOUGHTS - 2 : -2].topk(5).indices.tolist()


def test_the_lens_of_sweeps_reads_the_thoughts_that_were_fed(scratch, monkeypatch):
    """Not the states of the last pass, which are one sweep further."""
    subject = scratch[0].subject
    monkeypatch.setattr(subject.model.config, "thought_sweeps", 1)
    with widened(), torch.no_grad():
        lens = measurements.read_lens(subject, NUM_THOUGHTS, batch_size=4)
        batch = subject.inputs(range(4), NUM_THOUGHTS, subject.encode(range(4)))
        output = subject.model(**batch, return_thoughts=True)
        expected, later = (
            logits.topk(5).indices.tolist()
            for logits in (subject.model.lm_head(output.thoughts), output.logits[:, -NUM_THOUGHTS - 2 : -2])
        )
    assert lens[:4] == expected != later


def test_lens_hits_are_counted_on_the_step_that_a_thought_replaced():
    lens = [[[1, 9], [2, 3], [7, 4]], [[8, 1], [5, 5], [4, 4]]]
    steps = [[1, 3], [1]]
    assert measurements.lens_hits(lens, steps, 1, 0, 0)["top1"] == {0: True, 1: False}
    assert measurements.lens_hits(lens, steps, 1, 0, 0)["top5"] == {0: True, 1: True}
    assert measurements.lens_hits(lens, steps, 1, 1, 0)["top1"] == {0: False}
    assert measurements.lens_hits(lens, steps, 2, 1, 0)["top1"] == {0: False, 1: False}
    assert measurements.lens_hits(lens, steps, 1, 2, 0)["top1"] == {}
    assert measurements.lens_hits(lens, steps, 1, 1, 0)["chance"] == {}  # there is no other sample


@pytest.mark.parametrize("count", [2, 3, 20])
def test_chance_of_the_lens_is_never_a_samples_own_step(count):
    lens, steps = [[[row]] for row in range(count)], [[row] for row in range(count)]
    for seed in range(20):
        hits = measurements.lens_hits(lens, steps, 1, 0, seed)
        assert all(hits["top1"].values())
        assert list(hits["chance"]) == list(hits["top1"])
        assert not any(hits["chance"].values())


def test_effective_rank_counts_directions():
    generator = torch.Generator().manual_seed(0)
    basis = torch.linalg.qr(torch.randn(32, 4, generator=generator, dtype=torch.float64)).Q.T
    assert measurements.effective_rank(torch.cat([basis, -basis]) + 5) == pytest.approx(4)
    assert measurements.effective_rank(torch.ones(7, 32)) == 1


# --- page and files ----------------------------------------------------------------------------------------------


class Links(html.parser.HTMLParser):
    """Names of elements, and what a page would load."""

    def __init__(self):
        super().__init__()
        self.elements, self.links, self.handlers = set(), [], []

    def handle_starttag(self, tag, attributes):
        self.elements.add(tag)
        for name, value in attributes:
            if name in ("src", "href", "srcset", "data", "action", "poster"):
                self.links.append(value)
            if name.startswith("on"):
                self.handlers.append(name)


def test_the_page_loads_nothing_and_escapes_what_others_wrote(folder, reports):
    page = (folder / "out" / "reads-1" / "report.html").read_text(encoding="utf-8")
    links = Links()
    links.feed(page)
    assert links.links
    assert all(link.startswith("data:") for link in links.links)
    assert "script" not in links.elements
    assert links.handlers == []
    assert diagnosis_page.text(HOSTILE) in page
    assert HOSTILE not in page
    assert "url(" not in page
    assert "@import" not in page
    assert {"svg", "img", "table"} <= links.elements


def test_json_and_drawings_hold_finite_numbers_only(folder, reports):
    def refuse(name):
        raise AssertionError(name)

    for name in reports:
        found = json.loads((folder / "out" / name / "diagnosis.json").read_text(), parse_constant=refuse)
        assert found == json.loads(json.dumps(reports[name]))
        page = (folder / "out" / name / "report.html").read_text(encoding="utf-8")
        for number in re.findall(r'(?:cx|cy|x|y|d|points)="([^"]*)"', page):
            assert re.fullmatch(r"[-\d., MHV]*", number)


def test_the_control_stands_beside_the_model(folder, reports):
    control = reports["reads-1"]["control"]
    assert set(control["experiments"]) == {"intact", "grey-both", "other-both"}
    above = control["accuracy_above_control"]["difference"]
    assert above == pytest.approx(1 - control["experiments"]["intact"]["accuracy"]["rate"])
    for row in reports["reads-1"]["lens"]:
        assert {"control", "above_control", "above_chance"} <= set(row)
    assert [(row["index"], row["step"]) for row in reports["reads-1"]["lens"]] == [
        (0, 0),
        (1, 0),
        (2, 1),
    ]  # c_thought 2
    assert len(control["geometry"]["spread"]) == NUM_THOUGHTS


def test_a_model_without_thoughts_gets_a_page_about_its_picture(folder, tmp_path):
    report = diagnose.main(flags(folder, "silent", tmp_path / "out", "--max_samples", 4))
    assert set(report["experiments"]) == {"intact", "grey-both", "other-both"}
    assert "thoughts" not in report
    assert report["verdict_tests"]["number"] == 2
    assert "It has no thoughts." in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium, chromium-browser, google-chrome or chrome on the PATH")
@pytest.mark.parametrize("width", [400, 1400])
def test_the_page_opens_in_chromium(folder, reports, tmp_path, width):
    """Its content policy makes any request a console error; a copy without it reports its width from inside."""
    page = (folder / "out" / "reads-1" / "report.html").read_text(encoding="utf-8")
    measured = re.sub(r"<meta http-equiv=[^>]*>", "", page).replace(
        "</body>", "<script>document.title=innerWidth+' '+document.documentElement.scrollWidth</script></body>"
    )
    found = []
    for name, content in (("page", page), ("measured", measured)):
        (tmp_path / f"{name}.html").write_text(content, encoding="utf-8")
        command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr"]
        command += [f"--user-data-dir={tmp_path / 'profile'}", f"--window-size={width},900", "--dump-dom"]
        command += [f"--screenshot={tmp_path / name}.png"] if name == "page" else []
        command.append((tmp_path / f"{name}.html").as_uri())
        found.append(subprocess.run(command, capture_output=True, text=True, timeout=120, check=True))
    assert "CONSOLE" not in found[0].stderr
    assert "The thoughts are used." in found[0].stdout
    inner, content_width = map(int, re.search(r"<title>(\d+) (\d+)</title>", found[1].stdout).groups())
    assert content_width <= inner


def test_a_rerun_skips_what_is_finished(folder, tmp_path, monkeypatch):
    asked, ask = [], diagnosing.Diagnosis.ask

    def recorded(self, experiment, rows, results, features=None):
        asked.append((experiment.name, list(rows)))
        return ask(self, experiment, rows, results, features)

    monkeypatch.setattr(diagnosing.Diagnosis, "ask", recorded)
    words = flags(folder, "random", tmp_path / "out", "--max_samples", 4, "--batch_size", 2)
    first = diagnose.main(words)
    assert len(asked) == 2 * len(first["experiments"])
    kept = next((tmp_path / "out" / "experiments").iterdir())

    asked.clear()
    with monkeypatch.context() as patch:  # nothing is left to do, so no model is loaded
        patch.setattr(MultiCoCoForConditionalGeneration, "from_pretrained", None)
        assert diagnose.main(words) == first
    assert asked == []

    path = kept / "zero-1-after.jsonl"  # killed in the middle of the third line
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:20])
    (kept / "grey-both.safetensors").unlink()  # killed before the thoughts were written
    assert diagnose.main(words) == first
    assert asked == [("grey-both", [0, 1]), ("grey-both", [2, 3]), ("zero-1-after", [2, 3])]
    assert path.read_bytes() == b"".join(lines)

    asked.clear()
    diagnose.main([*words, "--seed", "1"])  # other settings: other files
    assert len(asked) == 2 * len(first["experiments"])


def test_settings_come_from_a_file_and_flags_win(tmp_path):
    (tmp_path / "settings.yaml").write_text("model: out\ndata: val.jsonl\nbatch_size: 7\ncontrol: null\nseed: 3\n")
    arguments = parse_settings(diagnose.DiagnoseArguments, "", [str(tmp_path / "settings.yaml"), "--seed", "5"])
    assert (arguments.model, arguments.batch_size, arguments.seed, arguments.control) == ("out", 7, 5, None)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--batch_size", 0), "`--batch_size` must be at least 1, got 0"),
        (("--max_samples", 1), "`--max_samples` must be at least 2, got 1"),
        (("--num_thoughts", -1), "`--num_thoughts` must be at least 0, got -1"),
        (("--control", "nowhere/control"), "`--control` nowhere/control: no checkpoint"),
        (("--metric", "nowhere.py:score"), "`--metric` is 'nowhere.py:score', expected"),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) else "",
)
def test_bad_settings_are_named_before_anything_is_computed(folder, tmp_path, more, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        diagnose.main(flags(folder, "random", tmp_path / "out", *more))
    assert not list(tmp_path.rglob("*.jsonl"))


def test_intervals_and_tests_of_differences():
    first, second = [1.0] * 30 + [0.0] * 10, [0.0] * 20 + [1.0] * 10 + [0.0] * 10
    found = verdicts.difference(first, second)
    assert found["difference"] == pytest.approx(0.5)
    assert found["low"] < 0.5 < found["high"]
    assert found["above_0"]
    assert not verdicts.difference(second, first)["above_0"]
    few = verdicts.difference([1.0] * 5, [0.0] * 5)  # every resample is above 0, yet 5 samples prove nothing
    assert few["low"] > 0
    assert not few["above_0"]
    assert found["num_tests"] == 1
    assert not verdicts.difference([1.0] * 8 + [0.0] * 8, [0.0] * 16, num_tests=20)["above_0"]
    assert verdicts.difference([], []) is None
    assert verdicts.difference([0.5, 1.0], [0.0, 0.25])["mcnemar_p"] is None


def test_a_few_shares_of_a_point_prove_nothing():
    """The interval of two samples that both fall is above 0 at any level; they fall by chance once in four times."""
    found = verdicts.difference([1 / 3, 2 / 3], [0, 1 / 3], num_tests=24)
    assert found["low"] > 0
    assert not found["above_0"]
    assert verdicts.difference([2 / 3] * 20, [1 / 3] * 20, num_tests=24)["above_0"]
