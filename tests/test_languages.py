"""Codes of languages in every spelling, languages that share a script, and Unicode's two forms of a character: the same results everywhere."""

import json
import random
import unicodedata

import pytest
from test_tasks import DIRECTION, FILES, PLACE, asked, data_dir, plain  # noqa: F401

from dsft import tasks
from dsft.benchmark_items import check_benchmarks, load_items
from dsft.code_switching import code_switch, read_dictionary
from dsft.data import parallel_rows
from dsft.files import ParamsError
from dsft.languages import ALPHABETS, check_language, foreign, is_unspaced, language_name, nearest, script_of, to_nfc
from dsft.metrics import BENCHMARKS, answer_tokens, exact_match, f1, f1_script
from dsft.prompts import WORDING, benchmark_wording, harness_file
from dsft.recipes.sdrrl import SDRRLOptions, _completion, resources
from dsft.settings import DataParams, EvalParams
from dsft.study import Study, files_named_in

CHINESE = ["zh-CN", "zh-Hans", "zh_Hans", "zho_Hans", "zh-Hans-CN", "zh_CN", "cmn", "zh"]

# The first article of the Universal Declaration of Human Rights.
ARTICLE = {
    "ar": "يولد جميع الناس أحراراً متساوين في الكرامة والحقوق. وقد وهبوا عقلاً وضميراً وعليهم أن يعامل بعضهم بعضاً بروح الإخاء.",
    "fa": "تمام افراد بشر آزاد به دنیا می‌آیند و از لحاظ حیثیت و حقوق با هم برابرند. همه دارای عقل و وجدان می‌باشند و باید نسبت به یکدیگر با روح برادری رفتار کنند.",
    "ur": "تمام انسان آزاد اور حقوق و عزت کے اعتبار سے برابر پیدا ہوئے ہیں۔ انہیں ضمیر اور عقل ودیعت ہوئی ہے۔ اس لئے انہیں ایک دوسرے کے ساتھ بھائی چارے کا سلوک کرنا چاہیئے۔",
    "ru": "Все люди рождаются свободными и равными в своем достоинстве и правах. Они наделены разумом и совестью и должны поступать в отношении друг друга в духе братства.",
    "uk": "Всі люди народжуються вільними і рівними у своїй гідності та правах. Вони наділені розумом і совістю і повинні діяти у відношенні один до одного в дусі братерства.",
    "be": "Усе людзі нараджаюцца свабоднымі і роўнымі ў сваёй годнасці і правах. Яны надзелены розумам і сумленнем і павінны ставіцца адзін да аднаго ў духу брацтва.",
    "bg": "Всички хора се раждат свободни и равни по достойнство и права. Те са надарени с разум и съвест и следва да се отнасят помежду си в дух на братство.",
    "sr": "Сва људска бића рађају се слободна и једнака у достојанству и правима. Она су обдарена разумом и свешћу и треба једни према другима да поступају у духу братства.",
    "sr-Latn": "Sva ljudska bića rađaju se slobodna i jednaka u dostojanstvu i pravima. Ona su obdarena razumom i svešću i treba jedni prema drugima da postupaju u duhu bratstva.",
    "kk": "Барлық адамдар тумысынан азат және қадір-қасиеті мен құқықтары тең болып дүниеге келеді. Адамдарға ақыл-парасат, ар-ождан берілген.",
    "mn": "Хүн бүр төрж мэндлэхэд эрх чөлөөтэй, адилхан нэр төртэй, ижил эрхтэй байдаг. Оюун ухаан, нандин чанар заяасан хүн гэгч өөр хоорондоо ахан дүүгийн үзэл санаагаар харьцах учиртай.",
    "uz-Cyrl": "Барча одамлар эркин, қадр-қиммат ва ҳуқуқларда тенг бўлиб туғиладилар. Улар ақл ва виждон соҳибидирлар ва бир-бирлари ила биродарларча муомала қилишлари зарур.",
    "zh": "人人生而自由，在尊严和权利上一律平等。他们赋有理性和良心，并应以兄弟关系的精神相对待。",
    "zh-TW": "人人生而自由，在尊嚴和權利上一律平等。他們賦有理性和良心，並應以兄弟關係的精神互相對待。",
    "ja": "すべての人間は、生まれながらにして自由であり、かつ、尊厳と権利とについて平等である。人間は、理性と良心とを授けられている。",
    "fr": "Tous les êtres humains naissent libres et égaux en dignité et en droits. Ils sont doués de raison et de conscience et doivent agir dans un esprit de fraternité.",
    "es": "Todos los seres humanos nacen libres e iguales en dignidad y derechos y, dotados como están de razón y conciencia, deben comportarse fraternalmente los unos con los otros.",
    "pt-BR": "Todos os seres humanos nascem livres e iguais em dignidade e direitos. São dotados de razão e consciência e devem agir em relação uns aos outros com espírito de fraternidade.",
    "de": "Alle Menschen sind frei und gleich an Würde und Rechten geboren. Sie sind mit Vernunft und Gewissen begabt und sollen einander im Geiste der Brüderlichkeit begegnen.",
    "pl": "Wszyscy ludzie rodzą się wolni i równi pod względem swej godności i swych praw. Są oni obdarzeni rozumem i sumieniem i powinni postępować wobec innych w duchu braterstwa.",
    "cs": "Všichni lidé rodí se svobodní a sobě rovní co do důstojnosti a práv. Jsou nadáni rozumem a svědomím a mají spolu jednat v duchu bratrství.",
    "tr": "Bütün insanlar hür, haysiyet ve haklar bakımından eşit doğarlar. Akıl ve vicdana sahiptirler ve birbirlerine karşı kardeşlik zihniyeti ile hareket etmelidirler.",
    "vi": "Tất cả mọi người sinh ra đều được tự do và bình đẳng về nhân phẩm và quyền lợi. Mọi con người đều được tạo hoá ban cho lý trí và lương tâm và cần phải đối xử với nhau trong tình anh em.",
    "nb": "Alle mennesker er født frie og med samme menneskeverd og menneskerettigheter. De er utstyrt med fornuft og samvittighet og bør handle mot hverandre i brorskapets ånd.",
    "id": "Semua orang dilahirkan merdeka dan mempunyai martabat dan hak-hak yang sama. Mereka dikaruniai akal dan hati nurani dan hendaknya bergaul satu sama lain dalam semangat persaudaraan.",
    "hu": "Minden emberi lény szabadon születik és egyenlő méltósága és joga van. Az emberek, ésszel és lelkiismerettel bírván, egymással szemben testvéri szellemben kell hogy viseltessenek.",
    "en": "All human beings are born free and equal in dignity and rights. They are endowed with reason and conscience and should act towards one another in a spirit of brotherhood.",
}  # fmt: skip


# ---- one language, one meaning
@pytest.mark.parametrize("lang", ARTICLE)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_table_in_its_language_is_accepted(lang, form):
    text = unicodedata.normalize(form, ARTICLE[lang])
    assert check_language([text] * 30, lang)[1] == "" and not foreign(text, lang)


@pytest.mark.parametrize(
    ("given_as", "is_in"),
    [
        ("ar", "fa"), ("ar", "ur"), ("fa", "ur"), ("fa", "ar"), ("ur", "ar"), ("arb_Arab", "fa"), ("ru", "uk"), ("ru", "be"), ("ru", "sr"), ("ru", "kk"), ("ru", "mn"),
        ("uk", "ru"), ("uk", "be"), ("bg", "ru"), ("bg", "sr"), ("sr", "ru"), ("sr", "sr-Latn"), ("sr-Latn", "sr"), ("hr", "sr"), ("uz", "uz-Cyrl"), ("uz-Cyrl", "ru"), ("kk", "mn"),
        ("zh", "ja"), ("zh-CN", "ja"), ("zh-CN", "zh-TW"), ("zh-TW", "zh"), ("zh-Hant", "zh"), ("ja", "zh"), ("ja", "zh-TW"), ("es", "fr"), ("es", "pt-BR"), ("pt", "es"),
        ("it", "de"), ("de", "nb"), ("de", "pl"), ("cs", "pl"), ("sv", "nb"), ("es", "vi"), ("vi", "fr"), ("id", "tr"), ("tr", "hu"), ("en", "id"), ("id", "en"), ("hu", "en"),
    ],
)  # fmt: skip
def test_a_table_in_another_language_is_refused(given_as, is_in):
    """By a sentence alone where that is told by the letters that are there, or are not there at all."""
    text = ARTICLE[is_in]
    texts = [f"{text} {n}" for n in range(30)] if (given_as, is_in) in (("pt", "es"), ("ur", "ar")) else [text] * 30
    assert check_language(texts, given_as)[1]


def test_what_letters_must_be_there_is_seen_in_texts_of_some_length():
    """Bulgarian has no letter that Russian has not, Indonesian none that Spanish has not, Dutch none that German has not."""
    bulgarian = ["Столицата на България е София.", "Кажи три съвета за добро здраве.", "Дъждът спря и слънцето изгря над планината.", "Опиши как се прави хляб вкъщи и колко време се пече.",
                 "Напиши кратко писмо до приятел, в което го каниш на гости през лятото.", "Обясни защо небето е сиво и защо залезът е червен.", ARTICLE["bg"],
                 "Реката, която минава през Париж, се нарича Сена."]  # fmt: skip
    wrong = check_language(bulgarian, "ru")[1]
    assert "hardly any of the letters (ы ь э ё) that Russian (ru) has" in wrong and wrong.endswith("it looks like Bulgarian (bg)")
    assert check_language(bulgarian, "bg")[1] == ""
    assert "not told apart from Bulgarian" in check_language(bulgarian[:2], "ru")[0]
    dutch = ["Wat is de hoofdstad van Nederland en hoe lang is die stad dat al?", "Noem drie dingen die goed zijn voor de gezondheid en leg uit waarom.",
             "Schrijf een korte brief aan een vriend, waarin je hem uitnodigt om deze zomer langs te komen.", "De rivier die door Parijs stroomt heet de Seine; beschrijf haar loop.",
             "Leg uit waarom de hemel overdag blauw is en bij zonsondergang rood wordt.", "Hoe maak je thuis brood, en hoe lang moet het in de oven?"] * 2  # fmt: skip
    assert check_language(dutch, "nl")[1] == ""
    assert "German (de)" in check_language([f"{text} {ARTICLE['id']}" for text in dutch], "de")[1]
    assert check_language([bulgarian[0]] * 500, "ru")[1] == ""  # a single sentence, however often, tells too little


@pytest.mark.parametrize(("lang", "other"), [("ar", "fa"), ("ru", "uk"), ("zh", "ja"), ("zh-TW", "zh"), ("es", "pt-BR"), ("de", "pl"), ("fa", "ar")])
def test_a_few_rows_or_words_of_another_language_refuse_no_table(lang, other):
    assert check_language([ARTICLE[lang]] * 90 + [ARTICLE[other]] * 10, lang)[1] == ""
    word = max(ARTICLE[other].split(), key=len)[:8]
    assert check_language([f"{ARTICLE[lang]} {ARTICLE[lang]} {ARTICLE[lang]}{ARTICLE[lang]} {word}"] * 15 + [ARTICLE[lang]] * 85, lang)[1] == ""


@pytest.mark.parametrize(("lang", "others"), [("ar", ["Egyptian Arabic"]), ("nb", ["Danish", "Norwegian"]), ("id", ["Malay"]), ("zh", ["Cantonese"]), ("hr", ["Bosnian"]), ("bho", ["Hindi"])])
def test_what_is_not_told_apart_is_said(lang, others):
    text = {"bho": "हम रउआ के बात सुनत बानी।", "hr": ARTICLE["sr-Latn"]}.get(lang) or ARTICLE[lang]
    seen, wrong = check_language([f"{text} {n}" for n in range(60)], lang)
    told = seen.split("not told apart from ")[1]
    assert wrong == "" and all(name in told or "more" in told for name in others)


def test_a_script_without_an_alphabet_is_said():
    assert "not told apart from other languages in Latin letters" in check_language(["Bharat ki rajdhani Dilli hai aur yahan bahut log rehte hain."] * 40, "hi-Latn")[0]
    assert check_language(["대한민국의 수도는 서울이다."] * 40, "ko")[0] == "100 % of the rows are mostly in Hangul letters"


def test_the_alphabets_are_consistent():
    assert all(script_of(code) and language_name(code) != code for code in ALPHABETS)
    assert all(0 <= share < 0.7 and to_nfc(letter) == letter == letter.lower() for alphabet in ALPHABETS.values() for letter, share in alphabet.items())


@pytest.mark.parametrize("lang", CHINESE)
def test_chinese_in_every_spelling(lang):
    assert (script_of(lang), language_name(lang), is_unspaced(lang)) == ("Han", "Chinese", True)
    assert code_switch("今天天气很好", {"天气": "weather"}, lang, 1.0, random.Random(0)) == "今天weather很好"
    assert "".join(_completion("今天天气很好我们去公园散步", lang, random.Random(0))) == "今天天气很好我们去公园散步"
    for scorer in ("mlqa", "mkqa"):
        assert f1("太阳系的中心太阳", ["太阳"], lang, scorer) == pytest.approx(2 * 2 / (8 + 2))
    assert all(benchmark_wording(name, lang) == languages["zh"] for name, languages in WORDING.items() if name != "flores")
    assert benchmark_wording("flores", f"en-{lang}") == benchmark_wording("flores", "en-zh") != benchmark_wording("flores", f"{lang}-en")
    assert [harness_file(name, lang) for name in BENCHMARKS] == [harness_file(name, "zh") for name in BENCHMARKS]


@pytest.mark.parametrize("lang", ["zh-CN", "zho_Hans", "cmn"])
@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_benchmark_is_found_under_every_code(data_dir, name, lang):  # noqa: F811
    params = asked(data_dir, name)
    check_benchmarks(params, (lang,))
    direction = DIRECTION[name].replace("zh", lang)
    assert plain(load_items(name, direction, params)) == plain(load_items(name, DIRECTION[name], params))
    path = data_dir / PLACE[name]
    if (renamed := path.with_name(path.name.replace("zho_Hans", "zh").replace("zh", "zh_CN"))) != path:
        expected = plain(load_items(name, DIRECTION[name], params))
        path.rename(renamed)
        assert plain(load_items(name, DIRECTION[name], params)) == expected


def test_traditional_chinese_is_asked_for_in_its_own_words(data_dir):  # noqa: F811
    assert benchmark_wording("xnli", "zh-TW") == WORDING["xnli"]["zh-Hant"] != WORDING["xnli"]["zh"]
    assert harness_file("xnli", "zh-TW") is None
    assert f1("太陽系的中心太陽", ["太陽"], "zh-TW") == pytest.approx(0.4)
    path = data_dir / PLACE["xnli"]
    path.write_text("他們說這是對的。\t他們沒有說話。\tcontradiction\n" * 9, encoding="utf-8")
    assert len(load_items("xnli", "zh-TW", asked(data_dir, "xnli"))) == 9
    path.write_text("他们说这是对的。\t他们没有说话。\tcontradiction\n" * 9, encoding="utf-8")
    with pytest.raises(ParamsError, match=r"is to be in 'zh-TW', but 100 % of the rows have letters that Chinese \(zh-TW\) has not; it looks like Chinese \(zh-Hans\)"):
        load_items("xnli", "zh-TW", asked(data_dir, "xnli"))


def test_mkqa_in_the_chinese_of_a_region(data_dir):  # noqa: F811
    row = {"example_id": 1, "queries": {"zh_cn": "太阳有多大", "zh_tw": "太陽有多大", "no": "Hvor stor er solen?"}}
    row["answers"] = {code: [{"type": "binary", "text": "yes"}] for code in row["queries"]}
    (data_dir / PLACE["mkqa"]).write_text(json.dumps(row), encoding="utf-8")
    found = {lang: load_items("mkqa", lang, asked(data_dir, "mkqa"))[0] for lang in ("zh-CN", "zh-Hant", "nb")}
    assert [item["question"] for item in found.values()] == ["太阳有多大", "太陽有多大", "Hvor stor er solen?"]
    assert found["zh-CN"]["answers"] == found["zh-Hant"]["answers"] == ["是", "yes"]


def test_codes_that_mean_no_language_of_a_table():
    assert [nearest(lang, ["zh", "no", "pt", "sr", "ar"]) for lang in ("yue", "nn", "es", "hr", "arz", "ckb")] == [None] * 6


def study(lang, **more):
    files = {"en": "en.json", lang: "zh.json"}
    return Study(name="s", models={"m": {"path": "m"}}, languages=[lang], methods=["sdrrl"], data={"source": "files", "files": files}, **more)


@pytest.mark.parametrize("lang", ["zh-CN", "zh_Hans"])
def test_what_a_recipe_names_is_found_under_every_code(tmp_path, lang):
    for name in ("dictionary.txt", "vi.txt"):
        (tmp_path / name).write_text("weather\t天气\n", encoding="utf-8")
    options = {"code_switch": 1.0, "translator": "none", "dictionaries": {"zh": str(tmp_path / "dictionary.txt"), "vi": str(tmp_path / "vi.txt")}}
    run = study(lang, recipes={"sdrrl": options}).run("m", lang, "sdrrl", 0)
    assert resources(run, SDRRLOptions(**options), load_translator=False).dictionary == {"weather": "天气"}
    assert files_named_in(options, lang, (lang, "vi", "zh")) == [tmp_path / "dictionary.txt"]


def test_english_is_no_target_language_under_any_code():
    with pytest.raises(ValueError, match="languages: en-GB has no data as a target language"):
        study("en-GB")


# ---- Unicode's two forms
VIETNAMESE = ["Hãy kể tên ba lời khuyên để giữ gìn sức khỏe.", "Thủ đô của nước Pháp là thành phố nào?", "Viết một bài thơ ngắn về mùa thu ở Hà Nội."] * 8


def table(folder, name, texts, form="NFC"):
    rows = [{"id": f"số-{n}", "instruction": f"{text} {n}", "input": "", "output": text} for n, text in enumerate(texts)]
    (folder / name).write_text(unicodedata.normalize(form, json.dumps(rows, ensure_ascii=False)), encoding="utf-8")
    return str(folder / name)


@pytest.mark.parametrize("decomposed", [24, 5])
def test_decomposed_instruction_data_are_the_same_rows(tmp_path, decomposed):
    english = table(tmp_path, "en.json", ["Name three things that are good for your health."] * 24)
    expected, report = parallel_rows(DataParams(source="files", files={"en": english, "vi": table(tmp_path, "vi.json", VIETNAMESE)}), "vi")
    assert report["tables"]["vi"]["notes"] == []
    rows = json.loads((tmp_path / "vi.json").read_text(encoding="utf-8"))
    rows = [{key: unicodedata.normalize("NFD", value) for key, value in row.items()} if n < decomposed else row for n, row in enumerate(rows)]
    (tmp_path / "nfd.json").write_text(json.dumps(rows), encoding="utf-8")
    found, report = parallel_rows(DataParams(source="files", files={"en": english, "vi": str(tmp_path / "nfd.json")}, max_dropped=0), "vi")
    assert found.to_list() == expected.to_list() and len(found) == 24
    assert report["tables"]["vi"]["notes"] == [f"{decomposed} rows brought to Unicode's composed form (NFC)"]


def test_a_decomposed_benchmark_gives_the_same_items(data_dir, capsys):  # noqa: F811
    path = data_dir / "flores" / "vie_Latn.devtest"
    expected = plain(load_items("flores", "en-vi", asked(data_dir, "flores")))
    path.write_text(unicodedata.normalize("NFD", FILES["flores/vie_Latn.devtest"]), encoding="utf-8")
    assert "NFC" not in capsys.readouterr().out
    assert plain(load_items("flores", "en-vi", asked(data_dir, "flores"))) == expected
    assert "6 rows brought to Unicode's composed form (NFC)" in capsys.readouterr().out


def test_decomposed_answers_score_as_composed_ones():
    answer = "Thành phố Hồ Chí Minh"
    for scorer in ("mlqa", "mkqa"):
        assert f1(unicodedata.normalize("NFD", answer), [answer], "vi", scorer) == exact_match(answer, [unicodedata.normalize("NFD", answer)], "vi", scorer) == 1
        assert answer_tokens(unicodedata.normalize("NFD", "của những chiếc xe"), "vi", scorer) == ["xe"]


def test_decomposed_files_of_a_recipe(tmp_path):
    (tmp_path / "dictionary.txt").write_text(unicodedata.normalize("NFD", "health sức-khỏe\nname tên\ncat mèo\n"), encoding="utf-8")
    (tmp_path / "translations.jsonl").write_text(json.dumps({"en": "Yes, it is.", "translation": unicodedata.normalize("NFD", "Vâng, đúng thế.")}), encoding="utf-8")
    words = read_dictionary(str(tmp_path / "dictionary.txt"), "")
    assert words == {"health": "sức-khỏe", "name": "tên", "cat": "mèo"}
    assert code_switch("Hãy kể tên.", {"tên": "name"}, "vi", 1.0, random.Random(0)) == "Hãy kể name."
    options = {"dictionaries": {"vi": str(tmp_path / "dictionary.txt")}, "translations": {"vi": str(tmp_path / "translations.jsonl")}}
    found = resources(study("vi", recipes={"sdrrl": options}).run("m", "vi", "sdrrl", 0), SDRRLOptions(**options))
    assert found.translate(["Yes, it is."]) == ["Vâng, đúng thế."]
    assert found.notes == ["recipes.sdrrl.dictionaries.vi: 3 rows brought to Unicode's composed form (NFC)"]


# ---- languages without a scorer or a prompt
@pytest.mark.parametrize(
    ("name", "lang", "prompt", "said"),
    [
        ("mlqa", "ru", "harness", "evaluation.benchmarks: MLQA cannot be scored in 'ru', only in ar de en es hi vi zh; drop the benchmark or the language"),
        ("mkqa", "el", "harness", "evaluation.benchmarks: MKQA cannot be scored in 'el', only in ar da de"),
        ("xquad", "sw", "harness", "evaluation.benchmarks: XQuAD cannot be scored in 'sw', only in ar de el en es hi ro ru th tr vi zh"),
        ("mkqa", "zh", "harness", "evaluation.prompt: lm-eval has no prompt for MKQA in 'zh'; add dsft to the prompts"),
        ("flores", "vi", "harness", "evaluation.prompt: lm-eval has no prompt for FLORES-200 in 'vi'"),
        ("xnli", "ja", "harness", "evaluation.prompt: lm-eval has no prompt for XNLI in 'ja'"),
        ("mmlu", "th", "harness", "evaluation.prompt: lm-eval has no prompt for MMLU in 'th'"),
        ("xquad", "ru", "dsft", "xquad has no wording in 'ru', only in en, zh, vi, ar, zh-Hant; add it there"),
    ],
)
@pytest.mark.parametrize("source", ["files", "hub"])
def test_what_cannot_be_asked_or_scored_is_refused_before(data_dir, name, lang, prompt, said, source):  # noqa: F811
    params = EvalParams(benchmarks=(name,), source=source, data_dir=str(data_dir) if source == "files" else None, prompt=(prompt,))
    with pytest.raises(ParamsError) as error:
        check_benchmarks(params, (lang, "en"))
    assert said in str(error.value) and "\n" not in str(error.value)


def test_what_does_not_exist_in_a_language_is_no_mistake(capsys):
    check_benchmarks(EvalParams(benchmarks=("xcopa", "xnli"), source="hub", prompt=("harness",)), ("ar", "en"))
    check_benchmarks(EvalParams(benchmarks=("xcopa", "mkqa"), source="hub", prompt=("dsft", "harness")), ("ar", "vi", "en"))


def test_xquad_is_scored_by_words_where_mlqa_has_no_rules():
    """As in the script of SQuAD: lower case, without ASCII punctuation and English articles, between spaces."""
    assert [f1_script("xquad", lang) for lang in ("ru", "el", "tr", "th", "ro", "hi", "zh-TW", "de-AT")] == ["squad"] * 5 + ["mlqa"] * 3
    doc = {"answers": ["Большой театр в Москве"], "lang": "ru"}
    assert tasks.f1_results(doc, ["театр в Москве."]) == {"f1": pytest.approx(2 * 3 / (3 + 4))}
    assert tasks.f1_results({"answers": ["the an river"], "lang": "ro"}, ["a river"]) == {"f1": 1}
