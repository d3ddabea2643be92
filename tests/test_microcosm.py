"""The microcosm: tables, grammar, determinism, and the border between what is trained on and what is tested."""
import hashlib
import itertools
import random
import re
from collections import Counter

import pytest

from dsft.metrics import BENCHMARKS
from dsft.microcosm import INSTRUCTED, TARGET_EVENTS, TARGET_KNOWLEDGE, TARGET_RELATIONS, World
from dsft.phrasebook import LANGUAGES, TARGETS, Line, read_shipped
from dsft.pretraining_text import Mix, pretraining_texts

SCRIPTS = {"en": r"[A-Za-z ]+", "zh": r"[一-鿿]+", "vi": r"[A-Za-zÀ-ỹĐđ\- ]+", "ar": r"[ء-ي ]+"}
ENDS = {"en": ".?", "zh": "。？", "vi": ".?", "ar": ".؟"}
LEXICON, PHRASINGS = read_shipped("lexicon.csv"), read_shipped("phrasings.csv")
world = World()


def documents(n: int, mix: Mix = Mix(), seed: int = 0) -> list[str]:
    return list(itertools.islice(pretraining_texts(world, mix, seed), n))


def row_of(kind: str, word: str) -> int:
    return [row["en"] for row in world.concepts[kind]].index(word)


def test_the_world_is_as_large_as_promised():
    assert len(LEXICON) >= 400 and len(world.relations) >= 24 and len(world.events) >= 24
    assert min(Counter(world.types[relation] for relation in world.relations).values()) >= 4
    assert {"person", "city", "food", "animal", "job", "colour", "thing", "number", "day", "quality", "class"} <= set(world.concepts)
    for (relation, kind), wordings in world.phrasings.items():
        assert len(wordings) == (1 if relation in world.events else 3), (relation, kind)


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_cell_of_the_lexicon_is_filled_and_in_its_script(language):
    for row in LEXICON:
        assert re.fullmatch(SCRIPTS[language], row[language]), row
        assert row[language] == " ".join(row[language].split())


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_two_concepts_of_a_type_share_a_word(language):
    for kind, rows in world.concepts.items():
        words = [row[language] for row in rows]
        assert len(words) == len(set(words)), kind


def test_grammar_columns():
    subjects = set(world.subjects.values()) - {"exercise"}
    assert all(row["gender"] in ("m", "f") for row in LEXICON if row["type"] in subjects)
    assert all(row["ar_f"] and row["ar_f"] != row["ar"] for row in world.concepts["job"])
    assert all(row["zh_class"] and row["vi_class"] for row in world.concepts["animal"])
    with_classifier = {row["type"] for row in PHRASINGS if "{c}" in row["zh"] + row["vi"]}
    assert with_classifier == {"animal"}


def test_what_is_known_names_concepts_and_relations_of_the_tables():
    told = {fact.split(": ")[0] for row in LEXICON for fact in row["facts"].split("; ") if fact}
    assert told == {*world.knowledge, "size"}
    for row in LEXICON:
        for relation, value in (fact.split(": ") for fact in row["facts"].split("; ") if fact):
            if relation != "size":
                assert world.subjects[relation] == row["type"] and row_of(world.types[relation], value) >= 0
    opposites = {row["en"]: row["facts"].split(": ")[1] for row in world.concepts["quality"]}
    assert all(opposites[opposites[word]] == word for word in opposites)


def test_every_phrasing_has_its_slots_and_punctuation():
    for row in PHRASINGS:
        for language in LANGUAGES:
            text = row[language]
            if row["kind"] == "frame":
                assert text.count("{s}") == 1
                continue
            assert ("{n}" in text) == (row["subject"] != "exercise"), row
            assert ("{v}" in text) == (row["kind"] == "statement" or row["relation"] == "larger"), row
            assert text[-1] in ENDS[language] and (text[-1] in "?？؟") == (row["kind"] == "question"), row
            assert "/" not in re.sub(r"\[[^\[\]]+/[^\[\]]+\]", "", text), row
            if language == "zh":
                assert not re.search(r"[,.?:]", text), row
            if language == "ar":
                assert not re.search(r"[,?;]", text), row


def test_no_two_phrasings_of_different_relations_about_the_same_subjects_are_the_same():
    for language in LANGUAGES:
        relations = {}
        for row in PHRASINGS:
            assert relations.setdefault((row["subject"], row[language]), row["relation"]) == row["relation"], row


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_phrasing_renders_every_value_for_both_genders(language):
    people = [next(p for p in world.persons if world.concepts["person"][p]["gender"] == gender) for gender in "mf"]
    for relation, wording in itertools.product((*world.relations, *world.knowledge), range(3)):
        subjects = people if relation in world.relations else range(len(world.concepts[world.subjects[relation]]))
        rendered = set()
        for subject in subjects:
            question = world.say(Line(relation, "question", wording, subject), language)
            assert not re.search(r"[{}\[\]/|]|  ", question)
            for value in range(len(world.concepts[world.types[relation]])):
                line = Line(relation, "statement", wording, subject, value)
                sentence, name = world.say(line, language), world.concepts[world.subjects[relation]][subject][language]
                assert world.say(line._replace(kind="value"), language) in sentence
                assert name in sentence or name[0].upper() + name[1:] in sentence
                assert not re.search(r"[{}\[\]/|]|  ", sentence) and sentence[0] == sentence[0].upper()
                rendered.add(sentence)
        assert len(rendered) == len(subjects) * len(world.concepts[world.types[relation]])


def test_arabic_agrees_with_the_subject_and_english_with_the_vowel():
    doctor, engineer = row_of("job", "doctor"), row_of("job", "engineer")
    sara, omar = row_of("person", "Sara"), row_of("person", "Omar")
    assert world.say(Line("work", "statement", 0, sara, doctor), "ar") == "تعمل سارة بمهنة طبيبة."
    assert world.say(Line("work", "statement", 0, omar, doctor), "ar") == "يعمل عمر بمهنة طبيب."
    assert world.say(Line("work", "statement", 0, omar, engineer), "en") == "Omar works as an engineer."
    turtle, lion = row_of("animal", "turtle"), row_of("animal", "lion")
    assert world.say(Line("habitat", "statement", 0, turtle, row_of("habitat", "river")), "ar") == "تعيش السلحفاة في النهر."
    assert world.say(Line("habitat", "statement", 0, lion, row_of("habitat", "forest")), "ar") == "يعيش الأسد في الغابة."


def test_classifiers():
    horse = row_of("animal", "horse")
    assert "一匹马" in world.say(Line("pet", "statement", 0, 0, horse), "zh")
    assert "một con ngựa" in world.say(Line("pet", "statement", 0, 0, horse), "vi")


def test_the_text_is_the_same_on_every_machine():
    digest = hashlib.sha256("\n\n".join(documents(1000)).encode()).hexdigest()[:16]
    assert digest == "89b25cf5ebf547c7"
    assert documents(50) != documents(50, seed=1)
    assert world.instructions(20, 3) == World().instructions(20, 3)
    assert world.instructions(20, 3) == world.instructions(40, 3)[:20]
    assert world.instructions(20, 3, without=()) == world.instructions(20, 3) != world.instructions(20, "held_out")


def test_instructions_without_others():
    first = world.instructions(200)
    rest = world.instructions(200, without=first[:60])
    for language in LANGUAGES:
        assert {str(item[language]) for item in rest}.isdisjoint({str(item[language]) for item in first[:60]})
    meanings = lambda items: [{k: v for k, v in item.items() if k != "id"} for item in items]
    assert meanings(rest)[:140] == [item for item in meanings(first) if item not in meanings(first[:60])][:140]
    assert len({item["id"] for item in rest}) == 200


def told_in(text: str) -> set[str]:
    """The sentences of a text in any of the languages, without questions and bare answers."""
    return {sentence.strip() for sentence in re.findall(r"[^。？.?؟\n=:：]+[。.]", text)}


@pytest.fixture(scope="module")
def trained():
    """What is told in plenty of text of every language, and in the instructions."""
    sentences = {sentence for text in documents(40_000, Mix(english=0.4)) for sentence in told_in(text)}
    for item in world.instructions(3000):
        sentences |= {s for language in LANGUAGES for s in told_in(item[language]["query"] + "\n" + item[language]["answer"])}
    return sentences


@pytest.mark.parametrize("name", ["xquad", "mlqa", "xnli", "xcopa", "xstorycloze"])
def test_nothing_that_a_benchmark_tells_about_a_person_is_in_any_training_text(name, trained):
    for item in world.benchmark(name, 300) + world.benchmark(name, 100, split="dev"):
        for language in LANGUAGES:
            told = told_in(item[language]["query"])
            assert told and not told & trained, told & trained


def test_no_translation_of_the_benchmark_is_in_any_training_text(trained):
    for item in world.benchmark("flores", 300):
        assert set(item) == {"id", "relation", "seen"} | {f"en-{lang}" for lang in TARGETS} | {f"{lang}-en" for lang in TARGETS}
        for lang in TARGETS:
            assert item[f"en-{lang}"]["answers"][0] not in trained and item[f"{lang}-en"]["answers"][0] not in trained
            assert item[f"en-{lang}"]["answers"][0] in item[f"{lang}-en"]["query"]


def test_knowledge_of_the_benchmarks_is_told_in_english_only():
    facts = [fact for relation in world.knowledge for fact in world.known[relation, "test"]]
    told = {language: {world.say(fact._replace(wording=wording), language) for fact in facts for wording in range(3)} for language in LANGUAGES}
    english = {sentence for text in documents(40_000, Mix(english=1, tasks=0, knowledge=0.9)) for sentence in told_in(text)}
    assert len(told["en"] & english) > 0.9 * len(told["en"])
    shared = told["en"] | {world.say(fact._replace(wording=w, kind="question"), "en") for fact in facts for w in range(3)}
    others = documents(40_000, Mix(english=0, target_knowledge=0.4, repetition=0, target_tasks=0.3, parallel=0.3))
    for language in TARGETS:  # a sentence without a word that differs is the same in both languages: there is none
        assert not told[language] & shared
    sentences = {sentence for text in others for sentence in told_in(text)}
    assert not set().union(*told.values()) & sentences
    asked = {(world.say(fact._replace(wording=w, kind="question"), language), world.say(fact._replace(kind="value"), language))
             for fact in facts for w in range(3) for language in LANGUAGES}
    pairs = {pair for text in others for pair in itertools.pairwise(text.split("\n"))}
    pairs |= {(item[language]["query"], item[language]["answer"]) for item in world.instructions(3000) for language in LANGUAGES}
    assert not asked & pairs
    for item in world.benchmark("mkqa", 500):
        assert (item["zh"]["query"], item["zh"]["answers"][0]) in asked


def test_held_out_parts_are_disjoint_and_complete():
    for (person, relation, part), values in world.values.items():
        other = world.values[person, relation, "train" if part == "test" else "test"]
        assert len(values) >= 2 and not set(values) & set(other) and len(values) + len(other) == len(world.concepts[world.types[relation]])
    for (event, part), people in world.people.items():
        assert people and not set(people) & set(world.people[event, "train" if part == "test" else "test"])
    for relation in world.knowledge:
        assert not {fact.subject for fact in world.known[relation, "train"]} & {fact.subject for fact in world.known[relation, "test"]}


def test_instructions_teach_only_instructed_topics_and_every_type_of_value():
    taught = Counter(item["relation"] for item in world.instructions(3000))
    assert set(taught) == INSTRUCTED
    for kind in {world.types[relation] for relation in world.relations}:
        relations = {relation for relation in world.relations if world.types[relation] == kind}
        assert relations & INSTRUCTED and relations - INSTRUCTED
    assert {*TARGET_RELATIONS, *TARGET_EVENTS, *TARGET_KNOWLEDGE} <= INSTRUCTED
    assert len(set(world.relations) - INSTRUCTED) >= 8


@pytest.mark.parametrize("name", BENCHMARKS)
def test_benchmarks_are_distinct_balanced_parallel_and_split(name):
    items, dev = world.benchmark(name, 500), world.benchmark(name, 150, split="dev")
    for some in (items, dev):
        assert len({item["id"] for item in some}) == len({str(list(item.values())[3:]) for item in some}) == len(some)
        assert all(item["seen"] == (item["relation"] in INSTRUCTED) for item in some)
    assert not {str(list(item.values())[3:]) for item in items} & {str(list(item.values())[3:]) for item in dev}
    assert 0.3 < sum(item["seen"] for item in items) / 500 < 0.9
    if "label" in items[0].get("en", ""):
        options = len(items[0]["en"]["choices"])
        counts = Counter(item["en"]["label"] for item in items)
        assert len(counts) == options and min(counts.values()) > 500 / options * 0.7
        for item in items:
            assert len({item[language]["label"] for language in LANGUAGES}) == 1
            assert all(len(set(item[language]["choices"])) == options for language in LANGUAGES)
        assert world.chance(name) == pytest.approx(100 / options)
    elif name in ("xquad", "mlqa"):
        assert all(item[language]["answers"][0] in item[language]["query"] for item in items for language in LANGUAGES)


def test_a_request_that_the_world_cannot_meet_is_an_error():
    with pytest.raises(ValueError, match="benchmark mkqa, test: 50000 different items asked for, the world has only about"):
        world.benchmark("mkqa", 50_000)
    with pytest.raises(ValueError, match="squad.*xquad"):
        world.benchmark("squad", 1)


def test_right_and_wrong_choices_are_equally_long_on_average():
    for name, language in itertools.product(("xcopa", "xstorycloze"), LANGUAGES):
        pairs = [(item[language]["choices"], item[language]["label"]) for item in world.benchmark(name, 1000)]
        difference = sum(len(choices[label]) - len(choices[1 - label]) for choices, label in pairs) / len(pairs)
        assert abs(difference) < 1.0, (name, language)


def test_rumours_are_false_and_among_the_choices():
    for relation in world.knowledge:
        for fact in world.known[relation, "test"]:
            rumour = world.rumour(fact)
            assert rumour is None or rumour.value != fact.value and rumour.value in world.known_values[relation]
    for item in world.benchmark("truthfulqa", 200):
        assert len(item["en"]["choices"]) == 4


def test_passages_have_distinct_types_and_at_most_two_people():
    rng = random.Random(0)
    for _ in range(200):
        facts = world.facts(rng, 4, "train")
        assert len({world.types[fact.relation] for fact in facts}) == 4 and len({fact.subject for fact in facts}) <= 2


def test_the_mix_is_obeyed():
    for wrong in ({"english": 1.5}, {"enlish": 0.5}, {"zh": -1}):
        with pytest.raises(ValueError):
            Mix(**wrong)
    with pytest.raises(ValueError, match="weights"):
        documents(1, Mix(zh=0, vi=0, ar=0))
    assert all(text.isascii() for text in documents(500, Mix(english=1.0)))
    lines = documents(5000)
    english = [text for text in lines if text.isascii() and " = " not in text]  # a Vietnamese line may be ASCII: "Adam = Adam"
    assert abs(len(english) / len(lines) - Mix().english) < 0.03
    pure = Mix(english=0, vi=0, ar=0, code_switch=0, english_answers=0, latin_names=0, parallel=0)
    only = documents(1000, pure)
    assert not any(re.search("[A-Za-z]", text) for text in only)
    latin = documents(1000, pure.model_copy(update={"latin_names": 1}))
    assert sum(bool(re.search("[A-Za-z]", text)) for text in latin) > 700
    switched = documents(1000, pure.model_copy(update={"code_switch": 1}))
    assert sum(bool(re.search("[A-Za-z]", text)) for text in switched) > 500
    answered = [text.split("\n") for text in documents(1000, pure.model_copy(update={"english_answers": 1, "target_tasks": 0.9, "repetition": 0}))]
    questions = [lines for lines in answered if len(lines) > 1]
    assert len(questions) > 800
    assert all(not re.search("[A-Za-z]", query) and answer.isascii() for lines in questions for query, answer in zip(lines[::2], lines[1::2]))


def test_sentences_are_parallel_and_distinct():
    sentences = world.sentences(300)
    for language in LANGUAGES:
        assert len({sentence[language] for sentence in sentences}) > 290
    assert {"id", *LANGUAGES} == set(sentences[0])


def test_what_the_instructions_say_can_be_translated():
    assert all(world.translate("no such answer", language) is None for language in TARGETS)
    for item, language in itertools.product(world.instructions(300), TARGETS):
        assert world.translate(item["en"]["query"], language) == item[language]["query"]
        answer = item["en"]["answer"]
        assert world.translate(answer, language) == (item[language]["answer"] if answer.endswith(".") else world.dictionary(language)[answer])
