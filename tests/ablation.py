"""Every row of Tables 3 to 5, and Table 2's baseline, on the demo data: python tests/ablation.py

Trains eight models with three seeds each, one process a core (about half an hour on two cores), in runs/ablation,
leaves out what is already there, and prints the table of docs/reproduce.md. Weak: the tiny CLIP knows no language.
"""

import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).parent.parent
RUNS = Path("runs/ablation")
SEEDS = (0, 1, 2)
# Row: flags of train.py, prompt when scored, the paper's mAP and R-1 on Market-1501 (R-1 where it gives one).
ROWS = {
    "Table 2, ViT-B/16: baseline": ("--baseline", "simplified", "86.4 / 93.3"),
    "Table 3 a) PromptSG": ("", "composed", "94.6 / 97.0"),
    "Table 3 b) without i2t": ("--without-i2t", "composed", "92.8 / 96.7"),
    "Table 3 c) without t2i": ("--without-t2i", "composed", "93.0 / 96.7"),
    "Table 3 d) without MIM (Table 5: w/o attention module)": ("--without-interaction", "composed", "89.4 / 95.3"),
    "Table 4: training w/o composed": ("--train-prompt simplified", "simplified", "92.0 / 96.3"),
    "Table 5: + 1 cross-layer": ("--blocks 0", "simplified", "91.1"),
    "Table 5: + 1 cross & 1 self-layer": ("--blocks 1", "simplified", "93.0"),
    "Table 5: + 1 cross & 2 self-layer, composed": ("", "composed", "94.6"),
    "Table 5: + 1 cross & 2 self-layer, simplified": ("", "simplified", "94.1"),
}


def run(script: str, *arguments: str) -> None:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([sys.executable, ROOT / script, *arguments], check=True, env=environment, stdout=subprocess.DEVNULL)


def score(flags: str, prompt: str, seed: int) -> dict:
    """Trains and scores unless it has been done before."""
    output = RUNS / f"{flags.replace('--', '').replace(' ', '-') or 'full'}-{seed}"
    result = output / f"{prompt}.json"
    if not any((output / f"{scored}.json").exists() for scored in ("composed", "simplified")):
        fixed = f"--dataset synthetic --backbone tiny --eval-every 0 --overwrite --seed {seed} --output {output}"
        run("train.py", *fixed.split(), *flags.split())
        print(f"trained {output}", file=sys.stderr, flush=True)
    if not result.exists():
        run("evaluate.py", "--checkpoint", str(output / "last.pt"), "--prompt", prompt, "--json", str(result))
    return json.loads(result.read_text())


def main() -> None:
    models = dict.fromkeys((flags, seed) for seed in SEEDS for flags, _, _ in ROWS.values())  # each once, in order
    prompts = {flags: prompt for flags, prompt, _ in ROWS.values()}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(lambda model: score(model[0], prompts[model[0]], model[1]), models))
    print("| row | paper, Market-1501: mAP / R-1 | demo: mAP | demo: R-1 |\n|---|---|---|---|")
    for row, (flags, prompt, paper) in ROWS.items():
        results = [score(flags, prompt, seed) for seed in SEEDS]
        cells = []
        for metric in ("mAP", "rank1"):
            values = [100 * result[metric] for result in results]
            cells.append(f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}")
        print(f"| {row} | {paper} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
