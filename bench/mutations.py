"""Puts one-line faults into a copy of the code, one at a time, and counts how many of them `make test` finds.

    python bench/mutations.py            # all, about a minute each on two cores
    python bench/mutations.py recall     # those whose name contains the word

The tests of the faulty package run first and stop at the first failure; where they all pass, all quick tests follow.
"""

import argparse
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

HERE = Path(__file__).parents[1]


class Fault(NamedTuple):
    """A line of a file under src/maskvlm/ (or tasks/), what replaces it, and the tests that should notice."""

    name: str
    file: str
    right: str
    wrong: str
    tests: str


FAULTS = (
    # model
    Fault("mask token on visible patches", "model/encoders.py",
          "torch.where(mask, self.mask_token.view(-1).to(patch.dtype), patch)",
          "torch.where(mask, patch, self.mask_token.view(-1).to(patch.dtype))", "model"),
    Fault("padding attended instead of words", "model/cross_attention.py",
          "return None if attention_BL is None else attention_BL[:, None, None, :]",
          "return None if attention_BL is None else ~attention_BL[:, None, None, :]", "model"),
    Fault("no residual around cross-attention", "model/cross_attention.py",
          "x = self.norms[1](x + self.dropout(", "x = self.norms[1](self.dropout(", "model"),
    Fault("decoder sees the next word", "model/text_decoder.py",
          "device=token_AS.device).tril()[None, None]", "device=token_AS.device).tril(1)[None, None]", "model"),
    Fault("temperature inverted", "model/heads.py",
          "nn.Parameter(torch.tensor(-math.log(temperature)))", "nn.Parameter(torch.tensor(math.log(temperature)))",
          "model objectives"),
    Fault("mean over padding too", "model/heads.py",
          "return (text_BTD * there_BT1).sum(1) / there_BT1.sum(1)", "return text_BTD.mean(1)", "model objectives"),
    # objectives
    Fault("contrast in one direction", "objectives/loss_functions.py",
          "(terms[0] + terms[1]) / 2", "(terms[0] + terms[0]) / 2", "objectives"),
    Fault("contrast's sign", "objectives/loss_functions.py",
          "return -log_p_BG.masked_fill(~target_BG, 0.0)", "return log_p_BG.masked_fill(~target_BG, 0.0)",
          "objectives"),
    Fault("loss of visible patches too", "objectives/loss_functions.py",
          "(error_BKP.mean(-1) * weight_BK).sum()", "error_BKP.mean(-1).sum()", "objectives"),
    Fault("hard negatives that match", "objectives/hard_negatives.py",
          '.masked_fill(excluded_BG, float("-inf"))', '.masked_fill(~excluded_BG, float("-inf"))', "objectives"),
    Fault("the easiest negatives", "objectives/hard_negatives.py",
          "score = (logits + gumbel_noise(uniform_BG))", "score = (-logits + gumbel_noise(uniform_BG))", "objectives"),
    Fault("special tokens masked", "objectives/masking.py",
          "unit_CT = torch.where(special_CT, length, unit_CT)", "unit_CT = torch.where(special_CT, 0, unit_CT)",
          "objectives"),
    Fault("one block too few masked", "objectives/masking.py",
          "min(units, max(1, int(share + np.float32(0.5))))", "min(units, max(1, int(share - np.float32(0.5))))",
          "objectives"),
    Fault("recall off by one", "objectives/retrieval_metrics.py",
          "rank_Q = ((score_QG >= good_Q[:, None]) & ~relevant_QG).sum(1)",
          "rank_Q = ((score_QG >= good_Q[:, None]) & ~relevant_QG).sum(1) - 1", "objectives"),
    Fault("ties count for the model", "objectives/retrieval_metrics.py",
          "(score_QG >= good_Q[:, None])", "(score_QG > good_Q[:, None])", "objectives"),
    Fault("matching trains frozen encoders", "objectives/cross_batch.py",
          "image, text = image.detach(), text.detach()", "image, text = image, text.detach()", "objectives"),
    Fault("the queue keeps the graph", "objectives/negative_queue.py",
          "*(part.detach()[-self.size :]", "*(part[-self.size :]", "objectives"),
    Fault("re-ranking by mismatch", "objectives/rerank.py",
          "logits_m2[:, 1] - logits_m2[:, 0]", "logits_m2[:, 0] - logits_m2[:, 1]", "objectives"),
    Fault("wrong image's accuracy from the right one", "objectives/evaluation.py",
          '"_wrong_image": (owner + 1) % rows', '"_wrong_image": owner % rows', "objectives"),
    # data
    Fault("every epoch in the same order", "data/sampler.py",
          "manual_seed(mix(self.seed, epoch))", "manual_seed(mix(self.seed, 0))", "data"),
    Fault("processes share their samples", "data/sampler.py",
          "first = step * self.batch_size + self.rank * share", "first = step * self.batch_size", "data"),
    Fault("held-out images pass", "data/contamination.py",
          "free_N &= ~hit_N", "free_N &= hit_N", "data"),
    # training
    Fault("rate rises after its peak", "training/optim.py",
          "(1 + math.cos(math.pi * done))", "(1 - math.cos(math.pi * done))", "training"),
    Fault("biases decayed", "training/optim.py",
          '"weight_decay": decay if decayed else 0.0', '"weight_decay": decay', "training"),
    Fault("the same masks in every step", "training/lit.py",
          "Draw(self.seed, batch_idx, self.device)", "Draw(self.seed, 0, self.device)", "training"),
    Fault("steps with infinite gradients made", "training/step_guard.py",
          "torch.where(norm.isfinite(), spike, GRADIENT)", "torch.where(norm.isfinite(), spike, 0)", "faults training"),
    # checkpoint
    Fault("a lost fsync", "checkpoint/io.py", "        os.fsync(file.fileno())\n", "", "checkpoint faults"),
    Fault("an unsafe load", "checkpoint/io.py", "weights_only=True", "weights_only=False", "checkpoint security"),
    # tasks
    Fault("two people are enough for VQA", "tasks/vqa/metric.py", "FULL = 3 ", "FULL = 2 ", "tasks"),
    Fault("NLVR consistent if one pair is right", "tasks/nlvr/task.py",
          "[all(one.correct == 1", "[any(one.correct == 1", "tasks"),
    Fault("a denial entailed", "tasks/entailment/scenes.py",
          "certain, possible = not possible, not certain", "certain, possible = not certain, not possible", "tasks"),
)  # fmt: skip


def found(copy: Path, fault: Fault) -> str | None:
    """The first test that fails with the fault in place; None if all quick tests pass."""
    file = copy / (fault.file if fault.file.startswith("tasks/") else f"src/maskvlm/{fault.file}")
    text = file.read_text()
    if text.count(fault.right) != 1:
        raise SystemExit(f"{fault.name}: {fault.file} has its line {text.count(fault.right)} times")
    file.write_text(text.replace(fault.right, fault.wrong))
    try:
        near = [f"tests/{name}" for name in fault.tests.split()]
        for tests in (near, ["tests"]):
            words = ["-m", "pytest", "-n", "2", "-x", "-m", "not slow", "-p", "no:cacheprovider", *tests]
            done = subprocess.run([sys.executable, *words], cwd=copy, capture_output=True, text=True)
            if done.returncode:
                lines = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR"))]
                return lines[0].split(" - ")[0] if lines else done.stdout[-200:]
    finally:
        file.write_text(text)
    return None


def main() -> None:
    """Try each fault and print what finds it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("word", nargs="?", default="", help="only faults whose name contains it")
    word = parser.parse_args().word
    faults = [fault for fault in FAULTS if word in fault.name]
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "copy"
        shutil.copytree(HERE, copy, ignore=shutil.ignore_patterns(".git", ".venv", "__pycache__"))
        count = 0
        for fault in faults:
            by = found(copy, fault)
            count += by is not None
            print(f"{'found' if by else 'MISSED':6}  {fault.name}  ({fault.file})  {by or ''}", flush=True)
    print(f"{count} of {len(faults)} found")


if __name__ == "__main__":
    main()
