"""(a) A key that stands twice in a study file must be refused: YAML says keys are unique. Expected: one line naming `train`. Got: the second block silently replaces the
first, learning_rate 0.002 becomes the default 2e-5. (b) `no` (Norwegian) without quotes is False in YAML 1.1. Expected: a line that says to quote it: 'no'. Got: "languages.0 = False:
Input should be a valid string"."""
import sys, tempfile
from pathlib import Path
from dsft.files import ParamsError
from dsft.study import load_study
file = Path(tempfile.mkdtemp()) / "s.yaml"
base = "models:\n  m: {path: models/micro-llama}\nlanguages: [%s]\nmethods: [tft]\ntrain: {learning_rate: 0.002}\n"
file.write_text(base % "zh" + "train: {batch_size: 16}\n"); bad = 0
try: print("(a) accepted, learning_rate", load_study(file).train.learning_rate); bad = 1
except ParamsError as error: print("(a)", error)
file.write_text(base % "no")
try: load_study(file)
except ParamsError as error: print("(b)", error); bad |= "quote" not in str(error) and "'no'" not in str(error)
sys.exit(bad)
