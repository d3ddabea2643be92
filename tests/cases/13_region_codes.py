"""zh-CN, zh-Hans and the like are allowed as languages (dsft.settings.Language); they must behave as zh.
Expected: SDRRL switches and cuts as for zh, F1 is scored, a benchmark check passes or is one line. Got: code_switch changes nothing, _completion gives None, the F1 scorer
raises ValueError (after everything was generated), the check of XNLI ends in KeyError 'answers' (the hyphen is taken for a direction of translation)."""
import random, sys
from dsft.benchmark_items import _check_languages
from dsft.metrics import f1
from dsft.files import ParamsError
from dsft.code_switching import code_switch
from dsft.recipes.sdrrl import _completion
bad = []
for lang in ("zh-CN", "zh_Hans"):
    if "weather" not in code_switch("今天天气很好", {"天气": "weather"}, lang, 1.0, random.Random(0)): bad.append(f"{lang}: no code-switching")
    if not _completion("今天天气很好我们去公园散步", lang, random.Random(0)): bad.append(f"{lang}: no completion")
    try: f1("北京", ["北京"], lang)
    except ValueError as error: bad.append(f"{lang}: {error}")
    try: _check_languages("xnli", [{"premise": "今天天气很好。", "hypothesis": "天气好。", "label": 0}], lang)
    except ParamsError: pass
    except Exception as error: bad.append(f"{lang}: check: {type(error).__name__} {error}")
print("\n".join(bad) or "ok"); sys.exit(bool(bad))
