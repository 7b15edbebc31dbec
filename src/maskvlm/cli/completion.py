"""`maskvlm completion`: the script that completes commands, words and their values in bash and zsh."""

from maskvlm.cli.commands import REGISTRY, WORDS
from maskvlm.config.compose import SPLITS, choices, home, sets_of, tasks

PREPARED = (
    '$(compgen -G "${DATA_ROOT:-data}/*/manifest.json" | while read -r file; do file="${file%/*}"; '
    'echo "${file##*/}"; done)'
)
"""Shell code that lists the names of the prepared sets."""

SCRIPT = """# eval "$(maskvlm completion)" in ~/.bashrc; in ~/.zshrc after `autoload -U +X bashcompinit && bashcompinit`
_maskvlm() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD-1]}}" among=""
  if [ "$current" = "=" ]; then  # bash takes model=tiny for three words
    before="=" current="" name="${{COMP_WORDS[COMP_CWORD-1]}}"
  elif [ "$before" = "=" ]; then
    name="${{COMP_WORDS[COMP_CWORD-2]}}"
  else
    name=""
  fi
  if [ -n "$name" ]; then
    case "$name" in
{values}
    esac
    case "$name:${{COMP_WORDS[1]}}:${{COMP_WORDS[2]}}" in
{sets}
    esac
  elif [ "$COMP_CWORD" = 1 ]; then
    among="{commands}"
  else
    case "${{COMP_WORDS[1]}}" in
{words}
    esac
  fi
  COMPREPLY=($(compgen -W "$among" -- "$current"))
  case "${{COMPREPLY[0]}}" in *=) compopt -o nospace 2>/dev/null ;; esac
}}
complete -o default -F _maskvlm maskvlm"""


def sets_shown(task: str) -> str:
    """The data sets of a task; among them the prepared ones, if it takes any images with captions."""
    known = sets_of(task)
    return " ".join([*(name for name in known if name != "prepared"), *([PREPARED] if "prepared" in known else [])])


def main(arguments: list[str], allowed: list[str]) -> str:
    """The script, or with --help how to use it."""
    if {"-h", "--help"} & {*arguments}:
        return SCRIPT.partition("\n")[0].removeprefix("# ").format()
    values = [f'      {name}) among="{" ".join(among())}" ;;' for name, (_, among, _) in WORDS.items() if among()]
    values += ['      from) among="$(compgen -G "checkpoints/*/best.ckpt")" ;;']
    trained = [command.name for command in REGISTRY if any("TASK" in place for place in command.places)]
    sets = [
        f'      {"|".join(f"data:{name}:{task}" for name in trained)}) among="{sets_shown(task)}" ;;'
        for task in tasks()
    ]
    # The shell looks up checkpoints and prepared sets at each completion; the other values are fixed now.
    sets += [f'      {"|".join(f"split:{name}:*" for name in ("embed", "index"))}) among="train {" ".join(SPLITS)}" ;;']
    sets += [
        f'      data:*) among="{" ".join(name for name in choices("data") if name != "prepared")} {PREPARED}" ;;',
        f'      name:*) among="{PREPARED}" ;;',
    ]
    # Commands with nothing to complete after them have no line.
    words = [
        f'      {command.name}) among="{" ".join([*named, *(f"{name}=" for name in command.words)])}" ;;'
        for command in REGISTRY
        if (named := tasks() if any("TASK" in place for place in command.places) else []) or command.words
    ]
    known = " ".join(sorted(path.stem for path in (home() / "studies").glob("*.yaml")))
    words += [f'      study) among="{known} --jobs --only --seeds --where --page --list --submit" ;;']
    commands = " ".join(command.name for command in REGISTRY)
    return SCRIPT.format(values="\n".join(values), sets="\n".join(sets), commands=commands, words="\n".join(words))
