"""Persian given as Arabic is another language: its letters (pe, che, zhe, gaf, Persian kaf and yeh) never stand in Arabic text.
Expected: refused, or a note in the report. Got: "100 % of the rows are mostly in Arabic letters", nothing wrong. (Chinese given as ja passes likewise.)"""
import sys
from dsft.languages import check_language
fa = ["پایتخت ایران تهران است و جمعیت آن حدود نه میلیون نفر می‌باشد.", "سه نکته برای حفظ سلامتی بگویید.", "گچ چیست و چگونه ساخته می‌شود؟", "پنج کشور پرجمعیت را نام ببرید."]
looked, wrong = check_language(fa * 20, "ar")
print(looked, "|", wrong or "nothing wrong")
sys.exit(not wrong)
