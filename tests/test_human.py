"""Sheets for annotators who do not know whose replies they rate, and the scores of what they filled in."""

import base64
import codecs
import csv
import html.parser
import io
import json
import re
import shutil
import subprocess

import pytest

from miracle_jax import human

CRITERIA = ["readability", "personalization", "coherence"]
NODE = shutil.which("node")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def run(command):
    human.main(command.split())


def refused(capsys, command):
    """The sentence with which a command ends."""
    with pytest.raises(SystemExit) as stop:
        run(command)
    assert stop.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    return error.removeprefix("error: ").strip()


def line(number, reply="Well.", **changes):
    record = {
        "id": str(number),
        "input": [f"Question {number}?", "Really?"],
        "output": ["Yes.", "the reference"],
        "personality": "lyrical, critical",
        "reply": reply,
    }
    return record | changes


def write(path, records):
    with open(path, "w", encoding="utf-8") as file:
        file.writelines(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


def make_sheets(systems=("one", "two"), count=4, flags=""):
    """The folder `out`."""
    for name in systems:
        write(f"{name}.jsonl", [line(number, f"{number} {len(name) * '!'}") for number in range(count)])
    run("sheets out --predictions " + " ".join(f"{name}={name}.jsonl" for name in systems) + f" {flags}")


def rows(path):
    with open(path, encoding="utf-8-sig", newline="") as file:
        return list(csv.reader(file))


def key():
    with open("out/key.json", encoding="utf-8") as file:
        return json.load(file)["items"]


def fill(sheet, rate, encoding="utf-8-sig", newline="\r\n", **dialect):
    """Writes filled-SHEET.csv. rate(sheet, system, instance, criterion) is what goes into a cell."""
    head, *items = rows(f"out/sheet-{sheet}.csv")
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n", **dialect)
    writer.writerow(head)
    for row in items:
        item = key()[row[0]]
        ratings = [rate(sheet, item["system"], int(item["instance"]), criterion) for criterion in CRITERIA]
        writer.writerow(row[:4] + ratings)
    with open(f"filled-{sheet}.csv", "w", encoding=encoding, newline=newline) as file:
        file.write(text.getvalue())


def scores():
    with open("out/human.json", encoding="utf-8") as file:
        return json.load(file)


def varied(sheet, system, instance, criterion):
    return 1 + (instance * 3 + sheet * (instance % 3 == 0) + len(system + criterion)) % 5


def test_a_sheet_has_every_reply_with_its_context_and_no_rating():
    make_sheets(flags="--annotators 2")
    for sheet in (1, 2):
        head, *items = rows(f"out/sheet-{sheet}.csv")
        assert [cell.partition(":")[0] for cell in head] == ["item", "context", "personality", "reply", *CRITERIA]
        assert all(re.search(r": .*\? 1 \(not at all\) to 5 \(fully\)$", cell) for cell in head[4:])
        for code, context, personality, reply, *ratings in items:
            item = key()[code]
            assert item["sheet"] == sheet
            number = item["instance"]
            assert context == f"A: Question {number}?\nB: Yes.\nA: Really?"
            assert (personality, reply) == ("lyrical, critical", f"{number} !!!")
            assert ratings == ["", "", ""]
        shown = {(key()[row[0]]["system"], key()[row[0]]["instance"]) for row in items}
        assert len(items) == 8 and len(shown) == 8


def test_a_context_may_hold_no_reply_yet():
    write("a.jsonl", [line(0, input=["Hm?"], output=[]), line(1, input=["So?"], output=["the reference"])])
    run("sheets out --predictions a=a.jsonl")
    assert sorted(row[1] for row in rows("out/sheet-1.csv")[1:]) == ["A: Hm?", "A: So?"]


def test_the_same_instances_are_drawn_for_all():
    make_sheets(count=40, flags="--limit 7")
    drawn = [
        {item["instance"] for item in key().values() if (item["sheet"], item["system"]) == (sheet, system)}
        for sheet in (1, 2, 3)
        for system in ("one", "two")
    ]
    assert len(drawn[0]) == 7 and all(some == drawn[0] for some in drawn)
    assert drawn[0] != {str(number) for number in range(7)}


def test_annotators_cannot_tell_systems_apart():
    make_sheets(("zebra", "aardvark"), count=20)
    seen, codes = [], set()
    for sheet in (1, 2, 3):
        for ending in ("csv", "html"):
            with open(f"out/sheet-{sheet}.{ending}", encoding="utf-8") as file:
                content = file.read()
            assert "zebra" not in content and "aardvark" not in content and "the reference" not in content
        order = [row[0] for row in rows(f"out/sheet-{sheet}.csv")[1:]]
        assert order == sorted(order) and not codes & set(order)
        codes |= set(order)
        seen.append([(key()[code]["system"], key()[code]["instance"]) for code in order])
        first_half = [system for system, _ in seen[-1][:20]]
        assert 5 < first_half.count("zebra") < 15
    assert seen[0] != seen[1] != seen[2] != seen[0]
    assert all(re.fullmatch("[BCDFGHJKLMNPQRSTVWXZ]{5}", code) for code in codes)


def test_the_seed_decides_everything(tmp_path):
    make_sheets(flags="--limit 2")
    command = "sheets {} --predictions one=one.jsonl two=two.jsonl --limit 2 --seed {}"
    run(command.format("again", 0))
    run(command.format("other", 1))
    folders = ("out", "again", "other")
    content = {name: {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()} for name in folders}
    assert len(content["out"]) == 7
    assert content["again"] == content["out"]
    assert all(content["other"][name] != content["out"][name] for name in content["out"])


def test_no_cell_becomes_a_formula_and_every_text_can_be_had_back():
    replies = ["=1+1", "+1", "-5 degrees", "@you", " =1", "\t=1", "＝1", "'tis", "''", 'say "a, b;c"', "a\r\nb", "Ж "]
    write("a.jsonl", [line(number, reply) for number, reply in enumerate(replies)])
    run("sheets out --predictions a=a.jsonl")
    found = {}
    for code, _, _, reply, *_ in rows("out/sheet-1.csv")[1:]:
        assert reply.strip()[0] not in "=+-@＝"
        found[int(key()[code]["instance"])] = reply.removeprefix("'")
    assert [found[number] for number in range(len(replies))] == replies


class Page(html.parser.HTMLParser):
    """What a browser finds in a page."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text, self.script = [], "", ""
        with open(path, encoding="utf-8", newline="") as file:
            self.feed(file.read())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] == "script":
            self.script += data
        else:
            self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]


NASTY = """</script><script>alert("1")</script> <img src=x onerror='alert(2)'> &amp; $items ${name} '"""


def test_texts_cannot_break_the_page():
    nasty = line("0", NASTY, input=[NASTY], output=[], personality=NASTY)
    write("a.jsonl", [nasty | {"id": NASTY}, nasty])
    run("sheets out --predictions a=a.jsonl")
    page = Page("out/sheet-1.html")
    assert len(page.all("script")) == 1 and not page.all("img")
    assert "alert" not in page.script
    assert page.text.count(NASTY) == 2 * 3


def test_the_page_has_all_of_the_sheet_and_nothing_from_outside():
    make_sheets()
    page = Page("out/sheet-2.html")
    with open("out/sheet-2.csv", encoding="utf-8-sig", newline="") as file:
        text = file.read()
    head = page.all("body")[0]["data-head"]
    lines = [section["data-line"] for section in page.all("section")]
    assert "\r\n".join([head, *(line + ",,," for line in lines), ""]) == text
    codes = [row[0] for row in rows("out/sheet-2.csv")[1:]]
    buttons = [(button["name"], button["value"]) for button in page.all("input")]
    expected = [(f"{code} {name}", str(n)) for code in codes for name in CRITERIA for n in range(1, 6)]
    assert buttons == expected
    for question in ("easy to read", "every trait", "fit the context"):
        assert question in page.text
    assert not any({"src", "href"} & set(attributes) for _, attributes in page.tags)
    assert "http" not in page.script


def test_an_empty_reply_is_named():
    write("a.jsonl", [line(0, " ")])
    run("sheets out --predictions a=a.jsonl")
    assert rows("out/sheet-1.csv")[1][3] == "(an empty reply)"


BROWSER = """
const [script, data] = require("fs").readFileSync(0, "utf8").split("\\0");
const { about, items, inputs, clicks, stored } = JSON.parse(data);
const log = { asked: [], stored };
const listeners = {}, elements = { progress: {}, next: {}, save: {} };
const sections = items.map(([line, scales]) => ({
  dataset: { line }, classList: { toggle() {} }, querySelectorAll: () => scales,
  scrollIntoView() { log.scrolled = line; },
}));
globalThis.document = {
  body: { dataset: about }, getElementById: id => elements[id], addEventListener: (on, f) => { listeners[on] = f; },
  querySelectorAll: tag => tag === "section" ? sections : inputs,
  createElement: () => ({ click() { log.file = this.download; } }),
};
globalThis.localStorage = { getItem: name => stored[name] ?? null, setItem: (name, x) => { stored[name] = x; } };
globalThis.confirm = question => { log.asked.push(question); return true; };
URL.createObjectURL = blob => { log.blob = blob; };
(0, eval)(script);
log.checked = inputs.filter(input => input.checked).map(input => [input.name, input.value]);
for (const [name, value] of clicks) {
  listeners.change({ target: inputs.find(input => input.name === name && input.value === value) });
}
log.progress = elements.progress.textContent;
elements.next.onclick();
elements.save.onclick();
log.blob.arrayBuffer().then(bytes => {
  log.csv = Buffer.from(bytes).toString("base64");
  console.log(JSON.stringify(log));
});
"""
"""A browser as far as the page needs one, for Node.js."""


def visit(page, clicks, stored):
    """What the page does when the named buttons are clicked, then `Next` and `Save`."""
    body = page.all("body")[0]
    about = {name.removeprefix("data-"): value for name, value in body.items()}
    scales = page.all("fieldset")
    items = [[section["data-line"], scales[3 * i : 3 * i + 3]] for i, section in enumerate(page.all("section"))]
    data = {"about": about, "items": items, "inputs": page.all("input"), "clicks": clicks, "stored": stored}
    done = subprocess.run(
        [NODE, "-e", BROWSER], input=f"{page.script}\0{json.dumps(data)}", capture_output=True, text=True,
        encoding="utf-8",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.skipif(NODE is None, reason="Node.js, which runs the page's script, is not installed")
def test_what_the_page_saves_is_scored():
    write("a.jsonl", [line(0, '=1 "quoted"\n次の'), line(1, NASTY)])
    run("sheets out --predictions a=a.jsonl --annotators 1")
    page = Page("out/sheet-1.html")
    first, second = (row[0] for row in rows("out/sheet-1.csv")[1:])
    clicks = [[f"{first} {name}", rating] for name, rating in zip(CRITERIA, "125", strict=True)]
    before = visit(page, clicks, {})
    assert before["progress"] == "1 of 2 items rated."
    assert before["asked"] == ["Items that are not fully rated: 1. Save the sheet all the same?"]
    assert second in before["scrolled"]
    more = [[f"{second} {name}", "4"] for name in CRITERIA]
    after = visit(page, more, before["stored"])  # the page is opened again
    assert before["checked"] == [] and after["checked"] == clicks
    assert after["progress"] == "2 of 2 items rated." and after["asked"] == []
    assert after["file"] == "sheet-1-filled.csv"
    saved = base64.b64decode(after["csv"])
    assert saved.startswith(codecs.BOM_UTF8)
    with open("filled.csv", "wb") as file:
        file.write(saved)
    filled, empty = rows("filled.csv"), rows("out/sheet-1.csv")
    assert [row[:4] for row in filled] == [row[:4] for row in empty] and filled[0] == empty[0]
    assert [row[4:] for row in filled[1:]] == [["1", "2", "5"], ["4", "4", "4"]]
    run("score out filled.csv")
    means = {name: score["mean"] for name, score in scores()["systems"]["a"].items()}
    assert means == {"readability": 0.375, "personalization": 0.5, "coherence": 0.875}


RATINGS = {  # of two annotators on two instances
    ("one", "readability"): ([5, 3], [4, 2]),
    ("one", "personalization"): ([1, 1], [1, 1]),
    ("one", "coherence"): ([5, 5], [5, 5]),
    ("two", "readability"): ([1, 3], [1, 3]),
    ("two", "personalization"): ([5, 1], [3, 3]),
    ("two", "coherence"): ([5, 5], [5, 4]),
}


def by_hand(sheet, system, instance, criterion):
    return RATINGS[system, criterion][sheet - 1][instance]


def test_means_are_those_by_hand(capsys):
    make_sheets(count=2, flags="--annotators 2")
    for sheet in (1, 2):
        fill(sheet, by_hand)
    capsys.readouterr()
    run("score out filled-1.csv filled-2.csv")
    result = scores()
    means = {(s, c): score["mean"] for s, of in result["systems"].items() for c, score in of.items()}
    assert means == {
        ("one", "readability"): (3.5 - 1) / 4, ("one", "personalization"): 0, ("one", "coherence"): 1,
        ("two", "readability"): (2 - 1) / 4, ("two", "personalization"): (3 - 1) / 4,
        ("two", "coherence"): round((4.75 - 1) / 4, 4),
    }  # fmt: skip
    assert all(score["ratings"] == 4 for of in result["systems"].values() for score in of.values())
    assert (result["annotators"], result["instances"], result["missing"]) == (2, 2, 0)
    with open("out/human.md", encoding="utf-8") as file:
        text = file.read()
    assert capsys.readouterr().out == text
    assert text.splitlines()[:4] == [
        "| Model | Readability | Personalization | Coherence |",
        "| --- | --- | --- | --- |",
        "| one | **0.62** [0.38, 0.88] (4) | 0.00 [0.00, 0.00] (4) | **1.00** [1.00, 1.00] (4) |",
        "| two | 0.25 [0.00, 0.50] (4) | **0.50** [0.25, 0.75] (4) | 0.94 [0.88, 1.00] (4) |",
    ]


def test_unrated_cells_and_missing_items_are_left_out_and_counted():
    make_sheets(("one",), count=2, flags="--annotators 2")
    fill(1, by_hand)
    fill(2, lambda sheet, system, instance, criterion: 4 if criterion == "readability" else "")
    head, *items = rows("filled-2.csv")
    with open("filled-2.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head] + [row for row in items if key()[row[0]]["instance"] == "0"] + [[""] * 7])
    run("score out filled-1.csv filled-2.csv")
    result = scores()
    # 4.5 on the first instance, 3 on the second: every instance counts the same.
    assert result["systems"]["one"]["readability"] == {"mean": 0.6875, "low": 0.5, "high": 0.875, "ratings": 3}
    assert result["systems"]["one"]["personalization"]["ratings"] == 2
    assert result["missing"] == 5
    assert result["kappa"]["readability"]["rated_by_all"] == 1
    assert result["kappa"]["coherence"] == {
        "kappa": None, "reason": "nothing is rated by all annotators", "rated_by_all": 0
    }  # fmt: skip


def test_a_criterion_that_nobody_rated_has_no_figures():
    make_sheets(flags="--annotators 1")
    fill(1, lambda sheet, system, instance, criterion: "" if (system, criterion) == ("two", "coherence") else 3)
    run("score out filled-1.csv")
    assert scores()["systems"]["two"]["coherence"] == {"mean": None, "low": None, "high": None, "ratings": 0}
    with open("out/human.md", encoding="utf-8") as file:
        assert file.read().splitlines()[3].endswith("| no ratings |")


# Ten subjects, fourteen raters, five categories: https://en.wikipedia.org/wiki/Fleiss%27_kappa#Worked_example
FLEISS = [
    [0, 0, 0, 0, 14], [0, 2, 6, 4, 2], [0, 0, 3, 5, 6], [0, 3, 9, 2, 0], [2, 2, 8, 1, 1],
    [7, 7, 0, 0, 0], [3, 2, 6, 3, 0], [2, 5, 3, 2, 2], [6, 5, 2, 1, 0], [0, 2, 2, 3, 7],
]  # fmt: skip


def test_kappa_is_that_of_a_published_example():
    make_sheets(("one",), count=10, flags="--annotators 14")
    expanded = [[category + 1 for category, n in enumerate(row) for _ in range(n)] for row in FLEISS]
    for sheet in range(1, 15):
        fill(sheet, lambda sheet, _, instance, criterion: expanded[instance][sheet - 1] if criterion[0] != "c" else 3)
    run("score out " + " ".join(f"filled-{sheet}.csv" for sheet in range(1, 15)))
    kappa = scores()["kappa"]
    assert kappa["readability"] == {"kappa": pytest.approx(0.210, abs=5e-4), "reason": "", "rated_by_all": 10}
    assert kappa["personalization"] == kappa["readability"]
    assert kappa["coherence"] == {"kappa": None, "reason": "all ratings are the same", "rated_by_all": 10}
    # All criteria together: agreement (2 * 10 * 0.378 + 10) / 30, chance from the categories of all 420 ratings.
    shares = [(2 * n + (140 if category == 2 else 0)) / 420 for category, n in enumerate([20, 28, 39, 21, 32])]
    chance = sum(share**2 for share in shares)
    assert kappa["all"]["kappa"] == pytest.approx(((2 * 0.37802 + 1) / 3 - chance) / (1 - chance), abs=1e-4)
    with open("out/human.md", encoding="utf-8") as file:
        assert "readability 0.21, personalization 0.21, coherence not defined (all ratings are the same)" in file.read()


def test_one_annotator_has_no_kappa():
    make_sheets()
    fill(2, varied)
    run("score out filled-2.csv")
    for kappa in scores()["kappa"].values():
        assert kappa["kappa"] is None and kappa["reason"] == "there is one annotator"
    assert scores()["annotators"] == 1


def test_the_interval_holds_the_mean_and_narrows_with_instances():
    widths = []
    for count in (9, 90):
        shutil.rmtree("out", ignore_errors=True)
        make_sheets(("one",), count=count, flags="--annotators 1")
        fill(1, lambda sheet, system, instance, criterion: (1, 5, 4)[instance % 3])
        run("score out filled-1.csv")
        score = scores()["systems"]["one"]["readability"]
        assert score["low"] < score["mean"] == round(7 / 12, 4) < score["high"]
        widths.append(score["high"] - score["low"])
    # Means of three equally frequent scores 0, 1 and 0.75: a standard deviation of 0.425 over the root of the count.
    assert widths == [pytest.approx(2 * 1.96 * 0.425 / count**0.5, rel=0.1) for count in (9, 90)]


def figures(tmp_path):
    return [(tmp_path / "out" / name).read_bytes() for name in ("human.json", "human.md")]


def test_the_same_sheets_give_the_same_bytes_in_any_order(tmp_path):
    make_sheets(count=50)
    for sheet in (1, 2, 3):
        fill(sheet, varied)
    run("score out filled-1.csv filled-2.csv filled-3.csv")
    before = figures(tmp_path)
    head, *items = rows("filled-2.csv")
    with open("filled-2.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([head, *reversed(items)])
    run("score out filled-3.csv filled-2.csv filled-1.csv")
    assert figures(tmp_path) == before


@pytest.mark.parametrize(
    "form",
    [
        {"delimiter": ";"},
        {"delimiter": ";", "quoting": csv.QUOTE_ALL, "encoding": "utf-8"},
        {"delimiter": "\t", "encoding": "utf-16"},
        {"encoding": "cp1252", "newline": "\r"},
    ],
    ids=["semicolon", "all-quoted-without-bom", "tab-utf-16", "cp1252-old-mac"],
)
def test_what_spreadsheet_programs_save_is_read(tmp_path, form):
    reply = 'Café; "naïve", really\n\n…'
    write("one.jsonl", [line(number, reply) for number in range(3)])
    run("sheets out --predictions one=one.jsonl --annotators 1")
    fill(1, varied)
    run("score out filled-1.csv")
    before = figures(tmp_path)
    fill(1, varied, **form)
    run("score out filled-1.csv")
    assert figures(tmp_path) == before


def test_columns_are_found_by_name(tmp_path):
    make_sheets(("one",), flags="--annotators 1")
    fill(1, varied)
    run("score out filled-1.csv")
    before = figures(tmp_path)
    with open("filled-1.csv", "w", encoding="utf-8", newline="") as file:
        text = [[" Coherence", "ITEM", "note", "personalization", "readability"]]
        for code, *_ in rows("out/sheet-1.csv")[1:]:
            instance = int(key()[code]["instance"])
            r, p, c = (f" {varied(1, 'one', instance, name)} " for name in CRITERIA)
            text.append([c, code, "fine, I think", p, r])
        csv.writer(file).writerows(text)
    run("score out filled-1.csv")
    assert figures(tmp_path) == before


def test_every_problem_of_the_filled_sheets_is_listed(capsys):
    make_sheets(("one",), count=3)
    first, second, third = (row[0] for row in rows("out/sheet-1.csv")[1:])
    with open("bad.csv", "w", encoding="utf-8") as file:
        file.write(
            "item,reply,readability,personalization,coherence\n"
            f'{first},"two\nlines",6,4.5,good\n'
            "WRONG,x,1,1,1\n"
            f"{second},x,0,,-1\n"
            f"{second},x,1,1,1\n"
        )
    fill(2, varied)
    fill(3, lambda *_: "")
    shutil.copy("filled-2.csv", "again.csv")
    with open("cut.csv", "w", encoding="utf-8") as file:
        file.write(f'item,readability,personalization,coherence\n{third},1,1,1\n{first},"1,1,1\n')
    with open("other.csv", "w", encoding="utf-8") as file:
        file.write("item,readability,coherence\n")
    expected = "expected a whole number from 1 to 5, or nothing"
    assert refused(capsys, "score out bad.csv filled-2.csv again.csv filled-3.csv cut.csv other.csv").splitlines() == [
        "the filled sheets cannot be scored; mend them, or leave a file out:",
        f"bad.csv:2: readability of item {first} is '6'; {expected}",
        f"bad.csv:2: personalization of item {first} is '4.5'; {expected}",
        f"bad.csv:2: coherence of item {first} is 'good'; {expected}",
        "bad.csv:4: there is no item 'WRONG' in these sheets",
        f"bad.csv:5: readability of item {second} is '0'; {expected}",
        f"bad.csv:5: coherence of item {second} is '-1'; {expected}",
        f"bad.csv:6: item {second} is at line 5 already",
        "again.csv:1: sheet 2 is in filled-2.csv already; every annotator counts once",
        "filled-3.csv:1: no item is rated",
        "cut.csv:3: unexpected end of data; save the sheet as CSV once more",
        "cut.csv:1: sheet 1 is in bad.csv already; every annotator counts once",
        "other.csv:1: expected a sheet as CSV, whose first line names the columns item, readability, personalization, "
        "coherence",
    ]


def test_a_long_list_of_problems_is_cut_and_counted(capsys):
    make_sheets(("one",), count=10)
    fill(1, lambda *_: 7)
    error = refused(capsys, "score out filled-1.csv").splitlines()
    assert len(error) == 22 and error[-1] == "... and 10 more"


@pytest.mark.parametrize("twice", ["filled-1.csv filled-1.csv", "filled-1.csv ./filled-1.csv"])
def test_an_annotator_counts_once(capsys, twice):
    make_sheets()
    fill(1, varied)
    assert "sheet 1 is in filled-1.csv already" in refused(capsys, f"score out {twice}")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ('{"id": 1', "a.jsonl:2: invalid JSON at column 9: Expecting ',' delimiter; expected one JSON object a line"),
        (b'{"id": "\xff"}', "a.jsonl:2: invalid JSON: byte 9 (0xff) is not UTF-8; expected one JSON object a line"),
        ("[1]", "a.jsonl:2: this is no object; expected a JSON object with id, input, output, personality and reply"),
        (line(5, id=5), "a.jsonl:2: 'id' is missing or not a text"),
        (line(5, reply=None), "a.jsonl:2: 'reply' is missing or not a text"),
        (line(5, personality=""), "a.jsonl:2: 'personality' is empty; expected a text"),
        (line(5, id=" "), "a.jsonl:2: 'id' is empty; expected a text"),
        (line(5, input="Why?"), "a.jsonl:2: 'input' is missing or not a list of texts"),
        (line(5, output=[None]), "a.jsonl:2: 'output' is missing or not a list of texts"),
        (line(5, output=[]), "a.jsonl:2: 'input' has 2 turns and 'output' 0; expected as many, or one reply fewer"),
        (line(5, input=[], output=[]), "a.jsonl:2: 'input' has 0 turns and 'output' 0; expected as many"),
        (json.dumps(line(5, "\ud800")), "a.jsonl:2: a text has half of a surrogate pair"),
        (line(0), "a.jsonl:2: id '0' is at a.jsonl:1 already; expected one reply an id, so not --personality all"),
    ],
)
def test_a_malformed_line_is_named(tmp_path, capsys, content, problem):
    if isinstance(content, dict):
        content = json.dumps(content)
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "a.jsonl").write_bytes(json.dumps(line(0)).encode() + b"\n" + content)
    first, *problems = refused(capsys, "sheets out --predictions a=a.jsonl").splitlines()
    assert first == "the files of --predictions are not as generate --data ... --out writes them; mend them:"
    assert len(problems) == 1 and problems[0].startswith(problem)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_problems_of_all_prediction_files_are_listed(capsys):
    write("a.jsonl", [line(0), line(1, reply=1), line(2, id=None)])
    write("b.jsonl", [])
    assert refused(capsys, "sheets out --predictions a=a.jsonl b=b.jsonl").splitlines()[1:] == [
        "a.jsonl:2: 'reply' is missing or not a text",
        "a.jsonl:3: 'id' is missing or not a text",
        "b.jsonl:1: there is no reply; expected one JSON object a line",
    ]


def test_systems_that_do_not_answer_the_same_are_refused(tmp_path, capsys):
    write("a.jsonl", [line(number) for number in range(6)])
    changed = [line(3, personality="plain"), line(2, input=["Why?", "How?"]), line(0, "Otherwise."), line(9)]
    changed[2]["output"] = ["Yes.", "another reference"]  # is not shown, so it may differ
    write("b.jsonl", changed)
    write("c.jsonl", [line(number) for number in reversed(range(6))])
    assert refused(capsys, "sheets out --predictions a=a.jsonl b=b.jsonl c=c.jsonl").splitlines() == [
        "the systems do not answer the same; give all the same contexts and personalities:",
        "b does not answer 3 of the ids of a: '1', '4', '5'",
        "a does not answer 1 of the ids of b: '9'",
        "b.jsonl:2: id '2' has another context than at a.jsonl:3",
        "b.jsonl:1: id '3' has another personality than at a.jsonl:4",
    ]
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("command", "sentence"),
    [
        ("", "say what to do: python -m miracle_jax.human sheets OUT --predictions NAME=FILE ..., or "),
        ("sheet out", "say what to do: "),
        ("sheets --predictions a=a.jsonl", "say what to do: "),
        ("sheets out more", "say what to do: "),
        ("score", "name the folder of the sheets and the filled sheets: "),
        ("score out", "name the folder of the sheets and the filled sheets: "),
        ("score nothing filled.csv", "file nothing/key.json does not exist"),
        ("sheets out", "name the replies of every system with --predictions NAME=FILE.jsonl ..."),
        ("sheets out --predictions a.jsonl", "--predictions 'a.jsonl' is not of the form NAME=FILE.jsonl"),
        ("sheets out --predictions =a.jsonl", "--predictions '=a.jsonl' is not of the form NAME=FILE.jsonl"),
        ("sheets out --predictions a=", "--predictions 'a=' is not of the form NAME=FILE.jsonl"),
        ("sheets out --predictions \udcff=a.jsonl", r"--predictions '\udcff=a.jsonl' is not of the form NAME=FILE"),
        ("sheets out --predictions a=a.jsonl a=a.jsonl", "--predictions names 'a' twice; give every system a name of "),
        ("sheets out --predictions a=b.jsonl", "file b.jsonl does not exist"),
        ("sheets out --predictions a=a.jsonl --annotators 0", "--annotators and --limit must be"),
        ("sheets out --predictions a=a.jsonl --limit 0", "--annotators and --limit must be"),
        ("sheets out --predictions a=a.jsonl --seed -1", "--annotators and --limit must be"),
        ("sheets out --predictions a=a.jsonl --annotators 4000000", "4000000 items are more than there are codes; "),
        ("sheets full --predictions a=a.jsonl", "full exists; name a folder that does not, or delete it"),
        ("score full a.jsonl", "full/key.json is not a key as `sheets` writes it; take the one of these sheets"),
        ("score gs://bucket/out a.jsonl", "gs://bucket/out/human.json is not a local path"),
    ],
)
def test_mistakes_get_a_sentence(tmp_path, capsys, command, sentence):
    write("a.jsonl", [line(0)])
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "key.json").write_text('{"scale": [1, 5], "items": []}')
    error = refused(capsys, command)
    assert error.startswith(sentence) and "\n" not in error
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl", "full"]


def test_a_file_that_is_missing_or_another_is_named(tmp_path, capsys):
    make_sheets()
    assert refused(capsys, "score out filled-1.csv") == "file filled-1.csv does not exist"
    (tmp_path / "sheet.xlsx").write_bytes(b"PK\x03\x04" + bytes(range(256)) * 1000)
    assert "sheet.xlsx:1: " in refused(capsys, "score out sheet.xlsx")
    assert not list((tmp_path / "out").glob("human*"))


def full_disk(*_):
    raise OSError(28, "No space left on device")


def test_sheets_are_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(human, "_page", full_disk)
    write("a.jsonl", [line(0)])
    assert refused(capsys, "sheets out --predictions a=a.jsonl") == "No space left on device"
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_scores_are_written_whole_or_not_at_all(tmp_path, capsys, monkeypatch):
    make_sheets()
    fill(1, varied)
    before = sorted((tmp_path / "out").iterdir())
    monkeypatch.setattr(human, "_json", full_disk)
    assert refused(capsys, "score out filled-1.csv") == "No space left on device"
    assert sorted((tmp_path / "out").iterdir()) == before


def test_a_name_may_hold_what_divides_the_columns_of_the_table(tmp_path):
    write("a.jsonl", [line(0)])
    run("sheets out --predictions a|b=a.jsonl --annotators 1")
    fill(1, lambda *_: 2)
    run("score out filled-1.csv")
    assert r"| a\|b | **0.25**" in (tmp_path / "out" / "human.md").read_text()
