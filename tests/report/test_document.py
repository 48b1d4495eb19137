"""Both renderings of every block, and text that tries to be markup."""

from jax_ordermerge.report.document import (
    Bullets,
    Chapter,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
    pictures_of,
    render_html,
    render_markdown,
)

BLOCKS = [
    Heading("One <two>"),
    Paragraph("a & b"),
    Bullets(["x", "y*"]),
    Picture("p", "<svg/>", "seen"),
    Fold("more", "```\ncode <\n```"),
    Table(["name", "n"], [["a|b\nc<", "1"], ["mean", "2"]], "cap", strong=(1,)),
]


def test_html():
    page = render_html("T", BLOCKS)
    for part in (
        "<h2>One &lt;two&gt;</h2>",
        "<p>a &amp; b</p>",
        "<li>y*</li>",
        "<svg/>\n</div>\n<figcaption>seen</figcaption>",
        "<pre>```\ncode &lt;\n```</pre>",
        '<td class="text">a|b\nc&lt;</td><td>1</td>',
        '<tr class="strong">',
        '<p class="caption">cap</p>',
    ):
        assert part in page


def test_markdown():
    page = render_markdown("T", BLOCKS, pictures="report")
    for part in (
        "# T\n\n## One &lt;two&gt;\n",
        "a &amp; b",
        "- x\n- y\\*",
        "![seen](report/p.svg)\n\n*seen*",
        "````\n```\ncode <\n```\n````",
        "| a\\|b<br>c&lt; | 1 |\n| **mean** | **2** |\n\n*cap*",
    ):
        assert part in page


def test_chapters_are_folded_and_listed():
    inner = [Heading("Part"), Picture("q", "<svg/>", "deep")]
    chapters = [Chapter("First & last", inner), Chapter("Second", [Paragraph("end")])]
    page = render_html("T", [Paragraph("lead"), *chapters])
    lead, _, rest = page.partition("<nav")
    assert "<p>lead</p>" in lead
    contents, _, rest = rest.partition("</nav>")
    assert '<a href="#chapter-first-last">First &amp; last</a>' in contents
    assert '<details class="chapter">\n<summary><h2>First &amp; last</h2></summary>' in rest
    # the target lies inside the folded part, so that following the link opens it
    assert rest.index("</summary>") < rest.index('id="chapter-first-last"')
    assert "<h3>Part</h3>" in rest
    markdown = render_markdown("T", [Paragraph("lead"), *chapters], pictures=".")
    assert "lead\n\n## First &amp; last\n\n### Part\n\n![deep](./q.svg)" in markdown
    assert [picture.name for picture in pictures_of(chapters)] == ["q"]


def test_columns_that_no_row_fills_are_left_out():
    table = Table(["m", "a", "b", "text"], [["x", "", "1", "t"], ["y", "–", "", "u"]], text=(0, 3))
    assert table.filled() == Table(
        ["m", "b", "text"], [["x", "1", "t"], ["y", "", "u"]], text=[0, 2]
    )
    assert "<th>a</th>" not in render_html("T", [table])
    assert "| m | b | text |" in render_markdown("T", [table], pictures=".")
    assert Table(["a", "b"], []).filled().header == ["a", "b"]
