"""`maskvlm doctor`: would this run work here, and how long would it take? One line per check; nothing is trained.

What cannot be measured before a run is predicted, and marked as such: memory from a simulated step, speed from the
operations of a step and an assumed share of the card's peak.
"""

import contextlib
import io
import math
import shutil
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import timm
import torch
from jsonargparse import Namespace
from lightning.fabric.utilities.throughput import get_available_flops
from transformers import PreTrainedTokenizerFast

from maskvlm.checkpoint.hub_client import WEIGHT_FILES, Unreachable, hub_reachable, is_cached
from maskvlm.checkpoint.warm_start import read_start
from maskvlm.cli.lightning import Parsed, built_source, check_cards, run_command
from maskvlm.config.arguments import OptionParser
from maskvlm.config.compose import data_root
from maskvlm.config.parser import MODE, CommandParser
from maskvlm.config.safe_yaml import cut
from maskvlm.data.module import PairData
from maskvlm.data.workers import SHARED, check_shared
from maskvlm.model.hf_text import pretrained_tokenizer
from maskvlm.model.maskvlm import MaskVLM
from maskvlm.objectives.task import Task
from maskvlm.training.failure import process_rank
from maskvlm.training.memory_estimate import GIB, StepSimulation, StepWork, copies_gradients, estimate_memory
from maskvlm.training.precision import alone
from maskvlm.training.run_record import machine
from maskvlm.training.sharding import ShardedStrategy
from maskvlm.utils.cores import cores
from maskvlm.utils.errors import ExitCode, UserError
from maskvlm.utils.paths import expand_user

OK, LOOK, FAILS = "ok", "look", "fails"
CHECKPOINTS = 4  # last, previous, best, and the one being written
CARD_GIB, CARD_TFLOPS = 80.0, 312.0  # of an A100; used if there is no card here and none is described
UTILISATION = 0.4  # share of the peak; assumed
LAUNCH = 10e-6  # host seconds to launch a kernel; assumed. With a small model the card waits for it
BATCH, BATCHES = 16, 3  # batch size, and number of batches, read to time a data worker
SENT = 2**26  # bytes of the timed all-reduce


class Finding(NamedTuple):
    """One line of the report. verdict: OK, LOOK or FAILS; todo: "" if there is nothing to do."""

    check: str
    verdict: str
    message: str
    todo: str = ""

    def __str__(self) -> str:
        return f"{self.verdict:<5}  {self.check:<13} {self.message}{f'. {self.todo}' if self.todo else ''}"


class Card(NamedTuple):
    """A GPU that the run would use. memory: bytes; peak: operations per second in bfloat16, None if unknown."""

    name: str
    memory: int
    peak: float | None


def main(arguments: list[str], allowed: Iterable[str] = ()) -> int:
    """Print the findings; returns 2 if something fails, else 0."""
    description = "Takes the words and options of `maskvlm pretrain`, and these:"
    parser = OptionParser("maskvlm doctor", description=description, allow_abbrev=False)
    parser.add_argument(
        "--peak", type=float, help="bfloat16 TFLOP/s of a GPU (default: the GPU's own, or an A100's 312)"
    )
    parser.add_argument("--memory", type=float, help="GiB of memory of a GPU (default: the GPU's own, or an A100's 80)")
    options, rest = parser.parse_known_args(arguments)
    settings = run_command(Parsed, ["fit", *rest], allowed).settings
    failed = False
    for finding in findings(settings, options.peak, options.memory):
        failed |= finding.verdict == FAILS
        if process_rank() == 0:
            print(finding, flush=True)
    return int(ExitCode.USAGE if failed else ExitCode.DONE)


def findings(settings: Namespace, peak: float | None = None, memory: float | None = None) -> Iterator[Finding]:
    """Findings of all checks, each yielded as soon as it is known.

    Args:
        settings: composed configuration of a pre-training.
        peak: TFLOP/s, memory: GiB of a card; None: the card's own, or assumed values.
    """
    if not alone():
        # Every process takes part; the other checks run on the first process only.
        yield examined("network", lambda: check_network(settings.trainer))
        if process_rank() != 0:
            return
    yield examined("machine", lambda: check_machine(settings.trainer))
    yield examined("torch", lambda: check_torch(settings.trainer))
    card = described(peak, memory)
    simulation = None
    try:
        simulation = simulated(settings)
    except UserError as error:
        yield failure("model", error)
    state = None if simulation is None else simulation.state_bytes - simulation.gradient_bytes
    yield examined("disk", lambda: check_disk(Path(settings.run), state))
    yield examined("data disk", check_data_disk)
    yield examined("weights", lambda: check_weights(settings))
    data = None
    if simulation is None:
        yield Finding("data", LOOK, "not checked, because the image size depends on the model", "Fix the model first")
    else:
        try:
            with contextlib.redirect_stdout(io.StringIO()) as output:  # goes into the finding's line, not before it
                data = opened_data(settings, simulation)
            yield Finding("data", OK, "; ".join([contents(data), *output.getvalue().splitlines()]))
        except UserError as error:
            yield failure("data", error)
    yield examined("shared memory", lambda: check_shared_memory(settings, simulation))
    if simulation is None:
        return
    yield from predicted_lines(settings, simulation, data, card)


def examined(check: str, look: Callable[[], Finding]) -> Finding:
    """What `look` finds, or a finding for the UserError that it raises."""
    try:
        return look()
    except UserError as error:
        return failure(check, error)


def failure(check: str, error: UserError) -> Finding:
    """A finding for an error that would end the run."""
    return Finding(check, FAILS, cut(f"{error.where}: {error.what}", 1000), cut(error.todo, 1000))


# ---------------------------------------------------------------------- this machine


def on_cards(trainer: Namespace) -> bool:
    """Whether the run asks for GPUs, or would use those of this machine."""
    return trainer.accelerator in ("gpu", "cuda") or (trainer.accelerator == "auto" and torch.cuda.is_available())


def processes(trainer: Namespace) -> int:
    """Number of processes on one machine: one for each device."""
    devices = trainer.devices
    if isinstance(devices, list):
        return len(devices)
    if str(devices).isdigit():
        return int(devices)
    return max(1, torch.cuda.device_count()) if on_cards(trainer) else 1


def check_machine(trainer: Namespace) -> Finding:
    """The devices that the run asks for."""
    here = machine()
    cards = f"{len(here['gpus'])} x {here['gpus'][0]}" if here["gpus"] else "no GPU"
    check_cards(trainer)
    on_processor = "The run would use the CPU (measure it with `maskvlm bench`); the predictions below are for a GPU"
    todo = "" if on_cards(trainer) else on_processor
    return Finding("machine", OK if not todo else LOOK, f"{here['processor']}, {here['cores']} cores, {cards}", todo)


def check_torch(trainer: Namespace) -> Finding:
    """Whether torch, its CUDA version, the driver and the card are compatible."""
    built, driver = torch.version.cuda, driver_version()
    message = f"torch {torch.__version__}, {f'built for CUDA {built}' if built else 'built without CUDA'}, "
    message += f"driver {driver}" if driver else "no NVIDIA driver"
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        if f"sm_{major}{minor}" not in torch.cuda.get_arch_list():
            # Kernels of the same major version run; those of another one do not.
            near = any(each.startswith(f"sm_{major}") for each in torch.cuda.get_arch_list())
            todo = f"It has no kernels for sm_{major}{minor}: install a newer torch" if not near else ""
            return Finding("torch", LOOK if todo else OK, message, todo)
        return Finding("torch", OK, message)
    if driver and built:
        todo = "CUDA cannot be initialised: no GPU is free, or the driver is older than that CUDA (see nvidia-smi)"
        return Finding("torch", FAILS if on_cards(trainer) else LOOK, message, todo)
    if driver:
        todo = "This machine has a GPU: install a torch with CUDA (pytorch.org, Get started)"
        return Finding("torch", FAILS if on_cards(trainer) else LOOK, message, todo)
    return Finding("torch", OK, message)


def driver_version() -> str | None:
    """Version of the NVIDIA driver; None if nvidia-smi is missing or fails."""
    if shutil.which("nvidia-smi") is None:
        return None
    ask = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(ask, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.split("\n")[0].strip() or None if done.returncode == 0 else None


def check_disk(folder: Path, state: int | None) -> Finding:
    """Disk space for the checkpoints of the run. state: bytes of one checkpoint; None: unknown."""
    free, place = free_space(folder)
    message = f"{place}: {free / GIB:.1f} GiB free"
    if state is None:
        return Finding("disk", OK, message)
    need = CHECKPOINTS * state
    message += f", {CHECKPOINTS} checkpoints take {need / GIB:.1f}"
    if free < need:
        return Finding("disk", FAILS, message, "Free some space there, or name a --folder on a larger disk")
    return Finding("disk", OK, message)


def check_data_disk() -> Finding:
    """Disk space where data sets are prepared."""
    free, place = free_space(data_root())
    todo = "" if free >= GIB else "No room to prepare a set: free some space, or set DATA_ROOT to a larger disk"
    return Finding("data disk", LOOK if todo else OK, f"{place}: {free / GIB:.1f} GiB free", todo)


def free_space(folder: Path) -> tuple[int, Path]:
    """Free bytes of a folder, or of its nearest parent that exists, and the path of that folder."""
    place = next(each for each in (folder, *folder.absolute().parents) if each.is_dir())
    return shutil.disk_usage(place).free, place


def check_shared_memory(settings: Namespace, simulation: StepSimulation | None) -> Finding:
    """Shared memory for the batches of data workers. Raises UserError if there is too little."""
    each, workers = processes(settings.trainer), workers_of(settings)
    if not workers or not Path(SHARED).is_dir() or simulation is None:
        return Finding("shared memory", OK, f"{workers} data workers")
    # one byte per colour channel
    image = 3 * simulation.model.backbone.image.image_size**2
    check_shared(image * pairs_of(settings), workers, each)
    free = shutil.disk_usage(SHARED).free / GIB
    return Finding("shared memory", OK, f"{SHARED}: {free:.1f} GiB free, enough for {each} x {workers} data workers")


def workers_of(settings: Namespace) -> int:
    """Number of data workers per process, as `PairData` chooses it."""
    workers: int | None = settings.data.init_args.get("workers")
    if workers is not None or not on_cards(settings.trainer):
        return workers or 0
    return min(12, cores() // processes(settings.trainer))


def check_network(trainer: Namespace) -> Finding:
    """How fast the processes of this launch all-reduce a tensor; every process must call this."""
    # Fabric reads the ranks of torchrun and SLURM as the trainer does.
    try:
        fabric = L.Fabric(
            accelerator=trainer.accelerator, strategy="ddp", devices=trainer.devices, num_nodes=trainer.num_nodes
        )
        fabric.launch()
        numbers = torch.ones(SENT // 4, device=fabric.device)
        seconds = []
        for _ in range(4):
            fabric.barrier()
            began = time.perf_counter()
            float(fabric.all_reduce(numbers, reduce_op="sum").sum())  # type: ignore[union-attr]  # waits for the device
            seconds.append(time.perf_counter() - began)
    except (RuntimeError, ValueError) as error:
        todo = "Start as many processes as devices and num_nodes say, and check that the machines can reach each other"
        return Finding("network", FAILS, str(error).splitlines()[0], todo)
    best = min(seconds[1:])  # the first opens the connections
    # A ring passes each number on twice, except a process's own part.
    rate = 2 * (fabric.world_size - 1) / fabric.world_size * SENT / best
    message = f"{fabric.world_size} processes add up {SENT / 2**20:.0f} MiB in {1000 * best:.0f} ms"
    return Finding("network", OK, f"{message} ({rate / 1e9:.1f} GB/s)")


# ---------------------------------------------------------------------- what the run starts from


def simulated(settings: Namespace) -> StepSimulation:
    """The configured model and task on the meta device: no weights are read, and only the configuration of a model on
    the hub. Raises UserError if they cannot be built."""
    backbone = settings.model.backbone.clone()
    backbone.init_args.start = None
    for encoder in (backbone.init_args.image, backbone.init_args.text):
        encoder.init_args.random_init = True
    backbone.init_args.image.init_args.weights = None
    parser = CommandParser(parser_mode=MODE)
    parser.add_subclass_arguments(MaskVLM, "backbone")
    parser.add_subclass_arguments(Task, "task")
    with torch.device("meta"):
        parts = parser.instantiate(parser.parse_object({"backbone": backbone, "task": settings.model.task}))
        parts.task.build(parts.backbone)
    # By default the precision that the run would choose on a card.
    precision = settings.trainer.precision or "bf16-mixed"
    try:
        return StepSimulation(parts.backbone, parts.task, str(precision), settings.data.init_args.get("captions") or 1)
    except KeyError:
        what = f"a step in {precision} cannot be simulated"
        raise UserError("trainer.precision", what, "Leave it out, or choose bf16-mixed") from None


def check_weights(settings: Namespace) -> Finding:
    """Whether the weights that the run starts from are here or can be downloaded. Downloads nothing.

    Raises:
        Unreachable: they are neither here nor can the hub be reached.
    """
    if settings["from"] is not None:
        return Finding("weights", OK, f"of the checkpoint {settings['from']}")
    if settings.model.random_init:
        return Finding("weights", OK, "random, as asked for")
    image, text = (settings.model.backbone.init_args[name].init_args for name in ("image", "text"))
    # name of the encoder -> its repository on the hub; missing local weights cannot be downloaded
    absent: dict[str, str] = {}
    for encoder, local, repository in (
        (f"{image.name} (timm)", image.weights, hub_of_vit(image.name)),
        (f"{text.name} (Hugging Face)", text.name if expand_user(text.name).is_dir() else None, text.name),
    ):
        if local is not None and not expand_user(local).exists():
            raise UserError(local, "no such file or folder of weights", "Check the path", ExitCode.MISSING_INPUT)
        if local is None and not is_cached(repository, WEIGHT_FILES):
            absent[encoder] = repository
    if not absent:
        return Finding("weights", OK, "both encoders' weights are on this machine")
    if not hub_reachable():
        raise Unreachable(*absent)
    return Finding("weights", LOOK, f"{' and '.join(absent)}: on the hub", "The run fetches them at its start")


def hub_of_vit(name: str) -> str:
    """The hub repository that timm names for a model's weights; "" if there is none."""
    facts = timm.get_pretrained_cfg(name, allow_unregistered=True)
    return (facts.hf_hub_id or "") if facts is not None else ""


def opened_data(settings: Namespace, simulation: StepSimulation) -> PairData:
    """The configured data, set up as for training. Raises UserError if they are missing or unsuitable."""
    arguments = {key: value for key, value in vars(settings.data.init_args).items() if key not in ("source", "spec")}
    spec = simulation.model.backbone.input_spec
    # The simulated model has none of the weights, and so may lack the tokenizer that belongs to them.
    spec = spec._replace(tokenizer=spec.tokenizer or tokenizer_of_weights(settings))
    data = PairData(built_source(settings), spec, **arguments)
    data.setup("fit")
    return data


def tokenizer_of_weights(settings: Namespace) -> PreTrainedTokenizerFast | None:
    """The tokenizer of the weights that the run starts from; None if they have none, or would have to be fetched.
    With another one, other texts would be counted as cut than in the run."""
    start, text = settings["from"], settings.model.backbone.init_args.text.init_args
    if start is not None:
        return read_start(start).tokenizer
    there = expand_user(text.name).is_dir() or is_cached(text.name, WEIGHT_FILES)
    return pretrained_tokenizer(text.name, text.tokenizer) if there and not settings.model.random_init else None


def contents(data: PairData) -> str:
    """Number of images in each split."""
    # A streamed split has length 0.
    sizes = {
        name: f"{len(pairs):,} {'image' if len(pairs) == 1 else 'images'}" if len(pairs) else "a stream"
        for name, pairs in data.splits.items()
    }
    return ", ".join(f"{name}: {size}" for name, size in sizes.items())


# ---------------------------------------------------------------------- predictions


def described(peak: float | None, memory: float | None) -> Card:
    """The card that predictions are for: this machine's, or a described or assumed one."""
    card = Card("a GPU (A100 assumed)", int(CARD_GIB * GIB), CARD_TFLOPS * 1e12)
    if torch.cuda.is_available():
        facts = torch.cuda.get_device_properties(0)
        card = Card(facts.name, facts.total_memory, get_available_flops(torch.device("cuda"), torch.bfloat16))
    elif peak is not None or memory is not None:
        card = card._replace(name="the GPU described")
    if memory is not None:
        card = card._replace(memory=int(memory * GIB))
    return card if peak is None else card._replace(peak=peak * 1e12)


def pairs_of(settings: Namespace) -> int:
    """Number of pairs per process and forward pass."""
    data, trainer = settings.data.init_args, settings.trainer
    return max(1, data.batch_size // (data.accumulate or 1) // (processes(trainer) * trainer.num_nodes))


def predicted_lines(
    settings: Namespace, simulation: StepSimulation, data: PairData | None, card: Card
) -> Iterator[Finding]:
    """Memory, speed and duration of the run, and whether the data workers keep up with it."""
    cards, chunk = processes(settings.trainer) * settings.trainer.num_nodes, settings.model.chunk
    pairs = pairs_of(settings)
    try:
        memory = memory_line(settings, simulation, card)
        phases = simulation.work(pairs, chunk)
    except Exception as error:  # a third-party loss or masking that reads the value of a fake tensor
        todo = "Try it: maskvlm bench with the same words"
        yield Finding("memory", LOOK, f"the step cannot be simulated ({type(error).__name__}: {error})", todo)
        return
    yield memory
    if card.peak is None:
        yield Finding("speed", LOOK, f"{card.name}: its peak speed is unknown", "Give --peak TFLOPS, or maskvlm bench")
        return
    # Seconds of the mean step: in each phase computing or launching, whichever takes longer.
    computed_P = [pairs * each.flops / (UTILISATION * card.peak) for each in phases]
    launched_P = [each.launched * LAUNCH for each in phases]
    slower_P = [max(seconds) for seconds in zip(computed_P, launched_P, strict=True)]
    rate = pairs / sum(each.share * seconds for each, seconds in zip(phases, slower_P, strict=True))
    line = f"predicted: {rate:,.0f} pairs/s per GPU, assuming "
    if computed_P == slower_P:
        line += f"{100 * UTILISATION:.0f} % of {card.peak / 1e12:,.0f} TFLOP/s for {format_flops(phases)} GFLOP/pair"
    else:
        most = max(each.launched for each in phases)
        line += f"{1e6 * LAUNCH:.0f} us for each of up to {most:,} kernels per step, which is small for a GPU"
    todo = "On a GPU, `maskvlm bench` measures it"
    if data is not None:
        hours = data.total_steps * data.batch_size / (cards * rate) / 3600
        line += f"; {data.total_steps:,} steps in {hours:,.2f} hours on {cards} of them, without evaluation"
    yield Finding("speed", OK, line, todo)
    if data is not None:
        yield examined("data workers", lambda: check_workers(settings, data, rate))


def memory_line(settings: Namespace, simulation: StepSimulation, card: Card) -> Finding:
    """Predicted memory of a step on one card; raises as `StepSimulation.memory`."""
    strategy = settings.trainer.strategy
    if str(getattr(strategy, "class_path", "")).endswith(f".{ShardedStrategy.__name__}"):
        # A prediction for the whole model would say that a model sharded for lack of memory does not fit.
        return Finding("memory", LOOK, "not predicted where GPUs share the weights", "See docs/gpus.md, When to shard")
    copied = processes(settings.trainer) * settings.trainer.num_nodes > 1 and copies_gradients(strategy)
    memory = estimate_memory(simulation, pairs_of(settings), settings.model.chunk, card.memory, copied)
    worse = FAILS if memory.needed > card.memory else LOOK
    line, todo = f"predicted for {card.name}: {memory}", f"{memory.todo[:1].upper()}{memory.todo[1:]}"
    return Finding("memory", OK if memory.fits else worse, line, todo)


def format_flops(phases: Sequence[StepWork]) -> str:
    """GFLOP per pair: `98.7`, or for a run in phases `61.2 (60 % of the steps 30.1, 40 % of the steps 107.9)`."""
    mean = sum(each.share * each.flops for each in phases) / 1e9
    if len(phases) == 1:
        return f"{mean:,.1f}"
    shares = [f"{100 * each.share:.0f} % of the steps {each.flops / 1e9:,.1f}" for each in phases]
    return f"{mean:,.1f} ({', '.join(shares)})"


def check_workers(settings: Namespace, data: PairData, rate: float) -> Finding:
    """Whether the data workers of a process keep up with a card. rate: pairs per second that the card needs."""
    read, workers = images_per_second(data), workers_of(settings)
    needed, each = math.ceil(rate / read), processes(settings.trainer)
    message = f"one reads {read:,.0f} images/s (measured here): a GPU needs {needed}, {workers} are configured"
    if not on_cards(settings.trainer):
        return Finding("data workers", OK, message)
    if needed * each > cores():
        todo = f"This machine has {cores()} cores, not {each} x {needed}: GPUs would wait. Augment less or add cores"
        return Finding("data workers", LOOK, message, todo)
    if needed > workers:
        return Finding("data workers", LOOK, message, f"Set --data.workers {needed}")
    return Finding("data workers", OK, message)


def images_per_second(data: PairData) -> float:
    """Images per second of one single-core data worker, measured by reading, augmenting and batching some images."""
    data.batch_size, data.accumulate, data.workers = BATCH, 1, 0
    data.steps, data.epochs = 1 + BATCHES, None
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        batches = iter(data.train_dataloader())
        next(batches)  # opens files
        began = time.perf_counter()
        read = sum(len(batch.valid_B) for batch in batches)
        return read / (time.perf_counter() - began)
    finally:
        torch.set_num_threads(threads)
