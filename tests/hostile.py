"""Files that somebody damaged or made to do harm, and what must hold whatever a command is given.

Mutations of real files, by bytes and by their structure; traps that are no files; a watch on what a process does.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import resource
import signal
import struct
import sys
from pathlib import Path
from typing import Any

import yaml

MEMORY_BYTES = 1 << 30
"""How much more than before a command may hold, whatever it reads."""
CPU_SECONDS, WALL_SECONDS = 60, 600
"""Far more than any input takes, and far less than a bomb does: a busy machine is no bug."""

_VALUES: list[Any] = [
    None, True, -1, 0, 1, 2**31, 2**63, 2**200, 10**400, 1e308, float("nan"), float("inf"), "", "a" * 5000, "../../x",
    "/etc/passwd", "/dev/zero", "\0", "\ud800", "é", "\x1b]0;x\x07", "(a+)+$", r"((\w|\.)+)+!", "[", "(", "*",
    "all-linear", [], [[]], {}, {"": {}}, [1, "a", None], ["q_proj"] * 500, {"q_proj": -1}, {"(": 1}, "style@1",
    "style@1+style@1", "base", "sha256:", "LORA", "ADALORA", "F4", [0], [2**62, 2**62], [-1, 4], [0.5], "line\nline",
    {"\x1b[31m": 1},
]  # fmt: skip
_WORDS = [
    b"\0", b"\xff\xfe", b"\xef\xbb\xbf", b"\r\n", b"<<<<<<< HEAD\n", b"=======\n", b">>>>>>> b\n", b"&a [*a]", b"*a",
    b"!!python/object/apply:os.system [x]", b"!x ", b"---\n", b"...\n", b"{" * 300, b"[" * 3000, b"- " * 300, b"? ",
    b": ", b"\t", b"9" * 5000, b"-", b"1e999", b".nan", b"\\ud800", b'"', b"'", b"null", b"\x1b[31m", b'"\\e[31m"',
    b"\xc3\x28", b"\xc2\x85", b"{0-999999999}", b"schema: 2\n", b"schema: 99999999999999999999\n", b"<<: *a\n",
    b'"peft_version": "9.9"', b"name: x\n", b"../", b"%", b"|", b">",
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\nd: [*c, *c]\n",
]  # fmt: skip
BOMBS = [
    lambda size: b"[" * size,
    lambda size: b"{a: " * (size // 4),
    lambda size: b"- " * (size // 2),
    lambda size: b"- x\n" * (size // 4),
    lambda size: b"[" + b"[]," * (size // 3) + b"[]]",
    lambda size: b"".join(b"k%d: v\n" % n for n in range(size // 10)),
    lambda size: b"{" + b"".join(b'"k%d": {},' % n for n in range(size // 12)) + b'"z": 0}',
    lambda size: b'{"a": ' + b"9" * size + b"}",
    lambda size: b'{"a": "' + b"a" * size + b'"}',
    lambda size: b"a: " + b"a" * size,
    lambda size: b"a: |\n" + b" \n" * (size // 2),
    lambda size: b" " * size,
    lambda size: b"\n" * size,
    lambda size: b"\0" * size,
    lambda size: b"#" * size,
]
"""Few kinds of bytes, many of them: what costs a careless reader more than their number."""


# -- files that are damaged -------------------------------------------------------------------------------------------


def mutate(data: bytes, chance: random.Random) -> bytes:
    """Some bytes of a file changed, added, doubled or gone."""
    for _ in range(chance.choice((1, 1, 1, 2, 5))):
        at = chance.randrange(len(data) + 1)
        length = chance.choice((1, 1, 2, 8, 50))
        data = chance.choice(
            (
                data[:at],
                data[at:],
                data[:at] + data[at + length :],
                data[:at] + chance.choice(_WORDS) + data[at:],
                data[:at] + chance.choice(_WORDS) + data[at + length :],
                data[:at] + chance.randbytes(length) + data[at + length :],
                data[: at + length] + data[at:],
                data.replace(b"\n", chance.choice((b"\r\n", b"\r", b"\n\n"))),
                b"\xef\xbb\xbf" + data,
                data.decode(errors="replace").encode("utf-16"),
            )
        )
    return data


def mutate_value(value: Any, chance: random.Random) -> Any:
    """A value of JSON or YAML of which one part, somewhere, is another."""
    if isinstance(value, dict) and value and chance.random() < 0.85:
        key = chance.choice(list(value))
        changed = dict(value)
        match chance.randrange(6):
            case 0:
                del changed[key]
            case 1:
                changed[chance.choice(("x", "", "lora_new", "é", "a" * 300))] = chance.choice(_VALUES)
            case _:
                changed[key] = mutate_value(value[key], chance)
        return changed
    if isinstance(value, list) and value and chance.random() < 0.7:
        at = chance.randrange(len(value))
        return [*value[:at], mutate_value(value[at], chance), *value[at + 1 :]]
    return chance.choice(_VALUES)


def mutate_json(data: bytes, chance: random.Random) -> bytes:
    return json.dumps(mutate_value(json.loads(data), chance)).encode()


def mutate_json_line(data: bytes, chance: random.Random) -> bytes:
    lines = data.splitlines()
    at = chance.randrange(len(lines))
    return b"\n".join([*lines[:at], mutate_json(lines[at], chance), *lines[at + 1 :]])


def mutate_yaml(data: bytes, chance: random.Random) -> bytes:
    value = yaml.load(data, Loader=yaml.BaseLoader)  # every scalar as it is written, 1e-5 and on: among them
    return yaml.safe_dump(mutate_value(value, chance), sort_keys=False, allow_unicode=chance.random() < 0.5).encode(
        errors="surrogatepass"
    )


def mutate_safetensors(data: bytes, chance: random.Random) -> bytes:
    """A file whose header lies about its length, its tensors or their places, or is no header."""
    length = struct.unpack("<Q", data[:8])[0]
    header, tensors = data[8 : 8 + length], data[8 + length :]
    changed = mutate_json(header, chance) if chance.random() < 0.7 else mutate(header, chance)
    said = chance.choice((len(changed),) * 6 + (0, 1, length, 2**63, 2**64 - 1))
    return struct.pack("<Q", said) + changed + tensors[: chance.choice((None, None, None, 0, 5))]


_BY_STRUCTURE = {
    ".safetensors": mutate_safetensors,
    ".json": mutate_json,
    ".jsonl": mutate_json_line,
    ".yaml": mutate_yaml,
}


def mutate_file(name: str, data: bytes, chance: random.Random) -> bytes:
    """A file mutated in a way that its kind is likely to be hurt by."""
    by_structure = _BY_STRUCTURE.get(Path(name).suffix, mutate)
    return by_structure(data, chance) if chance.random() < 0.6 else mutate(data, chance)


def damage(path: Path, chance: random.Random, largest: int, *, pipes: bool = True) -> None:
    """Put something else in a file's place: mostly a mutation of it, sometimes no file at all, or a bomb.

    A bomb has at most ``largest`` bytes. A file that is named on the command line may be a pipe, and is waited for.
    """
    kind = chance.random()
    if kind < 0.05:
        path.unlink()
        chance.choice(_NO_FILES if pipes else [make for make in _NO_FILES if make is not os.mkfifo])(path)
    elif kind < 0.08:
        path.write_bytes(chance.choice(BOMBS)(min(largest, 10 ** chance.randrange(3, 9))))
    else:
        path.write_bytes(mutate_file(path.name, path.read_bytes(), chance))


def _sparse(path: Path) -> None:
    with path.open("wb") as stream:
        stream.truncate(10 << 30)


_NO_FILES = [
    lambda path: None,
    lambda path: path.mkdir(),
    lambda path: path.symlink_to("/dev/zero"),
    lambda path: path.symlink_to("/dev/null"),
    lambda path: path.symlink_to(path.name),
    lambda path: path.symlink_to("../" * 20 + "etc/passwd"),
    os.mkfifo,
    _sparse,
]


# -- what must hold ---------------------------------------------------------------------------------------------------

CHANGES = {
    "os.remove": 1, "os.rmdir": 1, "os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.truncate": 1,
    "os.chmod": 1, "os.chown": 1, "shutil.rmtree": 1, "shutil.move": 2, "shutil.copyfile": 2,
}  # fmt: skip
"""Events of Python's audit hook that change a file system, and which of their arguments, from one, is what changes."""
_NEVER = ("pickle.", "subprocess.", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "socket.")
_BROKE_OUT = 98


def contain(place: Path, also: Path | None = None) -> None:
    """For a process that reads hostile files: end it when it changes anything outside ``place``, opens a pickle, starts
    a process, asks the network, or takes more time or memory than there is reason for.

    With ``also``, huggingface_hub's cache, it may change that, too, and ask the network.
    """
    allowed = [folder.resolve() for folder in (place, also) if folder]
    never = _NEVER if also is None else tuple(event for event in _NEVER if event != "socket.")

    def leave(what: str) -> None:
        os.write(2, f"\nbroke out: {what}\n".encode(errors="replace"))
        os._exit(_BROKE_OUT)

    def check(found: Path, event: str) -> None:
        is_ours = found == Path(os.devnull) or "__pycache__" in found.parts
        if not is_ours and not any(found.is_relative_to(folder) for folder in allowed):
            leave(f"{event} {found}")

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(never):
            leave(f"{event} {arguments}")
        elif event == "open":
            path, _, flags = arguments
            if not isinstance(path, int | None) and flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
                with contextlib.suppress(RuntimeError):  # a link to itself leads nowhere
                    check(Path(os.fsdecode(path)).resolve(), event)
        elif event in CHANGES and not isinstance(path := arguments[CHANGES[event] - 1], int):
            whole = Path(os.fsdecode(path)).absolute()
            check(whole.parent.resolve() / whole.name, event)  # a link that is removed or renamed is not followed

    os.environ["STACKCTL_CACHE"] = str(place / "cache")
    bound()
    sys.addaudithook(hook)


def bound() -> None:
    """End this process when it takes too long; let it run out of memory when it wants too much."""
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS + 5))
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(WALL_SECONDS)
    status = Path("/proc/self/status")
    if status.is_file():  # elsewhere memory is not bounded
        now = next(int(line.split()[1]) << 10 for line in status.read_text().splitlines() if line.startswith("VmData"))
        resource.setrlimit(resource.RLIMIT_DATA, (now + MEMORY_BYTES, resource.getrlimit(resource.RLIMIT_DATA)[1]))


def tree(folder: Path) -> dict[str, bytes]:
    """Everything below a folder, but for locks and what is only remembered; of what is no file, that it is there."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if _is_small_file(path) else b"-"
        for path in sorted(folder.rglob("*"))
        if path.name not in (".lock", ".digests.json") and path.relative_to(folder).parts[0] != "cache"
    }


def _is_small_file(path: Path) -> bool:
    return path.is_file() and not path.is_symlink() and path.stat().st_size < 1 << 25


def ill_mannered(code: int | None, said: str, *, hub: bool = False) -> str | None:
    """What is wrong with how a command ended, if anything is; one that asks the ``hub`` may end with 6, too."""
    if code not in (0, 1, 2, 3, 4, 5, *([6] if hub else [])):
        return f"ended with {code}"
    if "this is a bug" in said or "Traceback" in said:
        return "took it for a bug of its own"
    if signs := {sign for sign in said if (sign < " " and sign not in "\n") or "\x7f" <= sign <= "\x9f"}:
        return f"showed control characters: {signs}"
    lines = said.splitlines()
    if code and not any("problem" in line for line in lines):  # verify and inspect list problems instead
        starts = [line.partition(" ")[0] for line in lines if line.startswith(("error:", "hint:"))]
        if starts[-2:] != ["error:", "hint:"]:
            return "said no error and hint"
    return None
