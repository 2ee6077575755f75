"""Documents: what is read, as what, and how each refusal is told."""

from __future__ import annotations

import codecs
import io
import logging
import os
import random
import subprocess
import sys
import threading
import zipfile
from pathlib import Path

import docx
import pytest
from fpdf import FPDF
from hypothesis import given, settings
from hypothesis import strategies as st

from longspan.errors import DocumentError, UsageError
from longspan.retrieval.documents import Document, read_documents


def make_pdf(*pages: str, password: str | None = None) -> bytes:
    pdf = FPDF()
    pdf.set_font("helvetica", size=12)
    if password:
        pdf.set_encryption(owner_password=password, user_password=password)
    for text in pages:
        pdf.add_page()
        if text:
            pdf.multi_cell(0, 6, text)
        else:
            pdf.rect(20, 20, 60, 60, style="F")  # ink, but no letters: what a scan looks like to a parser
    return bytes(pdf.output())


def make_docx() -> bytes:
    document = docx.Document()
    document.add_heading("Quarterly report", level=1)
    document.add_paragraph("Revenue of max_tokens* grew by 4 % in Zürich.")
    table = document.add_table(rows=2, cols=2)
    for cell, text in zip([c for row in table.rows for c in row.cells], ["city", "sum", "Oslo", "417"], strict=True):
        cell.text = text
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


def make_zip(**parts: str) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, text in parts.items():
            archive.writestr(name, text)
    return out.getvalue()


def make_epub() -> bytes:
    container = '<container><rootfiles><rootfile full-path="OEBPS/content.opf"/></rootfiles></container>'
    package = (
        '<package xmlns:dc="http://purl.org/dc/elements/1.1/"><metadata><dc:title>Tides</dc:title></metadata>'
        '<manifest><item id="a" href="a.xhtml"/></manifest><spine><itemref idref="a"/></spine></package>'
    )
    page = "<html><body><p>The sea rose twice a day.</p></body></html>"
    parts = {"META-INF/container.xml": container, "OEBPS/content.opf": package, "OEBPS/a.xhtml": page}
    return make_zip(**{"mimetype": "application/epub+zip", **parts})


def read_bytes(folder: Path, data: bytes, name: str = "a.txt") -> str:
    path = folder / name
    path.write_bytes(data)
    reading = read_documents([path])
    assert reading.skipped == ()
    (document,) = reading.documents
    assert document.name == str(path)
    return document.text


def refusal(*paths: str | os.PathLike[str]) -> str:
    with pytest.raises(DocumentError) as caught:
        read_documents(paths)
    message = str(caught.value)
    assert "\n" not in message
    start = (os.fspath(paths[-1]) or "''") + ": "
    assert message.startswith(start)
    return message.removeprefix(start)  # a folder's name must not pass for the reason


def refusal_of(folder: Path, data: bytes, name: str) -> str:
    (folder / name).write_bytes(data)
    return refusal(folder / name)


# Text


@settings(deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\r\t\f"), min_size=1))
def test_unicode_comes_back_unchanged_but_for_newlines(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "unicode.txt"
    data = ("." + text).encode()  # the full stop: never empty, never a byte order mark or another kind's first bytes
    expected = ("." + text).replace("\r\n", "\n").replace("\r", "\n")
    utf16 = codecs.BOM_UTF16_LE + ("." + text).encode("utf-16-le")
    utf32 = codecs.BOM_UTF32_LE + ("." + text).encode("utf-32-le")
    for written in (data, codecs.BOM_UTF8 + data, utf16, utf32):
        path.write_bytes(written)
        assert read_documents([path]).documents[0].text == expected


@pytest.mark.parametrize("codec", ["utf-8-sig", "utf-16", "utf-16-le", "utf-16-be", "utf-32", "utf-32-be"])
def test_unicode_with_a_mark_and_utf16_without(tmp_path, codec):
    text = "Smørrebrød, żółć, 東京 and 🙂 on one line.\nAnd some plainer words on the next.\n"
    marks = {"utf-32-be": codecs.BOM_UTF32_BE}
    assert read_bytes(tmp_path, marks.get(codec, b"") + text.encode(codec)) == text


@pytest.mark.parametrize(
    ("codec", "text"),
    [
        ("cp1252", "Le café était fermé à l'heure où l'été s'achève ; garçon, où êtes-vous passé ?"),
        ("cp1252", "“The naïve café” – it’s what he said… and more plain English text follows on."),
        ("latin-1", "Die Größe des Schlüssels ändert nichts daran, daß wir später zurückkommen."),
        ("cp1250", "Zażółć gęślą jaźń. Wczoraj poszedłem do sklepu, żeby kupić świeże bułki."),
        ("cp1251", "Вчера я пошёл в магазин, чтобы купить свежего хлеба и немного сыра."),
        ("koi8-r", "Вчера я пошёл в магазин, чтобы купить свежего хлеба и немного сыра."),
        ("shift_jis", "これは日本語の文章です。ファイルを読んで質問に答えます。"),
        ("gb18030", "昨天我去商店买了新鲜的面包和一些奶酪。"),
    ],
)
def test_legacy_encodings_are_guessed(tmp_path, codec, text):
    assert read_bytes(tmp_path, text.encode(codec)) == text


@pytest.mark.parametrize("word", ["café", "Zürich", "mañana"])
def test_a_short_western_word_is_not_taken_for_utf16(tmp_path, word):
    assert read_bytes(tmp_path, word.encode("latin-1")) == word


def test_a_declared_encoding_wins_over_a_guess(tmp_path):
    text = "<?xml version='1.0' encoding='iso-8859-2'?><p>Szőke nő öltözik a szobában</p>"
    assert read_bytes(tmp_path, text.encode("iso-8859-2"), "a.xml") == text


def test_utf8_with_a_cut_character_stays_utf8(tmp_path):
    text = "Вчера я пошёл в магазин. " * 20
    assert read_bytes(tmp_path, text.encode() + "я".encode()[:1]) == text + "\ufffd"


@pytest.mark.parametrize("name", ["a.md", "b.py", "c.csv", "d.json", "e.rst", "f.log", "Makefile", "g.unheard-of"])
def test_text_of_any_suffix_is_left_alone(tmp_path, name):
    text = "  a_b,*c*\n\n\n\n| x |  # <b>not bold</b> \n"
    assert read_bytes(tmp_path, text.encode(), name) == text


def test_stray_controls_and_terminal_colours_are_dropped(tmp_path):
    assert read_bytes(tmp_path, b"one\x00 word") == "one word"
    assert read_bytes(tmp_path, b"\x1b[1;31merror\x1b[0m: disk\n" * 40) == "error: disk\n" * 40


@pytest.mark.parametrize(
    "data",
    [
        random.Random(0).randbytes(4000),
        bytes(range(256)) * 8,
        b"\x7fELF\x02\x01\x01" + bytes(60),
        b"words " * 30 + b"\x00\x01\x02" * 20,
        b"\x00\x00\x00\x00",
    ],
    ids=["random", "all bytes", "program", "mixed", "zeros"],
)
def test_binary_named_txt_is_refused(tmp_path, data):
    assert "binary" in refusal_of(tmp_path, data, "a.txt")


@pytest.mark.parametrize("name", ["a.txt", "a.html", "a.pdf", "a.docx"])
def test_empty(tmp_path, name):
    assert "is empty" in refusal_of(tmp_path, b"", name)


@pytest.mark.parametrize("data", [b" \n\t\r\n\f", codecs.BOM_UTF8, codecs.BOM_UTF16_LE, b"\x00"])
def test_nothing_but_white_space_is_empty(tmp_path, data):
    assert "is empty" in refusal_of(tmp_path, data, "a.txt")


# Documents that are converted


def test_pdf_whatever_its_name(tmp_path):
    data = make_pdf("The launch code is 7319.", "Second page, in Zürich.")
    for name in ("a.pdf", "a.txt", "a", "a.docx"):
        text = read_bytes(tmp_path, data, name)
        assert text.startswith("The launch code is 7319.\n")
        assert text.endswith("\nSecond page, in Zürich.")
        assert "\f" not in text
        assert "\n\n\n" not in text
    assert "7319" in read_bytes(tmp_path, b"\n\n" + data, "junk first.txt")
    assert "7319" in read_bytes(tmp_path, b"a mail's header\n" * 20 + data, "more junk.pdf")


def test_pdf_justified_lines_keep_single_spaces(tmp_path):
    sentence = "the committee reviewed the annual figures and found them in order "
    text = read_bytes(tmp_path, make_pdf(sentence * 12), "a.pdf")
    assert " ".join(text.split()) == (sentence * 12).strip()
    assert "  " not in text


def test_pdf_without_text_needs_ocr(tmp_path, monkeypatch):
    assert "OCR" in refusal_of(tmp_path, make_pdf("", ""), "scan.pdf")

    import markitdown.converters

    def glyphs(*args: object, **options: object) -> markitdown.DocumentConverterResult:
        return markitdown.DocumentConverterResult(markdown="(cid:3)(cid:14)\n(cid:159) (cid:2)\x0c")

    monkeypatch.setattr(markitdown.converters.PdfConverter, "convert", glyphs)  # fonts that don't tell letters
    assert "OCR" in refusal_of(tmp_path, make_pdf("words"), "glyphs.pdf")


def test_what_a_converter_leaves_is_tidied(tmp_path, monkeypatch):
    import markitdown.converters

    def untidy(*args: object, **options: object) -> markitdown.DocumentConverterResult:
        return markitdown.DocumentConverterResult(markdown="\n\none\x00 \r\ntwo\ud800\n\n\n\n  three\n")

    monkeypatch.setattr(markitdown.converters.DocxConverter, "convert", untidy)
    assert read_bytes(tmp_path, make_docx(), "a.docx") == "one\ntwo?\n\n  three"


def test_pdf_behind_a_password(tmp_path):
    assert refusal_of(tmp_path, make_pdf("x", password="pw"), "a.pdf").startswith("is locked with a password")


def test_damaged_pdf_is_named_with_the_parsers_complaint(tmp_path):
    whole = make_pdf("some words")
    for data in (b"%PDF-1.4\nnothing more", whole[: len(whole) // 2], b"%PDF-1.7\n" + bytes(500)):
        assert "can't be parsed as PDF" in refusal_of(tmp_path, data, "a.pdf")


def test_docx(tmp_path):
    for name in ("a.docx", "a.txt", "a.zip"):
        text = read_bytes(tmp_path, make_docx(), name)
        assert "# Quarterly report" in text
        assert "max_tokens* grew by 4 % in Zürich." in text  # no backslashes
        assert "| Oslo | 417 |" in text


def test_docx_that_does_not_open(tmp_path):
    whole = make_docx()
    assert "damaged" in refusal_of(tmp_path, whole[: len(whole) // 2], "a.docx")
    future = whole.replace(b"PK\x01\x02\x14\x03\x14", b"PK\x01\x02\x14\x03\xff")  # a zip version yet to come
    assert future != whole
    assert "damaged" in refusal_of(tmp_path, future, "a.docx")
    assert "can't be parsed as DOCX" in refusal_of(tmp_path, make_zip(**{"word/document.xml": "<w"}), "b.docx")


@pytest.mark.parametrize("name", ["a.pdf", "a.docx", "a.xlsx"])
def test_a_name_that_lies_is_told(tmp_path, name):
    assert f"is named {Path(name).suffix}" in refusal_of(tmp_path, b"plain text", name)


def test_html_by_suffix_and_by_its_start(tmp_path):
    page = "<!DOCTYPE html>\n<html><head><style>p{}</style><script>x()</script></head>"
    page += "<body><h1>Größe</h1><p>snake_case and <a href='https://example.org/'>a link</a></p></body></html>"
    expected = "# Größe\n\nsnake_case and [a link](https://example.org/)"
    for name in ("a.html", "a.HTM", "a.txt", "a"):
        assert read_bytes(tmp_path, page.encode(), name) == expected
    assert read_bytes(tmp_path, page.encode(), "template.php") == page
    declared = page.replace("<style>", "<meta charset='iso-8859-15'><style>")
    assert read_bytes(tmp_path, declared.encode("iso-8859-15"), "a.html") == expected
    assert "is empty" in refusal_of(tmp_path, b"<html><body></body></html>", "b.html")


def test_html_nested_without_end_is_still_read_or_refused(tmp_path):
    try:
        text = read_bytes(tmp_path, b"<div>" * 3000 + b"deep" + b"</div>" * 3000, "a.html")
    except DocumentError as error:
        text = str(error)
    assert "deep" in text or "can't be parsed as HTML" in text


def test_epub(tmp_path):
    assert "The sea rose twice a day." in read_bytes(tmp_path, make_epub(), "a.epub")


def test_a_missing_extra_is_named(tmp_path, monkeypatch):
    import markitdown.converters
    from markitdown import MissingDependencyException

    def missing(*args: object, **options: object) -> None:
        raise MissingDependencyException("no openpyxl")

    monkeypatch.setattr(markitdown.converters.XlsxConverter, "convert", missing)
    assert "pip install 'markitdown[xlsx]'" in refusal_of(tmp_path, make_zip(**{"xl/workbook.xml": ""}), "a.xlsx")


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (codecs.BOM_UTF8 + b"\xd0\xcf\x11\xe0", "binary"),
        (b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "old Office"),
        (b"{\\rtf1 words}", "Rich Text"),
        (b"\x89PNG\r\n\x1a\n", "OCR"),
        (b"\xff\xd8\xff\xe0", "OCR"),
        (make_zip(**{"content.xml": "<a/>"}), "OpenDocument"),
    ],
)
def test_kinds_that_are_not_read_say_what_to_do(tmp_path, data, told):
    assert told in refusal_of(tmp_path, data, "a.bin")


def test_nothing_reaches_the_terminal(tmp_path):
    """In a process of its own, because imports warn once and pytest holds the log."""
    (tmp_path / "a.pdf").write_bytes(make_pdf("words").replace(b"/Type /Font", b"/Type /Fonk"))
    (tmp_path / "b.docx").write_bytes(make_docx())
    (tmp_path / "c.html").write_bytes(b"<div>" * 2000 + b"deep")
    (tmp_path / "d.txt").write_bytes("Größe".encode("latin-1"))
    (tmp_path / "e.pdf").write_bytes(b"%PDF-1.4 broken")
    program = (
        "import logging, pdfminer.pdfpage, sys; from longspan.retrieval.documents import read_documents;"
        "r = read_documents([sys.argv[1]]); logging.getLogger('pdfminer.pdfpage').warning('chatter');"
        "sys.exit(0 if len(r.documents) >= 3 else 9)"
    )
    done = subprocess.run(
        [sys.executable, "-W", "always", "-c", program, str(tmp_path)], capture_output=True, text=True, check=False
    )
    # Warnings of this program's own imports are none of the converters' doing.
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_the_log_of_others_is_left_alone(tmp_path, caplog):
    read_bytes(tmp_path, make_pdf("words"), "a.pdf")
    logging.getLogger("someone.else").warning("heard")
    assert "heard" in caplog.text


# Names, folders, standard input


def test_names_are_as_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "docs" / "deep").mkdir(parents=True)
    (tmp_path / "docs" / "deep" / "b.txt").write_text("b")
    (tmp_path / "docs" / "a.txt").write_text("a")
    (tmp_path / "c.txt").write_text("c")
    reading = read_documents(["./c.txt", "docs/"])
    joined = (str(Path("docs", "a.txt")), str(Path("docs", "deep", "b.txt")))
    assert reading.documents == (Document("./c.txt", "c"), Document(joined[0], "a"), Document(joined[1], "b"))


def test_a_folder_is_walked_in_order_without_hidden_things(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/y.txt", "C.txt", ".hidden.txt", ".git/config", "node_modules/x.js"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(name)
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "m.pyc").write_bytes(bytes(100))
    reading = read_documents([tmp_path])
    assert [each.text for each in reading.documents] == ["C.txt", "a/y.txt", "a/z.txt", "b.txt"]
    assert reading.skipped == ()
    assert [each.text for each in read_documents([tmp_path / ".git"]).documents] == [".git/config"]


def test_bad_files_in_a_folder_are_skipped_by_name(tmp_path):
    (tmp_path / "good.txt").write_text("good")
    (tmp_path / "empty.txt").write_bytes(b"")
    (tmp_path / "noise.txt").write_bytes(random.Random(1).randbytes(999))
    (tmp_path / "scan.pdf").write_bytes(make_pdf(""))
    (tmp_path / "gone.txt").symlink_to(tmp_path / "nowhere")
    (tmp_path / "self").symlink_to(tmp_path / "self")
    os.mkfifo(tmp_path / "pipe")
    reading = read_documents([tmp_path, tmp_path])  # twice: nothing is told twice
    assert [each.text for each in reading.documents] == ["good"]
    reasons = {Path(each.name).name: each.reason for each in reading.skipped}
    words = {"empty.txt": "empty", "gone.txt": "gone", "noise.txt": "binary", "pipe": "pipe", "scan.pdf": "OCR"}
    assert list(reasons) == [*words, "self"]
    assert all(word in reasons[name] for name, word in words.items())
    assert "check the path" in reasons["self"]


def test_a_folder_without_anything_readable(tmp_path):
    assert "no files" in refusal(tmp_path)
    for i in range(5):
        (tmp_path / f"{i}.bin").write_bytes(bytes(50))
    message = refusal(tmp_path)
    assert message.startswith("nothing in this folder could be read: ")
    assert all(f"{i}.bin is binary" in message for i in range(3))
    assert "3.bin" not in message
    assert message.endswith("and 2 more")


def test_link_loops_end_and_linked_folders_are_read_once(tmp_path):
    (tmp_path / "docs" / "sub").mkdir(parents=True)
    (tmp_path / "docs" / "sub" / "a.txt").write_text("a")
    (tmp_path / "docs" / "sub" / "up").symlink_to(tmp_path / "docs")
    (tmp_path / "docs" / "twin").symlink_to(tmp_path / "docs" / "sub")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    (tmp_path / "docs" / "out").symlink_to(tmp_path / "elsewhere")
    reading = read_documents([tmp_path / "docs"])
    assert sorted(each.text for each in reading.documents) == ["a", "b"]


def test_the_same_file_is_read_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "link.txt").symlink_to("a.txt")
    seen: list[str] = []
    reading = read_documents(["a.txt", str(tmp_path / "a.txt"), "link.txt", "."], progress=seen.append)
    assert reading.documents == (Document("a.txt", "a"),)
    assert seen == ["a.txt"]


def test_missing(tmp_path, monkeypatch):
    assert "no such file" in refusal(tmp_path / "gone.txt")
    assert "no such file" in refusal("a\0b")
    assert "path is empty" in refusal("")
    (tmp_path / "a.txt").write_text("a")
    assert "no such file" in refusal(tmp_path / "a.txt" / "b")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert "gone" in refusal(tmp_path / "a.txt", tmp_path / "dangling")


def test_no_permission(tmp_path, monkeypatch):
    """Tests may run as root, whom no permission stops: the refusal is made by hand."""
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "locked.txt").write_text("b")
    (tmp_path / "locked").mkdir()

    def deny(of):
        def opened(path, *args, **options):
            if path.name.startswith("locked"):
                raise PermissionError(13, "Permission denied", str(path))
            return of(path, *args, **options)

        return opened

    monkeypatch.setattr(Path, "read_bytes", deny(Path.read_bytes))
    monkeypatch.setattr(Path, "iterdir", deny(Path.iterdir))
    assert "chmod" in refusal(tmp_path / "locked.txt")
    assert "chmod" in refusal(tmp_path / "locked")
    reading = read_documents([tmp_path])
    assert [each.text for each in reading.documents] == ["a"]
    assert [Path(each.name).name for each in reading.skipped] == ["locked", "locked.txt"]
    assert all("chmod" in each.reason for each in reading.skipped)


def test_a_failing_disk(tmp_path, monkeypatch):
    def fail(path):
        raise OSError(5, "Input/output error")

    (tmp_path / "a.txt").write_text("a")
    monkeypatch.setattr(Path, "read_bytes", fail)
    assert "(Input/output error)" in refusal(tmp_path / "a.txt")


def test_a_folder_named_like_a_file_and_a_device(tmp_path):
    (tmp_path / "a.txt").mkdir()
    (tmp_path / "a.txt" / "b").write_text("b")
    assert [each.text for each in read_documents([tmp_path / "a.txt"]).documents] == ["b"]
    assert "device" in refusal("/dev/zero")


def test_a_pipe_given_by_name_is_read(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=("through",))
    writer.start()
    assert [each.text for each in read_documents([tmp_path / "pipe"]).documents] == ["through"]
    writer.join()


def test_a_name_that_is_not_unicode(tmp_path):
    path = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    Path(os.fsdecode(path)).write_text("a")
    (document,) = read_documents([tmp_path]).documents
    assert document.name == str(tmp_path / "caf\ufffd.txt")
    with pytest.raises(DocumentError) as caught:
        read_documents([os.fsdecode(path) + "\ud800\nsecond line"])
    assert str(caught.value).encode()
    assert "\n" not in str(caught.value)


def test_standard_input(monkeypatch):
    seen: list[str] = []
    reading = read_documents(["-", "-"], stdin=io.BytesIO(b"piped\r\n"), progress=seen.append)
    assert reading.documents == (Document("<stdin>", "piped\n"),)
    assert seen == ["<stdin>"]
    assert "7319" in read_documents(["-"], stdin=io.BytesIO(make_pdf("code 7319"))).documents[0].text
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"default")))
    assert read_documents(["-"]).documents[0].text == "default"
    monkeypatch.setattr(sys, "stdin", None)
    assert "no standard input" in refusal("-")
    for nothing in (b"", b" \n\t\n"):
        with pytest.raises(DocumentError, match=r"^-: standard input is empty: pipe a text into it$"):
            read_documents(["-"], stdin=io.BytesIO(nothing))


def test_progress_comes_before_the_reading(tmp_path):
    def stop(name: str) -> None:
        raise KeyboardInterrupt(name)

    (tmp_path / "a.txt").write_bytes(bytes(100))  # reading it would raise DocumentError
    with pytest.raises(KeyboardInterrupt, match=r"a\.txt"):
        read_documents([tmp_path], progress=stop)


def test_one_string_is_not_a_list_of_paths():
    with pytest.raises(UsageError, match="list"):
        read_documents("notes.txt")
    assert read_documents([]).documents == ()
