"""A tokenizer that appends EOS to every text (saved after an Alpaca-style fine-tuning with add_eos_token) must not put EOS between question and answer.
Expected: x_tgt does not end with EOS (or one line refuses the tokenizer). Got: x_tgt = [..., newline, EOS], then the answer; in the likelihood tasks the
newline is lost as well and EOS is scored at the end of every choice."""
import sys
import transformers
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from dsft.data import tokenize
from dsft.files import ParamsError
tok = transformers.AutoTokenizer.from_pretrained("models/micro-llama")
tok._tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)])
try:
    row = tokenize(Dataset.from_list([{"x_tgt": "你好吗？\n", "y_tgt": "很好", "x_en": "Hi\n", "y_en": "a"}]), tok, 64)[0]
except ParamsError as error:
    print("refused:", error); sys.exit(0)
print("x_tgt", row["x_tgt"], "y_tgt", row["y_tgt"], "EOS is", tok.eos_token_id)
sys.exit(row["x_tgt"][-1] == tok.eos_token_id)
