"""A report page on models that `examples/villa_uniter.py` or `examples/evidence.py` has trained on the digits.

Each model is attacked on regions, on words and on both by several attacks; each example counts by its worst verified score,
and flags say where the attacks cannot be trusted. Then one modality of each example is replaced by another example's.

    python examples/villa_uniter.py --output runs/villa
    python examples/report_digits.py runs/villa --output runs/report
"""

import argparse
from functools import partial
from pathlib import Path

import torch
import yaml

from advvl import L2, AutoPGD, adapt
from advvl.data.digits.corpus import DigitsConfig, digits_corpus
from advvl.data.digits.scenes import SIDE
from advvl.evaluation.examples import Example
from advvl.evaluation.hits import hit
from advvl.evaluation.interference import modality_interference
from advvl.evaluation.named_attacks import DEFAULT, NamedAttack
from advvl.evaluation.objectives import margin
from advvl.evaluation.report import write_report
from advvl.evaluation.rows import take_rows
from advvl.evaluation.worst_case import worst_case
from advvl.experiments.villa_options import UniterSize
from advvl.experiments.villa_stages import config_of
from advvl.models.uniter.checkpoint import load_checkpoint
from advvl.tasks.uniter.vqa import UniterForVQA

BUDGETS = [{"image": L2(0.25)}, {"image": L2(0.5)}, {"text": L2(0.5)}, {"text": L2(0.5), "image": L2(0.5)}]
ATTACKS = (*DEFAULT, NamedAttack(name="Auto-PGD", maximizer=AutoPGD(50), objective=margin, step_fraction=2.0))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="directory of the trained models")
    parser.add_argument("--output", default="runs/report", help="directory of the page (default: %(default)s)")
    parser.add_argument("--models", default="standard,villa", help="names of files (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the models (default: 0)")
    parser.add_argument("--examples", type=int, default=100, help="test questions to attack (default: 100)")
    given = parser.parse_args()
    asked = yaml.safe_load((given.run / "configuration.yaml").read_text(encoding="utf-8"))["configuration"]
    corpus = digits_corpus(DigitsConfig(**asked["data"]))
    batches = [corpus.test.batch(rows.tolist()) for rows in torch.arange(given.examples).split(100)]
    models, measured = {}, {}
    for name in given.models.split(","):
        model = UniterForVQA(config_of(UniterSize(**asked["model"]), corpus), num_answers=len(corpus.answers))
        load_checkpoint(model, given.run / f"seed-{given.seed}" / f"{name}.safetensors")
        models[name] = adapt(model.eval())
        rows = partial(take_rows, whole=("position_ids",))
        about = {"task": "questions about digits", "run seed": given.seed}
        measured[name] = worst_case(models[name], batches, BUDGETS, attacks=ATTACKS, rows=rows, about=about)
        print(f"{name}\n{measured[name]}\n\n{modality_interference(models[name], batches)}\n", flush=True)
    chance = corpus.test.targets[: given.examples].mean(0).max().item()
    draw = partial(drawn, corpus, models)
    print("The page is", write_report(given.output, measured, title="Questions about digits", chance=chance, draw=draw))


def drawn(corpus, models, damage):
    """Attack an example again, and return its scene and question with what the perturbation hit."""
    batch = corpus.test.batch([damage.example])
    found = hit(models[damage.model], batch, BUDGETS[damage.budget], ATTACKS[damage.attack])
    row = int(corpus.test.image_rows[damage.example])
    scene, scans = corpus.test.scenes[row], corpus.test.images.features[row]
    picture = torch.ones(8 * SIDE, 8 * SIDE)
    for cell, scan in zip(scene.cells, scans, strict=False):
        top, left = 8 * (cell // SIDE), 8 * (cell % SIDE)
        picture[top : top + 8, left : left + 8] = 1 - scan[:64].reshape(8, 8)
    words = [corpus.tokenizer.id_to_token(word) for word in batch["input_ids"][0].tolist()]
    return Example(
        words=words,
        word_heat=found.heat["text"][0].tolist() if "text" in found.heat else (),
        picture=picture.clamp(0, 1).repeat_interleave(12, 0).repeat_interleave(12, 1).numpy(),
        regions=[
            (x / SIDE, y / SIDE, (x + 1) / SIDE, (y + 1) / SIDE) for y, x in (divmod(c, SIDE) for c in scene.cells)
        ],
        region_heat=found.heat["image"][0, : len(scene)].tolist() if "image" in found.heat else (),
        before=corpus.answers[int(found.before.argmax())],
        after=corpus.answers[int(found.after.argmax())],
        truth=corpus.answers[int(batch["targets"][0].argmax())],
        taken=found.taken,
    )


if __name__ == "__main__":
    main()
