"""What the documents and the wrappers say is what the scripts take."""

import ast
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import config
import model_registry
import of_cnn_evaluate
import of_cnn_inference
import of_cnn_train_val
import predict
import resnet_to_onnx
import serve
from cnns.errors import UsageError
from golden import learning_curves
from small import ROOT
from tools import (
    benchmark,
    browse,
    convert_snapshot,
    deploy,
    doctor,
    find_learning_rate,
    make_mini_imagenet,
    make_ofrecord,
    plan_scale,
    report,
    runs,
    verify_ofrecord,
    write_flags,
)

PARSE = {
    "of_cnn_train_val.py": of_cnn_train_val.parse_args,
    "of_cnn_evaluate.py": of_cnn_evaluate.parse_args,
    "of_cnn_inference.py": of_cnn_inference.parse_args,
    "resnet_to_onnx.py": resnet_to_onnx.parse_args,
    "tools/make_ofrecord.py": make_ofrecord.make_parser().parse_args,
    "tools/verify_ofrecord.py": verify_ofrecord.parse_args,
    "tools/make_mini_imagenet.py": make_mini_imagenet.make_parser().parse_args,
    "tools/convert_snapshot.py": convert_snapshot.make_parser().parse_args,
    "tools/browse.py": browse.make_parser().parse_args,
    "tools/benchmark.py": benchmark.make_parser().parse_args,
    "tools/plan_scale.py": plan_scale.make_parser().parse_args,
    "tools/report.py": report.parse_args,
    "tools/runs.py": runs.parse_args,
    "tools/doctor.py": doctor.parse_args,
    "tools/find_learning_rate.py": find_learning_rate.parse_args,
    "tools/deploy.py": deploy.parse_args,
    "served/predict.py": predict.parse_args,
    "served/serve.py": serve.parse_args,
    "tests/golden/learning_curves.py": learning_curves.make_parser().parse_args,
}
WRAPPERS = {
    "train.sh": "of_cnn_train_val.py",
    "evaluate.sh": "of_cnn_evaluate.py",
    "inference.sh": "of_cnn_inference.py",
}
# No directory that starts with a dot: .venv, .pytest_cache.
DOCUMENTS = [
    path
    for path in sorted(ROOT.rglob("*.md"))
    if not any(part.startswith(".") for part in path.relative_to(ROOT).parts)
]
README, CHINESE = ROOT / "README.md", ROOT / "README.zh-CN.md"
DOCS = ROOT / "docs"


def commands(text: str) -> list[list[str]]:
    """The commands of the `sh` blocks of a Markdown text, as words."""
    found = []
    for block in re.findall(r"^```sh\n(.*?)^```", text, re.MULTILINE | re.DOTALL):
        for line in block.replace("\\\n", " ").splitlines():
            if words := shlex.split(line, comments=True):
                found.append(words)
    return found


DOCUMENTED = [
    pytest.param(words, id=f"{path.relative_to(ROOT)}: {' '.join(words)[:70]}")
    for path in DOCUMENTS
    for words in commands(path.read_text(encoding="utf-8"))
]


@pytest.fixture(scope="module")
def wrappers(tmp_path_factory):
    """The wrappers with a Python that only prints what it was called with."""
    root = tmp_path_factory.mktemp("wrappers")
    for name in WRAPPERS:
        (root / name).write_bytes((ROOT / name).read_bytes())
    python = root / "print_arguments"
    python.write_text(f'#!{sys.executable}\nimport sys\nprint("\\0".join(sys.argv[1:]), end="")\n')
    python.chmod(0o755)
    (root / "env.sh").write_text('python="$PWD/print_arguments"\n')
    return root


def run_wrapper(root: Path, name: str, *argv: str, env=None) -> list[str]:
    done = subprocess.run(
        ["sh", name, *argv],
        cwd=root,
        env=os.environ | (env or {}),
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.split("\0")


def check(words: list[str], root: Path) -> str:
    """Parse one command with the real parser of what it runs; return what kind it was."""
    env = {}
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name, value = words.pop(0).split("=", 1)
        env[name] = value
    if not words:
        return "assignment"
    program, *argv = words
    argv = [re.sub(r"\$DATA_ROOT\b", "data/imagenet/ofrecord", word) for word in argv]
    if program == "sh" and argv[0] in WRAPPERS:
        script, *argv = run_wrapper(root, *argv, env=env)
    elif os.path.basename(program) == "python3" and argv[0].endswith(".py"):
        script, *argv = argv
    else:
        return "other"
    try:
        args = PARSE[script](argv)
    except SystemExit as exit_:
        assert exit_.code == 0 and argv in (["--help"], ["--version"]), words
    except UsageError as error:  # what an earlier command of the page makes is not here
        if not re.search(r"output/snapshots\S* cannot be read|no directory output/", str(error)):
            raise
    else:
        if script == "of_cnn_train_val.py":  # flags that contradict one another
            config.finish_train_args(config.make_parser("train").complete(args), device="cpu")
    return "script"


@pytest.mark.parametrize("words", DOCUMENTED)
def test_commands_in_documents_parse(words, wrappers):
    check(list(words), wrappers)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_no_document_has_a_place_left_to_fill_in(path):
    text = path.read_text(encoding="utf-8")
    assert not re.findall(r"^[A-Z]{4,}$|TODO|FIXME|\bXX+\b", text, re.MULTILINE)


def test_the_documents_hold_commands(wrappers):
    kinds = [check(words.values[0][:], wrappers) for words in DOCUMENTED]
    assert kinds.count("script") > 50
    with pytest.raises(UsageError):
        check(["sh", "train.sh", "--no_such_flag"], wrappers)


@pytest.mark.parametrize("name", WRAPPERS)
def test_wrappers_call_their_script_with_flags_that_parse(name, wrappers):
    env = {
        "DATA_ROOT": "a b/data",
        "NUM_EPOCH": "3",
        "MODEL_LOAD_DIR": "some where",
        "IMAGE_PATH": "my photo.jpg",
    }
    script, *argv = run_wrapper(wrappers, name, env=env)
    assert script == WRAPPERS[name]
    args = PARSE[script](argv)
    if name == "train.sh":
        assert args.train_data_dir == "a b/data/train"
        assert args.num_epochs == 3
        assert args.save_init
    elif name == "evaluate.sh":
        assert args.val_data_dir == "a b/data/validation"
    else:
        assert args.image_path == ["my photo.jpg"]
    if name != "train.sh":
        assert args.model_load_dir == "some where"
    # The user's flags come last and win.
    script, *argv = run_wrapper(wrappers, name, "--num_classes=7", env=env)
    assert PARSE[script](argv).num_classes == 7


def test_the_page_of_flags_is_what_the_parsers_make():
    page = (DOCS / "flags.md").read_text(encoding="utf-8")
    made = write_flags.make_page(page, write_flags.make_parsers())
    assert made == page, "python3 tools/write_flags.py"


def test_every_flag_is_on_its_page_and_the_page_has_no_other():
    text = (DOCS / "flags.md").read_text(encoding="utf-8")
    parsers = write_flags.make_parsers()
    flags = {
        option
        for parser in parsers.values()
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    } - {"--help", "--version"}
    table = set(re.findall(r"^\| `(--[\w-]+)", text, re.MULTILINE))
    aliases = {"--model_update", "--num_epoch", "--rgb-mean", "--rgb-std"}
    assert table == flags - aliases
    assert all(f"`{alias}`" in text for alias in aliases)
    for script, parser in parsers.items():
        rows = set(re.findall(rf"^\| `(--[\w-]+)`.*\|.*\b{script}\b.*\|", text, re.MULTILINE))
        own = {a.option_strings[0] for a in parser._actions if a.nargs != 0}
        assert own <= rows, script


def prose(path: Path) -> str:
    """A Markdown text without its code blocks and HTML comments."""
    text = path.read_text(encoding="utf-8")
    return re.sub(r"^```.*?^```$|<!--.*?-->", "", text, flags=re.MULTILINE | re.DOTALL)


def headings(path: Path) -> list[tuple[int, str]]:
    found = re.findall(r"^(#+) (.*)$", prose(path), re.MULTILINE)
    return [(len(marks), title) for marks, title in found]


def anchors(path: Path) -> set[str]:
    """Where a link can point in a Markdown text, by the rule of GitHub's headings."""
    slugs: list[str] = []
    for _, title in headings(path):
        title = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", title)
        slug = re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
        slugs.append(f"{slug}-{slugs.count(slug)}" if slug in slugs else slug)
    return set(slugs)


def links(path: Path) -> list[tuple[Path, str]]:
    """The relative links of a Markdown text: file and anchor."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if not re.match(r"[a-z]+:", target):
            name, _, anchor = target.partition("#")
            found.append(((path.parent / name).resolve() if name else path, anchor))
    return found


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_and_anchor_leads_somewhere(path):
    for target, anchor in links(path):
        assert target.exists(), target
        if anchor:
            assert anchor in anchors(target), f"{target}#{anchor}"


def test_a_link_that_leads_nowhere_is_found(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("# A `b`, c\n\n[x](#a-b-c) [y](gone.md) [z](https://example.com)\n")
    assert links(page) == [(page, "a-b-c"), (tmp_path / "gone.md", "")]
    assert anchors(page) == {"a-b-c"} and not (tmp_path / "gone.md").exists()


@pytest.mark.parametrize("readme", (README, CHINESE), ids=lambda path: path.name)
def test_every_page_is_within_two_clicks(readme):
    first = {target for target, _ in links(readme)}
    pages = [path for path in first - {README, CHINESE} if path.suffix == ".md"]
    second = {target for path in pages for target, _ in links(path)}
    assert set(DOCUMENTS) <= first | second | {readme}
    assert set(DOCS.iterdir()) <= first | second


def test_the_readme_is_short():
    assert README.stat().st_size <= 12_000


@pytest.mark.parametrize("readme", (README, CHINESE), ids=lambda path: path.name)
def test_every_network_has_its_line_in_the_readme(readme):
    """And nothing else has: a network of the table without a line, or the reverse, is found."""
    assert column(readme)["`--model`"] == {f"`{name}`" for name in model_registry.MODELS}


def column(path: Path) -> dict[str, set[str]]:
    """The first column of each table of a Markdown text, by its heading."""
    found = {}
    for table in re.findall(r"(?:^\|.*\n)+", prose(path), re.MULTILINE):
        head, _, *rows = (line.split(" | ")[0].strip("| ") for line in table.splitlines())
        found[head] = set(rows)
    return found


def test_the_chinese_readme_says_what_the_readme_says():
    english, chinese = (path.read_text(encoding="utf-8") for path in (README, CHINESE))
    assert commands(chinese) == commands(english)
    assert [level for level, _ in headings(CHINESE)] == [level for level, _ in headings(README)]
    assert list(column(CHINESE).values()) == list(column(README).values())
    blocks = r"^```text\n.*?^```"
    assert re.findall(blocks, chinese, re.M | re.S) == re.findall(blocks, english, re.M | re.S)
    # Figures, and links but for their anchors, which are Chinese where the heading is.
    figures = r"\d[\d,.]*\d"
    assert set(re.findall(figures, chinese)) == set(re.findall(figures, english))
    pages = [{target for target, _ in links(path)} for path in (README, CHINESE)]
    assert pages[0] - {CHINESE} == pages[1] - {README}


def messages() -> list[str]:
    """Every string of the program and of its wrappers, `...` where a value is filled in."""
    found = []
    for path in [*ROOT.glob("*.py"), *ROOT.glob("cnns/**/*.py"), *ROOT.glob("tools/*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
            elif isinstance(node, ast.JoinedStr):
                parts = (v.value if isinstance(v, ast.Constant) else "..." for v in node.values)
                found.append("".join(parts))
    return found + [path.read_text(encoding="utf-8") for path in ROOT.glob("*.sh")]


@pytest.mark.parametrize("page", ("errors.md", "several-machines.md"))
def test_the_messages_that_a_page_explains_exist(page):
    templates = messages()
    cells = column(DOCS / page)["message"]
    quoted = [quote for cell in cells for quote in re.findall(r"`([^`]+)`", cell)]
    assert len(quoted) >= 5
    for quote in quoted:
        # What stands around values, numbers among them, has to be in one message.
        pieces = [piece.strip() for piece in re.split(r"\.\.\.|\d+(?!\.)", quote)]
        assert any(all(piece in template for piece in pieces) for template in templates), quote


def test_the_scripts_can_be_imported_without_effect():
    scripts = ("of_cnn_train_val", "of_cnn_evaluate", "of_cnn_inference", "resnet_to_onnx")
    code = f"import {', '.join(scripts)}, tools.benchmark"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
