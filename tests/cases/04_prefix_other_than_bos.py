"""A tokenizer whose text begins with a special token that is not its bos_token (XGLM begins with </s>) must be asked as it was trained.
Expected: generation and likelihood prompts begin with the same token as training, 1. Got: training [1, ...], evaluation without it."""
import sys, tempfile
import torch, transformers
from datasets import Dataset
from tokenizers.processors import TemplateProcessing
from dsft.data import tokenize
from dsft.study import Study
from dsft.tasks import _in_memory
transformers.logging.set_verbosity_error()
path = "models/micro-llama"
tok = transformers.AutoTokenizer.from_pretrained(path)
tok._tokenizer.post_processor = TemplateProcessing(single="</s> $A", special_tokens=[("</s>", 1)])
model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
study = Study(name="x", models={"m": {"path": path}}, languages=["zh"], methods=["tft"], runs=tempfile.mkdtemp())
lm = _in_memory(model, tok, study.evaluation)
trained = tokenize(Dataset.from_list([{"x_tgt": "你好吗？\n", "y_tgt": "很好", "x_en": "Hi\n", "y_en": "a"}]), tok, 64)[0]["x_tgt"]
asked = lm.tok_batch_encode(["你好吗？\n"])[0][0].tolist()
scored = list(lm._encode_pair("你好吗？\n", "很好")[0])
print("trained", trained, "\nasked  ", asked, "\nscored ", scored)
sys.exit(not (trained[0] == asked[0] == scored[0] and trained == asked))  # lm-eval scores the last newline with the choice
