"""Model cards: in the hub's form, with what the model was made from, how, and what it scores; a saved model loads anywhere."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from huggingface_hub import ModelCard

from dsft.card import card, of_base, scores_of, write_run_card
from dsft.files import check_intact, digest, write_json
from dsft.methods import METHODS, Method
from dsft.study import Study
from dsft.trainer import DSFTTrainer
from dsft.training import fine_tune, save_training

BASE = ROOT / "models" / "micro-llama"


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    return Study(
        name="cards",
        models={"micro-llama": {"path": str(BASE)}},
        languages=["zh", "vi"],
        methods=["base", "sft", "dsft_logits", Method(name="chain", stages=[{"rows": ["en"]}, {"supervisions": METHODS["et_logits"].supervisions}])],
        layers={"i": 2, "j": 5},
        data={"items": 16, "max_length": 200},
        train={"max_steps": 1, "batch_size": 8, "per_device_batch_size": 8, "bf16": False},
        runs=str(tmp_path_factory.mktemp("runs")),
    )


def trained(study: Study, method: str, lang: str = "zh"):
    run = study.run("micro-llama", lang, method, 0)
    write_json(run.layers_file, {"i": 2, "j": 5})
    if not Path(run.trained).exists():
        save_training(run, fine_tune(run), time.time(), run.command("train"))
    return run


def test_a_trained_model_has_a_card(study):
    run = trained(study, "dsft_logits")
    loaded = ModelCard.load(Path(run.trained) / "README.md")
    told, text = loaded.data, loaded.text
    assert (told.base_model, told.license, told.language, told.library_name, told.pipeline_tag) == ("micro-llama", "apache-2.0", ["zh", "en"], "transformers", "text-generation")
    assert {"dsft", "dsft_logits"} <= set(told.tags) and told.eval_results is None
    for said in ("| language conversion | logits | 2 | 1 |", "| English thinking | logits | 5 | 1 |", "Not evaluated yet", "microcosm", "Template plain", run.command("train")):
        assert said in text, said
    provenance = json.loads((Path(run.trained) / "provenance.json").read_text(encoding="utf-8"))
    assert provenance["data_sha256"] in text and provenance["base_sha256"] in text and provenance["commit"] in text
    assert str(ROOT) not in loaded.content and str(Path.home()) not in loaded.content


def test_scores_come_into_the_card_and_change_nothing_else(study):
    run = trained(study, "dsft_logits")
    before = digest(run.trained)
    scores = [
        {"dataset": "xquad", "lang": "zh", "prompt": "dsft", "metric": "f1", "value": 61.254, "items": 400, "chance": None, "truncated": 0},
        {"dataset": "xcopa", "lang": "en", "prompt": "harness", "metric": "acc", "value": 75.0, "items": 100, "chance": 50.0, "truncated": 0},
        {"dataset": "flores", "lang": "en-zh", "prompt": "dsft", "metric": "comet", "value": None, "items": 100, "chance": None, "truncated": 0},
    ]
    write_json(run.folder / "metrics.json", run.key | {"scores": scores})
    write_run_card(run)
    loaded = ModelCard.load(Path(run.trained) / "README.md")
    results = {(r.dataset_name, r.metric_type): r.metric_value for r in loaded.data.eval_results}
    assert results == {("XQuAD (zh)", "f1"): 61.25, ("XCOPA (en, asked as lm-eval does)", "acc"): 75.0}
    assert "| XQuAD | zh | dsft | F1 | 61.25 | 400 |" in loaded.text
    assert digest(run.trained) == before
    check_intact(run.trained)
    again = (Path(run.trained) / "README.md").read_text(encoding="utf-8")
    write_run_card(run)
    assert (Path(run.trained) / "README.md").read_text(encoding="utf-8") == again
    (run.folder / "metrics.json").unlink()
    write_run_card(run)


def test_a_model_shared_by_languages_has_the_scores_of_all(study):
    runs = [trained(study, "sft", lang) for lang in ("zh", "vi")]
    assert runs[0].trained == runs[1].trained
    for run in runs:
        english = {"dataset": "xcopa", "lang": "en", "prompt": "dsft", "metric": "acc", "value": 90.0, "items": 100}
        write_json(run.folder / "metrics.json", run.key | {"scores": [english, english | {"lang": run.lang, "value": 60.0}]})
    assert [score["lang"] for score in scores_of(runs[1])] == ["en", "vi", "zh"]
    write_run_card(runs[0])
    told = ModelCard.load(Path(runs[0].trained) / "README.md").data
    assert told.language == ["en"] and len(told.eval_results) == 3


def test_each_stage_is_in_the_card(study):
    text = (Path(trained(study, "chain").trained) / "README.md").read_text(encoding="utf-8")
    assert "Stage 1: Fine-tuned on the answers" in text and "Stage 2: Deep supervision" in text and "| English thinking | logits | 5 | 1 |" in text


def test_the_saved_model_loads_where_dsft_is_not(study):
    run = trained(study, "dsft_logits")
    code = (
        "import sys; sys.modules['dsft'] = None\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"model, tokenizer = AutoModelForCausalLM.from_pretrained({run.trained!r}), AutoTokenizer.from_pretrained({run.trained!r})\n"
        "print(model.generate(**tokenizer('Anna', return_tensors='pt'), max_new_tokens=3, do_sample=False).shape[0])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert done.stdout.strip() == "1", done.stderr


def test_the_trainer_by_itself_writes_one_too(tmp_path):
    model = transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=torch.float32)
    from datasets import Dataset

    text = Dataset.from_list([{"instruction_tgt": f"谁是{n}？", "output_tgt": "安娜", "instruction_en": f"Who is {n}?", "output_en": "Anna"} for n in range(8)])
    args = transformers.TrainingArguments(str(tmp_path / "out"), max_steps=2, report_to=[], disable_tqdm=True, use_cpu=True, save_strategy="no", logging_steps=1, dataloader_pin_memory=False)
    trainer = DSFTTrainer(model, args, METHODS["dsft_feature"].at(2, 6), train_dataset=text, eval_dataset=text, template="plain", processing_class=transformers.AutoTokenizer.from_pretrained(BASE))
    trainer.train()
    score = trainer.evaluate()["eval_loss"]
    trainer.export(tmp_path / "mine")
    loaded = ModelCard.load(tmp_path / "mine" / "README.md")
    assert (loaded.data.base_model, loaded.data.license) == ("micro-llama", "apache-2.0")
    for said in ("# mine", "| English thinking | feature | 6 | 1 |", "8 examples", "in English. Template plain.", f"| eval_loss | {score:.4f} |", 'from_pretrained("mine")'):
        assert said in loaded.text, said
    trainer.create_model_card(model_name="other", language=["zh"], license="mit", dataset="org/data")
    told = ModelCard.load(tmp_path / "out" / "README.md").data
    assert (told.language, told.license, told.datasets) == (["zh"], "mit", "org/data")


@pytest.mark.parametrize("name", ["micro-llama", "micro-gemma2"])
def test_the_shipped_bases_have_cards(name):
    loaded = ModelCard.load(ROOT / "models" / name / "README.md")
    assert (loaded.data.license, loaded.data.library_name, "dsft" in loaded.data.tags) == ("apache-2.0", "transformers", True)
    assert loaded.content == card(loaded.text, license="apache-2.0", language=loaded.data.language, tags=["multilingual"])


def test_a_base_tells_its_licence(tmp_path):
    assert of_base("google/some-model") == {"base_model": "google/some-model"}
    assert of_base(tmp_path) == {"base_model": tmp_path.name}
    (tmp_path / "README.md").write_text("no header\n")
    assert of_base(tmp_path) == {"base_model": tmp_path.name}
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: gemma\nlicense_link: https://ai.google.dev/gemma/terms\nlanguage: en\n---\n")
    assert of_base(tmp_path, "gemma") == {"base_model": "gemma", "license": "other", "license_name": "gemma", "license_link": "https://ai.google.dev/gemma/terms"}
