"""The scorers: cases worked by hand from the rules of the official scripts, and properties that hold for any text."""
import json
import math
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsft.metrics import ARTICLES, BITS, METRICS, SCORERS, answer_tokens, bits_per_byte, direction, exact_match, f1

REAL = Path(__file__).parents[2] / "shared" / "real"
KNOWN = sorted((scorer, lang) for scorer, rules in SCORERS.items() for lang in rules.languages)
texts = st.text(alphabet=st.sampled_from("aThe  dlsi.,!?'’-，。؟、الشمسسؤ太阳系中心xeđạpcủa1DNA\n\u3000ไทย"), max_size=20)
answers = st.lists(texts, min_size=1, max_size=3)
known = st.sampled_from(KNOWN)

# scorer, language, prediction, references, F1: the token counts stand beside each
WORKED = [
    ("mlqa", "zh", "太阳系的中心太阳", ["太阳"], 2 * 2 / (8 + 2)),  # 太 阳 in common
    ("mlqa", "zh", "太阳系的中心太阳", ["太阳", "太阳系的中心"], 2 * 6 / (8 + 6)),  # the better reference
    ("mlqa", "zh", "DNA，双螺旋", ["dna"], 2 * 1 / (4 + 1)),  # dna 双 螺 旋
    ("mkqa", "zh", "DNA，双螺旋", ["dna"], 2 * 3 / (7 + 3)),  # d n a ， 双 螺 旋
    ("mkqa", "zh_tw", "太陽", ["太陽"], 1.0),
    ("mlqa", "zh", "《红楼梦》", ["红楼梦"], 1.0),
    ("mkqa", "zh", "《红楼梦》", ["红楼梦"], 2 * 3 / (5 + 3)),  # 《 and 》 are not ASCII
    ("mlqa", "zh", "1958年 5月", ["1958年5月"], 1.0),  # 1958 年 5 月
    ("mlqa", "en", "The U.S. theory", ["a us theory"], 1.0),
    ("mlqa", "en", "in the year 1066", ["1066"], 2 * 1 / (3 + 1)),
    ("squad", "en", "The “Sun”", ["sun"], 0.0),  # curly quotes are not ASCII: another word
    ("mlqa", "en", "The “Sun”", ["sun"], 1.0),
    ("mlqa", "vi", "chiếc xe đạp của những người", ["xe đạp"], 2 * 2 / (3 + 2)),  # xe đạp người
    ("mlqa", "vi", "thủ đô là Hà Nội.", ["Hà Nội"], 2 * 2 / (4 + 2)),  # thủ đô hà nội
    ("mkqa", "vi", "hà nội", ["Thành phố Hà Nội"], 2 * 2 / (2 + 4)),
    ("mlqa", "ar", "القاهرة", ["قاهرة"], 1.0),  # the article goes
    ("mlqa", "ar", "في القاهرة؟", ["القاهرة"], 2 * 1 / (2 + 1)),
    ("mkqa", "ar", "القاهرة؟", ["القاهرة"], 0.0),  # ؟ stays under mkqa
    ("mlqa", "ar", "سؤال", ["سؤ"], 1.0),  # the article pattern also matches inside a word
    ("mlqa", "es", "las Islas Canarias", ["Islas Canarias"], 1.0),
    ("mlqa", "es", "¿Madrid?", ["Madrid"], 1.0),
    ("mkqa", "es", "¿Madrid?", ["Madrid"], 0.0),  # ¿ is not ASCII
    ("mlqa", "de", "der Dom des Bischofs", ["Dom"], 2 * 1 / (2 + 1)),
    ("mlqa", "hi", "नई दिल्ली।", ["नई दिल्ली"], 1.0),  # the danda is punctuation
    ("mkqa", "fr", "les pommes", ["s pommes"], 1.0),  # "le" matches first and leaves the s
    ("mkqa", "fr", "l'eau", ["leau"], 1.0),  # the apostrophe goes before the article could match
    ("mkqa", "it", "Italia", ["talia"], 1.0),  # the article i has no closing word boundary
    ("mkqa", "pt", "o gato", ["gato"], 1.0),
    ("mkqa", "de", "der Dom des Bischofs", ["Dom"], 2 * 1 / (2 + 1)),
    ("mkqa", "nl", "het huis", ["een huis"], 1.0),
    ("mkqa", "sv", "ett hus", ["hus"], 1.0),
    ("mkqa", "da", "et hus", ["hus"], 1.0),
    ("mkqa", "no", "ei bok", ["bok"], 1.0),
    ("mkqa", "fi", "se talo", ["talo"], 1.0),
    ("mkqa", "ru", "в Москве", ["Москва"], 0.0),  # no rules: another form is another word
    ("mkqa", "hu", "ez egy alma", ["ez alma"], 1.0),
    ("mkqa", "ja", "東京 タワー", ["東京タワー"], 1.0),
    ("mkqa", "th", "ไทย", ["ไ"], 2 * 1 / (3 + 1)),
    ("mkqa", "km", "ភាសា", ["ភា"], 2 * 2 / (4 + 2)),
    ("mkqa", "ko", "서울 시", ["서울"], 2 * 1 / (2 + 1)),  # Korean is split at spaces
    ("mkqa", "en", "", [""], 1.0),  # "no answer" is right
    ("mkqa", "en", "", ["x"], 0.0),
    ("mkqa", "en", "the", ["", "x"], 1.0),  # nothing is left of "the"
    ("mlqa", "en", "", [""], 0.0),
    ("squad", "en", "the", ["a"], 0.0),
    ("squad", "en", "to be or not to be", ["to be"], 2 * 2 / (6 + 2)),  # counted with repetition
]


@pytest.mark.parametrize(("scorer", "lang", "prediction", "references", "expected"), WORKED)
def test_f1_by_hand(scorer, lang, prediction, references, expected):
    assert f1(prediction, references, lang, scorer) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize(
    ("scorer", "lang", "prediction", "references", "expected"),
    [
        ("mlqa", "zh", "太阳。", ["月亮", "太阳"], 1.0),
        ("mkqa", "zh", "太阳。", ["太阳"], 0.0),
        ("mlqa", "zh", "阳太", ["太阳"], 0.0),  # F1 is 1, the order is not
        ("mlqa", "en", "the  Sun", ["sun!"], 1.0),
        ("mlqa", "en", "", ["the"], 1.0),  # both empty: an exact match in every script
        ("squad", "en", "sun", ["suns"], 0.0),
    ],
)
def test_exact_match_by_hand(scorer, lang, prediction, references, expected):
    assert exact_match(prediction, references, lang, scorer) == expected


def test_default_scorer_is_mlqa():
    assert f1("《红楼梦》", ["红楼梦"], "zh") == 1.0 == exact_match("《红楼梦》", ["红楼梦"], "zh")


@pytest.mark.parametrize("score", [f1, exact_match])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", ["x"], "en", "bleu"), "scorer: 'bleu' is not one of mlqa, mkqa, squad"),
        (("x", ["x"], "ja", "mlqa"), "lang: the mlqa scorer has no rules for 'ja', only for ar de en es hi vi zh"),
        (("x", ["x"], "zh", "squad"), "lang: the squad scorer has no rules for 'zh', only for el en ro ru th tr"),
        (("x", [], "en", "mlqa"), "answers: expected a list of at least one reference answer, got []"),
        (("x", "x", "en", "mkqa"), "answers: expected a list of at least one reference answer, got 'x'"),
    ],
)
def test_one_clear_error(score, arguments, message):
    with pytest.raises(ValueError) as error:
        score(*arguments)
    assert str(error.value) == message


def test_mkqa_knows_all_its_languages():
    named = "ar da de en es fi fr he hu it ja km ko ms nl no pl pt ru sv th tr vi zh_cn zh_hk zh_tw"
    assert SCORERS["mkqa"].languages == {*named.split(), "zh"}
    assert set(ARTICLES) <= SCORERS["mkqa"].languages


@given(known, texts, answers)
def test_range_and_best_reference(which, prediction, references):
    scorer, lang = which
    value = f1(prediction, references, lang, scorer)
    assert 0 <= value <= 1
    assert value == max(f1(prediction, [r], lang, scorer) for r in references)
    assert exact_match(prediction, references, lang, scorer) in (0.0, 1.0)


@given(known, texts, texts)
def test_symmetry(which, a, b):
    scorer, lang = which
    assert f1(a, [b], lang, scorer) == f1(b, [a], lang, scorer)
    assert exact_match(a, [b], lang, scorer) == exact_match(b, [a], lang, scorer)


@given(known, texts)
def test_an_answer_equals_itself(which, text):
    scorer, lang = which
    assert exact_match(text, [text], lang, scorer) == 1
    nothing_left = not answer_tokens(text, lang, scorer)
    assert f1(text, [text], lang, scorer) == (0 if nothing_left and scorer != "mkqa" else 1)


@given(known, texts, texts)
def test_exact_match_implies_full_f1_and_f1_ignores_order(which, a, b):
    scorer, lang = which
    tokens = answer_tokens(a, lang, scorer)
    if tokens and exact_match(a, [b], lang, scorer):
        assert f1(a, [b], lang, scorer) == 1
    shuffled = sorted(answer_tokens(b, lang, scorer))
    assert (f1(a, [b], lang, scorer) == 1) == (bool(tokens or scorer == "mkqa") and sorted(tokens) == shuffled)


@given(known, texts, texts)
def test_case_and_outer_space_do_not_count(which, a, b):
    scorer, lang = which
    assert f1(f"  {a.lower()}\n", [b], lang, scorer) == f1(a, [b], lang, scorer)


@pytest.mark.skipif(not REAL.exists(), reason="the folder ../shared/real with real benchmark pieces is not here")
@pytest.mark.parametrize("lang", ["en", "zh", "vi", "ar"])
def test_references_of_the_real_benchmark_score_full_against_themselves(lang):
    articles = json.loads((REAL / "xquad" / f"xquad.{lang}.json").read_text(encoding="utf-8"))["data"]
    references = [qa["answers"][0]["text"] for a in articles for p in a["paragraphs"] for qa in p["qas"]]
    assert len(references) > 600
    for scorer in ("mlqa", "mkqa"):
        assert all(f1(r, [r], lang, scorer) == 1.0 for r in references if answer_tokens(r, lang, scorer))


# ---- bits a byte
@pytest.mark.parametrize(
    ("probability", "answer", "expected"),
    [
        (1 / 2, "a", 1.0),
        (1 / 256, "a", 8.0),  # as if every byte were as likely
        (1 / 64, "sun", 2.0),
        (1 / 64, "太阳", 1.0),  # three bytes a character
        (1 / 16, "é", 2.0),  # two bytes
        (1 / 16, "😀", 1.0),  # four
        (1 / 4, "شم", 0.5),  # two bytes a letter
        (1.0, "sun", 0.0),
    ],
)
def test_bits_per_byte(probability, answer, expected):
    assert bits_per_byte(math.log(probability), answer) == pytest.approx(expected)


@given(st.floats(-500, 0), st.text(min_size=1, max_size=20).filter(lambda text: text.isprintable()))
def test_bits_are_those_of_all_bytes(log_likelihood, answer):
    """The bits of all bytes together say how likely the answer is."""
    assert 2 ** -(bits_per_byte(log_likelihood, answer) * len(answer.encode())) == pytest.approx(math.exp(log_likelihood))


def test_an_empty_answer_has_no_bits():
    with pytest.raises(ValueError, match="empty"):
        bits_per_byte(-1.0, "")


def test_of_bits_alone_less_is_better():
    assert [name for name in METRICS if direction(name) < 0] == [BITS] == [name for name, metric in METRICS.items() if not metric.percent]
    assert direction("a metric that nobody knows") == 1
