"""Both renderings of every block, and text that tries to be markup."""

from jax_ordermerge.report.document import (
    Bullets,
    Fold,
    Heading,
    Paragraph,
    Picture,
    Table,
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
        "<figure>\n<svg/>\n<figcaption>seen</figcaption>",
        "<pre>```\ncode &lt;\n```</pre>",
        '<td class="text">a|b\nc&lt;</td><td>1</td>',
        '<tr class="strong">',
        "<caption>cap</caption>",
    ):
        assert part in page


def test_markdown():
    page = render_markdown("T", BLOCKS, pictures="report")
    for part in (
        "# T\n\n## One &lt;two&gt;\n",
        "a &amp; b",
        "- x\n- y\\*",
        "![p](report/p.svg)\n\n*seen*",
        "````\n```\ncode <\n```\n````",
        "| a\\|b<br>c&lt; | 1 |\n| **mean** | **2** |\n\n*cap*",
    ):
        assert part in page
