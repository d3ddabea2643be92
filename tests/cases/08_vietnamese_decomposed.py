"""Vietnamese in decomposed Unicode (NFD, as macOS tools and many pages give it) is Vietnamese.
Expected: accepted (better still: brought to NFC with a note). Got: a whole NFD table is refused as "only 0 % ... with Vietnamese accents"; where only some rows are
NFD, those without the letter d-with-stroke are dropped as "not a letter of vi". A benchmark file in NFD is refused likewise."""
import sys, unicodedata
from dsft.languages import check_language, foreign
text = "Hãy kể tên ba lời khuyên để giữ gìn sức khỏe của bạn và của những người thân."
nfd = unicodedata.normalize("NFD", text)
short = unicodedata.normalize("NFD", "Hãy kể tên ba lời khuyên cho sức khỏe và giải thích vì sao.")
whole, row = check_language([nfd] * 60, "vi")[1], foreign(short, "vi")
print("NFC:", check_language([text] * 60, "vi")[1] or "ok", foreign(text, "vi"), "| NFD:", whole or "ok", "| row dropped:", row)
sys.exit(bool(whole) or row)
