"""Run the corpus of attacks against a tree of the program, each command in a process of its own that is watched.

    python tests/security/run_attacks.py                       # this tree, through every way in
    python tests/security/run_attacks.py --tree ../older       # another version
    python tests/security/run_attacks.py --ways 1 --only aliases

Prints a line for each attack that got through or ended otherwise than in one line, and a table. An audit hook of Python
sees what is opened and connected to; a file in the folder `mark` tells that code ran.
"""

import argparse
import http.server
import json
import os
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve()
ROOT = HERE.parents[2]
SECONDS = 60.0  # for one command; a stranger's file that takes longer has got through
MEMORY = 14 * 2**30


def main() -> int:
    options = parse()
    tree = options.tree.resolve()
    sys.path[:0] = [str(tree / "src"), str(tree), str(HERE.parent)]
    os.environ.update(
        OMP_NUM_THREADS="1", MPLBACKEND="Agg", TOKENIZERS_PARALLELISM="false", HF_HUB_DISABLE_TELEMETRY="1"
    )
    os.environ.update(HF_HUB_DOWNLOAD_TIMEOUT="2", HF_ENDPOINT="http://127.0.0.1:9", HF_HOME=tempfile.mkdtemp())
    warm()
    with tempfile.TemporaryDirectory() as scratch:
        results = run(options, Path(scratch))
    if options.json:
        options.json.write_text(json.dumps(results, indent=1))
    return report(results)


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=ROOT, help="a clone of the project")
    parser.add_argument("--ways", type=int, default=0, help="commands of each attack; 0: all")
    parser.add_argument("--only", default="", help="attacks whose name holds this")
    parser.add_argument("--json", type=Path, help="write what each did")
    parser.add_argument("--index", type=Path, help="an index to spoil; made if left out")
    return parser.parse_args()


def warm() -> None:
    """Import once what each command needs: children are forks."""
    import maskvlm.cli.ask_model
    import maskvlm.cli.bench
    import maskvlm.cli.convert
    import maskvlm.cli.lightning
    import maskvlm.inference.onnx_export
    import maskvlm.inference.pretrained
    import maskvlm.inference.search  # noqa: F401
    import tasks.entailment.task
    import tasks.vqa.task  # noqa: F401


def run(options: argparse.Namespace, scratch: Path) -> list[dict[str, Any]]:
    from attacks import OLD, Place, corpus

    secret, mark = scratch / "secret", scratch / "mark"
    for folder in (secret, mark):
        folder.mkdir()
    secrets(secret, OLD)
    port = listen(scratch / "hits")
    results: list[dict[str, Any]] = []
    index_for(options.index, scratch, OLD)
    for each in corpus():
        if options.only not in each.name or (each.kind == "index" and not (scratch / "index").is_dir()):
            continue
        here = scratch / each.name
        here.mkdir()
        place = Place(here, mark, secret, port, each.name)
        commands = each.make(place)
        for words in commands[: options.ways or None]:
            done = watched(words, here, scratch, secret)
            marks = sorted(path.name for path in mark.iterdir())
            for name in marks:
                (mark / name).unlink()
            hits = (scratch / "hits").read_text().split("\n")[:-1] if (scratch / "hits").exists() else []
            (scratch / "hits").unlink(missing_ok=True)
            precious = here / "precious.ckpt"
            gone = each.name == "a_callback_state_that_deletes" and not precious.exists()
            facts = {"marks": marks, "hits": hits, "deleted": gone}
            results.append({"attack": each.name, "kind": each.kind, "way": words[0], **done, **facts})
        shutil.rmtree(here, ignore_errors=True)
    return results


def secrets(folder: Path, old: Path) -> None:
    """What a stranger's file might point to."""
    shutil.copy(old / "hub" / "model.safetensors", folder / "secret.safetensors")
    shutil.copy(old / "run" / "last.ckpt", folder / "secret.ckpt")
    shutil.copy(old / "hub" / "config.json", folder / "secret.json")
    shutil.copy(old / "hub" / "tokenizer.json", folder / "tokenizer.json")
    (folder / "config.json").write_text(json.dumps({"model_type": "bert", "hidden_size": 16}))
    from PIL import Image

    Image.new("RGB", (48, 48), "blue").save(folder / "secret.png")


def listen(hits: Path) -> int:
    """A server that notes who asks it."""

    class Note(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with hits.open("a") as file:
                file.write(f"{self.path}\n")
            self.send_error(404)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            """Nothing is said."""

    server = http.server.HTTPServer(("127.0.0.1", 0), Note)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return int(server.server_address[1])


def index_for(ready_index: Path | None, scratch: Path, old: Path) -> None:
    """An index of four scenes, made by the program itself."""
    if ready_index is not None:
        shutil.copytree(ready_index, scratch / "index")
        return
    stack = ["base", "model/tiny", "pretrain", "pretrain-tiny", "data/scenes", "where/cpu"]
    words = [word for name in stack for word in ("-c", str(ROOT / "conf" / f"{name}.yaml"))]
    command = ["index", "--from", str(old / "run" / "last.ckpt"), "--out", str(scratch / "index"), "--device", "cpu"]
    watched([*command, *words, "--data.source.val", "4"], scratch, scratch, scratch / "secret")


def watched(words: list[str], here: Path, scratch: Path, secret: Path) -> dict[str, Any]:
    """Run a command in a fork; what it did, said and took."""
    out, event_file = scratch / "out.txt", scratch / "seen.txt"
    for file in (out, event_file):
        file.write_bytes(b"")
    began = time.monotonic()
    child = os.fork()
    if child == 0:
        code = 99
        try:
            code = in_child(words, here, out, event_file, secret)
        finally:
            os._exit(code)
    status = None
    while status is None:
        ended, raw = os.waitpid(child, os.WNOHANG)
        if ended:
            status = os.waitstatus_to_exitcode(raw)
        elif time.monotonic() - began > SECONDS:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
            status = -1000
        else:
            time.sleep(0.005)
    lines = out.read_text(errors="replace").splitlines()
    errors = [line for line in lines if line.startswith("error: ")]
    return {
        "code": status, "seconds": round(time.monotonic() - began, 2), "errors": len(errors),
        "traceback": any(line.startswith("Traceback") for line in lines),
        "said": (errors or lines[-1:] or [""])[0][:300],
        "seen": sorted(set(event_file.read_text().splitlines())),
    }  # fmt: skip


def in_child(words: list[str], here: Path, out: Path, event_file: Path, secret: Path) -> int:
    os.chdir(here)
    sys.path.insert(0, str(here))  # as `python -m` does
    file = os.open(out, os.O_WRONLY | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    log = os.open(event_file, os.O_WRONLY | os.O_APPEND)
    under = os.path.realpath(secret)

    def hook(event: str, args: tuple[Any, ...]) -> None:
        if event == "open" and isinstance(args[0], str | bytes):
            name = os.fsdecode(args[0])
            if name.startswith(("/", ".")) and os.path.realpath(name).startswith(under):
                os.write(log, f"opened {name}\n".encode())
        elif event == "socket.connect" and isinstance(args[1], tuple):
            os.write(log, f"connected {args[1][:2]}\n".encode())

    sys.addaudithook(hook)
    try:
        return execute(words)
    except BaseException:
        import traceback

        traceback.print_exc()
        return 98


def execute(words: list[str]) -> int:
    from maskvlm.cli.main import main as command
    from maskvlm.training.failure import report as tell

    if words[0] not in ("API", "AUTO", "PROCESSOR", "ENCODER"):
        return command(words)
    from transformers import AutoModel, AutoProcessor

    import maskvlm
    from maskvlm.model.encoders import TextEncoder

    load = {"API": maskvlm.MaskVLM.from_pretrained, "AUTO": AutoModel.from_pretrained}
    load["PROCESSOR"] = AutoProcessor.from_pretrained
    load["ENCODER"] = lambda path: TextEncoder(path, 12).load_pretrained()
    try:
        load[words[0]](words[1])
    except Exception as error:
        return tell(error)
    return 0


def through(done: dict[str, Any]) -> bool:
    """Whether an attack reached what it wanted: code, a file, a connection, or all of the time or the memory."""
    wanted = done["marks"] or done["hits"] or done["seen"] or done["deleted"]
    return bool(wanted) or done["code"] < 0


def one_line(done: dict[str, Any]) -> bool:
    """Whether it ended well (what it brought was not read) or in one line of the expected kind."""
    refused = done["code"] in (2, 65, 66, 69, 73, 77) and done["errors"] == 1
    return not done["traceback"] and (done["code"] == 0 or refused)


def report(results: list[dict[str, Any]]) -> int:
    bad = [done for done in results if through(done) or not one_line(done)]
    for done in bad:
        what = [name for name in ("marks", "hits", "seen", "deleted", "traceback") if done[name]]
        print(f"{done['attack']} ({done['way']}): {done['code']}, {done['seconds']} s, {what}: {done['said']}")
    names = {done["attack"] for done in results}
    reached = {done["attack"] for done in results if through(done)}
    codes = Counter(done["code"] for done in results)
    slowest = max((done["seconds"] for done in results), default=0.0)
    untidy = sum(not one_line(done) for done in results)
    print(
        f"{len(names)} attacks, {len(results)} commands: {len(reached)} attacks got through, {untidy} commands did not"
    )
    print(f"end in one line; exit codes {dict(sorted(codes.items()))}; slowest {slowest} s")
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
