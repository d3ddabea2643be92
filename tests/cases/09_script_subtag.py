"""A script subtag decides over the language's usual script: sr-Latn is Latin, uz-Cyrl Cyrillic, hi-Latn Latin.
Expected: nothing wrong for all three. Got: all three refused."""
import sys
from dsft.languages import check_language
cases = {"sr-Latn": "Glavni grad Srbije je Beograd, koji leži na ušću Save u Dunav.", "uz-Cyrl": "Ўзбекистоннинг пойтахти Тошкент шаҳридир.", "hi-Latn": "Bharat ki rajdhani Dilli hai aur yahan bahut log rehte hain."}
wrong = {lang: told for lang, text in cases.items() if (told := check_language([text] * 40, lang)[1])}
print(wrong or "ok")
sys.exit(bool(wrong))
